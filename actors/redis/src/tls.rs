// SPDX-License-Identifier: MIT OR Apache-2.0
//! TLS towards the broker, for both connections: rustls with the `ring` provider.

use std::path::Path;
use std::sync::Arc;

use martlet_core::error::SessionError;
use redis::{ClientTlsConfig, TlsCertificates};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::options::RedisTlsOptions;

/// The same trust for the subscribing connection, which is ours, and for the publishing ones, the driver's.
pub(crate) struct Tls {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) certificates: TlsCertificates,
}

fn read(option: &str, path: &Path) -> Result<Vec<u8>, SessionError> {
    std::fs::read(path).map_err(|error| {
        SessionError::fatal(format!("option tls.{option}: cannot read file {path:?}: {error}"))
    })
}

fn chain(option: &str, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, SessionError> {
    let certificates = CertificateDer::pem_slice_iter(text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| SessionError::fatal(format!("option tls.{option} is no PEM chain: {error}")))?;
    if certificates.is_empty() {
        return Err(SessionError::fatal(format!("option tls.{option} holds no PEM certificate")));
    }
    Ok(certificates)
}

impl Tls {
    pub(crate) fn load(options: &RedisTlsOptions) -> Result<Self, SessionError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // The driver asks for the process's own; somebody may have been quicker, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let ca = options.ca_file.as_deref().map(|path| read("caFile", path)).transpose()?;
        let mut roots = RootCertStore::empty();
        match &ca {
            Some(text) => {
                for certificate in chain("caFile", text)? {
                    roots.add(certificate).map_err(|error| {
                        SessionError::fatal(format!(
                            "option tls.caFile holds an unusable certificate: {error}"
                        ))
                    })?;
                }
            }
            // What the platform has and we cannot read is not trusted, that is all.
            None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
        }
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| SessionError::fatal(format!("option tls: {error}")))?
            .with_root_certificates(roots);
        let (config, client_tls) = match (&options.cert_file, &options.key_file) {
            (Some(cert), Some(key)) => {
                let (cert, key) = (read("certFile", cert)?, read("keyFile", key)?);
                let private = PrivateKeyDer::from_pem_slice(&key).map_err(|error| {
                    SessionError::fatal(format!("option tls.keyFile is no PEM private key: {error}"))
                })?;
                let config =
                    builder.with_client_auth_cert(chain("certFile", &cert)?, private).map_err(|error| {
                        SessionError::fatal(format!("options tls.certFile and tls.keyFile: {error}"))
                    })?;
                (config, Some(ClientTlsConfig { client_cert: cert, client_key: key }))
            }
            (None, None) => (builder.with_no_client_auth(), None),
            _ => return Err(SessionError::fatal("options tls.certFile and tls.keyFile need each other")),
        };
        Ok(Self { config: Arc::new(config), certificates: TlsCertificates { client_tls, root_cert: ca } })
    }
}

/// Whether the broker has ended TLS with an alert.
pub(crate) fn is_alert(error: &std::io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(tls, Some(rustls::Error::AlertReceived(_)))
}

/// A handshake that failed: a wrong certificate is not tried again, a broken line is.
pub(crate) fn handshake_error(broker: &str, error: &std::io::Error) -> SessionError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => {
            SessionError::fatal(format!("TLS with the broker failed ({broker}, options url and tls): {tls}"))
        }
        None => SessionError::refused(format!("TLS with the broker failed ({broker}): {error}")),
    }
}
