// SPDX-License-Identifier: MIT OR Apache-2.0
//! The correlation map of a client: every call that has not ended, and how it ends.
//!
//! The map is owned by the client actor and lent to its session task and to the callers' futures; a short
//! lock is all they share: two per call, for its start and its reply, and two per turn of the session, which takes
//! what is queued and brings what has arrived in batches. An id of ours names its slot, so that a reply is found
//! without hashing. One timer queue serves all deadlines. When the session dies, everyone waiting hears why, at
//! once.
//!
//! A call's time runs from when the session takes it, in the turn after the call was made, because that is one look
//! at the clock for many calls. Where no session is there to take it, or none that has room, it runs at once.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::calls::{CallKey, Calls, Entry};
use crate::error::{CallError, RemoteError, SessionError, SessionErrorKind, SharedError};
use crate::packet::{Raw, ResponseBody, ResponsePacket, ShortReply};
use crate::pattern::Route;
use crate::payload::Payload;
use crate::pending::{Deadlines, Patterns};
use crate::session::SessionControl;
use crate::transport::{OutboundMessage, PacketId};

/// How many queued calls the session takes at once.
const BATCH: usize = 256;

/// What the correlation map needs to know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CorrelationLimits {
    pub(crate) max_pending: usize,
    pub(crate) max_buffered_replies: usize,
    pub(crate) resend_attempts: u32,
    /// Whether a lost connection is made anew at once.
    pub(crate) reconnect: bool,
}

/// A call as its future hands it over.
pub(crate) struct NewCall<'a> {
    /// Taken if the call is.
    pub(crate) message: &'a mut Option<OutboundMessage>,
    pub(crate) kind: CallKind,
    pub(crate) timeout: Option<Duration>,
    pub(crate) idempotent: bool,
    /// Who waits for the reply, if known already.
    pub(crate) waker: Option<&'a Waker>,
}

/// How far a call is that has something to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// There is a reply, and more may follow.
    Reply,
    /// There is a reply, the last one.
    Last,
    /// It has completed.
    End,
}

/// What a caller waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum CallKind {
    /// One value: the timeout is for the whole call.
    #[default]
    Single,
    /// Many values: the timeout is for each.
    Stream,
    /// That the event has been handed to the transporter, or to the broker where that says so.
    Event,
}

/// A call that waits to be written.
pub(crate) struct Queued {
    pub(crate) key: CallKey,
    pub(crate) kind: CallKind,
    /// Whether anyone still waits for it, when it was taken.
    pub(crate) live: bool,
    /// Without its id, which the session puts in when it writes it.
    pub(crate) message: OutboundMessage,
}

/// What a session has taken to write.
#[derive(Default)]
pub(crate) struct Outgoing {
    pub(crate) cancels: VecDeque<(PacketId, Route)>,
    pub(crate) calls: VecDeque<Queued>,
    /// Events that the transporter has taken.
    pub(crate) written: Vec<CallKey>,
    /// Events that the transporter has taken and of which it will say what the broker made; true for those that outlive
    /// their session.
    pub(crate) confirming: Vec<(CallKey, bool)>,
}

#[derive(Default)]
struct State {
    calls: Calls,
    patterns: Patterns,
    queue: VecDeque<Queued>,
    cancels: VecDeque<(PacketId, Route)>,
    deadlines: Deadlines,
    /// What the timer waits for; `None` when it waits to be told.
    timer_at: Option<Instant>,
    session: Option<Arc<SessionControl>>,
    /// The session has no room: what is queued will wait.
    stalled: bool,
    /// Callers to be woken when the lock is released.
    woken: Vec<Waker>,
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

