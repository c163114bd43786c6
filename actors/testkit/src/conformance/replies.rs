// SPDX-License-Identifier: MIT OR Apache-2.0
//! Replies: one, none, many; their order.

use std::time::Duration;

use futures::stream::{self, StreamExt};
use martlet_core::{CallError, Data, Payload, RpcError, Streaming, TryStreaming, message};
use serde_json::{Value, json};

use super::{Harness, Names, Stage, ok, patience, small};

/// A handler's value is the call's.
pub async fn a_handler_gives_one_reply<H: Harness>(harness: H) {
    let names = Names::new();
    let sum =
        message(
            names.of("sum"),
            |Data(numbers): Data<Vec<i64>>| async move { ok(numbers.iter().sum::<i64>()) },
        );
    let stage = Stage::new(harness, small().handlers(sum)).await;
    assert_eq!(stage.client.send::<i64>(names.of("sum"), [1, 2, 3]).await.unwrap(), 6);
    let all = stage.client.send::<i64>(names.of("sum"), [4]).stream().collect_all().await.unwrap();
    assert_eq!(all, [4]);
    assert_eq!(stage.end().await.done(), 2);
}

/// Completion without a value and the value null are two things, told apart by the type asked for.
pub async fn a_handler_gives_nothing_or_null<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small()
        .handlers(message(names.of("nothing"), || async { ok(()) }))
        .handlers(message(names.of("null"), || async { ok(None::<i64>) }));
    let stage = Stage::new(harness, service).await;
    let client = &stage.client;
    client.send::<()>(names.of("nothing"), 1).await.unwrap();
    assert_eq!(client.send::<Option<i64>>(names.of("nothing"), 1).await.unwrap(), None);
    assert!(matches!(client.send::<i64>(names.of("nothing"), 1).await, Err(CallError::NoValue)));
    let all = client.send::<Option<i64>>(names.of("nothing"), 1).stream().collect_all().await.unwrap();
    assert_eq!(all, []);
    assert_eq!(client.send::<Option<i64>>(names.of("null"), 1).await.unwrap(), None);
    assert!(matches!(client.send::<i64>(names.of("null"), 1).await, Err(CallError::Decode(_))));
    let all = client.send::<Option<i64>>(names.of("null"), 1).stream().collect_all().await.unwrap();
    assert_eq!(all, [None]);
    stage.end().await;
}

/// The payload path changes no value.
pub async fn any_json_value_comes_back_as_it_went<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small().handlers(message(names.of("echo"), |payload: Payload| async move { ok(payload) }));
    let stage = Stage::new(harness, service).await;
    for value in [
        json!(null),
        json!(true),
        json!(0),
        json!(-7),
        json!(1.5),
        json!(""),
        json!("text \" \\ \u{1}"),
        json!([]),
        json!({}),
        json!([1, [2, [3, {"a": null}]]]),
        json!({"err": 1, "response": 2, "isDisposed": false, "id": "x"}),
    ] {
        assert_eq!(stage.client.send::<Value>(names.of("echo"), &value).await.unwrap(), value);
    }
    stage.end().await;
}

/// Text of any script, and payloads as large as the features promise.
pub async fn unicode_and_large_payloads_come_through<H: Harness>(harness: H) {
    let names = Names::new();
    let large = harness.features().large_payload_bytes;
    let service = small().handlers(message(names.of("echo"), |payload: Payload| async move { ok(payload) }));
    let stage = Stage::new(harness, service).await;
    let unicode = "Ω ж 漢字 🦀 \u{2028}\u{0}é";
    assert_eq!(stage.client.send::<String>(names.of("echo"), unicode).await.unwrap(), unicode);
    for size in [large / 64, large / 2, large - 512] {
        let text = "ü🦀x".repeat(size / 7);
        assert_eq!(stage.client.send::<String>(names.of("echo"), &text).await.unwrap(), text);
    }
    stage.end().await;
}

/// Each item is a reply, in order; the end is the end.
pub async fn a_stream_gives_every_item_then_ends<H: Harness>(harness: H) {
    let names = Names::new();
    let count =
        message(names.of("count"), |Data(to): Data<u64>| async move { ok(Streaming(stream::iter(0..to))) });
    let stage = Stage::new(harness, small().handlers(count)).await;
    for to in [1, 2, 700] {
        let all = stage.client.send::<u64>(names.of("count"), to).stream().collect_all().await.unwrap();
        assert_eq!(all, (0..to).collect::<Vec<_>>());
    }
    let mut replies = stage.client.send::<u64>(names.of("count"), 2).stream();
    assert_eq!(replies.next().await.unwrap().unwrap(), 0);
    assert_eq!(replies.next().await.unwrap().unwrap(), 1);
    assert!(replies.next().await.is_none());
    assert!(replies.next().await.is_none(), "the end stays the end");
    stage.end().await;
}

