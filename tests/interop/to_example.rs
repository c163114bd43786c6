// SPDX-License-Identifier: MIT OR Apache-2.0
//! A NestJS client calls `examples/interop_service.rs`, which knows of this lab no more than a URL.

use serde_json::{Value, json};

use crate::example::Example;
use crate::pair::Pair;
use crate::peer::eventually;
use crate::{behaviours, everywhere, with_wildcards};

behaviours! { ALL:
    "a value, a promise, a one-item stream" [everywhere] sums,
    "a stream of replies, in order" [everywhere] streaming,
    "500 calls in flight, each with its own reply" [everywhere] many_in_flight,
    "a handler that calls its own service" [everywhere] concurrent,
    "no handler" [everywhere] not_found,
    "events are counted" [everywhere] events,
    "two handlers for one event" [everywhere] two_event_handlers,
    "errors: text, object, unexpected, panic, after items" [everywhere] errors,
    "any JSON value there and back" [everywhere] json_values,
    "null, nothing, empty stream" [everywhere] empty_results,
    "unicode beyond the BMP" [everywhere] unicode,
    "wildcards with the concrete address" [with_wildcards] wildcards,
    "SIGTERM: what is in flight is answered, then it exits with 0" [everywhere] terminated,
}

async fn sums(pair: &Pair) {
    for cmd in ["sum", "asyncSum", "streamSum"] {
        pair.nest.send(json!({ "cmd": cmd }), json!([1, 2, 3, 4, 5])).await.completes(json!([15]));
    }
    pair.nest.send(json!("whoami"), json!(1)).await.completes(json!(["example"]));
}

async fn streaming(pair: &Pair) {
    let items = json!([1, "two", null, { "four": 4 }, [5]]);
    pair.nest.send(json!({ "cmd": "streaming" }), items.clone()).await.completes(items);
}

async fn many_in_flight(pair: &Pair) {
    let sums = pair.nest.call("batch", json!({ "n": 1000, "inFlight": 500 })).await;
    assert_eq!((&sums["ok"], &sums["errors"]), (&json!(1000), &json!({})), "{sums}");
    let echoes = json!({ "n": 1000, "inFlight": 500, "pattern": "echo", "check": "echo" });
    let echoes = pair.nest.call("batch", echoes).await;
    assert_eq!((&echoes["ok"], &echoes["errors"]), (&json!(1000), &json!({})), "{echoes}");
}

async fn concurrent(pair: &Pair) {
    let rows: Vec<Vec<i64>> = (0..10).map(|row| (row..row + 10).collect()).collect();
    pair.nest.send(json!({ "cmd": "concurrent" }), json!(rows)).await.completes(json!([true]));
}

async fn not_found(pair: &Pair) {
    pair.nest_is_not_answered("nobody.there").await;
}

/// The first item of the answer.
async fn ask(pair: &Pair, pattern: &str, data: Value) -> Value {
    let sent = pair.nest.send(json!(pattern), data).await;
    sent.0["items"][0].clone()
}

async fn events(pair: &Pair) {
    let before = ask(pair, "notifications", json!(1)).await.as_u64().unwrap();
    for i in 0..20 {
        pair.nest.emit(json!("notification"), json!({ "i": i })).await;
    }
    eventually("20 events", || async { ask(pair, "notifications", json!(1)).await == before + 20 }).await;
    assert_eq!(ask(pair, "lastNotification", json!(1)).await, json!({ "i": 19 }));
}

async fn two_event_handlers(pair: &Pair) {
    let counts =
        || async { (ask(pair, "calls", json!("twice#1")).await, ask(pair, "calls", json!("twice#2")).await) };
    let before = counts().await;
    pair.nest.emit(json!("twice"), json!(1)).await;
    let more = |count: &Value| json!(count.as_u64().unwrap() + 1);
    eventually("both handlers", || async { counts().await == (more(&before.0), more(&before.1)) }).await;
    let both = json!([{ "current": "first", "next": "second" }]);
    pair.nest.send(json!("twice"), json!(1)).await.completes(both);
}

async fn errors(pair: &Pair) {
    let boom = json!({ "status": "error", "message": "boom" });
    let internal = json!({ "status": "error", "message": "Internal server error" });
    let errors = [
        ("message", boom.clone()),
        ("object", json!({ "code": 42, "message": "m" })),
        ("unexpected", internal.clone()),
        ("panic", internal),
    ];
    for (kind, error) in errors {
        pair.nest.send(json!("fail"), json!({ "kind": kind })).await.fails(error);
    }
    pair.nest.send(json!("fail"), json!({ "kind": "stream" })).await.fails_after(json!([1, 2]), boom);
}

async fn json_values(pair: &Pair) {
    let values =
        json!(["", "plain", 0, -1.5, 1.5e300, false, true, [], {}, [null, { "b": 1, "a": { "c": null } }]]);
    for value in values.as_array().unwrap() {
        pair.nest.send(json!("echo"), value.clone()).await.completes(json!([value]));
    }
}

async fn empty_results(pair: &Pair) {
    pair.nest.send(json!("nullValue"), json!({})).await.completes(json!([null]));
    pair.nest.send(json!("undefinedValue"), json!({})).await.completes(json!([]));
    pair.nest.send(json!("emptyStream"), json!({})).await.completes(json!([]));
}

async fn unicode(pair: &Pair) {
    let text = "zażółć 你好 😀 é \u{feff}";
    pair.nest.send(json!("unicode"), json!(text)).await.completes(json!([format!("😀{text}é")]));
}

async fn wildcards(pair: &Pair) {
    let east = pair.wild().join(&["time", "us", "east"]);
    pair.nest.send(json!(east), json!(1)).await.completes(json!([east]));
    let event = pair.wild().join(&["wildEvent", "x"]);
    pair.nest.emit(json!(event), json!(1)).await;
    eventually("the event", || async {
        ask(pair, "subjects", json!(1)).await.as_array().unwrap().contains(&json!(event))
    })
    .await;
}

async fn terminated(pair: &Pair) {
    let place = pair.elsewhere().await;
    let example = Example::start(&place, "going").await;
    let place = place.at_url(&example.url);
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    nest.hold(json!("slow")).await;
    let pending: Vec<_> =
        (0..5).map(|_| nest.begin_send(json!("slow"), json!({ "ms": 400 }), json!({}))).collect();
    eventually("the calls to run", || async {
        nest.send(json!("slowRunning"), json!(1)).await.0["items"] == json!([5])
    })
    .await;
    example.terminate();
    for sent in pending {
        sent.await.completes(json!([400]));
    }
    assert_eq!(example.ended().await, Some(0));
}
