// SPDX-License-Identifier: MIT OR Apache-2.0
//! Failures of handlers: what the caller reads, and that the service lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures::StreamExt;
use futures::stream;
use martlet_core::{CallError, Data, HandlerGroup, RpcError, Streaming, Unexpected, message};
use serde::ser::{Serialize, SerializeSeq, Serializer};
use serde_json::{Value, json};

use super::{DELIBERATE, Harness, Names, Stage, ok, small, watch};

fn remote(result: Result<Value, CallError>) -> Value {
    match result {
        Err(CallError::Remote(error)) => error.payload().to_value().unwrap(),
        other => panic!("a remote error expected, got {other:?}"),
    }
}

/// `err` is what NestJS sends in the same case.
pub async fn the_error_value_is_nestjs_own<H: Harness>(harness: H) {
    let names = Names::new();
    let fail = message(names.of("fail"), |Data(kind): Data<String>| async move {
        Err::<(), RpcError>(match kind.as_str() {
            "message" => RpcError::message("boom"),
            "object" => RpcError::json(json!({"code": 42, "message": "m"})),
            "array" => RpcError::json(json!([1, 2])),
            "number" => RpcError::json(5),
            "forbidden" => RpcError::forbidden(),
            _ => Unexpected::from("a secret").into(),
        })
    });
    let stage = Stage::new(harness, small().handlers(fail)).await;
    let seen = watch(stage.service.events());
    for (kind, expected) in [
        ("message", json!({"status": "error", "message": "boom"})),
        ("object", json!({"code": 42, "message": "m"})),
        ("array", json!([1, 2])),
        ("number", json!({"status": "error", "message": 5})),
        ("forbidden", json!({"status": "error", "message": "Forbidden resource"})),
        ("unexpected", json!({"status": "error", "message": "Internal server error"})),
    ] {
        assert_eq!(remote(stage.client.send(names.of("fail"), kind).await), expected, "{kind}");
    }
    assert_eq!(seen("unexpected_error"), 1, "the cause is reported where it happened");
    stage.end().await;
}

fn internal() -> Value {
    json!({"status": "error", "message": "Internal server error"})
}

/// What panics when it is serialized.
struct Bomb;

impl Serialize for Bomb {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(2))?;
        list.serialize_element("half of it is written")?;
        panic!("{DELIBERATE}");
    }
}

/// A panic before the first await, after it, inside a stream, and while a value is serialized that was there at once, came
/// later, or is an item of a stream.
pub async fn a_panic_is_answered_and_the_service_lives<H: Harness>(harness: H) {
    let names = Names::new();
    let panics = message(names.of("panics"), |Data((place, _)): Data<(String, u64)>| async move {
        match place.as_str() {
            "before" => panic!("{DELIBERATE}"),
            "after" => {
                tokio::task::yield_now().await;
                panic!("{DELIBERATE}");
            }
            _ => ok(Streaming(stream::iter(0..3).then(|number| async move {
                tokio::task::yield_now().await;
                assert!(number < 2, "{DELIBERATE}");
                number
            }))),
        }
    });
    let value = message(names.of("value"), |Data((place, _)): Data<(String, u64)>| async move {
        if place == "later" {
            tokio::task::yield_now().await;
        }
        ok(Bomb)
    });
    let item = message(names.of("item"), || async { ok(Streaming(stream::iter([Bomb]))) });
    let service = small()
        .handlers(panics)
        .handlers(value)
        .handlers(item)
        .handlers(message(names.of("alive"), || async { ok("x".repeat(40)) }));
    let stage = Stage::new(harness, service).await;
    let seen = watch(stage.service.events());
    for round in 0..20 {
        for place in ["before", "after"] {
            assert_eq!(remote(stage.client.send(names.of("panics"), (place, round)).await), internal());
        }
        let mut replies = stage.client.send::<Value>(names.of("panics"), ("inside", round)).stream();
        assert_eq!(replies.next().await.unwrap().unwrap(), json!(0));
        assert_eq!(replies.next().await.unwrap().unwrap(), json!(1));
        assert_eq!(remote(replies.next().await.unwrap()), internal());
        assert!(replies.next().await.is_none());
        for (handler, place) in [("value", "at once"), ("value", "later"), ("item", "")] {
            assert_eq!(remote(stage.client.send(names.of(handler), (place, round)).await), internal());
            // What was written of it is not in the way of what comes next.
            let alive = stage.client.send::<String>(names.of("alive"), 1).await.unwrap();
            assert_eq!(alive, "x".repeat(40));
        }
    }
    assert_eq!(seen("handler_panicked"), 120);
    let reports = stage.service.handler_reports().await.unwrap();
    let counts = |handler: &str| {
        let pattern = names.of(handler);
        let report = reports.iter().find(|report| report.route == pattern.route().as_str()).unwrap();
        (report.panicked, report.failed, report.handled, report.in_flight)
    };
    assert_eq!(counts("panics"), (60, 60, 60, 0));
    assert_eq!(counts("value"), (40, 40, 40, 0));
    assert_eq!(counts("item"), (20, 20, 20, 0));
    stage.end().await;
}

