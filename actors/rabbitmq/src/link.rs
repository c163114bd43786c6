// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection to a broker, and what is declared on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lapin::options::{
    BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{AMQPUriTcpExt, OwnedIdentity, OwnedTLSConfig};
use lapin::types::{FieldTable, ShortString};
use lapin::uri::AMQPScheme;
use lapin::{Channel, Connection, ConnectionProperties, Consumer, ErrorKind, ExchangeKind};
use martlet_core::codec::Codec;
use martlet_core::error::SessionError;
use martlet_core::transport::Subscription;

use crate::address::{self, without_secrets};
use crate::gate::{self, Gate};
use crate::intake::Room;
use crate::options::{Common, RmqExchangeType, RmqTlsOptions};
use crate::wire::{self, Limits};

/// How long a broker may take to answer when a session is drained or closed.
pub(crate) const ROUND_TRIP_LIMIT: Duration = Duration::from_secs(2);

/// The largest frame: larger bodies go in several.
const FRAME_BYTES: u32 = 32 * 1024;

/// What a session needs beyond its connection.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) common: Common,
    pub(crate) codec: Arc<dyn Codec>,
    pub(crate) side: Side,
    /// Whether there has been a session.
    pub(crate) connected_before: AtomicBool,
    /// Whether it has been said that the broker refuses what cancellations are told by.
    pub(crate) cancellation_refused: AtomicBool,
}

/// What only one side needs.
#[derive(Debug)]
pub(crate) enum Side {
    Server { consumer_tag: String, max_in_flight: usize, room: Room },
    Client { headers: FieldTable, reply_queue: String, persistent: bool, max_unconfirmed: usize },
}

impl Settings {
    pub(crate) fn limits(&self) -> Limits {
        Limits { header_bytes: self.common.max_header_bytes, body_bytes: self.common.max_body_bytes }
    }

    /// RMQ-20: whether to say why cancellations are not told: a refusal is said once.
    pub(crate) fn is_news(&self, refused: bool) -> bool {
        !refused || !self.cancellation_refused.swap(true, Ordering::Relaxed)
    }

    /// RMQ-18: what may wait here of a broker that knows no window. A client's replies are bounded by its calls.
    pub(crate) fn room(&self) -> Option<Room> {
        match self.side {
            Side::Server { room, .. } if self.common.no_ack => {
                Some(Room { buffer_bytes: room.buffer_bytes.max(4096), ..room })
            }
            _ => None,
        }
    }

    /// RMQ-15: how many messages the broker may have delivered without an acknowledgement.
    fn prefetch(&self) -> u16 {
        match &self.side {
            Side::Server { max_in_flight, .. } if self.common.prefetch_count == 0 && !self.common.no_ack => {
                u16::try_from(*max_in_flight).unwrap_or(u16::MAX).max(1)
            }
            _ => self.common.prefetch_count,
        }
    }
}

/// An open connection. Dropping it ends the driver's thread, whatever it is doing.
pub(crate) struct Link {
    pub(crate) connection: Arc<Connection>,
    pub(crate) gate: Arc<Gate>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.gate.abort();
    }
}

/// Ends the driver's thread if connecting is given up.
struct AbortGuard(Option<Arc<Gate>>);

impl Drop for AbortGuard {
    fn drop(&mut self) {
        if let Some(gate) = &self.0 {
            gate.abort();
        }
    }
}

