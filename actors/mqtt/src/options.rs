// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of both sides, with the names of NestJS and of its driver, mqtt.js.
//!
//! Durations are numbers of milliseconds in configuration files, except where mqtt.js counts seconds.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use martlet_core::Headers;
use martlet_core::backoff::BackoffOptions;
use martlet_core::client::ClientOptions;
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::options::{header_lines, millis, optional_millis};
use martlet_core::server::ServerOptions;
use martlet_core::settlement::FailurePolicy;
use serde::Deserialize;

use crate::properties::MqttProperties;

/// TLS towards the broker, for `mqtts://` and `wss://`.
pub type MqttTlsOptions = martlet_tls::BrokerTls;

/// MQTT's three levels of delivery. In data: 0, 1 or 2.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "u8")]
pub enum MqttQos {
    /// 0: sent once, not acknowledged.
    #[default]
    AtMostOnce,
    /// 1: sent until acknowledged; may arrive more than once.
    AtLeastOnce,
    /// 2: arrives exactly once, as far as both ends keep their sessions.
    ExactlyOnce,
}

impl MqttQos {
    /// Its number.
    pub fn as_u8(self) -> u8 {
        self as u8
    }
}

impl TryFrom<u8> for MqttQos {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            0 => Ok(Self::AtMostOnce),
            1 => Ok(Self::AtLeastOnce),
            2 => Ok(Self::ExactlyOnce),
            other => Err(format!("a quality of service is 0, 1 or 2, not {other}")),
        }
    }
}

/// How a server subscribes: mqtt.js's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct MqttSubscribeOptions {
    /// The best quality of service that messages are delivered with. A handler's extra `qos` overrides it.
    /// Default 0.
    pub qos: MqttQos,
    /// No local: the broker does not send back what this connection has published. MQTT 5 only, and not for
    /// shared subscriptions. Default false.
    pub nl: bool,
    /// Retain as published: forwarded messages keep their retain flag. MQTT 5 only. Default false.
    pub rap: bool,
    /// Retain handling: 0 sends retained messages when subscribing, 1 only if the subscription is new, 2 never.
    /// MQTT 5 only. Default 0.
    pub rh: u8,
}

impl MqttSubscribeOptions {
    /// The options' names, for checking configuration.
    pub const OPTION_KEYS: &'static [&'static str] = &["qos", "nl", "rap", "rh"];

    /// Subscriptions of this quality of service.
    pub fn qos(qos: MqttQos) -> Self {
        Self { qos, ..Self::default() }
    }

    /// Sets no local.
    #[must_use]
    pub fn nl(mut self, nl: bool) -> Self {
        self.nl = nl;
        self
    }

    /// Sets retain as published.
    #[must_use]
    pub fn rap(mut self, rap: bool) -> Self {
        self.rap = rap;
        self
    }

    /// Sets retain handling.
    #[must_use]
    pub fn rh(mut self, rh: u8) -> Self {
        self.rh = rh;
        self
    }
}

/// What the broker publishes when the connection breaks without a goodbye: mqtt.js's `will`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct MqttWill {
    /// Its topic. Required.
    pub topic: String,
    /// Its payload, a text. Default empty.
    pub payload: String,
    /// Its quality of service. Default 0.
    pub qos: MqttQos,
    /// Whether it is retained. Default false.
    pub retain: bool,
    /// For how many seconds the broker waits before it publishes it. MQTT 5 only. Default 0.
    pub will_delay_interval: Option<u32>,
    /// Its MQTT 5 properties. Default none.
    pub properties: MqttProperties,
}

