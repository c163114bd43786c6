// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our client calls a NestJS service, which is not disturbed by anything we send.

use std::time::Duration;

use futures::StreamExt;
use martlet::{CallError, Metadata, Pattern, Payload};
use serde_json::{Value, json};

use crate::pair::Pair;
use crate::peer::eventually;
use crate::service::cmd;
use crate::wire::Transport;
use crate::{behaviours, everywhere, on_nats, on_tcp, with_wildcards};

behaviours! { ALL:
    "a value, a promise, a one-item stream" [everywhere] sums,
    "a stream of replies, in order" [everywhere] streaming,
    "500 calls in flight, each with its own reply" [everywhere] many_in_flight,
    "replies out of order" [everywhere] out_of_order,
    "a handler that calls its own service" [everywhere] concurrent,
    "no handler" [everywhere] not_found,
    "events are counted" [everywhere] events,
    "an event that nobody handles" [everywhere] unknown_event,
    "two handlers for one event" [everywhere] two_event_handlers,
    "message sent to event handlers" [everywhere] message_to_event_handlers,
    "event sent to a message handler" [everywhere] event_to_message_handler,
    "metadata of the call" [everywhere] metadata,
    "deadline and trace in the metadata" [everywhere] deadline_and_trace,
    "error: text, byte for byte" [everywhere] error_text,
    "error: object, byte for byte" [everywhere] error_object,
    "error: unexpected, byte for byte" [everywhere] error_unexpected,
    "error: thrown text, byte for byte" [everywhere] error_thrown_text,
    "error: http exception, byte for byte" [everywhere] error_http,
    "error: after items of a stream" [everywhere] error_in_stream,
    "any JSON value there and back, byte for byte" [everywhere] json_values,
    "null, nothing, empty stream" [everywhere] empty_results,
    "an empty item inside a stream" [everywhere] empty_item,
    "unicode beyond the BMP" [everywhere] unicode,
    "10 MB payload (NATS: 900 kB, below the broker's limit)" [everywhere] big_payload,
    "object patterns in another key order" [everywhere] object_patterns,
    "handlers for one transport only" [everywhere] transport_filter,
    "a call that is dropped" [everywhere] dropped,
    "a call that times out" [everywhere] timed_out,
    "the client closes and connects again" [everywhere] reconnects,
    "wildcards with the concrete subject" [with_wildcards] wildcards,
    "the wildcards of NestJS's own suites" [with_wildcards] wildcard_sums,
    "several services answer one request" [where_all_get_it] broadcast,
    "a request that nobody subscribes" [on_nats] no_responders,
    "pipelined calls in one write" [on_tcp] pipelined,
}

fn where_all_get_it(_: u32, transport: Transport) -> bool {
    transport.wire().broker.is_some() && !transport.is_rmq()
}

async fn sums(pair: &Pair) {
    for name in ["sum", "asyncSum", "streamSum"] {
        assert_eq!(pair.client().send::<i64>(cmd(name), [1, 2, 3, 4, 5]).await.unwrap(), 15);
    }
}

async fn streaming(pair: &Pair) {
    let items = json!([1, "two", null, { "four": 4 }, [5]]);
    let replies = pair.client().send::<Value>(cmd("streaming"), &items).stream().collect_all().await.unwrap();
    assert_eq!(json!(replies), items);
}

async fn many_in_flight(pair: &Pair) {
    let calls = (0..2000_i64).map(|i| async move {
        assert_eq!(pair.client().send::<i64>(cmd("sum"), [i, 1, 2]).await.unwrap(), i + 3);
    });
    futures::stream::iter(calls).buffer_unordered(500).collect::<Vec<()>>().await;
}

async fn out_of_order(pair: &Pair) {
    let order = std::cell::RefCell::new(Vec::new());
    let call = |ms: u64| {
        let order = &order;
        async move {
            let answer: u64 = pair.client().send("slow", json!({ "ms": ms })).await.unwrap();
            order.borrow_mut().push(answer);
        }
    };
    futures::join!(call(150), call(1));
    assert_eq!(*order.borrow(), [1, 150]);
}

async fn concurrent(pair: &Pair) {
    let rows: Vec<Vec<i64>> = (0..10).map(|row| (row..row + 10).collect()).collect();
    assert!(pair.client().send::<bool>(cmd("concurrent"), rows).await.unwrap());
}

async fn not_found(pair: &Pair) {
    pair.we_are_not_answered("nobody.there").await;
    if pair.transport == Transport::RmqAcks {
        // NestJS warns of what it has refused.
        pair.nest.forgive().await;
    }
}

async fn notifications(pair: &Pair) -> u64 {
    pair.nest.stats().await["notifications"].as_u64().unwrap()
}

