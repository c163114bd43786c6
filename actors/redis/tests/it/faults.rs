// SPDX-License-Identifier: MIT OR Apache-2.0
//! Brokers that vanish, freeze and come back; what cannot be slowed down; shutting down.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use martlet_core::{CallError, ConnectionStatus, Data, Microservice, RpcError, ServerHandle, event};
use martlet_redis::{RedisClient, RedisServer, RedisUnwrapped};
use martlet_testkit::relay::Relay;
use martlet_testkit::storm::stop_under_load;
use parking_lot::Mutex;

use crate::world::{GRACE, Peer, broker, client, client_options, serve, server_options, slow, sum, until};

/// Every status so far.
fn statuses(
    stream: impl futures::Stream<Item = ConnectionStatus> + Unpin + 'static,
) -> Arc<Mutex<Vec<&'static str>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let mut stream = stream;
    actix_rt::spawn(async move {
        while let Some(status) = stream.next().await {
            sink.lock().push(status.as_str());
        }
    });
    seen
}

fn is_connected(server: &ServerHandle) -> bool {
    server.status() == Some(ConnectionStatus::Connected)
}

// REDIS-20, REDIS-21.
#[actix::test]
async fn subscriptions_are_back_before_the_status_says_so() {
    let mut broker = broker();
    let (service, _) = serve(server_options(&broker), [sum(), slow()]).await;
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let server = service.servers()[0].clone();
    let (of_server, of_client) = (statuses(server.status_cell().stream()), statuses(client.status_stream()));
    for round in 0..5 {
        let pending = client.send::<u64>("slow", 5000);
        let broken = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            broker.restart().unwrap();
        };
        let (result, ()) = futures::join!(pending, broken);
        assert!(matches!(result, Err(CallError::Lost { .. })), "{result:?}");
        until("the server is back", || is_connected(&server)).await;
        let mut peer = Peer::new(&broker).await;
        assert_eq!(peer.publish("sum", "{}").await, 1, "round {round}: it is subscribed by now");
        assert_eq!(client.send::<i64>("sum", [1, round]).await.unwrap(), 1 + round);
    }
    let lost = ["reconnecting", "connected"].repeat(5);
    until("both have told", || of_server.lock().len() == 11 && of_client.lock().len() == 11).await;
    assert_eq!(of_server.lock()[1..], lost);
    assert_eq!(of_client.lock()[1..], lost);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
    // NestJS tells nothing of a close; its client is deaf when it is used again.
    let (service, _) = serve(server_options(&broker), [sum()]).await;
    client.connect().await.unwrap();
    assert_eq!(client.send::<i64>("sum", [4]).await.unwrap(), 4);
    client.close().await;
    service.stop(GRACE).await;
}

// REDIS-20.
#[actix::test]
async fn without_retry_attempts_a_client_connects_anew_at_its_next_call() {
    let mut broker = broker();
    let mut options = client_options(&broker);
    options.retry_attempts = None;
    let client = RedisClient::new(options);
    let seen = statuses(client.status_stream());
    let (service, _) = serve(server_options(&broker), [sum(), slow()]).await;
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let (pending, ()) = futures::join!(client.send::<u64>("slow", 5000), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        broker.stop();
    });
    assert!(matches!(pending, Err(CallError::Lost { .. })), "{pending:?}");
    until("it is disconnected", || client.status() == Some(ConnectionStatus::Disconnected)).await;
    let error = client.send::<i64>("sum", [1]).await.unwrap_err();
    assert!(matches!(error, CallError::NotSent { .. }), "{error}");
    broker.restart().unwrap();
    let server = service.servers()[0].clone();
    until("the server is back", || is_connected(&server)).await;
    // NestJS's client never receives a reply again.
    assert_eq!(client.send::<i64>("sum", [1, 1]).await.unwrap(), 2);
    let expected =
        ["connecting", "connected", "disconnected", "connecting", "disconnected", "connecting", "connected"];
    until("all was told", || seen.lock().len() == expected.len()).await;
    assert_eq!(*seen.lock(), expected);
    client.close().await;
    service.stop(GRACE).await;
}

// REDIS-20.
#[actix::test]
async fn a_server_gives_up_after_its_attempts() {
    for (attempts, expected) in [(None, 1), (Some(1), 1), (Some(3), 3)] {
        let mut broker = broker();
        let mut options = server_options(&broker);
        options.retry_attempts = attempts;
        let (service, reports) = serve(options, [sum()]).await;
        let server = service.servers()[0].clone();
        let begin = Instant::now();
        broker.stop();
        until("it has given up", || reports.contain("gave up")).await;
        assert_eq!(server.status(), Some(ConnectionStatus::Disconnected));
        assert!(begin.elapsed() >= Duration::from_millis(50 * expected), "{:?}", begin.elapsed());
        let refused = reports.all().iter().filter(|event| event.contains("cannot be reached")).count() as u64;
        // Each attempt, and the giving up.
        assert!(refused >= expected && refused <= expected + 1, "{attempts:?}: {:?}", reports.all());
        service.stop(GRACE).await;
    }
}

