// SPDX-License-Identifier: MIT OR Apache-2.0
//! The responder: the value that must end a request, exactly once.
//!
//! A responder is bound to a slot of the session that the request came by: a request that is done when its handler
//! was called in place has neither. It writes packets into the session's out-queue; its last one frees the slot, which is
//! the request's in-flight credit. Dropped unanswered (a panic, a full mailbox, a dead handler), it answers with an error.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::error::RpcError;
use crate::headers::Headers;
use crate::packet::ResponseBody;
use crate::payload::{Format, Payload};

/// Names a request on the session that it came by: they are numbered as they are dispatched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RequestKey(pub(crate) u64);

impl RequestKey {
    /// Of a request that has none yet.
    pub(crate) const NONE: Self = Self(0);
}

/// One packet of a response, on its way to the session.
pub(crate) struct Finished {
    pub(crate) slot: RequestKey,
    /// Which of the slot's handlers it comes from.
    pub(crate) member: u32,
    pub(crate) body: ResponseBody,
    pub(crate) headers: Option<Headers>,
    pub(crate) failed: bool,
}

impl Finished {
    /// A packet for a slot that one handler serves.
    pub(crate) fn new(slot: RequestKey, body: ResponseBody, headers: Option<Headers>, failed: bool) -> Self {
        Self { slot, member: 0, body, headers, failed }
    }
}

/// The peer is gone, or the request was cancelled: nobody reads further replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody waits for the reply any more")]
pub(crate) struct Gone;

/// Where replies go: a session's out-queue, or a collector.
pub(crate) trait ReplySink: Send + Sync {
    /// Queues one packet; a last one frees the slot. Late packets are dropped.
    fn push(&self, finished: Finished);
    /// The same for several, in order.
    fn push_all(&self, finished: &mut dyn Iterator<Item = Finished>) {
        finished.for_each(|finished| self.push(finished));
    }
    /// Ready when the session can take more of a stream.
    fn poll_ready(&self, slot: RequestKey, cx: &mut Context<'_>) -> Poll<Result<(), Gone>>;
    /// Lets a cancellation abort the task that serves the slot.
    fn attach(&self, slot: RequestKey, task: AbortHandle);
    /// A token that follows the slot.
    fn cancellation(&self, slot: RequestKey) -> Cancellation;
    /// Whether the slot was cancelled or is gone.
    fn is_gone(&self, slot: RequestKey) -> bool;
}

/// Must end a request: by value, by completion, by error. Dropping it answers with an error.
pub(crate) struct Responder {
    sink: Arc<dyn ReplySink>,
    slot: RequestKey,
    member: u32,
    format: Format,
    ended: bool,
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Responder").field("slot", &self.slot).field("ended", &self.ended).finish()
    }
}

impl Responder {
    pub(crate) fn new(sink: Arc<dyn ReplySink>, slot: RequestKey, format: Format) -> Self {
        Self { sink, slot, member: 0, format, ended: false }
    }

    /// For one of several handlers of a slot.
    pub(crate) fn of_member(mut self, member: u32) -> Self {
        self.member = member;
        self
    }

    fn push(&self, body: ResponseBody, headers: Option<Headers>, failed: bool) {
        self.sink.push(Finished { slot: self.slot, member: self.member, body, headers, failed });
    }

    /// Ends the request.
    pub(crate) fn end(mut self, last: Option<Payload>, headers: Option<Headers>) {
        self.ended = true;
        self.push(ResponseBody::Last(last), headers, false);
    }

    /// Ends the request with a packet.
    pub(crate) fn finish(mut self, body: ResponseBody, headers: Option<Headers>, failed: bool) {
        self.ended = true;
        self.push(body, headers, failed);
    }

    /// Ends the request with an error.
    pub(crate) fn fail(mut self, error: &RpcError) {
        self.ended = true;
        self.push(ResponseBody::Error(error.to_payload(self.format)), None, true);
    }

    /// Sends one item of a stream.
    pub(crate) fn item(&self, payload: Payload) {
        self.push(ResponseBody::Item(payload), None, false);
    }

    /// Waits until the session can take more of a stream.
    pub(crate) async fn ready(&self) -> Result<(), Gone> {
        std::future::poll_fn(|cx| self.sink.poll_ready(self.slot, cx)).await
    }

