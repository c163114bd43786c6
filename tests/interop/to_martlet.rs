// SPDX-License-Identifier: MIT OR Apache-2.0
//! A NestJS client calls our service: what it observes is what a NestJS service would have let it observe.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::pair::{Pair, start_service};
use crate::peer::eventually;
use crate::service::Service;
use crate::wire::Transport;
use crate::{behaviours, everywhere, on_nats, on_tcp, with_wildcards};

fn twelve_knows_metadata(version: u32, _: Transport) -> bool {
    version >= 12
}

fn where_clients_are_reused(version: u32, transport: Transport) -> bool {
    version >= transport.wire().client_reused_since
}

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
    "metadata of the client's dispatch hook" [twelve_knows_metadata] metadata,
    "error: text" [everywhere] error_text,
    "error: object" [everywhere] error_object,
    "error: unexpected" [everywhere] error_unexpected,
    "error: after items of a stream" [everywhere] error_in_stream,
    "a handler that panics" [everywhere] panic_in_handler,
    "any JSON value there and back" [everywhere] json_values,
    "null, nothing, empty stream" [everywhere] empty_results,
    "an empty item inside a stream" [everywhere] empty_item,
    "unicode beyond the BMP" [everywhere] unicode,
    "10 MB payload (NATS: 900 kB, below the broker's limit)" [everywhere] big_payload,
    "object patterns in another key order" [everywhere] object_patterns,
    "number patterns" [everywhere] number_patterns,
    "handlers for one transport only" [everywhere] transport_filter,
    "a call that is unsubscribed" [everywhere] unsubscribed,
    "the client closes and connects again" [where_clients_are_reused] reconnects,
    "wildcards with the concrete subject" [with_wildcards] wildcards,
    "the wildcards of NestJS's own suites" [with_wildcards] wildcard_sums,
    "headers of the reply are harmless" [on_nats] reply_headers,
    "queue group of a service: each event once" [on_nats] queue_group,
    "queue group of a handler" [on_nats] handler_queue,
    "handlers registered while running" [everywhere] registered_while_running,
    "1000 connections one after the other" [on_tcp] many_connections,
}

async fn sums(pair: &Pair) {
    for cmd in ["sum", "asyncSum", "streamSum"] {
        pair.nest.send(json!({ "cmd": cmd }), json!([1, 2, 3, 4, 5])).await.completes(json!([15]));
    }
}

async fn streaming(pair: &Pair) {
    let items = json!([1, "two", null, { "four": 4 }, [5]]);
    pair.nest.send(json!({ "cmd": "streaming" }), items.clone()).await.completes(items);
}

async fn many_in_flight(pair: &Pair) {
    let sums = pair.nest.call("batch", json!({ "n": 2000, "inFlight": 500 })).await;
    assert_eq!((&sums["ok"], &sums["errors"]), (&json!(2000), &json!({})), "{sums}");
    let echoes = json!({ "n": 1000, "inFlight": 500, "pattern": "echo", "check": "echo" });
    let echoes = pair.nest.call("batch", echoes).await;
    assert_eq!((&echoes["ok"], &echoes["errors"]), (&json!(1000), &json!({})), "{echoes}");
}

async fn out_of_order(pair: &Pair) {
    pair.nest.hold(json!("slow")).await;
    let slow = pair.nest.begin_send(json!("slow"), json!({ "ms": 150 }), json!({}));
    let fast = pair.nest.begin_send(json!("slow"), json!({ "ms": 1 }), json!({}));
    let (slow, fast) = futures::join!(slow, fast);
    slow.completes(json!([150]));
    fast.completes(json!([1]));
    assert!(fast.0["ms"].as_u64() < slow.0["ms"].as_u64(), "{fast:?} {slow:?}");
}

async fn concurrent(pair: &Pair) {
    let rows: Vec<Vec<i64>> = (0..10).map(|row| (row..row + 10).collect()).collect();
    pair.nest.send(json!({ "cmd": "concurrent" }), json!(rows)).await.completes(json!([true]));
}

async fn not_found(pair: &Pair) {
    pair.ours().take_events();
    pair.nest_is_not_answered("nobody.there").await;
    let reported = if pair.wire().unknown_events { vec!["no_message_handler"] } else { vec![] };
    assert_eq!(pair.ours().take_events(), reported);
}

