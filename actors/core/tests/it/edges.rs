// SPDX-License-Identifier: MIT OR Apache-2.0
//! Moments between the states: connecting, closing, giving up, unrouting.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use martlet_core::backoff::BackoffOptions;
use martlet_core::interceptor::guard;
use martlet_core::{
    CallError, ClientOptions, ClientProxy, ConnectionStatus, Data, HandlerGroup, Microservice, RpcError,
    Server, ServerOptions, StartError, Streaming, event, message,
};
use martlet_testkit::fault::{Faults, FaultyDial};
use martlet_testkit::memory::{MemoryClient, MemoryDial, MemoryNetwork, MemoryServer};

use crate::support::{eventually, ms, ok, paused, real};

fn echo() -> HandlerGroup {
    message("echo", |Data(number): Data<u64>| async move { ok(number) })
}

fn small() -> Microservice {
    Microservice::new().on_current_arbiter()
}

fn faulty(network: &MemoryNetwork, faults: &Faults, change: impl FnOnce(&mut ClientOptions)) -> ClientProxy {
    let mut options = ClientOptions::default();
    change(&mut options);
    ClientProxy::new(FaultyDial::new(MemoryDial::new(network), faults), options)
}

#[test]
fn a_dial_that_hangs_ends_calls_as_not_sent_after_its_limit() {
    paused(async {
        let (network, faults) = (MemoryNetwork::new(), Faults::new());
        let service = small().handlers(echo()).server(MemoryServer::new(&network)).start().await.unwrap();
        faults.change(|plan| plan.open_delay = Duration::from_secs(3600));
        let client = faulty(&network, &faults, |options| options.connect_timeout = ms(1000));
        let started = tokio::time::Instant::now();
        let result = client.send::<u64>("echo", 1).await;
        assert!(matches!(result, Err(CallError::NotSent { .. })), "{result:?}");
        let waited = started.elapsed();
        assert!(waited >= ms(1000) && waited < ms(1010), "{waited:?}");
        // A call's own limit is the earlier one; it is not sent later.
        let call = client.send::<u64>("echo", 1).timeout(ms(100)).await;
        assert!(matches!(call, Err(CallError::Timeout { .. })), "{call:?}");
        assert_eq!(client.occupied(), 0);
        faults.change(|plan| plan.open_delay = ms(50));
        tokio::time::sleep(ms(2000)).await;
        assert_eq!(client.send::<u64>("echo", 2).await.unwrap(), 2);
        client.close().await;
        assert_eq!(service.stop(ms(1000)).await.done(), 1);
    });
}

#[test]
fn a_client_closes_while_it_connects() {
    paused(async {
        let (network, faults) = (MemoryNetwork::new(), Faults::new());
        let service = small().handlers(echo()).server(MemoryServer::new(&network)).start().await.unwrap();
        faults.change(|plan| plan.open_delay = Duration::from_secs(5));
        let client = faulty(&network, &faults, |_| {});
        let started = tokio::time::Instant::now();
        let call = client.send::<u64>("echo", 1);
        let (result, connected, ()) = futures::join!(call, client.connect(), async {
            tokio::time::sleep(ms(100)).await;
            assert_eq!(client.status(), Some(ConnectionStatus::Connecting));
            client.close().await;
        });
        assert!(matches!(result, Err(CallError::Closed)), "{result:?}");
        assert!(connected.is_err(), "{connected:?}");
        assert!(started.elapsed() < ms(200), "{:?}", started.elapsed());
        assert_eq!(client.status(), Some(ConnectionStatus::Closed));
        service.stop(ms(1000)).await;
    });
}