async fn calls(pair: &Pair, key: &str) -> u64 {
    pair.nest.stats().await["calls"][key].as_u64().unwrap_or(0)
}

async fn events(pair: &Pair) {
    let before = notifications(pair).await;
    for i in 0..20 {
        pair.client().emit("notification", json!({ "i": i })).await.unwrap();
    }
    // Not awaited: it goes out all the same.
    drop(pair.client().emit("notification", json!({ "i": 20 })));
    eventually("21 events", || async { notifications(pair).await == before + 21 }).await;
    let last: Value = pair.client().send("lastNotification", json!({})).await.unwrap();
    assert_eq!(last, json!({ "i": 20 }));
}

async fn unknown_event(pair: &Pair) {
    pair.client().emit("nobody.cares", 1).await.unwrap();
    assert_eq!(pair.client().send::<i64>("echo", 1).await.unwrap(), 1);
    match pair.transport {
        // A warning, since it is refused.
        Transport::RmqAcks => pair.nest.forgive().await,
        // NestJS logs it.
        _ if pair.wire().unknown_events => pair.nest.expect_errors(1).await,
        _ => {}
    }
}

async fn two_event_handlers(pair: &Pair) {
    let before = (calls(pair, "twice#1").await, calls(pair, "twice#2").await);
    pair.client().emit("twice", 1).await.unwrap();
    eventually("both handlers", || async {
        (calls(pair, "twice#1").await, calls(pair, "twice#2").await) == (before.0 + 1, before.1 + 1)
    })
    .await;
}

