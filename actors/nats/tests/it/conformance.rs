// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance suite over NATS. Everybody comes to the broker through a relay, which is what is cut.

use std::sync::Arc;
use std::time::Duration;

use martlet_core::codec::{Codec, JsonCodec, MessagePackCodec};
use martlet_core::{ClientOptions, ClientProxy, Server, ServerOptions};
use martlet_nats::{NatsClient, NatsClientOptions, NatsDial, NatsServerOptions};
use martlet_testkit::conformance::Harness;
use martlet_testkit::features::Features;
use martlet_testkit::relay::Relay;

use crate::broker::Broker;

struct Nats {
    codec: Arc<dyn Codec>,
    relay: Relay,
    // Dropped after the relay: the broker of one behaviour.
    _broker: Broker,
}

impl Nats {
    fn new(codec: impl Codec) -> Self {
        let broker = Broker::start();
        Self { codec: Arc::new(codec), relay: Relay::start(broker.port), _broker: broker }
    }

    fn address(&self) -> [String; 1] {
        [format!("nats://127.0.0.1:{}", self.relay.port())]
    }
}

impl Harness for Nats {
    fn features(&self) -> Features {
        let mut features = Features::default();
        // The broker takes a megabyte by default, the packet around the payload included.
        features.large_payload_bytes = 1024 * 1024 - 4096;
        features.cancel = true;
        features.cuts = true;
        features.subscribes = true;
        features.shares = true;
        features.wildcards = true;
        features
    }

    fn server(&mut self, options: ServerOptions) -> Server {
        let dial = NatsDial::server(
            &NatsServerOptions::new().servers(self.address()).codec(Arc::clone(&self.codec)),
        );
        let url = dial.url();
        Server::dial(dial, url, options)
    }

    fn client(&mut self, _url: &str, options: ClientOptions) -> ClientProxy {
        let mut nats = NatsClientOptions::new()
            .servers(self.address())
            .codec(Arc::clone(&self.codec))
            .reconnect(options.reconnect)
            .reconnect_time_wait(options.retry_delay.min)
            .reconnect_jitter(Duration::ZERO)
            .call_timeout(options.timeout);
        if let Some(attempts) = options.reconnect_attempts {
            nats = nats.max_reconnect_attempts(attempts.try_into().unwrap());
        }
        nats.client = options;
        NatsClient::new(nats)
    }

    fn cut(&mut self) {
        self.relay.cut();
    }

    fn set_reachable(&mut self, reachable: bool) {
        if reachable { self.relay.open() } else { self.relay.close() }
    }
}

mod json {
    use super::*;
    martlet_testkit::conformance_tests!(Nats::new(JsonCodec); core, metadata, cancel, cuts, subscribes, shares, wildcards);
}

mod message_pack {
    use super::*;
    martlet_testkit::conformance_tests!(Nats::new(MessagePackCodec); core, metadata, cancel, cuts, subscribes, shares, wildcards);
}
