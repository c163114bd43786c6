// SPDX-License-Identifier: MIT OR Apache-2.0
//! Input that is wrong: packets that a broker must not send, and messages of strangers. (Payloads that are no packet, replies
//! of any shape and messages that are too large: `messages.rs`.)

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet_core::codec::MessagePackCodec;
use martlet_core::{ConnectionStatus, Format, Payload};
use martlet_mqtt::{MqttClient, MqttClientOptions, MqttQos, MqttServerOptions, MqttSubscribeOptions};
use rumqttc_v5::mqttbytes::QoS;
use rumqttc_v5::mqttbytes::v5::{Publish, PublishProperties};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::raw::Raw;
use crate::world::{GRACE, broker, client, counting, serve, server_options, sum, until};

/// A broker played byte by byte, in either version.
struct Played {
    stream: TcpStream,
    v5: bool,
}

impl Played {
    async fn accept(listener: &TcpListener, v5: bool) -> Self {
        let (stream, _) = listener.accept().await.unwrap();
        let mut played = Self { stream, v5 };
        assert_eq!(played.packet().await[0], 0x10);
        played.say(if v5 { &[0x20, 3, 0, 0, 0] } else { &[0x20, 2, 0, 0] }).await;
        played
    }

    /// Grants the next subscription.
    async fn grant(&mut self) {
        let subscribe = self.packet().await;
        assert_eq!(subscribe[0], 0x82);
        let (high, low) = (subscribe[2], subscribe[3]);
        match self.v5 {
            true => self.say(&[0x90, 4, high, low, 0, 2]).await,
            false => self.say(&[0x90, 3, high, low, 2]).await,
        }
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next packet, which is short.
    async fn packet(&mut self) -> Vec<u8> {
        let mut packet = vec![0; 2];
        self.stream.read_exact(&mut packet).await.unwrap();
        assert!(packet[1] < 0x80, "{packet:?}");
        packet.resize(2 + usize::from(packet[1]), 0);
        self.stream.read_exact(&mut packet[2..]).await.unwrap();
        packet
    }

    /// A message for `topic`, at quality of service 1.
    async fn publish(&mut self, topic: &[u8], id: u8, payload: &[u8]) {
        let length = 2 + topic.len() + 2 + usize::from(self.v5) + payload.len();
        let mut packet = vec![0x32, u8::try_from(length).unwrap(), 0, topic.len() as u8];
        packet.extend_from_slice(topic);
        packet.extend_from_slice(&[0, id]);
        if self.v5 {
            packet.push(0);
        }
        packet.extend_from_slice(payload);
        self.say(&packet).await;
    }
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    (listener, url)
}

fn quick(url: &str, v5: bool) -> MqttServerOptions {
    MqttServerOptions::new()
        .url(url)
        .protocol_version(if v5 { 5 } else { 4 })
        .subscribe_options(MqttSubscribeOptions::qos(MqttQos::AtLeastOnce))
        .reconnect_period(Duration::from_millis(5))
}

/// MQTT-23: what breaks the protocol ends the session, with the reason; the next one works.
#[actix::test]
async fn packets_that_break_the_protocol_end_the_session_and_no_more() {
    let both: &[&[u8]] = &[
        // No packet type, and those that only clients send.
        &[0x00, 0],
        &[0x10, 2, 0, 0],
        &[0xc0, 0],
        // Reserved flags, a length that does not end.
        &[0x41, 2, 0, 1],
        &[0x40, 0xff, 0xff, 0xff, 0xff, 1],
        // Quality of service 3, a packet id of 0, a repetition of what is not acknowledged.
        b"\x36\x08\0\x03evt\0\x011",
        b"\x32\x08\0\x03evt\0\x001",
        b"\x38\x06\0\x03evt1",
        // A topic beyond its packet, none, one with wildcards, with a zero character, not UTF-8.
        b"\x30\x04\xff\xffev",
        b"\x30\x03\0\x001",
        b"\x30\x06\0\x03ev+1",
        b"\x30\x06\0\x03e\0v1",
        b"\x30\x06\0\x03e\xffv1",
        // Acknowledgements without an id.
        &[0x40, 0],
        &[0x62, 1, 0],
    ];
    let five: &[&[u8]] = &[
        // Properties beyond their packet, an unknown one, one that publishing does not have, AUTH.
        b"\x30\x06\0\x03evt\x7f",
        b"\x30\x08\0\x03evt\x02\x7f\0",
        b"\x30\x0b\0\x03evt\x05\x11\0\0\0\x01",
        &[0xf0, 0],
    ];
    for (v5, packets) in [(false, both.to_vec()), (true, [both, five].concat())] {
        let (listener, url) = listen().await;
        let count = Arc::<AtomicU64>::default();
        let session = async || {
            let mut played = Played::accept(&listener, v5).await;
            played.grant().await;
            played
        };
        let ((service, reports), mut played) =
            futures::join!(serve(quick(&url, v5), [counting("evt", &count)]), session());
        for (number, packet) in packets.iter().enumerate() {
            played.say(packet).await;
            // The service has closed: its next session.
            let next = tokio::time::timeout(Duration::from_secs(5), session()).await;
            played = next.unwrap_or_else(|_| panic!("{v5} {packet:x?} is taken: {:?}", reports.all()));
            played.publish(b"evt", 1, b"1").await;
            assert_eq!(played.packet().await[..], [0x40, 2, 0, 1]);
            until("it has run", || count.load(Ordering::Relaxed) == number as u64 + 1).await;
        }
        let said = reports.all().iter().filter(|report| report.contains("broke the protocol")).count();
        assert!(said >= packets.len() - 2, "{said} of {}: {:?}", packets.len(), reports.all());
        service.stop(GRACE).await;
    }
}

/// MQTT-23.
#[actix::test]
async fn answers_to_nothing_are_ignored() {
    for v5 in [false, true] {
        let (listener, url) = listen().await;
        let count = Arc::<AtomicU64>::default();
        let session = async || {
            let mut played = Played::accept(&listener, v5).await;
            played.grant().await;
            played
        };
        let ((service, reports), mut played) =
            futures::join!(serve(quick(&url, v5), [counting("evt", &count)]), session());
        for nothing in [
            &b"\x40\x02\0\x63"[..],
            b"\x70\x02\0\x63",
            b"\xd0\0",
            if v5 { b"\x90\x04\0\x63\0\0" } else { b"\x90\x03\0\x63\0" },
            if v5 { b"\xb0\x04\0\x63\0\0" } else { b"\xb0\x02\0\x63" },
            if v5 { b"\x20\x03\0\0\0" } else { b"\x20\x02\0\0" },
        ] {
            played.say(nothing).await;
        }
        // Those that the protocol answers, so that the broker can forget them.
        played.say(b"\x50\x02\0\x63").await;
        assert_eq!(played.packet().await[..4], [0x62, 2, 0, 0x63]);
        played.say(b"\x62\x02\0\x63").await;
        assert_eq!(played.packet().await[..4], [0x70, 2, 0, 0x63]);
        // On a topic that nobody asked for: acknowledged, so that it does not come again.
        played.publish(b"other", 2, b"1").await;
        assert_eq!(played.packet().await[..], [0x40, 2, 0, 2]);
        played.publish(b"evt", 3, b"1").await;
        assert_eq!(played.packet().await[..], [0x40, 2, 0, 3]);
        until("it has run", || count.load(Ordering::Relaxed) == 1).await;
        assert_eq!(service.servers()[0].status(), Some(ConnectionStatus::Connected), "{:?}", reports.all());
        service.stop(GRACE).await;
    }
    // A client likewise.
    let (listener, url) = listen().await;
    let client =
        MqttClient::new(MqttClientOptions::new().url(&url).reconnect_period(Duration::from_millis(5)));
    let (connected, mut played) = futures::join!(client.connect(), Played::accept(&listener, false));
    connected.unwrap();
    played.publish(b"sum/reply", 1, br#"{"id":"none","response":1}"#).await;
    assert_eq!(played.packet().await[..], [0x40, 2, 0, 1]);
    played.say(&[0x00, 0]).await;
    let _next = Played::accept(&listener, false).await;
    until("it is connected again", || client.status() == Some(ConnectionStatus::Connected)).await;
    let (_, _) = futures::join!(client.close(), async { drop((played, _next)) });
}

/// MQTT-23: neither NestJS nor Martlet reads them, whatever is in them.
#[actix::test]
async fn properties_of_strangers_change_nothing() {
    let broker = broker();
    let (service, reports) = serve(server_options(&broker).protocol_version(5), [sum()]).await;
    let mut raw = Raw::connect(&broker).await;
    raw.subscribe("sum/reply").await;
    raw.subscribe("elsewhere").await;
    let properties = [
        PublishProperties { content_type: Some("application/x-unknown".to_owned()), ..Default::default() },
        PublishProperties {
            response_topic: Some("elsewhere".to_owned()),
            correlation_data: Some("wrong".into()),
            ..Default::default()
        },
        PublishProperties { payload_format_indicator: Some(1), ..Default::default() },
        PublishProperties {
            user_properties: vec![("id".to_owned(), "x".to_owned()); 50],
            message_expiry_interval: Some(60),
            ..Default::default()
        },
    ];
    for properties in properties {
        let request = r#"{"pattern":"sum","data":[1,2],"id":"a"}"#;
        raw.put(Publish::new("sum", QoS::AtMostOnce, request, Some(properties))).await;
        assert_eq!(
            raw.text().await,
            ("sum/reply".to_owned(), r#"{"response":3,"isDisposed":true,"id":"a"}"#.to_owned()),
            "{:?}",
            reports.all()
        );
    }
    assert!(raw.is_silent().await);
    service.stop(GRACE).await;
}

/// MQTT-23: MessagePack has no form for plain text.
#[actix::test]
async fn what_the_codec_cannot_read_is_reported_and_acknowledged() {
    let broker = broker();
    let count = Arc::<AtomicU64>::default();
    let options = server_options(&broker)
        .subscribe_options(MqttSubscribeOptions::qos(MqttQos::ExactlyOnce))
        .manual_acks(true)
        .codec(Arc::new(MessagePackCodec));
    let (service, reports) = serve(options, [counting("evt", &count)]).await;
    let mut raw = Raw::connect(&broker).await;
    for (number, bytes) in [&b"\xc1"[..], b"\x92\x01", b"\xdf\xff\xff\xff\xff", b""].into_iter().enumerate() {
        for qos in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce] {
            raw.put(Publish::new("evt", qos, bytes.to_vec(), None)).await;
        }
        let bad = || reports.all().iter().filter(|report| report.contains("message on evt")).count();
        until("they are reported", || bad() == 3 * (number + 1)).await;
    }
    let good = Payload::encode(Format::MessagePack, &serde_json::json!({"data": 1})).unwrap();
    raw.put(Publish::new("evt", QoS::AtLeastOnce, good.bytes().to_vec(), None)).await;
    until("the next is taken", || count.load(Ordering::Relaxed) == 1).await;
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
}

/// JSON that is deep, long or twice the same is one message's trouble.
#[actix::test]
async fn hostile_json_disturbs_nobody() {
    let broker = broker();
    let (service, reports) = serve(server_options(&broker), [sum()]).await;
    let mut raw = Raw::connect(&broker).await;
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    for data in [
        deep(100_000),
        format!(r#"{{"pattern":"sum","data":{},"id":"a"}}"#, deep(10_000)),
        format!(r#"{{"pattern":{},"data":[1],"id":{{}}}}"#, deep(10_000)),
        format!(r#"{{"pattern":"sum","data":[1e999],"id":"{}"}}"#, "x".repeat(100_000)),
        r#"{"data":[1],"data":[2],"id":"a","id":"b","id":"c"}"#.to_owned(),
        format!(r#"{{"pattern":"sum","data":[{}],"id":"a"}}"#, "9".repeat(1000)),
    ] {
        raw.publish("sum", data).await;
    }
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3, "{:?}", reports.all());
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}
