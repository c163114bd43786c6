// SPDX-License-Identifier: MIT OR Apache-2.0
//! When an event that was emitted counts as sent: MQTT-21.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::join_all;
use martlet_core::client::Emit;
use martlet_core::{CallError, ClientProxy, ConnectionStatus};
use martlet_mqtt::{MqttClient, MqttClientOptions, MqttQos, MqttRecordBuilder, MqttSubscribeOptions};
use martlet_testkit::relay::Relay;
use rumqttc_v5::mqttbytes::v5::{Packet, PubAck, PubAckReason, PubComp, PubRec, PubRecReason, Publish};
use tokio::net::TcpListener;

use crate::raw::Raw;
use crate::world::{GRACE, broker, broker_with, client_options, counting, serve, server_options, until};

const ACKNOWLEDGED: [MqttQos; 2] = [MqttQos::AtLeastOnce, MqttQos::ExactlyOnce];

fn emit(client: &ClientProxy, topic: &str, number: u64, qos: MqttQos) -> Emit {
    client.emit(topic, MqttRecordBuilder::new(number).set_qos(qos).build())
}

/// Whether it stays pending for a while.
async fn waits(event: &mut Emit) -> bool {
    tokio::time::timeout(Duration::from_millis(200), event).await.is_err()
}

#[actix::test]
async fn an_event_is_sent_when_the_broker_has_it() {
    let broker = broker();
    for version in [4, 5] {
        let count = Arc::default();
        let subscribe = MqttSubscribeOptions::qos(MqttQos::ExactlyOnce);
        let (service, _) =
            serve(server_options(&broker).subscribe_options(subscribe), [counting("evt", &count)]).await;
        let options = || client_options(&broker).protocol_version(version);
        let client = MqttClient::new(options());
        let hasty = MqttClient::new(options().call_timeout(Duration::from_millis(200)));
        client.connect().await.unwrap();
        hasty.connect().await.unwrap();
        broker.freeze().unwrap();
        // Quality of service 0 has nobody who would say so.
        emit(&client, "evt", 0, MqttQos::AtMostOnce).await.unwrap();
        let mut events = ACKNOWLEDGED.map(|qos| emit(&client, "evt", 1, qos));
        for event in &mut events {
            assert!(waits(event).await);
        }
        // In time, or not known: this one is on its way.
        let late = emit(&hasty, "evt", 2, MqttQos::AtLeastOnce).await;
        assert!(matches!(late, Err(CallError::Timeout { .. })), "{late:?}");
        broker.thaw().unwrap();
        for event in events {
            event.await.unwrap();
        }
        until("all have run", || count.load(Ordering::Relaxed) == 4).await;
        // An event for nobody is with the broker, too.
        for qos in ACKNOWLEDGED {
            emit(&client, "nobody", 3, qos).await.unwrap();
        }
        for client in [client, hasty] {
            assert_eq!((client.pending(), client.occupied()), (0, 0));
            client.close().await;
        }
        service.stop(GRACE).await;
    }
}

/// MQTT-16, MQTT-17: it is still owed to the broker, and goes out again on the next connection.
#[actix::test]
async fn an_event_stays_pending_over_a_lost_connection() {
    let mut broker = broker();
    for (version, clean) in [(4, true), (4, false), (5, true), (5, false)] {
        let relay = Relay::start(broker.port());
        let count = Arc::default();
        let subscribe = MqttSubscribeOptions::qos(MqttQos::ExactlyOnce);
        let (service, _) =
            serve(server_options(&broker).subscribe_options(subscribe), [counting("evt", &count)]).await;
        let client = MqttClient::new(
            client_options(&broker)
                .url(format!("mqtt://127.0.0.1:{}", relay.port()))
                .protocol_version(version)
                .client_id(format!("pending-{version}-{clean}"))
                .clean(clean),
        );
        client.connect().await.unwrap();
        broker.freeze().unwrap();
        let mut events = ACKNOWLEDGED.map(|qos| emit(&client, "evt", 1, qos));
        assert!(waits(&mut events[0]).await);
        relay.close();
        until("it is noticed", || client.status() == Some(ConnectionStatus::Reconnecting)).await;
        broker.thaw().unwrap();
        assert!(waits(&mut events[1]).await);
        relay.open();
        for event in join_all(events).await {
            event.unwrap();
        }
        // Without a kept session what was half done is repeated.
        let times = || count.load(Ordering::Relaxed);
        until("both have run", || times() >= 2).await;
        assert!(times() <= 4, "{}", times());
        // A client that is closed meanwhile says so.
        relay.close();
        until("it is noticed", || client.status() == Some(ConnectionStatus::Reconnecting)).await;
        let event = emit(&client, "evt", 2, MqttQos::AtLeastOnce);
        client.close().await;
        let closed = event.await;
        assert!(matches!(closed, Err(CallError::Closed)), "{closed:?}");
        assert_eq!((client.pending(), client.occupied()), (0, 0));
        service.stop(GRACE).await;
    }
    broker.stop();
}

