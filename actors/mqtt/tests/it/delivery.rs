// SPDX-License-Identifier: MIT OR Apache-2.0
//! Quality of service 1 and 2: sessions that the broker keeps, acknowledgement after the handler, bounds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::settlement::{FailurePolicy, LastResort, RetryPolicy};
use martlet_core::{
    ClientProxy, ConnectionStatus, Ctx, Data, HandlerGroup, Microservice, RpcError, StartError, event,
};
use martlet_mqtt::{
    MqttClient, MqttClientOptions, MqttContext, MqttQos, MqttRecordBuilder, MqttServer, MqttServerOptions,
    MqttSubscribeOptions,
};
use martlet_testkit::broker::Broker;
use martlet_testkit::relay::Relay;
use parking_lot::Mutex;
use rumqttc_v5::mqttbytes::QoS;
use rumqttc_v5::mqttbytes::v5::{Packet, PubAckReason, PubRecReason, PubRel, Publish};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::raw::Raw;
use crate::world::{
    GRACE, broker, client, client_options, counting, dropped, serve, server_options, sum, until,
};

type Seen = Arc<Mutex<BTreeMap<u64, u32>>>;

/// Notes how often each number came.
fn noting(pattern: &str, seen: &Seen) -> HandlerGroup {
    let seen = Arc::clone(seen);
    event(pattern, move |Data(number): Data<u64>| {
        *seen.lock().entry(number).or_insert(0) += 1;
        async { Ok::<_, RpcError>(()) }
    })
}

fn kept(broker: &Broker, relay: &Relay, version: u8, qos: MqttQos) -> MqttServerOptions {
    server_options(broker)
        .url(format!("mqtt://127.0.0.1:{}", relay.port()))
        .protocol_version(version)
        .client_id(format!("kept{version}"))
        .clean(false)
        .subscribe_options(MqttSubscribeOptions::qos(qos))
}

/// MQTT-16.
#[actix::test]
async fn a_kept_session_brings_what_came_while_the_line_was_broken() {
    let broker = broker();
    let mut raw = Raw::connect(&broker).await;
    for version in [4, 5] {
        let relay = Relay::start(broker.port());
        let seen = Seen::default();
        let options = kept(&broker, &relay, version, MqttQos::AtLeastOnce);
        let (service, _) = serve(options, [noting("evt", &seen)]).await;
        relay.close();
        for number in 0..200u64 {
            raw.put(Publish::new("evt", QoS::AtLeastOnce, number.to_string(), None)).await;
        }
        relay.open();
        until("everything has come", || seen.lock().len() == 200).await;
        assert!(seen.lock().values().all(|times| *times == 1));
        assert!(service.stop(GRACE).await.clean);
        // MQTT-18: what comes while no process is there, too.
        for number in 200..300u64 {
            raw.put(Publish::new("evt", QoS::AtLeastOnce, number.to_string(), None)).await;
        }
        let options = kept(&broker, &relay, version, MqttQos::AtLeastOnce);
        let (service, _) = serve(options, [noting("evt", &seen)]).await;
        until("everything has come", || seen.lock().len() == 300).await;
        assert!(seen.lock().values().all(|times| *times == 1), "{:?}", seen.lock());
        service.stop(GRACE).await;
    }
}

/// Emits so many numbers, a hundred at a time, each until the broker has it; `between` is
/// told each number that is about to go.
async fn emit_all(client: &ClientProxy, topic: &str, events: u64, qos: MqttQos, between: impl Fn(u64)) {
    futures::stream::iter(0..events)
        .map(|number| {
            between(number);
            client.emit(topic, MqttRecordBuilder::new(number).set_qos(qos).build())
        })
        .buffer_unordered(100)
        .for_each(|sent| async { sent.unwrap() })
        .await;
}

