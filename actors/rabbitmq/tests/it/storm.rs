// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many calls and events while the broker is killed, started again and frozen, and lines are cut.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::{ConnectionStatus, Data, FailurePolicy, Microservice, RpcError, event};
use martlet_rabbitmq::{RmqClient, RmqServer, RmqSocketOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
use martlet_testkit::relay::Relay;
use martlet_testkit::storm::{Storm, every_route_answers};
use parking_lot::Mutex;

use crate::raw::Raw;
use crate::world::{GRACE, client_options, server_options, unique, until};

const CALLS: u64 = 50_000;
const EVENTS: u64 = 50_000;
const RESTARTS: u64 = 10;

/// On each client.
const CALLS_IN_FLIGHT: usize = 150;
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

const EVENTS_IN_FLIGHT: usize = 200;
const EVENT_TIMEOUT: Duration = Duration::from_secs(20);

fn url(relay: &Relay) -> [String; 1] {
    [format!("amqp://127.0.0.1:{}", relay.port())]
}

/// Sessions that notice a frozen broker, and do not wait long for the next one.
fn quick() -> RmqSocketOptions {
    RmqSocketOptions::new()
        .heartbeat_interval(Duration::from_secs(1))
        .reconnect_time(Duration::from_millis(50))
}

/// What has been done to the lines and the broker.
#[derive(Debug, Default)]
struct Disturbances {
    /// How often each line was cut.
    cuts: Vec<u64>,
    /// For how long the broker was not there, each time.
    outages: Vec<Duration>,
}

impl Disturbances {
    /// How many calls they can have ended at most, with so many in flight over each line: a cut what was in flight over
    /// its line, an outage all, and all once more for each time that calls run out of time while nothing is there.
    fn most(&self, in_flight: &[u64], timeout: Duration) -> u64 {
        let all: u64 = in_flight.iter().max().copied().unwrap_or_default();
        let cuts: u64 = self.cuts.iter().zip(in_flight).map(|(cuts, in_flight)| cuts * in_flight).sum();
        // Both sides have a second for getting their connections back.
        let waves = |outage: &Duration| {
            1 + (*outage + Duration::from_secs(1)).as_millis().div_ceil(timeout.as_millis()) as u64
        };
        cuts + self.outages.iter().map(|outage| waves(outage) * all).sum::<u64>()
    }
}

/// Kills, restarts and freezes the broker and cuts lines as the work goes on, `done` saying how far it is.
fn chaos(mut broker: Broker, relays: &[Relay], total: u64, done: impl Fn() -> u64) -> (Broker, Disturbances) {
    let mut disturbances = Disturbances { cuts: vec![0; relays.len()], ..Disturbances::default() };
    let mut cut = 0u64;
    let mut cut_until = |goal: u64, cuts: &mut [u64]| {
        while done() < goal {
            std::thread::sleep(Duration::from_millis(100 + cut * 37 % 290));
            // One line after the other, the service's, which is the first, less often than the clients'.
            let line = [1, 2, 1, 2, 0][cut as usize % 5] % relays.len();
            relays[line].cut_one(cut as usize);
            cuts[line] += 1;
            cut += 1;
        }
    };
    for restart in 1..=RESTARTS {
        cut_until(restart * total / (RESTARTS + 2), &mut disturbances.cuts);
        let begin = Instant::now();
        broker.stop();
        std::thread::sleep(Duration::from_millis(restart * 13 % 100));
        broker.restart().unwrap();
        disturbances.outages.push(begin.elapsed());
        if restart % 5 == 0 {
            let begin = Instant::now();
            broker.freeze().unwrap();
            std::thread::sleep(Duration::from_millis(if restart == 5 { 500 } else { 3000 }));
            broker.thaw().unwrap();
            disturbances.outages.push(begin.elapsed());
        }
    }
    cut_until((RESTARTS + 1) * total / (RESTARTS + 2), &mut disturbances.cuts);
    (broker, disturbances)
}

#[actix::test]
async fn fifty_thousand_calls_survive_ten_restarts_of_the_broker() {
    let begin = Instant::now();
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    // Everybody has a line of its own, the broker's port stays.
    let relays: Vec<Relay> = (0..3).map(|_| Relay::start(broker.port())).collect();
    let queue = unique("storm");
    let storm = Storm::new(CALLS);
    let server = server_options(&broker, &queue).urls(url(&relays[0])).socket_options(quick());
    let mut service = Microservice::new().arbiters(1).server(RmqServer::new(server));
    for group in storm.handlers() {
        service = service.handlers(group);
    }
    let service = service.start().await.unwrap();
    let clients: Vec<_> = relays[1..]
        .iter()
        .map(|relay| {
            let options = client_options(&broker, &queue).urls(url(relay)).socket_options(quick());
            RmqClient::new(options.call_timeout(CALL_TIMEOUT))
        })
        .collect();
    let chaos = {
        let storm = storm.clone();
        move || {
            let (broker, disturbances) = chaos(broker, &relays, CALLS, || storm.ended());
            (broker, relays, disturbances)
        }
    };
    let (outcomes, chaos) = futures::join!(storm.run(&clients, CALLS_IN_FLIGHT), async {
        tokio::task::spawn_blocking(chaos).await.unwrap()
    });
    let (broker, relays, disturbances) = chaos;
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
    // What the service had taken and not answered ends by its timeout, of whichever client it is.
    let one = CALLS_IN_FLIGHT as u64;
    let most = disturbances.most(&[2 * one, one, one], CALL_TIMEOUT);
    eprintln!("{outcomes:?}, {most} at most without value; {disturbances:.1?}; {:.1?}", begin.elapsed());
    assert!(outcomes["value"] >= CALLS.saturating_sub(most), "{outcomes:?}");
    // A client that connects again without end refuses nothing.
    assert!(outcomes.keys().all(|kind| ["value", "lost", "timeout"].contains(kind)), "{outcomes:?}");
    assert!(outcomes.contains_key("lost"), "{outcomes:?}");
    drop((relays, broker));
}

#[actix::test]
async fn of_fifty_thousand_events_none_that_was_confirmed_is_lost() {
    let begin = Instant::now();
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let relays: Vec<Relay> = (0..2).map(|_| Relay::start(broker.port())).collect();
    let queue = unique("events");
    let runs: Arc<Mutex<HashMap<u64, u32>>> = Arc::default();
    let note = Arc::clone(&runs);
    let group = event("evt", move |Data(number): Data<u64>| {
        let first = {
            let mut runs = note.lock();
            let count = runs.entry(number).or_insert(0);
            *count += 1;
            *count == 1
        };
        // Some fail at first, and are delivered again.
        async move { if first && number % 500 == 0 { Err(RpcError::message("once more")) } else { Ok(()) } }
    });
    let server = server_options(&broker, &queue).urls(url(&relays[0])).socket_options(quick());
    let server = server.no_ack(false).on_failure(FailurePolicy::Requeue);
    let service =
        Microservice::new().arbiters(1).handlers(group).server(RmqServer::new(server)).start().await.unwrap();
    // Durable queue, persistent messages: what was confirmed is on disk.
    let client = RmqClient::new(
        client_options(&broker, &queue)
            .urls(url(&relays[1]))
            .socket_options(quick())
            .persistent(true)
            .call_timeout(EVENT_TIMEOUT),
    );
    let ended = Arc::new(AtomicU64::new(0));
    let chaos = {
        let ended = Arc::clone(&ended);
        move || {
            let (broker, disturbances) = chaos(broker, &relays, EVENTS, || ended.load(Ordering::Relaxed));
            (broker, relays, disturbances)
        }
    };
    let emitting = futures::stream::iter(0..EVENTS)
        .map(|number| {
            let (client, ended) = (&client, &ended);
            async move {
                let result = client.emit("evt", number).await;
                ended.fetch_add(1, Ordering::Relaxed);
                if result.is_err() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                (number, result)
            }
        })
        .buffer_unordered(EVENTS_IN_FLIGHT)
        .collect::<Vec<_>>();
    let (results, chaos) =
        futures::join!(emitting, async { tokio::task::spawn_blocking(chaos).await.unwrap() });
    let (broker, relays, disturbances) = chaos;
    let confirmed: Vec<u64> =
        results.iter().filter(|(_, result)| result.is_ok()).map(|(number, _)| *number).collect();
    let refused =
        results.iter().filter(|(_, result)| matches!(result, Err(error) if error.is_not_sent())).count();
    let missing = || {
        let runs = runs.lock();
        confirmed.iter().filter(|number| !runs.contains_key(number)).count()
    };
    let limit = Instant::now() + Duration::from_secs(30);
    while missing() > 0 && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(missing(), 0, "of {} confirmed events", confirmed.len());
    until("no slot is left", || client.occupied() == 0).await;
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
    let raw = Raw::connect(&broker).await;
    assert_eq!(raw.waiting(&queue).await, 0);
    let runs = runs.lock();
    // What was not sent never ran, what is unknown may have.
    for (number, result) in &results {
        assert!(
            !matches!(result, Err(error) if error.is_not_sent()) || !runs.contains_key(number),
            "{number}"
        );
    }
    // The service's line does not end what its sender waits for.
    let most = disturbances.most(&[0, EVENTS_IN_FLIGHT as u64], EVENT_TIMEOUT);
    let twice = runs.values().filter(|count| **count > 1).count();
    eprintln!(
        "{} of {EVENTS} confirmed, {most} at most are not, {twice} handled more than once; {disturbances:.1?}; {:.1?}",
        confirmed.len(),
        begin.elapsed()
    );
    assert!(confirmed.len() as u64 >= EVENTS.saturating_sub(most));
    assert_eq!(refused, 0);
    assert!(twice >= 90, "{twice} redelivered");
    drop((relays, broker));
}