async fn events(pair: &Pair) {
    let seen = &pair.ours().seen;
    let before = seen.notifications.load(Ordering::SeqCst);
    for i in 0..20 {
        pair.nest
            .emit(json!("notification"), json!({ "i": i }))
            .await
            .completes(json!([{ "$undefined": true }]));
    }
    eventually("20 events", || async { seen.notifications.load(Ordering::SeqCst) == before + 20 }).await;
    let last = seen.last.lock().unwrap().take().unwrap();
    assert_eq!(last.to_value().unwrap(), json!({ "i": 19 }));
    pair.nest.send(json!("notifications"), json!({})).await.completes(json!([before + 20]));
    // An object pattern of an event crosses the wire as its route.
    pair.nest.emit(json!({ "v": 1, "type": "created" }), json!("x")).await;
    eventually("the event", || async { seen.notifications.load(Ordering::SeqCst) == before + 21 }).await;
}

async fn unknown_event(pair: &Pair) {
    pair.ours().take_events();
    pair.nest.emit(json!("nobody.cares"), json!(1)).await.completes(json!([{ "$undefined": true }]));
    pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    let reported = if pair.wire().unknown_events { vec!["no_event_handler"] } else { vec![] };
    assert_eq!(pair.ours().take_events(), reported);
}

async fn two_event_handlers(pair: &Pair) {
    let count = || pair.ours().seen.twice.each_ref().map(|count| count.load(Ordering::SeqCst));
    let before = count();
    pair.nest.emit(json!("twice"), json!(1)).await;
    eventually("both handlers", || async { count() == before.map(|count| count + 1) }).await;
}

async fn message_to_event_handlers(pair: &Pair) {
    let both = json!([{ "current": "first", "next": "second" }]);
    pair.nest.send(json!("twice"), json!(1)).await.completes(both);
    pair.nest.send(json!("eventAnswer"), json!(1)).await.completes(json!(["answered"]));
}

async fn event_to_message_handler(pair: &Pair) {
    let seen = &pair.ours().seen;
    let before = seen.message_as_event.load(Ordering::SeqCst);
    pair.nest.emit(json!("messageAsEvent"), json!(1)).await;
    eventually("the handler to run", || async { seen.message_as_event.load(Ordering::SeqCst) == before + 1 })
        .await;
}

