// SPDX-License-Identifier: MIT OR Apache-2.0
//! lapin: one channel that consumes without acknowledgement and publishes.

use futures::StreamExt;
use futures::future::try_join_all;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};

use super::{Link, MAX_LENGTH, Place, Publisher};
use crate::Result;

const REPLY_TO: &str = "amq.rabbitmq.reply-to";

pub(super) struct Rabbit {
    _connection: Connection,
    channel: Channel,
    messages: Consumer,
    queue: ShortString,
}

async fn connect(place: &Place) -> Result<(Connection, Channel)> {
    let url = format!("amqp://{}:{}/%2f", place.host, place.port);
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

async fn open(place: &Place, own: bool) -> Result<Rabbit> {
    let (connection, channel) = connect(place).await?;
    let queue = ShortString::from(place.queue.as_str());
    if own {
        channel.queue_declare(queue.clone(), QueueDeclareOptions::durable(), FieldTable::default()).await?;
    }
    let consumed = if own { queue.clone() } else { REPLY_TO.into() };
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let messages = channel.basic_consume(consumed, "".into(), options, FieldTable::default()).await?;
    Ok(Rabbit { _connection: connection, channel, messages, queue })
}

impl Rabbit {
    async fn publish(&self, key: ShortString, packet: &[u8], properties: BasicProperties) -> Result<()> {
        let options = BasicPublishOptions::default();
        self.channel.basic_publish("".into(), key, options, packet, properties).await?;
        Ok(())
    }
}

impl Link for Rabbit {
    type Message = Delivery;

    async fn serve(place: &Place, _routes: &[&str]) -> Result<Self> {
        open(place, true).await
    }

    async fn call(place: &Place, _routes: &[&str]) -> Result<Self> {
        open(place, false).await
    }

    async fn receive(&mut self) -> Result<Delivery> {
        Ok(self.messages.next().await.ok_or("the connection ended")??)
    }

    fn body(message: &Delivery) -> &[u8] {
        &message.data
    }

    fn id(message: &Delivery) -> Option<&str> {
        message.properties.correlation_id().as_ref().map(ShortString::as_str)
    }

    async fn reply(&mut self, to: &Delivery, packet: Vec<u8>) -> Result<()> {
        let Some(key) = to.properties.reply_to().clone() else { return Ok(()) };
        let mut properties = BasicProperties::default().with_headers(FieldTable::default());
        if let Some(id) = to.properties.correlation_id() {
            properties = properties.with_correlation_id(id.clone());
        }
        self.publish(key, &packet, properties).await
    }

    async fn send(&mut self, _route: &str, id: Option<&str>, packet: Vec<u8>) -> Result<()> {
        let mut properties =
            BasicProperties::default().with_headers(FieldTable::default()).with_delivery_mode(1);
        if let Some(id) = id {
            properties = properties.with_correlation_id(id.into()).with_reply_to(REPLY_TO.into());
        }
        self.publish(self.queue.clone(), &packet, properties).await
    }
}

pub(super) struct RabbitPublisher {
    _connection: Connection,
    channel: Channel,
    queue: ShortString,
}

impl Publisher for RabbitPublisher {
    async fn open(place: &Place) -> Result<Self> {
        let (connection, channel) = connect(place).await?;
        let queue = ShortString::from(place.queue.as_str());
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), MAX_LENGTH.into());
        channel.queue_declare(queue.clone(), QueueDeclareOptions::durable(), arguments).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { _connection: connection, channel, queue })
    }

    async fn publish(&mut self, packets: Vec<Vec<u8>>) -> Result<()> {
        let properties = BasicProperties::default().with_headers(FieldTable::default()).with_delivery_mode(1);
        let mut confirmed = Vec::with_capacity(packets.len());
        for packet in packets {
            let options = BasicPublishOptions::default();
            let queue = self.queue.clone();
            let publish = self.channel.basic_publish("".into(), queue, options, &packet, properties.clone());
            confirmed.push(publish.await?);
        }
        match try_join_all(confirmed).await?.iter().all(|confirmed| confirmed.is_ack()) {
            true => Ok(()),
            false => Err("the broker refused an event".into()),
        }
    }
}
