// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance suite over RabbitMQ. Everybody comes to the broker through a relay, which is what is cut.

use std::sync::Arc;
use std::time::{Duration, Instant};

use martlet_core::codec::{Codec, JsonCodec, MessagePackCodec};
use martlet_core::{ClientOptions, ClientProxy, FailurePolicy, Server, ServerOptions};
use martlet_rabbitmq::{RmqClient, RmqClientOptions, RmqDial, RmqServerOptions, RmqSocketOptions};
use martlet_testkit::broker::Broker;
use martlet_testkit::conformance::Harness;
use martlet_testkit::features::Features;
use martlet_testkit::relay::Relay;

use crate::world::{shared_broker, unique};

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Plain,
    Acknowledged,
    Wildcards,
}

struct Rmq {
    codec: Arc<dyn Codec>,
    mode: Mode,
    relay: Relay,
    /// When the lines were cut last.
    cut: Option<Instant>,
    cuts: u32,
    _broker: Arc<Broker>,
}

impl Rmq {
    fn new(codec: impl Codec, mode: Mode) -> Self {
        let broker = shared_broker();
        let relay = Relay::start(broker.port());
        Self { codec: Arc::new(codec), mode, relay, cut: None, cuts: 0, _broker: broker }
    }

    fn cancellation(&self) -> bool {
        self.mode != Mode::Plain
    }

    fn address(&self) -> [String; 1] {
        [format!("amqp://127.0.0.1:{}", self.relay.port())]
    }
}

impl Harness for Rmq {
    fn features(&self) -> Features {
        let mut features = Features::default();
        features.cuts = true;
        features.subscribes = true;
        features.cancel = self.cancellation();
        features
    }

    fn server(&mut self, mut options: ServerOptions) -> Server {
        let mut rmq = RmqServerOptions::new()
            .urls(self.address())
            .queue(unique("conformance"))
            .wildcards(self.mode == Mode::Wildcards)
            .cancellation(self.cancellation())
            .max_in_flight(options.max_in_flight)
            .codec(Arc::clone(&self.codec));
        if self.mode == Mode::Acknowledged {
            let policy = *options.on_failure.get_or_insert(FailurePolicy::Discard);
            rmq = rmq.no_ack(false).on_failure(policy);
        }
        let dial = RmqDial::server(&rmq);
        let url = dial.url();
        Server::dial(dial, url, options)
    }

    fn client(&mut self, url: &str, options: ClientOptions) -> ClientProxy {
        // A queue is one service's: the services of one behaviour have different handlers.
        let queue = url.split_once("?queue=").unwrap().1.split('&').next().unwrap();
        let mut rmq = RmqClientOptions::new()
            .urls(self.address())
            .queue(queue)
            .wildcards(self.mode == Mode::Wildcards)
            .cancellation(self.cancellation())
            .codec(Arc::clone(&self.codec))
            .reconnect(options.reconnect)
            .socket_options(RmqSocketOptions::new().reconnect_time(options.retry_delay.min))
            .high_water_bytes(options.high_water_bytes)
            .call_timeout(options.timeout);
        rmq.client = options;
        RmqClient::new(rmq)
    }

    fn cut(&mut self) {
        self.cuts += 1;
        // A session takes four round trips and the declaring: in a storm of cuts faster than that, there would never
        // be one.
        if self.cuts < 10 || self.cut.is_none_or(|last| last.elapsed() > Duration::from_millis(200)) {
            self.relay.cut();
            self.cut = Some(Instant::now());
        }
    }

    fn set_reachable(&mut self, reachable: bool) {
        if reachable { self.relay.open() } else { self.relay.close() }
    }
}

mod json {
    use super::*;
    martlet_testkit::conformance_tests!(Rmq::new(JsonCodec, Mode::Plain); core, metadata, cuts, subscribes);
}

mod message_pack {
    use super::*;
    martlet_testkit::conformance_tests!(Rmq::new(MessagePackCodec, Mode::Plain); core, metadata, cuts, subscribes);
}

mod acknowledged {
    use super::*;
    martlet_testkit::conformance_tests!(Rmq::new(JsonCodec, Mode::Acknowledged); core, metadata, cancel, cuts, subscribes);
}

mod wildcards {
    use super::*;
    martlet_testkit::conformance_tests!(Rmq::new(JsonCodec, Mode::Wildcards); core, metadata, cancel, cuts, subscribes);
}
