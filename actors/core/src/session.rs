// SPDX-License-Identifier: MIT OR Apache-2.0
//! The session task: the data plane of one live conversation, the same for every transporter.
//!
//! One task on one arbiter reads, admits, dispatches and writes. It prefers, in order: write what is
//! finished, take route changes, send queued calls, read new work. Every request takes a slot (its
//! in-flight credit); with no slot left, or with too much unwritten, reading pauses.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use actix::prelude::SendError;
use bytes::Bytes;
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::correlation::ClientCore;
use crate::error::SessionError;
use crate::events::{EventBus, ServiceEvent};
use crate::handler::{Invoke, overloaded};
use crate::headers::Headers;
use crate::packet::ResponseBody;
use crate::pattern::Route;
use crate::payload::Format;
use crate::request::{MessageKind, Request, Scope, TIMEOUT_KEY};
use crate::responder::{Cancellation, ChainSink, Gone, ReplySink, Responder, SlotKey};
use crate::route::{HandlerRef, RouteTable};
use crate::transport::{
    Delivery, Inbound, Outbound, PatternKey, Session, SessionReader, SessionWriter, Settlement,
    TransportInfo, WriteError,
};

/// Bounds of one session.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub(crate) struct SessionLimits {
    /// Requests and events in flight; at the limit the session stops reading. Default 1024.
    pub max_in_flight: usize,
    /// Bytes taken for writing and not yet on the wire; above it the session stops reading new work, and
    /// streams wait. Default 256 KiB.
    pub high_water_bytes: usize,
    /// How long to wait for the peer to close after everything was written. Default 1 s.
    pub linger: Duration,
    /// How long the requests of a peer that has closed its side may still take; NestJS drops them at once.
    /// Default 1 s: a NestJS client that closes waits for the other side to close, too.
    pub half_close: Duration,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            max_in_flight: 1024,
            high_water_bytes: 256 * 1024,
            linger: Duration::from_secs(1),
            half_close: Duration::from_secs(1),
        }
    }
}

/// How many arrivals one turn of a session takes before it lets others run.
const READ_BUDGET: usize = 256;

/// How many packets may wait in the out-queue before streams wait.
const MAX_QUEUED_PACKETS: usize = 1024;

/// The handle by which a session's owner steers it, and by which whoever has something for it wakes it.
#[derive(Debug, Default)]
pub(crate) struct SessionControl {
    waker: AtomicWaker,
    drain: AtomicBool,
    abandon: AtomicBool,
    answered: AtomicU64,
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
    /// How long it lived.
    pub(crate) lived: Duration,
}

/// What a session needs to serve.
#[derive(Clone)]
pub(crate) struct ServerEnv {
    pub(crate) scope: Arc<Scope>,
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

// === what a session shares with the responders of its requests ===

struct Shared<R> {
    control: Arc<SessionControl>,
    settles: bool,
    inner: Mutex<Inner<R>>,
}

struct Inner<R> {
    slots: Slab<Slot<R>>,
    generation: u32,
    out: Vec<Outbound<R>>,
    congested: bool,
    waiting: Vec<Waker>,
    closed: bool,
}

struct Slot<R> {
    generation: u32,
    kind: MessageKind,
    reply_to: R,
    id: Bytes,
    route: Route,
    /// Handlers that have not ended; more than one for a chain of event handlers.
    remaining: u32,
    failed: bool,
    cancelled: bool,
    tasks: Vec<AbortHandle>,
    cancellation: Option<Cancellation>,
}

impl<R: Clone + Send + 'static> Shared<R> {
    fn admit(&self, kind: MessageKind, reply_to: R, id: Bytes, route: Route, handlers: u32) -> SlotKey {
        let mut inner = self.inner.lock();
        inner.generation = inner.generation.wrapping_add(1);
        let generation = inner.generation;
        let index = inner.slots.insert(Slot {
            generation,
            kind,
            reply_to,
            id,
            route,
            remaining: handlers,
            failed: false,
            cancelled: false,
            tasks: Vec::new(),
            cancellation: None,
        });
        SlotKey { index: index as u32, generation }
    }

