// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages over which the broker closes the connection, and those over which it does not: MQTT-22. Brokers played by hand.

use std::time::Duration;

use martlet_core::client::Emit;
use martlet_core::{CallError, ClientProxy};
use martlet_mqtt::{MqttClient, MqttClientOptions, MqttQos, MqttRecordBuilder};
use rumqttc_v5::mqttbytes::v5::{Disconnect, DisconnectReasonCode, Packet, PubAck, PubComp, PubRec, Publish};
use tokio::net::TcpListener;

use crate::raw::Raw;

async fn client(kept: bool) -> (ClientProxy, TcpListener, Raw) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = MqttClient::new(
        MqttClientOptions::new()
            .url(format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port()))
            .protocol_version(5)
            .client_id("given-up")
            .clean(!kept)
            .reconnect_period(Duration::from_millis(5)),
    );
    let (connected, raw) = futures::join!(client.connect(), Raw::accept(&listener, false));
    connected.unwrap();
    (client, listener, raw)
}

fn emit(client: &ClientProxy, number: u64, qos: MqttQos) -> Emit {
    client.emit("evt", MqttRecordBuilder::new(number).set_qos(qos).build())
}

async fn published(raw: &mut Raw) -> Publish {
    match raw.packet().await {
        Packet::Publish(publish) => publish,
        other => panic!("{other:?}"),
    }
}

async fn is_pending(event: &mut Emit) -> bool {
    tokio::time::timeout(Duration::from_millis(20), event).await.is_err()
}

async fn close(client: ClientProxy, mut raw: Raw) {
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    futures::join!(client.close(), async {
        while !matches!(raw.packet().await, Packet::Disconnect(_)) {}
        drop(raw);
    });
}

fn check_given_up(outcome: Result<(), CallError>) {
    let Err(CallError::Lost { cause }) = &outcome else { panic!("{outcome:?}") };
    let said = cause.to_string();
    assert!(said.contains("the broker closed the connection 10 times after this message was sent"), "{said}");
    assert!(!said.contains("refused"), "{said}");
}

#[actix::test]
async fn a_broker_that_closes_the_connection_over_a_message_each_time_is_believed_the_tenth_time() {
    for kept in [true, false] {
        let (client, listener, mut raw) = client(kept).await;
        let mut event = emit(&client, 1, MqttQos::AtLeastOnce);
        let mut behind = emit(&client, 2, MqttQos::AtLeastOnce);
        for _ in 0..10 {
            assert!(is_pending(&mut event).await && is_pending(&mut behind).await);
            published(&mut raw).await;
            drop(raw);
            raw = Raw::accept(&listener, kept).await;
        }
        check_given_up(event.await);
        let publish = published(&mut raw).await;
        assert!(publish.payload.ends_with(b"2}"), "{publish:?}");
        raw.send(Packet::PubAck(PubAck::new(publish.pkid, None))).await;
        behind.await.unwrap();
        close(client, raw).await;
    }
}

/// A broker that stops or sends its clients away says so, and means none of their messages.
#[actix::test]
async fn a_broker_that_says_why_it_leaves_loses_no_message() {
    let (client, listener, mut raw) = client(true).await;
    let mut event = emit(&client, 1, MqttQos::AtLeastOnce);
    for round in 0..25 {
        assert!(is_pending(&mut event).await);
        published(&mut raw).await;
        let reason = [
            DisconnectReasonCode::ServerShuttingDown,
            DisconnectReasonCode::ServerBusy,
            DisconnectReasonCode::UseAnotherServer,
        ][round % 3];
        raw.send(Packet::Disconnect(Disconnect::new(reason))).await;
        drop(raw);
        raw = Raw::accept(&listener, true).await;
    }
    let publish = published(&mut raw).await;
    raw.send(Packet::PubAck(PubAck::new(publish.pkid, None))).await;
    event.await.unwrap();
    close(client, raw).await;
}

/// What the broker has said PUBREC to is released until it has said PUBCOMP, however often it closes.
#[actix::test]
async fn a_message_that_the_broker_has_received_is_released_as_often_as_it_takes() {
    let (client, listener, mut raw) = client(true).await;
    let mut event = emit(&client, 1, MqttQos::ExactlyOnce);
    assert!(is_pending(&mut event).await);
    let id = published(&mut raw).await.pkid;
    raw.send(Packet::PubRec(PubRec::new(id, None))).await;
    for _ in 0..25 {
        let packet = raw.packet().await;
        assert!(matches!(&packet, Packet::PubRel(rel) if rel.pkid == id), "{packet:?}");
        assert!(is_pending(&mut event).await);
        drop(raw);
        raw = Raw::accept(&listener, true).await;
    }
    assert!(matches!(raw.packet().await, Packet::PubRel(rel) if rel.pkid == id));
    raw.send(Packet::PubComp(PubComp::new(id, None))).await;
    event.await.unwrap();
    close(client, raw).await;
}

/// The broker may have received it and not have said so: it is released, so that the broker forgets its id, under which
/// the next message would else be taken for this one.
#[actix::test]
async fn a_message_of_quality_two_that_is_given_up_is_released() {
    let (client, listener, mut raw) = client(true).await;
    let mut event = emit(&client, 1, MqttQos::ExactlyOnce);
    let mut id = 0;
    for _ in 0..10 {
        assert!(is_pending(&mut event).await);
        id = published(&mut raw).await.pkid;
        drop(raw);
        raw = Raw::accept(&listener, true).await;
    }
    check_given_up(event.await);
    for _ in 0..2 {
        assert!(matches!(raw.packet().await, Packet::PubRel(rel) if rel.pkid == id));
        drop(raw);
        raw = Raw::accept(&listener, true).await;
    }
    assert!(matches!(raw.packet().await, Packet::PubRel(rel) if rel.pkid == id));
    raw.send(Packet::PubComp(PubComp::new(id, None))).await;
    let mut next = emit(&client, 2, MqttQos::AtLeastOnce);
    assert!(is_pending(&mut next).await);
    let publish = published(&mut raw).await;
    raw.send(Packet::PubAck(PubAck::new(publish.pkid, None))).await;
    next.await.unwrap();
    close(client, raw).await;
}
