// SPDX-License-Identifier: MIT OR Apache-2.0
//! `trace_span`: a handler runs inside a span that knows its caller's trace, and how it ended.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::num::NonZeroU64;
use std::sync::Arc;

use martlet_core::interceptor::{guard, trace_span};
use martlet_core::{CallError, ClientProxy, Data, Microservice, RpcError, RunningService, event, message};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Metadata, Subscriber};

use crate::support::{end, eventually, ms, ok, paused};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A span that was made.
struct Kept {
    metadata: &'static Metadata<'static>,
    fields: BTreeMap<&'static str, String>,
    handles: usize,
}

impl Visit for Kept {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// Keeps every span of one thread, and which of them are entered.
#[derive(Default)]
struct Recorder {
    spans: Mutex<Vec<Kept>>,
    entered: Mutex<Vec<Id>>,
}

impl Recorder {
    fn start() -> (Arc<Self>, DefaultGuard) {
        let recorder = Arc::new(Self::default());
        let guard = tracing::subscriber::set_default(Arc::clone(&recorder));
        (recorder, guard)
    }

    fn with<T>(&self, id: &Id, what: impl FnOnce(&mut Kept) -> T) -> T {
        what(&mut self.spans.lock()[id.into_u64() as usize - 1])
    }

    /// The number of the innermost span that is entered now; 0 if none is.
    fn current(&self) -> u64 {
        self.entered.lock().last().map_or(0, Id::into_u64)
    }

    /// The fields of the span with this number.
    fn fields(&self, id: u64) -> BTreeMap<&'static str, String> {
        self.with(&Id::from_u64(id), |span| {
            assert_eq!((span.metadata.name(), span.metadata.target()), ("rpc", "martlet"));
            span.fields.clone()
        })
    }

    /// The errors of all spans, in the order in which these were made.
    fn errors(&self) -> Vec<Option<String>> {
        self.spans.lock().iter().map(|span| span.fields.get("error").cloned()).collect()
    }

    /// No span is entered, and none is kept by anybody.
    fn all_over(&self) -> bool {
        self.entered.lock().is_empty() && self.spans.lock().iter().all(|span| span.handles == 0)
    }
}

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span()
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut kept = Kept { metadata: attributes.metadata(), fields: BTreeMap::new(), handles: 1 };
        attributes.record(&mut kept);
        let mut spans = self.spans.lock();
        spans.push(kept);
        Id::from_non_zero_u64(NonZeroU64::new(spans.len() as u64).unwrap())
    }

    fn record(&self, id: &Id, values: &Record<'_>) {
        self.with(id, |span| values.record(span));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, id: &Id) {
        self.entered.lock().push(id.clone());
    }

    fn exit(&self, id: &Id) {
        assert_eq!(self.entered.lock().pop().as_ref(), Some(id));
    }

    fn clone_span(&self, id: &Id) -> Id {
        self.with(id, |span| span.handles += 1);
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        self.with(&id, |span| {
            span.handles -= 1;
            span.handles == 0
        })
    }
}

async fn serve(service: Microservice) -> (RunningService, ClientProxy) {
    let network = MemoryNetwork::new();
    let service = service.on_current_arbiter().server(MemoryServer::new(&network)).start().await.unwrap();
    (service, MemoryClient::new(&network))
}

#[test]
fn a_handler_runs_inside_a_span_with_its_callers_trace() {
    paused(async {
        let (recorder, _guard) = Recorder::start();
        let spans = Arc::clone(&recorder);
        let where_am_i = message("where", move |Data(millis): Data<u64>| {
            let (called, spans) = (spans.current(), Arc::clone(&spans));
            async move {
                let begun = spans.current();
                tokio::time::sleep(ms(millis)).await;
                ok([called, begun, spans.current()])
            }
        });
        let service = Microservice::new().interceptor(trace_span()).handlers(where_am_i);
        let (service, client) = serve(service).await;
        let ask = |millis: u64, parent: &str| {
            let traceparent = format!("00-{TRACE}-{parent}-01");
            client.send::<[u64; 3]>("where", millis).metadata("traceparent", traceparent)
        };
        // The second one ends before the first: each wakes in its own.
        let (one, two) = futures::join!(ask(20, PARENT), ask(10, "00000000000000ff"));
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_eq!((one, two), ([1; 3], [2; 3]));
        for (span, parent) in [(1, PARENT), (2, "00000000000000ff")] {
            let expected = [
                ("network.transport", "memory"),
                ("otel.kind", "server"),
                ("parent_span_id", parent),
                ("rpc.method", "where"),
                ("rpc.system", "nestjs"),
                ("trace_id", TRACE),
            ];
            let expected = expected.map(|(name, value)| (name, value.to_owned()));
            assert_eq!(recorder.fields(span), BTreeMap::from(expected));
        }
        assert!(recorder.all_over(), "they end with their requests");
        end(client, service).await;
    });
}

#[test]
fn a_span_without_a_trace_of_its_caller_has_none() {
    paused(async {
        let (recorder, _guard) = Recorder::start();
        let spans = Arc::clone(&recorder);
        let where_am_i = message("where", move || ok(spans.current()));
        let service = Microservice::new().interceptor(trace_span()).handlers(where_am_i);
        let (service, client) = serve(service).await;
        assert_eq!(client.send::<u64>("where", ()).await.unwrap(), 1);
        let invalid = format!("00-{TRACE}-0000000000000000-01");
        assert_eq!(client.send::<u64>("where", ()).metadata("traceparent", invalid).await.unwrap(), 2);
        for span in [1, 2] {
            let fields = recorder.fields(span);
            assert_eq!(fields["rpc.method"], "where");
            assert!(!fields.contains_key("trace_id") && !fields.contains_key("parent_span_id"), "{fields:?}");
        }
        end(client, service).await;
    });
}

#[test]
fn a_span_keeps_the_error_that_its_handler_ended_with() {
    paused(async {
        let (recorder, _guard) = Recorder::start();
        let fails = || Err::<(), _>(RpcError::message("out of stock"));
        let breaks = || Err::<(), _>(RpcError::unexpected("the disk is full"));
        let service = Microservice::new()
            .interceptor(trace_span())
            .handlers(message("works", || async { ok(1) }))
            .handlers(message("fails", move || async move { fails() }))
            .handlers(message("breaks", move || async move { breaks() }))
            .handlers(message("refuses", || async { ok(1) }).interceptor(guard(|_| async { Ok(false) })))
            .handlers(event("heard", move || async move { fails() }));
        let (service, client) = serve(service).await;
        for (pattern, told) in [
            ("works", None),
            ("fails", Some("out of stock")),
            // Its cause is not for the caller.
            ("breaks", Some("Internal server error")),
            ("refuses", Some("Forbidden resource")),
        ] {
            let error = match client.send::<u64>(pattern, ()).await {
                Ok(_) => None,
                Err(CallError::Remote(error)) => error.message(),
                Err(other) => panic!("{other:?}"),
            };
            assert_eq!(error.as_deref(), told, "{pattern}");
        }
        client.emit("heard", ()).await.unwrap();
        eventually("the event is handled", || recorder.errors().len() == 5 && recorder.all_over()).await;
        let expected = [
            None,
            Some("out of stock"),
            Some("unexpected error: the disk is full"),
            Some("Forbidden resource"),
            Some("out of stock"),
        ];
        assert_eq!(recorder.errors(), expected.map(|error| error.map(str::to_owned)));
        end(client, service).await;
    });
}