    fn in_flight(&self) -> usize {
        self.inner.lock().slots.len()
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
            let settle = (self.settles && !closed).then(|| Outbound::Settle {
                delivery: slot.reply_to.clone(),
                settlement: if slot.failed { Settlement::Failed } else { Settlement::Done },
            });
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

// === the task ===

struct Loop<S: Session> {
    reader: S::Reader,
    writer: S::Writer,
    peer: Arc<str>,
    env: SessionEnv,
    shared: Arc<Shared<S::ReplyTo>>,
    /// The same, as the responders see it.
    sink: Arc<dyn ReplySink>,
    table: Arc<RouteTable>,
    subscribed: HashSet<Route>,
    table_changed: Option<Pin<Box<dyn Future<Output = watch::Receiver<Arc<RouteTable>>>>>>,
    reading: bool,
    draining: bool,
    /// Runs once the peer has closed its side.
    half_closed: Option<Pin<Box<tokio::time::Sleep>>>,
    reported_full: bool,
    handed_back: u64,
    batch: Vec<Outbound<S::ReplyTo>>,
}

/// Runs a session to its end.
///
/// Cancel safe in the sense that dropping it closes the connection and gives every request in flight its
/// end (as abandoned); use [`SessionControl`] to end it in order.
pub(crate) async fn run_session<S: Session>(session: S, env: SessionEnv) -> SessionExit {
    let started = Instant::now();
    let peer = session.peer();
    let (reader, writer) = session.split();
    let shared = Arc::new(Shared {
        control: Arc::clone(&env.control),
        settles: env.transport.settles,
        inner: Mutex::new(Inner {
            slots: Slab::new(),
            generation: 0,
            out: Vec::new(),
            congested: false,
            waiting: Vec::new(),
            closed: false,
        }),
    });
    let table = env.server.as_ref().map(|server| Arc::clone(&server.tables.borrow())).unwrap_or_default();
    let subscribed = env.server.as_ref().map(|server| server.subscribed.clone()).unwrap_or_default();
    let table_changed = match &env.server {
        Some(server) if env.transport.subscribes => Some(watch_tables(server.tables.clone())),
        _ => None,
    };
    let mut session = Loop::<S> {
        reader,
        writer,
        peer,
        sink: Arc::clone(&shared) as Arc<dyn ReplySink>,
        shared,
        table,
        subscribed,
        table_changed,
        reading: true,
        draining: false,
        half_closed: None,
        reported_full: false,
        handed_back: 0,
        batch: Vec::new(),
        env,
    };
    // A guard, so that a dropped task ends its requests, too.
    let guard = CloseGuard(Arc::clone(&session.shared), session.env.client.clone());
    let cause = std::future::poll_fn(|cx| session.poll(cx)).await.err();
    let why = match &cause {
        Some(error) => format!("the connection was lost: {error}"),
        None => "the grace period ended".to_owned(),
    };
    let abandoned = guard.0.close(&session.env.transport, &why);
    if let Some(client) = &session.env.client {
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
        answered: session.env.control.answered.load(Ordering::Relaxed),
        handed_back: session.handed_back,
        abandoned,
        lived: started.elapsed(),
    }
}

struct CloseGuard<R: Clone + Send + 'static>(Arc<Shared<R>>, Option<Arc<ClientCore>>);

impl<R: Clone + Send + 'static> Drop for CloseGuard<R> {
    fn drop(&mut self) {
        let info = TransportInfo::new(crate::transport::TransportId::custom(u16::MAX), "");
        self.0.close(&info, "the session was dropped");
        if let Some(client) = &self.1 {
            client.session_ended(&SessionError::lost("the session was dropped"));
        }
    }
}

impl<R: Clone + Send + 'static> Shared<R> {
    /// No reply can leave any more: tells everyone who works for this session.
    fn close(&self, transport: &TransportInfo, why: &str) -> Vec<Abandoned> {
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
            if !slot.cancelled {
                abandoned.push(Abandoned {
                    transport: transport.name.to_string(),
                    route: slot.route.to_string(),
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

fn watch_tables(
    mut tables: watch::Receiver<Arc<RouteTable>>,
) -> Pin<Box<dyn Future<Output = watch::Receiver<Arc<RouteTable>>>>> {
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
        self.take_route_changes(cx)?;
        self.write_finished()?;
        self.write_calls()?;
        let flushed = self.flush(cx)?;
        if self.reading && self.read(cx)?.is_ready() && !self.draining {
            // The peer closed its side: nothing can be asked any more, what was asked is answered, unless it
            // has no end.
            self.draining = true;
            self.half_closed = Some(Box::pin(tokio::time::sleep(self.env.limits.half_close)));
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
        if abandon && self.env.transport.settles {
            self.hand_back()?;
        }
        let idle = self.shared.in_flight() == 0 && calls_done;
        if (idle || abandon) && self.shared.inner.lock().out.is_empty() && (flushed || abandon) {
            return self.writer.poll_close(cx);
        }
        if self.half_closed.as_mut().is_some_and(|limit| limit.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Err(SessionError::lost("the peer closed its side")));
        }
        Poll::Pending
    }

    /// Gives unfinished deliveries back to the broker, so that another consumer takes them.
    fn hand_back(&mut self) -> Result<(), SessionError> {
        let slots: Vec<_> = self.shared.inner.lock().slots.drain().collect();
        for slot in slots {
            slot.tasks.iter().for_each(AbortHandle::abort);
            if let Some(cancellation) = slot.cancellation {
                cancellation.cancel();
            }
            self.handed_back += 1;
            let settlement = Settlement::HandedBack;
            self.write(Outbound::Settle { delivery: slot.reply_to, settlement })?;
        }
        Ok(())
    }

    fn take_route_changes(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        while let Some(changed) = &mut self.table_changed {
            let Poll::Ready(mut tables) = changed.as_mut().poll(cx) else { return Ok(()) };
            self.table = Arc::clone(&tables.borrow_and_update());
            self.table_changed = Some(watch_tables(tables));
            if self.draining {
                continue;
            }
            let wanted: HashSet<Route> = self.table.iter().map(|entry| entry.route.clone()).collect();
            let gone: Vec<_> = self.subscribed.difference(&wanted).cloned().collect();
            for route in gone {
                self.write(Outbound::Unsubscribe(route))?;
            }
            let fresh: Vec<_> = self
                .table
                .iter()
                .filter(|entry| !self.subscribed.contains(&entry.route))
                .map(|entry| entry.subscription())
                .collect();
            for subscription in fresh {
                self.write(Outbound::Subscribe(subscription))?;
            }
            self.subscribed = wanted;
        }
        Ok(())
    }

    fn write_finished(&mut self) -> Result<(), SessionError> {
        let mut batch = std::mem::take(&mut self.batch);
        std::mem::swap(&mut batch, &mut self.shared.inner.lock().out);
        for item in batch.drain(..) {
            self.write(item)?;
        }
        // Its capacity serves the next round; an idle connection keeps none.
        self.batch = if batch.capacity() <= 4 * READ_BUDGET { batch } else { Vec::new() };
        Ok(())
    }

    fn write_calls(&mut self) -> Result<(), SessionError> {
        let Some(client) = &self.env.client else { return Ok(()) };
        let client = Arc::clone(client);
        while self.writer.pending_bytes() < self.env.limits.high_water_bytes {
            let Some((key, item)) = client.next_outbound() else { break };
            match self.writer.write(item) {
                Ok(()) => client.written(key),
                Err(WriteError::Item(reason)) => client.refused(key, reason),
                Err(WriteError::Session(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&mut self, item: Outbound<S::ReplyTo>) -> Result<(), SessionError> {
        // What to say instead when this item cannot be said.
        let instead = match &item {
            Outbound::Response { reply_to, id, body, .. } if !matches!(body, ResponseBody::NoHandler) => {
                Some((reply_to.clone(), id.clone()))
            }
            _ => None,
        };
        match self.writer.write(item) {
            Ok(()) => Ok(()),
            Err(WriteError::Session(error)) => Err(error),
            Err(WriteError::Item(reason)) => {
                self.report_bad(format!("a packet could not be written: {reason}"));
                let Some((reply_to, id)) = instead else { return Ok(()) };
                let error = crate::error::RpcError::unexpected("the reply could not be written");
                let body = ResponseBody::Error(error.to_payload(self.env.transport.format));
                match self.writer.write(Outbound::Response { reply_to, id, body, headers: None }) {
                    Err(WriteError::Session(error)) => Err(error),
                    _ => Ok(()),
                }
            }
        }
    }

    fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, SessionError> {
        let flushed = self.writer.poll_flush(cx)?.is_ready();
        let congested = self.writer.pending_bytes() >= self.env.limits.high_water_bytes;
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
        for _ in 0..READ_BUDGET {
            if self.writer.pending_bytes() >= self.env.limits.high_water_bytes {
                return Ok(Poll::Pending);
            }
            if self.env.server.is_some() && self.shared.in_flight() >= self.env.limits.max_in_flight {
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
            match self.reader.poll_next(cx) {
                Poll::Pending => {
                    // The calls that arrived may have been answered in place.
                    return Ok(Poll::Pending);
                }
                Poll::Ready(Some(item)) => self.take(item?)?,
                Poll::Ready(None) => {
                    self.reading = false;
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

    fn take(&mut self, item: Inbound<S::ReplyTo>) -> Result<(), SessionError> {
        match item {
            Inbound::Request(delivery) => self.dispatch(MessageKind::Request, delivery),
            Inbound::Event(delivery) => self.dispatch(MessageKind::Event, delivery),
            Inbound::Response(packet) => {
                if let Some(client) = &self.env.client {
                    client.on_response(packet);
                }
                Ok(())
            }
            Inbound::Unreachable { id } => {
                if let Some(client) = &self.env.client {
                    client.on_unreachable(id);
                }
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

    fn cancel(&mut self, id: &Bytes) {
        let mut inner = self.shared.inner.lock();
        let found = inner.slots.iter_mut().find(|(_, slot)| slot.id == *id && !slot.cancelled);
        let Some((_, slot)) = found else { return };
        slot.cancelled = true;
        let tasks = std::mem::take(&mut slot.tasks);
        let cancellation = slot.cancellation.clone();
        drop(inner);
        // Aborting drops the handler's future, and with it its responder, which frees the slot.
        tasks.iter().for_each(AbortHandle::abort);
        if let Some(cancellation) = cancellation {
            cancellation.cancel();
        }
    }

    fn refresh_table(&mut self) {
        if self.table_changed.is_none()
            && let Some(server) = &mut self.env.server
            && server.tables.has_changed().unwrap_or(false)
        {
            self.table = Arc::clone(&server.tables.borrow_and_update());
        }
    }

    fn dispatch(&mut self, kind: MessageKind, delivery: Delivery<S::ReplyTo>) -> Result<(), SessionError> {
        self.refresh_table();
        let Some(server) = &self.env.server else { return Ok(()) };
        let entry = match &delivery.key {
            PatternKey::Raw(raw) => self.table.find(self.env.transport.format, raw),
            PatternKey::Route(route) => self.table.get(route),
        };
        let Some(entry) = entry else {
            return self.unhandled(kind, delivery);
        };
        let deadline = delivery.metadata.as_ref().and_then(deadline_of);
        let chain: &[Arc<HandlerRef>] = match (kind, &entry.message, entry.events.as_slice()) {
            (MessageKind::Request, Some(message), _) | (_, Some(message), []) => {
                std::slice::from_ref(message)
            }
            (_, _, events) => events,
        };
        let request = |slot: SlotKey, sink: &Arc<dyn ReplySink>, delivery: &Parts| Request {
            scope: Arc::clone(&server.scope),
            entry: Arc::clone(entry),
            kind,
            raw_pattern: delivery.pattern.clone(),
            data: delivery.data.clone(),
            metadata: delivery.metadata.clone(),
            context: Arc::clone(&delivery.context),
            deadline,
            sink: Arc::clone(sink),
            slot,
            extensions: None,
        };
        let Delivery { key, data, metadata, id, reply_to, context } = delivery;
        let pattern = match key {
            PatternKey::Raw(raw) => Some(raw),
            PatternKey::Route(_) => None,
        };
        let parts = Parts { pattern, data, metadata, context };
        let id = id.unwrap_or_default();
        let format = self.env.transport.format;
        let handlers = if kind == MessageKind::Request { 1 } else { chain.len() as u32 };
        let slot = self.shared.admit(kind, reply_to, id, entry.route.clone(), handlers);
        let sink = &self.sink;
        match chain {
            [only] => {
                let responder = Responder::new(Arc::clone(sink), slot, format);
                self.invoke(only, server.arbiter, request(slot, sink, &parts), responder);
            }
            chain if kind == MessageKind::Request => {
                let gather = ChainSink::new(chain.len(), Responder::new(Arc::clone(sink), slot, format));
                for (index, handler) in chain.iter().enumerate() {
                    let responder = gather.responder(index as u32);
                    self.invoke(handler, server.arbiter, request(slot, sink, &parts), responder);
                }
            }
            chain => {
                for handler in chain {
                    let responder = Responder::new(Arc::clone(sink), slot, format);
                    self.invoke(handler, server.arbiter, request(slot, sink, &parts), responder);
                }
            }
        }
        Ok(())
    }

    fn invoke(&self, handler: &HandlerRef, arbiter: usize, request: Request, responder: Responder) {
        let Some(replica) = handler.replica(arbiter) else { return };
        match replica.try_send(Invoke { endpoint: handler.endpoint, request, responder }) {
            Ok(()) => {}
            Err(SendError::Full(invoke)) => {
                self.env.events.emit(ServiceEvent::BoundHit {
                    place: Arc::clone(&handler.info.name),
                    bound: "mailbox_capacity",
                    limit: 0,
                    action: "the request was answered with an overload error",
                });
                invoke.responder.fail(&overloaded());
            }
            // Unrouted meanwhile; the responder says so by being dropped.
            Err(SendError::Closed(invoke)) => drop(invoke),
        }
    }

    fn unhandled(&mut self, kind: MessageKind, delivery: Delivery<S::ReplyTo>) -> Result<(), SessionError> {
        let transport = Arc::clone(&self.env.transport.name);
        let pattern = match &delivery.key {
            PatternKey::Raw(raw) if raw.is_empty() => "undefined".to_owned(),
            PatternKey::Raw(raw) => String::from_utf8_lossy(raw.get(..256).unwrap_or(raw)).into_owned(),
            PatternKey::Route(route) => route.to_string(),
        };
        match (kind, delivery.id) {
            (MessageKind::Request, Some(id)) => {
                self.env.events.emit(ServiceEvent::NoMessageHandler { transport, pattern });
                let reply_to = delivery.reply_to.clone();
                self.write(Outbound::Response {
                    reply_to,
                    id,
                    body: ResponseBody::NoHandler,
                    headers: None,
                })?;
                // Written in this turn, not at the next arrival.
                self.env.control.wake();
            }
            _ => self.env.events.emit(ServiceEvent::NoEventHandler { transport, pattern }),
        }
        if self.env.transport.settles {
            self.write(Outbound::Settle { delivery: delivery.reply_to, settlement: Settlement::Unhandled })?;
        }
        Ok(())
    }
}

/// The parts of a delivery that a request is made of.
struct Parts {
    pattern: Option<Bytes>,
    data: Option<crate::payload::Payload>,
    metadata: Option<crate::payload::Payload>,
    context: crate::transport::ContextData,
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
