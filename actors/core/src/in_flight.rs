// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests in flight: what a session shares with those who answer its requests.
//!
//! A slot per request is its in-flight credit and knows how to answer it; finished packets wait in one
//! out-queue for the session's next turn. A short lock is all that is shared, taken once for many requests: the
//! session admits what it has read for a replica in one go, the replica hands in what it has finished in one go.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use slab::Slab;
use tokio::task::AbortHandle;

use crate::packet::{Raw, ResponseBody};
use crate::pattern::Route;
use crate::request::MessageKind;
use crate::responder::{Cancellation, Finished, Gone, ReplySink, SlotKey};
use crate::retry::{Attempt, Retrial};
use crate::route::RouteTable;
use crate::session::{Abandoned, SessionControl};
use crate::settlement::LastResort;
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
    generation: u32,
    pub(crate) out: Vec<Outbound<R>>,
    /// Slots whose handlers failed and are to be tried again.
    pub(crate) retries: Vec<SlotKey>,
    pub(crate) congested: bool,
    pub(crate) waiting: Vec<Waker>,
    pub(crate) closed: bool,
}

/// A request or event that is about to get a slot.
pub(crate) struct Admission<R> {
    pub(crate) kind: MessageKind,
    pub(crate) reply_to: R,
    pub(crate) id: Raw,
    /// Its place in the session's table.
    pub(crate) route: u32,
    /// How many handlers it goes to.
    pub(crate) handlers: u32,
    /// What becomes of its message if it fails, when all is tried.
    pub(crate) on_failure: Option<LastResort>,
    /// What is needed to try it again, if its policy says so.
    pub(crate) retrial: Option<Box<Retrial>>,
}

pub(crate) struct Slot<R> {
    generation: u32,
    pub(crate) kind: MessageKind,
    pub(crate) reply_to: R,
    pub(crate) id: Raw,
    pub(crate) route: SlotRoute,
    /// Handlers that have not ended; more than one for a chain of event handlers.
    pub(crate) remaining: u32,
    pub(crate) failed: bool,
    /// Items of a stream have been sent.
    spoke: bool,
    on_failure: Option<LastResort>,
    pub(crate) retrial: Option<Box<Retrial>>,
    pub(crate) cancelled: bool,
    work: Option<Box<Work>>,
}

/// Who works on a request that was not ready at once.
#[derive(Default)]
pub(crate) struct Work {
    tasks: Vec<AbortHandle>,
    cancellation: Option<Cancellation>,
}

impl Work {
    /// Ends the tasks, and tells whoever follows the request. Aborting drops the handler's future, and with it its
    /// responder, which frees the slot: the slots must not be locked.
    pub(crate) fn cancel(&self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        if let Some(cancellation) = &self.cancellation {
            cancellation.cancel();
        }
    }
}

/// What a slot serves: a place in the session's table, or by name once that table was replaced.
pub(crate) enum SlotRoute {
    At(u32),
    Named(Option<Route>),
}

impl<R> Shared<R> {
    pub(crate) fn new(control: Arc<SessionControl>, settles: bool) -> Self {
        let inner = Inner {
            slots: Slab::new(),
            generation: 0,
            out: Vec::new(),
            retries: Vec::new(),
            congested: false,
            waiting: Vec::new(),
            closed: false,
        };
        Self { control, settles, inner: Mutex::new(inner) }
    }
}

impl<R> Slot<R> {
    /// Marks it as cancelled; whoever works on it is to be told.
    pub(crate) fn cancel(&mut self) -> Option<Box<Work>> {
        self.cancelled = true;
        let work = self.work.as_mut()?;
        let told = Work { tasks: std::mem::take(&mut work.tasks), cancellation: work.cancellation.clone() };
        Some(Box::new(told))
    }

    /// How its delivery ended.
    fn settlement(&self) -> Settlement {
        match (self.failed, self.on_failure) {
            (false, None) => Settlement::Finished,
            (false, Some(_)) => Settlement::Done,
            (true, None) => Settlement::Failed,
            // Its caller has been answered.
            (true, Some(LastResort::Requeue)) if self.kind == MessageKind::Request => Settlement::Done,
            (true, Some(LastResort::Requeue)) => Settlement::Requeue,
            (true, Some(LastResort::DeadLetter)) => Settlement::DeadLetter,
            (true, Some(LastResort::Discard)) => Settlement::Discard,
        }
    }

    /// Whether it is to be tried again, now that its last handler has ended.
    fn wants_retry(&mut self) -> bool {
        // A stream that has begun is not begun again, and nobody waits for what was cancelled.
        if !self.failed || self.spoke || self.cancelled {
            return false;
        }
        self.retrial.as_mut().is_some_and(|retrial| retrial.begin())
    }
}

