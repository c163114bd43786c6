// SPDX-License-Identifier: MIT OR Apache-2.0
//! A peer or a broker that is none of ours: MQTT 5 by hand, on the driver's codec.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use martlet_testkit::broker::Broker;
use rumqttc_v5::mqttbytes::QoS;
use rumqttc_v5::mqttbytes::v5::{
    ConnAck, Connect, ConnectAuth, ConnectReturnCode, Packet, PubAck, PubComp, PubRec, PubRel, Publish,
    SubAck, Subscribe, SubscribeFilter, SubscribeReasonCode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub(crate) struct Raw {
    stream: TcpStream,
    input: BytesMut,
    next: u16,
}

impl Raw {
    pub(crate) async fn connect(broker: &Broker) -> Self {
        Self::connect_to(broker.port()).await
    }

    pub(crate) async fn connect_to(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut raw = Self { stream, input: BytesMut::new(), next: 0 };
        let connect = Connect {
            keep_alive: 0,
            client_id: format!("raw{}", raw.stream.local_addr().unwrap().port()),
            clean_start: true,
            properties: None,
        };
        raw.send(Packet::Connect(connect, None, ConnectAuth::None)).await;
        assert!(matches!(raw.packet().await, Packet::ConnAck(_)));
        raw
    }

    /// The broker's side of the next connection: takes CONNECT and accepts it.
    pub(crate) async fn accept(listener: &TcpListener, session_present: bool) -> Self {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut raw = Self { stream, input: BytesMut::new(), next: 0 };
        assert!(matches!(raw.packet().await, Packet::Connect(..)));
        let code = ConnectReturnCode::Success;
        raw.send(Packet::ConnAck(ConnAck { session_present, code, properties: None })).await;
        raw
    }

    /// The broker's side: grants the next subscription.
    pub(crate) async fn grant(&mut self) {
        let packet = self.packet().await;
        let Packet::Subscribe(subscribe) = packet else { panic!("{packet:?}") };
        let return_codes = vec![SubscribeReasonCode::Success(QoS::ExactlyOnce)];
        self.send(Packet::SubAck(SubAck { pkid: subscribe.pkid, return_codes, properties: None })).await;
    }

    pub(crate) async fn send(&mut self, packet: Packet) {
        let mut out = BytesMut::new();
        packet.write(&mut out, None).unwrap();
        self.stream.write_all(&out).await.unwrap();
    }

    pub(crate) async fn packet(&mut self) -> Packet {
        loop {
            match Packet::read(&mut self.input, None) {
                Ok(packet) => return packet,
                Err(rumqttc_v5::mqttbytes::Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(self.stream.read_buf(&mut self.input).await.unwrap() > 0, "the broker has closed");
        }
    }

    pub(crate) async fn subscribe(&mut self, filter: &str) {
        self.next += 1;
        let mut subscribe = Subscribe::new(SubscribeFilter::new(filter, QoS::ExactlyOnce), None);
        subscribe.pkid = self.next;
        self.send(Packet::Subscribe(subscribe)).await;
        assert!(matches!(self.packet().await, Packet::SubAck(_)));
    }

    /// The next message; acknowledged.
    pub(crate) async fn message(&mut self) -> Publish {
        loop {
            match self.packet().await {
                Packet::Publish(publish) => {
                    match publish.qos {
                        QoS::AtMostOnce => {}
                        QoS::AtLeastOnce => self.send(Packet::PubAck(PubAck::new(publish.pkid, None))).await,
                        QoS::ExactlyOnce => self.send(Packet::PubRec(PubRec::new(publish.pkid, None))).await,
                    }
                    return publish;
                }
                Packet::PubRel(rel) => self.send(Packet::PubComp(PubComp::new(rel.pkid, None))).await,
                _ => {}
            }
        }
    }

    /// Its topic and payload.
    pub(crate) async fn text(&mut self) -> (String, String) {
        let message = self.message().await;
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        (text(&message.topic), text(&message.payload))
    }

    /// Whether nothing comes for a while.
    pub(crate) async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(150), self.message()).await.is_err()
    }

    pub(crate) async fn publish(&mut self, topic: &str, payload: impl Into<Bytes>) {
        self.put(Publish::new(topic, QoS::AtMostOnce, payload.into(), None)).await;
    }

    /// Publishes and sees the exchange through; what comes between is lost.
    pub(crate) async fn put(&mut self, mut publish: Publish) {
        let qos = publish.qos;
        if qos != QoS::AtMostOnce {
            self.next += 1;
            publish.pkid = self.next;
        }
        self.send(Packet::Publish(publish)).await;
        match qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => while !matches!(self.packet().await, Packet::PubAck(_)) {},
            QoS::ExactlyOnce => {
                while !matches!(self.packet().await, Packet::PubRec(_)) {}
                self.send(Packet::PubRel(PubRel::new(self.next, None))).await;
                while !matches!(self.packet().await, Packet::PubComp(_)) {}
            }
        }
    }
}
