// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests in flight: what a session shares with those who answer its requests.
//!
//! A slot per request is its in-flight credit and knows how to answer it; finished packets wait in one
//! out-queue for the session's next turn. A short lock is all that is shared, taken once for many requests that go to
//! another arbiter: the session admits what it has read for a replica in one go, the replica hands in what it has
//! finished in one go. A request that its session's own arbiter serves, and that is done at once, never gets here: see
//! [`Shared::begin_call`].

use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::task::AbortHandle;

use crate::headers::Headers;
use crate::packet::{Raw, ResponseBody};
use crate::pattern::Route;
use crate::request::MessageKind;
use crate::responder::{Cancellation, Finished, Gone, ReplySink, RequestKey};
use crate::retry::{Attempt, Retrial};
use crate::route::RouteTable;
use crate::session::{Abandoned, SessionControl};
use crate::settlement::LastResort;
use crate::transport::{Response, Settlement, TransportInfo};

/// How many packets may wait in the out-queue before streams wait.
const MAX_QUEUED_PACKETS: usize = 1024;

pub(crate) struct Shared<R> {
    pub(crate) control: Arc<SessionControl>,
    pub(crate) settles: bool,
    /// The last key that was given. Only the session gives them.
    last: AtomicU64,
    /// The request whose handler is being called in place.
    called: AtomicU64,
    pub(crate) inner: Mutex<Inner<R>>,
}

pub(crate) struct Inner<R> {
    pub(crate) slots: HashMap<RequestKey, Slot<R>, BuildHasherDefault<Spread>>,
    /// The token of a request that is called in place, if it was asked for.
    called: Option<(RequestKey, Cancellation)>,
    pub(crate) out: Vec<Owed<R>>,
    /// Slots whose handlers failed and are to be tried again.
    pub(crate) retries: Vec<RequestKey>,
    pub(crate) congested: bool,
    pub(crate) waiting: Vec<Waker>,
    pub(crate) closed: bool,
}

/// Keys are numbers in a row: spreading their bits is all the hashing they need.
#[derive(Default)]
pub(crate) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

/// A request or event that has been read and has not ended.
pub(crate) struct Slot<R> {
    pub(crate) kind: MessageKind,
    pub(crate) reply_to: R,
    pub(crate) id: Raw,
    pub(crate) route: SlotRoute,
    /// Handlers that have not ended; more than one for a chain of event handlers.
    pub(crate) remaining: u32,
    pub(crate) failed: bool,
    /// Items of a stream have been sent.
    spoke: bool,
    /// What becomes of its message if it fails, when all is tried.
    on_failure: Option<LastResort>,
    /// What is needed to try it again, if its policy says so.
    pub(crate) retrial: Option<Box<Retrial>>,
    pub(crate) cancelled: bool,
    work: Option<Box<Work>>,
}

/// How a handler that was called in place has ended.
pub(crate) struct End {
    pub(crate) body: ResponseBody,
    pub(crate) headers: Option<Headers>,
    pub(crate) failed: bool,
}

/// What is to be written.
pub(crate) enum Owed<R> {
    /// A packet of the response to the request with this key.
    Response(RequestKey, Response<R>),
    Settle {
        delivery: R,
        settlement: Settlement,
    },
}

/// What the end of a request leaves to be written.
pub(crate) struct LastWords<R> {
    pub(crate) response: Option<Response<R>>,
    pub(crate) settle: Option<(R, Settlement)>,
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
            slots: HashMap::default(),
            called: None,
            out: Vec::new(),
            retries: Vec::new(),
            congested: false,
            waiting: Vec::new(),
            closed: false,
        };
        Self {
            control,
            settles,
            last: AtomicU64::new(0),
            called: AtomicU64::new(0),
            inner: Mutex::new(inner),
        }
    }

    /// The key of the next request. For the session alone.
    pub(crate) fn next_key(&self) -> RequestKey {
        let key = self.last.load(Ordering::Relaxed) + 1;
        self.last.store(key, Ordering::Relaxed);
        RequestKey(key)
    }

    /// Names the request whose handler the session is about to call itself. It gets a slot only if it is not done at
    /// once ([`admit_called`](Self::admit_called)); until then its token is all that others can ask for.
    pub(crate) fn begin_call(&self) -> RequestKey {
        let key = self.next_key();
        self.called.store(key.0, Ordering::Relaxed);
        key
    }

    /// The handler that was called in place is done, and nobody can ask for the request any more.
    pub(crate) fn end_call(&self) {
        self.called.store(RequestKey::NONE.0, Ordering::Relaxed);
    }

    /// Gives the request that was called in place its slot.
    pub(crate) fn admit_called(&self, key: RequestKey, mut slot: Slot<R>) {
        let mut inner = self.inner.lock();
        self.end_call();
        if let Some((_, token)) = inner.called.take_if(|(called, _)| *called == key) {
            slot.work.get_or_insert_default().cancellation = Some(token);
        }
        inner.slots.insert(key, slot);
    }
}

impl<R> Slot<R> {
    /// For a message that goes to so many handlers of a place in the session's table.
    pub(crate) fn new(kind: MessageKind, reply_to: R, id: Raw, route: u32, handlers: u32) -> Self {
        Self {
            kind,
            reply_to,
            id,
            route: SlotRoute::At(route),
            remaining: handlers,
            failed: false,
            spoke: false,
            on_failure: None,
            retrial: None,
            cancelled: false,
            work: None,
        }
    }

    /// What becomes of its message if it fails.
    pub(crate) fn on_failure(&mut self, last_resort: LastResort, retrial: Option<Box<Retrial>>) {
        self.on_failure = Some(last_resort);
        self.retrial = retrial;
    }