/// MQTT-16, MQTT-21: on both sides, with lines that are cut in the middle of exchanges. Everything that was emitted is
/// confirmed, and comes once.
#[actix::test]
async fn quality_two_is_exactly_once_over_cut_lines_with_kept_sessions() {
    const EVENTS: u64 = 3000;
    let broker = broker();
    for version in [4, 5] {
        let (server_line, client_line) = (Relay::start(broker.port()), Relay::start(broker.port()));
        let seen = Seen::default();
        let options = kept(&broker, &server_line, version, MqttQos::ExactlyOnce);
        let (service, reports) = serve(options, [noting("once", &seen)]).await;
        let client = MqttClient::new(
            client_options(&broker)
                .url(format!("mqtt://127.0.0.1:{}", client_line.port()))
                .protocol_version(version)
                .client_id(format!("sender{version}"))
                .clean(false)
                .call_timeout(Duration::from_secs(20)),
        );
        client.connect().await.unwrap();
        let server = service.servers()[0].clone();
        emit_all(&client, "once", EVENTS, MqttQos::ExactlyOnce, |number| match number % 300 {
            // Only while it is subscribed: where the line breaks between CONNECT and what mosquitto resends, it
            // publishes again what it had released. See `a_message_that_was_released_is_new_when_it_comes_again`.
            100 if server_line.accepted() == server_line.cuts() + 1
                && server.status() == Some(ConnectionStatus::Connected) =>
            {
                server_line.cut();
            }
            200 => client_line.cut(),
            _ => {}
        })
        .await;
        until("everything has come", || seen.lock().len() as u64 == EVENTS).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let more: Vec<_> =
            seen.lock().iter().filter(|(_, times)| **times != 1).map(|(n, t)| (*n, *t)).collect();
        assert!(more.is_empty(), "{version}: {more:?} {:?}", reports.all());
        assert!(server_line.cuts() > 1 && client_line.cuts() > 1, "{server_line:?} {client_line:?}");
        assert_eq!((client.pending(), client.occupied()), (0, 0));
        client.close().await;
        service.stop(GRACE).await;
    }
}

/// MQTT-16, packet by packet, with a broker played by hand: what a kept session owes the broker after each cut.
#[actix::test]
async fn a_message_that_was_released_is_new_when_it_comes_again() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = MqttServerOptions::new()
        .url(format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port()))
        .protocol_version(5)
        .client_id("kept")
        .clean(false)
        .subscribe_options(MqttSubscribeOptions::qos(MqttQos::ExactlyOnce))
        .reconnect_period(Duration::from_millis(10));
    let seen = Seen::default();
    let session = async |present| {
        let mut raw = Raw::accept(&listener, present).await;
        raw.grant().await;
        raw
    };
    let ((service, _), mut raw) = futures::join!(serve(options, [noting("evt", &seen)]), session(false));
    let publish = |dup, payload: &'static str| {
        let mut publish = Publish::new("evt", QoS::ExactlyOnce, payload, None);
        (publish.pkid, publish.dup) = (7, dup);
        Packet::Publish(publish)
    };
    let times = |number| seen.lock().get(&number).copied().unwrap_or_default();
    raw.send(publish(false, "1")).await;
    assert!(matches!(raw.packet().await, Packet::PubRec(rec) if rec.pkid == 7));
    // PUBREC was lost with the line: the message is known.
    drop(raw);
    let mut raw = session(true).await;
    raw.send(publish(true, "1")).await;
    assert!(matches!(raw.packet().await, Packet::PubRec(rec) if rec.pkid == 7));
    raw.send(Packet::PubRel(PubRel::new(7, None))).await;
    assert!(matches!(raw.packet().await, Packet::PubComp(comp) if comp.pkid == 7));
    // PUBCOMP was lost with the line: it is said again, though nothing is known of it any more.
    drop(raw);
    let mut raw = session(true).await;
    raw.send(Packet::PubRel(PubRel::new(7, None))).await;
    assert!(matches!(raw.packet().await, Packet::PubComp(comp) if comp.pkid == 7));
    assert_eq!(times(1), 1);
    // A new message under the same id whose first copy was lost with the line. It cannot be told from one that a broker
    // publishes again after it has released it, which the protocol forbids and mosquitto does (2.0.11: when the line
    // breaks between CONNECT and its PUBREL). Lost would be worse than twice.
    drop(raw);
    let mut raw = session(true).await;
    raw.send(publish(true, "2")).await;
    assert!(matches!(raw.packet().await, Packet::PubRec(rec) if rec.pkid == 7));
    until("it has run", || times(2) == 1).await;
    // A broker that has forgotten the session begins anew.
    drop(raw);
    let mut raw = session(false).await;
    raw.send(publish(false, "3")).await;
    assert!(matches!(raw.packet().await, Packet::PubRec(rec) if rec.pkid == 7));
    until("it has run", || times(3) == 1).await;
    assert_eq!(*seen.lock(), BTreeMap::from([(1, 1), (2, 1), (3, 1)]));
    service.stop(GRACE).await;
}

