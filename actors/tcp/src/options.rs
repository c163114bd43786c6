// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options of the TCP transporter, with NestJS's names in data and Rust's in code.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use martlet_core::backoff::BackoffOptions;
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::options::millis;
use martlet_core::{ClientOptions, ServerOptions};
use serde::{Deserialize, Serialize};

use crate::tls::{TlsClientOptions, TlsServerOptions};
use crate::wire::{Framing, NestFraming};

/// NestJS's default port.
pub const DEFAULT_PORT: u16 = 3000;

/// How packets become bytes, and bytes frames.
#[derive(Clone)]
pub struct TcpProtocol {
    /// Turns packets into bytes: NestJS's serializer and deserializer. Default [`JsonCodec`].
    pub codec: Arc<dyn Codec>,
    /// Splits the byte stream: NestJS's `socketClass`. Default [`NestFraming`].
    pub framing: Arc<dyn Framing>,
}

impl Default for TcpProtocol {
    fn default() -> Self {
        Self { codec: Arc::new(JsonCodec), framing: Arc::new(NestFraming) }
    }
}

impl fmt::Debug for TcpProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpProtocol({} in {})", self.codec.name(), self.framing.name())
    }
}

impl TcpProtocol {
    /// Why the two do not fit together, if they do not.
    pub(crate) fn mismatch(&self) -> Option<String> {
        (!self.codec.is_text() && !self.framing.binary_safe()).then(|| {
            format!(
                "codec {} makes binary packets, which framing {} cannot carry: use LengthDelimited",
                self.codec.name(),
                self.framing.name()
            )
        })
    }
}

/// Options of a TCP server.
///
/// # Examples
///
/// ```
/// use martlet_tcp::TcpServerOptions;
///
/// let options: TcpServerOptions = serde_json::from_str(r#"{"host":"127.0.0.1","port":0}"#)?;
/// assert_eq!(options.port, 0);
/// assert_eq!(options.max_buffer_size, 134_217_728);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct TcpServerOptions {
    /// The name or address to listen on. Default `localhost` (every address it stands for).
    pub host: String,
    /// The port to listen on; 0 takes a free one. Default 3000.
    pub port: u16,
    /// How often a listening socket that failed is opened again, over the server's life. Default 0.
    pub retry_attempts: u32,
    /// The pause before it is opened again, in milliseconds. Default 0.
    #[serde(with = "millis")]
    pub retry_delay: Duration,
    /// Turns TLS on. Default off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_options: Option<TlsServerOptions>,
    /// The largest frame taken, in UTF-16 code units, its prefix included. A larger one is reported, what is
    /// owed to the peer is answered, then its connection is closed. Default 134,217,728.
    pub max_buffer_size: usize,
    /// How long a peer may be silent inside a frame, in milliseconds; 0 is for ever. Its connection is then
    /// closed. Default 30,000.
    #[serde(with = "millis")]
    pub incomplete_message_timeout: Duration,
    /// Bytes of output that may wait for a peer that does not read; 0 is without bound. Above it, the
    /// connection is closed. Default 134,217,728.
    pub max_send_buffer_size: usize,
    /// Requests and events in flight per connection; at the limit the connection is not read. Default 1024.
    pub max_in_flight: usize,
    /// Connections open at once; further ones are closed at once and reported. Default 65,536.
    pub max_connections: usize,
    /// Bytes of replies that may wait before the connection is not read any more. Default 262,144.
    pub high_water_bytes: usize,
    /// How long a TLS handshake may take, in milliseconds. Default 10,000.
    #[serde(with = "millis")]
    pub handshake_timeout: Duration,
    /// How long what a peer has asked may still take once it has closed its sending side, in milliseconds; then its
    /// connection is closed. Default 1,000: a NestJS client that closes waits for the server to close, too.
    #[serde(with = "millis")]
    pub half_close_timeout: Duration,
    /// Connections that may wait to be accepted (the socket's backlog). Default 1024.
    pub backlog: u32,
    /// Codec and framing.
    #[serde(skip)]
    pub protocol: TcpProtocol,
}

