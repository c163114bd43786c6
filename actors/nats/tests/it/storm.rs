// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many calls while the broker is killed and started again or frozen and lines are cut, and while the service stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use martlet_core::codec::MessagePackCodec;
use martlet_core::{CallError, ClientProxy, ConnectionStatus, Microservice, RunningService};
use martlet_nats::{NatsClient, NatsClientOptions, NatsServer, NatsServerOptions};
use martlet_testkit::broker as testkit;
use martlet_testkit::relay::Relay;
use martlet_testkit::storm::{Outcomes, Storm, every_route_answers, stop_under_load};

use crate::broker::Broker;
use crate::world::{GRACE, client_options, server_options, until};

#[actix::test]
async fn a_hundred_thousand_calls_survive_ten_restarts_of_the_broker() {
    storm(|server| server, |client| client, 100_000, 10).await;
}

#[actix::test]
async fn a_storm_in_message_pack_is_survived() {
    let codec = || Arc::new(MessagePackCodec);
    storm(|server| server.codec(codec()), |client| client.codec(codec()), 30_000, 4).await;
}

/// So many calls, a tenth of them events, while the broker is killed and started again and lines are cut.
async fn storm(
    server: impl FnOnce(NatsServerOptions) -> NatsServerOptions,
    client: impl Fn(NatsClientOptions) -> NatsClientOptions,
    calls: u64,
    restarts: u64,
) {
    let begin = Instant::now();
    let mut broker = Broker::start();
    // Everybody has a line of its own, the broker's port stays.
    let relays: Vec<Relay> = (0..4).map(|_| Relay::start(broker.port)).collect();
    let url = |relay: &Relay| [format!("nats://127.0.0.1:{}", relay.port())];
    let storm = Storm::with_events(calls);
    let options = server_options(&broker).servers(url(&relays[0])).max_reconnect_attempts(-1);
    let service = serve(&storm, server(options)).await;
    let clients: Vec<_> = relays[1..]
        .iter()
        .enumerate()
        .map(|(number, relay)| {
            // The last one does not wait for its connection.
            let attempts = if number == 2 { 0 } else { -1 };
            let options = client_options(&broker).servers(url(relay)).max_reconnect_attempts(attempts);
            NatsClient::new(client(options.call_timeout(Duration::from_secs(5))))
        })
        .collect();
    let chaos = {
        let storm = storm.clone();
        move || {
            let mut cut = 0;
            let mut cut_until = |ended| {
                while storm.ended() < ended {
                    storm.calm(Duration::from_millis(11 + cut as u64 * 7 % 90)).wait();
                    // One line after the other, the service's less often than the clients'.
                    relays[[1, 2, 3, 0, 2, 1, 3][cut % 7]].cut_one(cut);
                    cut += 1;
                }
            };
            for restart in 1..=restarts {
                cut_until(restart * calls / (restarts + 1));
                broker.stop();
                std::thread::sleep(Duration::from_millis(restart * 13 % 100));
                broker.restart();
            }
            // What the service's line had when it was cut and no restart ends, ends by its timeout.
            cut_until(calls - calls / 50);
            (broker, relays, cut)
        }
    };
    let (outcomes, chaos) =
        futures::join!(storm.run(&clients, 100), async { tokio::task::spawn_blocking(chaos).await.unwrap() });
    let (broker, relays, cuts) = chaos;
    let events = passed(&storm, service, &clients, &outcomes).await;
    let took = begin.elapsed();
    eprintln!("{outcomes:?}, {events} events ran; {restarts} restarts, {cuts} cuts; {took:.1?}");
    assert!(outcomes["value"] > calls / 2, "{outcomes:?}");
    assert!(outcomes.contains_key("lost"), "{outcomes:?}");
    assert!(events > calls / 20, "{events} events of {}", calls / 10);
    assert!(took < Duration::from_secs(120), "{took:?}");
    drop((relays, broker));
}

