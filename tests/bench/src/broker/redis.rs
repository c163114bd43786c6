// SPDX-License-Identifier: MIT OR Apache-2.0
//! redis-rs: a connection that only subscribes, and a multiplexed one that publishes pipelines of what came together.

use futures::{FutureExt, StreamExt};
use redis::aio::{MultiplexedConnection, PubSubSink, PubSubStream};
use redis::{Client, Msg, Pipeline};

use super::{Link, Place, Publisher};
use crate::Result;
use crate::service::NOTED;

pub(super) struct Redis {
    _subscriber: PubSubSink,
    messages: PubSubStream,
    publisher: MultiplexedConnection,
    queued: Pipeline,
}

async fn open(place: &Place, channels: &[String]) -> Result<Redis> {
    let client = client(place)?;
    let (mut subscriber, messages) = client.get_async_pubsub().await?.split();
    subscriber.subscribe(channels).await?;
    let publisher = client.get_multiplexed_async_connection().await?;
    Ok(Redis { _subscriber: subscriber, messages, publisher, queued: Pipeline::new() })
}

fn client(place: &Place) -> Result<Client> {
    Ok(Client::open(format!("redis://{}:{}", place.host, place.port))?)
}

impl Link for Redis {
    type Message = Msg;

    async fn serve(place: &Place, routes: &[&str]) -> Result<Self> {
        open(place, &routes.iter().map(ToString::to_string).collect::<Vec<_>>()).await
    }

    async fn call(place: &Place, routes: &[&str]) -> Result<Self> {
        open(place, &routes.iter().map(|route| format!("{route}.reply")).collect::<Vec<_>>()).await
    }

    async fn receive(&mut self) -> Result<Msg> {
        let message = match self.messages.next().now_or_never() {
            Some(message) => message,
            None => {
                if !self.queued.is_empty() {
                    self.queued.exec_async(&mut self.publisher).await?;
                    self.queued.clear();
                }
                self.messages.next().await
            }
        };
        Ok(message.ok_or("the connection ended")?)
    }

    fn body(message: &Msg) -> &[u8] {
        message.get_payload_bytes()
    }

    async fn reply(&mut self, to: &Msg, packet: Vec<u8>) -> Result<()> {
        self.queued.publish(format!("{}.reply", to.get_channel_name()), packet).ignore();
        Ok(())
    }

    async fn send(&mut self, route: &str, _id: Option<&str>, packet: Vec<u8>) -> Result<()> {
        self.queued.publish(route, packet).ignore();
        Ok(())
    }
}

pub(super) struct RedisPublisher(MultiplexedConnection);

impl Publisher for RedisPublisher {
    async fn open(place: &Place) -> Result<Self> {
        Ok(Self(client(place)?.get_multiplexed_async_connection().await?))
    }

    async fn publish(&mut self, packets: Vec<Vec<u8>>) -> Result<()> {
        let mut pipeline = Pipeline::with_capacity(packets.len());
        for packet in packets {
            pipeline.publish(NOTED, packet).ignore();
        }
        Ok(pipeline.exec_async(&mut self.0).await?)
    }
}