impl Default for TcpServerOptions {
    fn default() -> Self {
        let server = ServerOptions::default();
        Self {
            host: "localhost".to_owned(),
            port: DEFAULT_PORT,
            retry_attempts: 0,
            retry_delay: Duration::ZERO,
            tls_options: None,
            max_buffer_size: crate::wire::DEFAULT_MAX_FRAME,
            incomplete_message_timeout: Duration::from_secs(30),
            max_send_buffer_size: 134_217_728,
            max_in_flight: server.max_in_flight,
            max_connections: server.max_connections,
            high_water_bytes: server.high_water_bytes,
            handshake_timeout: server.handshake_timeout,
            half_close_timeout: server.half_close_timeout,
            backlog: 1024,
            protocol: TcpProtocol::default(),
        }
    }
}

impl TcpServerOptions {
    /// The names of the options, as configuration has them.
    pub const OPTION_KEYS: &'static [&'static str] = &[
        "host",
        "port",
        "retryAttempts",
        "retryDelay",
        "tlsOptions",
        "maxBufferSize",
        "incompleteMessageTimeout",
        "maxSendBufferSize",
        "maxInFlight",
        "maxConnections",
        "highWaterBytes",
        "handshakeTimeout",
        "halfCloseTimeout",
        "backlog",
    ];

    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets where to listen.
    #[must_use]
    pub fn address(mut self, host: impl Into<String>, port: u16) -> Self {
        self.host = host.into();
        self.port = port;
        self
    }

    /// Turns TLS on.
    #[must_use]
    pub fn tls(mut self, tls: TlsServerOptions) -> Self {
        self.tls_options = Some(tls);
        self
    }

    /// Replaces the codec: NestJS's serializer and deserializer.
    #[must_use]
    pub fn codec(mut self, codec: impl Codec) -> Self {
        self.protocol.codec = Arc::new(codec);
        self
    }

    /// Replaces the framing: NestJS's `socketClass`.
    #[must_use]
    pub fn framing(mut self, framing: impl Framing) -> Self {
        self.protocol.framing = Arc::new(framing);
        self
    }

    /// Changes any option.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(crate) fn server(&self) -> ServerOptions {
        let mut server = ServerOptions::default();
        server.max_in_flight = self.max_in_flight;
        server.max_connections = self.max_connections;
        server.high_water_bytes = self.high_water_bytes;
        server.handshake_timeout = self.handshake_timeout;
        server.half_close_timeout = self.half_close_timeout;
        server.retry_attempts = Some(self.retry_attempts);
        server.retry_delay = BackoffOptions::fixed(self.retry_delay);
        server
    }
}

/// Options of a TCP client.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct TcpClientOptions {
    /// The name or address to connect to; every address that a name stands for is tried, in order.
    /// Default `localhost`.
    pub host: String,
    /// The port to connect to. Default 3000.
    pub port: u16,
    /// Turns TLS on. Default off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_options: Option<TlsClientOptions>,
    /// The largest frame taken, in UTF-16 code units, its prefix included. A larger one ends the connection.
    /// Default 134,217,728.
    pub max_buffer_size: usize,
    /// How long the server may be silent inside a frame, in milliseconds; 0 is for ever. Default 30,000.
    #[serde(with = "millis")]
    pub incomplete_message_timeout: Duration,
    /// Bytes of output that may wait for a server that does not read; 0 is without bound. Above it, the
    /// connection is closed. Default 134,217,728.
    pub max_send_buffer_size: usize,
    /// How often connecting is tried again before the calls that wait for it end as `NotSent`. Default 0.
    pub retry_attempts: u32,
    /// The pause before it is tried again, in milliseconds. Default 0.
    #[serde(with = "millis")]
    pub retry_delay: Duration,
    /// How long one attempt to connect may take, in milliseconds. Default 10,000.
    #[serde(with = "millis")]
    pub connect_timeout: Duration,
    /// How long a call waits for its reply, in milliseconds (a stream: for each); 0 is for ever. Default
    /// 30,000.
    #[serde(with = "millis")]
    pub timeout: Duration,
    /// Calls that may be pending at once; one more ends as `Overloaded`. Default 65,536.
    pub max_pending: usize,
    /// Replies of one call that may wait to be read; one more ends the call as `Overloaded`. Default 1024.
    pub max_buffered_replies: usize,
    /// Whether the client looks for a Martlet server (by a metadata key of its first request, which NestJS
    /// ignores) and tells it when a call is cancelled. Default true.
    pub cancellation: bool,
    /// Codec and framing.
    #[serde(skip)]
    pub protocol: TcpProtocol,
    /// What else the client does, for the options above do not say it.
    #[serde(skip)]
    pub client: ClientOptions,
}

