// SPDX-License-Identifier: MIT OR Apache-2.0
//! Metadata beside the payload: the caller's own, the deadline, the trace.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use martlet_core::request::TRACEPARENT_KEY;
use martlet_core::trace::TraceContext;
use martlet_core::{CallError, Data, Deadline, Metadata, message};

use super::{Harness, Names, Stage, eventually, ok, small};

/// What the caller puts in is what the handler reads, on requests and events.
pub async fn a_handler_sees_metadata<H: Harness>(harness: H) {
    let names = Names::new();
    let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
    let own = |metadata: &Metadata| {
        let own =
            |(key, value): (&str, &str)| (key == "tenant" || key == "ü").then(|| format!("{key}={value}"));
        metadata.iter().filter_map(own).collect::<Vec<_>>()
    };
    let service = small()
        .handlers(message(names.of("meta"), move |metadata: Metadata| async move { ok(own(&metadata)) }))
        .handlers(martlet_core::event(names.of("evt"), move |metadata: Metadata| {
            heard.send(own(&metadata)).unwrap();
            async { ok(()) }
        }));
    let stage = Stage::new(harness, service).await;
    let call = stage.client.send::<Vec<String>>(names.of("meta"), 1);
    assert_eq!(call.metadata("tenant", "a b").metadata("ü", "ж").await.unwrap(), ["tenant=a b", "ü=ж"]);
    let none = stage.client.send::<Vec<String>>(names.of("meta"), 1).await.unwrap();
    assert_eq!(none, Vec::<String>::new());
    let metadata = Metadata::from_iter([("tenant", "7")]);
    stage.client.emit_with(names.of("evt"), 1, metadata).await.unwrap();
    assert_eq!(hears.recv().await.unwrap(), ["tenant=7"]);
    stage.end().await;
}

struct Alive(Arc<AtomicBool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The caller's limit reaches the handler, which is dropped when it passes.
pub async fn a_deadline_travels_and_is_honoured<H: Harness>(harness: H) {
    let names = Names::new();
    let alive = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&alive);
    let service = small()
        .handlers(message(names.of("left"), |deadline: Deadline| async move {
            ok(deadline.remaining().map(|left| left.as_millis() as u64))
        }))
        .handlers(message(names.of("endless"), move || {
            let flag = Arc::clone(&flag);
            async move {
                flag.store(true, Ordering::SeqCst);
                let _alive = Alive(flag);
                std::future::pending::<()>().await;
                ok(())
            }
        }));
    let stage = Stage::new(harness, service).await;
    let left = stage.client.send::<Option<u64>>(names.of("left"), 1).timeout(Duration::from_secs(5)).await;
    let left = left.unwrap().expect("there is a deadline");
    assert!((2000..=5000).contains(&left), "{left} ms left of 5000");
    let unlimited = stage.client.send::<Option<u64>>(names.of("left"), 1).no_timeout().await;
    assert_eq!(unlimited.unwrap(), None);
    let call = stage.client.send::<()>(names.of("endless"), 1).timeout(Duration::from_millis(150));
    let (result, ()) = futures::join!(call, async {
        eventually("the handler runs", || alive.load(Ordering::SeqCst)).await;
    });
    match result {
        Err(CallError::Timeout { .. }) => {}
        // The server's clock may be the faster one.
        Err(CallError::Remote(error)) => assert_eq!(error.message().as_deref(), Some("Deadline exceeded")),
        other => panic!("a timeout expected, got {other:?}"),
    }
    eventually("the handler was dropped", || !alive.load(Ordering::SeqCst)).await;
    stage.end().await;
}

/// A call made inside a handler belongs to the caller's trace, and does not outlive the caller's deadline.
pub async fn a_trace_is_passed_on_by_calls_inside_a_handler<H: Harness>(mut harness: H) {
    let names = Names::new();
    let inner = small()
        .handlers(message(names.of("inner"), |metadata: Metadata, deadline: Deadline| async move {
            let left = deadline.remaining().map(|left| left.as_millis() as u64);
            ok((metadata.get(TRACEPARENT_KEY).map(str::to_owned), left))
        }))
        .server(harness.server(Default::default()))
        .start()
        .await
        .unwrap();
    let options = harness.client_options();
    let downstream = harness.client(&inner.url(), options);
    let (client, pattern) = (downstream.clone(), names.of("inner"));
    let outer = message(names.of("outer"), move |Data(wait): Data<bool>| {
        let (client, pattern) = (client.clone(), pattern.clone());
        async move {
            if wait {
                // The trace follows the handler past its first await.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            client.send::<(Option<String>, Option<u64>)>(pattern, 1).await
        }
    });
    let stage = Stage::new(harness, small().handlers(outer)).await;
    let trace = TraceContext::root();
    for wait in [false, true] {
        let call = stage.client.send::<(Option<String>, Option<u64>)>(names.of("outer"), wait);
        let (seen, left) = call.trace(&trace).timeout(Duration::from_secs(5)).await.unwrap();
        let seen = TraceContext::parse(&seen.expect("a traceparent"), None).unwrap();
        assert_eq!(seen.trace_id(), trace.trace_id());
        assert_ne!(seen.span_id(), trace.span_id());
        assert!(left.expect("a deadline") <= 5000, "{left:?}");
    }
    downstream.close().await;
    stage.end().await;
    inner.stop(Duration::from_secs(1)).await;
}
