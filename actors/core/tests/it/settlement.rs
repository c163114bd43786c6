// SPDX-License-Identifier: MIT OR Apache-2.0
//! What becomes of messages whose handlers fail, by policy, on the in-memory broker that settles.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use martlet_core::{
    Data, FailurePolicy, LastResort, Microservice, RpcError, RunningService, ServiceEvent, StartError,
    Streaming, TransportId, event, message,
};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryOptions, MemoryServer};

use crate::support::{end, eventually, ms, ok, real, server_options};

fn settling() -> MemoryNetwork {
    MemoryNetwork::with(MemoryOptions { settles: true, ..MemoryOptions::broker() })
}

/// A service whose event handler `work` and message handler `ask` fail so many times, then succeed.
async fn failing(
    network: &MemoryNetwork,
    failures: usize,
    policy: Option<FailurePolicy>,
) -> (RunningService, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (begun, retries) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let work = {
        let begun = Arc::clone(&begun);
        move |number: u64| {
            let turn = begun.fetch_add(1, Ordering::SeqCst);
            if turn < failures { Err(RpcError::message("not yet")) } else { ok(number) }
        }
    };
    let mut options = server_options();
    options.on_failure = policy;
    let (ask, told) = (work.clone(), Arc::clone(&retries));
    let service = Microservice::new()
        .on_current_arbiter()
        .on(move |event| {
            if let ServiceEvent::Retry { .. } = event {
                told.fetch_add(1, Ordering::SeqCst);
            }
        })
        .handlers(event("work", move |Data(number): Data<u64>| std::future::ready(work(number))))
        .handlers(message("ask", move |Data(number): Data<u64>| std::future::ready(ask(number))))
        .server(MemoryServer::with(network, options))
        .start()
        .await
        .unwrap();
    (service, begun, retries)
}

#[test]
fn a_failed_event_is_requeued_until_it_succeeds() {
    real(async {
        let network = settling();
        let (service, begun, retries) = failing(&network, 3, Some(FailurePolicy::Requeue)).await;
        let client = MemoryClient::new(&network);
        client.emit("work", 1).await.unwrap();
        eventually("it is done", || network.settlements().done == 1).await;
        assert_eq!((begun.load(Ordering::SeqCst), retries.load(Ordering::SeqCst)), (4, 0));
        assert_eq!((network.settlements().requeued, network.unsettled()), (3, 0));
        end(client, service).await;
    });
}

#[test]
fn a_failed_request_is_answered_and_not_requeued() {
    real(async {
        let network = settling();
        let (service, begun, _) = failing(&network, 1, Some(FailurePolicy::Requeue)).await;
        let client = MemoryClient::new(&network);
        client.send::<u64>("ask", 1).await.unwrap_err();
        eventually("it is done", || network.settlements().done == 1).await;
        assert_eq!((begun.load(Ordering::SeqCst), network.settlements().requeued), (1, 0));
        end(client, service).await;
    });
}

#[test]
fn failures_are_dead_lettered_or_discarded() {
    real(async {
        for (policy, dead, gone) in [(FailurePolicy::DeadLetter, 2, 0), (FailurePolicy::Discard, 0, 2)] {
            let network = settling();
            let (service, begun, _) = failing(&network, 2, Some(policy)).await;
            let client = MemoryClient::new(&network);
            client.emit("work", 1).await.unwrap();
            eventually("the first has run", || begun.load(Ordering::SeqCst) == 1).await;
            client.send::<u64>("ask", 1).await.unwrap_err();
            client.emit("work", 1).await.unwrap();
            eventually("three are settled", || {
                let counts = network.settlements();
                counts.done + counts.dead_lettered + counts.discarded == 3
            })
            .await;
            let counts = network.settlements();
            assert_eq!((counts.done, counts.dead_lettered, counts.discarded), (1, dead, gone));
            end(client, service).await;
        }
    });
}

#[test]
fn a_retry_repeats_with_pauses_and_then_takes_its_last_resort() {
    real(async {
        let policy = FailurePolicy::retry(2).every(ms(20));
        // Succeeds at the last attempt.
        let network = settling();
        let (service, begun, retries) = failing(&network, 2, Some(policy)).await;
        let client = MemoryClient::new(&network);
        let started = tokio::time::Instant::now();
        client.emit("work", 1).await.unwrap();
        eventually("it is done", || network.settlements().done == 1).await;
        assert!(started.elapsed() >= ms(40), "{:?}", started.elapsed());
        assert_eq!((begun.load(Ordering::SeqCst), retries.load(Ordering::SeqCst)), (3, 2));
        end(client, service).await;
        // Fails for good.
        for (last, dead, gone, requeued) in [
            (LastResort::DeadLetter, 1, 0, 0),
            (LastResort::Discard, 0, 1, 0),
            (LastResort::Requeue, 0, 0, 1),
        ] {
            let network = settling();
            let (service, begun, _) = failing(&network, 3, Some(policy.then(last))).await;
            let client = MemoryClient::new(&network);
            client.emit("work", 1).await.unwrap();
            eventually("it is settled", || {
                let counts = network.settlements();
                counts.dead_lettered + counts.discarded + counts.requeued == 1 && network.unsettled() == 0
            })
            .await;
            let counts = network.settlements();
            assert_eq!((counts.dead_lettered, counts.discarded, counts.requeued), (dead, gone, requeued));
            // Requeued, it came once more and succeeded.
            assert_eq!(begun.load(Ordering::SeqCst), 3 + requeued as usize);
            end(client, service).await;
        }
    });
}

