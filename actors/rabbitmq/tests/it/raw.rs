// SPDX-License-Identifier: MIT OR Apache-2.0
//! A peer that speaks AMQP by hand.

use std::time::Duration;

use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use martlet_rabbitmq::options::DIRECT_REPLY_TO;
use martlet_testkit::broker::Broker;
use parking_lot::Mutex;

pub(crate) struct Raw {
    _connection: Connection,
    pub(crate) channel: Channel,
}

/// What arrives.
pub(crate) struct Arrivals(Mutex<Option<Consumer>>);

impl Arrivals {
    /// The next message; fails after ten seconds.
    pub(crate) async fn next(&self) -> Delivery {
        let mut consumer = self.0.lock().take().unwrap();
        let next = tokio::time::timeout(Duration::from_secs(10), consumer.next()).await;
        *self.0.lock() = Some(consumer);
        next.expect("a message within ten seconds").unwrap().unwrap()
    }
}

impl Raw {
    pub(crate) async fn connect(broker: &Broker) -> Self {
        let connection = Connection::connect(&broker.url(), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        Self { _connection: connection, channel }
    }

    pub(crate) async fn publish(&self, queue: &str, body: &str, properties: BasicProperties) {
        self.publish_to("", queue, body, properties).await;
    }

    pub(crate) async fn publish_to(
        &self,
        exchange: &str,
        key: &str,
        body: &str,
        properties: BasicProperties,
    ) {
        let options = BasicPublishOptions::default();
        self.channel
            .basic_publish(exchange.into(), key.into(), options, body.as_bytes(), properties)
            .await
            .unwrap();
    }

    /// The properties of a request, once replies are taken.
    pub(crate) fn asking(&self, correlation: &str) -> BasicProperties {
        BasicProperties::default()
            .with_reply_to(DIRECT_REPLY_TO.into())
            .with_correlation_id(correlation.into())
    }

    pub(crate) async fn replies(&self) -> Arrivals {
        self.consume(DIRECT_REPLY_TO).await
    }

    pub(crate) async fn consume(&self, queue: &str) -> Arrivals {
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consumer = self
            .channel
            .basic_consume(queue.into(), "".into(), options, FieldTable::default())
            .await
            .unwrap();
        Arrivals(Mutex::new(Some(consumer)))
    }

    pub(crate) async fn declare(&self, queue: &str) {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap();
    }

    /// How many messages wait in a queue, those delivered and not acknowledged not counted.
    pub(crate) async fn waiting(&self, queue: &str) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared =
            self.channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap();
        declared.message_count()
    }

    pub(crate) async fn delete(&self, queue: &str) {
        self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }
}
