// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of both sides, with NestJS's names where NestJS (or its driver, ioredis) has one.
//!
//! Durations are numbers of milliseconds in configuration files.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use martlet_core::backoff::BackoffOptions;
use martlet_core::client::ClientOptions;
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::error::SessionError;
use martlet_core::options::{millis, optional_millis};
use martlet_core::server::ServerOptions;
use redis::{ConnectionAddr, IntoConnectionInfo};

/// TLS towards the broker. Present means required, as an address that begins with `rediss://` does.
pub type RedisTlsOptions = martlet_tls::BrokerTls;

martlet_core::transport_options! {
    common {
        /// The broker's address: `redis://user:password@host:port/db`, or `rediss://…` for TLS. What it says
        /// goes before `host`, `port` and `db`; `username` and `password` go before what it says. Default none.
        "url" url: Option<String> = None, (impl Into<String>) |url| Some(url.into());
        /// The broker's host, if there is no `url`. Default `localhost`.
        "host" host: String = "localhost".to_owned(), (impl Into<String>) |host| host.into();
        /// The broker's port, if there is no `url`. Default 6379.
        "port" port: u16 = 6379, (u16) |port| port;
        /// The database, if there is no `url`. Channels do not depend on it. Default 0.
        "db" db: u32 = 0, (u32) |db| db;
        /// The user (Redis 6 and later). Default: none, or that of the URL.
        "username" username: Option<String> = None, (impl Into<String>) |user| Some(user.into());
        /// The password. Default: none, or that of the URL.
        "password" password: Option<String> = None, (impl Into<String>) |password| Some(password.into());
        /// TLS. Default: only if `url` begins with `rediss://`, with the platform's authorities.
        "tls" tls: Option<RedisTlsOptions> = None, (RedisTlsOptions) |tls| Some(tls);
        /// Attempts in a row to get a lost connection back; a client makes one more, at once. Default none: a client
        /// makes a new connection at its next call; a server makes one attempt, then ends its service (NestJS's
        /// stays deaf).
        "retryAttempts" retry_attempts: Option<u32> = None, (u32) |attempts| Some(attempts);
        /// The pause before each attempt, in milliseconds. Default 5000.
        #[serde(with = "millis")]
        "retryDelay" retry_delay: Duration = Duration::from_secs(5), (Duration) |delay| delay;
        /// The connections' name in the broker's `CLIENT LIST`. Default none.
        "connectionName" connection_name: Option<String> = None, (impl Into<String>) |name| Some(name.into());
        /// How long connecting may take, subscriptions included, in milliseconds. Default 10,000.
        #[serde(with = "millis")]
        "connectTimeout" connect_timeout: Duration = Duration::from_secs(10), (Duration) |timeout| timeout;
        /// How often the broker is asked whether it lives, in milliseconds; an unanswered question ends the
        /// session when the next one is due. 0 asks never. Default 30,000.
        #[serde(with = "millis")]
        "pingInterval" ping_interval: Duration = Duration::from_secs(30), (Duration) |interval| interval;
        /// Connections in the publishing pool. A session needs one; the others are for the application, which
        /// gets at the pool with `unwrap`. Default 4.
        "poolSize" pool_size: usize = 4, (usize) |connections| connections;
        /// Messages that may wait in this process; one more is dropped, counted and reported, because pub/sub
        /// cannot be slowed down. Default 65,536.
        "subscriptionCapacity" subscription_capacity: usize = 65_536, (usize) |messages| messages;
        /// Bytes of messages that may wait in this process; a message beyond is dropped, counted and reported.
        /// Default 67,108,864.
        "subscriptionBytes" subscription_bytes: usize = 64 * 1024 * 1024, (usize) |bytes| bytes;
        /// The largest body that is sent or taken, in bytes; a larger one is refused, which is reported. The
        /// broker cuts off subscribers that owe it more than 32 MiB, by default. Default 16,777,216.
        "maxPayloadBytes" max_payload_bytes: usize = 16 * 1024 * 1024, (usize) |bytes| bytes;
        /// Whether what the broker says of a message's receivers is believed: a request that nobody receives ends
        /// as `NoHandler` at once, a stream that nobody receives is cancelled. Wrong behind a proxy, a replica or
        /// in a cluster, where the broker counts its own subscribers only. Default true.
        "receiverCount" receiver_count: bool = true, (bool) |believed| believed;
        /// Whether cancelled calls are told to the handler's service, on channels that begin with
        /// `_MARTLET.cancel.`. Default true.
        "cancellation" cancellation: bool = true, (bool) |cancellation| cancellation;
    }

    /// The options of the serving side.
    ///
    /// # Examples
    ///
    /// ```
    /// use martlet_redis::{RedisServer, RedisServerOptions};
    ///
    /// let server = RedisServer::new(RedisServerOptions::new().url("redis://127.0.0.1:6379").wildcards(true));
    /// ```
    server RedisServerOptions {
        /// Whether patterns are globs (`?`, `*`, `[…]`), subscribed with PSUBSCRIBE. Default false.
        "wildcards" wildcards: bool = false, (bool) |wildcards| wildcards;
        /// How long stopping may take, in milliseconds, if that is less than what the service allows.
        /// Default: what the service allows.
        #[serde(with = "optional_millis")]
        "gracePeriod" grace_period: Option<Duration> = None, (Duration) |period| Some(period);
        /// Requests and events in work at once; at the limit messages wait, see `subscriptionCapacity`. Default
        /// 1024.
        "maxInFlight" max_in_flight: usize = 1024, (usize) |requests| requests;
        /// Bytes of replies that may wait for the broker before messages wait. Default 262,144.
        "highWaterBytes" high_water_bytes: usize = 256 * 1024, (usize) |bytes| bytes;
    } from code {
        /// Turns packets into bytes: NestJS's serializer and deserializer. Both ends must agree. Default
        /// `JsonCodec`, which NestJS speaks.
        codec: Arc<dyn Codec> = Arc::new(JsonCodec);
    }

    /// The options of the calling side.
    client RedisClientOptions {
        /// Whether replies of NestJS servers before 12.1.1 that have `wildcards` are received: they go to the
        /// handler's glob instead of the channel. Costs one subscription, of nothing but such replies. Default
        /// true.
        "wildcardReplies" wildcard_replies: bool = true, (bool) |receive| receive;
        /// Reply channels that stay subscribed; beyond that, idle ones are unsubscribed. Default 1024.
        "maxReplyChannels" max_reply_channels: usize = 1024, (usize) |channels| channels;
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

impl RedisServerOptions {
    pub(crate) fn runtime(&self) -> ServerOptions {
        let mut options = ServerOptions::default();
        options.max_in_flight = self.max_in_flight;
        options.high_water_bytes = self.high_water_bytes;
        // REDIS-20: the runtime makes one attempt more than it is told.
        options.retry_attempts = Some(self.retry_attempts.unwrap_or(1).saturating_sub(1));
        options.retry_first = false;
        options.retry_delay = BackoffOptions::fixed(self.retry_delay);
        options.connect_timeout = self.common().dial_timeout();
        options.grace_period = self.grace_period;
        options
    }
}

impl RedisClientOptions {
    pub(crate) fn runtime(&self) -> ClientOptions {
        let mut options = self.client.clone();
        // REDIS-20.
        options.reconnect = self.retry_attempts.is_some();
        options.reconnect_attempts = Some(self.retry_attempts.unwrap_or(0));
        options.timeout = self.call_timeout;
        options.retry_delay = BackoffOptions::fixed(self.retry_delay);
        options.connect_timeout = self.common().dial_timeout();
        options
    }
}

/// Where the broker is, and who we are.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) tls: bool,
    pub(crate) db: i64,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
}

impl Address {
    /// Without secrets.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls { "rediss" } else { "redis" };
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match self.db {
            0 => format!("{scheme}://{host}:{}", self.port),
            db => format!("{scheme}://{host}:{}/{db}", self.port),
        }
    }
}