/// MQTT-15: the acknowledgement follows the handler: what it had not finished comes again.
#[actix::test]
async fn a_message_whose_handler_had_not_finished_is_delivered_again() {
    let broker = broker();
    let mut raw = Raw::connect(&broker).await;
    for (version, qos, raw_qos) in
        [(4, MqttQos::AtLeastOnce, QoS::AtLeastOnce), (5, MqttQos::ExactlyOnce, QoS::ExactlyOnce)]
    {
        let relay = Relay::start(broker.port());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let group = event("work", move |Ctx(context): Ctx<MqttContext>, Data(number): Data<u64>| {
            let first = {
                let mut seen = sink.lock();
                seen.push((number, context.dup()));
                seen.len() == 1
            };
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
                Ok::<_, RpcError>(())
            }
        });
        let options = kept(&broker, &relay, version, qos).manual_acks(true);
        let (service, _) = serve(options, [group]).await;
        raw.put(Publish::new("work", raw_qos, "7", None)).await;
        until("it is under way", || seen.lock().len() == 1).await;
        relay.cut();
        until("it has come again", || seen.lock().len() == 2).await;
        assert_eq!(*seen.lock(), [(7, false), (7, true)]);
        raw.put(Publish::new("work", raw_qos, "8", None)).await;
        until("the next has come", || seen.lock().len() == 3).await;
        relay.cut();
        tokio::time::sleep(Duration::from_millis(300)).await;
        // Those were finished.
        assert_eq!(seen.lock().len(), 3);
        service.stop(GRACE).await;
    }
}

/// MQTT-15: what the broker is told, with a broker played by hand.
#[actix::test]
async fn only_a_failure_is_acknowledged_as_one() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = MqttServerOptions::new()
        .url(format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port()))
        .protocol_version(5)
        .subscribe_options(MqttSubscribeOptions::qos(MqttQos::ExactlyOnce))
        .manual_acks(true);
    let group = event("evt", async |Data(fails): Data<bool>| match fails {
        true => Err(RpcError::message("no")),
        false => Ok(()),
    });
    let ((service, _), mut raw) = futures::join!(serve(options, [group]), async {
        let mut raw = Raw::accept(&listener, false).await;
        raw.grant().await;
        raw
    });
    for (id, fails, puback, pubrec) in [
        (7, false, PubAckReason::Success, PubRecReason::Success),
        (8, true, PubAckReason::UnspecifiedError, PubRecReason::UnspecifiedError),
    ] {
        for qos in [QoS::AtLeastOnce, QoS::ExactlyOnce] {
            let mut publish = Publish::new("evt", qos, fails.to_string(), None);
            publish.pkid = id;
            raw.send(Packet::Publish(publish)).await;
            match raw.packet().await {
                Packet::PubAck(ack) => assert_eq!((ack.pkid, ack.reason), (id, puback)),
                Packet::PubRec(rec) => assert_eq!((rec.pkid, rec.reason), (id, pubrec)),
                other => panic!("{other:?}"),
            }
        }
    }
    drop(raw);
    service.stop(GRACE).await;
}