#[test]
fn requests_cancelled_while_they_wait_for_a_place_never_run() {
    real(async {
        let ran = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&ran);
        let group = message("serial", move |Data(millis): Data<u64>| {
            count.fetch_add(1, Ordering::SeqCst);
            async move {
                tokio::time::sleep(ms(millis)).await;
                ok(millis)
            }
        });
        let network = MemoryNetwork::new();
        let service =
            small().handlers(group.concurrency(1)).server(MemoryServer::new(&network)).start().await.unwrap();
        let client = MemoryClient::new(&network);
        let mut first = client.send::<u64>("serial", 100);
        assert!((&mut first).now_or_never().is_none());
        let mut waiting: Vec<_> = (0..50).map(|_| client.send::<u64>("serial", 0)).collect();
        for call in &mut waiting {
            assert!(call.now_or_never().is_none());
        }
        tokio::time::sleep(ms(20)).await;
        waiting.truncate(3);
        assert_eq!(first.await.unwrap(), 100);
        assert_eq!(futures::future::try_join_all(waiting).await.unwrap(), [0; 3]);
        assert_eq!(ran.load(Ordering::SeqCst), 4);
        client.close().await;
        assert!(service.stop(ms(1000)).await.clean);
    });
}

#[test]
fn a_call_that_overflows_stops_its_handler() {
    real(async {
        struct Running(Arc<AtomicUsize>);
        impl Drop for Running {
            fn drop(&mut self) {
                self.0.store(0, Ordering::SeqCst);
            }
        }
        let running = Arc::new(AtomicUsize::new(0));
        let run = Arc::clone(&running);
        let group = message("burst", move || {
            run.store(1, Ordering::SeqCst);
            let alive = Running(Arc::clone(&run));
            async move {
                ok(Streaming(stream::iter(0..11u64).chain(stream::pending()).map(move |item| {
                    let _ = &alive;
                    item
                })))
            }
        });
        let network = MemoryNetwork::new();
        let service = small().handlers(group).server(MemoryServer::new(&network)).start().await.unwrap();
        let mut options = ClientOptions::default();
        options.max_buffered_replies = 10;
        let client = MemoryClient::with(&network, options);
        let mut replies = client.send::<u64>("burst", 1).stream();
        assert!(replies.next().now_or_never().is_none());
        eventually("the call has ended", || client.pending() == 0).await;
        eventually("the handler was dropped", || running.load(Ordering::SeqCst) == 0).await;
        drop(replies);
        client.close().await;
        assert!(service.stop(ms(1000)).await.clean);
    });
}

