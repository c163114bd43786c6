// SPDX-License-Identifier: MIT OR Apache-2.0
//! What Martlet's transporters share of TLS: rustls with the provider `ring`, PEM texts and files, whom to trust, and
//! what a failed handshake means.
//!
//! | item | is |
//! |---|---|
//! | [`BrokerTls`] | the TLS options of a connection to a broker, and what is made of them |
//! | [`Pem`] | a PEM text, or the path of a file with one |
//! | [`handshake_error`], [`tls_cause`] | whether a failure is worth another attempt |
//!
//! Not here: sockets and handshakes, which are each transporter's.
#![warn(clippy::print_stdout)]

mod broker;
mod pem;

use std::sync::Arc;

use martlet_core::SessionError;
use rustls::CertificateError;
use rustls::crypto::CryptoProvider;

pub use broker::{BrokerTls, LoadedTls};
pub use pem::Pem;

/// The provider of cryptography that all transporters use.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes it the process's own where there is none yet, for drivers that ask for that.
pub fn install_provider() {
    if CryptoProvider::get_default().is_none() {
        // Somebody may have been quicker, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

/// What rustls said, if that is what is behind an error.
pub fn tls_cause(error: &std::io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// A handshake that failed: a wrong certificate is not tried again, a broken line is. `what` says what failed, and names
/// the option: "TLS with the broker at … failed (option tls)". What people meet first is explained.
pub fn handshake_error(what: &str, error: &std::io::Error) -> SessionError {
    match tls_cause(error) {
        Some(tls) => SessionError::fatal(format!("{what}: {tls}{}", advice(tls))),
        None if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            SessionError::refused(format!("{what}: {error}: does the other end expect TLS?"))
        }
        None => SessionError::refused(format!("{what}: {error}")),
    }
}

/// What rustls leaves to guess.
fn advice(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidMessage(_) => ": the other end does not speak TLS here",
        // rustls has no kind of its own for it.
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if format!("{other:?}").contains("CaUsedAsEndEntity") =>
        {
            ": the certificate is an authority's own (basicConstraints CA:TRUE), which a peer may not show: let the \
             authority sign another one for the peer"
        }
        _ => "",
    }
}
