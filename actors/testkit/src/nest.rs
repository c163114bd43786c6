// SPDX-License-Identifier: MIT OR Apache-2.0
//! The application whose packets the golden vectors are, written with Martlet.
//!
//! The vectors (`tests/vectors/*.json` of the transporters) were recorded from one NestJS application over every
//! transport. [`NestApp`] has its handlers, each written as one would write it here: the errors are made by
//! [`RpcError`]'s own constructors, a generic failure is a panic or an unexpected error, streams are streams. A
//! transporter is given what NestJS clients sent and must answer with the bytes that NestJS answered with.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt};
use martlet_core::interceptor::{catch_and_map, guard};
use martlet_core::{
    Data, Format, HandlerGroup, Pattern, Payload, Reply, Request, RpcError, TransportId, event, message,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

// === vectors ===

/// One exchange of the vectors: what a NestJS client sent, and what NestJS answered.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Exchange {
    /// Its name, by which [`DIFFERENT`] excepts some.
    pub name: String,
    /// What the client sent, with everything the vectors say of it: `pattern`, `data`, `subject`, `headers`, `raw`.
    pub request: Value,
    /// Whether that was an event.
    pub is_event: bool,
    /// The bytes of each reply.
    pub replies: Vec<String>,
    /// What the NestJS client that sent it made of the replies: `next`, `complete`, `error`.
    pub observed: Value,
}

impl Exchange {
    /// What the client sent, as it was on the wire.
    pub fn raw(&self) -> &str {
        self.request["raw"].as_str().unwrap()
    }

    /// The id of the request.
    pub fn id(&self) -> &str {
        let (_, rest) = self.raw().rsplit_once(r#""id":""#).unwrap();
        rest.split_once('"').unwrap().0
    }

    /// Whether it is excepted.
    pub fn is_different(&self) -> bool {
        DIFFERENT.iter().any(|(name, _)| *name == self.name)
    }
}

/// The exchanges of a file of vectors.
///
/// # Panics
///
/// When it is no such file.
pub fn exchanges(vectors: &str) -> Vec<Exchange> {
    // Vectors have halves of surrogate pairs, which only packets may have.
    let file = Payload::new(Format::Json, Bytes::copy_from_slice(vectors.as_bytes())).to_value().unwrap();
    let scenarios = file["scenarios"].as_array().unwrap();
    let mut found: Vec<Exchange> = Vec::new();
    for vector in file["vectors"].as_array().unwrap() {
        let name = vector["exchange"].as_str().unwrap();
        if vector["direction"] == "server->client" {
            let exchange = found.iter_mut().find(|exchange| exchange.name == name).unwrap();
            exchange.replies.push(vector["raw"].as_str().unwrap().to_owned());
            continue;
        }
        let scenario = scenarios.iter().find(|scenario| scenario["name"] == name);
        found.push(Exchange {
            name: name.to_owned(),
            request: vector.clone(),
            is_event: vector["kind"] == "event",
            replies: Vec::new(),
            observed: scenario.map(|scenario| scenario["client_observed"].clone()).unwrap_or_default(),
        });
    }
    found
}

/// Exchanges that are answered otherwise, or not at all, each with the reason.
pub const DIFFERENT: &[(&str, &str)] = &[
    ("stream_undefined_middle", "an item without a value is never sent: it is null"),
    ("no_param_decorators", "the answer counts the arguments that NestJS passes"),
    ("context", "the answer names a class of NestJS"),
    ("request_scoped", "the answer names classes of NestJS"),
    ("message_sent_to_event_handler", "the answer is a leftover of NestJS's chain of event handlers"),
    ("stream_cancelled_by_client", "where it ends depends on when the client left"),
];

// === the application ===

/// The application: its handlers, and the events they have seen. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct NestApp {
    seen: Arc<Mutex<Vec<(String, Value)>>>,
}

/// An error object whose members have an order.
#[derive(Serialize)]
struct ObjectError {
    code: u32,
    message: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra: Option<BTreeMap<&'static str, Vec<u32>>>,
}

#[derive(Serialize)]
struct Buffer {
    r#type: &'static str,
    data: [u8; 3],
}

/// What the pipe of `validate_rpc` reads.
#[derive(Deserialize)]
struct Person {
    name: Value,
    age: i64,
}