    /// Releases the lock before it wakes callers, who take it first thing.
    fn lock(&self) -> Locked<'_> {
        Locked { state: self.state.lock(), wake: Woken::default() }
    }

    // === the caller's side ===

    /// Takes a call in, and says whether there is a session for it.
    pub(crate) fn insert(&self, call: NewCall<'_>) -> Result<(CallKey, bool), CallError> {
        let NewCall { message, kind, timeout, idempotent, waker } = call;
        let waker = waker.cloned();
        let mut state = self.state.lock();
        if state.closed {
            return Err(CallError::Closed);
        }
        if state.calls.len() >= self.limits.max_pending {
            return Err(CallError::Overloaded { bound: "max_pending", limit: self.limits.max_pending });
        }
        let Some(message) = message.take() else { return Err(CallError::Closed) };
        let pattern = state.patterns.keep(&message.pattern);
        let (key, entry) = state.calls.begin();
        entry.pattern = pattern;
        entry.kind = kind;
        entry.timeout = timeout;
        entry.idempotent = idempotent;
        entry.waker = waker;
        state.unended += 1;
        state.enqueue(Queued { key, kind, live: true, message });
        let mut first = false;
        if state.session.is_none() || state.stalled {
            first = state.set_deadline(key, Instant::now());
        }
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

    /// The next reply of a call, put `into` where there is none yet; then the slot is free if nothing can follow.
    pub(crate) fn poll_reply(
        &self,
        key: CallKey,
        cx: &mut Context<'_>,
        into: &mut Option<Payload>,
    ) -> Poll<Result<Next, Box<CallError>>> {
        let mut state = self.state.lock();
        let Some(entry) = state.calls.get_mut(key) else {
            // Freed already: the caller polls after the end.
            return Poll::Ready(Ok(Next::End));
        };
        entry.replies.pop_into(into);
        if into.is_some() {
            let last = matches!(entry.ended, Some(Ok(()))) && entry.replies.len() == 0;
            if last {
                state.remove(key);
            }
            return Poll::Ready(Ok(if last { Next::Last } else { Next::Reply }));
        }
        if let Some(ended) = entry.ended.take() {
            state.remove(key);
            return Poll::Ready(ended.map(|()| Next::End));
        }
        match &mut entry.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// The caller has lost interest: frees the slot, and tells the peer if the call is under way.
    pub(crate) fn forget(&self, key: CallKey) {
        let mut state = self.lock();
        let Some(entry) = state.calls.get_mut(key) else { return };
        if entry.kind == CallKind::Event && entry.ended.is_none() {
            entry.detached = true;
            return;
        }
        let under_way = entry.sent && entry.ended.is_none() && entry.kind != CallKind::Event;
        if under_way {
            state.tell_cancelled(key, self.id(key));
        }
        state.end(key, Err(CallError::Cancelled));
        state.remove(key);
    }

    /// Ends a call from the caller's side with an outcome it will read.
    pub(crate) fn cancel(&self, key: CallKey) {
        let mut state = self.lock();
        let Some(entry) = state.calls.get_mut(key) else { return };
        if entry.sent && entry.ended.is_none() {
            state.tell_cancelled(key, self.id(key));
        }
        state.end(key, Err(CallError::Cancelled));
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

    pub(crate) fn id(&self, key: CallKey) -> PacketId {
        PacketId::from_parts(self.prefix, key.generation, key.index)
    }

    fn key_of(&self, id: PacketId) -> Option<CallKey> {
        let (prefix, generation, index) = id.parts();
        (prefix == self.prefix).then_some(CallKey { index, generation })
    }

    // === the session's side ===

    /// Takes the next things to write; `false` when there is nothing. `out` must be empty.
    pub(crate) fn take_outbound(&self, out: &mut Outgoing) -> bool {
        let mut state = self.state.lock();
        state.stalled = false;
        std::mem::swap(&mut state.cancels, &mut out.cancels);
        if state.queue.len() <= BATCH {
            std::mem::swap(&mut state.queue, &mut out.calls);
        } else {
            out.calls.extend(state.queue.drain(..BATCH));
        }
        let mut now = None;
        let mut first = false;
        for queued in &mut out.calls {
            let key = queued.key;
            let Some(entry) = state.calls.get_mut(key).filter(|entry| entry.ended.is_none()) else {
                queued.live = false;
                continue;
            };
            entry.sent = true;
            if entry.kind == CallKind::Event {
                continue;
            }
            entry.attempts += 1;
            if entry.idempotent && entry.again.is_none() {
                entry.again = Some(Box::new(queued.message.clone()));
            }
            if entry.deadline.is_none() && entry.timeout.is_some() {
                first |= state.set_deadline(key, *now.get_or_insert_with(Instant::now));
            }
        }
        drop(state);
        if first {
            self.timer.notify_one();
        }
        !out.calls.is_empty() || !out.cancels.is_empty()
    }

    /// The session has no room for what is queued.
    pub(crate) fn stall(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.stalled, true) && state.set_deadlines() {
            drop(state);
            self.timer.notify_one();
        }
    }

    /// The session had no room for these: they are queued again, before all others.
    pub(crate) fn put_back(&self, calls: &mut VecDeque<Queued>) {
        let mut state = self.state.lock();
        for queued in calls.drain(..).rev() {
            if let Some(entry) = state.calls.get_mut(queued.key)
                && queued.live
            {
                entry.sent = false;
                if entry.kind != CallKind::Event {
                    entry.attempts = entry.attempts.saturating_sub(1);
                }
            }
            state.queue.push_front(queued);
        }
    }

    /// The transporter took these events.
    pub(crate) fn written(&self, events: &mut Vec<CallKey>) {
        if events.is_empty() {
            return;
        }
        let mut state = self.lock();
        for key in events.drain(..) {
            state.end(key, Ok(()));
        }
    }

    /// The transporter took these events and will say what the broker made of each, by its id; of those that are
    /// carried, perhaps in a later session.
    pub(crate) fn confirming(&self, events: &mut Vec<(CallKey, bool)>) {
        if events.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut first = false;
        let mut state = self.state.lock();
        for (key, carried) in events.drain(..) {
            let Some(entry) = state.calls.get_mut(key).filter(|entry| entry.ended.is_none()) else {
                continue;
            };
            entry.carried = carried;
            if entry.deadline.is_none() && entry.timeout.is_some() {
                first |= state.set_deadline(key, now);
            }
        }
        drop(state);
        if first {
            self.timer.notify_one();
        }
    }

    /// What the broker made of events, and why it refused them if it did.
    pub(crate) fn confirmed(&self, events: &mut Vec<(PacketId, Option<String>)>) {
        if events.is_empty() {
            return;
        }
        let mut state = self.lock();
        for (receipt, refused) in events.drain(..) {
            let Some(key) = self.key_of(receipt) else { continue };
            let outlived = state.calls.get(key).is_some_and(|entry| entry.attempts > 0);
            let refused = refused.map(SessionError::refused).map(|cause| match outlived {
                // An earlier session may have brought it there, unheard.
                true => CallError::Lost { cause },
                false => CallError::NotSent { cause },
            });
            state.end(key, refused.map_or(Ok(()), Err));
        }
    }

    /// The transporter cannot put it in wire form.
    pub(crate) fn refused(&self, key: CallKey, reason: SharedError) {
        self.lock().end(key, Err(CallError::Encode(reason)));
    }

    /// The session ended over this one.
    pub(crate) fn lost(&self, key: CallKey, cause: &SessionError) {
        self.lock().end(key, Err(CallError::Lost { cause: cause.clone() }));
    }

    /// Replies arrived.
    pub(crate) fn on_responses(&self, packets: &mut Vec<ResponsePacket>) {
        if packets.is_empty() {
            return;
        }
        let mut state = self.lock();
        state.woken.reserve(packets.len());
        for packet in packets.drain(..) {
            self.on_response(&mut state, packet);
        }
    }

    fn on_response(&self, state: &mut State, packet: ResponsePacket) {
        let key = packet.id.as_ref().and_then(own_id).and_then(|id| self.key_of(id));
        let Some((key, entry)) = state.waiting(key) else { return };
        match packet.body {
            ResponseBody::Item(payload) => self.on_item(state, key, payload),
            ResponseBody::Last(payload) => {
                if let Some(payload) = payload {
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

    /// Short replies arrived.
    pub(crate) fn on_short_replies(&self, replies: &mut Vec<ShortReply>) {
        if replies.is_empty() {
            return;
        }
        let mut state = self.lock();
        state.woken.reserve(replies.len());
        for reply in replies.drain(..) {
            let key = self.key_of(reply.id);
            let Some((key, entry)) = state.waiting(key) else { continue };
            entry.replies.push_back(reply.value);
            state.end(key, Ok(()));
        }
    }

    fn on_item(&self, state: &mut State, key: CallKey, payload: Payload) {
        let limit = self.limits.max_buffered_replies;
        let Some(entry) = state.calls.get_mut(key) else { return };
        if entry.replies.len() >= limit {
            // The caller does not read; holding the line for everyone else on it would be worse.
            state.tell_cancelled(key, self.id(key));
            state.end(key, Err(CallError::Overloaded { bound: "max_buffered_replies", limit }));
            return;
        }
        entry.replies.push_back(payload);
        let waker = entry.waker.take();
        // Each reply of a stream begins its time anew; what the timer waits for is earlier, mostly.
        if entry.kind == CallKind::Stream
            && entry.timeout.is_some()
            && state.set_deadline(key, Instant::now())
        {
            self.timer.notify_one();
        }
        state.woken.extend(waker);
    }

    /// A broker says that a request reached nobody.
    pub(crate) fn on_unreachable(&self, id: PacketId) {
        let mut state = self.lock();
        if let Some(key) = self.key_of(id) {
            state.end_no_handler(key);
        }
    }

    // === the connection's side ===

    /// A session is up: queued calls go to it.
    pub(crate) fn session_started(&self, control: &Arc<SessionControl>) {
        let mut state = self.state.lock();
        state.session = Some(Arc::clone(control));
        state.stalled = false;
        drop(state);
        control.wake();
    }

    /// The session is over: calls under way may have run and end, those declared idempotent are queued
    /// again, those not yet written stay queued. Events that the transporter carries over stay as they are, if there
    /// is going to be a next session.
    pub(crate) fn session_ended(&self, cause: &SessionError) {
        let mut state = self.lock();
        if state.session.take().is_none() {
            return;
        }
        state.cancels.clear();
        let goes_on = self.limits.reconnect && cause.kind() != SessionErrorKind::Fatal;
        for entry in state.calls.iter_mut().filter(|entry| entry.carried) {
            entry.attempts = entry.attempts.saturating_add(1);
        }
        let sent: Vec<_> = state
            .calls
            .iter()
            .filter(|(_, entry)| entry.sent && entry.ended.is_none() && !(goes_on && entry.carried))
            .map(|(key, entry)| {
                let again = entry
                    .again
                    .clone()
                    .filter(|_| entry.attempts <= self.limits.resend_attempts && entry.replies.len() == 0);
                (key, entry.kind, again)
            })
            .collect();
        for (key, kind, again) in sent {
            if let Some(message) = again {
                if let Some(entry) = state.calls.get_mut(key) {
                    entry.sent = false;
                }
                state.enqueue(Queued { key, kind, live: true, message: *message });
            } else {
                state.end(key, Err(CallError::Lost { cause: cause.clone() }));
            }
        }
        if state.set_deadlines() {
            self.timer.notify_one();
        }
        if !state.queue.is_empty() {
            self.demand.notify_one();
        }
    }

    /// There is no connection and none is coming: everything queued ends unsent, and what was carried over as lost.
    pub(crate) fn fail_waiting(&self, cause: &SessionError) {
        let mut state = self.lock();
        while let Some(queued) = state.queue.pop_front() {
            state.end(queued.key, Err(CallError::NotSent { cause: cause.clone() }));
        }
        for key in state.open(|entry| entry.carried) {
            state.end(key, Err(CallError::Lost { cause: cause.clone() }));
        }
    }

    /// Whether something waits to be sent.
    pub(crate) fn has_demand(&self) -> bool {
        let mut state = self.state.lock();
        // Calls that ended while they waited leave their keys behind.
        while let Some(key) = state.queue.front().map(|queued| queued.key) {
            if state.calls.get_mut(key).is_some_and(|entry| entry.ended.is_none()) {
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
        let mut state = self.lock();
        for key in state.open(|_| true) {
            // The session says it before it closes: handlers behind a broker would not learn it otherwise.
            if state.calls.get_mut(key).is_some_and(|entry| entry.sent && entry.kind != CallKind::Event) {
                state.tell_cancelled(key, self.id(key));
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
        let mut state = self.lock();
        state.timer_at = None;
        while let Some((at, key)) = state.deadlines.peek() {
            let current = state
                .calls
                .get_mut(key)
                .filter(|entry| entry.ended.is_none())
                .and_then(|entry| entry.deadline);
            // An ended call, or one whose deadline moved, left this mark behind.
            if current != Some(at) {
                state.deadlines.pop();
                continue;
            }
            if at > now {
                state.timer_at = Some(at);
                return Some(at);
            }
            state.deadlines.pop();
            let Some(entry) = state.calls.get_mut(key) else { continue };
            let after = entry.timeout.unwrap_or_default();
            if entry.sent && entry.kind != CallKind::Event {
                state.tell_cancelled(key, self.id(key));
            }
            state.end(key, Err(CallError::Timeout { after }));
        }
        None
    }
}

/// An id of ours, out of the raw bytes of a reply's `id`: a JSON or MessagePack string.
fn own_id(raw: &Raw) -> Option<PacketId> {
    PacketId::from_text(match &**raw {
        [b'"', text @ .., b'"'] if text.len() == PacketId::LEN => text,
        [0xb5, text @ ..] if text.len() == PacketId::LEN => text,
        text => text,
    })
}

impl State {
    /// The calls of a kind that have not ended.
    fn open(&self, of: impl Fn(&Entry) -> bool) -> Vec<CallKey> {
        let open = self.calls.iter().filter(|(_, entry)| entry.ended.is_none() && of(entry));
        open.map(|(key, _)| key).collect()
    }

    /// The call that a reply is for; one that comes when nobody waits for it is counted.
    fn waiting(&mut self, key: Option<CallKey>) -> Option<(CallKey, &mut Entry)> {
        let waits = |entry: &Entry| entry.ended.is_none() && entry.kind != CallKind::Event;
        let entry = key.and_then(|key| {
            let entry = self.calls.get_mut(key)?;
            waits(entry).then_some((key, entry))
        });
        if entry.is_none() {
            self.late += 1;
        }
        entry
    }

    /// Ends a call that has not ended: its one outcome.
    fn end(&mut self, key: CallKey, outcome: Result<(), CallError>) {
        let Some(entry) = self.calls.get_mut(key).filter(|entry| entry.ended.is_none()) else { return };
        entry.ended = Some(outcome.map_err(Box::new));
        entry.again = None;
        let waker = entry.waker.take();
        let detached = entry.detached;
        self.unended -= 1;
        if detached {
            self.remove(key);
        }
        self.woken.extend(waker);
        if self.unended == 0
            && let Some(session) = self.session.as_ref().filter(|session| session.is_draining())
        {
            // A draining session waits for this.
            session.wake();
        }
    }

    /// Lets the session tell the peer that nobody waits for this call any more.
    fn tell_cancelled(&mut self, key: CallKey, id: PacketId) {
        let Some(place) = self.calls.get(key).map(|entry| entry.pattern) else { return };
        if let (Some(session), Some(route)) = (&self.session, self.patterns.route(place)) {
            self.cancels.push_back((id, route.clone()));
            session.wake();
        }
    }

    fn end_no_handler(&mut self, key: CallKey) {
        let Some(place) = self.calls.get(key).map(|entry| entry.pattern) else { return };
        let pattern = self.patterns.route(place).map(Route::to_string).unwrap_or_default();
        self.end(key, Err(CallError::NoHandler { pattern }));
    }

    fn remove(&mut self, key: CallKey) {
        if let Some(pattern) = self.calls.remove(key) {
            self.patterns.release(pattern);
        }
    }

    /// Queues a call.
    fn enqueue(&mut self, queued: Queued) {
        // Calls that ended while they waited leave their messages behind; swept when most are such.
        if self.queue.len() > 2 * self.unended + BATCH {
            let calls = &self.calls;
            self.queue.retain(|queued| calls.get(queued.key).is_some_and(|entry| entry.ended.is_none()));
        }
        self.queue.push_back(queued);
    }

    /// Lets a call's time begin; `true` when the timer must be told.
    fn set_deadline(&mut self, key: CallKey, now: Instant) -> bool {
        let Some(entry) = self.calls.get_mut(key) else { return false };
        entry.deadline = entry.timeout.and_then(|timeout| now.checked_add(timeout));
        let Some(deadline) = entry.deadline else { return false };
        let calls = &self.calls;
        self.deadlines.push((deadline, key), calls.len(), |(at, key)| {
            calls.get(*key).is_none_or(|entry| entry.deadline != Some(*at) || entry.ended.is_some())
        });
        let first = self.timer_at.is_none_or(|at| deadline < at);
        if first {
            self.timer_at = Some(deadline);
        }
        first
    }

    /// Lets the time of every queued call begin that has not begun; `true` when the timer must be told.
    fn set_deadlines(&mut self) -> bool {
        let now = Instant::now();
        let mut first = false;
        for place in 0..self.queue.len() {
            let key = self.queue[place].key;
            if self.calls.get(key).is_some_and(|entry| entry.deadline.is_none() && entry.ended.is_none()) {
                first |= self.set_deadline(key, now);
            }
        }
        first
    }
}

/// The state, locked. Whoever has to be woken is woken after the lock is released.
struct Locked<'a> {
    // Dropped in this order.
    state: MutexGuard<'a, State>,
    wake: Woken,
}

/// Wakes when it is dropped.
#[derive(Default)]
struct Woken(Vec<Waker>);

impl Drop for Woken {
    fn drop(&mut self) {
        self.0.drain(..).for_each(Waker::wake);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.wake.0 = std::mem::take(&mut self.state.woken);
    }
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pattern::Pattern;
    use crate::payload::Format;

    fn core() -> ClientCore {
        let limits = CorrelationLimits {
            max_pending: 8,
            max_buffered_replies: 8,
            resend_attempts: 1,
            reconnect: false,
        };
        ClientCore::new(limits)
    }

    fn insert(core: &ClientCore, kind: CallKind) -> CallKey {
        let message = OutboundMessage {
            id: None,
            pattern: Pattern::from("p"),
            data: Payload::null(Format::Json),
            metadata: Default::default(),
            timeout: None,
            headers: Default::default(),
        };
        let timeout = Some(Duration::from_secs(5));
        let mut message = Some(message);
        let call = NewCall { message: &mut message, kind, timeout, idempotent: false, waker: None };
        core.insert(call).unwrap().0
    }

    fn deadline(core: &ClientCore, key: CallKey) -> Option<Instant> {
        core.state.lock().calls.get(key).unwrap().deadline
    }

    #[test]
    fn the_time_of_a_call_runs_when_it_is_taken_or_has_to_wait() {
        let core = core();
        let unconnected = insert(&core, CallKind::Single);
        assert!(deadline(&core, unconnected).is_some());
        core.session_started(&Arc::default());
        let taken = insert(&core, CallKind::Single);
        assert!(deadline(&core, taken).is_none());
        let mut out = Outgoing::default();
        assert!(core.take_outbound(&mut out));
        assert!(deadline(&core, taken).is_some());
        assert!(out.calls.iter().all(|queued| queued.live));
        assert_eq!(out.calls.iter().map(|queued| queued.key).collect::<Vec<_>>(), [unconnected, taken]);
        out.calls.clear();
        assert!(!core.take_outbound(&mut out));

        let waits = insert(&core, CallKind::Event);
        core.stall();
        let behind = insert(&core, CallKind::Single);
        assert!(deadline(&core, waits).is_some() && deadline(&core, behind).is_some());
        let lost = SessionError::lost("x");
        core.session_started(&Arc::default());
        let queued = insert(&core, CallKind::Single);
        core.session_ended(&lost);
        assert!(deadline(&core, queued).is_some());
        assert_eq!(core.pending(), 3, "those never taken are still queued");
        core.fail_waiting(&lost);
        assert_eq!(core.pending(), 0);
    }

    #[test]
    fn what_had_no_room_is_taken_again_in_order_and_what_was_taken_is_lost() {
        let core = core();
        core.session_started(&Arc::default());
        let kinds = [CallKind::Single, CallKind::Event, CallKind::Single];
        let keys = kinds.map(|kind| insert(&core, kind));
        let mut out = Outgoing::default();
        core.take_outbound(&mut out);
        out.calls.pop_front();
        core.put_back(&mut out.calls);
        let last = insert(&core, CallKind::Event);
        core.take_outbound(&mut out);
        let order: Vec<_> = out.calls.iter().map(|queued| queued.key).collect();
        assert_eq!(order, [keys[1], keys[2], last]);
        // The session ends over the event that it had taken.
        let taken = out.calls.pop_front().unwrap();
        core.put_back(&mut out.calls);
        core.session_ended(&SessionError::lost("x"));
        let ended = |key: CallKey| core.state.lock().calls.get(key).unwrap().ended.is_some();
        assert!(ended(keys[0]) && ended(taken.key) && !ended(keys[2]) && !ended(last));
        assert_eq!(core.pending(), 2);
    }
}
