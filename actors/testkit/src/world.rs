// SPDX-License-Identifier: MIT OR Apache-2.0
//! A service with a few handlers for a test, what it reports, and waiting for something to hold.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet_core::{
    Data, HandlerGroup, Microservice, Pattern, RpcError, RunningService, Server, ServiceEvent, Streaming,
    event, message,
};
use parking_lot::Mutex;
use tokio::time::Instant;

/// How long services of tests may take to stop.
pub const GRACE: Duration = Duration::from_secs(5);

/// What a service has reported so far.
#[derive(Debug, Clone, Default)]
pub struct Reports(Arc<Mutex<Vec<ServiceEvent>>>);

impl Reports {
    /// Whether a report contains a text.
    pub fn contain(&self, text: &str) -> bool {
        self.0.lock().iter().any(|event| event.to_string().contains(text))
    }

    /// The texts of all.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().iter().map(ToString::to_string).collect()
    }
}

/// Serves groups on the test's own thread.
///
/// # Panics
///
/// When the service does not start.
pub async fn serve(
    server: impl Into<Server>,
    groups: impl IntoIterator<Item = HandlerGroup>,
) -> (RunningService, Reports) {
    start(Microservice::new().on_current_arbiter(), server, groups).await
}

/// Serves groups on a thread of their own, so that a test that blocks does not hold them up.
///
/// # Panics
///
/// When the service does not start.
pub async fn serve_apart(
    server: impl Into<Server>,
    groups: impl IntoIterator<Item = HandlerGroup>,
) -> (RunningService, Reports) {
    start(Microservice::new().arbiters(1), server, groups).await
}

async fn start(
    service: Microservice,
    server: impl Into<Server>,
    groups: impl IntoIterator<Item = HandlerGroup>,
) -> (RunningService, Reports) {
    let reports = Reports::default();
    let sink = reports.clone();
    let mut service = service.on(move |event| sink.0.lock().push(event.clone())).server(server.into());
    for group in groups {
        service = service.handlers(group);
    }
    (service.start().await.unwrap(), reports)
}

/// `sum` adds numbers.
pub fn sum() -> HandlerGroup {
    sum_on("sum")
}

/// The same as `{"cmd":"sum"}`.
pub fn sum_object() -> HandlerGroup {
    sum_on(r#"{"cmd":"sum"}"#)
}

/// The same for a pattern of one's own, in NestJS's spelling.
pub fn sum_on(pattern: &str) -> HandlerGroup {
    message(Pattern::parse(pattern), async |Data(numbers): Data<Vec<i64>>| {
        Ok::<_, RpcError>(numbers.iter().sum::<i64>())
    })
}

/// `slow` answers its number after that many milliseconds.
pub fn slow() -> HandlerGroup {
    message("slow", async |Data(millis): Data<u64>| {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        Ok::<_, RpcError>(millis)
    })
}

/// `stream` answers each of its items.
pub fn streaming() -> HandlerGroup {
    message("stream", async |Data(items): Data<Vec<i64>>| {
        Ok::<_, RpcError>(Streaming(futures::stream::iter(items)))
    })
}

/// `fail` fails as it is told: `message`, `object`, `unexpected`; anything else panics.
pub fn failing() -> HandlerGroup {
    message("fail", async |Data(kind): Data<String>| match kind.as_str() {
        "message" => Err::<i64, _>(RpcError::message("boom")),
        "object" => Err(RpcError::json(serde_json::json!({"code": 42, "message": "m"}))),
        "unexpected" => Err(RpcError::unexpected("a secret")),
        _ => panic!("asked for"),
    })
}

/// An event handler that counts.
pub fn counting(pattern: &str, count: &Arc<AtomicU64>) -> HandlerGroup {
    let count = Arc::clone(count);
    event(Pattern::from(pattern), move || {
        count.fetch_add(1, Ordering::Relaxed);
    })
}

/// Waits until something holds.
///
/// # Panics
///
/// After thirty seconds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