/// Completion may come long after the last item, or without any.
pub async fn a_stream_may_end_late_or_empty<H: Harness>(harness: H) {
    let names = Names::new();
    let late = message(names.of("late"), || async {
        let pause = || tokio::time::sleep(Duration::from_millis(10));
        let items = stream::iter(["a", "b"]).then(move |item| async move {
            pause().await;
            item
        });
        let end = stream::once(pause()).filter_map(|()| async { None });
        ok(Streaming(items.chain(end)))
    });
    let service = small()
        .handlers(late)
        .handlers(message(names.of("empty"), || async { ok(Streaming(stream::empty::<u64>())) }));
    let stage = Stage::new(harness, service).await;
    let all = stage.client.send::<String>(names.of("late"), 1).stream().collect_all().await.unwrap();
    assert_eq!(all, ["a", "b"]);
    let all = stage.client.send::<u64>(names.of("empty"), 1).stream().collect_all().await.unwrap();
    assert!(all.is_empty());
    assert!(matches!(stage.client.send::<u64>(names.of("empty"), 1).await, Err(CallError::NoValue)));
    stage.end().await;
}

/// Items before the error arrive; the error ends it.
pub async fn a_stream_may_fail_in_its_middle<H: Harness>(harness: H) {
    let names = Names::new();
    let failing = message(names.of("failing"), || async {
        ok(TryStreaming(stream::iter([Ok(1), Ok(2), Err(RpcError::message("boom")), Ok(3)])))
    });
    let stage = Stage::new(harness, small().handlers(failing)).await;
    let mut replies = stage.client.send::<u64>(names.of("failing"), 1).stream();
    assert_eq!(replies.next().await.unwrap().unwrap(), 1);
    assert_eq!(replies.next().await.unwrap().unwrap(), 2);
    let error = replies.next().await.unwrap().unwrap_err();
    assert_eq!(error.remote().unwrap().message().as_deref(), Some("boom"));
    assert!(replies.next().await.is_none());
    stage.end().await;
}

/// Awaiting a call takes the first item.
pub async fn a_single_reply_of_a_stream_is_its_first<H: Harness>(harness: H) {
    let names = Names::new();
    let endless = message(names.of("endless"), || async {
        ok(Streaming(stream::iter(7u64..).then(|item| async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            item
        })))
    });
    let finite = message(names.of("finite"), || async { ok(Streaming(stream::iter([7u64, 8, 9]))) });
    let cancels = harness.features().cancel;
    let stage = Stage::new(harness, small().handlers(endless).handlers(finite)).await;
    assert_eq!(stage.client.send::<u64>(names.of("finite"), 1).await.unwrap(), 7);
    if cancels {
        // Without cancellation on the wire an endless stream would go on until its peer goes.
        assert_eq!(stage.client.send::<u64>(names.of("endless"), 1).await.unwrap(), 7);
    }
    stage.end().await;
}

/// A slow request does not hold up those behind it.
pub async fn replies_come_in_the_order_they_finish<H: Harness>(harness: H) {
    let names = Names::new();
    let slow = message(names.of("slow"), |Data(millis): Data<u64>| async move {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        ok(millis)
    });
    let stage = Stage::new(harness, small().handlers(slow)).await;
    let calls = [120, 80, 40, 0].map(|millis| stage.client.send::<u64>(names.of("slow"), millis));
    let order: Vec<_> =
        calls.into_iter().collect::<stream::FuturesUnordered<_>>().map(Result::unwrap).collect().await;
    assert_eq!(order, [0, 40, 80, 120]);
    stage.end().await;
}

/// Each reply finds its own caller, short ones and long ones, which are not read in the same way, in any order.
pub async fn many_calls_are_in_flight_at_once<H: Harness>(harness: H) {
    fn answer(number: u64) -> String {
        format!("{number}{}", "-".repeat(if number % 5 < 3 { 0 } else { 40 }))
    }
    let names = Names::new();
    let echo = message(names.of("echo"), |Data(number): Data<u64>| async move {
        if number % 3 == 0 {
            tokio::time::sleep(Duration::from_millis(number % 7)).await;
        }
        ok(answer(number))
    });
    let stage = Stage::new(harness, martlet_core::Microservice::new().arbiters(2).handlers(echo)).await;
    let calls = (0..3000u64).map(|number| stage.client.send::<String>(names.of("echo"), number));
    let replies = futures::future::try_join_all(calls).await.unwrap();
    assert!(replies.into_iter().eq((0..3000).map(answer)));
    stage.end().await;
}

/// A pattern without a handler is an outcome of its own.
pub async fn a_call_nobody_handles_says_so<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small().handlers(message(names.of("here"), || async { ok(1) }));
    let stage = Stage::new(harness, service).await;
    let features = stage.harness.features();
    match stage.client.send::<u64>(names.of("nowhere"), 1).timeout(patience(&features)).await {
        Err(CallError::Timeout { .. }) if !features.says_nobody => {}
        Err(CallError::NoHandler { pattern }) => assert_eq!(pattern, names.of("nowhere").route().as_str()),
        other => panic!("no handler expected, got {other:?}"),
    }
    assert_eq!(stage.client.send::<u64>(names.of("here"), 1).await.unwrap(), 1);
    stage.end().await;
}
