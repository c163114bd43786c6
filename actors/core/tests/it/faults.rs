// SPDX-License-Identifier: MIT OR Apache-2.0
//! Faults of the line and of transporters: nobody else is disturbed, every call has its outcome.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::{StreamExt, stream};
use martlet_core::{
    CallError, ClientOptions, ClientProxy, ConnectionStatus, Data, HandlerGroup, Microservice, RpcError,
    Server, StartError, event, message,
};
use martlet_testkit::fault::{Faults, FaultyDial, FaultyListen};
use martlet_testkit::memory::{
    MemoryClient, MemoryDial, MemoryListen, MemoryNetwork, MemoryOptions, MemoryServer,
};

use crate::support::{end, eventually, log, ms, ok, paused, quick, real, server_options};

fn echo() -> HandlerGroup {
    message("echo", |Data(number): Data<u64>| async move { ok(number) })
}

fn client_with(
    network: &MemoryNetwork,
    faults: &Faults,
    change: impl FnOnce(&mut ClientOptions),
) -> ClientProxy {
    let mut options = ClientOptions::default();
    options.retry_delay = quick();
    change(&mut options);
    ClientProxy::new(FaultyDial::new(MemoryDial::new(network), faults), options)
}

#[test]
fn a_route_registered_while_a_server_dials_is_subscribed() {
    paused(async {
        let (network, faults) = (MemoryNetwork::broker(), Faults::new());
        let dial = FaultyDial::new(MemoryDial::new(&network), &faults);
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(echo())
            .server(Server::dial(dial, network.url(), server_options()))
            .start()
            .await
            .unwrap();
        let gone = service.registry().register(vec![message("gone", || async { ok(1) })]).await.unwrap();
        tokio::time::sleep(ms(10)).await;
        assert_eq!(network.subscribed().len(), 2);
        faults.change(|plan| plan.open_delay = ms(500));
        faults.cut();
        tokio::time::sleep(ms(300)).await;
        assert_eq!(service.servers()[0].status(), Some(ConnectionStatus::Reconnecting));
        service.registry().register(vec![message("late", || async { ok(2) })]).await.unwrap();
        service.registry().unregister(gone).await.unwrap();
        tokio::time::sleep(ms(1000)).await;
        let mut routes: Vec<_> = network.subscribed().iter().map(ToString::to_string).collect();
        routes.sort();
        assert_eq!(routes, ["echo", "late"]);
        let client = MemoryClient::new(&network);
        assert_eq!(client.send::<u64>("late", 1).await.unwrap(), 2);
        end(client, service).await;
    });
}

#[test]
fn a_hundred_thousand_calls_under_random_cuts_have_one_outcome_each() {
    const CALLS: u64 = 100_000;
    real(async {
        let (network, faults) = (MemoryNetwork::new(), Faults::seeded(7));
        faults.change(|plan| plan.cut_probability = 0.0008);
        let ran = Arc::new(AtomicUsize::new(0));
        let run = Arc::clone(&ran);
        let group = message("echo", move |Data(number): Data<u64>| {
            run.fetch_add(1, Ordering::Relaxed);
            async move {
                if number % 8 == 0 {
                    tokio::task::yield_now().await;
                }
                ok(number)
            }
        });
        let service = Microservice::new()
            .arbiters(1)
            .handlers(group)
            .server(MemoryServer::new(&network))
            .start()
            .await
            .unwrap();
        let client = client_with(&network, &faults, |options| {
            options.reconnect = true;
            options.retry_attempts = 10;
        });
        let (answered, lost, other) = stream::iter(0..CALLS)
            .map(|number| {
                let call = client.send::<u64>("echo", number);
                let call = if number % 4 == 0 { call.idempotent() } else { call };
                async move { (number, call.await) }
            })
            .buffer_unordered(200)
            .fold((0u64, 0u64, 0u64), |(answered, lost, other), (number, result)| async move {
                match result {
                    Ok(reply) => {
                        assert_eq!(reply, number);
                        (answered + 1, lost, other)
                    }
                    Err(CallError::Lost { .. }) => (answered, lost + 1, other),
                    Err(_) => (answered, lost, other + 1),
                }
            })
            .await;
        assert_eq!(answered + lost + other, CALLS);
        assert!(faults.cuts() > 20, "{} cuts", faults.cuts());
        assert!(lost > 0 && answered > CALLS / 2, "{answered} answered, {lost} lost, {other} other");
        assert_eq!(other, 0, "there was always somebody to connect to");
        assert!(ran.load(Ordering::Relaxed) as u64 >= answered);
        assert_eq!(client.pending(), 0);
        end(client, service).await;
    });
}