async fn message_to_event_handlers(pair: &Pair) {
    assert_eq!(raw(pair, "twice", 1).await, r#"{"current":"first","next":"second"}"#);
    assert_eq!(pair.client().send::<String>("eventAnswer", 1).await.unwrap(), "answered");
}

async fn event_to_message_handler(pair: &Pair) {
    let before = calls(pair, "messageAsEvent").await;
    pair.client().emit("messageAsEvent", 1).await.unwrap();
    eventually("the handler to run", || async { calls(pair, "messageAsEvent").await == before + 1 }).await;
}

async fn metadata(pair: &Pair) {
    let call = pair.client().send::<Value>("metadata", json!({})).metadata("tenant", "t");
    let seen = call.await.unwrap();
    if pair.version >= 12 && pair.wire().nest_shows_metadata {
        assert_eq!(seen["tenant"], "t", "{seen}");
    } else {
        assert_eq!(seen, Value::Null);
    }
    let before = notifications(pair).await;
    let metadata = Metadata::from_iter([("tenant", "t")]);
    pair.client().emit_with("notification", 1, metadata).await.unwrap();
    eventually("the event", || async { notifications(pair).await == before + 1 }).await;
}

async fn deadline_and_trace(pair: &Pair) {
    let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let trace = martlet::trace::TraceContext::parse(text, Some("vendor=1")).unwrap();
    let call = pair.client().send::<Value>("metadata", json!({})).trace(&trace);
    let seen = call.timeout(Duration::from_secs(7)).await.unwrap();
    if pair.version >= 12 && pair.wire().nest_shows_metadata {
        assert_eq!(seen["traceparent"], text, "{seen}");
        assert_eq!(seen["tracestate"], "vendor=1", "{seen}");
        assert_eq!(seen["martlet-timeout-ms"], "7000", "{seen}");
    } else {
        assert_eq!(seen, Value::Null);
    }
}

const INTERNAL: &str = r#"{"status":"error","message":"Internal server error"}"#;

/// The exact text of the error that a kind of failure gives, and how many lines NestJS logs for it.
async fn fails_with(pair: &Pair, kind: &str, error: &str, logged: u64) {
    let outcome = pair.client().send::<Value>("fail", json!({ "kind": kind })).await;
    let remote = outcome.unwrap_err().remote().cloned().unwrap();
    assert_eq!(String::from_utf8_lossy(remote.payload().bytes()), error);
    pair.nest.expect_errors(logged).await;
}

async fn error_text(pair: &Pair) {
    fails_with(pair, "message", r#"{"status":"error","message":"boom"}"#, 0).await;
}

async fn error_object(pair: &Pair) {
    fails_with(pair, "object", r#"{"code":42,"message":"m"}"#, 0).await;
}

async fn error_unexpected(pair: &Pair) {
    fails_with(pair, "unexpected", INTERNAL, 1).await;
}

async fn error_thrown_text(pair: &Pair) {
    fails_with(pair, "string", INTERNAL, 1).await;
}

async fn error_http(pair: &Pair) {
    fails_with(pair, "http", INTERNAL, u64::from(pair.version == 10)).await;
}

async fn error_in_stream(pair: &Pair) {
    let replies: Vec<_> =
        pair.client().send::<i64>("fail", json!({ "kind": "stream" })).stream().collect().await;
    let [Ok(1), Ok(2), Err(CallError::Remote(error))] = &replies[..] else { panic!("{replies:?}") };
    assert_eq!(error.payload().bytes(), br#"{"status":"error","message":"boom"}"#);
}

async fn json_values(pair: &Pair) {
    // As JSON.stringify writes them.
    let values = [
        r#""""#,
        "0",
        "-1.5",
        "1.5e+300",
        "9007199254740991",
        "false",
        "true",
        "[]",
        "{}",
        "null",
        r#"[null,{"b":1,"a":{"c":null,"d":[]}}]"#,
        r#""quotes \" backslash \\ newline \n tab \t null \u0000 escape \u001b""#,
        r#"{"pattern":"p","data":"d","id":"fake","response":1,"isDisposed":true,"err":"e"}"#,
        r#""lone surrogate \ud83d""#,
    ];
    for text in values {
        let value = Payload::new(martlet::Format::Json, text.as_bytes().to_vec());
        assert_eq!(raw(pair, "echo", value).await, text);
    }
}

async fn empty_results(pair: &Pair) {
    let client = pair.client();
    assert_eq!(client.send::<Value>("nullValue", json!({})).await.unwrap(), Value::Null);
    client.send::<()>("undefinedValue", json!({})).await.unwrap();
    let error = client.send::<String>("undefinedValue", json!({})).await.unwrap_err();
    assert!(matches!(error, CallError::NoValue), "{error:?}");
    for pattern in ["emptyStream", "undefinedValue"] {
        let replies = client.send::<Value>(pattern, json!({})).stream().collect_all().await.unwrap();
        assert_eq!(replies, Vec::<Value>::new(), "{pattern}");
    }
    let replies = client.send::<Value>("nullValue", json!({})).stream().collect_all().await.unwrap();
    assert_eq!(replies, [Value::Null]);
}

/// NestJS sends nothing but the id for `undefined`; its own clients of 10 and 11 stumble over it.
async fn empty_item(pair: &Pair) {
    let replies =
        pair.client().send::<Value>("undefinedItem", json!({})).stream().collect_all().await.unwrap();
    // Over RabbitMQ its replies have no id, and nothing is left: a value for every client, and the end.
    let expected = if pair.transport.is_rmq() { json!([1, {}]) } else { json!([1, null, 3]) };
    assert_eq!(json!(replies), expected);
}

async fn unicode(pair: &Pair) {
    let text = "zażółć 你好 😀👩‍👩‍👧 é \u{feff} \u{fffd} \u{2028}";
    let client = pair.client();
    assert_eq!(client.send::<String>("echo", text).await.unwrap(), text);
    assert_eq!(client.send::<String>("unicode", text).await.unwrap(), format!("😀{text}é"));
    let sizes = json!({ "units": text.encode_utf16().count(), "bytes": text.len() });
    assert_eq!(client.send::<Value>("length", text).await.unwrap(), sizes);
}

async fn big_payload(pair: &Pair) {
    let n = pair.wire().big;
    let client = pair.client();
    assert_eq!(client.send::<String>("big", json!({ "n": n })).await.unwrap(), "x".repeat(n));
    let emoji = "😀".repeat(n / 4);
    let sizes = json!({ "units": n / 2, "bytes": n });
    assert_eq!(client.send::<Value>("length", emoji).await.unwrap(), sizes);
}

async fn object_patterns(pair: &Pair) {
    // The NestJS handlers have one key: the order that matters is that of spaces and of text forms.
    let spellings = [r#"{"cmd":"sum"}"#, r#" { "cmd" : "sum" } "#];
    for spelling in spellings {
        assert_eq!(pair.client().send::<i64>(Pattern::parse(spelling), [1, 2]).await.unwrap(), 3);
    }
}

async fn transport_filter(pair: &Pair) {
    for (name, id) in crate::TRANSPORT_FILTERS {
        let pattern = format!("only{name}");
        if id == pair.wire().id {
            let answer: String = pair.client().send(pattern, 1).await.unwrap();
            assert_eq!(answer, name.to_lowercase());
        } else {
            pair.we_are_not_answered(&pattern).await;
        }
    }
    pair.nest.forgive().await;
}

/// NestJS goes on with its endless stream, without a line in its log.
async fn dropped(pair: &Pair) {
    let mut infinite = pair.client().send::<u64>("infinite", 1).stream();
    assert_eq!(infinite.next().await.unwrap().unwrap(), 0);
    assert_eq!(infinite.next().await.unwrap().unwrap(), 1);
    drop(infinite);
    // A single reply of a stream, and a call that is not waited for.
    assert_eq!(pair.client().send::<u64>("infinite", 1).await.unwrap(), 0);
    let slow = pair.client().send::<u64>("slow", json!({ "ms": 50 }));
    assert!(tokio::time::timeout(Duration::from_millis(20), slow).await.is_err());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((pair.client().pending(), pair.client().occupied()), (0, 0));
    assert_eq!(pair.client().send::<i64>("echo", 1).await.unwrap(), 1);
    pair.nest.call("stopInfinite", json!({})).await;
}

async fn timed_out(pair: &Pair) {
    let limit = Duration::from_millis(50);
    let error = pair.client().send::<Value>("never", 1).timeout(limit).await.unwrap_err();
    assert!(matches!(error, CallError::Timeout { after } if after == limit), "{error:?}");
    let error = pair.client().send::<u64>("slow", json!({ "ms": 100 })).timeout(limit).await.unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error:?}");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(pair.client().send::<i64>("echo", 1).await.unwrap(), 1);
}

async fn reconnects(pair: &Pair) {
    for _ in 0..3 {
        pair.client().close().await;
        pair.client().connect().await.unwrap();
        assert_eq!(pair.client().send::<i64>("echo", 1).await.unwrap(), 1);
    }
}

async fn wildcards(pair: &Pair) {
    let at = |words: &[&str]| pair.wild().join(words);
    let addresses = [
        at(&["time", "us", "east"]),
        at(&["time", "us", "west"]),
        at(&["wild", "a"]),
        at(&["wild", "a", "b", "c"]),
    ];
    for address in addresses {
        assert_eq!(pair.client().send::<String>(&*address, 1).await.unwrap(), address);
    }
    let (one, two) = (at(&["wildEvent", "one"]), at(&["wildEvent", "two"]));
    pair.client().emit(&*one, 1).await.unwrap();
    pair.client().emit(&*two, 1).await.unwrap();
    eventually("both events", || async {
        let subjects: Vec<String> = pair.client().send("subjects", 1).await.unwrap();
        subjects == [&*one, &*two]
    })
    .await;
}

async fn wildcard_sums(pair: &Pair) {
    for name in ["math", "async", "stream"] {
        let pattern = pair.wild().join(&[name, "sum"]);
        assert_eq!(pair.client().send::<i64>(pattern, [1, 2, 3, 4, 5]).await.unwrap(), 15);
    }
    let pattern = pair.wild().join(&["streaming", "sum"]);
    let replies = pair.client().send::<i64>(pattern, [1, 2, 3]).stream().collect_all().await.unwrap();
    assert_eq!(replies, [1, 2, 3]);
    let error = pair.client().send::<Value>("exception", 1).await.unwrap_err();
    let remote = error.remote().unwrap();
    assert_eq!(remote.payload().bytes(), br#"{"status":"error","message":"test"}"#);
    if pair.transport.is_redis() {
        // Its globs take its own replies for events, and its handlers fail on them.
        pair.nest.forgive().await;
    }
}

async fn broadcast(pair: &Pair) {
    let pattern = pair
        .wire()
        .wildcards
        .map_or_else(|| "broadcast.test".to_owned(), |it| it.join(&["broadcast", "test"]));
    let other = pair.place.nest(pair.version, "server", &["--name", "other"]).await;
    let mut replies = pair.client().send::<i64>(pattern, 1).stream();
    assert_eq!(replies.next().await.unwrap().unwrap(), 1);
    assert_eq!(replies.next().await.unwrap().unwrap(), 1);
    drop((replies, other));
}

async fn no_responders(pair: &Pair) {
    let started = std::time::Instant::now();
    let error = pair.client().send::<Value>("silence", 1).stream().next().await.unwrap().unwrap_err();
    assert!(matches!(&error, CallError::NoHandler { pattern } if pattern == "silence"), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

async fn pipelined(pair: &Pair) {
    let client = pair.place.client();
    client.connect().await.unwrap();
    let calls = (0..5000_i64).map(|i| client.send::<i64>(cmd("sum"), [i, 1]));
    let sums = futures::future::try_join_all(calls).await.unwrap();
    assert!(sums.into_iter().eq(1..=5000));
    client.close().await;
}

/// The text of the first reply, as it came.
async fn raw(pair: &Pair, pattern: &str, data: impl martlet::reply::IntoRecord) -> String {
    let reply: Box<serde_json::value::RawValue> = pair.client().send(pattern, data).await.unwrap();
    reply.get().to_owned()
}
