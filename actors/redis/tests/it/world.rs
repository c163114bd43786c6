// SPDX-License-Identifier: MIT OR Apache-2.0
//! A service and a client on a broker, what the service reports, and a peer that speaks plain Redis.

use std::time::Duration;

use futures::StreamExt;
use martlet_core::ClientProxy;
use martlet_redis::{RedisClient, RedisClientOptions, RedisServerOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
pub(crate) use martlet_testkit::world::{GRACE, serve_apart as serve, slow, streaming, sum, until};
use redis::aio::{MultiplexedConnection, PubSub};

pub(crate) fn broker() -> Broker {
    Broker::start(BrokerCommand::redis()).unwrap()
}

pub(crate) fn server_options(broker: &Broker) -> RedisServerOptions {
    RedisServerOptions::new().url(broker.url()).retry_delay(Duration::from_millis(50)).retry_attempts(200)
}

pub(crate) fn client_options(broker: &Broker) -> RedisClientOptions {
    RedisClientOptions::new()
        .url(broker.url())
        .retry_delay(Duration::from_millis(50))
        .retry_attempts(200)
        .call_timeout(Duration::from_secs(10))
}

pub(crate) fn client(broker: &Broker) -> ClientProxy {
    RedisClient::new(client_options(broker))
}

/// A peer that speaks plain Redis.
pub(crate) struct Peer {
    pub(crate) commands: MultiplexedConnection,
    pub(crate) messages: PubSub,
}

impl Peer {
    pub(crate) async fn new(broker: &Broker) -> Self {
        let client = redis::Client::open(broker.url()).unwrap();
        Self {
            commands: client.get_multiplexed_async_connection().await.unwrap(),
            messages: client.get_async_pubsub().await.unwrap(),
        }
    }

    pub(crate) async fn listening(broker: &Broker, channels: &[&str]) -> Self {
        let mut peer = Self::new(broker).await;
        for channel in channels {
            peer.messages.subscribe(*channel).await.unwrap();
        }
        peer
    }

    /// Publishes; how many received it.
    pub(crate) async fn publish(&mut self, channel: &str, body: impl AsRef<[u8]>) -> i64 {
        redis::cmd("PUBLISH").arg(channel).arg(body.as_ref()).query_async(&mut self.commands).await.unwrap()
    }

    /// The next message: channel and body.
    pub(crate) async fn next(&mut self) -> (String, String) {
        let mut messages = self.messages.on_message();
        let message = tokio::time::timeout(Duration::from_secs(5), messages.next()).await;
        let message = message.expect("a message within 5s").unwrap();
        (message.get_channel_name().to_owned(), message.get_payload().unwrap())
    }

    /// Nothing more comes.
    pub(crate) async fn hears_nothing(&mut self) {
        let mut messages = self.messages.on_message();
        let message = tokio::time::timeout(Duration::from_millis(200), messages.next()).await;
        assert!(message.is_err(), "{message:?}");
    }

    /// How many connections subscribe a channel.
    pub(crate) async fn subscribers(&mut self, channel: &str) -> i64 {
        let (_, count): (String, i64) =
            redis::cmd("PUBSUB").arg("NUMSUB").arg(channel).query_async(&mut self.commands).await.unwrap();
        count
    }
}
