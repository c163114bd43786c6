// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the macros expand to. No part of the API.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;

use futures::stream::{self, Stream, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use actix;
pub use futures;
pub use martlet_core::function::endpoint;
pub use martlet_core::supervise::rebuilt;
pub use martlet_core::{
    Controller, Endpoint, FromRequest, HandlerDef, HandlerInfo, HandlerKind, HandlerResult, Interceptors,
    IntoReply, Pattern, Reply, Request, RpcError,
};
pub use serde_json::{self, json};

use martlet_core::request::bad_payload;
use martlet_core::{Format, Payload};
use serde_json::Value;

/// A pattern from an object.
pub fn object_pattern(value: &Value) -> Pattern {
    Pattern::from_json(value).expect("a JSON object is always a pattern")
}

/// Puts the members of an object into a handler's extras.
pub fn add_extras(info: &mut HandlerInfo, extras: Value) {
    if let Value::Object(members) = extras {
        std::sync::Arc::make_mut(&mut info.extras).extend(members);
    }
}

/// Puts one value into a handler's extras.
pub fn add_extra(info: &mut HandlerInfo, key: &str, value: impl Into<Value>) {
    std::sync::Arc::make_mut(&mut info.extras).insert(key.to_owned(), value.into());
}

/// A type that the payload, or a property of it, can be read as.
#[diagnostic::on_unimplemented(
    message = "the payload cannot be read as `{Self}`",
    label = "not `Deserialize`",
    note = "derive `serde::Deserialize` for it; `#[payload]` is for the payload and its properties only, extractors go without it"
)]
pub trait Readable: DeserializeOwned {}

#[diagnostic::do_not_recommend]
impl<T: DeserializeOwned> Readable for T {}

/// The error of a handler.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the error of a handler",
    label = "its error is not `Into<RpcError>`",
    note = "derive `martlet::RpcError` for it, or return `martlet::RpcError`; `martlet::Unexpected` takes any error, which callers read as \"Internal server error\""
)]
pub trait Failure: Into<RpcError> {}

#[diagnostic::do_not_recommend]
impl<E: Into<RpcError>> Failure for E {}

/// The payload as an argument.
pub fn payload<T: Readable>(request: &Request) -> Result<T, RpcError> {
    request.data().map_err(bad_payload)
}

/// A property of the payload as an argument.
pub fn property<T: Readable>(request: &Request, key: &str) -> Result<T, RpcError> {
    request.property(key).map_err(bad_payload)
}

/// An extractor as an argument.
pub async fn extract<T: FromRequest>(request: &Request) -> Result<T, RpcError> {
    T::from_request(request).await
}

/// The value that a handler answers with.
pub struct Answer<R> {
    value: R,
    put: fn(R, Format, &mut Option<Payload>) -> Option<HandlerResult>,
}

impl<R> std::fmt::Debug for Answer<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answer")
    }
}

// Of any `R`, so that one which is no reply is reported once, where the handler says what it returns.
impl<R: 'static> IntoReply for Answer<R> {
    fn into_reply(self, format: Format) -> HandlerResult {
        let mut place = None;
        self.put_reply(format, &mut place).unwrap_or_else(|| Ok(place.map_or(Reply::Empty, Reply::Value)))
    }

    fn put_reply(self, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult> {
        (self.put)(self.value, format, place)
    }
}

/// The answer of a handler.
pub fn answer<R: IntoReply>(value: R) -> Result<Answer<R>, RpcError> {
    Ok(Answer { value, put: R::put_reply })
}

/// The failure of a handler.
pub fn fail<R>(error: impl Failure) -> Result<R, RpcError> {
    Err(error.into())
}

/// NestJS's error object with a code.
pub fn coded_error(message: String, code: impl Serialize) -> RpcError {
    #[derive(Serialize)]
    struct Coded<C> {
        status: &'static str,
        message: String,
        code: C,
    }
    RpcError::json(Coded { status: "error", message, code })
}

// === streams ===

enum Step {
    Started,
    Failed(RpcError),
    Item(Result<Payload, RpcError>),
}

/// Where a producer puts what its consumer takes.
pub struct Out(Rc<RefCell<Option<Step>>>);

impl std::fmt::Debug for Out {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Out")
    }
}

impl Out {
    /// Puts a step and waits until it has been taken. The producer needs no waker for that: whoever takes
    /// the step polls the producer next.
    async fn put(&self, step: Step) {
        *self.0.borrow_mut() = Some(step);
        poll_fn(|_| if self.0.borrow().is_none() { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// There is no stream, but an error.
    pub async fn fail(&self, error: impl Failure) {
        self.put(Step::Failed(error.into())).await;
    }

    /// A reply per item.
    pub async fn send_all<S>(&self, format: Format, stream: S)
    where
        S: Stream,
        S::Item: Serialize,
    {
        self.steps(stream.map(|item| Payload::encode(format, &item).map_err(RpcError::from))).await;
    }

    /// A reply per item; an error ends it.
    pub async fn try_send_all<S, T, E>(&self, format: Format, stream: S)
    where
        S: Stream<Item = Result<T, E>>,
        T: Serialize,
        E: Into<RpcError>,
    {
        let items = stream.map(|item| match item {
            Ok(item) => Payload::encode(format, &item).map_err(RpcError::from),
            Err(error) => Err(error.into()),
        });
        self.steps(items).await;
    }

    async fn steps(&self, items: impl Stream<Item = Result<Payload, RpcError>>) {
        self.put(Step::Started).await;
        let mut items = std::pin::pin!(items);
        while let Some(item) = items.next().await {
            let failed = item.is_err();
            self.put(Step::Item(item)).await;
            if failed {
                break;
            }
        }
    }
}

/// A reply from a future that puts items out: so a stream may borrow what the future owns.
pub async fn stream_reply<P, F>(produce: P) -> HandlerResult
where
    P: FnOnce(Out) -> F,
    F: Future<Output = ()> + 'static,
{
    let slot = Rc::new(RefCell::new(None));
    let mut producer = Some(Box::pin(produce(Out(Rc::clone(&slot)))));
    let mut steps = stream::poll_fn(move |cx| {
        let Some(running) = &mut producer else { return Poll::Ready(None) };
        let polled = running.as_mut().poll(cx);
        if polled.is_ready() {
            producer = None;
        }
        match (slot.borrow_mut().take(), polled) {
            (Some(step), _) => Poll::Ready(Some(step)),
            (None, Poll::Ready(())) => Poll::Ready(None),
            (None, Poll::Pending) => Poll::Pending,
        }
    });
    match steps.next().await {
        Some(Step::Failed(error)) => Err(error),
        Some(Step::Item(item)) => Ok(Reply::Stream(stream::iter([item]).boxed_local())),
        None => Ok(Reply::Stream(stream::empty().boxed_local())),
        Some(Step::Started) => {
            let items = steps.filter_map(async |step| match step {
                Step::Item(item) => Some(item),
                Step::Started | Step::Failed(_) => None,
            });
            Ok(Reply::Stream(items.boxed_local()))
        }
    }
}
