// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events: everyone who listens hears them, nobody answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use martlet_core::{Data, HandlerGroup, Pattern, RpcError, event, message};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{DELIBERATE, Harness, Names, Stage, eventually, moment, ok, small, watch};

fn listener(pattern: Pattern, heard: &mpsc::UnboundedSender<i64>) -> HandlerGroup {
    let heard = heard.clone();
    event(pattern, move |Data(number): Data<i64>| {
        let heard = heard.clone();
        async move {
            heard.send(number).unwrap();
            ok(())
        }
    })
}

/// An event goes out at once, awaited or not.
pub async fn an_event_reaches_its_handler<H: Harness>(harness: H) {
    let names = Names::new();
    let (heard, mut hears) = mpsc::unbounded_channel();
    let stage = Stage::new(harness, small().handlers(listener(names.of("evt"), &heard))).await;
    stage.client.emit(names.of("evt"), 1).await.unwrap();
    assert_eq!(hears.recv().await, Some(1));
    drop(stage.client.emit(names.of("evt"), 2));
    assert_eq!(hears.recv().await, Some(2));
    assert_eq!(stage.end().await.done(), 2);
}

/// Several handlers of one event all run, each once.
pub async fn every_handler_of_an_event_runs<H: Harness>(harness: H) {
    let names = Names::new();
    let (heard, mut hears) = mpsc::unbounded_channel();
    let service = (0..3).fold(small(), |service, _| service.handlers(listener(names.of("evt"), &heard)));
    let stage = Stage::new(harness, service).await;
    for number in 0..20 {
        stage.client.emit(names.of("evt"), number).await.unwrap();
    }
    let mut all = Vec::new();
    for _ in 0..60 {
        all.push(hears.recv().await.unwrap());
    }
    moment().await;
    assert!(hears.try_recv().is_err(), "no handler runs twice");
    all.sort_unstable();
    assert_eq!(all, (0..20).flat_map(|number| [number; 3]).collect::<Vec<_>>());
    stage.end().await;
}

/// An error or a panic in one handler is reported and leaves the others alone.
pub async fn a_failing_event_handler_does_not_stop_the_others<H: Harness>(harness: H) {
    let names = Names::new();
    let (heard, mut hears) = mpsc::unbounded_channel();
    let service = small()
        .handlers(event(names.of("evt"), || async { Err::<(), _>(RpcError::unexpected("broken")) }))
        .handlers(event(names.of("evt"), |Data(_): Data<i64>| async {
            panic!("{DELIBERATE}");
            #[allow(unreachable_code)]
            ok(())
        }))
        .handlers(listener(names.of("evt"), &heard));
    let stage = Stage::new(harness, service).await;
    let seen = watch(stage.service.events());
    for number in 0..5 {
        stage.client.emit(names.of("evt"), number).await.unwrap();
        assert_eq!(hears.recv().await, Some(number));
    }
    eventually("five errors and five panics are reported", || {
        seen("unexpected_error") == 5 && seen("handler_panicked") == 5
    })
    .await;
    stage.end().await;
}

/// An event that nobody handles is dropped; what follows is served.
pub async fn an_unknown_event_is_reported_and_disturbs_nothing<H: Harness>(harness: H) {
    let names = Names::new();
    let broker = harness.features().subscribes;
    let service = small().handlers(message(names.of("here"), || async { ok(1) }));
    let stage = Stage::new(harness, service).await;
    let seen = watch(stage.service.events());
    stage.client.emit(names.of("nowhere"), 1).await.unwrap();
    assert_eq!(stage.client.send::<u64>(names.of("here"), 1).await.unwrap(), 1);
    if !broker {
        // A broker does not deliver it in the first place.
        eventually("the unknown event is reported", || seen("no_event_handler") == 1).await;
    }
    stage.end().await;
}

/// A message sent to an event handler is answered with its result.
pub async fn a_message_reaches_an_event_handler_and_is_answered<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small()
        .handlers(event(names.of("value"), |Data(number): Data<i64>| async move { ok(number + 1) }))
        .handlers(event(names.of("nothing"), || async { ok(()) }));
    let stage = Stage::new(harness, service).await;
    assert_eq!(stage.client.send::<i64>(names.of("value"), 1).await.unwrap(), 2);
    stage.client.send::<()>(names.of("nothing"), 1).await.unwrap();
    stage.end().await;
}

/// A message sent to a chain of event handlers is answered with NestJS's nested form.
pub async fn a_message_to_several_event_handlers_gives_the_nested_reply<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small()
        .handlers(event(names.of("two"), || async { ok("r1") }))
        .handlers(event(names.of("two"), || async { ok("r2") }))
        .handlers(event(names.of("three"), || async { ok("r1") }))
        .handlers(event(names.of("three"), || async { ok(()) }))
        .handlers(event(names.of("three"), || async { ok("r3") }));
    let stage = Stage::new(harness, service).await;
    let reply = stage.client.send::<Value>(names.of("two"), 1).await.unwrap();
    assert_eq!(reply, json!({"current": "r1", "next": "r2"}));
    let reply = stage.client.send::<Value>(names.of("three"), 1).await.unwrap();
    assert_eq!(reply, json!({"current": "r1", "next": {"next": "r3"}}));
    stage.end().await;
}

/// An event sent to a message handler runs it; nothing comes back.
pub async fn an_event_reaches_a_message_handler<H: Harness>(harness: H) {
    let names = Names::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    let service = small().handlers(message(names.of("msg"), move || {
        count.fetch_add(1, Ordering::Relaxed);
        async { ok(1) }
    }));
    let stage = Stage::new(harness, service).await;
    stage.client.emit(names.of("msg"), 1).await.unwrap();
    eventually("the handler ran", || ran.load(Ordering::Relaxed) == 1).await;
    moment().await;
    assert_eq!(stage.client.late_replies(), 0, "nothing comes back");
    stage.end().await;
}

/// More bytes at once than the client takes for writing: what waits is sent as soon as there is room.
pub async fn many_large_events_all_arrive<H: Harness>(harness: H) {
    let names = Names::new();
    let heard = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&heard);
    let service = small().handlers(event(names.of("evt"), move |Data(text): Data<String>| {
        count.fetch_add(text.len(), Ordering::Relaxed);
        async { ok(()) }
    }));
    let stage = Stage::new(harness, service).await;
    let text = "x".repeat(64 * 1024);
    for _ in 0..40 {
        drop(stage.client.emit(names.of("evt"), &text));
    }
    eventually("every byte was heard", || heard.load(Ordering::Relaxed) == 40 * text.len()).await;
    stage.end().await;
}
