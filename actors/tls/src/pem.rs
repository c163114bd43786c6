// SPDX-License-Identifier: MIT OR Apache-2.0
//! PEM texts and files. Every error names the option that the PEM was given by.

use std::fmt;
use std::sync::Arc;

use martlet_core::SessionError;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

/// A PEM text, or the path of a file with one: a text with a line `-----BEGIN …` is the PEM itself.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pem(String);

impl Pem {
    /// A PEM text or a path.
    pub fn new(text_or_path: impl Into<String>) -> Self {
        Self(text_or_path.into())
    }

    /// Whether none was given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The text.
    ///
    /// # Errors
    ///
    /// When nothing was given, or the file cannot be read. `option` is the name to report.
    pub fn read(&self, option: &str) -> Result<Vec<u8>, SessionError> {
        if self.0.contains("-----BEGIN") {
            return Ok(self.0.clone().into_bytes());
        }
        if self.is_empty() {
            return Err(SessionError::fatal(format!("{option} is required: a PEM text, or a file with one")));
        }
        std::fs::read(&self.0).map_err(|error| {
            SessionError::fatal(format!("{option}: cannot read file {:?}", self.0)).with_source(error)
        })
    }

    /// The certificates, in order; at least one.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and when it holds no certificate.
    pub fn certificates(&self, option: &str) -> Result<Vec<CertificateDer<'static>>, SessionError> {
        let text = self.read(option)?;
        let certificates =
            CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>().map_err(|error| {
                SessionError::fatal(format!("{option} is not a PEM certificate chain: {error}"))
            })?;
        if certificates.is_empty() {
            return Err(SessionError::fatal(format!("{option} holds no PEM certificate")));
        }
        Ok(certificates)
    }

    /// The private key.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and when it holds no private key.
    pub fn key(&self, option: &str) -> Result<PrivateKeyDer<'static>, SessionError> {
        PrivateKeyDer::from_pem_slice(&self.read(option)?)
            .map_err(|error| SessionError::fatal(format!("{option} is not a PEM private key: {error}")))
    }

    /// The certificates as authorities to trust.
    ///
    /// # Errors
    ///
    /// As [`certificates`](Self::certificates), and when one is of no use for that.
    pub fn roots(&self, option: &str) -> Result<Arc<RootCertStore>, SessionError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(option)? {
            roots.add(certificate).map_err(|error| {
                SessionError::fatal(format!("{option} holds an unusable certificate: {error}"))
            })?;
        }
        Ok(Arc::new(roots))
    }
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A text may be a private key.
        let shown = if self.0.contains("-----BEGIN") { "<pem>" } else { self.0.as_str() };
        f.debug_tuple("Pem").field(&shown).finish()
    }
}

impl<T: Into<String>> From<T> for Pem {
    fn from(text_or_path: T) -> Self {
        Self::new(text_or_path)
    }
}
