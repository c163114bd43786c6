// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance suite over Redis. Everybody comes to the broker through a relay, which is what is cut.

use std::sync::Arc;

use martlet_core::codec::{Codec, JsonCodec, MessagePackCodec};
use martlet_core::{ClientOptions, ClientProxy, Server, ServerOptions};
use martlet_redis::{RedisClient, RedisClientOptions, RedisDial, RedisServerOptions};
use martlet_testkit::broker::Broker;
use martlet_testkit::conformance::Harness;
use martlet_testkit::features::Features;
use martlet_testkit::relay::Relay;

struct Redis {
    codec: Arc<dyn Codec>,
    relay: Relay,
    // Dropped after the relay: the broker of one behaviour.
    _broker: Broker,
}

impl Redis {
    fn new(codec: impl Codec) -> Self {
        let broker = crate::world::broker();
        Self { codec: Arc::new(codec), relay: Relay::start(broker.port()), _broker: broker }
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.relay.port())
    }
}

impl Harness for Redis {
    fn features(&self) -> Features {
        let mut features = Features::default();
        features.cancel = true;
        features.cuts = true;
        // Not `shares`: every service that serves a channel receives every message.
        features.subscribes = true;
        features
    }

    fn server(&mut self, options: ServerOptions) -> Server {
        let dial =
            RedisDial::server(&RedisServerOptions::new().url(self.url()).codec(Arc::clone(&self.codec)));
        let url = dial.url();
        Server::dial(dial, url, options)
    }

    fn client(&mut self, _url: &str, options: ClientOptions) -> ClientProxy {
        let mut redis = RedisClientOptions::new()
            .url(self.url())
            .codec(Arc::clone(&self.codec))
            .retry_delay(options.retry_delay.min)
            .call_timeout(options.timeout);
        if options.reconnect {
            redis = redis.retry_attempts(options.reconnect_attempts.unwrap_or(options.retry_attempts));
        }
        redis.client = options;
        RedisClient::new(redis)
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
    martlet_testkit::conformance_tests!(Redis::new(JsonCodec); core, metadata, cancel, cuts, subscribes);
}

mod message_pack {
    use super::*;
    martlet_testkit::conformance_tests!(Redis::new(MessagePackCodec); core, metadata, cancel, cuts, subscribes);
}