async fn metadata(pair: &Pair) {
    pair.nest.send(json!("metadata"), json!({})).await.completes(json!([null]));
    let sent = json!({ "trace": "abc", "tenant": "t" });
    let more = json!({ "metadata": sent });
    pair.nest.send_with(json!("metadata"), json!({}), more.clone()).await.completes(json!([sent]));
    assert_eq!(pair.ours().seen.metadata.lock().unwrap().as_deref(), Some(r#"{"tenant":"t","trace":"abc"}"#));
    let before = pair.ours().seen.notifications.load(Ordering::SeqCst);
    pair.nest.emit_with(json!("notification"), json!(1), more).await;
    eventually("the event", || async { pair.ours().seen.notifications.load(Ordering::SeqCst) == before + 1 })
        .await;
}

const INTERNAL: &str = r#"{"status":"error","message":"Internal server error"}"#;

/// What `fail` answers, and what our service reported meanwhile.
async fn fails_with(pair: &Pair, kind: &str, error: &str, reported: &[&str]) {
    pair.ours().take_events();
    let error: Value = serde_json::from_str(error).unwrap();
    pair.nest.send(json!("fail"), json!({ "kind": kind })).await.fails(error);
    assert_eq!(pair.ours().take_events(), reported, "{kind}");
}

async fn error_text(pair: &Pair) {
    fails_with(pair, "message", r#"{"status":"error","message":"boom"}"#, &[]).await;
}

async fn error_object(pair: &Pair) {
    fails_with(pair, "object", r#"{"code":42,"message":"m"}"#, &[]).await;
    fails_with(pair, "array", r#"["a",1]"#, &[]).await;
}

async fn error_unexpected(pair: &Pair) {
    fails_with(pair, "unexpected", INTERNAL, &["unexpected_error"]).await;
}

async fn error_in_stream(pair: &Pair) {
    let error = json!({ "status": "error", "message": "boom" });
    pair.nest.send(json!("fail"), json!({ "kind": "stream" })).await.fails_after(json!([1, 2]), error);
}

async fn panic_in_handler(pair: &Pair) {
    fails_with(pair, "panic", INTERNAL, &["handler_panicked"]).await;
    // The others go on, and so does this one.
    pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    fails_with(pair, "message", r#"{"status":"error","message":"boom"}"#, &[]).await;
}

async fn json_values(pair: &Pair) {
    let values = json!([
        "", "plain", 0, -1.5, 1.5e300, 9007199254740991_i64, false, true, [], {},
        [null, { "b": 1, "a": { "c": null, "d": [] } }],
        "quotes \" backslash \\ newline \n tab \t null \u{0} escape \u{1b} separator \u{2028}",
        { "pattern": "p", "data": "d", "id": "fake", "response": 1, "isDisposed": true, "err": "e" },
    ]);
    for value in values.as_array().unwrap() {
        pair.nest.send(json!("echo"), value.clone()).await.completes(json!([value]));
    }
}

async fn empty_results(pair: &Pair) {
    pair.nest.send(json!("nullValue"), json!({})).await.completes(json!([null]));
    pair.nest.send(json!("undefinedValue"), json!({})).await.completes(json!([]));
    pair.nest.send(json!("emptyStream"), json!({})).await.completes(json!([]));
    pair.nest.send(json!({ "cmd": "streaming" }), json!([])).await.completes(json!([]));
}

/// A packet with nothing but its id would end the stream of a NestJS 10 or 11 client: null is sent.
async fn empty_item(pair: &Pair) {
    pair.nest.send(json!("undefinedItem"), json!({})).await.completes(json!([1, null, 3]));
}

async fn unicode(pair: &Pair) {
    let text = "zażółć 你好 😀👩‍👩‍👧 é \u{feff} \u{fffd}";
    pair.nest.send(json!("echo"), json!(text)).await.completes(json!([text]));
    pair.nest.send(json!("unicode"), json!(text)).await.completes(json!([format!("😀{text}é")]));
    let sizes = json!({ "units": text.encode_utf16().count(), "bytes": text.len() });
    pair.nest.send(json!("length"), json!(text)).await.completes(json!([sizes]));
}

async fn big_payload(pair: &Pair) {
    let n = pair.wire().big;
    pair.nest.send(json!("big"), json!({ "n": n })).await.completes(json!(["x".repeat(n)]));
    let emoji = "😀".repeat(n / 4);
    pair.nest.send(json!("length"), json!(emoji)).await.completes(json!([{ "units": n / 2, "bytes": n }]));
}

async fn object_patterns(pair: &Pair) {
    let patterns = [
        json!({ "a": "x", "b": 1, "nested": { "y": [1, "k"], "z": true } }),
        json!(r#"{"nested":{"z":true,"y":[1,"k"]},"b":1,"a":"x"}"#),
    ];
    let patterns = match pair.transport {
        // The routing key is the caller's JSON, the binding the sorted route: only a flat one in order is the same.
        Transport::RmqWildcards => &[][..],
        // The text is the address as it is, in both frameworks.
        _ if pair.wire().text_is_address => &patterns[..1],
        _ => &patterns[..],
    };
    pair.nest.send(json!({ "cmd": "sum" }), json!([1, 2])).await.completes(json!([3]));
    for pattern in patterns {
        pair.nest.send(pattern.clone(), json!(1)).await.completes(json!(["nested"]));
    }
}

async fn number_patterns(pair: &Pair) {
    pair.nest.send(json!(42), json!(1)).await.completes(json!(["number"]));
    pair.nest.send(json!("42"), json!(1)).await.completes(json!(["number"]));
}

async fn transport_filter(pair: &Pair) {
    for (name, id) in crate::TRANSPORT_FILTERS {
        let pattern = format!("only{name}");
        if id == pair.wire().id {
            pair.nest.send(json!(pattern), json!(1)).await.completes(json!([name.to_lowercase()]));
        } else {
            pair.nest_is_not_answered(&pattern).await;
        }
    }
    pair.ours().take_events();
}

async fn unsubscribed(pair: &Pair) {
    let taken = pair.nest.send_with(json!("infinite"), json!(1), json!({ "take": 2 })).await;
    assert_eq!((&taken.0["items"], &taken.0["taken"]), (&json!([0, 1]), &json!(true)));
    let late = pair.nest.send_with(json!("slow"), json!({ "ms": 100 }), json!({ "timeout": 20 })).await;
    assert_eq!(late.0["timedOut"], true);
    // The late reply and the endless stream go to a client that no longer knows them.
    tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
}

async fn reconnects(pair: &Pair) {
    for _ in 0..3 {
        assert_eq!(pair.nest.call("reconnect", json!({})).await["connected"], true);
        pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    }
    pair.nest.forgive().await;
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
        pair.nest.send(json!(address), json!(1)).await.completes(json!([address]));
    }
    // A glob of Redis takes any text.
    if !pair.transport.is_redis() {
        pair.nest_is_not_answered(&at(&["time", "us", "a", "b"])).await;
    }
    let (one, two) = (at(&["wildEvent", "one"]), at(&["wildEvent", "two"]));
    pair.nest.emit(json!(one), json!(1)).await;
    pair.nest.emit(json!(two), json!(1)).await;
    let subjects = &pair.ours().seen.subjects;
    eventually("both events", || async { subjects.lock().unwrap().len() == 2 }).await;
    assert_eq!(subjects.lock().unwrap().drain(..).collect::<Vec<_>>(), [one, two]);
}

async fn wildcard_sums(pair: &Pair) {
    for name in ["math", "async", "stream"] {
        let pattern = pair.wild().join(&[name, "sum"]);
        pair.nest.send(json!(pattern), json!([1, 2, 3, 4, 5])).await.completes(json!([15]));
    }
    let pattern = pair.wild().join(&["streaming", "sum"]);
    pair.nest.send(json!(pattern), json!([1, 2, 3])).await.completes(json!([1, 2, 3]));
}

async fn reply_headers(pair: &Pair) {
    pair.nest.send(json!("answerHeaders"), json!(1)).await.completes(json!(["with headers"]));
}

/// Two services of ours in one group, and the shared one outside of it.
async fn queue_group(pair: &Pair) {
    let place = pair.elsewhere().await;
    let start = |name: &'static str| {
        Service::start(name, place.transport, place.server_with(json!({ "queue": "workers" })), None)
    };
    let (one, two) = (start("one").await, start("two").await);
    let nest = place.nest(pair.version, "client", &[]).await;
    for i in 0..100 {
        nest.emit(json!("notification"), json!(i)).await;
    }
    let counts = || [&one, &two].map(|service| service.seen.notifications.load(Ordering::SeqCst));
    eventually("100 events", || async { counts().iter().sum::<u64>() >= 100 }).await;
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert_eq!(counts().iter().sum::<u64>(), 100, "{:?}", counts());
    assert!(counts().iter().all(|count| *count > 10), "{:?}", counts());
    drop(nest);
    one.stop().await;
    two.stop().await;
}

async fn handler_queue(pair: &Pair) {
    let (_, other) = start_service("other", &pair.place).await;
    let seen = [&pair.ours().seen, &other.seen];
    let counts = || seen.map(|seen| seen.queued.load(Ordering::SeqCst));
    for i in 0..50 {
        pair.nest.emit(json!("queuedEvent"), json!(i)).await;
    }
    eventually("50 events", || async { counts().iter().sum::<u64>() >= 50 }).await;
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert_eq!(counts().iter().sum::<u64>(), 50, "{:?}", counts());
    // Without a queue both get each event.
    let both = || seen.map(|seen| seen.notifications.load(Ordering::SeqCst));
    let before = both();
    pair.nest.emit(json!("notification"), json!(1)).await;
    eventually("both services", || async { both() == before.map(|count| count + 1) }).await;
    other.stop().await;
}

async fn registered_while_running(pair: &Pair) {
    let registry = pair.ours().running.registry();
    let late = martlet::message("late", || async { Ok::<_, martlet::RpcError>("here now") });
    pair.nest_is_not_answered("late").await;
    let id = registry.register(vec![late]).await.unwrap();
    eventually("the route", || async {
        let sent = pair.nest.send_with(json!("late"), json!(1), json!({ "timeout": 250 })).await;
        sent.0["items"] == json!(["here now"])
    })
    .await;
    assert!(registry.unregister(id).await.unwrap());
    eventually("the route to go", || async {
        let sent = pair.nest.send_with(json!("late"), json!(1), json!({ "timeout": 250 })).await;
        sent.0["failed"] == true || sent.0["timedOut"] == true
    })
    .await;
    pair.ours().take_events();
}

async fn many_connections(pair: &Pair) {
    let port = pair.ours().port();
    for _ in 0..1000 {
        drop(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap());
    }
    pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    pair.ours().take_events();
}
