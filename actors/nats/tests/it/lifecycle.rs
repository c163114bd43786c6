// SPDX-License-Identifier: MIT OR Apache-2.0
//! Beginning without a broker, and stopping without grace.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::{CallError, Data, HandlerGroup, RpcError, SessionErrorKind, event};
use martlet_nats::NatsClient;
use martlet_testkit::relay::Relay;

use crate::broker::Broker;
use crate::world::{
    GRACE, call_error, client, client_options, serve, server_options, slow, start_error, sum, until,
};

#[actix::test]
async fn a_service_and_a_client_wait_for_their_first_connection_where_told() {
    let broker = Broker::start();
    // The broker's port while nobody is there yet.
    let relay = Relay::start(broker.port);
    relay.close();
    let servers = [format!("nats://127.0.0.1:{}", relay.port())];
    let server = || server_options(&broker).servers(servers.clone());
    let client = || client_options(&broker).servers(servers.clone());
    // Not told to: at once.
    let begin = Instant::now();
    assert_eq!(start_error(server()).await.0, SessionErrorKind::Refused);
    assert_eq!(call_error(client()).await.0, SessionErrorKind::Refused);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    // Told to, within its attempts.
    let attempts = 3;
    let begin = Instant::now();
    let (kind, text) =
        start_error(server().wait_on_first_connect(true).max_reconnect_attempts(attempts)).await;
    assert_eq!(kind, SessionErrorKind::Refused, "{text}");
    assert!(begin.elapsed() >= Duration::from_millis(50) * attempts as u32, "{:?}", begin.elapsed());
    let (kind, text) =
        call_error(client().wait_on_first_connect(true).max_reconnect_attempts(attempts)).await;
    assert_eq!(kind, SessionErrorKind::Refused, "{text}");
    // Told to, and the broker comes.
    let service = actix_rt::spawn(serve(server().wait_on_first_connect(true), [sum()]));
    let caller = NatsClient::new(client().wait_on_first_connect(true));
    let call = {
        let caller = caller.clone();
        actix_rt::spawn(async move {
            caller.connect().await.unwrap();
        })
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!service.is_finished() && !call.is_finished());
    relay.open();
    let (service, _) = service.await.unwrap();
    call.await.unwrap();
    assert_eq!(caller.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    caller.close().await;
    service.stop(GRACE).await;
}

fn counted(count: &Arc<AtomicU64>) -> HandlerGroup {
    let count = Arc::clone(count);
    event("evt", move |Data(millis): Data<u64>| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            Ok::<_, RpcError>(())
        }
    })
}

/// Of 100 events that have reached a service which takes one at a time: how many it handles when it is stopped.
async fn handled_of_a_hundred(graceful: bool) -> u64 {
    let broker = Broker::start();
    let count = Arc::default();
    let options = server_options(&broker).max_in_flight(1).graceful_shutdown(graceful);
    let (service, _) = serve(options, [counted(&count)]).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    for _ in 0..100 {
        raw.publish("evt", "10".into()).await.unwrap();
    }
    // A round trip: the broker has them all.
    let mut probe = raw.subscribe("probe").await.unwrap();
    raw.publish("probe", "".into()).await.unwrap();
    probe.next().await.unwrap();
    until("the first is under way", || count.load(Ordering::Relaxed) > 0).await;
    let report = service.stop(GRACE).await;
    // What it had begun is finished either way.
    assert!(report.clean, "{report:?}");
    assert_eq!(report.done(), count.load(Ordering::Relaxed));
    report.done()
}

#[actix::test]
async fn stopping_takes_in_what_has_arrived_unless_told_not_to() {
    assert_eq!(handled_of_a_hundred(true).await, 100);
    let few = handled_of_a_hundred(false).await;
    assert!((1..50).contains(&few), "{few}");
}

#[actix::test]
async fn a_request_under_way_is_answered_by_a_shutdown_that_is_not_graceful() {
    let broker = Broker::start();
    let options = server_options(&broker).max_in_flight(1).graceful_shutdown(false);
    let (service, _) = serve(options, [slow()]).await;
    let client = client(&broker);
    let send = |millis: u64| {
        let client = client.clone();
        actix_rt::spawn(
            async move { client.send::<u64>("slow", millis).timeout(Duration::from_secs(2)).await },
        )
    };
    let first = send(400);
    until("it is under way", || client.pending() == 1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = send(1);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
    assert_eq!((report.done(), first.await.unwrap().unwrap()), (1, 400));
    // The broker had delivered it, and nobody tells its caller that it was dropped.
    let second = second.await.unwrap();
    assert!(matches!(second, Err(CallError::Timeout { .. })), "{second:?}");
    client.close().await;
}
