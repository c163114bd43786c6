// SPDX-License-Identifier: MIT OR Apache-2.0
//! Servers that accept peers: bounds of connections and of one connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use martlet_core::{CallError, message};
use tokio::sync::Semaphore;

use super::{Harness, Names, Stage, eventually, moment, ok, small, watch};

/// One connection too many is closed at once and reported; the others are served; a place is given back.
pub async fn connections_above_their_number_are_closed<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small().handlers(message(names.of("one"), || async { ok(1) }));
    let mut stage = Stage::with(harness, service, |server| server.max_connections = 2, |_| {}).await;
    let seen = watch(stage.service.events());
    let mut clients = vec![stage.client.clone()];
    for _ in 0..2 {
        let options = stage.harness.client_options();
        clients.push(stage.harness.client(&stage.service.url(), options));
    }
    for client in &clients[..2] {
        assert_eq!(client.send::<u64>(names.of("one"), 1).await.unwrap(), 1);
    }
    let refused = clients[2].send::<u64>(names.of("one"), 1).timeout(Duration::from_secs(5)).await;
    assert!(matches!(refused, Err(CallError::Lost { .. } | CallError::NotSent { .. })), "{refused:?}");
    assert!(seen("bound_hit") >= 1);
    assert_eq!(clients[0].send::<u64>(names.of("one"), 1).await.unwrap(), 1);
    clients[1].close().await;
    for attempt in 0.. {
        if clients[2].send::<u64>(names.of("one"), 1).await.is_ok() {
            break;
        }
        assert!(attempt < 500, "the place was not given back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    clients[2].close().await;
    stage.end().await;
}

/// At `max_in_flight` a connection is not read; another connection has places of its own.
pub async fn reading_stops_at_the_in_flight_bound<H: Harness>(harness: H) {
    let names = Names::new();
    let gate = Arc::new(Semaphore::new(0));
    let begun = Arc::new(AtomicUsize::new(0));
    let (wait, count) = (Arc::clone(&gate), Arc::clone(&begun));
    let group = message(names.of("wait"), move || {
        let wait = Arc::clone(&wait);
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            wait.acquire().await.unwrap().forget();
            ok(1)
        }
    });
    let mut stage =
        Stage::with(harness, small().handlers(group), |server| server.max_in_flight = 4, |_| {}).await;
    let options = stage.harness.client_options();
    let other = stage.harness.client(&stage.service.url(), options);
    let calls: FuturesUnordered<_> = (0..50).map(|_| stage.client.send::<u64>(names.of("wait"), 1)).collect();
    let all = calls.collect::<Vec<_>>();
    let ((), results, reply) = futures::join!(
        async {
            eventually("four of one and one of the other have begun", || begun.load(Ordering::SeqCst) == 5)
                .await;
            moment().await;
            assert_eq!(begun.load(Ordering::SeqCst), 5, "no more until one ends");
            gate.add_permits(1);
            eventually("one ended, one began", || begun.load(Ordering::SeqCst) >= 5).await;
            moment().await;
            assert!(begun.load(Ordering::SeqCst) <= 6);
            gate.add_permits(100);
        },
        all,
        other.send::<u64>(names.of("wait"), 1)
    );
    assert_eq!(reply.unwrap(), 1);
    assert!(results.into_iter().all(|result| result.is_ok()));
    other.close().await;
    stage.end().await;
}
