// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance suite over TCP: as NestJS speaks it, in MessagePack with a binary framing, with a codec and a framing
//! from elsewhere, and over TLS.
//! Clients come through a relay, which is what is cut.

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use martlet_core::codec::MessagePackCodec;
use martlet_core::{ClientOptions, ClientProxy, Server, ServerOptions};
use martlet_tcp::wire::{FrameLimits, FrameState, Framing};
use martlet_tcp::{
    LengthDelimited, NestFraming, TcpClient, TcpClientOptions, TcpServer, TcpServerOptions, TlsClientOptions,
    TlsServerOptions,
};
use martlet_testkit::conformance::{Harness, RawPeer};
use martlet_testkit::features::Features;
use martlet_testkit::relay::Relay;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::foreign::{Closed, Marked};

#[derive(Default)]
struct Tcp {
    server: TcpServerOptions,
    client: TcpClientOptions,
    /// One for each server's URL.
    relays: Vec<(String, Relay)>,
}

impl Tcp {
    fn new() -> Self {
        Self::default()
    }

    fn message_pack() -> Self {
        Self {
            server: TcpServerOptions::new().codec(MessagePackCodec).framing(LengthDelimited),
            client: TcpClientOptions::new().codec(MessagePackCodec).framing(LengthDelimited),
            relays: Vec::new(),
        }
    }

    fn foreign() -> Self {
        let codec = Marked { inverted: true };
        Self {
            server: TcpServerOptions::new().codec(codec).framing(Closed),
            client: TcpClientOptions::new().codec(codec).framing(Closed),
            relays: Vec::new(),
        }
    }

    fn tls() -> Self {
        let pair = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let (cert, key) = (pair.cert.pem(), pair.signing_key.serialize_pem());
        Self {
            server: TcpServerOptions::new().tls(TlsServerOptions::new(key, cert.as_str())),
            client: TcpClientOptions::new().tls(TlsClientOptions::new(cert)),
            relays: Vec::new(),
        }
    }

    fn is_plain_json(&self) -> bool {
        self.server.tls_options.is_none() && self.server.protocol.codec.name() == "json"
    }

    fn relay(&mut self, url: &str) -> &Relay {
        let known = self.relays.iter().position(|(known, _)| known == url).unwrap_or_else(|| {
            let port = url.rsplit_once(':').unwrap().1.parse().unwrap();
            self.relays.push((url.to_owned(), Relay::start(port)));
            self.relays.len() - 1
        });
        &self.relays[known].1
    }
}

impl Harness for Tcp {
    fn features(&self) -> Features {
        let mut features = Features::default();
        features.format = self.server.protocol.codec.format();
        features.cancel = true;
        features.cuts = true;
        features.raw = self.is_plain_json();
        features.accepts = true;
        features
    }

    fn server(&mut self, options: ServerOptions) -> Server {
        Server::listen(TcpServer::new(self.server.clone().address("127.0.0.1", 0)), options)
    }

    fn client(&mut self, url: &str, options: ClientOptions) -> ClientProxy {
        let port = self.relay(url).port();
        TcpClient::new(self.client.clone().address("127.0.0.1", port).with(|client| {
            client.timeout = options.timeout.unwrap_or_default();
            client.max_pending = options.max_pending;
            client.max_buffered_replies = options.max_buffered_replies;
            client.retry_attempts = options.retry_attempts;
            client.retry_delay = options.retry_delay.min;
            client.connect_timeout = options.connect_timeout;
            client.client = options;
        }))
    }

    fn cut(&mut self) {
        self.relays.iter().for_each(|(_, relay)| relay.cut());
    }

    fn set_reachable(&mut self, reachable: bool) {
        for (_, relay) in &self.relays {
            if reachable { relay.open() } else { relay.close() }
        }
    }

    fn raw(&mut self, url: &str) -> LocalBoxFuture<'static, Box<dyn RawPeer>> {
        let port = self.relay(url).port();
        async move {
            let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            Box::new(Raw { socket, buffer: BytesMut::new(), state: FrameState::default() })
                as Box<dyn RawPeer>
        }
        .boxed_local()
    }
}

struct Raw {
    socket: TcpStream,
    buffer: BytesMut,
    state: FrameState,
}

impl RawPeer for Raw {
    fn send(&mut self, packet: Bytes) -> LocalBoxFuture<'_, ()> {
        // A length of our own: some packets are no text.
        let units = String::from_utf8_lossy(&packet).encode_utf16().count();
        let frame = [format!("{units}#").as_bytes(), &packet].concat();
        async move { self.socket.write_all(&frame).await.unwrap() }.boxed_local()
    }

    fn recv(&mut self) -> LocalBoxFuture<'_, Option<Bytes>> {
        async move {
            loop {
                let limits = FrameLimits::default();
                if let Some(body) = NestFraming.decode(&mut self.buffer, &mut self.state, &limits).unwrap() {
                    return Some(body);
                }
                if self.socket.read_buf(&mut self.buffer).await.unwrap() == 0 {
                    return None;
                }
            }
        }
        .boxed_local()
    }
}

mod nest {
    use super::*;
    martlet_testkit::conformance_tests!(Tcp::new(); core, metadata, cancel, cuts, raw, accepts);
}

mod message_pack {
    use super::*;
    martlet_testkit::conformance_tests!(Tcp::message_pack(); core, metadata, cancel, cuts, accepts);
}

mod foreign {
    use super::*;
    martlet_testkit::conformance_tests!(Tcp::foreign(); core, metadata, cancel, cuts, accepts);
}

mod tls {
    use super::*;
    martlet_testkit::conformance_tests!(Tcp::tls(); core, metadata, cancel, cuts, accepts);
}
