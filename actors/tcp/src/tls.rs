// SPDX-License-Identifier: MIT OR Apache-2.0
//! TLS around the same frames: rustls with the `ring` provider, no ALPN, as NestJS.

use std::sync::Arc;

use martlet_core::SessionError;
pub use martlet_tls::Pem;
use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};

/// The server's side of TLS.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct TlsServerOptions {
    /// The private key, as PEM text or file. Required.
    pub key: Pem,
    /// The certificate chain, own certificate first, as PEM text or file. Required.
    pub cert: Pem,
    /// The authorities that sign client certificates, as PEM text or file. Default none: clients show no
    /// certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<Pem>,
    /// Whether clients are asked for a certificate; needs `ca`. Default false.
    pub request_cert: bool,
    /// Whether a client without a certificate is refused; needs `requestCert`. Default true.
    #[serde(default = "yes")]
    pub reject_unauthorized: bool,
}

fn yes() -> bool {
    true
}

impl TlsServerOptions {
    /// A key and a certificate chain, as PEM texts or files.
    pub fn new(key: impl Into<Pem>, cert: impl Into<Pem>) -> Self {
        Self { key: key.into(), cert: cert.into(), reject_unauthorized: true, ..Self::default() }
    }

    /// Demands client certificates signed by these authorities.
    #[must_use]
    pub fn client_ca(mut self, ca: impl Into<Pem>) -> Self {
        self.ca = Some(ca.into());
        self.request_cert = true;
        self
    }

    pub(crate) fn config(&self) -> Result<Arc<ServerConfig>, SessionError> {
        let provider = martlet_tls::provider();
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| SessionError::fatal(format!("tls: {error}")))?;
        let builder = match (&self.ca, self.request_cert) {
            (Some(ca), true) => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(ca.roots("tlsOptions.ca")?, provider);
                let verifier =
                    if self.reject_unauthorized { verifier } else { verifier.allow_unauthenticated() };
                let verifier = verifier.build().map_err(|error| {
                    SessionError::fatal(format!("tlsOptions.ca cannot verify clients: {error}"))
                })?;
                builder.with_client_cert_verifier(verifier)
            }
            (None, true) => return Err(SessionError::fatal("tlsOptions.requestCert needs tlsOptions.ca")),
            (_, false) => builder.with_no_client_auth(),
        };
        builder
            .with_single_cert(self.cert.certificates("tlsOptions.cert")?, self.key.key("tlsOptions.key")?)
            .map(Arc::new)
            .map_err(|error| {
                SessionError::fatal(format!("tlsOptions.key does not fit tlsOptions.cert: {error}"))
            })
    }
}

/// The client's side of TLS.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct TlsClientOptions {
    /// The authorities that sign the server's certificate, as PEM text or file. Required: no list of public
    /// authorities is built in.
    pub ca: Pem,
    /// The client's own private key, for servers that ask for a certificate. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Pem>,
    /// The client's own certificate chain. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<Pem>,
    /// The name that the server's certificate must bear. Default: the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub servername: Option<String>,
}

impl TlsClientOptions {
    /// Trusts servers signed by these authorities, as PEM text or file.
    pub fn new(ca: impl Into<Pem>) -> Self {
        Self { ca: ca.into(), ..Self::default() }
    }

    /// Shows a certificate of one's own.
    #[must_use]
    pub fn identity(mut self, key: impl Into<Pem>, cert: impl Into<Pem>) -> Self {
        self.key = Some(key.into());
        self.cert = Some(cert.into());
        self
    }

    /// Sets the name that the server's certificate must bear.
    #[must_use]
    pub fn servername(mut self, name: impl Into<String>) -> Self {
        self.servername = Some(name.into());
        self
    }

    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, SessionError> {
        if self.ca.is_empty() {
            return Err(SessionError::fatal(
                "tlsOptions.ca is required: the authority that signs the server",
            ));
        }
        let provider = martlet_tls::provider();
        let verifier = WebPkiServerVerifier::builder_with_provider(
            self.ca.roots("tlsOptions.ca")?,
            Arc::clone(&provider),
        )
        .build()
        .map_err(|error| SessionError::fatal(format!("tlsOptions.ca cannot verify servers: {error}")))?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| SessionError::fatal(format!("tls: {error}")))?
            .with_webpki_verifier(verifier);
        let config = match (&self.key, &self.cert) {
            (Some(key), Some(cert)) => builder
                .with_client_auth_cert(cert.certificates("tlsOptions.cert")?, key.key("tlsOptions.key")?)
                .map_err(|error| {
                    SessionError::fatal(format!("tlsOptions.key does not fit tlsOptions.cert: {error}"))
                })?,
            (None, None) => builder.with_no_client_auth(),
            _ => return Err(SessionError::fatal("tlsOptions.key and tlsOptions.cert come together")),
        };
        Ok(Arc::new(config))
    }

    pub(crate) fn server_name(&self, host: &str) -> Result<ServerName<'static>, SessionError> {
        let name = self.servername.as_deref().unwrap_or(host);
        ServerName::try_from(name.to_owned())
            .map_err(|error| SessionError::fatal(format!("tlsOptions.servername {name:?}: {error}")))
    }
}