#[test]
fn requests_dispatched_before_an_unregistration_are_answered() {
    real(async {
        let network = MemoryNetwork::new();
        let service =
            Microservice::new().arbiters(2).server(MemoryServer::new(&network)).start().await.unwrap();
        let client = MemoryClient::new(&network);
        for _ in 0..20 {
            let taken = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&taken);
            let group = message("work", move |Data(number): Data<u64>| {
                count.fetch_add(1, Ordering::SeqCst);
                async move {
                    tokio::time::sleep(ms(number % 3)).await;
                    ok(number)
                }
            });
            let id = service.registry().register(vec![group.singleton()]).await.unwrap();
            let calls = futures::future::join_all((0..300).map(|number| client.send::<u64>("work", number)));
            let (results, ()) = futures::join!(calls, async {
                eventually("one is taken", || taken.load(Ordering::SeqCst) > 0).await;
                service.registry().unregister(id).await.unwrap();
            });
            let mut answered = 0;
            for (number, result) in results.into_iter().enumerate() {
                match result {
                    Ok(reply) => {
                        assert_eq!(reply, number as u64);
                        answered += 1;
                    }
                    Err(CallError::NoHandler { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            assert_eq!(answered, taken.load(Ordering::SeqCst));
        }
        client.close().await;
        assert!(service.stop(ms(1000)).await.clean);
    });
}

#[test]
fn a_broker_that_is_away_at_start_is_a_start_error_or_is_waited_for() {
    paused(async {
        let network = MemoryNetwork::broker();
        network.take_down();
        let started = small().handlers(echo()).server(MemoryServer::new(&network)).start().await;
        assert!(matches!(started, Err(StartError::Transport { .. })), "{started:?}");

        let mut options = ServerOptions::default();
        options.retry_attempts = Some(5);
        options.retry_delay = BackoffOptions::fixed(ms(1000));
        let start = || small().handlers(echo()).server(MemoryServer::with(&network, options)).start();
        let began = tokio::time::Instant::now();
        let started = start().await;
        assert!(matches!(started, Err(StartError::Transport { .. })), "{started:?}");
        assert_eq!(began.elapsed().as_secs(), 5, "one attempt and five more");
        let (started, ()) = futures::join!(start(), async {
            tokio::time::sleep(ms(2500)).await;
            network.restore();
        });
        let service = started.unwrap();
        let client = MemoryClient::new(&network);
        assert_eq!(client.send::<u64>("echo", 1).await.unwrap(), 1);
        client.close().await;
        service.stop(ms(1000)).await;
    });
}

#[test]
fn a_server_that_gives_up_stops_the_service_with_a_report() {
    paused(async {
        let network = MemoryNetwork::broker();
        let mut options = ServerOptions::default();
        options.retry_attempts = Some(3);
        options.retry_delay = BackoffOptions::fixed(ms(1000));
        let service =
            small().handlers(echo()).server(MemoryServer::with(&network, options)).start().await.unwrap();
        let running = service.clone();
        let run = actix_rt::spawn(async move { running.run_until(std::future::pending::<String>()).await });
        network.take_down();
        tokio::time::sleep(ms(2900)).await;
        assert!(!run.is_finished());
        tokio::time::sleep(ms(2000)).await;
        assert!(run.is_finished(), "{:?}", service.servers());
        let report = run.await.unwrap().unwrap();
        assert!(!report.clean);
        assert!(report.cause.contains("the broker is down"), "{}", report.cause);
    });
}

#[test]
fn a_service_stops_at_once_while_its_broker_is_away() {
    paused(async {
        let (network, faults) = (MemoryNetwork::broker(), Faults::new());
        let dial = FaultyDial::new(MemoryDial::new(&network), &faults);
        let server = Server::dial(dial, network.url(), ServerOptions::default());
        let service = small().handlers(echo()).server(server).start().await.unwrap();
        faults.change(|plan| plan.open_delay = Duration::from_secs(8));
        faults.cut();
        tokio::time::sleep(ms(500)).await;
        let began = tokio::time::Instant::now();
        assert!(service.stop(Duration::from_secs(5)).await.clean);
        assert!(began.elapsed() < ms(10), "{:?}", began.elapsed());
    });
}

#[test]
fn two_transporters_share_handlers_and_need_not_share_interceptors() {
    real(async {
        let (inside, outside) = (MemoryNetwork::new(), MemoryNetwork::broker());
        let heard = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&heard);
        let service = Microservice::new()
            .arbiters(2)
            .interceptor(guard(
                |request| async move { Ok(request.data::<u64>().is_ok_and(|number| number < 10)) },
            ))
            .handlers(echo())
            .handlers(event("evt", move || {
                count.fetch_add(1, Ordering::SeqCst);
                async { ok(()) }
            }))
            .server(MemoryServer::new(&outside))
            .server(MemoryServer::new(&inside).inherit_app_config(false))
            .start()
            .await
            .unwrap();
        assert_eq!(service.servers().len(), 2);
        let (inner, outer) = (MemoryClient::new(&inside), MemoryClient::new(&outside));
        assert_eq!(inner.send::<u64>("echo", 10).await.unwrap(), 10);
        assert_eq!(outer.send::<u64>("echo", 9).await.unwrap(), 9);
        let refused = outer.send::<u64>("echo", 10).await.unwrap_err();
        assert_eq!(refused.remote().unwrap().message().as_deref(), Some("Forbidden resource"));
        inner.emit("evt", 1).await.unwrap();
        outer.emit("evt", 1).await.unwrap();
        eventually("both are heard", || heard.load(Ordering::SeqCst) == 2).await;
        // A third, while it runs.
        let late = MemoryNetwork::new();
        service.serve(MemoryServer::new(&late)).await.unwrap();
        let third = MemoryClient::new(&late);
        assert_eq!(third.send::<u64>("echo", 1).await.unwrap(), 1);
        for client in [inner, outer, third] {
            client.close().await;
        }
        let report = service.stop(ms(1000)).await;
        assert!(report.clean);
        assert_eq!(report.servers.len(), 3);
    });
}

#[test]
fn outside_of_an_actix_system_errors_say_so() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let network = MemoryNetwork::new();
        let started = Microservice::new().server(MemoryServer::new(&network)).start().await;
        assert!(matches!(started, Err(StartError::NoSystem)), "{started:?}");
        let called = MemoryClient::new(&network).send::<u64>("echo", 1).await;
        assert!(matches!(called, Err(CallError::NotSent { .. })), "{called:?}");
        assert!(called.unwrap_err().to_string().contains("no actix system"));
    });
}