impl MqttWill {
    /// The options' names, for checking configuration.
    pub const OPTION_KEYS: &'static [&'static str] =
        &["topic", "payload", "qos", "retain", "willDelayInterval", "properties"];

    /// A will of quality of service 0, not retained.
    pub fn new(topic: impl Into<String>, payload: impl Into<String>) -> Self {
        Self { topic: topic.into(), payload: payload.into(), ..Self::default() }
    }

    /// Sets its quality of service.
    #[must_use]
    pub fn qos(mut self, qos: MqttQos) -> Self {
        self.qos = qos;
        self
    }

    /// Sets whether it is retained.
    #[must_use]
    pub fn retain(mut self, retain: bool) -> Self {
        self.retain = retain;
        self
    }

    /// Sets for how many seconds the broker waits before it publishes it (MQTT 5).
    #[must_use]
    pub fn will_delay_interval(mut self, seconds: u32) -> Self {
        self.will_delay_interval = Some(seconds);
        self
    }

    /// Sets its MQTT 5 properties.
    #[must_use]
    pub fn properties(mut self, properties: MqttProperties) -> Self {
        self.properties = properties;
        self
    }
}

/// The MQTT 5 properties of the connection: mqtt.js's `properties`. Not sent with MQTT 3.1.1.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct MqttConnectProperties {
    /// For how many seconds the broker keeps the session after the connection is gone. Default 0 with `clean`;
    /// without it, for ever (as MQTT 3.1.1 does).
    pub session_expiry_interval: Option<u32>,
    /// How many messages of quality of service 1 and 2 the broker may send before it waits for an
    /// acknowledgement: the window that holds a fast publisher back. Default 1024 (the broker may have a lower
    /// bound of its own; mosquitto has 20).
    pub receive_maximum: Option<u16>,
    /// User properties of the connection. Default none.
    #[serde(deserialize_with = "header_lines")]
    pub user_properties: Headers,
}

impl MqttConnectProperties {
    /// The options' names, for checking configuration.
    pub const OPTION_KEYS: &'static [&'static str] =
        &["sessionExpiryInterval", "receiveMaximum", "userProperties"];

    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets for how many seconds the broker keeps the session.
    #[must_use]
    pub fn session_expiry_interval(mut self, seconds: u32) -> Self {
        self.session_expiry_interval = Some(seconds);
        self
    }

    /// Sets how many unacknowledged messages the broker may send.
    #[must_use]
    pub fn receive_maximum(mut self, messages: u16) -> Self {
        self.receive_maximum = Some(messages);
        self
    }

    /// Sets the user properties of the connection.
    #[must_use]
    pub fn user_properties(mut self, properties: Headers) -> Self {
        self.user_properties = properties;
        self
    }
}