/// MQTT-16: what waits when the line breaks can no longer be acknowledged and comes again: it does not run before.
#[actix::test]
async fn what_comes_again_does_not_run_on_a_line_that_has_ended() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = MqttServerOptions::new()
        .url(format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port()))
        .client_id("kept")
        .clean(false)
        .protocol_version(5)
        .subscribe_options(MqttSubscribeOptions::qos(MqttQos::AtLeastOnce))
        .manual_acks(true)
        .max_in_flight(1)
        .reconnect_period(Duration::from_millis(10));
    let seen = Seen::default();
    let note = Arc::clone(&seen);
    let group = event("evt", move |Data(number): Data<u64>| {
        let first = {
            let mut seen = note.lock();
            *seen.entry(number).or_insert(0) += 1;
            seen.len() == 1 && seen[&number] == 1
        };
        async move {
            if first {
                std::future::pending::<()>().await;
            }
            Ok::<_, RpcError>(())
        }
    });
    let session = async |present: bool| {
        let mut raw = Raw::accept(&listener, present).await;
        raw.grant().await;
        for number in 1..=5u16 {
            let mut publish = Publish::new("evt", QoS::AtLeastOnce, number.to_string(), None);
            (publish.pkid, publish.dup) = (number, present);
            raw.send(Packet::Publish(publish)).await;
        }
        raw
    };
    let ((service, _), raw) = futures::join!(serve(options, [group]), session(false));
    until("the first is under way", || !seen.lock().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(raw);
    let mut raw = session(true).await;
    for number in 1..=5 {
        assert!(matches!(raw.packet().await, Packet::PubAck(ack) if ack.pkid == number));
    }
    assert_eq!(*seen.lock(), BTreeMap::from([(1, 2), (2, 1), (3, 1), (4, 1), (5, 1)]));
    drop(raw);
    service.stop(Duration::from_millis(100)).await;
}

/// MQTT-13: what must not be dropped waits at the broker. (mosquitto 2.0.11 sends more than its window when
/// acknowledgements come in between, so it is also held back by not being read.)
#[actix::test]
async fn a_slow_handler_holds_acknowledged_messages_back() {
    for (version, manual) in [(4, true), (5, true), (4, false)] {
        hold_back(version, manual).await;
    }
}

