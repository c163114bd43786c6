// SPDX-License-Identifier: MIT OR Apache-2.0
//! What RabbitMQ alone has: queues that are shared, exchanges, acknowledgements.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet::rabbitmq::RmqContext;
use martlet::{Ctx, Data, RpcError, event};
use serde_json::{Value, json};

use crate::behaviours;
use crate::pair::{Pair, Place, start_service};
use crate::peer::eventually;
use crate::service::{Process, Service, cmd};
use crate::wire::Transport;

fn on_rmq(_: u32, transport: Transport) -> bool {
    transport == Transport::Rmq
}

fn with_acks(_: u32, transport: Transport) -> bool {
    transport == Transport::RmqAcks
}

/// NestJS 10 knows neither exchanges nor wildcards.
fn with_exchanges(version: u32, transport: Transport) -> bool {
    transport == Transport::Rmq && version >= 11
}

fn without_wildcards(version: u32, transport: Transport) -> bool {
    transport == Transport::Rmq && version == 10
}

fn with_wildcards(_: u32, transport: Transport) -> bool {
    transport == Transport::RmqWildcards
}

behaviours! { TO_MARTLET:
    "two services on one queue: each message once" [on_rmq] queue_shared,
    "topic exchange with a routing key" [with_exchanges] topic_exchange,
    "fanout exchange: every service gets it" [with_exchanges] fanout_exchange,
    "headers exchange: requests go to the queue" [with_exchanges] headers_exchange,
    "a client without wildcards calls a service with them" [without_wildcards] through_the_queue,
    "the broker's wildcards, where NestJS matches less" [with_wildcards] wildcards_of_the_broker,
    "the handler acknowledges: nack, then ack" [with_acks] acknowledged_by_hand,
    "killed in mid-call: the next service gets the message" [with_acks] delivered_again,
    "a failing handler is tried again, then the message goes to the dead-letter exchange" [with_acks] retried,
    "a reply queue of the client's own" [on_rmq] reply_queue,
}

behaviours! { TO_NEST:
    "two services on one queue: each message once" [on_rmq] queue_shared_in_nest,
    "topic exchange with a routing key" [with_exchanges] topic_exchange_in_nest,
    "fanout exchange: every service gets it" [with_exchanges] fanout_exchange_in_nest,
    "headers exchange: requests go to the queue" [with_exchanges] headers_exchange_in_nest,
    "killed in mid-call: the next service gets the message" [with_acks] delivered_again_in_nest,
    "a reply queue of the client's own" [on_rmq] reply_queue_to_nest,
}

/// A place whose ends have these options; `name` makes the exchange unique.
async fn exchange(pair: &Pair, name: &str, kind: &str, more: Value) -> Place {
    let place = pair.elsewhere().await;
    let name = format!("{name}-{}", place.queue);
    place.with(json!({ "exchange": name, "exchangeType": kind })).with(more)
}

/// Ends with a queue that the broker names, one for each service.
fn queueless(place: &Place) -> Place {
    place.queue("").with(json!({ "queueOptions": { "exclusive": true } }))
}

// === a NestJS client calls our service ===

async fn queue_shared(pair: &Pair) {
    let place = pair.elsewhere().await;
    let (_, one) = start_service("one", &place).await;
    let (_, two) = start_service("two", &place).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    for i in 0..60 {
        nest.emit(json!("notification"), json!(i)).await;
    }
    let counts = || [&one, &two].map(|service| service.seen.notifications.load(Ordering::SeqCst));
    eventually("60 events", || async { counts().iter().sum::<u64>() >= 60 }).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(counts(), [30, 30]);
    one.stop().await;
    // The one that is left gets everything.
    for _ in 0..10 {
        nest.send(json!("whoami"), json!(1)).await.completes(json!(["two"]));
    }
    drop(nest);
    two.stop().await;
}

async fn topic_exchange(pair: &Pair) {
    let place = exchange(pair, "topic", "topic", json!({ "routingKey": "to.#" })).await;
    let (_, service) = start_service("ours", &place).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.send(json!({ "cmd": "sum" }), json!([1, 2])).await.completes(json!([3]));
    let packet = json!({ "pattern": "notification", "data": 1 }).to_string();
    let address = json!({ "exchange": place.options["exchange"], "address": "to.any.where", "text": packet });
    nest.raw(address).await;
    eventually("the event", || async { service.seen.notifications.load(Ordering::SeqCst) == 1 }).await;
    drop(nest);
    service.stop().await;
}

async fn fanout_exchange(pair: &Pair) {
    let place = queueless(&exchange(pair, "fanout", "fanout", json!({})).await);
    let (_, one) = start_service("one", &place).await;
    let (_, two) = start_service("two", &place).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    // Both answer, the first one counts.
    nest.send(json!({ "cmd": "sum" }), json!([1, 2])).await.completes(json!([3]));
    for i in 0..10 {
        nest.emit(json!("notification"), json!(i)).await;
    }
    let counts = || [&one, &two].map(|service| service.seen.notifications.load(Ordering::SeqCst));
    eventually("the events", || async { counts() == [10, 10] }).await;
    drop(nest);
    one.stop().await;
    two.stop().await;
}

