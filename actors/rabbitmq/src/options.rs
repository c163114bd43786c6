// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of both sides, with NestJS's names where NestJS has one.
//!
//! Durations are numbers of milliseconds in configuration files, except where the name says seconds.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use martlet_core::backoff::BackoffOptions;
use martlet_core::client::ClientOptions;
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::options::{header_lines, millis, optional_millis};
use martlet_core::server::ServerOptions;
use martlet_core::{FailurePolicy, Headers};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::address::{urls, without_secrets};

/// The broker's name for the reply queue that needs no declaring: direct reply-to.
pub const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// TLS towards the broker, for `amqps://` addresses. The driver trusts the authorities of the platform besides.
pub type RmqTlsOptions = martlet_tls::BrokerTls;

/// What the queue is declared with. Both sides, and every service on the queue, must declare the same.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct RmqQueueOptions {
    /// Whether the queue outlives the broker (its messages do so only if they are `persistent`). Default true.
    pub durable: bool,
    /// Whether only this connection may use it; it goes with the connection. Default false.
    pub exclusive: bool,
    /// Whether it goes with its last consumer. Default false.
    pub auto_delete: bool,
    /// How long a message may wait, in milliseconds: `x-message-ttl`. Default none.
    #[serde(deserialize_with = "optional_millis::deserialize")]
    pub message_ttl: Option<Duration>,
    /// How long the queue may be unused before it goes, in milliseconds: `x-expires`. Default none.
    #[serde(deserialize_with = "optional_millis::deserialize")]
    pub expires: Option<Duration>,
    /// Where rejected and expired messages go: `x-dead-letter-exchange`. Default none: they are gone.
    pub dead_letter_exchange: Option<String>,
    /// With which routing key: `x-dead-letter-routing-key`. Default: their own.
    pub dead_letter_routing_key: Option<String>,
    /// How many messages may wait: `x-max-length`. Default no bound.
    pub max_length: Option<u64>,
    /// The highest priority: `x-max-priority`. Default: no priorities.
    pub max_priority: Option<u8>,
    /// Further arguments, by the broker's names (`x-queue-type`). They win over the shortcuts above. Default none.
    pub arguments: Map<String, Value>,
    /// As the option `noAssert`, which NestJS also reads here. Default false.
    pub no_assert: bool,
}

impl Default for RmqQueueOptions {
    fn default() -> Self {
        Self {
            durable: true,
            exclusive: false,
            auto_delete: false,
            message_ttl: None,
            expires: None,
            dead_letter_exchange: None,
            dead_letter_routing_key: None,
            max_length: None,
            max_priority: None,
            arguments: Map::new(),
            no_assert: false,
        }
    }
}

