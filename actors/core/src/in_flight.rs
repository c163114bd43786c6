// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests in flight: what a session shares with the responders of its requests.
//!
//! A slot per request is its in-flight credit and knows how to answer it; finished packets wait in one
//! out-queue for the session's next turn. A short lock is all that is shared.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use slab::Slab;
use tokio::task::AbortHandle;

use crate::headers::Headers;
use crate::packet::{Raw, ResponseBody};
use crate::pattern::Route;
use crate::request::MessageKind;
use crate::responder::{Cancellation, Gone, ReplySink, SlotKey};
use crate::route::RouteTable;
use crate::session::{Abandoned, SessionControl};
use crate::settlement::{FailurePolicy, LastResort};
use crate::transport::{Outbound, Settlement, TransportInfo};

/// How many packets may wait in the out-queue before streams wait.
const MAX_QUEUED_PACKETS: usize = 1024;

pub(crate) struct Shared<R> {
    pub(crate) control: Arc<SessionControl>,
    pub(crate) settles: bool,
    pub(crate) inner: Mutex<Inner<R>>,
}

pub(crate) struct Inner<R> {
    pub(crate) slots: Slab<Slot<R>>,
    pub(crate) generation: u32,
    pub(crate) out: Vec<Outbound<R>>,
    pub(crate) congested: bool,
    pub(crate) waiting: Vec<Waker>,
    pub(crate) closed: bool,
}

pub(crate) struct Slot<R> {
    pub(crate) generation: u32,
    pub(crate) kind: MessageKind,
    pub(crate) reply_to: R,
    pub(crate) id: Raw,
    pub(crate) route: SlotRoute,
    /// Handlers that have not ended; more than one for a chain of event handlers.
    pub(crate) remaining: u32,
    pub(crate) failed: bool,
    pub(crate) on_failure: Option<FailurePolicy>,
    pub(crate) cancelled: bool,
    pub(crate) tasks: Vec<AbortHandle>,
    pub(crate) cancellation: Option<Cancellation>,
}

/// What a slot serves: a place in the session's table, or by name once that table was replaced.
pub(crate) enum SlotRoute {
    At(u32),
    Named(Option<Route>),
}

impl<R: Clone + Send + 'static> Shared<R> {
    pub(crate) fn admit(
        &self,
        kind: MessageKind,
        reply_to: R,
        id: Raw,
        route: u32,
        handlers: u32,
        on_failure: Option<FailurePolicy>,
    ) -> SlotKey {
        let mut inner = self.inner.lock();
        inner.generation = inner.generation.wrapping_add(1);
        let generation = inner.generation;
        let index = inner.slots.insert(Slot {
            generation,
            kind,
            reply_to,
            id,
            route: SlotRoute::At(route),
            remaining: handlers,
            failed: false,
            on_failure,
            cancelled: false,
            tasks: Vec::new(),
            cancellation: None,
        });
        SlotKey { index: index as u32, generation }
    }
}

impl<R> Slot<R> {
    /// How its delivery ended.
    fn settlement(&self) -> Settlement {
        match (self.failed, self.on_failure.as_ref().map(FailurePolicy::last_resort)) {
            (false, _) => Settlement::Done,
            (true, None) => Settlement::Failed,
            // Its caller has been answered.
            (true, Some(LastResort::Requeue)) if self.kind == MessageKind::Request => Settlement::Done,
            (true, Some(LastResort::Requeue)) => Settlement::Requeue,
            (true, Some(LastResort::DeadLetter)) => Settlement::DeadLetter,
            (true, Some(LastResort::Discard)) => Settlement::Discard,
        }
    }
}

impl<R> Inner<R> {
    fn slot(&mut self, key: SlotKey) -> Option<&mut Slot<R>> {
        self.slots.get_mut(key.index as usize).filter(|slot| slot.generation == key.generation)
    }

    /// Whether a slot's caller still waits.
    fn live(&mut self, key: SlotKey) -> bool {
        !self.closed && self.slot(key).is_some_and(|slot| !slot.cancelled)
    }
}

impl<R: Clone + Send + 'static> ReplySink for Shared<R> {
    fn push(&self, key: SlotKey, body: ResponseBody, headers: Option<Headers>, failed: bool) {
        let mut inner = self.inner.lock();
        let was_empty = inner.out.is_empty();
        let closed = inner.closed;
        let Some(slot) = inner.slot(key) else { return };
        slot.failed |= failed;
        let speak = slot.kind == MessageKind::Request && !slot.cancelled && !closed;
        if let ResponseBody::Item(_) = body {
            if speak {
                let (reply_to, id) = (slot.reply_to.clone(), slot.id.clone());
                inner.out.push(Outbound::Response { reply_to, id, body, headers });
            }
        } else {
            slot.remaining -= 1;
            if slot.remaining > 0 {
                return;
            }
            let slot = inner.slots.remove(key.index as usize);
            self.control.answered.fetch_add(1, Ordering::Relaxed);
            let settle = (self.settles && !closed)
                .then(|| Outbound::Settle { delivery: slot.reply_to.clone(), settlement: slot.settlement() });
            if speak {
                inner.out.push(Outbound::Response { reply_to: slot.reply_to, id: slot.id, body, headers });
            }
            inner.out.extend(settle);
        }
        drop(inner);
        if was_empty {
            self.control.wake();
        }
    }

    fn poll_ready(&self, key: SlotKey, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        let mut inner = self.inner.lock();
        if !inner.live(key) {
            return Poll::Ready(Err(Gone));
        }
        if inner.congested || inner.out.len() >= MAX_QUEUED_PACKETS {
            if !inner.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                inner.waiting.push(cx.waker().clone());
            }
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn attach(&self, key: SlotKey, task: AbortHandle) {
        let mut inner = self.inner.lock();
        match inner.slot(key) {
            Some(slot) if slot.cancelled => task.abort(),
            Some(slot) => slot.tasks.push(task),
            None => {}
        }
    }

    fn cancellation(&self, key: SlotKey) -> Cancellation {
        let mut inner = self.inner.lock();
        let live = inner.live(key);
        match inner.slot(key) {
            Some(slot) if live => slot.cancellation.get_or_insert_default().clone(),
            _ => {
                let gone = Cancellation::default();
                gone.cancel();
                gone
            }
        }
    }

    fn is_gone(&self, key: SlotKey) -> bool {
        !self.inner.lock().live(key)
    }
}

impl<R: Clone + Send + 'static> Shared<R> {
    /// No reply can leave any more: tells everyone who works for this session.
    pub(crate) fn close(&self, transport: &TransportInfo, table: &RouteTable, why: &str) -> Vec<Abandoned> {
        let mut inner = self.inner.lock();
        if std::mem::replace(&mut inner.closed, true) {
            return Vec::new();
        }
        inner.out.clear();
        let waiting = std::mem::take(&mut inner.waiting);
        let mut cancellations = Vec::new();
        let mut abandoned = Vec::new();
        for (_, slot) in &inner.slots {
            cancellations.extend(slot.cancellation.clone());
            let route = match &slot.route {
                SlotRoute::At(index) => table.route_at(*index),
                SlotRoute::Named(route) => route.as_ref(),
            };
            if !slot.cancelled {
                abandoned.push(Abandoned {
                    transport: transport.name.to_string(),
                    route: route.map(Route::to_string).unwrap_or_default(),
                    request: slot.kind == MessageKind::Request,
                    why: why.to_owned(),
                });
            }
        }
        drop(inner);
        waiting.into_iter().for_each(Waker::wake);
        cancellations.iter().for_each(Cancellation::cancel);
        abandoned
    }
}