impl Link {
    pub(crate) async fn connect(settings: &Settings, url: &str) -> Result<Self, SessionError> {
        let common = &settings.common;
        let shown = without_secrets(url);
        let mut uri = address::parse(url)
            .map_err(|reason| SessionError::fatal(format!("option urls, {shown}: {reason}")))?;
        let heartbeat = common.socket_options.heartbeat_interval.as_secs_f64().ceil();
        // A number of seconds always fits.
        uri.query.heartbeat.get_or_insert(heartbeat.min(f64::from(u16::MAX)) as u16);
        // The driver keeps room for 64 frames on each connection.
        uri.query.frame_max.get_or_insert(FRAME_BYTES);
        let tls = match (&uri.scheme, &common.tls) {
            (AMQPScheme::AMQPS, Some(options)) => tls_config(options)?,
            (AMQPScheme::AMQP, Some(_)) => {
                let text = format!("option tls is for amqps:// addresses, {shown} would not use it");
                return Err(SessionError::fatal(text));
            }
            _ => OwnedTLSConfig::default(),
        };
        let gate = Gate::new(settings.room().map(|room| room.buffer_bytes).unwrap_or_default());
        let mut guard = AbortGuard(Some(Arc::clone(&gate)));
        let mut properties = ConnectionProperties::default();
        if let Some(name) = &common.connection_name {
            properties = properties.with_connection_name(name.as_str().into());
        }
        let connecting = Connection::connector(
            uri,
            gate::runtime(&gate),
            async move |uri, runtime| {
                Ok(AMQPUriTcpExt::connect_with_config_async(&uri, tls.as_ref(), &runtime).await?)
            },
            properties,
        );
        // The driver itself knows no limit for this.
        let connection = match tokio::time::timeout(common.timeout, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(explain_connecting(&shown, &error)),
            Err(_) => {
                let text = format!(
                    "the broker at {shown} did not answer within {:?} (option timeout)",
                    common.timeout
                );
                return Err(SessionError::refused(text));
            }
        };
        guard.0 = None;
        Ok(Self { connection: Arc::new(connection), gate })
    }

    pub(crate) async fn channel(&self) -> Result<Channel, SessionError> {
        self.connection
            .create_channel()
            .await
            .map_err(|error| SessionError::lost(format!("cannot open a channel: {error}")))
    }

    /// RMQ-1, RMQ-2: declares what a server consumes, and consumes it.
    pub(crate) async fn serve(
        &self,
        settings: &Settings,
        channel: &Channel,
        subscriptions: &[Subscription],
    ) -> Result<(Consumer, ShortString), SessionError> {
        let common = &settings.common;
        let Side::Server { consumer_tag, .. } = &settings.side else {
            return Err(SessionError::fatal("a client does not serve"));
        };
        let queue = declare_queue(settings, channel).await?;
        if let Some(exchange) = common.exchange_name() {
            let exchange = exchange_for(common, exchange, &queue)?;
            declare_exchange(settings, channel, &exchange).await?;
            if common.is_fanout() {
                bind(settings, channel, &queue, &exchange, "").await?;
            }
            if let Some(key) = &common.routing_key {
                bind(settings, channel, &queue, &exchange, key).await?;
            }
            if common.wildcards {
                for subscription in subscriptions {
                    bind(settings, channel, &queue, &exchange, &subscription.route).await?;
                }
            }
        } else if common.routing_key.is_some() {
            return Err(SessionError::fatal("option routingKey needs option exchange"));
        }
        qos(settings, channel).await?;
        let tag = name("option consumerTag", consumer_tag)?;
        let options = BasicConsumeOptions { no_ack: common.no_ack, ..BasicConsumeOptions::default() };
        let consumer = channel
            .basic_consume(queue.clone(), tag, options, FieldTable::default())
            .await
            .map_err(|error| {
                settings.explain(&format!("cannot consume queue {queue:?}", queue = queue.as_str()), &error)
            })?;
        Ok((consumer, queue))
    }

