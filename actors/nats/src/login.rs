// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who we say we are, and what TLS needs: the options, checked before anything is sent, and what a broker's
//! refusal has to do with them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use async_nats::rustls::sign::CertifiedKey;
use async_nats::rustls::{AlertDescription, CertificateError, Error as TlsError};
use async_nats::{ConnectErrorKind, ConnectOptions, ServerAddr};
use martlet_core::error::SessionError;
use martlet_core::options::percent_decoded;
use nkeys::{KeyPair, KeyPairType};

use crate::options::{Common, NatsTlsOptions};

fn fatal(what: impl std::fmt::Display) -> SessionError {
    SessionError::fatal(what.to_string())
}

pub(crate) fn connect_options(
    common: &Common,
    address: &ServerAddr,
) -> Result<(ConnectOptions, Login), SessionError> {
    let mut options = ConnectOptions::new()
        .max_reconnects(1)
        .reconnect_delay_callback(|_| Duration::ZERO)
        .retain_servers_order()
        .ignore_discovered_servers()
        .connection_timeout(common.timeout)
        .ping_interval(common.ping_interval.max(Duration::from_millis(10)))
        .subscription_capacity(common.subscription_capacity.max(1))
        .client_capacity(common.client_capacity.max(1))
        .custom_inbox_prefix(&common.inbox_prefix);
    if let Some(name) = &common.name {
        options = options.name(name);
    }
    let login = Login::of(common, address)?;
    options = login.apply(options)?;
    if let Some(tls) = &common.tls {
        options = tls_options(tls, options)?;
    }
    Ok((options, login))
}

// === login ===

