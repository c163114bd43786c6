// SPDX-License-Identifier: MIT OR Apache-2.0
//! Producers that are faster than their handlers, for a moment and for longer than the broker waits for a peer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::{
    ConnectionStatus, FailurePolicy, HandlerGroup, Microservice, RpcError, Streaming, event, message,
};
use martlet_rabbitmq::{RmqClient, RmqQueueOptions, RmqServer, RmqServerOptions, RmqSocketOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
use martlet_testkit::process::{Memory, alone};

use crate::raw::Raw;
use crate::world::{
    GRACE, client_options, dropped, serve_apart, server_options, shared_broker, unique, until,
};

/// Heartbeats that tell a session that has stopped from one that waits.
fn quick() -> RmqSocketOptions {
    RmqSocketOptions::new()
        .heartbeat_interval(Duration::from_secs(1))
        .reconnect_time(Duration::from_millis(50))
}

/// Handles `evt` once it is open, and says how many it has handled.
pub(crate) fn gated() -> (HandlerGroup, Arc<AtomicU64>, Arc<AtomicBool>) {
    let (handled, open) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, gate) = (Arc::clone(&handled), Arc::clone(&open));
    let group = event("evt", move || {
        let (count, gate) = (Arc::clone(&count), Arc::clone(&gate));
        async move {
            while !gate.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            count.fetch_add(1, Ordering::Relaxed);
            Ok::<_, RpcError>(())
        }
    });
    (group, handled, open)
}

pub(crate) async fn publish(client: &martlet_core::ClientProxy, messages: u64, bytes: usize) {
    let payload = "x".repeat(bytes);
    futures::stream::iter(0..messages)
        .map(|_| client.emit("evt", &payload))
        .buffer_unordered(100)
        .for_each(|result| async { result.unwrap() })
        .await;
}

/// A broker that gives a peer up that takes nothing for two seconds rather than fifteen.
fn impatient() -> Broker {
    let config = "tcp_listen_options.send_timeout = 2000\ntcp_listen_options.send_timeout_close = true";
    Broker::start(BrokerCommand::rabbitmq_with(config, "")).unwrap()
}

const LARGE: u64 = 2000;
const LARGE_BYTES: usize = 32 * 1024;

/// Handlers take nothing for much longer than the broker waits, of far more than the session may hold. Gives what was
/// handled, and what was reported as dropped.
async fn stall(change: impl Fn(RmqServerOptions) -> RmqServerOptions) -> (u64, u64) {
    let broker = impatient();
    let queue = unique("stall");
    let (group, handled, open) = gated();
    let until_open = Arc::clone(&open);
    let ticks = message("ticks", move || {
        let open = Arc::clone(&until_open);
        let ticks = futures::stream::unfold(0u64, move |tick| {
            let open = Arc::clone(&open);
            async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                (!open.load(Ordering::Relaxed)).then_some((tick, tick + 1))
            }
        });
        std::future::ready(Ok::<_, RpcError>(Streaming(ticks)))
    });
    let options = server_options(&broker, &queue).max_in_flight(20).receive_buffer_bytes(256 * 1024);
    let options = change(options.socket_options(quick()));
    let queue_options = options.queue_options.clone();
    let (service, reports) = serve_apart(RmqServer::new(options), [group, ticks]).await;
    let client = RmqClient::new(client_options(&broker, &queue).queue_options(queue_options.clone()));
    let mut replies = client.send::<u64>("ticks", 0).timeout(Duration::from_secs(5)).stream();
    assert_eq!(replies.next().await.unwrap().unwrap(), 0);
    let memory = Memory::watch();
    publish(&client, LARGE, LARGE_BYTES).await;
    let begin = Instant::now();
    let mut last = 0;
    while begin.elapsed() < Duration::from_secs(8) {
        // Replies go on all the while.
        last = tokio::time::timeout(Duration::from_secs(2), replies.next()).await.unwrap().unwrap().unwrap();
    }
    let most = memory.grown();
    assert!(last > 40, "{last}");
    assert_eq!(handled.load(Ordering::Relaxed), 0);
    assert_eq!(service.servers()[0].status(), Some(ConnectionStatus::Connected));
    let raw = Raw::connect(&broker).await;
    let waiting = u64::from(raw.waiting(&queue).await);
    eprintln!("{waiting} of {LARGE} wait at the broker, {} KiB more here at most", most / 1024);
    assert!(waiting > LARGE / 2, "{waiting}");
    // Of 64 MiB.
    assert!(most < 48 << 20, "{most} bytes");
    drop(replies);
    open.store(true, Ordering::Relaxed);
    let dropped = || dropped(&reports);
    let limit = Instant::now() + Duration::from_secs(30);
    while handled.load(Ordering::Relaxed) + dropped() < LARGE && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // It consumes as before.
    client.emit("evt", 1).await.unwrap();
    until("one more is handled", || handled.load(Ordering::Relaxed) + dropped() > LARGE).await;
    assert_eq!(raw.waiting(&queue).await, 0);
    assert!(!reports.contain("lost"), "{:?}", reports.all());
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
    (handled.load(Ordering::Relaxed) - 1, dropped())
}

