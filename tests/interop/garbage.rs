// SPDX-License-Identifier: MIT OR Apache-2.0
//! What others may put on the wire: it harms nobody else. (Over TCP: see `failures.rs`.)

use std::time::Duration;

use serde_json::{Value, json};

use crate::behaviours;
use crate::pair::Pair;
use crate::peer::eventually;
use crate::wire::Transport;

/// NATS has its own tests: NestJS 10 and 11 end on what is not JSON.
fn with_channels(_: u32, transport: Transport) -> bool {
    transport.is_redis() || transport.is_mqtt()
}

fn on_brokers(version: u32, transport: Transport) -> bool {
    with_channels(version, transport) || transport.is_rmq()
}

fn on_rmq(_: u32, transport: Transport) -> bool {
    transport.is_rmq()
}

behaviours! { TO_MARTLET:
    "garbage among the requests" [on_brokers] among_requests,
    "a reply address that the broker refuses" [on_rmq] refused_reply_address,
}

behaviours! { TO_NEST:
    "garbage among the replies" [with_channels] among_replies,
}

/// No JSON, half of it, too deep, the wrong kinds, a huge one; no text at all.
fn garbage() -> Vec<Value> {
    let mut texts: Vec<String> = [
        "",
        "not json",
        "{",
        "{\"pattern\":\"echo\",\"data\":[1,",
        "[]",
        "null",
        "17",
        "\"text\"",
        "{}",
        "{\"id\":{\"a\":[1]},\"data\":1}",
        "{\"pattern\":{\"a\":null},\"data\":{},\"id\":[]}",
        "{\"pattern\":null,\"id\":0}",
        "{\"id\":\"\",\"data\":null}",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.push("[".repeat(100_000));
    texts.push(format!("{{\"pattern\":\"echo\",\"data\":\"{}\",\"id\":1e400}}", "x".repeat(300_000)));
    let mut all: Vec<Value> = texts.into_iter().map(|text| json!({ "text": text })).collect();
    all.push(json!({ "base64": "//79/A==" }));
    all
}

/// Where requests of a pattern are published to.
fn address(pair: &Pair, pattern: &str) -> Value {
    match pair.transport {
        Transport::RmqWildcards => json!({ "exchange": pair.place.queue, "address": pattern }),
        _ if pair.transport.is_rmq() => json!({ "address": pair.place.queue }),
        _ => json!({ "address": pattern }),
    }
}

async fn publish(nest: &crate::peer::Peer, to: &Value, what: Value) {
    let mut command = to.clone();
    crate::wire::lay_over(&mut command, what);
    nest.raw(command).await;
}

async fn among_requests(pair: &Pair) {
    pair.ours().take_events();
    let pending = pair.nest.begin_send(json!("slow"), json!({ "ms": 300 }), json!({}));
    let to = address(pair, "echo");
    let publisher = pair.place.nest(pair.version, "client", &[]).await;
    for what in garbage() {
        publish(&publisher, &to, what).await;
    }
    pending.await.completes(json!([300]));
    pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    // Nobody's connection was lost over it.
    let reported = pair.ours().take_events();
    assert!(!reported.contains(&"session"), "{reported:?}");
}

/// The broker closes the channel that publishes there; a NestJS service ends. Ours is back in a moment.
async fn refused_reply_address(pair: &Pair) {
    let mut to = address(pair, "echo");
    to["properties"] = json!({ "correlationId": "c", "replyTo": "amq.rabbitmq.reply-to.garbage" });
    let publisher = pair.place.nest(pair.version, "client", &[]).await;
    let request = json!({ "pattern": "echo", "data": 1, "id": "c" }).to_string();
    publish(&publisher, &to, json!({ "text": request })).await;
    // A queue that does not exist, and none at all.
    to["properties"] = json!({ "correlationId": "c", "replyTo": "no.such.queue" });
    publish(&publisher, &to, json!({ "text": request })).await;
    to["properties"] = json!({});
    publish(&publisher, &to, json!({ "text": request })).await;
    eventually("the service to answer", || async {
        let sent = pair.nest.send_with(json!("echo"), json!(1), json!({ "timeout": 300 })).await;
        sent.0["items"] == json!([1])
    })
    .await;
    pair.ours().take_events();
}

async fn among_replies(pair: &Pair) {
    let client = pair.client().clone();
    let pending = actix_rt::spawn(async move { client.send::<u64>("slow", json!({ "ms": 500 })).await });
    eventually("the call to run", || async { pair.nest.stats().await["slowRunning"] == 1 }).await;
    let reply = if pair.transport.is_mqtt() { "slow/reply" } else { "slow.reply" };
    let publisher = pair.place.nest(pair.version, "client", &[]).await;
    let to = json!({ "address": reply });
    for what in garbage() {
        publish(&publisher, &to, what).await;
    }
    let unknown = json!({ "response": 1, "isDisposed": true, "id": "nobody's" }).to_string();
    publish(&publisher, &to, json!({ "text": unknown })).await;
    assert_eq!(pending.await.unwrap().unwrap(), 500);
    let call = pair.client().send::<i64>("echo", 1).timeout(Duration::from_secs(5));
    assert_eq!(call.await.unwrap(), 1);
}