impl Common {
    /// The broker's own error comes before the runtime's.
    fn dial_timeout(&self) -> Duration {
        self.connect_timeout.saturating_add(Duration::from_millis(500))
    }

    pub(crate) fn address(&self) -> Result<Address, SessionError> {
        let mut address = Address {
            host: self.host.clone(),
            port: self.port,
            tls: self.tls.is_some(),
            db: i64::from(self.db),
            username: self.username.clone(),
            password: self.password.clone(),
        };
        let Some(url) = &self.url else { return Ok(address) };
        let refused =
            |why: &str| SessionError::fatal(format!("option url {:?}: {why}", without_secrets(url)));
        if !url.starts_with("redis://") && !url.starts_with("rediss://") {
            return Err(refused("it must begin with redis:// or rediss://"));
        }
        let info = url.as_str().into_connection_info().map_err(|error| refused(&error.to_string()))?;
        (address.host, address.port) = match info.addr() {
            ConnectionAddr::Tcp(host, port) => (host.clone(), *port),
            ConnectionAddr::TcpTls { insecure: true, .. } => {
                return Err(refused("certificates are always verified: #insecure is not supported"));
            }
            ConnectionAddr::TcpTls { host, port, .. } => {
                address.tls = true;
                (host.clone(), *port)
            }
            _ => return Err(refused("only TCP is supported")),
        };
        let settings = info.redis_settings();
        address.db = settings.db();
        address.username = address.username.or_else(|| settings.username().map(str::to_owned));
        address.password = address.password.or_else(|| settings.password().map(str::to_owned));
        Ok(address)
    }
}

/// Secrets stay out of debug output.
macro_rules! debug {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("url", &self.url.as_deref().map(without_secrets))
                    .field("host", &self.host)
                    .field("port", &self.port)
                    .field("tls", &self.tls)
                    .finish_non_exhaustive()
            }
        }
    )*};
}

debug! { RedisServerOptions RedisClientOptions Common }

/// A broker's address without user and password.
pub(crate) fn without_secrets(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("redis", url));
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    format!("{scheme}://{host}")
}