martlet_core::transport_options! {
    common {
        /// The broker's address: `mqtt://host:1883`, `mqtts://host:8883`, `ws://host/path`, `wss://host/path`, or
        /// `host:port`; user and password may be in the URL. Default `mqtt://localhost:1883`.
        "url" url: String = "mqtt://localhost:1883".to_owned(), (impl Into<String>) |url| url.into();
        /// The client id. Default: `martlet_` and eight random hex digits, the same for all sessions of this end.
        "clientId" client_id: Option<String> = None, (impl Into<String>) |id| Some(id.into());
        /// The user. Default: none, or that of the URL.
        "username" username: Option<String> = None, (impl Into<String>) |user| Some(user.into());
        /// The user's password. Default: none, or that of the URL.
        "password" password: Option<String> = None, (impl Into<String>) |password| Some(password.into());
        /// 4 for MQTT 3.1.1, 5 for MQTT 5. Default 4, as mqtt.js.
        "protocolVersion" protocol_version: u8 = 4, (u8) |version| version;
        /// After how many seconds without traffic the broker is asked whether it lives; as long again without
        /// an answer ends the session. 0 asks never. Default 60.
        "keepalive" keepalive: u16 = 60, (u16) |seconds| seconds;
        /// Whether the broker forgets the session when the connection is gone. False needs `clientId`. Default true.
        "clean" clean: bool = true, (bool) |clean| clean;
        /// The MQTT 5 properties of the connection. Default none.
        "properties" properties: MqttConnectProperties = MqttConnectProperties::default(),
            (MqttConnectProperties) |properties| properties;
        /// What the broker publishes when the connection breaks. Default none.
        "will" will: Option<MqttWill> = None, (MqttWill) |will| Some(will);
        /// TLS, for `mqtts://` and `wss://`. Default: the platform's authorities.
        "tls" tls: Option<MqttTlsOptions> = None, (MqttTlsOptions) |tls| Some(tls);
        /// The pause before each attempt to get a connection (back), in milliseconds; 0 makes no further attempt.
        /// Default 1000.
        #[serde(with = "millis")]
        "reconnectPeriod" reconnect_period: Duration = Duration::from_secs(1), (Duration) |period| period;
        /// How long one attempt to connect may take, subscribing included, in milliseconds. Default 30,000.
        #[serde(with = "millis")]
        "connectTimeout" connect_timeout: Duration = Duration::from_secs(30), (Duration) |timeout| timeout;
        /// The largest packet that is taken, in bytes. A larger message is skipped without being held in memory,
        /// and reported; with MQTT 5 the broker is told and sends none. Default 16,777,216.
        "maxPacketBytes" max_packet_bytes: usize = 16 * 1024 * 1024, (usize) |bytes| bytes;
        /// Bytes of messages that may wait in this process while its handlers are at `maxInFlight`. A further
        /// message of quality of service 0 is dropped, counted and reported, because MQTT cannot slow its
        /// publisher down; beyond it, and one message of 1 or 2, the connection is not read, and the broker keeps
        /// the rest. Only while subscriptions are unanswered, or while `highWaterBytes` of this end's own messages
        /// wait for the broker, it is read on, because the answers come behind: by as many messages as the broker
        /// sends unacknowledged (`receiveMaximum`). A message counts as its topic, payload and properties, and 128
        /// bytes for itself and each user property. Default 16,777,216.
        "bufferedBytes" buffered_bytes: usize = 16 * 1024 * 1024, (usize) |bytes| bytes;
        /// Messages of quality of service 1 and 2 that may be published and not yet acknowledged by the broker;
        /// further ones wait, where they count towards `highWaterBytes`. An MQTT 5 broker's own bound holds, too.
        /// Default 100.
        "publishWindow" publish_window: u16 = 100, (u16) |messages| messages;
        /// Whether cancelled calls are told to the handler's service, on topics below `_MARTLET/cancel`. Default
        /// true.
        "cancellation" cancellation: bool = true, (bool) |cancellation| cancellation;
    }

    /// The options of the serving side.
    ///
    /// # Examples
    ///
    /// ```
    /// use martlet_mqtt::{MqttQos, MqttServer, MqttServerOptions, MqttSubscribeOptions};
    ///
    /// let server = MqttServer::new(
    ///     MqttServerOptions::new()
    ///         .url("mqtt://127.0.0.1")
    ///         .shared_group("workers")
    ///         .subscribe_options(MqttSubscribeOptions::qos(MqttQos::AtLeastOnce)),
    /// );
    /// ```
    server MqttServerOptions {
        /// How every pattern is subscribed. A handler's extra `qos` overrides the quality of service. Default:
        /// quality of service 0.
        "subscribeOptions" subscribe_options: MqttSubscribeOptions = MqttSubscribeOptions::default(),
            (MqttSubscribeOptions) |options| options;
        /// The group of every subscription (`$share/<group>/<pattern>`): of the services that share it, one gets
        /// each message. A pattern that begins with `$share/` has its own. Default: none, every service gets
        /// every message.
        "sharedGroup" shared_group: Option<String> = None,
            (impl Into<String>) |group| Some(group.into()).filter(|group: &String| !group.is_empty());
        /// Whether a message of quality of service 1 or 2 is acknowledged when its handler has finished rather
        /// than when it is taken. Default false, as NestJS.
        "manualAcks" manual_acks: bool = false, (bool) |manual| manual;
        /// What becomes of a message whose handler failed; implies `manualAcks`. MQTT can neither requeue nor
        /// dead-letter: `discard`, and `retry` that ends in `discard`, are possible. Default: acknowledged, as
        /// NestJS.
        "onFailure" on_failure: Option<FailurePolicy> = None, (FailurePolicy) |policy| Some(policy);
        /// How many attempts are made for the first connection; -1 for no end. A lost one is made anew without
        /// end. Default -1.
        "maxConnectionAttempts" max_connection_attempts: i32 = -1, (i32) |attempts| attempts;
        /// Requests and events in work at once; at the limit messages wait, see `bufferedBytes`. Default 1024.
        "maxInFlight" max_in_flight: usize = 1024, (usize) |requests| requests;
        /// Bytes of replies that may wait before reading pauses. Default 262,144.
        "highWaterBytes" high_water_bytes: usize = 256 * 1024, (usize) |bytes| bytes;
    } from code {
        /// Turns packets into bytes: NestJS's serializer and deserializer. Both ends must agree. Default
        /// `JsonCodec`, which NestJS speaks.
        codec: Arc<dyn Codec> = Arc::new(JsonCodec);
    }

    /// The options of the calling side.
    client MqttClientOptions {
        /// User properties of every message (MQTT 5 only); a record's own property of the same name wins. In
        /// configuration: an object whose values are texts or lists of texts. Default none.
        #[serde(deserialize_with = "header_lines")]
        "userProperties" user_properties: Headers = Headers::new(),
            (impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>) |lines| lines.into_iter().collect();
        /// How long the subscription of a reply topic is kept after the last call that used it, in milliseconds;
        /// 0 gives it up at once, as NestJS. Default 1000.
        #[serde(with = "millis")]
        "replyIdle" reply_idle: Duration = Duration::from_secs(1), (Duration) |idle| idle;
        /// How long a call waits for its reply, in milliseconds; a stream for each. `null` waits for ever.
        /// Default 30,000. Changeable per call.
        #[serde(with = "optional_millis")]
        "callTimeout" call_timeout: Option<Duration> = Some(Duration::from_secs(30)),
            (impl Into<Option<Duration>>) |timeout| timeout.into();
    } from code {
        /// The client's other settings. Its `timeout`, `reconnect`, `reconnect_attempts`, `retry_delay` and
        /// `connect_timeout` are taken from the options above.
        client: ClientOptions = ClientOptions::default();
        /// Turns packets into bytes: NestJS's serializer and deserializer. Both ends must agree. Default
        /// `JsonCodec`, which NestJS speaks.
        codec: Arc<dyn Codec> = Arc::new(JsonCodec);
    }
}

