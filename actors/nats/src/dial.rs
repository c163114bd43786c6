// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session with a broker is made, for both roles.

use std::sync::Arc;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use martlet_core::Pattern;
use martlet_core::error::{SessionError, SessionErrorKind};
use martlet_core::transport::{Dial, Role, SessionPlan, TransportId, TransportInfo};

use crate::link::{Link, Purpose, Settings, Signals};
use crate::options::{Common, NatsClientOptions, NatsServerOptions, without_secrets};
use crate::service::Service;
use crate::session::NatsSession;
use crate::wire;

/// Opens sessions with a NATS broker: the transporter itself, for either role.
///
/// [`NatsServer`](crate::NatsServer) and [`NatsClient`](crate::NatsClient) put it into the runtime.
#[derive(Debug, Clone)]
pub struct NatsDial {
    settings: Arc<Settings>,
}

impl NatsDial {
    /// For the serving side.
    pub fn server(options: &NatsServerOptions) -> Self {
        // The id is of the shape that the driver's inboxes have.
        let service = options.services_discovery.clone().map(|about| {
            let id = new_id();
            Arc::new(Service::new(about, id))
        });
        Self {
            settings: Arc::new(Settings {
                common: options.common(),
                queue: options.queue.clone().filter(|queue| !queue.is_empty()),
                graceful_shutdown: options.graceful_shutdown,
                headers: martlet_core::Headers::new(),
                deadline_header: true,
                service,
                codec: Arc::clone(&options.codec),
            }),
        }
    }

    /// For the calling side.
    pub fn client(options: &NatsClientOptions) -> Self {
        Self {
            settings: Arc::new(Settings {
                common: options.common(),
                queue: None,
                graceful_shutdown: true,
                headers: options.headers.clone(),
                deadline_header: options.deadline_header,
                service: None,
                codec: Arc::clone(&options.codec),
            }),
        }
    }

    /// The address of the first broker, without secrets.
    pub fn url(&self) -> String {
        self.settings.common.servers.first().map(|url| without_secrets(url)).unwrap_or_default()
    }

    async fn connect(&self, url: &str) -> Result<(Client, Arc<Signals>), SessionError> {
        let shown = without_secrets(url);
        let address: ServerAddr =
            url.parse().map_err(|error| SessionError::fatal(format!("server address {shown:?}: {error}")))?;
        let signals = Arc::new(Signals::default());
        let options = connect_options(&self.settings.common, &address)?;
        let raise = Arc::clone(&signals);
        let options = options.event_callback(move |event: Event| {
            raise.raise(event);
            std::future::ready(())
        });
        let client = options.connect(address).await.map_err(|error| explain(&shown, &error))?;
        // NATS-17: its reconnecting ends at once, see `link`.
        let nowhere: ServerAddr = "nats://127.0.0.1:0".parse().map_err(SessionError::from)?;
        client.set_server_pool(nowhere).await.map_err(|error| SessionError::lost(error.to_string()))?;
        Ok((client, signals))
    }
}

/// An id of 22 random letters and digits.
fn new_id() -> String {
    const ALPHABET: &[u8; 36] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    use std::hash::{BuildHasher, Hasher};
    let mut id = String::new();
    while id.len() < 22 {
        // Each state is keyed at random.
        let mut bits = std::collections::hash_map::RandomState::new().build_hasher().finish();
        for _ in 0..11 {
            id.push(char::from(ALPHABET[(bits % 36) as usize]));
            bits /= 36;
        }
    }
    id
}

fn connect_options(common: &Common, address: &ServerAddr) -> Result<ConnectOptions, SessionError> {
    let fatal = |what: &str, error: &dyn std::fmt::Display| SessionError::fatal(format!("{what}: {error}"));
    let mut options = ConnectOptions::new()
        .max_reconnects(1)
        .reconnect_delay_callback(|_| std::time::Duration::ZERO)
        .retain_servers_order()
        .ignore_discovered_servers()
        .connection_timeout(common.timeout)
        .ping_interval(common.ping_interval.max(std::time::Duration::from_millis(10)))
        .subscription_capacity(common.subscription_capacity.max(1))
        .client_capacity(common.client_capacity.max(1))
        .custom_inbox_prefix(&common.inbox_prefix);
    if let Some(name) = &common.name {
        options = options.name(name);
    }
    if let Some(credentials) = &common.credentials {
        options = options.credentials(credentials).map_err(|error| fatal("option credentials", &error))?;
    }
    if let Some(path) = &common.credentials_file {
        let text = std::fs::read_to_string(path)
            .map_err(|error| fatal(&format!("option credentialsFile {}", path.display()), &error))?;
        options = options.credentials(&text).map_err(|error| fatal("option credentialsFile", &error))?;
    }
    if let Some(seed) = &common.nkey {
        options = options.nkey(seed.clone());
    }
    let url_user = address.username().map(percent_decoded);
    let url_pass = address.password().map(percent_decoded);
    match (common.user.clone().or(url_user), common.pass.clone().or(url_pass), &common.token) {
        (_, _, Some(token)) => options = options.token(token.clone()),
        (Some(user), Some(pass), None) => options = options.user_and_password(user, pass),
        (Some(user), None, None) if common.user.is_some() => {
            options = options.user_and_password(user, String::new());
        }
        (Some(token), None, None) => options = options.token(token),
        (None, ..) => {}
    }
    if let Some(tls) = &common.tls {
        options = options.require_tls(true);
        if let Some(ca) = &tls.ca_file {
            options = options.add_root_certificates(ca.clone());
        }
        match (&tls.cert_file, &tls.key_file) {
            (Some(cert), Some(key)) => options = options.add_client_certificate(cert.clone(), key.clone()),
            (None, None) => {}
            _ => return Err(SessionError::fatal("options tls.certFile and tls.keyFile need each other")),
        }
        if tls.handshake_first {
            options = options.tls_first();
        }
    }
    Ok(options)
}

