// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many calls and events while the broker is killed, restarted and frozen, and lines are cut; and a producer that is
//! faster than its handlers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::{ConnectionStatus, Data, Microservice, RpcError, event};
use martlet_mqtt::{MqttClient, MqttQos, MqttRecordBuilder, MqttServer, MqttSubscribeOptions};
use martlet_testkit::process::{Memory, alone};
use martlet_testkit::relay::Relay;
use martlet_testkit::storm::{Storm, every_route_answers};
use tokio::sync::Semaphore;

use crate::world::{GRACE, broker, broker_with, client_options, dropped, serve_apart, server_options, until};

const CALLS: u64 = 50_000;
const EVENTS: u64 = 50_000;
const RESTARTS: u64 = 10;

fn url(relay: &Relay) -> String {
    format!("mqtt://127.0.0.1:{}", relay.port())
}

#[actix::test]
async fn fifty_thousand_calls_survive_ten_restarts_of_the_broker() {
    let begin = Instant::now();
    let mut broker = broker();
    // Everybody has a line of its own, the broker's port stays.
    let relays: Vec<Relay> = (0..4).map(|_| Relay::start(broker.port())).collect();
    let storm = Storm::new(CALLS);
    let mut service = Microservice::new()
        .arbiters(1)
        .server(MqttServer::new(server_options(&broker).url(url(&relays[0])).protocol_version(5)));
    for group in storm.handlers() {
        service = service.handlers(group);
    }
    let service = service.start().await.unwrap();
    let clients: Vec<_> = relays[1..]
        .iter()
        .enumerate()
        .map(|(number, relay)| {
            MqttClient::new(
                client_options(&broker)
                    .url(url(relay))
                    .protocol_version(if number == 0 { 5 } else { 4 })
                    // Nobody says that a request was lost on its way.
                    .call_timeout(Duration::from_secs(1)),
            )
        })
        .collect();
    let chaos = {
        let storm = storm.clone();
        move || {
            let mut cut = 0;
            let mut cut_until = |ended| {
                while storm.ended() < ended {
                    storm.calm(Duration::from_millis(50 + cut as u64 * 7 % 90)).wait();
                    // The service's line less often than the clients'.
                    relays[[1, 2, 3, 2, 1, 3, 1, 2, 3, 0][cut % 10]].cut_one(cut);
                    cut += 1;
                }
            };
            for restart in 1..=RESTARTS {
                cut_until(restart * CALLS / (RESTARTS + 1));
                if restart % 3 == 0 {
                    broker.freeze().unwrap();
                    std::thread::sleep(Duration::from_millis(300));
                    broker.thaw().unwrap();
                }
                broker.stop();
                std::thread::sleep(Duration::from_millis(restart * 13 % 100));
                broker.restart().unwrap();
            }
            cut_until(CALLS - CALLS / 50);
            (broker, relays, cut)
        }
    };
    let (outcomes, chaos) =
        futures::join!(storm.run(&clients, 100), async { tokio::task::spawn_blocking(chaos).await.unwrap() });
    let (broker, relays, cuts) = chaos;
    let server = service.servers()[0].clone();
    until("the service is connected", || server.status() == Some(ConnectionStatus::Connected)).await;
    for client in &clients {
        every_route_answers(client).await;
        assert_eq!((client.pending(), client.occupied()), (0, 0));
        client.close().await;
    }
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
    storm.check_runs();
    let took = begin.elapsed();
    eprintln!("{outcomes:?}; {RESTARTS} restarts, {cuts} cuts; {took:.1?}");
    assert!(outcomes["value"] > CALLS / 2, "{outcomes:?}");
    assert!(outcomes.contains_key("lost"), "{outcomes:?}");
    assert!(took < Duration::from_secs(120), "{took:?}");
    drop((relays, broker));
}

