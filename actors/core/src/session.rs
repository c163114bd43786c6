// SPDX-License-Identifier: MIT OR Apache-2.0
//! The session task: the data plane of one live conversation, the same for every transporter.
//!
//! One task on one arbiter reads, admits, dispatches and writes. It prefers, in order: write what is
//! finished, take route changes, send queued calls, read new work. A handler on the same arbiter is called in place,
//! and what it answers at once is written in the same turn; every other request takes a slot (its in-flight credit).
//! With no slot left, or with too much unwritten, reading pauses.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::batch::Batch;
use crate::correlation::{CallKind, ClientCore, Outgoing, Queued};
use crate::error::SessionError;
use crate::events::{EventBus, ServiceEvent};
use crate::in_flight::{End, LastWords, Owed, Shared, Slot, SlotRoute};
use crate::packet::{IncomingPacket, Raw, ResponseBody, ResponsePacket, ShortReply};
use crate::pattern::Route;
use crate::payload::Format;
use crate::replica::{Begun, NOTHING, Replica, Rest};
use crate::request::{MessageKind, Request, Scope, ServerScope, TIMEOUT_KEY};
use crate::responder::{ChainSink, ReplySink, RequestKey, Responder};
use crate::retry::{Attempt, Retrial, RetryQueue};
use crate::route::{Counter, HandlerRef, RouteEntry, RouteTable};
use crate::settlement::FailurePolicy;
use crate::supervise::panic_text;
use crate::transport::{
    Delivery, Inbound, Outbound, PacketId, PatternKey, Response, Session, SessionReader, SessionWriter,
    Settlement, Taken, TransportInfo, WriteError,
};

/// Bounds of one session.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub(crate) struct SessionLimits {
    /// Requests and events in work (not done at once); at the limit the session stops reading. Default 1024.
    pub max_in_flight: usize,
    /// Bytes taken for writing and not yet on the wire; above it the session stops reading new work, and
    /// streams wait. Default 256 KiB.
    pub high_water_bytes: usize,
    /// How long to wait for the peer to close after everything was written. Default 1 s.
    pub linger: Duration,
    /// How long the requests of a peer that has closed its side may still take; NestJS drops them at once.
    /// Default 1 s: a NestJS client that closes waits for the other side to close, too.
    pub half_close: Duration,
    /// What becomes of a message whose handler failed and has no policy of its own. Default: what NestJS does.
    pub on_failure: Option<FailurePolicy>,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            max_in_flight: 1024,
            high_water_bytes: 256 * 1024,
            linger: Duration::from_secs(1),
            half_close: Duration::from_secs(1),
            on_failure: None,
        }
    }
}

/// How many arrivals one turn of a session takes before it lets others run.
const READ_BUDGET: usize = 64;

/// The handle by which a session's owner steers it, and by which whoever has something for it wakes it.
#[derive(Debug, Default)]
pub(crate) struct SessionControl {
    waker: AtomicWaker,
    drain: AtomicBool,
    abandon: AtomicBool,
    /// Requests and events that were not done at once.
    admitted: Counter,
    /// Of those, how many have ended.
    pub(crate) answered: Counter,
    done_in_place: Counter,
}

impl SessionControl {
    /// Stop intake, finish, flush, close.
    pub(crate) fn drain(&self) {
        self.drain.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Stop waiting for handlers: flush what there is and close.
    pub(crate) fn abandon(&self) {
        self.abandon.store(true, Ordering::Release);
        self.drain();
    }

    pub(crate) fn wake(&self) {
        self.waker.wake();
    }

    /// Requests and events that are in work.
    pub(crate) fn in_flight(&self) -> u64 {
        self.admitted.get().saturating_sub(self.answered.get())
    }

    /// Requests and events that have ended.
    pub(crate) fn ended(&self) -> u64 {
        self.answered.get() + self.done_in_place.get()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.drain.load(Ordering::Acquire)
    }
}

/// A request that was not finished when its session ended.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct Abandoned {
    /// The transporter.
    pub transport: String,
    /// The route.
    pub route: String,
    /// Whether it wanted a response.
    pub request: bool,
    /// Why it was not finished.
    pub why: String,
}

/// How a session ended.
#[derive(Debug)]
pub(crate) struct SessionExit {
    /// `None` when it was drained or the peer closed in order.
    pub(crate) cause: Option<SessionError>,
    /// Requests and events that were finished.
    pub(crate) answered: u64,
    pub(crate) handed_back: u64,
    pub(crate) abandoned: Vec<Abandoned>,
    /// Requests and events that were not finished and are not in `abandoned`.
    pub(crate) lost: u64,
    /// How long it lived.
    pub(crate) lived: Duration,
}