async fn headers_exchange(pair: &Pair) {
    let place = exchange(pair, "headers", "headers", json!({})).await;
    let (_, service) = start_service("ours", &place).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    let more = json!({ "headers": { "to": "sum" } });
    nest.send_with(json!({ "cmd": "sum" }), json!([1, 2]), more).await.completes(json!([3]));
    drop(nest);
    service.stop().await;
}

/// NestJS 10 publishes to the queue, whatever its options say.
async fn through_the_queue(pair: &Pair) {
    let place = pair.elsewhere().await.with(json!({ "wildcards": true }));
    let service = Service::start("ours", Transport::RmqWildcards, place.server(), None).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.send(json!({ "cmd": "sum" }), json!([1, 2])).await.completes(json!([3]));
    nest.send(json!("time.us.east"), json!(1)).await.completes(json!(["time.us.east"]));
    nest.emit(json!("wildEvent.x"), json!(1)).await;
    eventually("the event", || async { *service.seen.subjects.lock().unwrap() == ["wildEvent.x"] }).await;
    drop(nest);
    service.stop().await;
}

async fn wildcards_of_the_broker(pair: &Pair) {
    let place = pair.elsewhere().await;
    let more = ["a.#.c", "#.tail"]
        .map(|pattern| martlet::message(pattern, move || async move { Ok::<_, RpcError>(pattern) }));
    let service = Service::with("ours", place.transport, place.server(), None, more.to_vec()).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    for address in ["a.c", "a.b.c", "a.b.b.c"] {
        nest.send(json!(address), json!(1)).await.completes(json!(["a.#.c"]));
    }
    for address in ["tail", "x.tail", "x.y.tail"] {
        nest.send(json!(address), json!(1)).await.completes(json!(["#.tail"]));
    }
    // No word at all.
    nest.send(json!("wild"), json!(1)).await.completes(json!(["wild"]));
    drop(nest);
    service.stop().await;
}

async fn acknowledged_by_hand(pair: &Pair) {
    let deliveries = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&deliveries);
    let by_hand = event("byHand", move |Ctx(context): Ctx<RmqContext>| {
        let counter = Arc::clone(&counter);
        async move {
            let delivery = counter.fetch_add(1, Ordering::SeqCst);
            assert_eq!(context.redelivered(), delivery > 0);
            if delivery < 2 { context.nack(true) } else { context.ack() }.map_err(RpcError::unexpected)
        }
    });
    let place = pair.elsewhere().await;
    let server = place.server_with(json!({ "onFailure": null }));
    let service = Service::with("ours", place.transport, server, None, vec![by_hand]).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.emit(json!("byHand"), json!(1)).await;
    eventually("three deliveries", || async { deliveries.load(Ordering::SeqCst) == 3 }).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(deliveries.load(Ordering::SeqCst), 3);
    service.stop().await;
    // It was acknowledged: nobody gets it again.
    let (_, next) = start_service("next", &place).await;
    nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    assert_eq!(next.take_events(), Vec::<&str>::new());
    drop(nest);
    next.stop().await;
}

async fn delivered_again(pair: &Pair) {
    let place = pair.elsewhere().await;
    let process = Process::start(&place);
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.send(json!("whoami"), json!(1)).await.completes(json!(["process"]));
    let pending: Vec<_> = (0..5)
        .map(|_| nest.begin_send(json!("slow"), json!({ "ms": 500 }), json!({ "timeout": 20_000 })))
        .collect();
    nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    drop(process);
    let (_, service) = start_service("next", &place).await;
    for sent in pending {
        sent.await.completes(json!([500]));
    }
    assert_eq!(service.seen.slow_begun.load(Ordering::SeqCst), 5);
    drop(nest);
    service.stop().await;
}

async fn retried(pair: &Pair) {
    let attempts = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&attempts);
    let failing = event("failing", move |Data(_): Data<Value>| {
        counter.fetch_add(1, Ordering::SeqCst);
        async { Err::<(), _>(RpcError::message("boom")) }
    });
    // The dead letters come to a queue that a second service serves.
    let letters = pair.elsewhere().await;
    let exchange = format!("dead-{}", letters.queue);
    let bound = json!({ "exchange": exchange, "exchangeType": "topic", "routingKey": "#", "noAck": true, "onFailure": null });
    let dead = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&dead);
    let collecting = event("failing", move |Ctx(context): Ctx<RmqContext>| {
        assert!(context.header("x-death").is_some());
        counter.fetch_add(1, Ordering::SeqCst);
        async { Ok::<_, RpcError>(()) }
    });
    let server = letters.server_with(bound);
    let undertaker = Service::with("dead", letters.transport, server, None, vec![collecting]).await;

    let place = pair.elsewhere().await.with(json!({ "queueOptions": { "deadLetterExchange": exchange } }));
    let policy =
        json!({ "retry": { "attempts": 2, "delay": { "min": 10, "max": 20 }, "then": "deadLetter" } });
    let server = place.server_with(json!({ "onFailure": policy }));
    let service = Service::with("ours", place.transport, server, None, vec![failing]).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.emit(json!("failing"), json!(1)).await;
    eventually("the dead letter", || async { dead.load(Ordering::SeqCst) == 1 }).await;
    assert_eq!(attempts.load(Ordering::SeqCst), 3);
    nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    drop(nest);
    service.stop().await;
    undertaker.stop().await;
}