/// What is shown to the broker, each with the option it is from.
pub(crate) struct Login(Vec<(Secret, &'static str)>);

enum Secret {
    User(String, String),
    Token(String),
    Nkey(String),
    Credentials(String),
}

impl Login {
    fn of(common: &Common, address: &ServerAddr) -> Result<Self, SessionError> {
        let signed = [
            ("credentials", common.credentials.is_some()),
            ("credentialsFile", common.credentials_file.is_some()),
            ("nkey", common.nkey.is_some()),
        ];
        let mut signed = signed.iter().filter(|(_, given)| *given);
        if let (Some((one, _)), Some((two, _))) = (signed.next(), signed.next()) {
            return Err(fatal(format!("options {one} and {two} exclude each other")));
        }
        let mut shown = Vec::new();
        if let Some(text) = &common.credentials {
            shown.push((Secret::Credentials(text.clone()), "option credentials"));
        }
        if let Some(path) = &common.credentials_file {
            let wrong = |error: &dyn std::fmt::Display| {
                fatal(format!("option credentialsFile {}: {error}", path.display()))
            };
            let text = String::from_utf8(read("credentialsFile", path)?).map_err(|error| wrong(&error))?;
            ConnectOptions::new().credentials(&text).map_err(|error| wrong(&error))?;
            shown.push((Secret::Credentials(text), "option credentialsFile"));
        }
        if let Some(seed) = &common.nkey {
            shown.push((Secret::Nkey(user_seed(seed)?), "option nkey"));
        }
        let url_user = address.username().map(percent_decoded);
        let url_pass = address.password().map(percent_decoded);
        let from_url = common.user.is_none() && common.pass.is_none();
        match (common.user.clone().or(url_user), common.pass.clone().or(url_pass), &common.token) {
            (_, _, Some(token)) => shown.push((Secret::Token(token.clone()), "option token")),
            (Some(user), Some(pass), None) => {
                let from = if from_url { "user and password of the url" } else { "options user and pass" };
                shown.push((Secret::User(user, pass), from));
            }
            (Some(user), None, None) if common.user.is_some() => {
                shown.push((Secret::User(user, String::new()), "option user"));
            }
            (Some(token), None, None) => {
                shown.push((Secret::Token(token), "the url's user, taken as a token"));
            }
            (None, Some(_), None) => return Err(fatal("option pass needs option user")),
            (None, None, None) => {}
        }
        Ok(Self(shown))
    }

    fn apply(&self, mut options: ConnectOptions) -> Result<ConnectOptions, SessionError> {
        for (secret, from) in &self.0 {
            options = match secret {
                Secret::User(user, pass) => options.user_and_password(user.clone(), pass.clone()),
                Secret::Token(token) => options.token(token.clone()),
                Secret::Nkey(seed) => options.nkey(seed.clone()),
                Secret::Credentials(text) => {
                    options.credentials(text).map_err(|error| fatal(format!("{from}: {error}")))?
                }
            };
        }
        Ok(options)
    }

    /// The options that the credentials are from.
    fn from(&self) -> String {
        let from: Vec<_> = self.0.iter().map(|(_, from)| *from).collect();
        if from.is_empty() { "no option gives any".to_owned() } else { from.join(", ") }
    }
}

/// Checks that a text is the seed of a user's nkey; the driver would only say that logging in failed.
fn user_seed(seed: &str) -> Result<String, SessionError> {
    let seed = seed.trim();
    let pair = match KeyPair::from_seed(seed) {
        Ok(pair) => pair,
        Err(_) if KeyPair::from_public_key(seed).is_ok() => {
            return Err(fatal("option nkey: this is a public key, its seed (SU…) is needed"));
        }
        Err(error) => return Err(fatal(format!("option nkey: this is not the seed of an nkey: {error}"))),
    };
    match pair.key_pair_type() {
        KeyPairType::User => Ok(seed.to_owned()),
        other => Err(fatal(format!(
            "option nkey: this is the seed of an nkey of type {other:?}, a user's is needed (SU…)"
        ))),
    }
}

fn read(option: &str, path: &Path) -> Result<Vec<u8>, SessionError> {
    std::fs::read(path).map_err(|error| fatal(format!("option {option} {}: {error}", path.display())))
}

// === TLS ===

fn tls_options(tls: &NatsTlsOptions, options: ConnectOptions) -> Result<ConnectOptions, SessionError> {
    let mut options = options.require_tls(true);
    if let Some(path) = &tls.ca_file {
        certificates("tls.caFile", path)?;
        options = options.add_root_certificates(path.clone());
    }
    match (&tls.cert_file, &tls.key_file) {
        (Some(cert), Some(key)) => {
            let chain = certificates("tls.certFile", cert)?;
            let pem = read("tls.keyFile", key)?;
            let pair = PrivateKeyDer::from_pem_slice(&pem)
                .map_err(|_| fatal(format!("option tls.keyFile {}: no private key in it", key.display())))?;
            let provider = async_nats::rustls::crypto::ring::default_provider();
            CertifiedKey::from_der(chain, pair, &provider).map_err(|error| {
                fatal(format!("options tls.certFile and tls.keyFile do not belong together: {error}"))
            })?;
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
        (None, None) => {}
        _ => return Err(fatal("options tls.certFile and tls.keyFile need each other")),
    }
    if tls.handshake_first {
        options = options.tls_first();
    }
    Ok(options)
}

fn certificates(option: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, SessionError> {
    let bytes = read(option, path)?;
    match CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>() {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(fatal(format!("option {option} {}: no certificate in it", path.display()))),
    }
}

/// Which option has to do with a failure of TLS.
fn tls_hint(tls: Option<&NatsTlsOptions>, error: &TlsError) -> Option<&'static str> {
    use AlertDescription as Alert;
    let shown = tls.is_some_and(|tls| tls.cert_file.is_some());
    match error {
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer) => {
            Some("option tls.caFile names the authorities to trust")
        }
        TlsError::AlertReceived(
            Alert::CertificateRequired | Alert::BadCertificate | Alert::HandshakeFailure,
        ) if !shown => Some("the broker asks for a certificate: options tls.certFile and tls.keyFile"),
        TlsError::AlertReceived(
            Alert::BadCertificate
            | Alert::UnknownCA
            | Alert::CertificateExpired
            | Alert::CertificateRevoked
            | Alert::CertificateUnknown
            | Alert::UnsupportedCertificate,
        ) => Some("the broker does not accept the certificate of option tls.certFile"),
        TlsError::InvalidMessage(_) if tls.is_some_and(|tls| tls.handshake_first) => {
            Some("option tls.handshakeFirst is for a broker that begins with TLS")
        }
        _ => None,
    }
}

// === refusals ===

/// What follows from a failure to connect, and why it failed, in words. `accepted` says whether the broker took the login the
/// last time, and hears when it does not any more.
pub(crate) fn explain(
    server: &str,
    common: &Common,
    login: &Login,
    accepted: &AtomicBool,
    error: &async_nats::ConnectError,
) -> SessionError {
    let mut text = String::new();
    let mut tls = error.kind() == ConnectErrorKind::Tls;
    let mut hint = None;
    let (mut denied, mut late) = (false, false);
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        let mut of_tls = source.downcast_ref::<TlsError>();
        if let Some(io) = source.downcast_ref::<std::io::Error>() {
            of_tls = io.get_ref().and_then(|inner| inner.downcast_ref());
        }
        if let Some(error) = of_tls {
            tls = true;
            hint = hint.or(tls_hint(common.tls.as_ref(), error));
        }
        let said = source.to_string();
        // Some brokers and versions put it in other words.
        let lower = said.to_ascii_lowercase();
        late |= lower.contains("authentication timeout");
        denied |= lower.contains("authorization violation") || lower.contains("authentication");
        if !text.contains(&said) {
            text = if text.is_empty() { said } else { format!("{text}: {said}") };
        }
        cause = source.source();
    }
    if let Some(hint) = hint {
        text = if text.is_empty() { hint.to_owned() } else { format!("{text}; {hint}") };
    }
    let said = |what: &str| {
        if text.is_empty() { format!("{what} ({server})") } else { format!("{what} ({server}): {text}") }
    };
    let refused = || {
        let text = said(&format!("the broker refused the credentials [{}]", login.from()));
        // NATS-23.
        if accepted.swap(false, Ordering::Relaxed) {
            SessionError::refused(text)
        } else {
            SessionError::fatal(text)
        }
    };
    match error.kind() {
        // This end, or the way to the broker, was slow.
        _ if late => SessionError::refused(said("the broker did not get the login in time")),
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => refused(),
        _ if denied => refused(),
        _ if tls => SessionError::fatal(said("TLS with the broker failed")),
        ConnectErrorKind::ServerParse => SessionError::fatal(said("bad server address")),
        ConnectErrorKind::TimedOut => {
            let what = "the broker did not answer within option timeout";
            let first = common.tls.as_ref().is_some_and(|tls| !tls.handshake_first);
            let hint = "; one that begins with TLS needs option tls.handshakeFirst";
            SessionError::refused(format!("{}{}", said(what), if first { hint } else { "" }))
        }
        _ => SessionError::refused(said("the broker cannot be reached")),
    }
}