    pub(crate) fn attach(&self, task: AbortHandle) {
        self.sink.attach(self.slot, task);
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.sink.is_gone(self.slot)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.ended {
            let error = RpcError::unexpected("the handler was dropped before it answered");
            self.push(ResponseBody::Error(error.to_payload(self.format)), None, true);
        }
    }
}

/// Tells when a request's caller has lost interest: it cancelled, its connection was lost, or the
/// service abandons what is still running at the end of its grace period.
///
/// When a Martlet caller cancels, the handler's own future is dropped; this token is for work that
/// outlives it. Clones follow the same request.
#[derive(Debug, Clone, Default)]
pub struct Cancellation {
    state: Arc<CancelState>,
}

#[derive(Debug, Default)]
struct CancelState {
    cancelled: AtomicBool,
    notify: Notify,
}

impl Cancellation {
    /// Whether it has happened.
    pub fn is_cancelled(&self) -> bool {
        self.state.cancelled.load(Ordering::Acquire)
    }

    /// Waits for it; for ever, if the request ends in any other way.
    ///
    /// Cancel safe.
    pub async fn cancelled(&self) {
        loop {
            let notified = self.state.notify.notified();
            if self.is_cancelled() {
                return;
            }
            notified.await;
        }
    }

    pub(crate) fn cancel(&self) {
        self.state.cancelled.store(true, Ordering::Release);
        self.state.notify.notify_waiters();
    }
}

/// Collects the replies of a chain of event handlers that was called as a message, and answers with
/// NestJS's nested form: `{"current":r1,"next":{"current":r2,"next":r3}}`.
pub(crate) struct ChainSink {
    results: Mutex<Vec<Option<Option<Payload>>>>,
    answer: Mutex<Option<Responder>>,
    format: Format,
}

impl ChainSink {
    pub(crate) fn new(len: usize, answer: Responder) -> Arc<Self> {
        let format = answer.format;
        Arc::new(Self { results: Mutex::new(vec![None; len]), answer: Mutex::new(Some(answer)), format })
    }

    pub(crate) fn responder(self: &Arc<Self>, index: u32) -> Responder {
        let slot = RequestKey(u64::from(index));
        Responder::new(Arc::clone(self) as Arc<dyn ReplySink>, slot, self.format)
    }

    fn nest(&self, results: &[Option<Option<Payload>>]) -> serde_json::Value {
        let value = |result: &Option<Option<Payload>>| {
            result.as_ref().and_then(Option::as_ref).and_then(|payload| payload.to_value().ok())
        };
        match results {
            [] => serde_json::Value::Null,
            [last] => value(last).unwrap_or_default(),
            [first, rest @ ..] => {
                let mut object = serde_json::Map::new();
                if let Some(current) = value(first) {
                    object.insert("current".to_owned(), current);
                }
                match rest {
                    [only] if value(only).is_none() => {}
                    _ => {
                        object.insert("next".to_owned(), self.nest(rest));
                    }
                }
                serde_json::Value::Object(object)
            }
        }
    }
}

impl ReplySink for ChainSink {
    fn push(&self, Finished { slot, body, .. }: Finished) {
        let mut results = self.results.lock();
        let Some(place) = results.get_mut(slot.0 as usize) else { return };
        match body {
            ResponseBody::Item(_) => return,
            ResponseBody::Last(value) => *place = Some(value),
            // A failed member has no result; NestJS answers the caller with the error of the chain's head.
            ResponseBody::Error(error) => {
                if let Some(answer) = self.answer.lock().take() {
                    let value = error.to_value().unwrap_or_default();
                    answer.fail(&RpcError::json(value));
                }
                return;
            }
            ResponseBody::NoHandler => *place = Some(None),
        }
        if results.iter().all(Option::is_some)
            && let Some(answer) = self.answer.lock().take()
        {
            let nested = self.nest(&results);
            match Payload::encode(self.format, &nested) {
                Ok(payload) => answer.end(Some(payload), None),
                Err(error) => answer.fail(&RpcError::unexpected(error)),
            }
        }
    }

    fn poll_ready(&self, _slot: RequestKey, _cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        Poll::Ready(Ok(()))
    }

    fn attach(&self, _slot: RequestKey, _task: AbortHandle) {}

    fn cancellation(&self, _slot: RequestKey) -> Cancellation {
        self.answer.lock().as_ref().map(|answer| answer.sink.cancellation(answer.slot)).unwrap_or_default()
    }

    fn is_gone(&self, _slot: RequestKey) -> bool {
        self.answer.lock().is_none()
    }
}
