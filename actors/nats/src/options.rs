// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of both sides, with NestJS's names where NestJS (or its driver, nats.js) has one.
//!
//! Durations are numbers of milliseconds in configuration files.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use martlet_core::Headers;
use martlet_core::backoff::BackoffOptions;
use martlet_core::client::ClientOptions;
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::options::{header_lines, millis, one_or_many, optional_millis};
use martlet_core::server::ServerOptions;
use serde::Deserialize;

/// TLS towards the broker. Present means required; the broker's own demand for TLS is met with or without
/// it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct NatsTlsOptions {
    /// A PEM file of the authorities to trust. Default: those of the platform.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the certificate to show. Default: none is shown.
    pub cert_file: Option<PathBuf>,
    /// A PEM file with its key; needed with `certFile`.
    pub key_file: Option<PathBuf>,
    /// Whether TLS begins before the broker has said anything (the broker's `handshake_first`). Default
    /// false.
    pub handshake_first: bool,
}

impl NatsTlsOptions {
    /// The options' names, for checking configuration.
    pub const OPTION_KEYS: &'static [&'static str] = &["caFile", "certFile", "keyFile", "handshakeFirst"];

    /// TLS with the platform's authorities.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the authorities in a PEM file instead of the platform's.
    #[must_use]
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// Shows a certificate.
    #[must_use]
    pub fn certificate(mut self, cert_file: impl Into<PathBuf>, key_file: impl Into<PathBuf>) -> Self {
        self.cert_file = Some(cert_file.into());
        self.key_file = Some(key_file.into());
        self
    }

    /// Begins with TLS before the broker has said anything.
    #[must_use]
    pub fn handshake_first(mut self, first: bool) -> Self {
        self.handshake_first = first;
        self
    }
}

/// What a service says of itself in NATS's services discovery.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServicesDiscovery {
    /// The service's name: letters, digits, `_` and `-`.
    pub name: String,
    /// Its version, semantic.
    pub version: String,
    /// What it is for. Default empty.
    #[serde(default)]
    pub description: String,
}

