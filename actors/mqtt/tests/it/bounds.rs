// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much waits in this process: MQTT-13. Brokers played by hand, which send more than anybody asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet_core::{Data, HandlerGroup, RpcError, event, message};
use martlet_mqtt::{MqttQos, MqttRecordBuilder, MqttServerOptions, MqttSubscribeOptions};
use martlet_testkit::process::{Memory, alone};
use rumqttc_v5::mqttbytes::QoS;
use rumqttc_v5::mqttbytes::v5::{Packet, Publish, PublishProperties};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::raw::Raw;
use crate::world::{GRACE, counting, serve, until};

const BUFFERED: usize = 1 << 20;
/// What the sockets between two processes hold, at most.
const SOCKETS: u64 = 20 << 20;

async fn listen() -> (TcpListener, MqttServerOptions) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = MqttServerOptions::new()
        .url(format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port()))
        .protocol_version(5)
        .subscribe_options(MqttSubscribeOptions::qos(MqttQos::AtLeastOnce))
        .cancellation(false)
        .buffered_bytes(BUFFERED);
    (listener, options)
}

/// `work` waits for the gate; says how many have run.
fn gated() -> (HandlerGroup, Arc<Semaphore>, Arc<AtomicU64>) {
    let (gate, count) = (Arc::new(Semaphore::new(0)), Arc::<AtomicU64>::default());
    let (opened, runs) = (Arc::clone(&gate), Arc::clone(&count));
    let group = event("work", move || {
        let (gate, count) = (Arc::clone(&opened), Arc::clone(&runs));
        async move {
            let _open = gate.acquire().await;
            count.fetch_add(1, Ordering::Relaxed);
            Ok::<_, RpcError>(())
        }
    });
    (group, gate, count)
}

fn work(number: u64, payload: &str, properties: Option<PublishProperties>) -> Packet {
    let mut publish = Publish::new("work", QoS::AtLeastOnce, payload.to_owned(), properties);
    publish.pkid = (number % 65_535) as u16 + 1;
    Packet::Publish(publish)
}

/// Sends so many messages of so many bytes; how many bytes were taken from it.
fn flood(mut raw: Raw, messages: u64, bytes: u64, next: impl Fn(u64) -> Packet + 'static) -> Arc<AtomicU64> {
    let sent = Arc::<AtomicU64>::default();
    let count = Arc::clone(&sent);
    actix_rt::spawn(async move {
        for number in 0..messages {
            raw.send(next(number)).await;
            count.fetch_add(bytes, Ordering::Relaxed);
        }
        // The connection lasts.
        std::future::pending::<()>().await;
    });
    sent
}

/// Waits until nothing more is taken.
async fn settled(sent: &AtomicU64) -> u64 {
    let mut last = 0;
    for _ in 0..1000 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = sent.load(Ordering::Relaxed);
        if now == last {
            break;
        }
        last = now;
    }
    last
}

const MESSAGES: u64 = 16_384;

