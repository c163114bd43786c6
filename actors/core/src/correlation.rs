// SPDX-License-Identifier: MIT OR Apache-2.0
//! The correlation map of a client: every call that has not ended, and how it ends.
//!
//! The map is owned by the client actor and lent to its session task and to the callers' futures; a short
//! lock is all they share. An id of ours names its slot, so that a reply is found without hashing. One
//! timer queue serves all deadlines. When the session dies, everyone waiting hears why, at once.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::error::{CallError, RemoteError, SessionError, SharedError};
use crate::packet::{Raw, ResponseBody, ResponsePacket};
use crate::pattern::Route;
use crate::payload::Payload;
use crate::responder::SlotKey;
use crate::session::SessionControl;
use crate::transport::{Outbound, OutboundMessage, PacketId};

/// What the correlation map needs to know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CorrelationLimits {
    pub(crate) max_pending: usize,
    pub(crate) max_buffered_replies: usize,
    pub(crate) resend_attempts: u32,
}

/// A call as its future hands it over.
pub(crate) struct NewCall {
    pub(crate) message: Box<OutboundMessage>,
    pub(crate) kind: CallKind,
    pub(crate) timeout: Option<Duration>,
    pub(crate) idempotent: bool,
}

/// What a caller waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallKind {
    /// One value: the timeout is for the whole call.
    Single,
    /// Many values: the timeout is for each.
    Stream,
    /// That the event has been handed to the transporter.
    Event,
}

struct Entry {
    generation: u32,
    kind: CallKind,
    route: Route,
    /// Present until written; kept after that only for calls that may be sent again.
    message: Option<Box<OutboundMessage>>,
    sent: bool,
    idempotent: bool,
    attempts: u32,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    replies: Replies,
    ended: Option<Result<(), CallError>>,
    /// The caller is gone (an emitted event): the entry goes with its end.
    detached: bool,
    waker: Option<Waker>,
}

/// Replies that wait to be read: nearly always one at the most, which costs no allocation.
#[derive(Default)]
struct Replies {
    first: Option<Payload>,
    more: VecDeque<Payload>,
}

impl Replies {
    fn push_back(&mut self, reply: Payload) {
        if self.first.is_none() {
            self.first = Some(reply);
        } else {
            self.more.push_back(reply);
        }
    }

    fn pop_front(&mut self) -> Option<Payload> {
        let first = self.first.take();
        if first.is_some() {
            self.first = self.more.pop_front();
        }
        first
    }

    fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.more.len()
    }
}

#[derive(Default)]
struct State {
    calls: Slab<Entry>,
    queue: VecDeque<SlotKey>,
    cancels: VecDeque<(PacketId, Route)>,
    generation: u32,
    deadlines: BinaryHeap<Reverse<(Instant, u32, u32)>>,
    session: Option<Arc<SessionControl>>,
    unended: usize,
    closed: bool,
    late: u64,
}

/// The shared heart of a client.
pub(crate) struct ClientCore {
    state: Mutex<State>,
    prefix: u32,
    limits: CorrelationLimits,
    /// Something is queued and there is no session, or the client was closed.
    pub(crate) demand: Notify,
    /// An earlier deadline was set.
    timer: Notify,
}

impl fmt::Debug for ClientCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCore").field("pending", &self.pending()).finish_non_exhaustive()
    }
}

impl ClientCore {
    pub(crate) fn new(limits: CorrelationLimits) -> Self {
        Self {
            state: Mutex::default(),
            prefix: rand::random::<u32>() & 0x0fff_ffff,
            limits,
            demand: Notify::new(),
            timer: Notify::new(),
        }
    }

    // === the caller's side ===