async fn hold_back(version: u8, manual: bool) {
    const EVENTS: u64 = 1000;
    let broker = broker();
    let mut raw = Raw::connect(&broker).await;
    let (running, most, done) =
        (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let group = {
        let (running, most, done) = (Arc::clone(&running), Arc::clone(&most), Arc::clone(&done));
        event("work", move || {
            let (running, most, done) = (Arc::clone(&running), Arc::clone(&most), Arc::clone(&done));
            async move {
                most.fetch_max(running.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
                running.fetch_sub(1, Ordering::Relaxed);
                done.fetch_add(1, Ordering::Relaxed);
                Ok::<_, RpcError>(())
            }
        })
    };
    let options = server_options(&broker)
        .protocol_version(version)
        .subscribe_options(MqttSubscribeOptions::qos(MqttQos::AtLeastOnce))
        .manual_acks(manual)
        .max_in_flight(8)
        .buffered_bytes(4096);
    let (service, reports) = serve(options, [group]).await;
    for number in 0..EVENTS {
        raw.put(Publish::new("work", QoS::AtLeastOnce, number.to_string(), None)).await;
    }
    until("everything has come", || done.load(Ordering::Relaxed) == EVENTS).await;
    assert!(most.load(Ordering::Relaxed) <= 8, "{}", most.load(Ordering::Relaxed));
    assert!(!reports.contain("dropped"), "{:?}", reports.all());
    service.stop(GRACE).await;
}

/// MQTT-13: at quality of service 0 nothing can hold it back: what does not fit is dropped and counted.
#[actix::test]
async fn a_slow_handler_drops_and_counts_what_does_not_fit() {
    const EVENTS: u64 = 20_000;
    let broker = broker();
    let mut raw = Raw::connect(&broker).await;
    let count = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&count);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let group = event("flood", move || {
        let (seen, gate) = (Arc::clone(&seen), Arc::clone(&opened));
        async move {
            let _open = gate.acquire().await;
            seen.fetch_add(1, Ordering::Relaxed);
            Ok::<_, RpcError>(())
        }
    });
    let options = server_options(&broker).max_in_flight(16).buffered_bytes(200_000);
    let (service, reports) = serve(options, [group, sum()]).await;
    for _ in 0..EVENTS {
        raw.publish("flood", "\"0123456789\"").await;
    }
    // The broker has sent everything when this is answered.
    raw.subscribe("probe").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    gate.add_permits(1_000_000);
    until("all are accounted for", || count.load(Ordering::Relaxed) + dropped(&reports) == EVENTS).await;
    // Two hundred thousand bytes of them waited, and those in flight.
    let handled = count.load(Ordering::Relaxed);
    assert!((1000..2000).contains(&handled), "{handled} {:?}", reports.all());
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
}

/// MQTT-15.
#[actix::test]
async fn failure_policies_are_honoured_or_refused_at_start() {
    let broker = broker();
    let manual =
        || server_options(&broker).subscribe_options(MqttSubscribeOptions::qos(MqttQos::AtLeastOnce));
    let retry = |then| {
        let mut retry = RetryPolicy::default();
        retry.attempts = 2;
        retry.delay = martlet_core::backoff::BackoffOptions::fixed(Duration::from_millis(5));
        retry.then = then;
        FailurePolicy::Retry(retry)
    };
    for policy in [FailurePolicy::Requeue, FailurePolicy::DeadLetter, retry(LastResort::DeadLetter)] {
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(sum())
            .server(MqttServer::new(manual().on_failure(policy)));
        let error = service.start().await.unwrap_err();
        assert!(matches!(error, StartError::FailurePolicy { .. }), "{error}");
    }
    // A handler's own policy needs acknowledgement to be the runtime's.
    let own = sum().on_failure(FailurePolicy::Discard);
    let service = Microservice::new().on_current_arbiter().handlers(own).server(MqttServer::new(manual()));
    let error = service.start().await.unwrap_err().to_string();
    assert!(error.contains("manualAcks"), "{error}");
    let count = Arc::new(AtomicU64::new(0));
    let runs = Arc::clone(&count);
    let failing = event("fails", move || {
        runs.fetch_add(1, Ordering::Relaxed);
        async { Err::<(), _>(RpcError::message("no")) }
    });
    let others = Arc::default();
    for version in [4, 5] {
        let options = manual().protocol_version(version).on_failure(retry(LastResort::Discard));
        let (service, _) = serve(options, [failing.clone(), counting("works", &others)]).await;
        let mut raw = Raw::connect(&broker).await;
        raw.put(Publish::new("fails", QoS::AtLeastOnce, "1", None)).await;
        until("it was tried three times", || count.load(Ordering::Relaxed) == 3).await;
        raw.put(Publish::new("works", QoS::AtLeastOnce, "1", None)).await;
        until("the next has come", || others.load(Ordering::Relaxed) == 1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(count.swap(0, Ordering::Relaxed), 3);
        others.store(0, Ordering::Relaxed);
        assert!(service.stop(GRACE).await.clean);
    }
}

/// MQTT-17: what the broker has not acknowledged goes out again, also where it keeps no session.
#[actix::test]
async fn events_that_were_not_acknowledged_are_published_again_after_a_cut() {
    const EVENTS: u64 = 2000;
    let broker = broker();
    let relay = Relay::start(broker.port());
    let seen = Seen::default();
    let subscribe = MqttSubscribeOptions::qos(MqttQos::AtLeastOnce);
    let (service, _) =
        serve(server_options(&broker).subscribe_options(subscribe), [noting("evt", &seen)]).await;
    let client = MqttClient::new(client_options(&broker).url(format!("mqtt://127.0.0.1:{}", relay.port())));
    client.connect().await.unwrap();
    emit_all(&client, "evt", EVENTS, MqttQos::AtLeastOnce, |number| {
        if number % 300 == 299 {
            relay.cut();
        }
    })
    .await;
    until("everything has come", || seen.lock().len() as u64 == EVENTS).await;
    client.close().await;
    service.stop(GRACE).await;
}

/// MQTT-18: what follows a session cannot overtake its last acknowledgements in the broker.
#[actix::test]
async fn a_session_ends_when_the_broker_has_taken_its_goodbye() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let options = MqttClientOptions::new().url(format!("mqtt://127.0.0.1:{port}"));
    let client = MqttClient::new(options);
    let broker = async {
        let (mut line, _) = listener.accept().await.unwrap();
        let mut packets = vec![0; 1024];
        assert!(line.read(&mut packets).await.unwrap() > 0);
        line.write_all(&[0x20, 2, 0, 0]).await.unwrap();
        // DISCONNECT, and the end.
        let mut last = Vec::new();
        line.read_to_end(&mut last).await.unwrap();
        assert_eq!(last, [0xe0, 0]);
        tokio::time::sleep(Duration::from_millis(300)).await;
        Instant::now()
    };
    let caller = async {
        client.connect().await.unwrap();
        client.close().await;
        Instant::now()
    };
    let (taken, ended) = futures::join!(broker, caller);
    assert!(ended >= taken, "{:?} before the broker", taken - ended);
}