async fn reply_queue(pair: &Pair) {
    let place = pair.elsewhere().await;
    let (_, service) = start_service("ours", &place).await;
    // A client of ours without a queue of its own declares none: a server does.
    let replies = place.queue(&format!("{}-replies", place.queue));
    let holder = Service::start("replies", replies.transport, replies.server(), None).await;
    holder.stop().await;
    let options = json!({ "replyQueue": replies.queue }).to_string();
    let nest = place.nest(pair.version, "client", &["--options", &options]).await;
    // A client of 11 or 12 consumes twice, on two channels: the last item of a stream may overtake the others.
    if pair.version == 10 {
        nest.send(json!({ "cmd": "streaming" }), json!([1, 2, 3])).await.completes(json!([1, 2, 3]));
    }
    let sums = nest.call("batch", json!({ "n": 200 })).await;
    assert_eq!(sums["ok"], 200, "{sums}");
    drop(nest);
    service.stop().await;
}

// === our client calls a NestJS service ===

async fn queue_shared_in_nest(pair: &Pair) {
    let place = pair.elsewhere().await;
    let one = place.nest(pair.version, "server", &[]).await;
    let two = place.nest(pair.version, "server", &[]).await;
    let client = place.client();
    for i in 0..60 {
        client.emit("notification", i).await.unwrap();
    }
    let notified = |stats: Value| stats["notifications"].as_u64().unwrap();
    eventually("60 events", || async {
        (notified(one.stats().await), notified(two.stats().await)) == (30, 30)
    })
    .await;
    client.close().await;
}

async fn topic_exchange_in_nest(pair: &Pair) {
    let place = exchange(pair, "topic", "topic", json!({ "routingKey": "to.#" })).await;
    let nest = place.nest(pair.version, "server", &[]).await;
    let client = place.client();
    assert_eq!(client.send::<i64>(cmd("sum"), [1, 2]).await.unwrap(), 3);
    client.close().await;
    nest.expect_errors(0).await;
}

async fn fanout_exchange_in_nest(pair: &Pair) {
    let place = queueless(&exchange(pair, "fanout", "fanout", json!({})).await);
    let one = place.nest(pair.version, "server", &[]).await;
    let two = place.nest(pair.version, "server", &[]).await;
    let client = place.client();
    assert_eq!(client.send::<i64>(cmd("sum"), [1, 2]).await.unwrap(), 3);
    for i in 0..10 {
        client.emit("notification", i).await.unwrap();
    }
    eventually("the events", || async {
        one.stats().await["notifications"] == 10 && two.stats().await["notifications"] == 10
    })
    .await;
    client.close().await;
}

async fn headers_exchange_in_nest(pair: &Pair) {
    let place = exchange(pair, "headers", "headers", json!({})).await;
    let nest = place.nest(pair.version, "server", &[]).await;
    let client = place.client();
    let record = martlet::Record::new([1, 2]).header("to", "sum");
    assert_eq!(client.send::<i64>(cmd("sum"), record).await.unwrap(), 3);
    client.close().await;
    nest.expect_errors(0).await;
}

async fn delivered_again_in_nest(pair: &Pair) {
    let place = pair.elsewhere().await;
    let first = place.nest(pair.version, "server", &[]).await;
    let client = place.client();
    client.connect().await.unwrap();
    let pending = {
        let client = client.clone();
        actix_rt::spawn(async move { client.send::<u64>("slow", json!({ "ms": 500 })).await })
    };
    eventually("the call to run", || async { first.stats().await["slowRunning"] == 1 }).await;
    first.kill();
    let second = place.nest(pair.version, "server", &[]).await;
    assert_eq!(pending.await.unwrap().unwrap(), 500);
    second.expect_errors(0).await;
    client.close().await;
}

async fn reply_queue_to_nest(pair: &Pair) {
    let replies = pair.place.queue(&format!("{}-replies", pair.place.queue));
    let holder = Service::start("replies", replies.transport, replies.server(), None).await;
    holder.stop().await;
    let client = pair.place.client_with(json!({ "replyQueue": replies.queue }));
    let items = client.send::<i64>(cmd("streaming"), [1, 2, 3]).stream().collect_all().await.unwrap();
    assert_eq!(items, [1, 2, 3]);
    assert_eq!(client.send::<i64>(cmd("sum"), [1, 2]).await.unwrap(), 3);
    client.close().await;
}