#[derive(Serialize)]
struct Violation {
    property: &'static str,
    constraints: BTreeMap<&'static str, &'static str>,
}

fn ok<T>(value: T) -> Result<T, RpcError> {
    Ok(value)
}

fn fails(
    error: impl Fn() -> RpcError + Clone + Send + Sync + 'static,
) -> impl Fn() -> Result<(), RpcError> + Clone {
    move || Err(error())
}

fn sum(Data(numbers): Data<Vec<i64>>) -> Result<i64, RpcError> {
    Ok(numbers.iter().sum())
}

async fn echo_later(data: Payload) -> Result<Payload, RpcError> {
    tokio::time::sleep(Duration::from_millis(1)).await;
    Ok(data)
}

/// The items of a stream, each of them later.
fn later<T: 'static>(items: impl IntoIterator<Item = T, IntoIter: 'static>) -> impl Stream<Item = T> {
    stream::iter(items).then(|item| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        item
    })
}

/// Nothing, and the end later.
fn nothing_yet<T: 'static>() -> impl Stream<Item = T> {
    later([()]).filter_map(|()| async { None })
}

fn validate(Data(person): Data<Person>) -> Result<bool, RpcError> {
    let violation =
        |property, name, text| Violation { property, constraints: BTreeMap::from([(name, text)]) };
    let mut violations = Vec::new();
    if !person.name.is_string() {
        violations.push(violation("name", "isString", "name must be a string"));
    }
    if person.age < 1 {
        violations.push(violation("age", "min", "age must not be less than 1"));
    }
    if violations.is_empty() { Ok(false) } else { Err(RpcError::json(violations)) }
}

fn text(value: &str) -> Result<Reply, RpcError> {
    Ok(Reply::Value(Payload::encode(Format::Json, value)?))
}