#[test]
fn a_panic_in_a_clients_transporter_ends_its_calls_and_no_more() {
    real(async {
        let (network, faults) = (MemoryNetwork::new(), Faults::new());
        let service =
            Microservice::new().on_current_arbiter().handlers(echo()).server(MemoryServer::new(&network));
        let service = service.start().await.unwrap();
        let client = client_with(&network, &faults, |options| options.timeout = Some(ms(5000)));
        let plans: [fn(&mut martlet_testkit::fault::FaultPlan); 3] = [
            |plan| plan.panic_after_read = Some(2),
            |plan| plan.panic_after_written = Some(2),
            |plan| plan.panic_in_open = true,
        ];
        for plan in plans {
            faults.change(plan);
            faults.cut();
            let mut failed = 0;
            for number in 0..6 {
                match client.send::<u64>("echo", number).await {
                    Ok(reply) => assert_eq!(reply, number),
                    Err(CallError::Lost { .. } | CallError::NotSent { .. }) => failed += 1,
                    Err(other) => panic!("{other}"),
                }
            }
            assert!(failed > 0);
            faults.change(|plan| *plan = Default::default());
            faults.cut();
            let mut attempts = 0;
            while client.send::<u64>("echo", 1).await.is_err() {
                attempts += 1;
                assert!(attempts < 100, "the client works again");
                tokio::time::sleep(ms(10)).await;
            }
        }
        end(client, service).await;
    });
}

#[test]
fn a_panic_in_a_servers_session_disturbs_no_other_session() {
    real(async {
        let (network, faults) = (MemoryNetwork::new(), Faults::new());
        let listen = FaultyListen::new(MemoryListen::new(&network), &faults);
        let never = message("never", async || std::future::pending::<Result<u64, RpcError>>().await);
        let ran = Arc::new(AtomicU64::new(0));
        let runs = Arc::clone(&ran);
        let counted = message("counted", move |Data(number): Data<u64>| {
            runs.fetch_add(1, Ordering::Relaxed);
            // Every other one is answered at once.
            async move {
                if number % 2 == 0 {
                    tokio::task::yield_now().await;
                }
                Ok::<_, RpcError>(number)
            }
        });
        let service = Microservice::new()
            .arbiters(1)
            .handlers(counted)
            .handlers(never)
            .server(Server::listen(listen, server_options()))
            .start()
            .await
            .unwrap();
        let seen = log(service.events());
        let steady = MemoryClient::new(&network);
        assert_eq!(steady.send::<u64>("counted", 1).await.unwrap(), 1);
        for open in [false, true] {
            faults.change(|plan| {
                plan.panic_in_open = open;
                plan.panic_after_read = Some(1000);
            });
            let victim = MemoryClient::new(&network);
            let waiting = (0..3).map(|_| victim.send::<u64>("never", 1).timeout(ms(5000)));
            let calls = (0..1100).map(|number| victim.send::<u64>("counted", number).timeout(ms(5000)));
            let waiting = futures::future::join_all(waiting);
            let (waiting, results) = futures::join!(waiting, futures::future::join_all(calls));
            assert!(waiting.iter().all(|result| matches!(result, Err(CallError::Lost { .. }))));
            assert!(results.iter().any(|result| matches!(result, Err(CallError::Lost { .. }))));
            assert!(results.iter().all(|result| matches!(result, Ok(_) | Err(CallError::Lost { .. }))));
            assert_eq!(steady.send::<u64>("counted", 2).await.unwrap(), 2);
            assert_eq!(victim.occupied(), 0);
            victim.close().await;
        }
        let panics = seen.lock().iter().filter(|text| text.contains("the session panicked")).count();
        assert_eq!(panics, 2, "{:?}", seen.lock());
        steady.close().await;
        let report = service.stop(ms(1000)).await;
        // What the session had in work when it panicked is lost; the rest of it was done.
        let ran = ran.load(Ordering::Relaxed);
        assert!(report.clean && report.lost() >= 3, "{report:?}");
        assert_eq!(report.done() + report.lost(), ran + 3, "{report:?}");
    });
}