#[actix::test]
async fn handlers_that_take_nothing_for_long_cost_neither_the_connection_nor_a_message() {
    if alone() {
        return;
    }
    // RMQ-19.
    assert_eq!(stall(|options| options).await, (LARGE, 0));
}

#[actix::test]
async fn a_queue_that_goes_with_its_last_consumer_is_kept_while_handlers_are_behind() {
    if alone() {
        return;
    }
    // RMQ-19.
    let queue = RmqQueueOptions::new().auto_delete(true);
    assert_eq!(stall(move |options| options.queue_options(queue.clone())).await, (LARGE, 0));
}

#[actix::test]
async fn what_is_beyond_the_backlog_is_dropped_and_counted() {
    if alone() {
        return;
    }
    // RMQ-19: every message was handled, or is in the count.
    let (handled, dropped) = stall(|options| options.backlog_bytes(512 * 1024)).await;
    assert_eq!(handled + dropped, LARGE);
    assert!(dropped > 0);
}

#[actix::test]
async fn what_waits_here_when_the_connection_is_lost_is_counted() {
    const IN_FLIGHT: u64 = 20;
    let mut broker = impatient();
    let queue = unique("stall-lost");
    let (group, handled, open) = gated();
    let options =
        server_options(&broker, &queue).max_in_flight(IN_FLIGHT as usize).receive_buffer_bytes(256 * 1024);
    let (service, reports) = serve_apart(RmqServer::new(options.socket_options(quick())), [group]).await;
    let client = RmqClient::new(client_options(&broker, &queue));
    publish(&client, LARGE, LARGE_BYTES).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let waiting = u64::from(Raw::connect(&broker).await.waiting(&queue).await);
    client.close().await;
    broker.stop();
    // One is with the consumer that keeps the queue.
    let lost = LARGE - waiting - IN_FLIGHT - 1;
    let words = format!("; {lost} messages that waited here are lost with it");
    until("it is said", || reports.contain(&words)).await;
    assert_eq!(handled.load(Ordering::Relaxed), 0);
    open.store(true, Ordering::Relaxed);
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_service_is_drained_while_its_handlers_are_behind() {
    let broker = impatient();
    let queue = unique("stall-drain");
    let (group, handled, open) = gated();
    let options = server_options(&broker, &queue).max_in_flight(20).receive_buffer_bytes(256 * 1024);
    let (service, reports) = serve_apart(RmqServer::new(options.socket_options(quick())), [group]).await;
    let client = RmqClient::new(client_options(&broker, &queue));
    publish(&client, LARGE, LARGE_BYTES).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let raw = Raw::connect(&broker).await;
    let waiting = u64::from(raw.waiting(&queue).await);
    let stopping = service.stop(Duration::from_secs(20));
    let (report, ()) = futures::join!(stopping, async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        open.store(true, Ordering::Relaxed);
    });
    assert!(report.clean, "{report:?}");
    // What was here is handled, what the broker kept it still has; the one that its keeper had went back.
    let left = u64::from(raw.waiting(&queue).await);
    assert!(waiting > LARGE / 2 && left >= waiting, "{waiting} {left}");
    assert_eq!(handled.load(Ordering::Relaxed) + left, LARGE, "{:?}", reports.all());
    client.close().await;
}