impl Default for TcpClientOptions {
    fn default() -> Self {
        let client = ClientOptions::default();
        Self {
            host: "localhost".to_owned(),
            port: DEFAULT_PORT,
            tls_options: None,
            max_buffer_size: crate::wire::DEFAULT_MAX_FRAME,
            incomplete_message_timeout: Duration::from_secs(30),
            max_send_buffer_size: 134_217_728,
            retry_attempts: client.retry_attempts,
            retry_delay: Duration::ZERO,
            connect_timeout: client.connect_timeout,
            timeout: client.timeout.unwrap_or_default(),
            max_pending: client.max_pending,
            max_buffered_replies: client.max_buffered_replies,
            cancellation: true,
            protocol: TcpProtocol::default(),
            client,
        }
    }
}

impl TcpClientOptions {
    /// The names of the options, as configuration has them.
    pub const OPTION_KEYS: &'static [&'static str] = &[
        "host",
        "port",
        "tlsOptions",
        "maxBufferSize",
        "incompleteMessageTimeout",
        "maxSendBufferSize",
        "retryAttempts",
        "retryDelay",
        "connectTimeout",
        "timeout",
        "maxPending",
        "maxBufferedReplies",
        "cancellation",
    ];

    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets where to connect.
    #[must_use]
    pub fn address(mut self, host: impl Into<String>, port: u16) -> Self {
        self.host = host.into();
        self.port = port;
        self
    }

    /// Turns TLS on.
    #[must_use]
    pub fn tls(mut self, tls: TlsClientOptions) -> Self {
        self.tls_options = Some(tls);
        self
    }

    /// Replaces the codec: NestJS's serializer and deserializer.
    #[must_use]
    pub fn codec(mut self, codec: impl Codec) -> Self {
        self.protocol.codec = Arc::new(codec);
        self
    }

    /// Replaces the framing: NestJS's `socketClass`.
    #[must_use]
    pub fn framing(mut self, framing: impl Framing) -> Self {
        self.protocol.framing = Arc::new(framing);
        self
    }

    /// How long a call waits for its reply.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Changes any option.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(crate) fn client(&self) -> ClientOptions {
        let mut client = self.client.clone();
        client.timeout = (!self.timeout.is_zero()).then_some(self.timeout);
        client.max_pending = self.max_pending;
        client.max_buffered_replies = self.max_buffered_replies;
        client.retry_attempts = self.retry_attempts;
        client.retry_delay = BackoffOptions::fixed(self.retry_delay);
        client.connect_timeout = self.connect_timeout;
        client
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(value: impl Serialize) -> Vec<String> {
        let mut names: Vec<_> =
            serde_json::to_value(value).unwrap().as_object().unwrap().keys().cloned().collect();
        names.sort();
        names
    }

    fn sorted(keys: &[&str]) -> Vec<String> {
        let mut keys: Vec<_> = keys.iter().map(|key| (*key).to_owned()).collect();
        keys.sort();
        keys
    }

    #[test]
    fn the_option_keys_are_the_fields_that_configuration_may_have() {
        // With every optional field present.
        let server = TcpServerOptions::new().tls(TlsServerOptions::default());
        assert_eq!(names(&server), sorted(TcpServerOptions::OPTION_KEYS));
        let client = TcpClientOptions::new().tls(TlsClientOptions::default());
        assert_eq!(names(&client), sorted(TcpClientOptions::OPTION_KEYS));
    }
}