#[test]
fn a_dialled_server_survives_panics_of_its_transporter() {
    real(async {
        let (network, faults) = (MemoryNetwork::broker(), Faults::new());
        let dial = FaultyDial::new(MemoryDial::new(&network), &faults);
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(echo())
            .server(Server::dial(dial, network.url(), server_options()))
            .start()
            .await
            .unwrap();
        let client = MemoryClient::new(&network);
        let plans: [fn(&mut martlet_testkit::fault::FaultPlan); 3] = [
            |plan| plan.panic_after_read = Some(0),
            |plan| plan.panic_after_written = Some(0),
            |plan| plan.panic_in_open = true,
        ];
        for plan in plans {
            assert_eq!(client.send::<u64>("echo", 1).await.unwrap(), 1);
            faults.change(plan);
            faults.cut();
            for number in 0..5 {
                // It is away, or dies of this very request.
                let result = client.send::<u64>("echo", number).timeout(ms(30)).await;
                assert!(result.is_err(), "{result:?}");
            }
            faults.change(|plan| *plan = Default::default());
            faults.cut();
            let mut attempts = 0;
            while client.send::<u64>("echo", 1).timeout(ms(200)).await.is_err() {
                attempts += 1;
                assert!(attempts < 500, "the server is back");
                tokio::time::sleep(ms(5)).await;
            }
        }
        end(client, service).await;
    });
}

#[test]
fn a_server_whose_transporter_panics_at_start_does_not_start() {
    paused(async {
        let (network, faults) = (MemoryNetwork::broker(), Faults::new());
        faults.change(|plan| plan.panic_in_open = true);
        let dial = FaultyDial::new(MemoryDial::new(&network), &faults);
        let server = Server::dial(dial, network.url(), server_options());
        let start = Microservice::new().on_current_arbiter().handlers(echo()).server(server).start();
        let started = tokio::time::timeout(Duration::from_secs(60), start).await.expect("it says so");
        match started {
            Err(StartError::Transport { cause, .. }) => {
                assert!(cause.to_string().contains("deliberate panic"), "{cause}");
            }
            other => panic!("a start error expected, got {other:?}"),
        }
    });
}

#[test]
fn lost_requests_time_out_and_doubled_replies_are_counted() {
    paused(async {
        let (network, faults) = (MemoryNetwork::new(), Faults::new());
        let service =
            Microservice::new().on_current_arbiter().handlers(echo()).server(MemoryServer::new(&network));
        let service = service.start().await.unwrap();
        let client = client_with(&network, &faults, |options| options.timeout = Some(ms(1000)));
        faults.change(|plan| plan.duplicate_every = Some(1));
        for number in 0..5 {
            assert_eq!(client.send::<u64>("echo", number).await.unwrap(), number);
        }
        tokio::time::sleep(ms(10)).await;
        assert_eq!(client.late_replies(), 5);
        faults.change(|plan| {
            plan.duplicate_every = None;
            plan.drop_every = Some(1);
        });
        let started = tokio::time::Instant::now();
        let lost = client.send::<u64>("echo", 1).await;
        assert!(matches!(lost, Err(CallError::Timeout { .. })), "{lost:?}");
        let waited = started.elapsed();
        assert!(waited >= ms(1000) && waited < ms(1010), "{waited:?}");
        faults.change(|plan| {
            plan.drop_every = None;
            plan.read_delay = ms(900);
        });
        assert_eq!(client.send::<u64>("echo", 1).await.unwrap(), 1);
        faults.change(|plan| plan.read_delay = ms(1100));
        assert!(matches!(client.send::<u64>("echo", 1).await, Err(CallError::Timeout { .. })));
        tokio::time::sleep(ms(2000)).await;
        assert_eq!(client.late_replies(), 6);
        end(client, service).await;
    });
}