impl<R> Inner<R> {
    /// Gives a slot to a request.
    pub(crate) fn admit(&mut self, admission: Admission<R>) -> SlotKey {
        let Admission { kind, reply_to, id, route, handlers, on_failure, retrial } = admission;
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let index = self.slots.insert(Slot {
            generation,
            kind,
            reply_to,
            id,
            route: SlotRoute::At(route),
            remaining: handlers,
            failed: false,
            spoke: false,
            on_failure,
            retrial,
            cancelled: false,
            work: None,
        });
        SlotKey { index: index as u32, generation }
    }

    pub(crate) fn remove(&mut self, key: SlotKey) -> Option<Slot<R>> {
        self.slot(key)?;
        self.slots.try_remove(key.index as usize)
    }

    /// Every slot.
    pub(crate) fn keys(&self) -> Vec<SlotKey> {
        self.slots
            .iter()
            .map(|(index, slot)| SlotKey { index: index as u32, generation: slot.generation })
            .collect()
    }

    pub(crate) fn slot(&mut self, key: SlotKey) -> Option<&mut Slot<R>> {
        self.slots.get_mut(key.index as usize).filter(|slot| slot.generation == key.generation)
    }

    /// Whether a slot's caller still waits.
    fn live(&mut self, key: SlotKey) -> bool {
        !self.closed && self.slot(key).is_some_and(|slot| !slot.cancelled)
    }
}

impl<R: Clone> Inner<R> {
    /// Takes one packet of a slot; says whether it was the request's end.
    fn take(&mut self, finished: Finished, settles: bool) -> bool {
        let Finished { slot: key, member, body, headers, failed } = finished;
        let closed = self.closed;
        let Some(slot) = self.slot(key) else { return false };
        let speak = slot.kind == MessageKind::Request && !slot.cancelled && !closed;
        if let ResponseBody::Item(_) = body {
            slot.spoke = true;
            if speak {
                let (reply_to, id) = (slot.reply_to.clone(), slot.id.clone());
                self.out.push(Outbound::Response { reply_to, id, body, headers });
            }
            return false;
        }
        if failed {
            slot.failed = true;
            if let Some(retrial) = &mut slot.retrial {
                retrial.failed(member);
            }
        }
        slot.remaining -= 1;
        if slot.remaining > 0 {
            return false;
        }
        if !closed && slot.wants_retry() {
            self.retries.push(key);
            return false;
        }
        let slot = self.slots.remove(key.index as usize);
        let settlement = (settles && !closed).then(|| slot.settlement());
        let settle =
            settlement.map(|settlement| Outbound::Settle { delivery: slot.reply_to.clone(), settlement });
        if speak {
            self.out.push(Outbound::Response { reply_to: slot.reply_to, id: slot.id, body, headers });
        }
        self.out.extend(settle);
        true
    }
}

impl<R: Clone + Send + 'static> ReplySink for Shared<R> {
    fn push(&self, finished: Finished) {
        self.push_all(&mut std::iter::once(finished));
    }

    fn push_all(&self, finished: &mut dyn Iterator<Item = Finished>) {
        let mut inner = self.inner.lock();
        let was_idle = inner.out.is_empty() && inner.retries.is_empty();
        let mut ended = 0;
        for finished in finished {
            ended += i64::from(inner.take(finished, self.settles));
        }
        // The lock makes this its only writer.
        self.control.answered.add(ended);
        drop(inner);
        if was_idle {
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
            Some(slot) => slot.work.get_or_insert_default().tasks.push(task),
            None => {}
        }
    }

    fn cancellation(&self, key: SlotKey) -> Cancellation {
        let mut inner = self.inner.lock();
        let live = inner.live(key);
        match inner.slot(key) {
            Some(slot) if live => {
                slot.work.get_or_insert_default().cancellation.get_or_insert_default().clone()
            }
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
    /// Makes a slot ready for another attempt; `None` when there is nothing to try: one whose caller has cancelled
    /// meanwhile ends here.
    pub(crate) fn try_again(&self, key: SlotKey) -> Option<Attempt> {
        let mut inner = self.inner.lock();
        let slot = inner.slot(key)?;
        if slot.cancelled {
            let slot = inner.remove(key)?;
            self.control.answered.add(1);
            let settlement = slot.settlement();
            inner.out.push(Outbound::Settle { delivery: slot.reply_to, settlement });
            drop(inner);
            self.control.wake();
            return None;
        }
        let attempt = slot.retrial.as_mut()?.attempt(key);
        slot.failed = false;
        slot.remaining = attempt.members.len() as u32;
        Some(attempt)
    }

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
            cancellations.extend(slot.work.as_ref().and_then(|work| work.cancellation.clone()));
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
