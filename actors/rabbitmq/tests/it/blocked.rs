// SPDX-License-Identifier: MIT OR Apache-2.0
//! A broker that is short of disk space and takes no messages for a while.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::ConnectionStatus;
use martlet_rabbitmq::{RmqClient, RmqSocketOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
use martlet_testkit::process::{Memory, alone};
use martlet_testkit::world::counting;
use parking_lot::Mutex;
use serde_json::value::to_raw_value;

use crate::world::{GRACE, client, client_options, serve_apart, server_options, slow, sum, unique, until};

/// From now on the broker wants so much free space.
async fn wants_free(broker: &Broker, space: &str) {
    broker.run_tool("/usr/lib/rabbitmq/bin/rabbitmqctl", &["set_disk_free_limit", space]).await.unwrap();
}

#[actix::test]
async fn publishing_to_a_broker_that_blocks_ends_in_time_and_goes_on_afterwards() {
    if alone() {
        return;
    }
    const TIMEOUT: Duration = Duration::from_millis(500);
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("blocked");
    let count = Arc::new(AtomicU64::new(0));
    let heartbeat = || RmqSocketOptions::new().heartbeat_interval(Duration::from_secs(3));
    let (service, _) = serve_apart(
        server_options(&broker, &queue).socket_options(heartbeat()),
        [sum(), slow(), counting("evt", &count)],
    )
    .await;
    let emitter =
        RmqClient::new(client_options(&broker, &queue).socket_options(heartbeat()).call_timeout(TIMEOUT));
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&told);
    emitter.events().on(move |event| sink.lock().push(event.to_string()));
    let reports = Arc::clone(&told);
    let told = |words: &str| told.lock().iter().any(|event| event.contains(words));
    let closed = client(&broker, &queue);
    let caller = client(&broker, &queue);
    for client in [&emitter, &closed, &caller] {
        assert_eq!(client.send::<i64>("sum", [1, 2]).timeout(Duration::from_secs(10)).await.unwrap(), 3);
    }
    // Its handler runs when the broker blocks; its reply waits there.
    let begun = tokio::task::spawn_local(caller.send::<u64>("slow", 5000).timeout(Duration::from_secs(60)));
    tokio::time::sleep(Duration::from_millis(200)).await;
    wants_free(&broker, "1000000GB").await;
    // Written once: a thread that is busy with writing sees no heartbeats.
    let payload = to_raw_value(&"x".repeat(256 * 1024)).unwrap();
    let (memory, begin) = (Memory::watch(), Instant::now());
    let mut outcomes = BTreeMap::<&str, u64>::new();
    // 200 MiB, 10 of them at a time; the session takes 256 KiB, what has ended waits to be cleared away.
    let mut results = futures::stream::iter(0..800)
        .map(|number| {
            let (emitter, payload) = (&emitter, &payload);
            async move {
                let begin = Instant::now();
                let result = match number % 2 {
                    0 => emitter.emit("evt", payload).await,
                    _ => emitter.send::<i64>("sum", payload).await.map(drop),
                };
                (result, begin.elapsed())
            }
        })
        .buffer_unordered(40);
    while let Some((result, took)) = results.next().await {
        let error = result.unwrap_err();
        assert!(took < TIMEOUT + Duration::from_secs(3), "{took:?}");
        *outcomes.entry(error.kind()).or_default() += 1;
    }
    drop(results);
    let most = memory.grown();
    eprintln!("{outcomes:?} in {:.1?}, {} KiB more at most", begin.elapsed(), most / 1024);
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [("timeout", 800)], "{:?}", reports.lock());
    assert!(most < 140 << 20, "{most} bytes");
    assert_eq!((emitter.pending(), emitter.occupied()), (0, 0));
    // Heartbeats go on: it is another thing than a broker that is gone.
    assert_eq!(emitter.status(), Some(ConnectionStatus::Connected));
    assert_eq!(service.servers()[0].status(), Some(ConnectionStatus::Connected));
    // A client that cannot get rid of what it has does not wait for it for ever.
    let waits = tokio::time::timeout(Duration::from_millis(100), closed.emit("evt", 1)).await;
    assert!(waits.is_err(), "{waits:?}");
    let closing = Instant::now();
    closed.close().await;
    assert!(closing.elapsed() < Duration::from_secs(10), "{:?}", closing.elapsed());
    wants_free(&broker, "1MB").await;
    until("it takes messages again", || told("the broker takes messages again")).await;
    assert!(told("the broker has blocked publishing"));
    assert_eq!(begun.await.unwrap().unwrap(), 5000);
    let mut left = 20;
    while let Err(error) = emitter.send::<i64>("sum", [1, 2]).await {
        assert!(left > 0, "{error}");
        left -= 1;
    }
    let before = count.load(Ordering::Relaxed);
    while let Err(error) = emitter.emit("evt", 1).await {
        assert!(left > 0, "{error}");
        left -= 1;
    }
    until("events are handled", || count.load(Ordering::Relaxed) > before).await;
    emitter.close().await;
    caller.close().await;
    assert!(service.stop(GRACE).await.clean);
}