#[test]
fn a_stop_does_not_wait_for_a_peer_that_does_not_read() {
    real(async {
        let options = MemoryOptions { line_bytes: 1000, ..MemoryOptions::default() };
        let network = MemoryNetwork::with(options);
        let large = message("large", || async { ok("x".repeat(10_000)) });
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(large)
            .handlers(echo())
            .server(MemoryServer::new(&network))
            .start()
            .await
            .unwrap();
        let peer = network.connect_raw().unwrap();
        for _ in 0..100 {
            peer.send(r#"{"pattern":"large","data":1,"id":"x"}"#);
        }
        let client = MemoryClient::new(&network);
        assert_eq!(client.send::<u64>("echo", 1).await.unwrap(), 1);
        client.close().await;
        let started = tokio::time::Instant::now();
        service.stop(ms(100)).await;
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
        drop(peer);
    });
}

fn settling() -> MemoryNetwork {
    MemoryNetwork::with(MemoryOptions { settles: true, ..MemoryOptions::broker() })
}

#[test]
fn deliveries_are_settled_as_they_end() {
    real(async {
        let network = settling();
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(echo())
            .handlers(message("fail", || async { Err::<(), _>(RpcError::message("no")) }))
            .handlers(event("evt", || async { ok(()) }))
            .handlers(event("evt", |Data(fails): Data<bool>| async move {
                if fails { Err(RpcError::message("no")) } else { Ok(()) }
            }))
            .server(MemoryServer::new(&network))
            .start()
            .await
            .unwrap();
        let client = MemoryClient::new(&network);
        client.send::<u64>("echo", 1).await.unwrap();
        client.send::<()>("fail", 1).await.unwrap_err();
        client.emit("evt", false).await.unwrap();
        client.emit("evt", true).await.unwrap();
        eventually("all are settled", || network.settlements().done + network.settlements().failed == 4)
            .await;
        assert_eq!((network.settlements().done, network.settlements().failed), (2, 2));
        assert_eq!(network.unsettled(), 0);
        end(client, service).await;
    });
}

#[test]
fn what_a_stopping_service_cannot_finish_is_handed_back_and_done_by_another() {
    real(async {
        let network = settling();
        let begun = Arc::new(AtomicUsize::new(0));
        let start = |stuck: bool| {
            let begun = Arc::clone(&begun);
            let group = message("work", move |Data(number): Data<u64>| {
                begun.fetch_add(1, Ordering::SeqCst);
                async move {
                    if stuck {
                        std::future::pending::<()>().await;
                    }
                    ok(number)
                }
            });
            Microservice::new()
                .on_current_arbiter()
                .handlers(group)
                .server(MemoryServer::new(&network))
                .start()
        };
        let stuck = start(true).await.unwrap();
        let client = MemoryClient::new(&network);
        let calls = futures::future::try_join_all((0..10).map(|number| client.send::<u64>("work", number)));
        let (replies, service) = futures::join!(calls, async {
            eventually("ten are taken", || begun.load(Ordering::SeqCst) == 10).await;
            let other = start(false).await.unwrap();
            let report = stuck.stop(ms(50)).await;
            assert_eq!((report.handed_back(), report.abandoned().count()), (10, 0), "{report:?}");
            other
        });
        assert_eq!(replies.unwrap(), (0..10).collect::<Vec<_>>());
        assert_eq!(network.settlements().handed_back, 10);
        assert_eq!(network.settlements().redelivered, 10);
        eventually("all are settled", || network.unsettled() == 0).await;
        end(client, service).await;
    });
}

#[test]
fn what_a_dead_consumer_had_taken_is_done_after_its_return() {
    real(async {
        let network = settling();
        let begun = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&begun);
        let group = event("work", move || {
            let first = count.fetch_add(1, Ordering::SeqCst) < 5;
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
                ok(())
            }
        });
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(group)
            .server(MemoryServer::with(&network, server_options()))
            .start()
            .await
            .unwrap();
        let client = MemoryClient::new(&network);
        for number in 0..5 {
            client.emit("work", number).await.unwrap();
        }
        eventually("five have begun", || begun.load(Ordering::SeqCst) == 5).await;
        assert_eq!(network.unsettled(), 5);
        network.cut();
        eventually("all are settled", || network.unsettled() == 0).await;
        assert_eq!(begun.load(Ordering::SeqCst), 10);
        assert_eq!(network.settlements().done, 5);
        client.close().await;
        assert_eq!(service.stop(ms(1000)).await.lost(), 5);
    });
}