martlet_core::transport_options! {
    common {
        /// The brokers' addresses, tried in order: `nats://host:4222`, `tls://host`, or `host:port`; user and
        /// password may be in the URL. In configuration: one text (commas separate) or a list. Default
        /// `nats://localhost:4222`.
        #[serde(deserialize_with = "one_or_many")]
        "servers" servers: Vec<String> = vec!["nats://localhost:4222".to_owned()],
            (impl IntoIterator<Item = impl Into<String>>) |servers| servers.into_iter().map(Into::into).collect();
        /// The user. Default: none, or that of the URL.
        "user" user: Option<String> = None, (impl Into<String>) |user| Some(user.into());
        /// The user's password; needs `user`, here or in the URL.
        "pass" pass: Option<String> = None, (impl Into<String>) |pass| Some(pass.into());
        /// An authentication token. Default: none, or a URL's user without password.
        "token" token: Option<String> = None, (impl Into<String>) |token| Some(token.into());
        /// The content of a `.creds` file (user JWT and seed). This, `credentialsFile` and `nkey` exclude each
        /// other.
        "credentials" credentials: Option<String> = None,
            (impl Into<String>) |credentials| Some(credentials.into());
        /// The path of a `.creds` file; read anew at every connect.
        "credentialsFile" credentials_file: Option<PathBuf> = None,
            (impl Into<PathBuf>) |path| Some(path.into());
        /// The seed of an nkey (`SU…`).
        "nkey" nkey: Option<String> = None, (impl Into<String>) |seed| Some(seed.into());
        /// TLS. Default: only if the broker or a `tls://` address asks for it, with the platform's
        /// authorities.
        "tls" tls: Option<NatsTlsOptions> = None, (NatsTlsOptions) |tls| Some(tls);
        /// The connection's name in the broker's monitoring. Default none.
        "name" name: Option<String> = None, (impl Into<String>) |name| Some(name.into());
        /// What the subjects for replies begin with. Default `_INBOX`. Permissions must allow to subscribe
        /// below it.
        "inboxPrefix" inbox_prefix: String = "_INBOX".to_owned(), (impl Into<String>) |prefix| prefix.into();
        /// Attempts in a row to get a lost connection back; -1 for no end. A server that gives up ends its
        /// service; a client that gives up tries again at its next call. Default 10, as nats.js.
        "maxReconnectAttempts" max_reconnect_attempts: i32 = 10, (i32) |attempts| attempts;
        /// The pause before each further attempt, in milliseconds. The first one is made at once by
        /// clients, after the pause by servers. Default 2000.
        #[serde(with = "millis")]
        "reconnectTimeWait" reconnect_time_wait: Duration = Duration::from_millis(2000), (Duration) |wait| wait;
        /// How far the pause is changed at random, both ways, in milliseconds. Default 100.
        #[serde(with = "millis")]
        "reconnectJitter" reconnect_jitter: Duration = Duration::from_millis(100), (Duration) |jitter| jitter;
        /// Whether the first connection is tried like a lost one. Default false: it fails at once.
        "waitOnFirstConnect" wait_on_first_connect: bool = false, (bool) |wait| wait;
        /// How often the broker is asked whether it lives, in milliseconds; two unanswered pings end the
        /// session. Default 120,000.
        #[serde(with = "millis")]
        "pingInterval" ping_interval: Duration = Duration::from_secs(120), (Duration) |interval| interval;
        /// How long connecting to one broker may take, in milliseconds; then the next one is tried. Default
        /// 10,000.
        #[serde(with = "millis")]
        "timeout" timeout: Duration = Duration::from_secs(10), (Duration) |timeout| timeout;
        /// The largest header block that is sent or taken, in bytes. A larger one refuses its message, which
        /// is reported. Default 16,384.
        "maxHeaderBytes" max_header_bytes: usize = 16 * 1024, (usize) |bytes| bytes;
        /// Messages of one subscription that may wait in this process; one more is dropped, counted and
        /// reported, because core NATS cannot be slowed down. Default 65,536.
        "subscriptionCapacity" subscription_capacity: usize = 65_536, (usize) |messages| messages;
        /// Messages that may wait for the connection's task before further ones wait in the session, where
        /// they count towards its high-water mark. Default 2048.
        "clientCapacity" client_capacity: usize = 2048, (usize) |messages| messages;
        /// Whether cancelled calls are told to the handler's service, on subjects below `_MARTLET.cancel`,
        /// which no NestJS service listens on. Default true.
        "cancellation" cancellation: bool = true, (bool) |cancellation| cancellation;
    }

    /// The options of the serving side.
    ///
    /// # Examples
    ///
    /// ```
    /// use martlet_nats::{NatsServer, NatsServerOptions};
    ///
    /// let server = NatsServer::new(NatsServerOptions::new().servers(["nats://127.0.0.1"]).queue("workers"));
    /// ```
    server NatsServerOptions {
        /// The queue group of every subscription: of the services that share it, one gets each message. A
        /// handler's extra `queue` overrides it. Default: none, every service gets every message.
        "queue" queue: Option<String> = None,
            (impl Into<String>) |queue| Some(queue.into()).filter(|queue: &String| !queue.is_empty());
        /// Whether stopping first takes in what the broker has already sent. False drops it. Default true
        /// (NestJS: false).
        "gracefulShutdown" graceful_shutdown: bool = true, (bool) |graceful| graceful;
        /// How long stopping may take, in milliseconds, if that is less than what the service allows.
        /// Default: what the service allows.
        #[serde(with = "optional_millis")]
        "gracePeriod" grace_period: Option<Duration> = None, (Duration) |period| Some(period);
        /// Answers NATS's services discovery (`$SRV.PING`, `INFO`, `STATS`). Default: no answer.
        "servicesDiscovery" services_discovery: Option<ServicesDiscovery> = None,
            (ServicesDiscovery) |discovery| Some(discovery);
        /// Requests and events in work at once; at the limit reading pauses and messages wait, see
        /// `subscriptionCapacity`. Default 1024.
        "maxInFlight" max_in_flight: usize = 1024, (usize) |requests| requests;
        /// Bytes of replies that may wait before reading pauses. Default 262,144.
        "highWaterBytes" high_water_bytes: usize = 256 * 1024, (usize) |bytes| bytes;
    } from code {
        /// Turns packets into bytes: NestJS's serializer and deserializer. Both ends must agree. Default
        /// `JsonCodec`, which NestJS speaks.
        codec: Arc<dyn Codec> = Arc::new(JsonCodec);
    }

    /// The options of the calling side.
    client NatsClientOptions {
        /// Headers of every message; a record's own header of the same name wins. In configuration: an
        /// object whose values are texts or lists of texts. Default none.
        #[serde(deserialize_with = "header_lines")]
        "headers" headers: Headers = Headers::new(),
            (impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>) |lines| lines.into_iter().collect();
        /// Whether a lost connection is made anew at once rather than at the next call. Default true.
        "reconnect" reconnect: bool = true, (bool) |reconnect| reconnect;
        /// How long a call waits for its reply, in milliseconds; a stream for each. `null` waits for ever.
        /// Default 30,000. Changeable per call.
        #[serde(with = "optional_millis")]
        "callTimeout" call_timeout: Option<Duration> = Some(Duration::from_secs(30)),
            (impl Into<Option<Duration>>) |timeout| timeout.into();
        /// Whether a call's deadline travels as a header even where there is no other header. A service of Martlet
        /// reads it from the packet's metadata; the header is for what reads headers only. A message with headers
        /// costs both ends and the broker more, by about a third of a call's time here. Default false.
        "deadlineHeader" deadline_header: bool = false, (bool) |header| header;
    } from code {
        /// The client's other settings. Its `timeout`, `reconnect`, `reconnect_attempts`, `retry_delay` and
        /// `connect_timeout` are taken from the options above.
        client: ClientOptions = ClientOptions::default();
        /// Turns packets into bytes: NestJS's serializer and deserializer. Both ends must agree. Default
        /// `JsonCodec`, which NestJS speaks.
        codec: Arc<dyn Codec> = Arc::new(JsonCodec);
    }
}

