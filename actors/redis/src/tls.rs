// SPDX-License-Identifier: MIT OR Apache-2.0
//! TLS towards the broker, the same for both connections: the subscribing one, which is ours, and the publishing
//! ones, the driver's.

use std::io;
use std::sync::Arc;

use martlet_core::error::SessionError;
use redis::{ClientTlsConfig, TlsCertificates};
use rustls::ClientConfig;

use crate::options::RedisTlsOptions;

/// TLS whose files have been read.
pub(crate) struct Tls {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) certificates: TlsCertificates,
}

impl Tls {
    pub(crate) fn load(options: &RedisTlsOptions) -> Result<Self, SessionError> {
        // The driver asks for the process's own.
        martlet_tls::install_provider();
        let loaded = options.load()?;
        let client_tls =
            loaded.identity.map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key });
        Ok(Self { config: loaded.config, certificates: TlsCertificates { client_tls, root_cert: loaded.ca } })
    }
}

/// Whether the broker has ended TLS with an alert.
pub(crate) fn is_alert(error: &io::Error) -> bool {
    matches!(martlet_tls::tls_cause(error), Some(rustls::Error::AlertReceived(_)))
}

/// A handshake that failed: a wrong certificate is not tried again, a broken line is.
pub(crate) fn handshake_error(broker: &str, error: &io::Error) -> SessionError {
    martlet_tls::handshake_error(
        &format!("TLS with the broker failed ({broker}, options url and tls)"),
        error,
    )
}