#[test]
fn a_failing_remote_error_passes_through_a_handler_as_it_came() {
    real(async {
        let (far, near) = (MemoryNetwork::new(), MemoryNetwork::new());
        let failing =
            message("fail", || async { Err::<(), _>(RpcError::json(serde_json::json!({"code": 42}))) });
        let inner = small().handlers(failing).server(MemoryServer::new(&far)).start().await.unwrap();
        let there = MemoryClient::new(&far);
        let client = there.clone();
        let relay = message("relay", move || {
            let client = client.clone();
            async move { client.send::<u64>("fail", 1).await }
        });
        let outer = small().handlers(relay).server(MemoryServer::new(&near)).start().await.unwrap();
        let here = MemoryClient::new(&near);
        let error = here.send::<u64>("relay", 1).await.unwrap_err();
        assert_eq!(error.remote().unwrap().payload().bytes(), br#"{"code":42}"#);
        there.close().await;
        // Any other outcome is this service's own trouble.
        let error = here.send::<u64>("relay", 1).await.unwrap_err();
        assert_eq!(error.remote().unwrap().message().as_deref(), Some("Internal server error"));
        here.close().await;
        outer.stop(ms(100)).await;
        inner.stop(ms(100)).await;
    });
}

/// Old tables are in use for as long as nobody calls; what they lead to is not kept for that.
#[test]
fn an_unrouted_handler_goes_at_once_however_many_routes_there_are() {
    real(async {
        for others in [1, 500] {
            let network = MemoryNetwork::new();
            let state = Arc::new(());
            let held = Arc::downgrade(&state);
            let keep = (0..others).map(|number| message(format!("keep.{number}"), || async { ok(()) }));
            let service = Microservice::new()
                .on_current_arbiter()
                .server(MemoryServer::new(&network))
                .start()
                .await
                .unwrap();
            service.registry().register(keep.collect()).await.unwrap();
            let group = message("gone", move || {
                let state = Arc::clone(&state);
                async move { ok(Arc::strong_count(&state) > 0) }
            });
            let id = service.registry().register(vec![group]).await.unwrap();
            // A connection that has seen the route and stays, with the table that it knows.
            let client = MemoryClient::new(&network);
            assert!(client.send::<bool>("gone", ()).await.unwrap());
            assert!(held.upgrade().is_some());
            assert!(service.registry().unregister(id).await.unwrap());
            eventually("its state is dropped", || held.upgrade().is_none()).await;
            assert!(matches!(client.send::<bool>("gone", ()).await, Err(CallError::NoHandler { .. })));
            client.close().await;
            service.stop(ms(100)).await;
        }
    });
}

#[test]
fn a_stopped_service_takes_nothing_more_and_says_so() {
    for service in [small(), Microservice::new().arbiters(1)] {
        real(async move {
            let network = MemoryNetwork::new();
            let service = service.handlers(echo()).start().await.unwrap();
            service.stop(ms(100)).await;
            let served = service.serve(MemoryServer::new(&network)).await;
            assert!(matches!(served, Err(StartError::Stopped)), "{served:?}");
            let registered = service.registry().register(vec![message("late", || async { ok(1) })]).await;
            assert!(matches!(registered, Err(StartError::Stopped)), "{registered:?}");
            let called = MemoryClient::new(&network).send::<u64>("echo", 1).await;
            assert!(matches!(called, Err(CallError::NotSent { .. })), "{called:?}");
        });
    }
}

#[test]
fn a_client_that_is_not_declared_is_told_which_are() {
    paused(async {
        let network = MemoryNetwork::new();
        let told = async |service: Microservice| {
            let service = service.start().await.unwrap();
            let told = service.client("MATH").unwrap_err().to_string();
            service.stop(ms(100)).await;
            told
        };
        let one = "no client named \"MATH\" is declared; declared are";
        assert_eq!(told(small()).await, format!("{one} none"));
        let two =
            small().client("SHOP", MemoryClient::new(&network)).client("CASH", MemoryClient::new(&network));
        assert_eq!(told(two).await, format!("{one} CASH, SHOP"));
    });
}