async fn serve(storm: &Storm, options: NatsServerOptions) -> RunningService {
    let mut service = Microservice::new().arbiters(1).server(NatsServer::new(options));
    for group in storm.handlers() {
        service = service.handlers(group);
    }
    service.start().await.unwrap()
}

/// What holds when a storm is over: everything is back, nothing is left, no outcome was wrong. How many events ran.
async fn passed(storm: &Storm, service: RunningService, clients: &[ClientProxy], outcomes: &Outcomes) -> u64 {
    let server = service.servers()[0].clone();
    until("the service is connected", || server.status() == Some(ConnectionStatus::Connected)).await;
    for client in clients {
        every_route_answers(client).await;
        assert_eq!((client.pending(), client.occupied()), (0, 0));
        client.close().await;
    }
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?} {outcomes:?}");
    storm.check_runs();
    storm.events_run()
}

/// Connections stay open and nothing comes through: only its missing pings tell that a broker is frozen.
#[actix::test]
async fn calls_survive_a_broker_that_freezes_in_the_middle_of_traffic() {
    const CALLS: u64 = 30_000;
    const FREEZES: u64 = 6;
    let begin = Instant::now();
    let broker = testkit::Broker::start(testkit::BrokerCommand::nats()).unwrap();
    let ping = Duration::from_millis(200);
    let dial = Duration::from_millis(500);
    let storm = Storm::with_events(CALLS);
    let options = NatsServerOptions::new()
        .servers([broker.url()])
        .reconnect_time_wait(Duration::from_millis(50))
        .max_reconnect_attempts(-1)
        .ping_interval(ping)
        .timeout(dial);
    let service = serve(&storm, options).await;
    let clients: Vec<_> = (0..3)
        .map(|_| {
            NatsClient::new(
                NatsClientOptions::new()
                    .servers([broker.url()])
                    .reconnect_time_wait(Duration::from_millis(50))
                    .max_reconnect_attempts(-1)
                    .ping_interval(ping)
                    .timeout(dial)
                    .call_timeout(Duration::from_secs(10)),
            )
        })
        .collect();
    let losses = Arc::new(AtomicU64::new(0));
    let server = service.servers()[0].clone();
    let chaos = async {
        for freeze in 1..=FREEZES {
            storm.reaches(freeze * CALLS / (FREEZES + 1)).await;
            broker.freeze().unwrap();
            // Some are over before anybody gives the broker up, some last until everybody has.
            if freeze % 2 == 0 {
                tokio::time::sleep(ping / 2).await;
                assert_eq!(server.status(), Some(ConnectionStatus::Connected), "given up too early");
            } else {
                until("the frozen broker is given up", || {
                    server.status() == Some(ConnectionStatus::Reconnecting)
                })
                .await;
                losses.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(dial * 2).await;
            }
            broker.thaw().unwrap();
            until("it is connected", || server.status() == Some(ConnectionStatus::Connected)).await;
        }
    };
    let (outcomes, ()) = futures::join!(storm.run(&clients, 100), chaos);
    let events = passed(&storm, service, &clients, &outcomes).await;
    let took = begin.elapsed();
    eprintln!("{outcomes:?}, {events} events ran; {FREEZES} freezes; {took:.1?}");
    assert_eq!(losses.load(Ordering::Relaxed), FREEZES / 2);
    assert!(outcomes["value"] > CALLS / 2, "{outcomes:?}");
    // What was under way when the broker was given up has ended so, long before its timeout.
    assert!(outcomes.contains_key("lost"), "{outcomes:?}");
    assert!(!outcomes.contains_key("timeout"), "{outcomes:?}");
    assert!(took < Duration::from_secs(120), "{took:?}");
}

#[actix::test]
async fn what_a_stopping_service_handled_reaches_its_callers() {
    let broker = Broker::start();
    stop_under_load(
        || NatsServer::new(server_options(&broker)),
        |_| NatsClient::new(client_options(&broker)),
        |error| matches!(error, CallError::NoHandler { .. }),
    )
    .await;
}
