// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starting, stopping, closing: in order, with everything accounted for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use martlet_core::{CallError, ConnectionStatus, Data, Microservice, RpcError, message};

use super::calls::slow;
use super::{DELIBERATE, Harness, Names, Stage, eventually, moment, ok, small};

/// The status of both ends, as a current value and as a stream.
pub async fn status_says_connecting_connected_closed<H: Harness>(harness: H) {
    use ConnectionStatus::{Closed, Connected, Connecting, Draining};
    let names = Names::new();
    let stage = Stage::new(harness, small().handlers(message(names.of("one"), || async { ok(1) }))).await;
    let server = stage.service.servers().remove(0);
    assert_eq!(server.status(), Some(Connected));
    assert_eq!(stage.client.status(), None);
    let client_status = stage.client.status_stream();
    stage.client.connect().await.unwrap();
    stage.client.connect().await.unwrap();
    assert_eq!(stage.client.send::<u64>(names.of("one"), 1).await.unwrap(), 1);
    let server_status = server.status_cell().stream();
    let client = stage.client.clone();
    stage.end().await;
    assert_eq!(client.status(), Some(Closed));
    assert_eq!(client_status.take(3).collect::<Vec<_>>().await, [Connecting, Connected, Closed]);
    assert_eq!(server_status.take(3).collect::<Vec<_>>().await, [Connected, Draining, Closed]);
}

/// Calls under way end as closed, later ones at once.
pub async fn a_closed_client_ends_its_calls<H: Harness>(harness: H) {
    let names = Names::new();
    let stage = Stage::new(harness, small().handlers(slow(names.of("slow")))).await;
    let call = || stage.client.send::<u64>(names.of("slow"), 300);
    let calls = futures::future::join_all((0..10).map(|_| call()));
    let (results, ()) = futures::join!(calls, async {
        moment().await;
        stage.client.close().await;
    });
    for result in results {
        assert!(matches!(result, Err(CallError::Closed)), "{result:?}");
    }
    assert!(matches!(call().await, Err(CallError::Closed)));
    assert!(matches!(stage.client.emit(names.of("slow"), 1).await, Err(CallError::Closed)));
    assert_eq!(stage.client.occupied(), 0);
    stage.client.close().await;
    stage.service.stop(Duration::from_secs(5)).await;
}

/// A client that was closed serves again after `connect`; one that waits for its calls loses none.
pub async fn a_closed_client_connects_anew<H: Harness>(harness: H) {
    let names = Names::new();
    let stage = Stage::new(harness, small().handlers(slow(names.of("slow")))).await;
    for _ in 0..5 {
        stage.client.connect().await.unwrap();
        let call = stage.client.send::<u64>(names.of("slow"), 60);
        let (reply, ()) = futures::join!(call, async {
            moment().await;
            stage.client.close_gracefully(Duration::from_secs(5)).await;
        });
        assert_eq!(reply.unwrap(), 60);
        assert_eq!(stage.client.status(), Some(ConnectionStatus::Closed));
        assert!(matches!(stage.client.send::<u64>(names.of("slow"), 1).await, Err(CallError::Closed)));
    }
    stage.end().await;
}

/// A stopping service answers what it has taken, streams included, and counts it.
pub async fn a_stop_answers_what_was_taken<H: Harness>(harness: H) {
    let names = Names::new();
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    let count = message(names.of("count"), move |Data(to): Data<u64>| {
        counted.fetch_add(1, Ordering::Relaxed);
        std::future::ready(ok(martlet_core::Streaming(stream::iter(0..to).then(|item| async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            item
        }))))
    });
    let counted = Arc::clone(&taken);
    let slow = message(names.of("slow"), move |Data(millis): Data<u64>| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            ok(millis)
        }
    });
    let stage = Stage::new(harness, Microservice::new().arbiters(2).handlers(slow).handlers(count)).await;
    let calls = futures::future::join_all((0..200).map(|_| stage.client.send::<u64>(names.of("slow"), 200)));
    let stream = stage.client.send::<u64>(names.of("count"), 60).stream().collect_all();
    let service = stage.service.clone();
    let (replies, items, report) = futures::join!(calls, stream, async {
        eventually("all are taken", || taken.load(Ordering::Relaxed) == 201).await;
        service.stop(Duration::from_secs(10)).await
    });
    for reply in replies {
        assert_eq!(reply.unwrap(), 200);
    }
    assert_eq!(items.unwrap(), (0..60).collect::<Vec<_>>());
    assert!(report.clean, "{report:?}");
    assert_eq!(report.done(), 201);
    assert_eq!(report.cause, "stop");
    // The server is gone.
    let gone = stage.client.send::<u64>(names.of("slow"), 1).timeout(Duration::from_secs(2)).await;
    assert!(gone.is_err());
    assert_eq!(stage.service.stop(Duration::ZERO).await.done(), 201, "a second stop has the same report");
    stage.client.close().await;
    assert_eq!(stage.client.occupied(), 0);
}