    /// Notes how one of its handlers has ended; true when it was the last of them.
    pub(crate) fn ended(&mut self, member: u32, failed: bool) -> bool {
        // A handler that was stopped has not failed.
        if failed && !self.cancelled {
            self.failed = true;
            if let Some(retrial) = &mut self.retrial {
                retrial.failed(member);
            }
        }
        self.remaining -= 1;
        self.remaining == 0
    }

    /// Marks it as cancelled; whoever works on it is to be told.
    pub(crate) fn cancel(&mut self) -> Option<Box<Work>> {
        self.cancelled = true;
        let work = self.work.as_mut()?;
        let told = Work { tasks: std::mem::take(&mut work.tasks), cancellation: work.cancellation.clone() };
        Some(Box::new(told))
    }

    /// How its delivery ended.
    fn settlement(&self) -> Settlement {
        if self.cancelled && !self.failed {
            // Nobody waits for it; its handler may have been stopped before it could acknowledge.
            return Settlement::Done;
        }
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
    pub(crate) fn wants_retry(&mut self) -> bool {
        // A stream that has begun is not begun again, and nobody waits for what was cancelled.
        if !self.failed || self.spoke || self.cancelled {
            return false;
        }
        self.retrial.as_mut().is_some_and(|retrial| retrial.begin())
    }
}

impl<R: Clone> Slot<R> {
    /// Its last words. It is of no use afterwards.
    pub(crate) fn close(&mut self, end: End, settles: bool, closed: bool) -> LastWords<R> {
        let settlement = (settles && !closed).then(|| self.settlement());
        let settle = settlement.map(|settlement| (self.reply_to.clone(), settlement));
        let speak = self.kind == MessageKind::Request && !self.cancelled && !closed;
        let End { body, headers, .. } = end;
        let response = speak.then(|| Response {
            reply_to: self.reply_to.clone(),
            id: std::mem::take(&mut self.id),
            body,
            headers,
        });
        LastWords { response, settle }
    }
}

impl<R> Inner<R> {
    pub(crate) fn remove(&mut self, key: RequestKey) -> Option<Slot<R>> {
        self.slots.remove(&key)
    }

    /// Every slot, in the order in which they were dispatched.
    pub(crate) fn keys(&self) -> Vec<RequestKey> {
        let mut keys: Vec<_> = self.slots.keys().copied().collect();
        keys.sort_unstable();
        keys
    }

    pub(crate) fn slot(&mut self, key: RequestKey) -> Option<&mut Slot<R>> {
        self.slots.get_mut(&key)
    }

    /// Whether a slot's caller still waits.
    fn live(&mut self, key: RequestKey) -> bool {
        !self.closed && self.slot(key).is_some_and(|slot| !slot.cancelled)
    }
}

impl<R: Clone> Inner<R> {
    /// Takes one packet of a slot; says whether it was the request's end.
    fn take(&mut self, finished: Finished, settles: bool) -> bool {
        let Finished { slot: key, member, body, headers, failed } = finished;
        let closed = self.closed;
        let Some(slot) = self.slots.get_mut(&key) else { return false };
        if let ResponseBody::Item(_) = body {
            slot.spoke = true;
            if slot.kind == MessageKind::Request && !slot.cancelled && !closed {
                let (reply_to, id) = (slot.reply_to.clone(), slot.id.clone());
                self.out.push(Owed::Response(key, Response { reply_to, id, body, headers }));
            }
            return false;
        }
        if !slot.ended(member, failed) {
            return false;
        }
        if !closed && slot.wants_retry() {
            self.retries.push(key);
            return false;
        }
        let LastWords { response, settle } = slot.close(End { body, headers, failed }, settles, closed);
        self.slots.remove(&key);
        // The answer, then the acknowledgement.
        self.out.extend(response.map(|response| Owed::Response(key, response)));
        self.out.extend(settle.map(|(delivery, settlement)| Owed::Settle { delivery, settlement }));
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

    fn poll_ready(&self, key: RequestKey, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
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

    fn attach(&self, key: RequestKey, task: AbortHandle) {
        let mut inner = self.inner.lock();
        match inner.slot(key) {
            Some(slot) if slot.cancelled => task.abort(),
            Some(slot) => slot.work.get_or_insert_default().tasks.push(task),
            None => {}
        }
    }

    fn cancellation(&self, key: RequestKey) -> Cancellation {
        let mut inner = self.inner.lock();
        if inner.live(key)
            && let Some(slot) = inner.slot(key)
        {
            return slot.work.get_or_insert_default().cancellation.get_or_insert_default().clone();
        }
        // Its handler is being called in place.
        if !inner.closed && self.called.load(Ordering::Relaxed) == key.0 {
            return match &inner.called {
                Some((called, token)) if *called == key => token.clone(),
                _ => inner.called.insert((key, Cancellation::default())).1.clone(),
            };
        }
        let gone = Cancellation::default();
        gone.cancel();
        gone
    }

    fn is_gone(&self, key: RequestKey) -> bool {
        !self.inner.lock().live(key)
    }
}

impl<R: Clone + Send + 'static> Shared<R> {
    /// Makes a slot ready for another attempt; `None` when there is nothing to try: one whose caller has cancelled
    /// meanwhile ends here.
    pub(crate) fn try_again(&self, key: RequestKey) -> Option<Attempt> {
        let mut inner = self.inner.lock();
        let slot = inner.slot(key)?;
        if slot.cancelled {
            let slot = inner.remove(key)?;
            self.control.answered.add(1);
            let settlement = slot.settlement();
            inner.out.push(Owed::Settle { delivery: slot.reply_to, settlement });
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
        for slot in inner.keys().iter().filter_map(|key| inner.slots.get(key)) {
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
