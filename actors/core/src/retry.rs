// SPDX-License-Identifier: MIT OR Apache-2.0
//! Trying failed messages again in this process: what is kept of them, and when their time comes.
//!
//! The message stays unacknowledged and keeps its slot meanwhile, so a stop hands it back and a lost connection
//! gives it to another consumer, as with any other request in flight.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::backoff::Backoff;
use crate::request::Request;
use crate::responder::RequestKey;
use crate::route::HandlerRef;
use crate::settlement::RetryPolicy;

/// What is kept of a message that may be tried again.
pub(crate) struct Retrial {
    left: u32,
    backoff: Backoff,
    /// Attempts so far.
    pub(crate) attempts: u32,
    pub(crate) request: Request,
    /// Its handlers, in order.
    handlers: Vec<Arc<HandlerRef>>,
    /// Those that failed in the attempt under way.
    failed: Vec<u32>,
}

impl Retrial {
    pub(crate) fn new(policy: &RetryPolicy, request: Request, handlers: Vec<Arc<HandlerRef>>) -> Self {
        let backoff = Backoff::new(policy.delay);
        Self { left: policy.attempts, backoff, attempts: 1, request, handlers, failed: Vec::new() }
    }

    /// Notes that a handler failed.
    pub(crate) fn failed(&mut self, member: u32) {
        self.failed.push(member);
    }

    /// Begins another attempt, if there is one left and someone waits for it.
    pub(crate) fn begin(&mut self) -> bool {
        if self.left == 0 || self.request.deadline().is_some_and(|deadline| Instant::now() >= deadline) {
            return false;
        }
        self.left -= 1;
        self.attempts += 1;
        true
    }

    /// The pause before the attempt that has begun.
    pub(crate) fn pause(&mut self) -> Duration {
        self.backoff.pause(rand::random())
    }

    /// What the attempt that is due consists of.
    pub(crate) fn attempt(&mut self, slot: RequestKey) -> Attempt {
        let mut request = self.request.clone();
        request.0.slot = slot;
        Attempt { request, handlers: self.handlers.clone(), members: std::mem::take(&mut self.failed) }
    }
}

/// One more attempt at a message.
pub(crate) struct Attempt {
    pub(crate) request: Request,
    pub(crate) handlers: Vec<Arc<HandlerRef>>,
    /// Those of the handlers that failed, by their places.
    pub(crate) members: Vec<u32>,
}

/// When messages are tried again.
#[derive(Default)]
pub(crate) struct RetryQueue {
    due: BinaryHeap<Reverse<(Instant, RequestKey)>>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl RetryQueue {
    pub(crate) fn push(&mut self, at: Instant, slot: RequestKey) {
        self.due.push(Reverse((at, slot)));
    }

    /// The slots whose time has come; registers for the next one.
    pub(crate) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<RequestKey> {
        loop {
            let Some(Reverse((at, _))) = self.due.peek() else {
                self.sleep = None;
                return Poll::Pending;
            };
            let at = *at;
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            if sleep.deadline() != at {
                sleep.as_mut().reset(at);
            }
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if let Some(Reverse((_, slot))) = self.due.pop() {
                return Poll::Ready(slot);
            }
        }
    }

    /// Every slot that waits, whatever its time.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = RequestKey> {
        self.sleep = None;
        std::mem::take(&mut self.due).into_iter().map(|Reverse((_, slot))| slot)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.due.is_empty()
    }
}