impl MqttServerOptions {
    pub(crate) fn runtime(&self) -> ServerOptions {
        let mut options = ServerOptions::default();
        options.max_in_flight = self.max_in_flight;
        options.high_water_bytes = self.high_water_bytes;
        // The dial counts the attempts at the first connection: `maxConnectionAttempts` bounds only that one.
        options.retry_attempts = Some(if self.reconnect_period.is_zero() { 0 } else { u32::MAX });
        options.retry_delay = BackoffOptions::fixed(self.reconnect_period);
        options.connect_timeout = self.connect_timeout;
        options.on_failure = self.on_failure;
        options
    }
}

impl MqttClientOptions {
    pub(crate) fn runtime(&self) -> ClientOptions {
        let mut options = self.client.clone();
        options.timeout = self.call_timeout;
        options.reconnect = !self.reconnect_period.is_zero();
        options.reconnect_attempts = Some(if self.reconnect_period.is_zero() { 0 } else { u32::MAX });
        options.retry_delay = BackoffOptions::fixed(self.reconnect_period);
        options.connect_timeout = self.connect_timeout;
        options
    }
}

/// Secrets stay out of debug output.
macro_rules! debug {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("url", &without_secrets(&self.url))
                    .field("client_id", &self.client_id)
                    .field("protocol_version", &self.protocol_version)
                    .field("tls", &self.tls)
                    .finish_non_exhaustive()
            }
        }
    )*};
}

debug! { MqttServerOptions MqttClientOptions Common }

/// A broker's address without user and password, and without what may follow the path.
pub(crate) fn without_secrets(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("mqtt", url));
    let rest = rest.split(['?', '#']).next().unwrap_or(rest);
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}