/// Publishes more than the service may hold, while its handlers are slow; says how much memory that took.
async fn flood(no_ack: bool) {
    const MESSAGES: u64 = 30_000;
    const BYTES: usize = 4096;
    let broker = shared_broker();
    let queue = unique("flood");
    let (group, handled, open) = gated();
    let mut server = server_options(&broker, &queue)
        .max_in_flight(50)
        .receive_buffer_bytes(256 * 1024)
        .socket_options(quick());
    if !no_ack {
        server = server.no_ack(false).on_failure(FailurePolicy::DeadLetter);
    }
    let service =
        Microservice::new().arbiters(1).handlers(group).server(RmqServer::new(server)).start().await.unwrap();
    let client = RmqClient::new(client_options(&broker, &queue));
    client.connect().await.unwrap();
    let memory = Memory::watch();
    publish(&client, MESSAGES, BYTES).await;
    // For longer than heartbeats are waited for.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let grown = memory.grown();
    assert_eq!(handled.load(Ordering::Relaxed), 0);
    let raw = Raw::connect(&broker).await;
    let waiting = raw.waiting(&queue).await;
    eprintln!("no_ack {no_ack}: {waiting} wait at the broker, {} KiB more here", grown / 1024);
    // Of 120 MiB, the broker has nearly all: what was read and what the sockets hold is all that is not there.
    assert!(u64::from(waiting) > MESSAGES * 3 / 4, "{waiting}");
    assert!(grown < 60 << 20, "{grown} bytes");
    assert_eq!(service.servers()[0].status(), Some(ConnectionStatus::Connected));
    open.store(true, Ordering::Relaxed);
    let limit = Instant::now() + Duration::from_secs(60);
    while handled.load(Ordering::Relaxed) < MESSAGES && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Nothing was dropped, nothing came twice.
    assert_eq!(handled.load(Ordering::Relaxed), MESSAGES);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
    assert_eq!(handled.load(Ordering::Relaxed), MESSAGES);
}

/// What waits in the queue comes as soon as there is a consumer: before the session takes anything.
#[actix::test]
async fn a_service_starts_on_a_full_queue() {
    const MESSAGES: u64 = 2000;
    let broker = shared_broker();
    for no_ack in [true, false] {
        let queue = unique("full");
        let client = RmqClient::new(client_options(&broker, &queue));
        publish(&client, MESSAGES, 4096).await;
        let handled = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&handled);
        let group = event("evt", move || {
            count.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok::<_, RpcError>(()))
        });
        let mut server = server_options(&broker, &queue).receive_buffer_bytes(64 * 1024);
        if !no_ack {
            server = server.no_ack(false).on_failure(FailurePolicy::DeadLetter);
        }
        let service = Microservice::new().arbiters(1).handlers(group).server(RmqServer::new(server));
        let service = tokio::time::timeout(Duration::from_secs(10), service.start()).await.unwrap().unwrap();
        let limit = Instant::now() + Duration::from_secs(30);
        while handled.load(Ordering::Relaxed) < MESSAGES && Instant::now() < limit {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(handled.load(Ordering::Relaxed), MESSAGES, "no_ack {no_ack}");
        client.close().await;
        assert!(service.stop(GRACE).await.clean);
    }
}

#[actix::test]
async fn without_acknowledgement_a_slow_handler_holds_the_broker_back() {
    if alone() {
        return;
    }
    flood(true).await;
}

#[actix::test]
async fn with_acknowledgement_the_brokers_window_holds_it_back() {
    if alone() {
        return;
    }
    flood(false).await;
}
