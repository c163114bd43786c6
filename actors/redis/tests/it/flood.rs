// SPDX-License-Identifier: MIT OR Apache-2.0
//! Producers that are faster than their handlers: pub/sub cannot be slowed, so what waits is bounded and the rest is
//! dropped (REDIS-18), and the process does not grow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use martlet_core::{ConnectionStatus, Data, RpcError, event};
use martlet_redis::{RedisServerOptions, RedisUnwrapped};
use martlet_testkit::broker::Broker;
use martlet_testkit::process::{Memory, alone};

use crate::world::{GRACE, broker, serve, server_options, until};

/// Publishes bodies of so many bytes, in pipelines, until `done`; says how many.
fn publish_until(broker: &Broker, bytes: usize, done: impl Fn(u64) -> bool) -> u64 {
    let mut connection = redis::Client::open(broker.url()).unwrap().get_connection().unwrap();
    let body = "x".repeat(bytes);
    let batch = 100_000 / (bytes + 100) + 1;
    let mut sent = 0;
    while !done(sent) {
        let mut pipeline = redis::pipe();
        for _ in 0..batch {
            pipeline.cmd("PUBLISH").arg("load").arg(&body).ignore();
        }
        pipeline.exec(&mut connection).unwrap();
        sent += batch as u64;
    }
    sent
}

/// A producer of bodies of so many bytes against a handler that takes a millisecond for each message, one at a time.
/// Gives how much the process has grown at most, once `enough` were handled.
async fn flood(bytes: usize, enough: u64, change: impl Fn(RedisServerOptions) -> RedisServerOptions) -> u64 {
    let broker = broker();
    let handled = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&handled);
    let slow = event("load", move |Data(_): Data<String>| {
        let count = Arc::clone(&count);
        async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            count.fetch_add(1, Ordering::Relaxed);
            Ok::<_, RpcError>(())
        }
    });
    let (service, reports) = serve(change(server_options(&broker)).max_in_flight(1), [slow]).await;
    let server = service.servers()[0].clone();
    let subscriber = server.unwrap::<RedisUnwrapped>().unwrap().1.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, seen, taken) = (Arc::clone(&stop), subscriber.clone(), Arc::clone(&handled));
    let memory = Memory::watch();
    let producing = tokio::task::spawn_blocking(move || {
        let sent = publish_until(&broker, bytes, |sent| {
            // The broker cuts off a subscriber that it owes more than 32 MiB.
            let arrived = || seen.dropped() + seen.waiting() + taken.load(Ordering::Relaxed);
            while (sent - arrived().min(sent)) * (bytes as u64 + 100) > 4 << 20 {
                std::thread::sleep(Duration::from_millis(1));
            }
            stopped.load(Ordering::Relaxed)
        });
        (broker, sent)
    });
    let limit = Instant::now() + Duration::from_secs(60);
    while handled.load(Ordering::Relaxed) < enough && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let most = memory.grown();
    stop.store(true, Ordering::Relaxed);
    let (broker, sent) = producing.await.unwrap();
    until("all are handled or dropped", || handled.load(Ordering::Relaxed) + subscriber.dropped() == sent)
        .await;
    eprintln!("{sent} of {bytes} bytes, {} dropped, {} KiB more at most", subscriber.dropped(), most / 1024);
    assert!(handled.load(Ordering::Relaxed) >= enough);
    assert!(subscriber.dropped() > sent / 2, "{} of {sent}", subscriber.dropped());
    assert_eq!(server.status(), Some(ConnectionStatus::Connected));
    // The reports add up: the last one has the sum.
    let told = format!("({} in this session) were dropped", subscriber.dropped());
    until("the sum is reported", || reports.contain(&told)).await;
    assert!(service.stop(GRACE).await.clean);
    drop(broker);
    most
}

#[actix::test]
async fn small_messages_that_wait_hold_no_more_than_themselves() {
    if alone() {
        return;
    }
    // 2000 that wait take less than 1 MiB. If each kept what it was read with, they would take 64 KiB each.
    let most = flood(100, 5000, |options| options.subscription_capacity(2000)).await;
    assert!(most < 40 << 20, "{most} bytes");
}

#[actix::test]
async fn large_messages_that_wait_are_bounded_in_bytes() {
    if alone() {
        return;
    }
    let most = flood(16 * 1024, 2000, |options| options.subscription_bytes(8 << 20)).await;
    assert!(most < 40 << 20, "{most} bytes");
}
