// SPDX-License-Identifier: MIT OR Apache-2.0
//! TLS towards a broker: the options, and what is made of them.

use std::path::PathBuf;
use std::sync::Arc;

use martlet_core::SessionError;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;

use crate::pem::Pem;

/// TLS towards a broker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct BrokerTls {
    /// A PEM file of the authorities to trust. Default: those of the platform.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the certificate to show. Default: none is shown.
    pub cert_file: Option<PathBuf>,
    /// A PEM file with its key; needed with `certFile`.
    pub key_file: Option<PathBuf>,
}

/// Options of TLS whose files have been read.
#[derive(Debug)]
#[non_exhaustive]
pub struct LoadedTls {
    /// For connections that a transporter makes itself.
    pub config: Arc<ClientConfig>,
    /// The PEM text of the authorities, for drivers that make connections; `None` for those of the platform.
    pub ca: Option<Vec<u8>>,
    /// The PEM texts of certificate and key, likewise.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl BrokerTls {
    /// The options' names, for checking configuration.
    pub const OPTION_KEYS: &'static [&'static str] = &["caFile", "certFile", "keyFile"];

    /// TLS with the platform's authorities.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the authorities in a PEM file instead of the platform's.
    #[must_use]
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// Shows a certificate.
    #[must_use]
    pub fn certificate(mut self, cert_file: impl Into<PathBuf>, key_file: impl Into<PathBuf>) -> Self {
        self.cert_file = Some(cert_file.into());
        self.key_file = Some(key_file.into());
        self
    }

    /// Reads the files.
    ///
    /// # Errors
    ///
    /// Fatal ones, which name the option: a file that cannot be read or holds something else, a certificate without
    /// its key, no authority at all.
    pub fn load(&self) -> Result<LoadedTls, SessionError> {
        let pem = |path: &PathBuf| Pem::new(path.to_string_lossy());
        let builder = ClientConfig::builder_with_provider(crate::provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| SessionError::fatal(format!("option tls: {error}")))?;
        let (roots, ca) = match &self.ca_file {
            Some(path) => {
                let ca = pem(path);
                (ca.roots("option tls.caFile")?, Some(ca.read("option tls.caFile")?))
            }
            None => {
                let mut roots = RootCertStore::empty();
                // What the platform has and we cannot read is not trusted, that is all.
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if roots.is_empty() {
                    return Err(SessionError::fatal(
                        "option tls.caFile: the platform has no authorities to trust, so one is needed",
                    ));
                }
                (Arc::new(roots), None)
            }
        };
        let builder = builder.with_root_certificates(roots);
        let (config, identity) = match (&self.cert_file, &self.key_file) {
            (Some(cert), Some(key)) => {
                let (cert, key) = (pem(cert), pem(key));
                let identity = (cert.read("option tls.certFile")?, key.read("option tls.keyFile")?);
                let config = builder
                    .with_client_auth_cert(
                        cert.certificates("option tls.certFile")?,
                        key.key("option tls.keyFile")?,
                    )
                    .map_err(|error| {
                        SessionError::fatal(format!(
                            "option tls.keyFile does not fit option tls.certFile: {error}"
                        ))
                    })?;
                (config, Some(identity))
            }
            (None, None) => (builder.with_no_client_auth(), None),
            _ => return Err(SessionError::fatal("options tls.certFile and tls.keyFile need each other")),
        };
        Ok(LoadedTls { config: Arc::new(config), ca, identity })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn refused(tls: &BrokerTls) -> String {
        tls.load().unwrap_err().to_string()
    }

    #[test]
    fn files_are_read_and_every_error_names_its_option() {
        let folder = std::env::temp_dir().join(format!("martlet-tls-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let put = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let cert = put("cert.pem", &made.cert.pem());
        let key = put("key.pem", &made.signing_key.serialize_pem());
        let stranger = put("other.pem", &other.signing_key.serialize_pem());
        let garbage = put("garbage.pem", "no pem");

        let loaded = BrokerTls::new().ca_file(&cert).certificate(&cert, &key).load().unwrap();
        assert_eq!(loaded.ca.unwrap(), made.cert.pem().into_bytes());
        assert_eq!(loaded.identity.unwrap().1, made.signing_key.serialize_pem().into_bytes());

        let missing = refused(&BrokerTls::new().ca_file(folder.join("none.pem")));
        assert!(missing.contains("option tls.caFile: cannot read file"), "{missing}");
        let none = refused(&BrokerTls::new().ca_file(&garbage));
        assert!(none.contains("option tls.caFile holds no PEM certificate"), "{none}");
        let none = refused(&BrokerTls::new().ca_file(&cert).certificate(&cert, &garbage));
        assert!(none.contains("option tls.keyFile is not a PEM private key"), "{none}");
        let misfit = refused(&BrokerTls::new().ca_file(&cert).certificate(&cert, &stranger));
        assert!(misfit.contains("option tls.keyFile does not fit option tls.certFile"), "{misfit}");
        let mut half = BrokerTls::new().ca_file(&cert);
        half.key_file = Some(key);
        assert!(refused(&half).contains("options tls.certFile and tls.keyFile need each other"));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn options_have_a_form_in_data() {
        let read: BrokerTls =
            serde_json::from_str(r#"{"caFile":"ca.pem","certFile":"c","keyFile":"k"}"#).unwrap();
        assert_eq!(read, BrokerTls::new().ca_file("ca.pem").certificate("c", "k"));
        let error = serde_json::from_str::<BrokerTls>(r#"{"ca":"x"}"#).unwrap_err().to_string();
        assert!(BrokerTls::OPTION_KEYS.iter().all(|key| error.contains(key)), "{error}");
    }
}
