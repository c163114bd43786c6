// SPDX-License-Identifier: MIT OR Apache-2.0
//! rumqttc over MQTT 3.1.1, QoS 0: one event loop that takes and writes many packets in a turn.

use rumqttc_v4::{
    AsyncClient, Event, EventLoop, MqttOptions, NetworkOptions, Packet, Publish, PublishOptions, QoS,
};

use super::{Link, Place, Publisher};
use crate::Result;
use crate::service::NOTED;

/// Packets per turn of the event loop; one by default, which costs a fifth of the rate.
const BATCH: usize = 128;
const CAPACITY: usize = 4096;

pub(super) struct Mqtt {
    client: AsyncClient,
    events: EventLoop,
}

fn start(place: &Place) -> (AsyncClient, EventLoop) {
    let mut options =
        MqttOptions::new(format!("bench-{}", std::process::id()), (place.host.as_str(), place.port));
    options.set_max_request_batch(BATCH).set_read_batch_size(BATCH);
    let (client, mut events) = AsyncClient::builder(options).capacity(CAPACITY).build();
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    events.set_network_options(network);
    (client, events)
}

async fn open(place: &Place, topics: &[String]) -> Result<Mqtt> {
    let (client, mut events) = start(place);
    for topic in topics {
        client.subscribe(topic, QoS::AtMostOnce).await?;
    }
    let mut confirmed = 0;
    while confirmed < topics.len() {
        if let Event::Incoming(Packet::SubAck(_)) = events.poll().await? {
            confirmed += 1;
        }
    }
    Ok(Mqtt { client, events })
}

fn at_most_once() -> PublishOptions {
    PublishOptions::at_most_once()
}

impl Link for Mqtt {
    type Message = Publish;

    async fn serve(place: &Place, routes: &[&str]) -> Result<Self> {
        open(place, &routes.iter().map(ToString::to_string).collect::<Vec<_>>()).await
    }

    async fn call(place: &Place, routes: &[&str]) -> Result<Self> {
        open(place, &routes.iter().map(|route| format!("{route}/reply")).collect::<Vec<_>>()).await
    }

    async fn receive(&mut self) -> Result<Publish> {
        loop {
            if let Event::Incoming(Packet::Publish(message)) = self.events.poll().await? {
                return Ok(message);
            }
        }
    }

    fn body(message: &Publish) -> &[u8] {
        &message.payload
    }

    async fn reply(&mut self, to: &Publish, packet: Vec<u8>) -> Result<()> {
        let topic = format!("{}/reply", std::str::from_utf8(&to.topic)?);
        Ok(self.client.try_publish(topic, packet, at_most_once())?)
    }

    async fn send(&mut self, route: &str, _id: Option<&str>, packet: Vec<u8>) -> Result<()> {
        Ok(self.client.try_publish(route, packet, at_most_once())?)
    }
}

pub(super) struct MqttPublisher(AsyncClient);

impl Publisher for MqttPublisher {
    async fn open(place: &Place) -> Result<Self> {
        let (client, mut events) = start(place);
        while !matches!(events.poll().await?, Event::Incoming(Packet::ConnAck(_))) {}
        tokio::spawn(async move { while events.poll().await.is_ok() {} });
        Ok(Self(client))
    }

    async fn publish(&mut self, mut packets: Vec<Vec<u8>>) -> Result<()> {
        let last = packets.pop();
        for packet in packets {
            self.0.publish(NOTED, packet, at_most_once()).await?;
        }
        if let Some(last) = last {
            // The last one has been written when all have.
            self.0.publish_tracked(NOTED, last, at_most_once()).await?.wait_completion_async().await?;
        }
        Ok(())
    }
}