/// What mosquitto refuses. With MQTT 3.1.1 it cannot say so: it acknowledges the message and drops it. With
/// `max_queued_messages 0` (as here) 2.0.11 closes the connection behind that, which at quality of service 2 is before
/// the end of the exchange, each time anew (MQTT-22).
#[actix::test]
async fn an_event_that_the_broker_refuses_is_not_sent() {
    let mut acl = tempfile();
    writeln!(acl.1, "topic readwrite open/#\ntopic read closed/#").unwrap();
    let broker = broker_with(&format!("acl_file {}\nmessage_size_limit 1000", acl.0.display()));
    for qos in ACKNOWLEDGED {
        let large = "x".repeat(2000);
        for (topic, data, said) in [
            ("open/a", "x", None),
            ("closed/a", "x", Some("not authorized")),
            ("open/a", &large, Some("packet too large")),
        ] {
            // One each: mosquitto closes the connection behind a refusal, over whatever else is on it.
            let client = MqttClient::new(client_options(&broker).protocol_version(5));
            let record = MqttRecordBuilder::new(data).set_qos(qos).build();
            check(client.emit(topic, record).await, said);
            emit(&client, "open/a", 1, qos).await.unwrap();
            assert_eq!((client.pending(), client.occupied()), (0, 0));
            client.close().await;
        }
    }
    let old = MqttClient::new(client_options(&broker).reconnect_period(Duration::from_millis(10)));
    emit(&old, "closed/a", 1, MqttQos::AtLeastOnce).await.unwrap();
    let (closed, behind) = futures::join!(
        emit(&old, "closed/a", 1, MqttQos::ExactlyOnce),
        emit(&old, "open/a", 2, MqttQos::ExactlyOnce)
    );
    assert!(
        matches!(&closed, Err(CallError::Lost { cause })
            if cause.to_string().contains("the broker closed the connection 10 times after this message was sent")
                && !cause.to_string().contains("refused")),
        "{closed:?}"
    );
    behind.unwrap();
    emit(&old, "open/a", 3, MqttQos::ExactlyOnce).await.unwrap();
    assert_eq!((old.pending(), old.occupied()), (0, 0));
    old.close().await;
    std::fs::remove_file(&acl.0).unwrap();
}

fn tempfile() -> (std::path::PathBuf, std::fs::File) {
    let path = std::env::temp_dir().join(format!("martlet-mqtt-acl-{}", std::process::id()));
    let file = std::fs::File::create(&path).unwrap();
    (path, file)
}

/// A broker played by hand: each step of both exchanges, and every kind of answer.
#[actix::test]
async fn each_answer_of_a_broker_ends_its_event() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let client = MqttClient::new(
        MqttClientOptions::new()
            .url(url)
            .protocol_version(5)
            .client_id("confirm")
            .clean(false)
            .reconnect_period(Duration::from_millis(20)),
    );
    let (connected, mut raw) = futures::join!(client.connect(), Raw::accept(&listener, false));
    connected.unwrap();
    for (reason, said) in [
        (PubAckReason::Success, None),
        (PubAckReason::NoMatchingSubscribers, None),
        (PubAckReason::UnspecifiedError, Some("unspecified error")),
        (PubAckReason::NotAuthorized, Some("not authorized")),
        (PubAckReason::TopicNameInvalid, Some("topic name invalid")),
        (PubAckReason::QuotaExceeded, Some("quota exceeded")),
        (PubAckReason::PayloadFormatInvalid, Some("payload format invalid")),
    ] {
        let event = emit(&client, "evt", 1, MqttQos::AtLeastOnce);
        let id = published(&mut raw).await.pkid;
        raw.send(Packet::PubAck(PubAck { pkid: id, reason, properties: None })).await;
        check(event.await, said);
    }
    for (reason, said) in [
        (PubRecReason::Success, None),
        (PubRecReason::NoMatchingSubscribers, None),
        (PubRecReason::QuotaExceeded, Some("quota exceeded")),
        (PubRecReason::PayloadFormatInvalid, Some("payload format invalid")),
    ] {
        let mut event = emit(&client, "evt", 1, MqttQos::ExactlyOnce);
        let id = published(&mut raw).await.pkid;
        raw.send(Packet::PubRec(PubRec { pkid: id, reason, properties: None })).await;
        if said.is_none() {
            assert!(matches!(raw.packet().await, Packet::PubRel(rel) if rel.pkid == id));
            // The broker has promised to take it, and has not passed it on.
            assert!(waits(&mut event).await);
            raw.send(Packet::PubComp(PubComp::new(id, None))).await;
        }
        check(event.await, said);
    }
    // Acknowledged before the line breaks: told, whatever became of the session.
    let told = emit(&client, "evt", 1, MqttQos::AtLeastOnce);
    let mut again = emit(&client, "evt", 2, MqttQos::AtLeastOnce);
    let (first, second) = (published(&mut raw).await, published(&mut raw).await);
    raw.send(Packet::PubAck(PubAck::new(first.pkid, None))).await;
    drop(raw);
    told.await.unwrap();
    let mut raw = Raw::accept(&listener, true).await;
    let resent = published(&mut raw).await;
    assert_eq!((resent.pkid, resent.dup, resent.payload), (second.pkid, true, second.payload));
    assert!(waits(&mut again).await);
    // Refused now; the first time it may have been taken.
    let reason = PubAckReason::QuotaExceeded;
    raw.send(Packet::PubAck(PubAck { pkid: resent.pkid, reason, properties: None })).await;
    let refused = again.await;
    assert!(
        matches!(&refused, Err(CallError::Lost { cause }) if cause.to_string().contains("quota exceeded")),
        "{refused:?}"
    );
    // What nobody waits for is said where the client reports.
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    let (closed, ()) = futures::join!(client.close(), async {
        while !matches!(raw.packet().await, Packet::Disconnect(_)) {}
        drop(raw);
    });
    closed
}

async fn published(raw: &mut Raw) -> Publish {
    match raw.packet().await {
        Packet::Publish(publish) => publish,
        other => panic!("{other:?}"),
    }
}

fn check(result: Result<(), CallError>, said: Option<&str>) {
    match (result, said) {
        (Ok(()), None) => {}
        (Err(error), Some(said)) => {
            assert!(error.is_not_sent() && error.to_string().contains(said), "{said}: {error}");
        }
        (result, said) => panic!("{said:?}: {result:?}"),
    }
}