/// A few messages of this end wait for the broker's acknowledgement: no reason to take in all that it has.
#[actix::test]
async fn own_messages_that_wait_do_not_lift_the_bound() {
    let (listener, options) = listen().await;
    let (group, gate, count) = gated();
    let replies = message("reply", async |Data(number): Data<u64>| {
        Ok::<_, RpcError>(MqttRecordBuilder::new(number).set_qos(MqttQos::AtLeastOnce).build())
    });
    let options = options.publish_window(1).max_in_flight(1);
    let session = async {
        let mut raw = Raw::accept(&listener, false).await;
        raw.grant().await;
        raw.grant().await;
        raw
    };
    let ((service, _), mut raw) = futures::join!(serve(options, [group, replies]), session);
    for id in ["a", "b"] {
        raw.publish("reply", format!(r#"{{"pattern":"reply","data":1,"id":"{id}"}}"#)).await;
    }
    // Not acknowledged: the other one waits.
    assert!(matches!(raw.packet().await, Packet::Publish(_)));
    let payload = format!("\"{}\"", "x".repeat(4094));
    let sent = flood(raw, MESSAGES, 4096, move |number| work(number, &payload, None));
    let taken = settled(&sent).await;
    assert!((BUFFERED as u64..BUFFERED as u64 + SOCKETS).contains(&taken), "{taken}");
    gate.add_permits(Semaphore::MAX_PERMITS / 2);
    until("everything has run", || count.load(Ordering::Relaxed) == MESSAGES).await;
    service.stop(Duration::from_millis(100)).await;
}

/// So many that the runtime takes nothing until the broker has acknowledged them, which it says behind its own messages.
#[actix::test]
async fn a_service_whose_replies_wait_for_the_broker_hears_it_behind_what_it_has_no_room_for() {
    let (listener, options) = listen().await;
    let count = Arc::default();
    let replies = message("reply", async |Data(size): Data<usize>| {
        let record = MqttRecordBuilder::new("x".repeat(size)).set_qos(MqttQos::AtLeastOnce).build();
        Ok::<_, RpcError>(record)
    });
    let options = options.publish_window(1).high_water_bytes(10_000);
    let session = async {
        let mut raw = Raw::accept(&listener, false).await;
        raw.grant().await;
        raw.grant().await;
        raw
    };
    let ((service, _), mut raw) =
        futures::join!(serve(options, [counting("work", &count), replies]), session);
    for id in ["a", "b", "c"] {
        raw.publish("reply", format!(r#"{{"pattern":"reply","data":20000,"id":"{id}"}}"#)).await;
    }
    let Packet::Publish(first) = raw.packet().await else { panic!() };
    let payload = format!("\"{}\"", "x".repeat(40_000));
    for number in 0..100 {
        raw.send(work(number, &payload, None)).await;
    }
    let mut reply = first;
    for _ in 0..2 {
        raw.send(Packet::PubAck(rumqttc_v5::mqttbytes::v5::PubAck::new(reply.pkid, None))).await;
        let next = async {
            loop {
                if let Packet::Publish(publish) = raw.packet().await {
                    break publish;
                }
            }
        };
        reply = tokio::time::timeout(Duration::from_secs(10), next).await.unwrap();
    }
    raw.send(Packet::PubAck(rumqttc_v5::mqttbytes::v5::PubAck::new(reply.pkid, None))).await;
    until("everything has run", || count.load(Ordering::Relaxed) == 100).await;
    drop(raw);
    service.stop(GRACE).await;
}

/// What is not in the payload is held, too.
#[actix::test]
async fn properties_count_towards_the_bound() {
    let (listener, options) = listen().await;
    let (group, gate, count) = gated();
    let session = async {
        let mut raw = Raw::accept(&listener, false).await;
        raw.grant().await;
        raw
    };
    let ((service, _), raw) = futures::join!(serve(options.max_in_flight(1), [group]), session);
    let lines = vec![("name".to_owned(), "x".repeat(4000)); 4];
    let properties = PublishProperties { user_properties: lines, ..PublishProperties::default() };
    let sent = flood(raw, MESSAGES / 4, 16_384, move |number| work(number, "1", Some(properties.clone())));
    let taken = settled(&sent).await;
    assert!((BUFFERED as u64 / 2..BUFFERED as u64 + SOCKETS).contains(&taken), "{taken}");
    gate.add_permits(Semaphore::MAX_PERMITS / 2);
    until("everything has run", || count.load(Ordering::Relaxed) == MESSAGES / 4).await;
    service.stop(Duration::from_millis(100)).await;
}

/// A small message does not hold the large buffer that it was read into.
#[actix::test]
async fn what_waits_takes_the_memory_that_it_is_counted_as() {
    if alone() {
        return;
    }
    const SMALL: u64 = 3000;
    let (listener, options) = listen().await;
    let (group, gate, count) = gated();
    let session = async {
        let mut raw = Raw::accept(&listener, false).await;
        raw.grant().await;
        raw
    };
    let options = options.max_in_flight(1).max_packet_bytes(1000);
    let ((service, _), mut raw) = futures::join!(serve(options, [group]), session);
    raw.send(work(0, "1", None)).await;
    let memory = Memory::watch();
    // In between is what is too large and skipped.
    let filler = "x".repeat(64 * 1024);
    for number in 1..=SMALL {
        raw.send(work(number, "\"0123456789\"", None)).await;
        raw.publish("filler", filler.clone()).await;
    }
    // What is under way is read.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let grown = memory.grown();
    assert!(grown < 64 << 20, "{grown} bytes for {SMALL} small messages");
    gate.add_permits(Semaphore::MAX_PERMITS / 2);
    until("everything has run", || count.load(Ordering::Relaxed) == SMALL + 1).await;
    drop(raw);
    service.stop(GRACE).await;
}

/// The broker's answers to subscriptions come behind what it had kept for the session.
#[actix::test]
async fn a_kept_session_with_more_than_there_is_room_for_is_made() {
    let (listener, options) = listen().await;
    let count = Arc::default();
    let payload = format!("\"{}\"", "x".repeat(40_000));
    let session = async {
        let mut raw = Raw::accept(&listener, true).await;
        for number in 0..100 {
            raw.send(work(number, &payload, None)).await;
        }
        raw.grant().await;
        raw
    };
    let options = options.client_id("kept").clean(false);
    let made = async { futures::join!(serve(options, [counting("work", &count)]), session) };
    let ((service, _), raw) = tokio::time::timeout(Duration::from_secs(10), made).await.unwrap();
    until("everything has run", || count.load(Ordering::Relaxed) == 100).await;
    drop(raw);
    service.stop(GRACE).await;
}