/// Defines a builder method for each field.
macro_rules! builders {
    ($($(#[doc = $text:literal])+ $field:ident($argument:ty) |$value:ident| $set:expr;)*) => {$(
        $(#[doc = $text])+
        #[must_use]
        pub fn $field(mut self, $value: $argument) -> Self {
            self.$field = $set;
            self
        }
    )*};
}

impl RmqQueueOptions {
    /// The options' names, for checking configuration.
    pub const OPTION_KEYS: &'static [&'static str] = &[
        "durable",
        "exclusive",
        "autoDelete",
        "messageTtl",
        "expires",
        "deadLetterExchange",
        "deadLetterRoutingKey",
        "maxLength",
        "maxPriority",
        "arguments",
        "noAssert",
    ];

    /// A durable queue.
    pub fn new() -> Self {
        Self::default()
    }

    builders! {
        /// Whether the queue outlives the broker.
        durable(bool) |durable| durable;
        /// Whether only this connection may use it.
        exclusive(bool) |exclusive| exclusive;
        /// Whether it goes with its last consumer.
        auto_delete(bool) |auto_delete| auto_delete;
        /// How long a message may wait.
        message_ttl(Duration) |ttl| Some(ttl);
        /// How long the queue may be unused before it goes.
        expires(Duration) |expires| Some(expires);
        /// Where rejected and expired messages go.
        dead_letter_exchange(impl Into<String>) |exchange| Some(exchange.into());
        /// With which routing key they go there.
        dead_letter_routing_key(impl Into<String>) |key| Some(key.into());
        /// How many messages may wait.
        max_length(u64) |length| Some(length);
        /// The highest priority.
        max_priority(u8) |priority| Some(priority);
    }

    /// Adds an argument by the broker's name.
    #[must_use]
    pub fn argument(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.arguments.insert(name.into(), value.into());
        self
    }

    /// RMQ-4: every argument, the shortcuts included.
    pub(crate) fn all_arguments(&self) -> Map<String, Value> {
        let millis =
            |duration: Duration| Value::from(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
        let shortcuts = [
            ("x-message-ttl", self.message_ttl.map(millis)),
            ("x-expires", self.expires.map(millis)),
            ("x-dead-letter-exchange", self.dead_letter_exchange.clone().map(Value::from)),
            ("x-dead-letter-routing-key", self.dead_letter_routing_key.clone().map(Value::from)),
            ("x-max-length", self.max_length.map(Value::from)),
            ("x-max-priority", self.max_priority.map(Value::from)),
        ];
        let mut arguments = self.arguments.clone();
        for (name, value) in shortcuts {
            if let Some(value) = value {
                arguments.entry(name).or_insert(value);
            }
        }
        arguments
    }
}

/// What NestJS hands to its connection manager.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RmqSocketOptions {
    /// How often each end shows that it lives, in seconds; after twice that without a sign the session ends. Zero:
    /// never. Default 5.
    #[serde(rename = "heartbeatIntervalInSeconds", deserialize_with = "seconds")]
    pub heartbeat_interval: Duration,
    /// The pause before each further attempt to connect, in seconds. Default: as the heartbeat.
    #[serde(rename = "reconnectTimeInSeconds", deserialize_with = "optional_seconds")]
    pub reconnect_time: Option<Duration>,
}

impl Default for RmqSocketOptions {
    fn default() -> Self {
        Self { heartbeat_interval: Duration::from_secs(5), reconnect_time: None }
    }
}

impl RmqSocketOptions {
    /// The options' names, for checking configuration.
    pub const OPTION_KEYS: &'static [&'static str] =
        &["heartbeatIntervalInSeconds", "reconnectTimeInSeconds"];

    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    builders! {
        /// How often each end shows that it lives; whole seconds count.
        heartbeat_interval(Duration) |interval| interval;
        /// The pause before each further attempt to connect.
        reconnect_time(Duration) |pause| Some(pause);
    }

    pub(crate) fn pause(&self) -> Duration {
        let pause = self.reconnect_time.unwrap_or(self.heartbeat_interval);
        if pause.is_zero() { Duration::from_millis(10) } else { pause }
    }
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    Duration::try_from_secs_f64(f64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

fn optional_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let Some(value) = Option::<f64>::deserialize(deserializer)? else { return Ok(None) };
    Duration::try_from_secs_f64(value).map(Some).map_err(serde::de::Error::custom)
}

/// How an exchange distributes messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RmqExchangeType {
    /// To the queues bound with the message's routing key.
    Direct,
    /// To every bound queue.
    Fanout,
    /// To the queues bound with a pattern that matches the routing key.
    #[default]
    Topic,
    /// By the message's headers.
    Headers,
}

