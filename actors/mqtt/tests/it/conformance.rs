// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance suite over MQTT. Everybody comes to the broker through a relay, which is what is cut.

use std::sync::Arc;

use martlet_core::codec::{Codec, JsonCodec, MessagePackCodec};
use martlet_core::{ClientOptions, ClientProxy, Server, ServerOptions};
use martlet_mqtt::{MqttClientOptions, MqttDial, MqttServerOptions};
use martlet_testkit::broker::Broker;
use martlet_testkit::conformance::Harness;
use martlet_testkit::features::Features;
use martlet_testkit::relay::Relay;

use crate::world::broker;

struct Mqtt {
    codec: Arc<dyn Codec>,
    version: u8,
    relay: Relay,
    // Dropped after the relay: the broker of one behaviour.
    _broker: Broker,
}

impl Mqtt {
    fn new(codec: impl Codec, version: u8) -> Self {
        let broker = broker();
        Self { codec: Arc::new(codec), version, relay: Relay::start(broker.port()), _broker: broker }
    }

    fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.relay.port())
    }
}

impl Harness for Mqtt {
    fn features(&self) -> Features {
        let mut features = Features::default();
        // Nobody tells a publisher that there are no subscribers.
        features.says_nobody = false;
        features.cancel = true;
        features.cuts = true;
        features.subscribes = true;
        features
    }

    fn server(&mut self, options: ServerOptions) -> Server {
        let dial = MqttDial::server(
            &MqttServerOptions::new()
                .url(self.url())
                .protocol_version(self.version)
                // So that services share calls.
                .shared_group("conformance")
                .codec(Arc::clone(&self.codec)),
        );
        let url = dial.url();
        Server::dial(dial, url, options)
    }

    fn client(&mut self, _url: &str, options: ClientOptions) -> ClientProxy {
        let dial = MqttDial::client(
            &MqttClientOptions::new()
                .url(self.url())
                .protocol_version(self.version)
                .codec(Arc::clone(&self.codec)),
        );
        ClientProxy::new(dial, options)
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
    martlet_testkit::conformance_tests!(Mqtt::new(JsonCodec, 4); core, metadata, cancel, cuts, subscribes);
}

mod json_mqtt_5 {
    use super::*;
    martlet_testkit::conformance_tests!(Mqtt::new(JsonCodec, 5); core, metadata, cancel, cuts, subscribes);
}

mod message_pack {
    use super::*;
    martlet_testkit::conformance_tests!(Mqtt::new(MessagePackCodec, 5); core, metadata, cancel, cuts, subscribes);
}