/// MQTT-10, MQTT-15, MQTT-16, MQTT-21: quality of service 1, sessions that the broker keeps, acknowledgement after the
/// handler: what the broker has confirmed runs.
#[actix::test]
async fn fifty_thousand_acknowledged_events_survive_ten_restarts_of_the_broker() {
    for version in [4, 5] {
        let begin = Instant::now();
        let mut broker = broker_with("persistence true\npersistence_location $DIR/");
        let relays = [Relay::start(broker.port()), Relay::start(broker.port())];
        let seen: Arc<Vec<AtomicU32>> = Arc::new((0..EVENTS).map(|_| AtomicU32::new(0)).collect());
        let (distinct, again) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let group = {
            let (seen, distinct, again) = (Arc::clone(&seen), Arc::clone(&distinct), Arc::clone(&again));
            event("storm/event", move |Data(number): Data<u64>| {
                let counter = if seen[number as usize].fetch_add(1, Ordering::Relaxed) == 0 {
                    &distinct
                } else {
                    &again
                };
                counter.fetch_add(1, Ordering::Relaxed);
                async move {
                    if number % 100 == 0 {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    Ok::<_, RpcError>(())
                }
            })
        };
        let options = server_options(&broker)
            .url(url(&relays[0]))
            .protocol_version(version)
            .client_id("storm-server")
            .clean(false)
            .subscribe_options(MqttSubscribeOptions::qos(MqttQos::AtLeastOnce))
            .manual_acks(true);
        let service = Microservice::new()
            .arbiters(1)
            .handlers(group)
            .server(MqttServer::new(options))
            .start()
            .await
            .unwrap();
        let client = MqttClient::new(
            client_options(&broker)
                .url(url(&relays[1]))
                .protocol_version(version)
                .client_id("storm-client")
                .clean(false)
                .call_timeout(Duration::from_secs(60)),
        );
        let progress = Arc::clone(&distinct);
        let chaos = tokio::task::spawn_blocking(move || {
            let mut cut = 0;
            for restart in 1..=RESTARTS {
                // So many for each restart, however slow the machine is.
                let most = 5 * restart as usize;
                while progress.load(Ordering::Relaxed) < restart * EVENTS / (RESTARTS + 1) {
                    std::thread::sleep(Duration::from_millis(40 + cut as u64 * 7 % 90));
                    if cut < most {
                        relays[cut % 2].cut_one(cut);
                        cut += 1;
                    }
                }
                if restart % 3 == 0 {
                    broker.freeze().unwrap();
                    std::thread::sleep(Duration::from_millis(300));
                    broker.thaw().unwrap();
                }
                // It saves what it has confirmed; a power cut would take what mosquitto had not yet written.
                broker.shut_down().unwrap();
                std::thread::sleep(Duration::from_millis(restart * 13 % 100));
                broker.resume().unwrap();
            }
            (broker, relays, cut)
        });
        let emitting = futures::stream::iter(0..EVENTS)
            .map(|number| {
                let client = &client;
                async move {
                    let record = MqttRecordBuilder::new(number).set_qos(MqttQos::AtLeastOnce).build();
                    (number, client.emit("storm/event", record).await)
                }
            })
            .buffer_unordered(200)
            .collect::<Vec<_>>();
        let (results, chaos) = futures::join!(emitting, chaos);
        let (broker, relays, cuts) = chaos.unwrap();
        let confirmed: Vec<u64> =
            results.iter().filter(|(_, result)| result.is_ok()).map(|(number, _)| *number).collect();
        let not_seen =
            || confirmed.iter().filter(|number| seen[**number as usize].load(Ordering::Relaxed) == 0).count();
        for _ in 0..600 {
            if not_seen() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let missing = not_seen();
        let took = begin.elapsed();
        let again = again.load(Ordering::Relaxed);
        eprintln!(
            "MQTT {version}: {} of {EVENTS} confirmed, {missing} missing, {again} came again; {RESTARTS} restarts, {cuts} \
             cuts; {took:.1?}",
            confirmed.len()
        );
        assert_eq!(missing, 0);
        // An event outlives its connection: nothing but its time ends it, and outages are shorter.
        let others: Vec<_> = results.iter().filter(|(_, result)| result.is_err()).collect();
        assert!(others.is_empty(), "{} {:?}", others.len(), others[0]);
        assert_eq!(client.occupied(), 0);
        client.close().await;
        assert!(service.stop(GRACE).await.clean);
        assert!(took < Duration::from_secs(120), "{took:?}");
        drop((relays, broker));
    }
}

/// Publishes more than the service may hold while its handlers do nothing; says how many were handled after all, how
/// many dropped, and how much memory it took.
async fn flood(version: u8, qos: MqttQos, manual: bool) -> (u64, u64, u64) {
    let broker = broker();
    let (handled, gate) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(0)));
    let (count, closed) = (Arc::clone(&handled), Arc::clone(&gate));
    let group = event("flood", move || {
        let (count, gate) = (Arc::clone(&count), Arc::clone(&closed));
        async move {
            let _open = gate.acquire().await;
            count.fetch_add(1, Ordering::Relaxed);
            Ok::<_, RpcError>(())
        }
    });
    let options = server_options(&broker)
        .protocol_version(version)
        .subscribe_options(MqttSubscribeOptions::qos(qos))
        .manual_acks(manual)
        .max_in_flight(50)
        .buffered_bytes(1 << 20)
        // Asked for and answered all the while.
        .keepalive(5);
    let (service, reports) = serve_apart(MqttServer::new(options), [group]).await;
    let client = MqttClient::new(client_options(&broker).protocol_version(version));
    client.connect().await.unwrap();
    let memory = Memory::watch();
    let payload = "x".repeat(FLOOD_BYTES);
    futures::stream::iter(0..FLOOD)
        .map(|_| client.emit("flood", MqttRecordBuilder::new(&payload).set_qos(qos).build()))
        .buffer_unordered(100)
        .for_each(|sent| async { sent.unwrap() })
        .await;
    // For longer than a silent broker would be waited for.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let grown = memory.grown();
    assert_eq!(handled.load(Ordering::Relaxed), 0);
    assert_eq!(service.servers()[0].status(), Some(ConnectionStatus::Connected), "{:?}", reports.all());
    gate.add_permits(Semaphore::MAX_PERMITS / 2);
    let all = || handled.load(Ordering::Relaxed) + dropped(&reports);
    for _ in 0..1200 {
        if all() >= FLOOD {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
    let (handled, dropped) = (handled.load(Ordering::Relaxed), dropped(&reports));
    eprintln!(
        "MQTT {version}, {qos:?}, manual {manual}: {handled} handled, {dropped} dropped, {} KiB more",
        grown / 1024
    );
    assert_eq!(handled + dropped, FLOOD, "{:?}", reports.all());
    (handled, dropped, grown)
}

/// 156 MiB.
const FLOOD: u64 = 40_000;
const FLOOD_BYTES: usize = 4096;

/// MQTT-13: at quality of service 0 nobody can hold a publisher back. What does not fit is dropped and counted.
#[actix::test]
async fn a_flood_without_acknowledgement_is_dropped_and_counted_in_flat_memory() {
    if alone() {
        return;
    }
    for version in [4, 5] {
        let (handled, dropped, grown) = flood(version, MqttQos::AtMostOnce, false).await;
        // What waited is a mebibyte of them, and those that were in work.
        assert!((200..1000).contains(&handled), "{handled}");
        assert!(dropped > FLOOD * 9 / 10);
        assert!(grown < 60 << 20, "{grown} bytes");
    }
}

/// MQTT-13: with acknowledgement the rest of it waits at the broker, whether it is acknowledged when it is taken or when
/// its handler is done.
#[actix::test]
async fn a_flood_with_acknowledgement_waits_at_the_broker() {
    if alone() {
        return;
    }
    for (version, qos, manual) in
        [(4, MqttQos::AtLeastOnce, true), (5, MqttQos::AtLeastOnce, false), (5, MqttQos::ExactlyOnce, true)]
    {
        let (handled, dropped, grown) = flood(version, qos, manual).await;
        assert_eq!((handled, dropped), (FLOOD, 0));
        assert!(grown < 60 << 20, "{grown} bytes");
    }
}