martlet_core::transport_options! {
    common {
        /// The brokers' addresses, tried in order: `amqp://user:password@host:5672/vhost`, or `amqps://`. In
        /// configuration: one text (commas separate), one object (`protocol`, `hostname`, `port`, `username`,
        /// `password`, `vhost`), or a list of them. Default `amqp://localhost`.
        #[serde(deserialize_with = "urls")]
        "urls" urls: Vec<String> = vec!["amqp://localhost".to_owned()],
            (impl IntoIterator<Item = impl Into<String>>) |urls| urls.into_iter().map(Into::into).collect();
        /// The queue that requests and events go through. A server without one gets a queue of its own, named by
        /// the broker. Default empty.
        "queue" queue: String = String::new(), (impl Into<String>) |queue| queue.into();
        /// What the queue is declared with. Default: durable, no arguments.
        "queueOptions" queue_options: RmqQueueOptions = RmqQueueOptions::new(), (RmqQueueOptions) |options| options;
        /// Messages that the broker may have delivered and that are not acknowledged yet. Zero: with `noAck` false
        /// `maxInFlight`, with `noAck` true without a number (see `receiveBufferBytes`). Default 0.
        "prefetchCount" prefetch_count: u16 = 0, (u16) |count| count;
        /// Whether `prefetchCount` is for the whole channel rather than for its consumer. Default false.
        "isGlobalPrefetchCount" is_global_prefetch_count: bool = false, (bool) |global| global;
        /// Whether the broker forgets a message as soon as it is sent. False: messages are acknowledged, by the
        /// handler or by `onFailure`. A client takes its replies without acknowledgement either way. Default true.
        "noAck" no_ack: bool = true, (bool) |no_ack| no_ack;
        /// Whether the queue is used as it is, without declaring it. A missing one is then an error. Default false.
        "noAssert" no_assert: bool = false, (bool) |no_assert| no_assert;
        /// Whether patterns are routing keys of a topic exchange and may have the broker's wildcards: `*` is one
        /// word, `#` any number of them, none included. Default false.
        "wildcards" wildcards: bool = false, (bool) |wildcards| wildcards;
        /// The exchange to declare. Default: none, or with `wildcards` the queue's name.
        "exchange" exchange: Option<String> = None,
            (impl Into<String>) |exchange| Some(exchange.into()).filter(|exchange: &String| !exchange.is_empty());
        /// Its type: `direct`, `fanout`, `topic` or `headers`. Default `topic`.
        "exchangeType" exchange_type: RmqExchangeType = RmqExchangeType::Topic, (RmqExchangeType) |kind| kind;
        /// The arguments it is declared with. Default none.
        "exchangeArguments" exchange_arguments: Map<String, Value> = Map::new(),
            (Map<String, Value>) |arguments| arguments;
        /// The key by which the queue is bound to the exchange. Default none.
        "routingKey" routing_key: Option<String> = None, (impl Into<String>) |key| Some(key.into());
        /// Whether cancelled calls are told to the services that may have them, over the exchange `martlet.cancel`, which
        /// both sides declare for it; each service also has a queue of its own there. Both must have it on. Without the
        /// rights to it they do without, which is reported. Default false.
        "cancellation" cancellation: bool = false, (bool) |cancellation| cancellation;
        /// Heartbeat and reconnecting. Default: every 5 seconds.
        "socketOptions" socket_options: RmqSocketOptions = RmqSocketOptions::new(),
            (RmqSocketOptions) |options| options;
        /// TLS, for `amqps://` addresses. Default: the platform's authorities.
        "tls" tls: Option<RmqTlsOptions> = None, (RmqTlsOptions) |tls| Some(tls);
        /// The connection's name in the broker's monitoring. Default none.
        "connectionName" connection_name: Option<String> = None, (impl Into<String>) |name| Some(name.into());
        /// How long connecting to one broker may take, in milliseconds; then the next one is tried. Default
        /// 10,000.
        #[serde(with = "millis")]
        "timeout" timeout: Duration = Duration::from_secs(10), (Duration) |timeout| timeout;
        /// The largest set of headers and properties that is sent, in bytes. A larger one refuses its message.
        /// Default 16,384.
        "maxHeaderBytes" max_header_bytes: usize = 16 * 1024, (usize) |bytes| bytes;
        /// The largest body that is sent, in bytes; a larger one refuses its message. The broker has a bound of its
        /// own (RabbitMQ 3: 128 MiB), which ends the session. Default 16,777,216.
        "maxBodyBytes" max_body_bytes: usize = 16 * 1024 * 1024, (usize) |bytes| bytes;
    }

    /// The options of the serving side.
    ///
    /// # Examples
    ///
    /// ```
    /// use martlet_core::FailurePolicy;
    /// use martlet_rabbitmq::{RmqServer, RmqServerOptions};
    ///
    /// let server = RmqServer::new(
    ///     RmqServerOptions::new().queue("orders").no_ack(false).on_failure(FailurePolicy::retry(3)),
    /// );
    /// ```
    server RmqServerOptions {
        /// The consumer's name in the broker's monitoring; the broker refuses a name that the channel has already.
        /// Default: one that the broker makes.
        "consumerTag" consumer_tag: String = String::new(), (impl Into<String>) |tag| tag.into();
        /// Attempts to get the first connection, and each lost one back. -1: a lost one without end, the first one
        /// once, so that a service whose broker is not there fails to start (NestJS's waits for it). Default -1.
        "maxConnectionAttempts" max_connection_attempts: i32 = -1, (i32) |attempts| attempts;
        /// With `noAck` false: what becomes of a message whose handler failed; one whose handler succeeded is
        /// acknowledged. Without it NestJS's rule: the handler acknowledges through its context. Default none.
        "onFailure" on_failure: Option<FailurePolicy> = None, (FailurePolicy) |policy| Some(policy);
        /// Requests and events in work at once; at the limit reading pauses, and the broker keeps what it has.
        /// Default 1024.
        "maxInFlight" max_in_flight: usize = 1024, (usize) |requests| requests;
        /// With `noAck` true: bytes that may have arrived and wait for their turn, 4096 at least. Above it nothing
        /// is read from the connection, and if that lasts for half a second the consumer is cancelled until there is
        /// room again; either way the broker keeps what it has. Default 1,048,576.
        "receiveBufferBytes" receive_buffer_bytes: usize = 1024 * 1024, (usize) |bytes| bytes;
        /// With `noAck` true: bytes of messages that the broker had on their way when the consumer was cancelled (some
        /// 200 messages, and what the sockets hold). A message beyond is dropped, counted and reported; of a broker that
        /// blocks publishing nothing beyond is read. Default 67,108,864.
        "backlogBytes" backlog_bytes: usize = 64 * 1024 * 1024, (usize) |bytes| bytes;
        /// Bytes of replies that may wait before reading pauses. Default 262,144.
        "highWaterBytes" high_water_bytes: usize = 256 * 1024, (usize) |bytes| bytes;
    } from code {
        /// Turns packets into bytes: NestJS's serializer and deserializer. Both ends must agree. Default
        /// `JsonCodec`, which NestJS speaks.
        codec: Arc<dyn Codec> = Arc::new(JsonCodec);
    }

    /// The options of the calling side.
    client RmqClientOptions {
        /// Headers of every message; a record's own header of the same name wins. In configuration: an
        /// object whose values are texts. Default none.
        #[serde(deserialize_with = "header_lines")]
        "headers" headers: Headers = Headers::new(),
            (impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>) |lines| lines.into_iter().collect();
        /// Where replies are sent to. Another queue than the default must exist and be this client's alone.
        /// Default `amq.rabbitmq.reply-to`.
        "replyQueue" reply_queue: String = DIRECT_REPLY_TO.to_owned(), (impl Into<String>) |queue| queue.into();
        /// Whether messages are written to disk (delivery mode 2); with a durable queue they outlive the broker.
        /// Default false.
        "persistent" persistent: bool = false, (bool) |persistent| persistent;
        /// Whether a lost connection is made anew at once rather than at the next call. Default true.
        "reconnect" reconnect: bool = true, (bool) |reconnect| reconnect;
        /// How long a call waits for its reply, in milliseconds; a stream for each. `null` waits for ever.
        /// Default 30,000. Changeable per call.
        #[serde(with = "optional_millis")]
        "callTimeout" call_timeout: Option<Duration> = Some(Duration::from_secs(30)),
            (impl Into<Option<Duration>>) |timeout| timeout.into();
        /// Messages that may wait for the broker's confirmation; further ones wait in the client. Default 4096.
        "maxUnconfirmed" max_unconfirmed: usize = 4096, (usize) |messages| messages;
        /// Bytes that may wait to be written before further calls wait in the client. Default 262,144.
        "highWaterBytes" high_water_bytes: usize = 256 * 1024, (usize) |bytes| bytes;
    } from code {
        /// The client's other settings. Its `timeout`, `reconnect`, `retry_delay`, `connect_timeout` and
        /// `high_water_bytes` are taken from the options above; `reconnect_attempts` is without end unless it is
        /// given.
        client: ClientOptions = ClientOptions::default();
        /// Turns packets into bytes: NestJS's serializer and deserializer. Both ends must agree. Default
        /// `JsonCodec`, which NestJS speaks.
        codec: Arc<dyn Codec> = Arc::new(JsonCodec);
    }
}