// REDIS-20.
#[actix::test]
async fn a_client_that_gave_up_tries_again_at_its_next_call() {
    let mut broker = broker();
    let client = RedisClient::new(client_options(&broker).retry_attempts(2));
    client.connect().await.unwrap();
    broker.stop();
    until("it has given up", || client.status() == Some(ConnectionStatus::Disconnected)).await;
    assert!(matches!(client.send::<i64>("sum", [1]).await, Err(CallError::NotSent { .. })));
    broker.restart().unwrap();
    let (service, _) = serve(server_options(&broker), [sum()]).await;
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
}

// REDIS-17.
#[actix::test]
async fn a_frozen_broker_is_noticed() {
    let broker = broker();
    let quick = Duration::from_millis(150);
    let (service, reports) = serve(server_options(&broker).ping_interval(quick), [sum()]).await;
    let client = RedisClient::new(client_options(&broker).ping_interval(quick));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    broker.freeze().unwrap();
    let begin = Instant::now();
    let lost = client.send::<i64>("sum", [1]).await.unwrap_err();
    assert!(matches!(lost, CallError::Lost { .. }), "{lost}");
    assert!(lost.to_string().contains("did not answer within 150ms"), "{lost}");
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    until("the server notices", || reports.contain("did not answer within 150ms")).await;
    broker.thaw().unwrap();
    let server = service.servers()[0].clone();
    until("the server is back", || is_connected(&server)).await;
    until("the client is back", || client.status() == Some(ConnectionStatus::Connected)).await;
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_short_freeze_loses_nothing() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker), [sum()]).await;
    let client = client(&broker);
    client.connect().await.unwrap();
    let calls = join_all((0..2000i64).map(|number| {
        let client = client.clone();
        async move { client.send::<i64>("sum", [number, 1]).await.map(|sum| assert_eq!(sum, number + 1)) }
    }));
    let freeze = async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        broker.freeze().unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        broker.thaw().unwrap();
    };
    let (results, ()) = futures::join!(calls, freeze);
    results.into_iter().for_each(|result| result.unwrap());
    assert_eq!(client.occupied(), 0);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

