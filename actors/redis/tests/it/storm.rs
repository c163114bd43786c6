// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many calls and events while the broker is killed, started again and frozen, and lines are cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use martlet_core::{ConnectionStatus, Data, Microservice, RpcError, event};
use martlet_redis::{RedisClient, RedisServer};
use martlet_testkit::relay::Relay;
use martlet_testkit::storm::{Storm, every_route_answers};

use crate::world::{GRACE, broker, client_options, server_options, until};

const CALLS: u64 = 50_000;
const EVENTS: u64 = 50_000;
const RESTARTS: u64 = 10;

/// On each client.
const IN_FLIGHT: usize = 100;

#[actix::test]
async fn fifty_thousand_calls_and_events_survive_ten_restarts_of_the_broker() {
    let begin = Instant::now();
    let mut broker = broker();
    // Everybody has a line of its own, the broker's port stays.
    let relays: Vec<Relay> = (0..4).map(|_| Relay::start(broker.port())).collect();
    let url = |relay: &Relay| format!("redis://127.0.0.1:{}", relay.port());
    let storm = Storm::new(CALLS);
    let ran: Arc<Vec<AtomicU8>> = Arc::new((0..EVENTS).map(|_| AtomicU8::new(0)).collect());
    let marks = Arc::clone(&ran);
    let events = event("storm.event", move |Data(number): Data<u64>| {
        marks[number as usize].fetch_add(1, Ordering::Relaxed);
        async { Ok::<_, RpcError>(()) }
    });
    let options = server_options(&broker).url(url(&relays[0])).retry_attempts(100_000);
    let mut service = Microservice::new().arbiters(1).handlers(events).server(RedisServer::new(options));
    for group in storm.handlers() {
        service = service.handlers(group);
    }
    let service = service.start().await.unwrap();
    let clients: Vec<_> = relays[1..]
        .iter()
        .enumerate()
        .map(|(number, relay)| {
            let mut options = client_options(&broker).url(url(relay)).call_timeout(Duration::from_secs(5));
            // The last one does not reconnect by itself.
            options.retry_attempts = (number < 2).then_some(100_000);
            RedisClient::new(options)
        })
        .collect();
    let chaos = {
        let storm = storm.clone();
        move || {
            let mut cut = 0;
            let mut cuts = vec![0u64; relays.len()];
            let mut cut_until = |ended| {
                while storm.ended() < ended {
                    storm.calm(Duration::from_millis(11 + cut as u64 * 7 % 90)).wait();
                    // One line after the other, the service's less often than the clients'.
                    let line = [1, 2, 3, 0, 2, 1, 3][cut % 7];
                    relays[line].cut_one(cut);
                    cuts[line] += 1;
                    cut += 1;
                }
            };
            for restart in 1..=RESTARTS {
                cut_until(restart * CALLS / (RESTARTS + 1));
                if restart % 2 == 0 {
                    broker.freeze().unwrap();
                    std::thread::sleep(Duration::from_millis(restart * 20));
                    broker.thaw().unwrap();
                    std::thread::sleep(Duration::from_millis(20));
                }
                broker.stop();
                std::thread::sleep(Duration::from_millis(restart * 13 % 100));
                broker.restart().unwrap();
            }
            // What the service's line had when it was cut and no restart ends, ends by its timeout.
            cut_until(CALLS - CALLS / 50);
            (broker, relays, cuts)
        }
    };
    let (taken, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let emitting = async {
        for number in 0..EVENTS {
            match clients[(number % 3) as usize].emit("storm.event", number).await {
                Ok(()) => taken.fetch_add(1, Ordering::Relaxed),
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    refused.fetch_add(1, Ordering::Relaxed)
                }
            };
            if number % 16 == 0 {
                // So that they last about as long as the calls.
                while storm.ended() * EVENTS < number * CALLS && !storm.is_over() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    };
    let (outcomes, chaos, ()) = futures::join!(
        storm.run(&clients, IN_FLIGHT),
        async { tokio::task::spawn_blocking(chaos).await.unwrap() },
        emitting
    );
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
    let (taken, refused) = (taken.into_inner(), refused.into_inner());
    let most = ran.iter().map(|ran| ran.load(Ordering::Relaxed)).max();
    let handled = ran.iter().filter(|ran| ran.load(Ordering::Relaxed) > 0).count() as u64;
    let took = begin.elapsed();
    eprintln!(
        "{outcomes:?}; events: {taken} taken, {refused} refused, {handled} handled; {RESTARTS} restarts, cuts \
         {cuts:?}; {took:.1?}"
    );
    assert_eq!(most, Some(1), "no event comes twice");
    assert!(handled <= taken && handled > EVENTS / 2, "{handled} of {taken}");
    assert_eq!(taken + refused, EVENTS);
    assert!(outcomes["value"] > CALLS / 2, "{outcomes:?}");
    assert!(outcomes.contains_key("lost"), "{outcomes:?}");
    // A cut of a client's line ends at most what it had in flight, one of the service's or a restart what all had.
    // Nothing else leaves a caller without knowing whether the handler has run.
    let all = clients.len() as u64 * IN_FLIGHT as u64;
    let most = (cuts[0] + RESTARTS) * all + cuts[1..].iter().sum::<u64>() * IN_FLIGHT as u64;
    let unknown = ["lost", "timeout"].map(|kind| outcomes.get(kind).copied().unwrap_or_default());
    assert!(unknown.iter().sum::<u64>() <= most, "{most} at most: {outcomes:?}");
    assert!(took < Duration::from_secs(300), "{took:?}");
    drop((relays, broker));
}