impl SessionExit {
    /// Of a session that panicked: what it had done until then counts.
    pub(crate) fn panicked(control: &SessionControl, panic: Box<dyn std::any::Any + Send>) -> Self {
        Self {
            cause: Some(SessionError::lost(format!("the session panicked: {}", panic_text(panic)))),
            answered: control.ended(),
            handed_back: 0,
            abandoned: Vec::new(),
            lost: control.in_flight(),
            lived: Duration::ZERO,
        }
    }
}

/// What a session needs to serve.
#[derive(Clone)]
pub(crate) struct ServerEnv {
    pub(crate) scope: Arc<ServerScope>,
    pub(crate) tables: watch::Receiver<Arc<RouteTable>>,
    pub(crate) arbiter: usize,
    /// The routes that the session was dialled with.
    pub(crate) subscribed: HashSet<Route>,
}

/// What every session needs.
pub(crate) struct SessionEnv {
    pub(crate) transport: TransportInfo,
    pub(crate) events: EventBus,
    pub(crate) limits: SessionLimits,
    pub(crate) control: Arc<SessionControl>,
    pub(crate) server: Option<ServerEnv>,
    pub(crate) client: Option<Arc<ClientCore>>,
}

// === the task ===

struct Loop<S: Session> {
    reader: S::Reader,
    writer: S::Writer,
    peer: Arc<str>,
    env: SessionEnv,
    shared: Arc<Shared<S::ReplyTo>>,
    /// The same, as the responders see it.
    sink: Arc<dyn ReplySink>,
    /// What its requests have in common; a client's has none.
    scope: Option<Arc<Scope>>,
    table: Arc<RouteTable>,
    /// The entry of the route that the last message came by: messages of one route often follow each other.
    last: Option<Arc<RouteEntry>>,
    subscribed: HashSet<Route>,
    table_changed: Option<TableChange>,
    /// `subscribed` has been held against the whole table once.
    reconciled: bool,
    reading: bool,
    draining: bool,
    /// Runs once the peer has closed its side.
    half_closed: Option<Pin<Box<tokio::time::Sleep>>>,
    reported_full: bool,
    reported_congested: bool,
    handed_back: u64,
    /// The next request: its packet is read into it, so that it need not be moved.
    next: Option<Request>,
    /// Where a client, which has no requests, would read one to.
    stray: IncomingPacket,
    /// Where what this turn reads goes.
    turn: Batch<S::ReplyTo>,
    /// What was written since the last flush.
    unflushed: usize,
    retries: RetryQueue,
    batch: Vec<Owed<S::ReplyTo>>,
    /// A client's calls on their way out, and the replies that this turn has read.
    outgoing: Outgoing,
    replies: Vec<ResponsePacket>,
    short_replies: Vec<ShortReply>,
    /// Events that the broker has confirmed, or refused.
    confirmed: Vec<(PacketId, Option<String>)>,
    /// Abandoned: until when closing may take.
    close_by: Option<Pin<Box<tokio::time::Sleep>>>,
}

/// Runs a session to its end.
///
/// Cancel safe in the sense that dropping it closes the connection and gives every request in flight its
/// end (as abandoned); use [`SessionControl`] to end it in order.
pub(crate) async fn run_session<S: Session>(session: S, env: SessionEnv) -> SessionExit {
    let started = Instant::now();
    let peer = session.peer();
    let context = session.context();
    let (reader, writer) = session.split();
    let shared = Arc::new(Shared::new(Arc::clone(&env.control), env.transport.settles.is_needed()));
    let table = env.server.as_ref().map(|server| Arc::clone(&server.tables.borrow())).unwrap_or_default();
    let subscribed = env.server.as_ref().map(|server| server.subscribed.clone()).unwrap_or_default();
    let table_changed = match &env.server {
        Some(server) if env.transport.subscribes => Some(watch_tables(server.tables.clone())),
        _ => None,
    };
    let sink = Arc::clone(&shared) as Arc<dyn ReplySink>;
    let mut session = Loop::<S> {
        reader,
        writer,
        peer,
        scope: env.server.as_ref().map(|server| {
            Arc::new(Scope {
                server: Arc::clone(&server.scope),
                context,
                sink: Arc::clone(&sink),
                table: Arc::clone(&table),
            })
        }),
        sink,
        shared,
        table,
        last: None,
        subscribed,
        table_changed,
        reconciled: false,
        reading: true,
        draining: false,
        half_closed: None,
        reported_full: false,
        reported_congested: false,
        handed_back: 0,
        next: None,
        stray: IncomingPacket::default(),
        turn: Batch::default(),
        unflushed: 0,
        retries: RetryQueue::default(),
        batch: Vec::new(),
        outgoing: Outgoing::default(),
        replies: Vec::new(),
        short_replies: Vec::new(),
        confirmed: Vec::new(),
        close_by: None,
        env,
    };
    // A guard, so that a dropped task ends its requests, too.
    let mut guard = CloseGuard(Arc::clone(&session.shared), session.env.client.clone());
    let cause = std::future::poll_fn(|cx| session.poll(cx)).await.err();
    let why = match &cause {
        Some(error) => format!("the connection was lost: {error}"),
        None => "the grace period ended".to_owned(),
    };
    let abandoned = guard.0.close(&session.env.transport, &session.table, &why);
    if let Some(client) = guard.1.take() {
        let cause = cause.clone().unwrap_or_else(|| SessionError::lost("the connection was closed"));
        client.session_ended(&cause);
    }
    if cause.is_none() {
        let deadline = tokio::time::sleep(session.env.limits.linger);
        tokio::pin!(deadline);
        std::future::poll_fn(|cx| {
            if deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            session.reader.poll_linger(cx)
        })
        .await;
    }
    SessionExit {
        cause,
        answered: session.env.control.ended(),
        handed_back: session.handed_back,
        abandoned,
        lost: 0,
        lived: started.elapsed(),
    }
}