impl NestApp {
    /// The application, which has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The events that its handlers have seen since the last look: pattern and data.
    pub fn take_events(&self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.seen.lock())
    }

    /// An event handler that notes what it sees.
    pub fn notes(&self, pattern: impl Into<Pattern>) -> HandlerGroup {
        let app = self.clone();
        event(pattern, move |request: Request| {
            let data = request.payload().to_value().unwrap_or_default();
            app.seen.lock().push((request.route().to_string(), data));
        })
    }

    /// Its handlers, but for those of one transport alone (wildcards, headers).
    pub fn handlers(&self) -> Vec<HandlerGroup> {
        let object = |value: Value| Pattern::from_json(&value).unwrap();
        let mut groups = self.values();
        groups.extend(self.streams());
        groups.extend(self.errors());
        groups.extend([
            message("sum", sum),
            message(object(json!({"cmd": "sum"})), sum),
            message(object(json!({"nested": {"z": true, "y": [1, "k"]}, "a": "x", "b": 1})), || {
                ok("nested-ok")
            }),
            message(42, || ok("num-ok")),
            message("multi_a", || ok("multi")),
            message("multi_b", || ok("multi")),
            message("dupmsg", || ok("second")),
            message("only_tcp", || ok("tcp-only")).transport(TransportId::TCP),
            message("only_nats", || ok("nats-only")).transport(TransportId::NATS),
            message("dual", || ok("m")),
            message("dual2", || ok("m2")),
            message("order", || ok("ordered")),
            self.notes("evt"),
            self.notes(object(json!({"type": "created", "v": 1}))),
            self.notes("evt_err"),
            self.notes("evt_obs"),
            event("evt_err", || Err::<(), _>(RpcError::unexpected("event failure"))),
            event("evt_obs", || stream::iter([1, 2])),
        ]);
        groups
    }

    fn values(&self) -> Vec<HandlerGroup> {
        vec![
            message("echo", |data: Payload| ok(data)),
            message("echo_async", echo_later),
            message("ret_null", || ok(None::<u8>)),
            message("ret_undef", || ()),
            message("ret_promise_undef", async || ()),
            message("ret_zero", || ok(0)),
            message("ret_false", || ok(false)),
            message("ret_empty_str", || ok("")),
            message("ret_buffer", || ok(Buffer { r#type: "Buffer", data: [0, 1, 255] })),
            message("ret_date", || ok("1970-01-01T00:00:00.000Z")),
            message("ret_nan", || ok(f64::NAN)),
            message("ret_map", || ok(BTreeMap::<String, u8>::new())),
        ]
    }

    fn streams(&self) -> Vec<HandlerGroup> {
        #[derive(Serialize)]
        struct Item {
            a: u32,
        }
        #[derive(Serialize)]
        struct Wrapped {
            data: u32,
        }
        let object = || RpcError::json(ObjectError { code: 7, message: "late obj", extra: None });
        vec![
            message("stream_sync", || stream::iter(1..=3)),
            message("stream_async", || later(0..3)),
            message("stream_obj", || stream::iter([1, 2, 3]).map(|a| Item { a })),
            message("stream_one", || stream::iter(["only"])),
            message("stream_one_async", || later(["only"])),
            message("stream_late_complete2", || stream::iter(["v"]).chain(nothing_yet())),
            message("stream_empty", stream::empty::<u8>),
            message("stream_empty_late", nothing_yet::<u8>),
            message("stream_null", || stream::iter([None::<u8>])),
            message("stream_undef", stream::empty::<u8>),
            message("stream_err", || stream::iter([Ok(1), Ok(2), Err(RpcError::message("late boom"))])),
            message("stream_err_async", move || later([Ok(1), Err(object())])),
            message("promise_obs", async || stream::iter(["p1", "p2"])),
            message("wrapped", || stream::iter([1, 2]).map(|data| Wrapped { data })),
        ]
    }

    fn errors(&self) -> Vec<HandlerGroup> {
        #[derive(Serialize)]
        struct Nothing {}
        #[derive(Serialize)]
        struct Status {
            status: &'static str,
        }
        #[derive(Serialize)]
        struct Filtered {
            code: &'static str,
            msg: Option<String>,
        }
        let unexpected = |pattern: &str| message(pattern, fails(|| RpcError::unexpected("not for callers")));
        let filtered = |error: RpcError| {
            let error: Value = serde_json::from_str(&error.to_json()).unwrap();
            let msg = error["message"].as_str().map(str::to_owned);
            Err(RpcError::json(Filtered { code: "CUSTOM", msg }))
        };
        vec![
            message("err_rpc_string", fails(|| RpcError::message("boom"))),
            message(
                "err_rpc_object",
                fails(|| {
                    let extra = Some(BTreeMap::from([("a", vec![1])]));
                    RpcError::json(ObjectError { code: 42, message: "obj boom", extra })
                }),
            ),
            message("err_rpc_array", fails(|| RpcError::json(("a", 1)))),
            message("err_rpc_number", fails(|| RpcError::json(5))),
            message("err_rpc_null", fails(|| RpcError::json(None::<u8>))),
            message("err_rpc_empty", fails(|| "".into())),
            message("err_rpc_error", fails(|| RpcError::json(Nothing {}))),
            message("err_rpc_undefined", fails(|| RpcError::json(Status { status: "error" }))),
            message("err_generic", || -> Result<(), RpcError> { panic!("deliberate panic") }),
            message("err_async", async || Err::<(), _>(RpcError::message("async boom"))),
            unexpected("err_http"),
            unexpected("err_string"),
            unexpected("err_obj"),
            message("err_obs_raw", || stream::iter([Err::<u8, _>(RpcError::unexpected("raw"))])),
            message("err_obs_generic", || later([Err::<u8, _>(RpcError::unexpected("generic"))])),
            message("guarded", || ok("never")).interceptor(guard(|_| async { Ok(false) })),
            unexpected("validate_default"),
            message("validate_rpc", validate),
            message("filtered", fails(|| "to-filter".into())).interceptor(catch_and_map(filtered)),
            message("filter_recover", fails(|| "lost".into()))
                .interceptor(catch_and_map(|_| text("recovered-observable"))),
            message("filter_plain", fails(|| "lost".into()))
                .interceptor(catch_and_map(|_| text("recovered-plain"))),
            message("filter_base", fails(|| "via base".into())).interceptor(catch_and_map(Err)),
            unexpected("filter_base_nomatch").interceptor(catch_and_map(Err)),
            message("scoped_err", fails(|| "scoped boom".into())),
        ]
    }
}
