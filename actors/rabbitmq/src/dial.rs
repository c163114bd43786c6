// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session with a broker is made, for both roles.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use martlet_core::Pattern;
use martlet_core::error::{SessionError, SessionErrorKind};
use martlet_core::settlement::Settles;
use martlet_core::transport::{Dial, SessionPlan, TransportId, TransportInfo};

use crate::address::{encoded, without_secrets};
use crate::cancel::Hearing;
use crate::intake::Room;
use crate::link::{Link, Settings, Side};
use crate::options::{RmqClientOptions, RmqServerOptions};
use crate::session::RmqSession;
use crate::wire;

/// Opens sessions with a RabbitMQ broker: the transporter itself, for either role.
///
/// [`RmqServer`](crate::RmqServer) and [`RmqClient`](crate::RmqClient) put it into the runtime.
#[derive(Debug, Clone)]
pub struct RmqDial {
    settings: Arc<Settings>,
    /// Why the options cannot be used.
    unusable: Option<Arc<str>>,
}

impl RmqDial {
    /// For the serving side.
    pub fn server(options: &RmqServerOptions) -> Self {
        let side = Side::Server {
            consumer_tag: options.consumer_tag.clone(),
            max_in_flight: options.max_in_flight,
            room: Room { buffer_bytes: options.receive_buffer_bytes, backlog_bytes: options.backlog_bytes },
        };
        let settings = Settings {
            common: options.common(),
            codec: Arc::clone(&options.codec),
            side,
            connected_before: AtomicBool::new(false),
            cancellation_refused: AtomicBool::new(false),
        };
        Self { settings: Arc::new(settings), unusable: None }
    }

    /// For the calling side.
    pub fn client(options: &RmqClientOptions) -> Self {
        let (headers, unusable) = match wire::table_of(&options.headers) {
            Ok(headers) => (headers, None),
            Err(error) => (Default::default(), Some(format!("option headers: {error}").into())),
        };
        let side = Side::Client {
            headers,
            reply_queue: options.reply_queue.clone(),
            persistent: options.persistent,
            max_unconfirmed: options.max_unconfirmed,
        };
        let settings = Settings {
            common: options.common(),
            codec: Arc::clone(&options.codec),
            side,
            connected_before: AtomicBool::new(false),
            cancellation_refused: AtomicBool::new(false),
        };
        Self { settings: Arc::new(settings), unusable }
    }

    /// The address of the first broker without secrets, with the queue: `amqp://host:5672?queue=math`, and
    /// `&wildcards=true` where that is on.
    pub fn url(&self) -> String {
        let common = &self.settings.common;
        let mut url = common.urls.first().map(|url| without_secrets(url)).unwrap_or_default();
        if !common.queue.is_empty() {
            url = format!("{url}?queue={}", encoded(&common.queue));
        }
        if common.wildcards {
            let sign = if common.queue.is_empty() { '?' } else { '&' };
            url = format!("{url}{sign}wildcards=true");
        }
        url
    }

    async fn session(&self, url: &str, plan: &SessionPlan) -> Result<RmqSession, SessionError> {
        let settings = &self.settings;
        let link = Link::connect(settings, url).await?;
        let channel = link.channel().await?;
        let peer: Arc<str> = without_secrets(url).into();
        match settings.side {
            Side::Server { .. } => {
                // RMQ-12: replies have a channel of their own, whose loss does not end the consuming. It is opened first:
                // once there is a consumer, the broker's answers come behind whatever waits in the queue.
                let replies = link.channel().await?;
                let hearing = Hearing::begin(&link.connection, settings).await;
                let (consumer, queue) = link.serve(settings, &channel, &plan.subscriptions).await?;
                let serving = (queue, replies, plan.subscriptions.as_slice());
                let session =
                    RmqSession::server(link, Arc::clone(settings), peer, channel, consumer, serving);
                Ok(session.hearing(hearing))
            }
            Side::Client { .. } => {
                let consumer = link.call(settings, &channel).await?;
                Ok(RmqSession::client(link, Arc::clone(settings), peer, channel, consumer))
            }
        }
    }
}

impl Dial for RmqDial {
    type Session = RmqSession;

    fn info(&self) -> TransportInfo {
        let settles = match self.settings.common.no_ack {
            true => Settles::Never("noAck is true: the broker forgets a message as soon as it is sent"),
            false => Settles::Results { requeue: true, dead_letter: true },
        };
        let format = self.settings.codec.format();
        TransportInfo { subscribes: true, settles, format, ..TransportInfo::new(TransportId::RMQ, "rmq") }
    }

    async fn dial(&self, plan: SessionPlan) -> Result<RmqSession, SessionError> {
        if let Some(reason) = &self.unusable {
            return Err(SessionError::fatal(&**reason));
        }
        let mut failed: Option<SessionError> = None;
        for url in &self.settings.common.urls {
            match self.session(url, &plan).await {
                Ok(session) => {
                    self.settings.connected_before.store(true, Ordering::Relaxed);
                    return Ok(session);
                }
                Err(error) => {
                    // With several brokers, one that may come back keeps the hope up.
                    let keep = failed.as_ref().is_some_and(|failed| {
                        failed.kind() != SessionErrorKind::Fatal && error.kind() == SessionErrorKind::Fatal
                    });
                    if !keep {
                        failed = Some(error);
                    }
                }
            }
        }
        Err(failed.unwrap_or_else(|| SessionError::fatal("option urls is empty")))
    }

    fn check_pattern(&self, pattern: &Pattern) -> Result<(), String> {
        let common = &self.settings.common;
        let is_key =
            common.wildcards || (common.is_fanout() && matches!(self.settings.side, Side::Client { .. }));
        match pattern.route().len() {
            size if is_key && size > wire::SHORT_STRING_LIMIT => Err(format!(
                "a routing key has at most {} bytes, this pattern {size}",
                wire::SHORT_STRING_LIMIT
            )),
            _ => Ok(()),
        }
    }
}