struct CloseGuard<R: Clone + Send + 'static>(Arc<Shared<R>>, Option<Arc<ClientCore>>);

impl<R: Clone + Send + 'static> Drop for CloseGuard<R> {
    fn drop(&mut self) {
        let info = TransportInfo::new(crate::transport::TransportId::custom(u16::MAX), "");
        self.0.close(&info, &RouteTable::default(), "the session was dropped");
        if let Some(client) = &self.1 {
            client.session_ended(&SessionError::lost("the session was dropped"));
        }
    }
}

/// Ready when the table has changed.
type TableChange = Pin<Box<dyn Future<Output = watch::Receiver<Arc<RouteTable>>>>>;

fn watch_tables(mut tables: watch::Receiver<Arc<RouteTable>>) -> TableChange {
    Box::pin(async move {
        if tables.changed().await.is_err() {
            // The registry is gone: no change will come.
            std::future::pending::<()>().await;
        }
        tables
    })
}

impl<S: Session> fmt::Debug for Loop<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<S: Session> Loop<S> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        // Registered before anything is looked at, so that nothing is missed.
        self.env.control.waker.register(cx.waker());
        if !self.draining && self.env.control.drain.load(Ordering::Acquire) {
            self.draining = true;
            // A client goes on reading: the replies to its calls are what it waits for.
            if self.env.server.is_some() {
                self.reader.drain();
            }
        }
        if self.env.control.abandon.load(Ordering::Acquire) {
            // What was not read by now is not taken: a session at one of its bounds must end, too.
            self.reading = false;
        }
        self.take_route_changes(cx)?;
        self.write_finished()?;
        self.retry(cx)?;
        let more = self.write_calls()?;
        let mut flushed = self.flush(cx)?;
        if more && flushed {
            // There is room again, and nobody else would say so.
            cx.waker().wake_by_ref();
        }
        if self.reading {
            let read = self.read(cx)?;
            if read.is_ready() && !self.draining {
                // The peer closed its side: nothing can be asked any more, what was asked is answered, unless it
                // has no end.
                self.draining = true;
                self.half_closed = Some(Box::pin(tokio::time::sleep(self.env.limits.half_close)));
            }
            if self.unflushed == 1 && !self.is_full() {
                // A lone answer, given in place: nothing is gained by waiting for others. One that fills the session's
                // bound has stopped the reading, which goes on in the next turn.
                flushed = self.flush(cx)?;
            } else if self.unflushed > 0 {
                // What handlers have answered in place leaves in the next turn, when the other sessions of this arbiter
                // have read and answered, too: a peer that is woken for all of it at once costs the kernel much less.
                flushed = false;
                cx.waker().wake_by_ref();
            }
        }
        // A reader that is held back by a bound, or whose drain does not end, is not waited for for ever.
        let abandon = self.env.control.abandon.load(Ordering::Acquire);
        if self.draining && (!self.reading || self.env.server.is_none() || abandon) {
            return self.finish(cx, flushed);
        }
        Poll::Pending
    }

    /// Drained: waits for handlers, then closes.
    fn finish(&mut self, cx: &mut Context<'_>, flushed: bool) -> Poll<Result<(), SessionError>> {
        let abandon = self.env.control.abandon.load(Ordering::Acquire);
        let calls_done = self.env.client.as_ref().is_none_or(|client| client.is_idle());
        if abandon && self.env.transport.settles.is_needed() {
            let unfinished = self.shared.inner.lock().keys();
            self.hand_back(unfinished)?;
        }
        if abandon {
            // A peer that does not read is not waited for much longer.
            let linger = self.env.limits.linger;
            let close_by = self.close_by.get_or_insert_with(|| Box::pin(tokio::time::sleep(linger)));
            if close_by.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
        }
        let idle = self.in_flight() == 0 && calls_done;
        if (idle || abandon) && self.shared.inner.lock().out.is_empty() && (flushed || abandon) {
            return self.writer.poll_close(cx);
        }
        if self.unflushed > 0 {
            // What was answered in place leaves in the next turn.
            return Poll::Pending;
        }
        if self.half_closed.as_mut().is_some_and(|limit| limit.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Err(SessionError::lost("the peer closed its side")));
        }
        Poll::Pending
    }

    /// Gives unfinished deliveries back to the broker, so that another consumer takes them.
    fn hand_back(&mut self, keys: Vec<RequestKey>) -> Result<(), SessionError> {
        let mut inner = self.shared.inner.lock();
        let slots: Vec<_> = keys.into_iter().filter_map(|key| inner.remove(key)).collect();
        drop(inner);
        for mut slot in slots {
            if let Some(work) = slot.cancel() {
                work.cancel();
            }
            self.handed_back += 1;
            self.env.control.admitted.add(-1);
            self.settle(slot.reply_to, Settlement::HandedBack)?;
        }
        Ok(())
    }

    fn take_route_changes(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        while let Some(changed) = &mut self.table_changed {
            let Poll::Ready(mut tables) = changed.as_mut().poll(cx) else { return Ok(()) };
            let before = Arc::clone(&self.table);
            self.replace_table(Arc::clone(&tables.borrow_and_update()));
            self.table_changed = Some(watch_tables(tables));
            if self.draining {
                continue;
            }
            // The session may have been dialled with an older table than the one that it began with.
            let changed = match std::mem::replace(&mut self.reconciled, true) {
                true => self.table.changed_since(&before),
                false => {
                    let now = self.table.iter().map(|entry| entry.route.clone());
                    now.chain(self.subscribed.iter().cloned()).collect()
                }
            };
            let mut fresh = Vec::new();
            for route in changed {
                match self.table.get(&route) {
                    Some(entry) if self.subscribed.insert(route.clone()) => fresh.push(Arc::clone(entry)),
                    Some(_) => {}
                    None if self.subscribed.remove(&route) => self.write(Outbound::Unsubscribe(route))?,
                    None => {}
                }
            }
            fresh.sort_unstable_by_key(|entry| entry.index);
            for entry in fresh {
                self.write(Outbound::Subscribe(entry.subscription()))?;
            }
        }
        Ok(())
    }

    fn write_finished(&mut self) -> Result<(), SessionError> {
        let mut batch = std::mem::take(&mut self.batch);
        let mut inner = self.shared.inner.lock();
        std::mem::swap(&mut batch, &mut inner.out);
        let failed = std::mem::take(&mut inner.retries);
        drop(inner);
        self.plan_retries(failed);
        // The streams that ended at an item that could not be written: what they have said since is not said.
        let mut ended = Vec::new();
        for owed in batch.drain(..) {
            match owed {
                Owed::Response(key, _) if ended.contains(&key) => {}
                Owed::Response(key, mut response) => {
                    let is_item = !response.body.is_final();
                    if !self.respond(&mut response)? && is_item {
                        ended.push(key);
                        self.stop_work(key);
                    }
                }
                Owed::Settle { delivery, settlement } => self.settle(delivery, settlement)?,
            }
        }
        // Its capacity serves the next round; an idle connection keeps none.
        self.batch = if batch.capacity() <= 4 * READ_BUDGET { batch } else { Vec::new() };
        Ok(())
    }

    /// Writes queued calls; `true` when it stopped for want of room.
    fn write_calls(&mut self) -> Result<bool, SessionError> {
        let Some(client) = &self.env.client else { return Ok(false) };
        let out = &mut self.outgoing;
        let room = |writer: &S::Writer| writer.pending_bytes() < self.env.limits.high_water_bytes;
        while room(&self.writer) {
            if !client.take_outbound(out) {
                return Ok(false);
            }
            for (id, route) in out.cancels.drain(..) {
                if let Err(WriteError::Session(error)) = self.writer.write(Outbound::Cancel { id, route }) {
                    client.put_back(&mut out.calls);
                    return Err(error);
                }
            }
            let mut ended = Ok(());
            while ended.is_ok()
                && room(&self.writer)
                && let Some(Queued { key, kind, live, message }) = out.calls.pop_front()
            {
                if !live {
                    continue;
                }
                let id = client.id(key);
                let taken = match kind {
                    CallKind::Event => self.writer.write_event(message, id).map(Some),
                    _ => self.writer.write_request(message, id).map(|()| None),
                };
                match taken {
                    Ok(Some(Taken::Written)) => out.written.push(key),
                    Ok(Some(Taken::Confirming)) => out.confirming.push((key, false)),
                    Ok(Some(Taken::Carried)) => out.confirming.push((key, true)),
                    Ok(None) => {}
                    Err(WriteError::Item(reason)) => client.refused(key, reason),
                    Err(WriteError::Session(error)) => {
                        client.lost(key, &error);
                        ended = Err(error);
                    }
                }
            }
            client.written(&mut out.written);
            client.confirming(&mut out.confirming);
            if !out.calls.is_empty() {
                client.put_back(&mut out.calls);
            }
            ended?;
        }
        client.stall();
        Ok(true)
    }

    /// Hands the replies that were read to their callers.
    fn send_replies(&mut self) {
        if let Some(client) = &self.env.client {
            client.on_responses(&mut self.replies);
            client.on_short_replies(&mut self.short_replies);
            client.confirmed(&mut self.confirmed);
        }
    }

    fn write(&mut self, item: Outbound<S::ReplyTo>) -> Result<(), SessionError> {
        self.unflushed += 1;
        let written = self.writer.write(item);
        self.written(written).map(|_| ())
    }

    fn settle(&mut self, delivery: S::ReplyTo, settlement: Settlement) -> Result<(), SessionError> {
        self.write(Outbound::Settle { delivery, settlement })
    }

    /// Writes a packet of a response. If it cannot be written, an error that says so is, in its place, and it is false.
    fn respond(&mut self, response: &mut Response<S::ReplyTo>) -> Result<bool, SessionError> {
        self.unflushed += 1;
        let says_error = matches!(response.body, ResponseBody::NoHandler);
        let written = self.writer.write_response(response);
        if self.written(written)? {
            return Ok(true);
        }
        if says_error {
            return Ok(false);
        }
        // What to say instead.
        let error = crate::error::RpcError::unexpected("the reply could not be written");
        response.body = ResponseBody::Error(error.to_payload(self.env.transport.format));
        response.headers = None;
        match self.writer.write_response(response) {
            Err(WriteError::Session(error)) => Err(error),
            _ => Ok(false),
        }
    }

    /// Whether the writer took it; if not, that is reported.
    fn written(&self, written: Result<(), WriteError>) -> Result<bool, SessionError> {
        match written {
            Ok(()) => Ok(true),
            Err(WriteError::Session(error)) => Err(error),
            Err(WriteError::Item(reason)) => {
                self.report_bad(format!("a packet could not be written: {reason}"));
                Ok(false)
            }
        }
    }

    /// Whether too much is unwritten.
    fn is_full(&self) -> bool {
        self.writer.pending_bytes() >= self.env.limits.high_water_bytes
    }

    fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, SessionError> {
        self.unflushed = 0;
        let flushed = self.writer.poll_flush(cx)?.is_ready();
        let congested = self.is_full();
        if congested && !std::mem::replace(&mut self.reported_congested, true) {
            self.env.events.emit(ServiceEvent::BoundHit {
                place: Arc::clone(&self.peer),
                bound: "high_water_bytes",
                limit: self.env.limits.high_water_bytes as u64,
                action: "reading pauses, streams and calls wait until the peer has read",
            });
        }
        let mut inner = self.shared.inner.lock();
        inner.congested = congested;
        if !congested && !inner.waiting.is_empty() {
            let waiting = std::mem::take(&mut inner.waiting);
            drop(inner);
            waiting.into_iter().for_each(Waker::wake);
        }
        Ok(flushed)
    }

    /// Reads what there is, within bounds; ready when the reader has ended.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, SessionError> {
        let read = self.read_some(cx);
        self.send_replies();
        self.send_invokes();
        read
    }

    fn in_flight(&self) -> u64 {
        self.env.control.in_flight()
    }

    fn read_some(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, SessionError> {
        for _ in 0..READ_BUDGET {
            if self.is_full() {
                return Ok(Poll::Pending);
            }
            if self.env.server.is_some() && self.in_flight() >= self.env.limits.max_in_flight as u64 {
                if !std::mem::replace(&mut self.reported_full, true) {
                    self.env.events.emit(ServiceEvent::BoundHit {
                        place: Arc::clone(&self.peer),
                        bound: "max_in_flight",
                        limit: self.env.limits.max_in_flight as u64,
                        action: "reading pauses until requests finish",
                    });
                }
                return Ok(Poll::Pending);
            }
            let packet = match (&mut self.next, &self.scope) {
                (Some(next), _) => &mut next.0.packet,
                (next, Some(scope)) => &mut next.insert(Request::empty(scope)).0.packet,
                (None, None) => &mut self.stray,
            };
            match self.reader.poll_next(cx, packet) {
                Poll::Pending => return Ok(Poll::Pending),
                // Most of what arrives.
                Poll::Ready(Some(Ok(Inbound::Request(delivery)))) => {
                    self.dispatch(MessageKind::Request, delivery)?;
                }
                Poll::Ready(Some(item)) => self.take(cx, item?)?,
                Poll::Ready(None) => {
                    self.reading = false;
                    self.send_replies();
                    if self.env.client.as_ref().is_some_and(|client| !client.is_idle() || !self.draining) {
                        return Err(SessionError::lost("the peer closed the connection"));
                    }
                    return Ok(Poll::Ready(()));
                }
            }
        }
        cx.waker().wake_by_ref();
        Ok(Poll::Pending)
    }

    fn take(&mut self, cx: &mut Context<'_>, item: Inbound<S::ReplyTo>) -> Result<(), SessionError> {
        match item {
            Inbound::Request(delivery) => self.dispatch(MessageKind::Request, delivery),
            Inbound::Event(delivery) => self.dispatch(MessageKind::Event, delivery),
            Inbound::Response(packet) => {
                // A call's packets are handed over in the order in which they came.
                if !self.short_replies.is_empty() {
                    self.send_replies();
                }
                self.replies.push(*packet);
                Ok(())
            }
            Inbound::Reply(reply) => {
                if !self.replies.is_empty() {
                    self.send_replies();
                }
                self.short_replies.push(reply);
                let room = READ_BUDGET.saturating_sub(self.short_replies.len());
                self.reader.take_replies(cx, &mut self.short_replies, room);
                Ok(())
            }
            Inbound::Unreachable { id } => {
                self.send_replies();
                if let Some(client) = &self.env.client {
                    client.on_unreachable(id);
                }
                Ok(())
            }
            Inbound::Confirmed { receipt, refused } => {
                self.confirmed.push((receipt, refused));
                Ok(())
            }
            Inbound::Cancel { id } => {
                self.cancel(&id);
                Ok(())
            }
            Inbound::Bad { reason } => {
                self.report_bad(reason);
                Ok(())
            }
        }
    }

    fn report_bad(&self, reason: String) {
        self.env.events.emit(ServiceEvent::BadInput {
            transport: Arc::clone(&self.env.transport.name),
            peer: Some(Arc::clone(&self.peer)),
            reason,
        });
    }

    fn cancel(&mut self, id: &Raw) {
        // It may have been read in this very turn.
        self.send_invokes();
        let mut inner = self.shared.inner.lock();
        // Events have no id.
        let asked = |slot: &Slot<S::ReplyTo>| slot.kind == MessageKind::Request && !slot.cancelled;
        let found = inner.slots.values_mut().find(|slot| asked(slot) && slot.id == *id);
        let work = found.and_then(Slot::cancel);
        drop(inner);
        if let Some(work) = work {
            work.cancel();
        }
    }

    /// Stops the handler of a request whose response has ended without it.
    fn stop_work(&self, key: RequestKey) {
        let work = self.shared.inner.lock().slot(key).and_then(Slot::cancel);
        if let Some(work) = work {
            work.cancel();
        }
    }

    fn refresh_table(&mut self) {
        if self.table_changed.is_none()
            && let Some(server) = &mut self.env.server
            && server.tables.has_changed().unwrap_or(false)
        {
            let table = Arc::clone(&server.tables.borrow_and_update());
            self.replace_table(table);
        }
    }

    /// Works with a new table; requests in flight keep the names of their routes.
    fn replace_table(&mut self, table: Arc<RouteTable>) {
        // Its routes are places of the old table.
        self.send_invokes();
        (self.next, self.last) = (None, None);
        for slot in self.shared.inner.lock().slots.values_mut() {
            if let SlotRoute::At(index) = slot.route {
                slot.route = SlotRoute::Named(self.table.route_at(index).cloned());
            }
        }
        if let Some(scope) = &self.scope {
            self.scope = Some(Arc::new(Scope {
                server: Arc::clone(&scope.server),
                context: scope.context.clone(),
                sink: Arc::clone(&self.sink),
                table: Arc::clone(&table),
            }));
        }
        self.table = table;
    }

    fn dispatch(&mut self, kind: MessageKind, delivery: Delivery<S::ReplyTo>) -> Result<(), SessionError> {
        let Some(mut request) = self.next.take() else {
            let packet = std::mem::take(&mut self.stray);
            return self.unhandled(kind, delivery, packet);
        };
        self.refresh_table();
        let entry = match &delivery.key {
            PatternKey::Packet => {
                let pattern = request.0.packet.pattern.as_deref().unwrap_or_default();
                self.table.find(self.env.transport.format, pattern)
            }
            PatternKey::Route(route) => {
                if !self.last.as_ref().is_some_and(|last| last.route.is_the_same(route)) {
                    self.last = self.table.get(route).cloned();
                }
                self.last.as_ref()
            }
        };
        let (Some(entry), Some(scope)) = (entry, &self.scope) else {
            return self.unhandled(kind, delivery, request.0.packet);
        };
        let chain: &[Arc<HandlerRef>] = match (kind, &entry.message, entry.events.as_slice()) {
            (MessageKind::Request, Some(message), _) | (_, Some(message), []) => {
                std::slice::from_ref(message)
            }
            (_, _, events) => events,
        };
        if let [only] = chain
            && !self.turn.aims_at(only)
        {
            self.turn.send(&self.shared, &self.env, Some(scope));
            if !self.turn.aim(only) {
                // Unrouted meanwhile.
                return self.unhandled(kind, delivery, request.0.packet);
            }
        }
        let route = entry.index;
        let parts = &mut *request.0;
        if !Arc::ptr_eq(&parts.scope, scope) {
            parts.scope = Arc::clone(scope);
        }
        parts.route = route;
        parts.kind = kind;
        parts.by_address = matches!(delivery.key, PatternKey::Route(_));
        parts.deadline = parts.packet.metadata.as_ref().and_then(deadline_of);
        parts.context = delivery.context;
        let id = parts.packet.id.take().unwrap_or_default();
        let reply_to = delivery.reply_to;
        if let ([only], Some(replica), false) = (chain, self.turn.here(), self.shared.settles) {
            // The usual case, in which a request that is done at once needs no slot, and its answer nothing but its id.
            let (replica, endpoint) = (Rc::clone(replica), only.endpoint);
            let key = self.shared.begin_call();
            request.0.slot = key;
            let mut response = Response { reply_to, id, body: NOTHING, headers: None };
            match replica.begin(endpoint, request, &mut response.body) {
                Begun::Answered => {}
                Begun::Ended(End { body, headers, .. }) => {
                    (response.body, response.headers) = (body, headers);
                }
                Begun::GoesOn(rest) => {
                    let slot = Slot::new(kind, response.reply_to, response.id, route, 1);
                    self.admit(&replica, endpoint, rest, key, slot);
                    return Ok(());
                }
            }
            self.done_in_place();
            return match kind {
                MessageKind::Event => Ok(()),
                MessageKind::Request => self.respond(&mut response).map(drop),
            };
        }
        let handlers = if kind == MessageKind::Request { 1 } else { chain.len() as u32 };
        let mut slot = Slot::new(kind, reply_to, id, route, handlers);
        if self.shared.settles {
            let policy = chain.iter().find_map(|handler| handler.info.on_failure);
            if let Some(policy) = policy.or(self.env.limits.on_failure) {
                let retrial = match &policy {
                    FailurePolicy::Retry(policy) => {
                        Some(Box::new(Retrial::new(policy, request.clone(), chain.to_vec())))
                    }
                    _ => None,
                };
                slot.on_failure(policy.last_resort(), retrial);
            }
        }
        match chain {
            [only] => {
                if let Some(replica) = self.turn.here() {
                    let (replica, endpoint) = (Rc::clone(replica), only.endpoint);
                    return self.call_and_settle(&replica, endpoint, request, slot);
                }
                self.env.control.admitted.add(1);
                self.turn.push(only, request, slot);
            }
            chain => {
                self.env.control.admitted.add(1);
                let chain = chain.to_vec();
                let key = self.shared.next_key();
                self.shared.inner.lock().slots.insert(key, slot);
                request.0.slot = key;
                self.invoke_all(&chain, key, request);
            }
        }
        Ok(())
    }

    /// Calls a handler on this arbiter, and settles the delivery if it is done at once.
    fn call_and_settle(
        &mut self,
        replica: &Rc<Replica>,
        endpoint: u32,
        mut request: Request,
        mut slot: Slot<S::ReplyTo>,
    ) -> Result<(), SessionError> {
        let key = self.shared.begin_call();
        request.0.slot = key;
        let mut body = NOTHING;
        let end = match replica.begin(endpoint, request, &mut body).ended(&mut body) {
            Ok(end) => end,
            Err(rest) => {
                self.admit(replica, endpoint, rest, key, slot);
                return Ok(());
            }
        };
        slot.ended(0, end.failed);
        if slot.wants_retry() {
            self.env.control.admitted.add(1);
            self.shared.admit_called(key, slot);
            self.plan_retries(vec![key]);
            // The pause is waited for from the next turn on.
            self.env.control.wake();
            return Ok(());
        }
        self.done_in_place();
        let LastWords { response, settle } = slot.close(end, true, false);
        // The answer, then the acknowledgement.
        if let Some(mut response) = response {
            self.respond(&mut response)?;
        }
        settle.map_or(Ok(()), |(delivery, settlement)| self.settle(delivery, settlement))
    }

    /// Counts a request that needed no slot.
    fn done_in_place(&self) {
        self.shared.end_call();
        self.env.control.done_in_place.add(1);
    }

    /// Gives a request that was called in place and is not done its slot.
    fn admit(
        &mut self,
        replica: &Rc<Replica>,
        endpoint: u32,
        rest: Rest,
        key: RequestKey,
        slot: Slot<S::ReplyTo>,
    ) {
        self.env.control.admitted.add(1);
        self.shared.admit_called(key, slot);
        let responder = Responder::new(Arc::clone(&self.sink), key, self.env.transport.format);
        replica.go_on_with(endpoint, rest, responder);
    }

    /// Hands a request that has its slot to each of several handlers.
    fn invoke_all(&mut self, chain: &[Arc<HandlerRef>], slot: RequestKey, request: Request) {
        let format = self.env.transport.format;
        let responder = || Responder::new(Arc::clone(&self.sink), slot, format);
        let responders: Vec<Responder> = if request.kind() == MessageKind::Request && chain.len() > 1 {
            let gather = ChainSink::new(chain.len(), responder());
            (0..chain.len()).map(|member| gather.responder(member as u32)).collect()
        } else {
            (0..chain.len()).map(|member| responder().of_member(member as u32)).collect()
        };
        for (handler, responder) in chain.iter().zip(responders) {
            self.invoke(handler, request.clone(), responder);
        }
    }

    /// Calls a handler on this arbiter, or adds the request to what goes to its replica on another one.
    fn invoke(&mut self, handler: &Arc<HandlerRef>, request: Request, responder: Responder) {
        if !self.turn.aims_at(handler) {
            self.send_invokes();
            if !self.turn.aim(handler) {
                // Unrouted meanwhile; the responder says so.
                return drop(responder);
            }
        }
        match self.turn.here() {
            Some(replica) => replica.call(handler.endpoint, request, responder),
            None => self.turn.push_with(handler, request, responder),
        }
    }

    fn send_invokes(&mut self) {
        self.turn.send(&self.shared, &self.env, self.scope.as_ref());
    }

    /// Plans when what failed is tried again.
    fn plan_retries(&mut self, failed: Vec<RequestKey>) {
        for key in failed {
            let mut inner = self.shared.inner.lock();
            let Some(retrial) = inner.slot(key).and_then(|slot| slot.retrial.as_mut()) else { continue };
            let pause = retrial.pause();
            let event = ServiceEvent::Retry {
                transport: Arc::clone(&self.env.transport.name),
                route: retrial.request.0.place().route.clone(),
                attempt: retrial.attempts,
                pause,
            };
            drop(inner);
            self.env.events.emit(event);
            self.retries.push(Instant::now() + pause, key);
        }
    }

    /// Tries what is due.
    fn retry(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        if self.retries.is_empty() {
            return Ok(());
        }
        if self.draining {
            // Another consumer takes it from here.
            let waiting: Vec<RequestKey> = self.retries.drain().collect();
            return self.hand_back(waiting);
        }
        for turn in 0.. {
            if turn == READ_BUDGET {
                // Handlers run here: others want their turn, too.
                cx.waker().wake_by_ref();
                break;
            }
            let Poll::Ready(key) = self.retries.poll_due(cx) else { break };
            let Some(Attempt { request, handlers, members }) = self.shared.try_again(key) else { continue };
            match request.kind() {
                // Several event handlers that are asked answer as one.
                MessageKind::Request => self.invoke_all(&handlers, key, request),
                MessageKind::Event => {
                    for member in members {
                        let Some(handler) = handlers.get(member as usize) else { continue };
                        let responder =
                            Responder::new(Arc::clone(&self.sink), key, self.env.transport.format);
                        let responder = responder.of_member(member);
                        self.invoke(handler, request.clone(), responder);
                    }
                }
            }
        }
        self.send_invokes();
        Ok(())
    }

    fn unhandled(
        &mut self,
        kind: MessageKind,
        delivery: Delivery<S::ReplyTo>,
        packet: IncomingPacket,
    ) -> Result<(), SessionError> {
        let transport = Arc::clone(&self.env.transport.name);
        let pattern = match (&delivery.key, packet.pattern.as_deref().unwrap_or_default()) {
            (PatternKey::Route(route), _) => route.to_string(),
            (PatternKey::Packet, []) => "undefined".to_owned(),
            (PatternKey::Packet, raw) => String::from_utf8_lossy(raw.get(..256).unwrap_or(raw)).into_owned(),
        };
        match (kind, packet.id) {
            (MessageKind::Request, Some(id)) => {
                self.env.events.emit(ServiceEvent::NoMessageHandler { transport, pattern });
                let reply_to = delivery.reply_to.clone();
                let body = ResponseBody::NoHandler;
                self.respond(&mut Response { reply_to, id, body, headers: None })?;
            }
            _ => self.env.events.emit(ServiceEvent::NoEventHandler { transport, pattern }),
        }
        if self.env.transport.settles.is_needed() {
            self.settle(delivery.reply_to, Settlement::Unhandled)?;
        }
        Ok(())
    }
}

/// The deadline that a caller's metadata carries.
fn deadline_of(metadata: &crate::payload::Payload) -> Option<Instant> {
    if metadata.format() == Format::Json
        && memchr::memmem::find(metadata.bytes(), TIMEOUT_KEY.as_bytes()).is_none()
    {
        return None;
    }
    let metadata: crate::packet::Metadata = metadata.decode().ok()?;
    let millis: u64 = metadata.get(TIMEOUT_KEY)?.parse().ok()?;
    Instant::now().checked_add(Duration::from_millis(millis))
}