impl RmqServerOptions {
    pub(crate) fn runtime(&self) -> ServerOptions {
        let common = self.common();
        let mut options = ServerOptions::default();
        options.max_in_flight = self.max_in_flight;
        options.high_water_bytes = self.high_water_bytes;
        options.retry_attempts =
            u32::try_from(self.max_connection_attempts).ok().map(|n| n.saturating_sub(1));
        options.retry_delay = common.backoff();
        options.connect_timeout = common.dial_timeout();
        options.on_failure = self.on_failure;
        options
    }
}

impl RmqClientOptions {
    pub(crate) fn runtime(&self) -> ClientOptions {
        let common = self.common();
        let mut options = self.client.clone();
        options.reconnect = self.reconnect;
        options.timeout = self.call_timeout;
        options.reconnect_attempts = options.reconnect_attempts.or(Some(u32::MAX));
        options.retry_delay = common.backoff();
        options.connect_timeout = common.dial_timeout();
        options.high_water_bytes = self.high_water_bytes;
        options
    }
}

impl Common {
    fn backoff(&self) -> BackoffOptions {
        BackoffOptions::fixed(self.socket_options.pause())
    }

    /// Each broker has its time; a bit is left for declaring.
    fn dial_timeout(&self) -> Duration {
        let urls = u32::try_from(self.urls.len()).unwrap_or(u32::MAX).max(1);
        self.timeout.saturating_mul(urls).saturating_add(Duration::from_secs(5))
    }

    pub(crate) fn asserts_queue(&self) -> bool {
        // RMQ-3: a queue without a name can only be declared.
        self.queue.is_empty() || !(self.no_assert || self.queue_options.no_assert)
    }

    /// The exchange, if any (RMQ-2).
    pub(crate) fn exchange_name(&self) -> Option<&str> {
        match &self.exchange {
            Some(exchange) => Some(exchange),
            None if self.wildcards => Some(&self.queue),
            None => None,
        }
    }

    pub(crate) fn is_fanout(&self) -> bool {
        self.exchange_type == RmqExchangeType::Fanout && self.exchange.is_some()
    }
}

/// Secrets stay out of debug output.
macro_rules! debug {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let urls: Vec<_> = self.urls.iter().map(|url| without_secrets(url)).collect();
                f.debug_struct(stringify!($name))
                    .field("urls", &urls)
                    .field("queue", &self.queue)
                    .field("no_ack", &self.no_ack)
                    .field("wildcards", &self.wildcards)
                    .finish_non_exhaustive()
            }
        }
    )*};
}

debug! { RmqServerOptions RmqClientOptions Common }