    /// RMQ-5: declares what a client publishes to, and consumes its replies.
    pub(crate) async fn call(
        &self,
        settings: &Settings,
        channel: &Channel,
    ) -> Result<Consumer, SessionError> {
        let common = &settings.common;
        let Side::Client { reply_queue, .. } = &settings.side else {
            return Err(SessionError::fatal("a server does not call"));
        };
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .map_err(|error| settings.explain("cannot publish with confirmations", &error))?;
        if common.wildcards || common.is_fanout() {
            let exchange = common.exchange_name().unwrap_or_default();
            let exchange = exchange_for(common, exchange, &ShortString::default())?;
            declare_exchange(settings, channel, &exchange).await?;
        } else {
            if common.queue.is_empty() {
                return Err(SessionError::fatal("option queue is empty: there is nothing to publish to"));
            }
            let queue = declare_queue(settings, channel).await?;
            if let (Some(exchange), Some(key)) = (common.exchange_name(), &common.routing_key) {
                let exchange = exchange_for(common, exchange, &queue)?;
                declare_exchange(settings, channel, &exchange).await?;
                bind(settings, channel, &queue, &exchange, key).await?;
            }
        }
        qos(settings, channel).await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let queue = name("option replyQueue", reply_queue)?;
        channel.basic_consume(queue, ShortString::default(), options, FieldTable::default()).await.map_err(
            |error| {
                settings
                    .explain(&format!("cannot take replies from {reply_queue:?} (option replyQueue)"), &error)
            },
        )
    }
}

fn name(what: &str, text: &str) -> Result<ShortString, SessionError> {
    wire::short(what, text).map_err(|error| SessionError::fatal(error.to_string()))
}

/// The exchange's name; with `wildcards` it may be the name that the broker gave the queue.
fn exchange_for(common: &Common, exchange: &str, queue: &ShortString) -> Result<ShortString, SessionError> {
    if !exchange.is_empty() {
        return name("option exchange", exchange);
    }
    if common.wildcards && common.queue.is_empty() && common.exchange.is_none() && !queue.as_str().is_empty()
    {
        return Ok(queue.clone());
    }
    Err(SessionError::fatal("option wildcards needs option exchange or option queue"))
}

async fn declare_queue(settings: &Settings, channel: &Channel) -> Result<ShortString, SessionError> {
    let common = &settings.common;
    let queue = name("option queue", &common.queue)?;
    // RMQ-3: without declaring, its existence alone is looked at, so that a missing one is told from others.
    let passive = !common.asserts_queue();
    let options = QueueDeclareOptions {
        passive,
        durable: common.queue_options.durable,
        exclusive: common.queue_options.exclusive,
        auto_delete: common.queue_options.auto_delete,
        nowait: false,
    };
    let arguments = wire::amqp_table(&common.queue_options.all_arguments())
        .map_err(|error| SessionError::fatal(format!("option queueOptions.arguments: {error}")))?;
    match channel.queue_declare(queue, options, arguments).await {
        Ok(declared) => Ok(declared.name().clone()),
        Err(error) => {
            let what = match passive {
                true => {
                    format!("queue {:?} cannot be used without declaring it (option noAssert)", common.queue)
                }
                false => format!("cannot declare queue {:?} (options queue and queueOptions)", common.queue),
            };
            Err(settings.explain(&what, &error))
        }
    }
}

async fn declare_exchange(
    settings: &Settings,
    channel: &Channel,
    exchange: &ShortString,
) -> Result<(), SessionError> {
    let common = &settings.common;
    let kind = match common.exchange_type {
        RmqExchangeType::Direct => ExchangeKind::Direct,
        RmqExchangeType::Fanout => ExchangeKind::Fanout,
        RmqExchangeType::Topic => ExchangeKind::Topic,
        RmqExchangeType::Headers => ExchangeKind::Headers,
    };
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let arguments = wire::amqp_table(&common.exchange_arguments)
        .map_err(|error| SessionError::fatal(format!("option exchangeArguments: {error}")))?;
    channel.exchange_declare(exchange.clone(), kind, options, arguments).await.map_err(|error| {
        let exchange = exchange.as_str();
        let what = format!(
            "cannot declare exchange {exchange:?} (options exchange, exchangeType and exchangeArguments)"
        );
        settings.explain(&what, &error)
    })
}