/// Undoes the percent-encoding of user and password in a URL.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, more)) = rest.split_first() {
        let hex = |at: usize| char::from(*more.get(at)?).to_digit(16);
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &more[2..];
            }
            _ => {
                bytes.push(first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What follows from a failure to connect, and why it failed, in words.
fn explain(server: &str, error: &async_nats::ConnectError) -> SessionError {
    let mut text = String::new();
    let mut tls = error.kind() == ConnectErrorKind::Tls;
    let mut denied = false;
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        let mut inner = None;
        if let Some(io) = source.downcast_ref::<std::io::Error>() {
            inner = io.get_ref();
        }
        tls |= inner.is_some_and(|inner| inner.is::<async_nats::rustls::Error>());
        let said = source.to_string();
        // Some brokers and versions put it in other words.
        denied |= said.to_ascii_lowercase().contains("authorization violation")
            || said.to_ascii_lowercase().contains("authentication");
        if !text.contains(&said) {
            text = if text.is_empty() { said } else { format!("{text}: {said}") };
        }
        cause = source.source();
    }
    let said = |what: &str| {
        if text.is_empty() { format!("{what} ({server})") } else { format!("{what} ({server}): {text}") }
    };
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            SessionError::fatal(said("the broker refused the credentials"))
        }
        _ if denied => SessionError::fatal(said("the broker refused the credentials")),
        _ if tls => SessionError::fatal(said("TLS with the broker failed")),
        ConnectErrorKind::ServerParse => SessionError::fatal(said("bad server address")),
        ConnectErrorKind::TimedOut => SessionError::refused(said("the broker did not answer in time")),
        _ => SessionError::refused(said("the broker cannot be reached")),
    }
}

impl Dial for NatsDial {
    type Session = NatsSession;

    fn info(&self) -> TransportInfo {
        let format = self.settings.codec.format();
        TransportInfo { subscribes: true, format, ..TransportInfo::new(TransportId::NATS, "nats") }
    }

    async fn dial(&self, plan: SessionPlan) -> Result<NatsSession, SessionError> {
        let settings = &self.settings;
        if let Some(about) = settings.service.as_ref().map(|service| service.about()) {
            Service::check(about).map_err(SessionError::fatal)?;
        }
        let mut failed: Option<SessionError> = None;
        for url in &settings.common.servers {
            let (client, signals) = match self.connect(url).await {
                Ok(connected) => connected,
                Err(error) => {
                    // With several brokers, one that may come back keeps the hope up.
                    let keep = failed.as_ref().is_some_and(|failed| {
                        failed.kind() == SessionErrorKind::Refused && error.kind() == SessionErrorKind::Fatal
                    });
                    if !keep {
                        failed = Some(error);
                    }
                    continue;
                }
            };
            let link = Link::new(client, signals, Arc::clone(settings));
            for subscription in &plan.subscriptions {
                link.serve(subscription).await?;
            }
            if let (Role::Server, Some(service)) = (plan.role, &settings.service) {
                // NATS-22.
                for (verb, subject) in service.subjects() {
                    let stream = link.subscribe(subject, None).await?;
                    link.streams.borrow_mut().insert(Purpose::Discovery(verb), stream);
                }
            }
            let mut inbox = link.subscribe(format!("{}*", link.inbox), None).await?;
            link.settle(&mut inbox).await?;
            link.streams.borrow_mut().insert(Purpose::Inbox, inbox);
            return Ok(NatsSession::new(link, Arc::from(without_secrets(url))));
        }
        Err(failed.unwrap_or_else(|| SessionError::fatal("option servers is empty")))
    }

    fn check_pattern(&self, pattern: &Pattern) -> Result<(), String> {
        wire::check_subject(pattern.route())
    }
}