/// After a panic the factory builds the state anew.
pub async fn a_panic_rebuilds_the_state<H: Harness>(harness: H) {
    let names = Names::new();
    let built = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&built);
    let info = martlet_core::HandlerInfo::new("state", martlet_core::HandlerKind::Message, names.of("state"));
    let group = HandlerGroup::from_parts("state", vec![info], move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        let calls = AtomicU64::new(0);
        vec![Box::new(move |request: martlet_core::Request| {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            assert!(request.data::<String>().unwrap() != "panic", "{DELIBERATE}");
            let payload = martlet_core::Payload::encode(request.format(), &call).unwrap();
            martlet_core::Outcome::Ready(Ok(martlet_core::Reply::Value(payload)))
        })]
    });
    let stage = Stage::new(harness, small().handlers(group)).await;
    let call = |text: &'static str| stage.client.send::<Value>(names.of("state"), text);
    assert_eq!(call("a").await.unwrap(), json!(0));
    assert_eq!(call("a").await.unwrap(), json!(1));
    assert_eq!(remote(call("panic").await), internal());
    assert_eq!(call("a").await.unwrap(), json!(0), "fresh state");
    assert_eq!(built.load(Ordering::Relaxed), 2);
    let tree = stage.service.tree();
    let place = tree.find("state").expect("the group is in the tree");
    assert_eq!(place.restarts, 1);
    assert!(place.last_cause.as_deref().unwrap().contains(DELIBERATE));
    stage.end().await;
}

/// However many requests panic, each is answered, and the service serves on.
pub async fn twenty_thousand_panics_are_each_answered<H: Harness>(harness: H) {
    const PANICS: u64 = 20_000;
    let names = Names::new();
    let panics = message(names.of("panics"), |Data(number): Data<u64>| async move {
        if number % 2 == 1 {
            tokio::task::yield_now().await;
        }
        panic!("{DELIBERATE} {number}");
        #[allow(unreachable_code)]
        ok(())
    });
    let service = small().handlers(panics).handlers(message(names.of("alive"), || async { ok(true) }));
    let stage = Stage::new(harness, service).await;
    let client = &stage.client;
    let answered = stream::iter(0..PANICS)
        .map(|number| client.send::<Value>(names.of("panics"), number))
        .buffer_unordered(256)
        .map(remote)
        .filter(|error| std::future::ready(*error == internal()))
        .count()
        .await;
    assert_eq!(answered as u64, PANICS);
    assert!(client.send::<bool>(names.of("alive"), 1).await.unwrap());
    assert_eq!(stage.end().await.done(), PANICS + 1);
}

/// A message that has killed its handler three times is refused; others are served.
pub async fn a_poisonous_message_is_refused<H: Harness>(harness: H) {
    let names = Names::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    let group = message(names.of("fragile"), move |Data(text): Data<String>| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            assert!(text != "poison", "{DELIBERATE}");
            ok(text)
        }
    });
    let stage = Stage::new(harness, small().handlers(group)).await;
    let seen = watch(stage.service.events());
    let call = |text: &'static str| stage.client.send::<Value>(names.of("fragile"), text);
    for _ in 0..3 {
        assert_eq!(remote(call("poison").await), internal());
    }
    assert_eq!(ran.load(Ordering::Relaxed), 3);
    for _ in 0..2 {
        let refused = remote(call("poison").await);
        assert_eq!(refused["code"], "POISONED_MESSAGE", "{refused}");
        assert_eq!(refused["status"], "error");
    }
    assert_eq!(ran.load(Ordering::Relaxed), 3, "it does not run again");
    assert_eq!(call("food").await.unwrap(), json!("food"));
    assert_eq!(seen("poison_refused"), 2);
    stage.end().await;
}

/// A payload that is not what the handler takes is answered with where it differs; it is no panic.
pub async fn a_payload_of_another_shape_is_answered<H: Harness>(harness: H) {
    let names = Names::new();
    let service =
        small().handlers(message(names.of("sum"), |Data(all): Data<Vec<i64>>| async move { ok(all.len()) }));
    let stage = Stage::new(harness, service).await;
    for wrong in [json!("text"), json!({"a": 1}), json!([1, "x"]), json!(null)] {
        let error = remote(stage.client.send(names.of("sum"), &wrong).await);
        let text = error["message"].as_str().unwrap();
        assert!(text.starts_with("Bad payload: "), "{text}");
    }
    assert_eq!(stage.client.send::<usize>(names.of("sum"), [1, 2]).await.unwrap(), 2);
    stage.end().await;
}
