// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session with a broker is made, for both roles.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_nats::{Client, Event, ServerAddr};
use martlet_core::Pattern;
use martlet_core::error::{SessionError, SessionErrorKind};
use martlet_core::transport::{Dial, Role, SessionPlan, TransportId, TransportInfo};

use crate::link::{Link, Purpose, Settings, Signals};
use crate::login::{connect_options, explain};
use crate::options::{NatsClientOptions, NatsServerOptions, without_secrets};
use crate::service::Service;
use crate::session::NatsSession;
use crate::wire;

/// Opens sessions with a NATS broker: the transporter itself, for either role.
///
/// [`NatsServer`](crate::NatsServer) and [`NatsClient`](crate::NatsClient) put it into the runtime.
#[derive(Debug, Clone)]
pub struct NatsDial {
    settings: Arc<Settings>,
    /// Whether the broker took the login the last time.
    accepted: Arc<AtomicBool>,
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
            accepted: Arc::default(),
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
            accepted: Arc::default(),
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
        let (options, login) = connect_options(&self.settings.common, &address)?;
        let raise = Arc::clone(&signals);
        let options = options.event_callback(move |event: Event| {
            raise.raise(event);
            std::future::ready(())
        });
        let client = options
            .connect(address)
            .await
            .map_err(|error| explain(&shown, &self.settings.common, &login, &self.accepted, &error))?;
        self.accepted.store(true, Ordering::Relaxed);
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