#[test]
fn of_a_retried_request_only_the_last_attempt_is_answered() {
    real(async {
        let network = settling();
        let policy = FailurePolicy::retry(3).every(ms(5));
        let (service, begun, _) = failing(&network, 2, Some(policy)).await;
        let client = MemoryClient::new(&network);
        assert_eq!(client.send::<u64>("ask", 7).await.unwrap(), 7);
        assert_eq!(begun.load(Ordering::SeqCst), 3);
        eventually("it is done", || network.settlements().done == 1).await;
        assert_eq!(client.late_replies(), 0);
        end(client, service).await;
    });
}

#[test]
fn a_caller_that_cancels_meanwhile_is_not_worked_for_again() {
    real(async {
        let network = settling();
        let policy = FailurePolicy::retry(3).every(ms(100));
        let (service, begun, retries) = failing(&network, usize::MAX, Some(policy)).await;
        let client = MemoryClient::new(&network);
        let call = actix_rt::spawn(client.send::<u64>("ask", 1).into_future());
        eventually("it waits for its retry", || retries.load(Ordering::SeqCst) == 1).await;
        call.abort();
        eventually("it is settled", || network.settlements().dead_lettered == 1).await;
        assert_eq!((begun.load(Ordering::SeqCst), network.unsettled()), (1, 0));
        eventually("its slot is free", || client.occupied() == 0).await;
        end(client, service).await;
    });
}

#[test]
fn a_request_that_is_cancelled_while_it_runs_is_done_whatever_the_policy() {
    real(async {
        let last = LastResort::DeadLetter;
        let policies = [None, Some(FailurePolicy::Requeue), Some(FailurePolicy::retry(3).then(last))];
        for policy in policies {
            let network = settling();
            let running = Arc::new(AtomicUsize::new(0));
            let run = Arc::clone(&running);
            let mut options = server_options();
            options.on_failure = policy;
            let service = Microservice::new()
                .on_current_arbiter()
                .handlers(message("endless", move || {
                    run.fetch_add(1, Ordering::SeqCst);
                    std::future::pending::<Result<(), RpcError>>()
                }))
                .server(MemoryServer::with(&network, options))
                .start()
                .await
                .unwrap();
            let client = MemoryClient::new(&network);
            let call = actix_rt::spawn(client.send::<u64>("endless", 1).into_future());
            eventually("it runs", || running.load(Ordering::SeqCst) == 1).await;
            call.abort();
            eventually("it is settled", || network.unsettled() == 0).await;
            let settled = network.settlements();
            assert_eq!((settled.done, settled.failed, settled.requeued, settled.dead_lettered), (1, 0, 0, 0));
            assert_eq!(running.load(Ordering::SeqCst), 1);
            end(client, service).await;
        }
    });
}

#[test]
fn a_stream_that_has_begun_is_not_begun_again() {
    real(async {
        let network = settling();
        let begun = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&begun);
        let mut options = server_options();
        options.on_failure = Some(FailurePolicy::retry(3).every(ms(1)).then(LastResort::Discard));
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(message("stream", move || {
                count.fetch_add(1, Ordering::SeqCst);
                let items = futures::stream::iter([Ok(1), Err(RpcError::message("broken"))]);
                std::future::ready(ok(martlet_core::TryStreaming(items)))
            }))
            .server(MemoryServer::with(&network, options))
            .start()
            .await
            .unwrap();
        let client = MemoryClient::new(&network);
        let replies: Vec<Result<u64, _>> =
            futures::StreamExt::collect(client.send::<u64>("stream", ()).stream()).await;
        assert!(matches!(&replies[..], [Ok(1), Err(_)]), "{replies:?}");
        eventually("it is discarded", || network.settlements().discarded == 1).await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        end(client, service).await;
    });
}