// REDIS-17: an idle connection is not cut by the broker's own limit, and one that was cut is noticed without a
// call.
#[actix::test]
async fn either_connection_lost_alone_ends_the_session() {
    let broker = broker();
    let options = server_options(&broker).ping_interval(Duration::from_millis(100));
    let (service, _) = serve(options, [sum()]).await;
    let client = RedisClient::new(client_options(&broker).ping_interval(Duration::from_millis(100)));
    client.connect().await.unwrap();
    let server = service.servers()[0].clone();
    let mut peer = Peer::new(&broker).await;
    for kind in ["normal", "pubsub", "normal"] {
        let before = server.unwrap::<RedisUnwrapped>().unwrap().1.client_id();
        let _: i64 = redis::cmd("CLIENT")
            .arg(&["KILL", "TYPE", kind, "SKIPME", "yes"])
            .query_async(&mut peer.commands)
            .await
            .unwrap();
        until("a new session", || {
            server.unwrap::<RedisUnwrapped>().is_some_and(|connections| connections.1.client_id() > before)
        })
        .await;
        until("the client is back", || client.status() == Some(ConnectionStatus::Connected)).await;
        let mut last = None;
        for _ in 0..100 {
            last = Some(client.send::<i64>("sum", [1]).await);
            if matches!(last, Some(Ok(1))) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(matches!(last, Some(Ok(1))), "{kind}: {last:?}");
    }
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

// REDIS-18.
#[actix::test]
async fn what_a_slow_handler_cannot_take_is_dropped_counted_and_reported() {
    const SENT: u64 = 60_000;
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
    let options = server_options(&broker).subscription_capacity(500).max_in_flight(10);
    let (service, reports) = serve(options, [slow, sum()]).await;
    let server = service.servers()[0].clone();
    let subscriber = server.unwrap::<RedisUnwrapped>().unwrap().1.clone();
    // So much would not fit into the broker's buffer for a subscriber (32 MiB).
    let body = "x".repeat(1000);
    let producing = {
        let broker_url = broker.url();
        tokio::task::spawn_blocking(move || {
            let mut connection = redis::Client::open(broker_url).unwrap().get_connection().unwrap();
            for _ in 0..SENT / 100 {
                let mut pipeline = redis::pipe();
                for _ in 0..100 {
                    pipeline.cmd("PUBLISH").arg("load").arg(&body).ignore();
                }
                pipeline.exec(&mut connection).unwrap();
            }
        })
    };
    let mut most = 0;
    while !producing.is_finished() {
        most = most.max(subscriber.waiting());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    producing.await.unwrap();
    until("all are handled or dropped", || handled.load(Ordering::Relaxed) + subscriber.dropped() == SENT)
        .await;
    assert!(most <= 500, "{most}");
    assert!(subscriber.dropped() > SENT / 2, "{}", subscriber.dropped());
    assert!(is_connected(&server), "the broker did not cut it off");
    assert_eq!(server.unwrap::<RedisUnwrapped>().unwrap().1.client_id(), subscriber.client_id());
    until("it is reported", || reports.contain("were dropped")).await;
    // The reports add up: the last one has the sum.
    let told = format!("({} in this session) were dropped", subscriber.dropped());
    until("the sum is reported", || reports.contain(&told)).await;
    assert!(reports.contain("the limit of subscriptionCapacity, 500"), "{:?}", reports.all().last());
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
}

// REDIS-18: the same by bytes.
#[actix::test]
async fn waiting_messages_are_bounded_in_bytes_too() {
    let broker = broker();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let open = Arc::clone(&gate);
    let handled = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&handled);
    let shut = event("load", move |Data(_): Data<String>| {
        let (open, count) = (Arc::clone(&open), Arc::clone(&count));
        async move {
            open.acquire().await.unwrap().forget();
            count.fetch_add(1, Ordering::Relaxed);
            Ok::<_, RpcError>(())
        }
    });
    let options = server_options(&broker).subscription_bytes(100_000).max_in_flight(1);
    let (service, reports) = serve(options, [shut]).await;
    let subscriber = service.servers()[0].unwrap::<RedisUnwrapped>().unwrap().1.clone();
    let mut peer = Peer::new(&broker).await;
    for _ in 0..20 {
        peer.publish("load", "x".repeat(20_000)).await;
    }
    // One in work, four wait.
    until("the rest is dropped", || subscriber.dropped() == 15).await;
    gate.add_permits(100);
    until("what waited is handled", || handled.load(Ordering::Relaxed) == 5).await;
    peer.publish("load", "x").await;
    until("there is room again", || handled.load(Ordering::Relaxed) == 6).await;
    assert!(reports.contain("subscriptionBytes, 100000"), "{:?}", reports.all());
    service.stop(GRACE).await;
}

// REDIS-19.
#[actix::test]
async fn what_was_received_before_a_stop_is_answered() {
    let broker = broker();
    stop_under_load(
        || RedisServer::new(server_options(&broker)),
        |_| client(&broker),
        |error| matches!(error, CallError::NoHandler { .. }),
    )
    .await;
}

#[actix::test]
async fn a_stop_does_not_wait_for_a_frozen_broker() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker), [sum()]).await;
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    broker.freeze().unwrap();
    let begin = Instant::now();
    let emitted = client.emit("sum", [1]);
    client.close().await;
    // REDIS-2: it resolves when the broker has it.
    assert!(matches!(emitted.await, Err(CallError::Closed)));
    service.stop(Duration::from_secs(1)).await;
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    broker.thaw().unwrap();
}

// REDIS-16: a cancelled call reaches its handler, one that was not published yet is not published.
#[actix::test]
async fn a_cancelled_call_stops_its_handler() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker), [slow()]).await;
    let client = client(&broker);
    let mut peer = Peer::listening(&broker, &["_MARTLET.cancel.slow", "slow"]).await;
    let call = client.send::<u64>("slow", 60_000).timeout(Duration::from_millis(50));
    assert!(matches!(call.await, Err(CallError::Timeout { .. })));
    let (channel, request) = peer.next().await;
    assert_eq!(channel, "slow");
    let id = serde_json::from_str::<serde_json::Value>(&request).unwrap()["id"].to_string();
    assert_eq!(peer.next().await, ("_MARTLET.cancel.slow".to_owned(), id));
    // It would wait for the handler.
    let report = service.stop(GRACE).await;
    assert!(report.clean && report.abandoned().count() == 0, "{report:?}");
    client.close().await;
}

/// Two transporters of one service: one loses its line again and again, the other does not notice.
#[actix::test]
async fn a_service_on_two_brokers_is_not_disturbed_by_the_loss_of_one() {
    let (steady, shaky) = (broker(), broker());
    let relay = Relay::start(shaky.port());
    let service = Microservice::new()
        .arbiters(1)
        .handlers(sum())
        .server(RedisServer::new(server_options(&steady)))
        .server(RedisServer::new(server_options(&shaky).url(format!("redis://127.0.0.1:{}", relay.port()))))
        .start()
        .await
        .unwrap();
    let (calm, other) = (client(&steady), client(&shaky));
    for round in 0..300i64 {
        if round % 30 == 0 {
            relay.cut();
        }
        assert_eq!(calm.send::<i64>("sum", [round, 1]).await.unwrap(), round + 1);
    }
    let servers = service.servers();
    until("both are connected", || servers.iter().all(is_connected)).await;
    assert_eq!(other.send::<i64>("sum", [1, 1]).await.unwrap(), 2);
    calm.close().await;
    other.close().await;
    assert!(service.stop(GRACE).await.clean);
}