    /// Takes a call in, and says whether there is a session for it.
    pub(crate) fn insert(&self, call: NewCall) -> Result<(SlotKey, bool), CallError> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(CallError::Closed);
        }
        if state.calls.len() >= self.limits.max_pending {
            return Err(CallError::Overloaded { bound: "max_pending", limit: self.limits.max_pending });
        }
        state.generation = state.generation.wrapping_add(1);
        let generation = state.generation;
        let deadline = call.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let route = call.message.pattern.route().clone();
        let index = state.calls.insert(Entry {
            generation,
            kind: call.kind,
            route,
            message: Some(call.message),
            sent: false,
            idempotent: call.idempotent,
            attempts: 0,
            timeout: call.timeout,
            deadline,
            replies: Replies::default(),
            ended: None,
            detached: false,
            waker: None,
        }) as u32;
        let key = SlotKey { index, generation };
        state.unended += 1;
        state.queue.push_back(key);
        let first = deadline.is_some_and(|deadline| state.watch(deadline, key));
        match &state.session {
            // More than one waiting: the session has been woken already.
            Some(session) if state.queue.len() == 1 => session.wake(),
            Some(_) => {}
            None => self.demand.notify_one(),
        }
        let connected = state.session.is_some();
        drop(state);
        if first {
            self.timer.notify_one();
        }
        Ok((key, connected))
    }

    /// The next reply of a call, and whether it is certainly the last (the slot is then free); `None` when it
    /// completed.
    pub(crate) fn poll_reply(
        &self,
        key: SlotKey,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(Payload, bool), CallError>>> {
        let mut state = self.state.lock();
        let Some(entry) = state.entry(key) else {
            // Freed already: the caller polls after the end.
            return Poll::Ready(None);
        };
        if let Some(reply) = entry.replies.pop_front() {
            let last = matches!(entry.ended, Some(Ok(()))) && entry.replies.len() == 0;
            if last {
                state.remove(key);
            }
            return Poll::Ready(Some(Ok((reply, last))));
        }
        if let Some(ended) = entry.ended.take() {
            state.remove(key);
            return Poll::Ready(ended.err().map(Err));
        }
        match &mut entry.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// The caller has lost interest: frees the slot, and tells the peer if the call is under way.
    pub(crate) fn forget(&self, key: SlotKey) {
        let mut state = self.state.lock();
        let Some(entry) = state.entry(key) else { return };
        if entry.kind == CallKind::Event && entry.ended.is_none() {
            entry.detached = true;
            return;
        }
        let under_way = entry.sent && entry.ended.is_none() && entry.kind != CallKind::Event;
        let route = entry.route.clone();
        state.end(key, Err(CallError::Cancelled));
        state.remove(key);
        if under_way && state.session.is_some() {
            let id = self.id(key);
            state.cancels.push_back((id, route));
            if let Some(session) = &state.session {
                session.wake();
            }
        }
    }

    /// Ends a call from the caller's side with an outcome it will read.
    pub(crate) fn cancel(&self, key: SlotKey) {
        let mut state = self.state.lock();
        let Some(entry) = state.entry(key) else { return };
        let under_way = entry.sent && entry.ended.is_none();
        let route = entry.route.clone();
        state.end(key, Err(CallError::Cancelled));
        if under_way && let Some(session) = state.session.clone() {
            state.cancels.push_back((self.id(key), route));
            session.wake();
        }
    }

    /// Calls that have not ended.
    pub(crate) fn pending(&self) -> usize {
        self.state.lock().unended
    }

    /// Slots in use, ended calls whose outcome was not read included.
    pub(crate) fn occupied(&self) -> usize {
        self.state.lock().calls.len()
    }

    /// Replies that came when nobody waited for them any more.
    pub(crate) fn late(&self) -> u64 {
        self.state.lock().late
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.pending() == 0
    }

    fn id(&self, key: SlotKey) -> PacketId {
        PacketId::from_parts(self.prefix, key.generation, key.index)
    }

    fn key_of(&self, id: PacketId) -> Option<SlotKey> {
        self.key_of_text(id.as_str().as_bytes())
    }

    fn key_of_text(&self, text: &[u8]) -> Option<SlotKey> {
        let (prefix, generation, index) = PacketId::parts(text)?;
        (prefix == self.prefix).then_some(SlotKey { index, generation })
    }

    // === the session's side ===

    /// The next thing to write: cancellations, then queued calls.
    pub(crate) fn next_outbound<R>(&self) -> Option<(SlotKey, Outbound<R>)> {
        let mut state = self.state.lock();
        if let Some((id, route)) = state.cancels.pop_front() {
            let nobody = SlotKey { index: u32::MAX, generation: 0 };
            return Some((nobody, Outbound::Cancel { id, route }));
        }
        loop {
            let key = state.queue.pop_front()?;
            let id = self.id(key);
            let Some(entry) = state.entry(key).filter(|entry| entry.ended.is_none()) else { continue };
            let message = if entry.idempotent { entry.message.clone() } else { entry.message.take() };
            let Some(mut message) = message else { continue };
            if entry.kind == CallKind::Event {
                return Some((key, Outbound::Event(*message)));
            }
            message.id = Some(id);
            entry.sent = true;
            entry.attempts += 1;
            return Some((key, Outbound::Request(*message)));
        }
    }

    /// The transporter took it.
    pub(crate) fn written(&self, key: SlotKey) {
        let mut state = self.state.lock();
        if state.entry(key).is_some_and(|entry| entry.kind == CallKind::Event) {
            state.end(key, Ok(()));
        }
    }

    /// The transporter cannot put it in wire form.
    pub(crate) fn refused(&self, key: SlotKey, reason: SharedError) {
        self.state.lock().end(key, Err(CallError::Encode(reason)));
    }

    /// A reply arrived.
    pub(crate) fn on_response(&self, packet: ResponsePacket) {
        let key = packet.id.as_ref().and_then(|raw| self.key_of_text(id_text(raw)));
        let mut state = self.state.lock();
        let state = &mut *state;
        let live = key.filter(|key| {
            state.entry(*key).is_some_and(|entry| entry.ended.is_none() && entry.kind != CallKind::Event)
        });
        let Some(key) = live else {
            state.late += 1;
            return;
        };
        match packet.body {
            ResponseBody::Item(payload) => self.on_item(state, key, payload),
            ResponseBody::Last(payload) => {
                if let (Some(payload), Some(entry)) = (payload, state.entry(key)) {
                    entry.replies.push_back(payload);
                }
                state.end(key, Ok(()));
            }
            ResponseBody::Error(payload) => {
                state.end(key, Err(CallError::Remote(RemoteError::new(payload))));
            }
            ResponseBody::NoHandler => state.end_no_handler(key),
        }
    }

    fn on_item(&self, state: &mut State, key: SlotKey, payload: Payload) {
        let limit = self.limits.max_buffered_replies;
        let Some(entry) = state.entry(key) else { return };
        if entry.replies.len() >= limit {
            // The caller does not read; holding the line for everyone else on it would be worse.
            let route = entry.route.clone();
            state.end(key, Err(CallError::Overloaded { bound: "max_buffered_replies", limit }));
            state.cancels.push_back((self.id(key), route));
            if let Some(session) = &state.session {
                session.wake();
            }
            return;
        }
        entry.replies.push_back(payload);
        let waker = entry.waker.take();
        let deadline = match (entry.kind, entry.timeout) {
            (CallKind::Stream, Some(timeout)) => Instant::now().checked_add(timeout),
            _ => entry.deadline,
        };
        if deadline != entry.deadline {
            entry.deadline = deadline;
            if let Some(deadline) = deadline {
                // Later than what the timer waits for, or the timer has nothing to wait for.
                if state.watch(deadline, key) {
                    self.timer.notify_one();
                }
            }
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// A broker says that a request reached nobody.
    pub(crate) fn on_unreachable(&self, id: PacketId) {
        let mut state = self.state.lock();
        if let Some(key) = self.key_of(id) {
            state.end_no_handler(key);
        }
    }

    // === the connection's side ===

    /// A session is up: queued calls go to it.
    pub(crate) fn session_started(&self, control: &Arc<SessionControl>) {
        self.state.lock().session = Some(Arc::clone(control));
        control.wake();
    }

    /// The session is over: calls under way may have run and end, those declared idempotent are queued
    /// again, those not yet written stay queued.
    pub(crate) fn session_ended(&self, cause: &SessionError) {
        let mut state = self.state.lock();
        if state.session.take().is_none() {
            return;
        }
        state.cancels.clear();
        let sent: Vec<_> = state
            .calls
            .iter()
            .filter(|(_, entry)| entry.sent && entry.ended.is_none())
            .map(|(index, entry)| {
                let again = entry.idempotent
                    && entry.attempts <= self.limits.resend_attempts
                    && entry.replies.len() == 0;
                (SlotKey { index: index as u32, generation: entry.generation }, again)
            })
            .collect();
        for (key, again) in sent {
            if again {
                if let Some(entry) = state.entry(key) {
                    entry.sent = false;
                }
                state.queue.push_back(key);
            } else {
                state.end(key, Err(CallError::Lost { cause: cause.clone() }));
            }
        }
        if !state.queue.is_empty() {
            self.demand.notify_one();
        }
    }

    /// There is no connection and none is coming: everything queued ends unsent.
    pub(crate) fn fail_queued(&self, cause: &SessionError) {
        let mut state = self.state.lock();
        while let Some(key) = state.queue.pop_front() {
            state.end(key, Err(CallError::NotSent { cause: cause.clone() }));
        }
    }

    /// Whether something waits to be sent.
    pub(crate) fn has_demand(&self) -> bool {
        let mut state = self.state.lock();
        // Calls that ended while they waited leave their keys behind.
        while let Some(key) = state.queue.front().copied() {
            if state.entry(key).is_some_and(|entry| entry.ended.is_none()) {
                return true;
            }
            state.queue.pop_front();
        }
        false
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// No call is taken any more.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.demand.notify_one();
    }

    /// Calls are taken again: a closed client that is used anew.
    pub(crate) fn reopen(&self) {
        self.state.lock().closed = false;
    }

    /// Ends everything that has not ended.
    pub(crate) fn end_all(&self, outcome: &CallError) {
        let mut state = self.state.lock();
        let open: Vec<_> = state
            .calls
            .iter()
            .filter(|(_, entry)| entry.ended.is_none())
            .map(|(index, entry)| SlotKey { index: index as u32, generation: entry.generation })
            .collect();
        for key in open {
            // The session says it before it closes: handlers behind a broker would not learn it otherwise.
            let under_way = state.entry(key).filter(|entry| entry.sent && entry.kind != CallKind::Event);
            if let Some(route) = under_way.map(|entry| entry.route.clone())
                && state.session.is_some()
            {
                state.cancels.push_back((self.id(key), route));
            }
            state.end(key, Err(outcome.clone()));
        }
        state.queue.clear();
    }

    // === the timer ===

    /// Ends calls whose deadline passes, for ever.
    pub(crate) async fn run_timer(&self) {
        loop {
            let next = self.expire(Instant::now());
            let earlier = self.timer.notified();
            match next {
                Some(at) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(at) => {}
                        () = earlier => {}
                    }
                }
                None => earlier.await,
            }
        }
    }

    /// Ends what is due and says when to look again.
    fn expire(&self, now: Instant) -> Option<Instant> {
        let mut state = self.state.lock();
        while let Some(Reverse((at, index, generation))) = state.deadlines.peek().copied() {
            let key = SlotKey { index, generation };
            let current =
                state.entry(key).filter(|entry| entry.ended.is_none()).and_then(|entry| entry.deadline);
            // An ended call, or one whose deadline moved, left this mark behind.
            if current != Some(at) {
                state.deadlines.pop();
                continue;
            }
            if at > now {
                return Some(at);
            }
            state.deadlines.pop();
            let Some(entry) = state.entry(key) else { continue };
            let after = entry.timeout.unwrap_or_default();
            let under_way = entry.sent && entry.kind != CallKind::Event;
            let route = entry.route.clone();
            state.end(key, Err(CallError::Timeout { after }));
            if under_way && let Some(session) = state.session.clone() {
                state.cancels.push_back((self.id(key), route));
                session.wake();
            }
        }
        None
    }
}

/// The text of an id of ours, out of the raw bytes of a reply's `id`: a JSON or MessagePack string.
fn id_text(raw: &Raw) -> &[u8] {
    match &**raw {
        [b'"', text @ .., b'"'] if text.len() == PacketId::LEN => text,
        [0xb5, text @ ..] if text.len() == PacketId::LEN => text,
        text => text,
    }
}

impl State {
    fn entry(&mut self, key: SlotKey) -> Option<&mut Entry> {
        self.calls.get_mut(key.index as usize).filter(|entry| entry.generation == key.generation)
    }

    /// Ends a call that has not ended: its one outcome.
    fn end(&mut self, key: SlotKey, outcome: Result<(), CallError>) {
        let Some(entry) = self.entry(key).filter(|entry| entry.ended.is_none()) else { return };
        entry.ended = Some(outcome);
        entry.message = None;
        let waker = entry.waker.take();
        let detached = entry.detached;
        self.unended -= 1;
        if detached {
            self.remove(key);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
        if self.unended == 0
            && let Some(session) = self.session.as_ref().filter(|session| session.is_draining())
        {
            // A draining session waits for this.
            session.wake();
        }
    }

    fn end_no_handler(&mut self, key: SlotKey) {
        let Some(entry) = self.entry(key) else { return };
        let pattern = entry.route.to_string();
        self.end(key, Err(CallError::NoHandler { pattern }));
    }

    fn remove(&mut self, key: SlotKey) {
        if self.entry(key).is_some() {
            self.calls.remove(key.index as usize);
        }
    }

    /// Marks a deadline; `true` when it is the earliest.
    fn watch(&mut self, deadline: Instant, key: SlotKey) -> bool {
        // Ended calls leave their marks behind; swept when most are such.
        if self.deadlines.len() > 2 * self.calls.len() + 1024 {
            let marks = std::mem::take(&mut self.deadlines).into_vec();
            let calls = &self.calls;
            self.deadlines = marks
                .into_iter()
                .filter(|Reverse((at, index, generation))| {
                    calls.get(*index as usize).is_some_and(|entry| {
                        entry.generation == *generation
                            && entry.deadline == Some(*at)
                            && entry.ended.is_none()
                    })
                })
                .collect();
        }
        let first = self.deadlines.peek().is_none_or(|Reverse((at, ..))| deadline < *at);
        self.deadlines.push(Reverse((deadline, key.index, key.generation)));
        first
    }
}