#[test]
fn of_several_event_handlers_only_those_that_failed_run_again() {
    real(async {
        let network = settling();
        let runs: [Arc<AtomicUsize>; 2] = [Arc::default(), Arc::default()];
        let handler = |which: usize, failures: usize| {
            let runs = Arc::clone(&runs[which]);
            event("work", move || {
                let turn = runs.fetch_add(1, Ordering::SeqCst);
                async move {
                    tokio::task::yield_now().await;
                    if turn < failures { Err(RpcError::message("not yet")) } else { Ok(()) }
                }
            })
        };
        let mut options = server_options();
        options.on_failure = Some(FailurePolicy::retry(5).every(ms(1)));
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(handler(0, 0))
            .handlers(handler(1, 3))
            .server(MemoryServer::with(&network, options))
            .start()
            .await
            .unwrap();
        let client = MemoryClient::new(&network);
        client.emit("work", 1).await.unwrap();
        eventually("it is done", || network.settlements().done == 1).await;
        assert_eq!(runs.map(|runs| runs.load(Ordering::SeqCst)), [1, 4]);
        end(client, service).await;
    });
}

#[test]
fn a_panic_and_a_policy_of_the_handlers_own() {
    real(async {
        let network = settling();
        let mut options = server_options();
        options.on_failure = Some(FailurePolicy::Requeue);
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(
                event("work", || async { panic!("asked for") as Result<(), RpcError> })
                    .on_failure(FailurePolicy::DeadLetter),
            )
            .server(MemoryServer::with(&network, options))
            .start()
            .await
            .unwrap();
        let client = MemoryClient::new(&network);
        client.emit("work", 1).await.unwrap();
        eventually("it is dead-lettered", || network.settlements().dead_lettered == 1).await;
        assert_eq!(network.settlements().requeued, 0);
        end(client, service).await;
    });
}

#[test]
fn a_message_that_waits_for_its_retry_is_handed_back_by_a_stop() {
    real(async {
        let network = settling();
        let policy = FailurePolicy::retry(3).every(Duration::from_secs(60));
        let (service, begun, retries) = failing(&network, usize::MAX, Some(policy)).await;
        let client = MemoryClient::new(&network);
        client.emit("work", 1).await.unwrap();
        eventually("it waits", || retries.load(Ordering::SeqCst) == 1).await;
        let started = tokio::time::Instant::now();
        let report = service.stop(Duration::from_secs(10)).await;
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        assert_eq!((report.handed_back(), report.clean), (1, true), "{report:?}");
        // Another service does it.
        let (other, _, _) = failing(&network, 0, None).await;
        eventually("it is done", || network.settlements().done == 1).await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        end(client, other).await;
    });
}

#[test]
fn a_policy_that_cannot_be_honoured_is_refused() {
    real(async {
        // The server's: this broker acknowledges nothing.
        let deaf = MemoryNetwork::with(MemoryOptions::broker());
        let mut options = server_options();
        options.on_failure = Some(FailurePolicy::Requeue);
        let error = Microservice::new()
            .on_current_arbiter()
            .handlers(event("work", || async { ok(()) }))
            .server(MemoryServer::with(&deaf, options))
            .start()
            .await
            .unwrap_err();
        assert!(matches!(error, StartError::FailurePolicy { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            "the failure policy of the server cannot be honoured by memory: this transporter has no acknowledgement"
        );
        // A handler's, at start and later; not if it is limited to another transporter.
        let group = || event("work", || async { ok(()) }).on_failure(FailurePolicy::DeadLetter);
        let service =
            Microservice::new().on_current_arbiter().handlers(group()).server(MemoryServer::new(&deaf));
        let error = service.start().await.unwrap_err();
        assert!(error.to_string().starts_with("the failure policy of handler work ("), "{error}");
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(group().transport(TransportId::RMQ))
            .handlers(message("stream", || async { ok(Streaming(futures::stream::iter([1]))) }))
            .server(MemoryServer::new(&deaf))
            .start()
            .await
            .unwrap();
        let error = service.registry().register(vec![group()]).await.unwrap_err();
        assert!(matches!(error, StartError::FailurePolicy { .. }), "{error}");
        service.stop(ms(100)).await;
    });
}

#[test]
fn policies_have_a_form_in_data() {
    let read = |text: &str| serde_json::from_str::<FailurePolicy>(text).unwrap();
    assert_eq!(read(r#""requeue""#), FailurePolicy::Requeue);
    assert_eq!(read(r#""deadLetter""#), FailurePolicy::DeadLetter);
    assert_eq!(read(r#""discard""#), FailurePolicy::Discard);
    assert_eq!(read(r#"{"retry":{}}"#), FailurePolicy::retry(3));
    let policy = read(r#"{"retry":{"attempts":5,"then":"requeue","delay":100}}"#);
    assert_eq!(policy, FailurePolicy::retry(5).every(ms(100)).then(LastResort::Requeue));
    let policy = read(r#"{"retry":{"delay":{"min":10,"max":2000}}}"#);
    let FailurePolicy::Retry(retry) = policy else { panic!("{policy:?}") };
    assert_eq!((retry.delay.min, retry.delay.max), (ms(10), ms(2000)));
    let error = serde_json::from_str::<FailurePolicy>(r#"{"retry":{"attempt":5}}"#).unwrap_err();
    assert!(error.to_string().contains("unknown field `attempt`, expected one of `attempts`"), "{error}");
}