impl NatsServerOptions {
    /// Answers NATS's services discovery under this name and version (semantic), until it stops.
    #[must_use]
    pub fn discoverable(
        self,
        name: impl Into<String>,
        version: impl Into<String>,
        description: impl Into<String>,
    ) -> Self {
        self.services_discovery(ServicesDiscovery {
            name: name.into(),
            version: version.into(),
            description: description.into(),
        })
    }

    pub(crate) fn runtime(&self) -> ServerOptions {
        let common = self.common();
        let mut options = ServerOptions::default();
        options.max_in_flight = self.max_in_flight;
        options.high_water_bytes = self.high_water_bytes;
        options.retry_attempts = u32::try_from(common.max_reconnect_attempts).ok();
        options.retry_first = common.wait_on_first_connect;
        options.retry_delay = common.backoff();
        options.connect_timeout = common.dial_timeout();
        options.grace_period = self.grace_period;
        options
    }
}

impl NatsClientOptions {
    pub(crate) fn runtime(&self) -> ClientOptions {
        let common = self.common();
        let attempts = u32::try_from(common.max_reconnect_attempts).unwrap_or(u32::MAX);
        let mut options = self.client.clone();
        options.reconnect = self.reconnect;
        options.timeout = self.call_timeout;
        options.reconnect_attempts = Some(attempts);
        if common.wait_on_first_connect {
            options.retry_attempts = attempts;
        }
        options.retry_delay = common.backoff();
        options.connect_timeout = common.dial_timeout();
        options
    }
}

impl Common {
    fn backoff(&self) -> BackoffOptions {
        let mut backoff = BackoffOptions::fixed(self.reconnect_time_wait);
        let wait = self.reconnect_time_wait.as_secs_f64();
        if wait > 0.0 {
            backoff.jitter = (self.reconnect_jitter.as_secs_f64() / wait).min(1.0);
        }
        backoff
    }

    /// Each broker has its time; a bit is left for subscribing.
    fn dial_timeout(&self) -> Duration {
        let servers = u32::try_from(self.servers.len()).unwrap_or(u32::MAX).max(1);
        self.timeout.saturating_mul(servers).saturating_add(Duration::from_secs(5))
    }
}

/// Secrets stay out of debug output.
macro_rules! debug {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let servers: Vec<_> = self.servers.iter().map(|url| without_secrets(url)).collect();
                f.debug_struct(stringify!($name))
                    .field("servers", &servers)
                    .field("name", &self.name)
                    .field("tls", &self.tls)
                    .finish_non_exhaustive()
            }
        }
    )*};
}

debug! { NatsServerOptions NatsClientOptions Common }

/// A broker's address without user and password.
pub(crate) fn without_secrets(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("nats", url));
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    format!("{scheme}://{host}")
}