/// Binds the queue to the exchange by a key.
pub(crate) async fn bind(
    settings: &Settings,
    channel: &Channel,
    queue: &ShortString,
    exchange: &ShortString,
    key: &str,
) -> Result<(), SessionError> {
    let short = name("a routing key", key)?;
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.clone(), exchange.clone(), short, options, FieldTable::default()).await.map_err(
        |error| {
            let (queue, exchange) = (queue.as_str(), exchange.as_str());
            let what =
                format!("cannot bind queue {queue:?} to exchange {exchange:?} by {key:?} (option exchange)");
            settings.explain(&what, &error)
        },
    )
}

async fn qos(settings: &Settings, channel: &Channel) -> Result<(), SessionError> {
    let options = BasicQosOptions { global: settings.common.is_global_prefetch_count };
    let explain = |error| settings.explain("the broker refused option prefetchCount", &error);
    channel.basic_qos(settings.prefetch(), options).await.map_err(explain)
}

fn tls_config(options: &RmqTlsOptions) -> Result<OwnedTLSConfig, SessionError> {
    let loaded = options.load()?;
    Ok(OwnedTLSConfig {
        cert_chain: loaded.ca.map(|pem| String::from_utf8_lossy(&pem).into_owned()),
        identity: loaded.identity.map(|(pem, key)| OwnedIdentity::PKCS8 { pem, key }),
    })
}

// === errors ===

/// Why the session is over; calls under way end with it.
pub(crate) fn lost(error: &dyn std::fmt::Display) -> SessionError {
    SessionError::lost(format!("the connection to the broker was lost: {error}"))
}

/// What follows from a failure to connect, and why it failed, in words.
fn explain_connecting(shown: &str, error: &lapin::Error) -> SessionError {
    match error.kind() {
        ErrorKind::ProtocolError(said) => {
            let text = said.get_message();
            match said.kind() {
                AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                    let what =
                        format!("the broker at {shown} refused the login (user and password in option urls)");
                    SessionError::fatal(format!("{what}: {text}"))
                }
                AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => {
                    let what = format!("the broker at {shown} refused the vhost (in option urls)");
                    SessionError::fatal(format!("{what}: {text}"))
                }
                _ => SessionError::refused(format!("the broker at {shown} refused the connection: {text}")),
            }
        }
        ErrorKind::IOError(io) => {
            let mut tls = false;
            let mut words = Vec::new();
            let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&**io);
            while let Some(source) = cause {
                let inner = source.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
                tls |= source.is::<rustls::Error>() || inner.is_some_and(|inner| inner.is::<rustls::Error>());
                let said = source.to_string();
                if !words.iter().any(|have: &String| have.contains(&said)) {
                    words.push(said);
                }
                cause = source.source();
            }
            let words = words.join(": ");
            match tls {
                true => SessionError::fatal(format!(
                    "TLS with the broker at {shown} failed (option tls): {words}"
                )),
                false => SessionError::refused(format!(
                    "the broker at {shown} cannot be reached (option urls): {words}"
                )),
            }
        }
        ErrorKind::InvalidProtocolVersion(_) | ErrorKind::ParsingError(_) => SessionError::fatal(format!(
            "what answers at {shown} (option urls) does not speak AMQP 0-9-1: {error}"
        )),
        _ => SessionError::refused(format!("no connection to the broker at {shown} (option urls): {error}")),
    }
}

impl Settings {
    /// What follows from a failed declaration: what can only be put right by someone is fatal.
    fn explain(&self, what: &str, error: &lapin::Error) -> SessionError {
        let ErrorKind::ProtocolError(said) = error.kind() else {
            return SessionError::lost(format!("{what}: {error}"));
        };
        let text = format!("{what}: {}", said.get_message());
        match said.kind() {
            // Of a connection that the broker has not given up yet, for one.
            AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED) => SessionError::refused(text),
            // It was there before, and may come back.
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) if self.connected_before.load(Ordering::Relaxed) => {
                SessionError::refused(text)
            }
            AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR | AMQPHardError::CONNECTIONFORCED) => {
                SessionError::refused(text)
            }
            _ => SessionError::fatal(text),
        }
    }
}