/// When the grace period ends, the rest is abandoned, named in the report, and its callers hear of it.
pub async fn a_stop_abandons_what_does_not_end<H: Harness>(harness: H) {
    let names = Names::new();
    let broker = harness.features().subscribes;
    let group = message(names.of("stuck"), |Data(stuck): Data<bool>| async move {
        if stuck {
            std::future::pending::<()>().await;
        }
        ok(1)
    });
    let stage = Stage::new(harness, small().handlers(group)).await;
    assert_eq!(stage.client.send::<u64>(names.of("stuck"), false).await.unwrap(), 1);
    let limit = Duration::from_secs(if broker { 1 } else { 20 });
    let call = stage.client.send::<u64>(names.of("stuck"), true).timeout(limit);
    let service = stage.service.clone();
    let (result, report) = futures::join!(call, async {
        moment().await;
        service.stop(Duration::from_millis(100)).await
    });
    match result {
        Err(CallError::Lost { .. }) => {}
        // A broker does not tell callers that a service has gone.
        Err(CallError::Timeout { .. }) if broker => {}
        other => panic!("a lost call expected, got {other:?}"),
    }
    assert_eq!(report.done(), 1);
    if report.handed_back() == 0 {
        assert!(!report.clean);
        let abandoned: Vec<_> = report.abandoned().collect();
        assert_eq!(abandoned.len(), 1, "{report:?}");
        assert_eq!(abandoned[0].route, names.of("stuck").route().as_str());
        assert!(abandoned[0].request);
        assert!(abandoned[0].why.contains("grace period"), "{}", abandoned[0].why);
    }
    stage.client.close().await;
    assert_eq!(stage.client.occupied(), 0);
}

/// A session at its in-flight bound with handlers that never end stops, too.
pub async fn a_stop_ends_a_full_service<H: Harness>(harness: H) {
    let names = Names::new();
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    let group = message(names.of("stuck"), move || {
        count.fetch_add(1, Ordering::Relaxed);
        std::future::pending::<Result<u64, RpcError>>()
    });
    let stage =
        Stage::with(harness, small().handlers(group), |server| server.max_in_flight = 2, |_| {}).await;
    let limit = Duration::from_millis(1500);
    let calls = futures::future::join_all(
        (0..6).map(|_| stage.client.send::<u64>(names.of("stuck"), 1).timeout(limit)),
    );
    let service = stage.service.clone();
    let (results, report) = futures::join!(calls, async {
        eventually("two are taken", || taken.load(Ordering::Relaxed) == 2).await;
        let stopped = service.stop(Duration::from_millis(100));
        tokio::time::timeout(Duration::from_secs(2), stopped)
            .await
            .expect("it stops when the grace period ends")
    });
    assert!(results.iter().all(Result::is_err));
    assert_eq!(report.abandoned().count() as u64 + report.handed_back(), 2, "{report:?}");
    stage.client.close().await;
    assert_eq!(stage.client.occupied(), 0);
}

/// A client whose arbiter has stopped ends its calls and starts anew on the arbiter of its next use.
pub async fn a_client_outlives_a_stopped_arbiter<H: Harness>(harness: H) {
    let names = Names::new();
    let stage = Stage::new(harness, small().handlers(slow(names.of("slow")))).await;
    let arbiter = actix_rt::Arbiter::new();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let client = stage.client.clone();
    arbiter.spawn(async move {
        let _ = sender.send(client.send::<u64>(names.of("slow"), 1).await);
    });
    assert_eq!(receiver.await.unwrap().unwrap(), 1);
    // The connection lives on that arbiter; it serves calls made here.
    assert_eq!(stage.client.send::<u64>(names.of("slow"), 2).await.unwrap(), 2);
    let call = stage.client.send::<u64>(names.of("slow"), 60_000);
    let (result, ()) = futures::join!(call, async {
        moment().await;
        arbiter.stop();
    });
    assert!(matches!(result, Err(CallError::Lost { .. })), "{result:?}");
    tokio::task::spawn_blocking(move || arbiter.join()).await.unwrap().unwrap();
    assert_eq!(stage.client.send::<u64>(names.of("slow"), 3).await.unwrap(), 3);
    assert_eq!(stage.client.occupied(), 0);
    stage.client.close().await;
    stage.service.stop(Duration::ZERO).await;
}

/// A mixture of everything, from two threads: each call one outcome, no slot left.
pub async fn a_storm_leaves_nothing_behind<H: Harness>(harness: H) {
    const CALLS: u64 = 4000;
    let names = Names::new();
    let mixed = message(names.of("mixed"), |Data(number): Data<u64>| async move {
        match number % 5 {
            0 => return Err(RpcError::message("no")),
            1 => tokio::task::yield_now().await,
            2 => tokio::time::sleep(Duration::from_millis(number % 4)).await,
            3 if number % 15 == 3 => panic!("{DELIBERATE}"),
            _ => {}
        }
        Ok(number)
    });
    let stage = Stage::new(harness, Microservice::new().arbiters(2).handlers(mixed)).await;
    let outcomes = Arc::new(AtomicUsize::new(0));
    let storm = |client: martlet_core::ClientProxy, outcomes: Arc<AtomicUsize>| async move {
        let client = &client;
        stream::iter(0..CALLS)
            .for_each_concurrent(200, |number| {
                let outcomes = Arc::clone(&outcomes);
                async move {
                    let call = client.send::<u64>(names.of("mixed"), number);
                    if number % 7 == 0 {
                        // Given up half way.
                        let _ = tokio::time::timeout(Duration::from_micros(500), call).await;
                    } else {
                        match call.await {
                            Ok(reply) => assert_eq!(reply, number),
                            Err(CallError::Remote(_)) => assert!(number % 5 == 0 || number % 15 == 3),
                            Err(other) => panic!("unexpected outcome {other}"),
                        }
                    }
                    outcomes.fetch_add(1, Ordering::Relaxed);
                }
            })
            .await;
    };
    let arbiter = actix_rt::Arbiter::new();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let there = storm(stage.client.clone(), Arc::clone(&outcomes));
    arbiter.spawn(async move {
        there.await;
        let _ = sender.send(());
    });
    storm(stage.client.clone(), Arc::clone(&outcomes)).await;
    receiver.await.expect("the other thread's storm ends well");
    assert_eq!(outcomes.load(Ordering::Relaxed) as u64, 2 * CALLS);
    arbiter.stop();
    stage.end().await;
}
