// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client proxy: how applications call other services.
//!
//! ```text
//! ClientProxy (handle, any thread) ──┐
//! Call, ReplyStream (futures) ───────┼── ClientCore: the correlation map
//! ClientActor (address, lifecycle) ──┘        │ lent to
//!    └─ driver task: dial, backoff ── session task
//! ```
//!
//! The actor starts at the first use, on the arbiter of that use, and is started anew should that arbiter
//! stop. Each call's future shares the map directly: a call costs no mailbox hop.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use actix::{Actor, ActorContext, Addr, AsyncContext, Context, Handler, Message, ResponseFuture};
use futures::{FutureExt, Stream, StreamExt};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::backoff::{Backoff, BackoffOptions};
use crate::calls::CallKey;
use crate::correlation::{CallKind, ClientCore, CorrelationLimits, NewCall, Next};
use crate::error::{CallError, RemoteError, SessionError, SessionErrorKind, StartError};
use crate::events::{EventBus, ServiceEvent};
use crate::headers::Headers;
use crate::packet::Metadata;
use crate::pattern::Pattern;
use crate::payload::{EncodeError, Format, Payload};
use crate::reply::IntoRecord;
use crate::request::{TRACEPARENT_KEY, TRACESTATE_KEY};
use crate::responder::Cancellation;
use crate::session::{SessionControl, SessionEnv, SessionExit, SessionLimits, run_session};
use crate::status::{ConnectionStatus, StatusCell};
use crate::supervise::{Child, panic_text};
use crate::trace::{Ambient, TraceContext};
use crate::transport::{ContextData, Dial, OutboundMessage, Role, Session, SessionPlan, TransportInfo};

/// The largest number of calls that can be pending on one client.
pub const MAX_PENDING_LIMIT: usize = 0x00ff_ffff;

type MapError = Arc<dyn Fn(RemoteError) -> CallError + Send + Sync>;
type MapResponse = Arc<dyn Fn(Payload) -> Result<Payload, CallError> + Send + Sync>;

/// How a client behaves, whatever its transporter.
#[derive(Clone)]
#[non_exhaustive]
pub struct ClientOptions {
    /// How long a call waits for its reply (a stream: for each reply). Default 30 s; `None` waits for
    /// ever. Changeable per call.
    pub timeout: Option<Duration>,
    /// Calls that may be pending at once; one more ends as `Overloaded`. Default 65,536, at most
    /// 16,777,215.
    pub max_pending: usize,
    /// Replies of one call that may wait to be read; one more ends the call as `Overloaded`. Default 1024.
    pub max_buffered_replies: usize,
    /// How often connecting is tried again before queued calls end as `NotSent` (NestJS's
    /// `retryAttempts`). Default 0.
    pub retry_attempts: u32,
    /// The same for a connection that was lost. Default: as `retry_attempts`.
    pub reconnect_attempts: Option<u32>,
    /// The pause between attempts to connect. NestJS's `retryDelay` is a fixed one. Default: from 50 ms
    /// to 5 s.
    pub retry_delay: BackoffOptions,
    /// Whether a lost connection is made anew at once, rather than at the next use. Default false;
    /// transporters with a broker set it.
    pub reconnect: bool,
    /// How often a call declared idempotent is sent again after its connection was lost. Default 3.
    pub resend_attempts: u32,
    /// How long one attempt to connect may take. Default 10 s.
    pub connect_timeout: Duration,
    /// Whether deadline and trace travel in the packet's metadata. NestJS 10, 11 and 12 ignore what they
    /// do not know. Default true.
    pub propagate: bool,
    /// Bytes that may wait to be written before further calls wait in the client. Default 256 KiB.
    pub high_water_bytes: usize,
    map_error: Option<MapError>,
    map_response: Option<MapResponse>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            timeout: Some(Duration::from_secs(30)),
            max_pending: 65_536,
            max_buffered_replies: 1024,
            retry_attempts: 0,
            reconnect_attempts: None,
            retry_delay: BackoffOptions::default(),
            reconnect: false,
            resend_attempts: 3,
            connect_timeout: Duration::from_secs(10),
            propagate: true,
            high_water_bytes: 256 * 1024,
            map_error: None,
            map_response: None,
        }
    }
}

impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientOptions")
            .field("timeout", &self.timeout)
            .field("max_pending", &self.max_pending)
            .field("retry_attempts", &self.retry_attempts)
            .field("reconnect", &self.reconnect)
            .finish_non_exhaustive()
    }
}

impl ClientOptions {
    /// Replaces how the error a remote handler answered becomes a call's outcome: NestJS's
    /// `serializeError`. Default: [`CallError::Remote`].
    #[must_use]
    pub fn map_error(mut self, map: impl Fn(RemoteError) -> CallError + Send + Sync + 'static) -> Self {
        self.map_error = Some(Arc::new(map));
        self
    }

    /// Replaces how a response becomes the value that the caller decodes: NestJS's `serializeResponse`.
    /// Default: as it came.
    #[must_use]
    pub fn map_response(
        mut self,
        map: impl Fn(Payload) -> Result<Payload, CallError> + Send + Sync + 'static,
    ) -> Self {
        self.map_response = Some(Arc::new(map));
        self
    }
}

/// Calls another service. Clones share one connection; usable from any thread of an actix system.
#[derive(Clone)]
pub struct ClientProxy {
    shared: Arc<Shared>,
}

type Launch = Box<dyn Fn(&Arc<Shared>) -> Addr<ClientActor> + Send + Sync>;
type CheckPattern = Box<dyn Fn(&Pattern) -> Result<(), String> + Send + Sync>;

struct Shared {
    core: Arc<ClientCore>,
    options: ClientOptions,
    info: TransportInfo,
    status: StatusCell,
    events: EventBus,
    native: Mutex<Option<ContextData>>,
    /// Starts the actor on the current arbiter.
    launch: Launch,
    check: CheckPattern,
    actor: Mutex<Option<Addr<ClientActor>>>,
    /// Someone asked for a connection without a call.
    eager: Mutex<Vec<tokio::sync::oneshot::Sender<Result<(), SessionError>>>>,
    closing: Notify,
}

impl fmt::Debug for ClientProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientProxy")
            .field("transport", &self.shared.info.name)
            .field("status", &self.status())
            .field("pending", &self.pending())
            .finish()
    }
}

impl ClientProxy {
    /// A client that gets its sessions from `dial`. Nothing is connected until the first use.
    pub fn new<D: Dial + Clone + Send + Sync>(dial: D, options: ClientOptions) -> Self {
        let info = dial.info();
        let limits = CorrelationLimits {
            max_pending: options.max_pending.clamp(1, MAX_PENDING_LIMIT),
            max_buffered_replies: options.max_buffered_replies.max(1),
            resend_attempts: options.resend_attempts,
            reconnect: options.reconnect,
        };
        let check = dial.clone();
        Self {
            shared: Arc::new(Shared {
                core: Arc::new(ClientCore::new(limits)),
                options,
                info,
                status: StatusCell::default(),
                events: EventBus::default(),
                native: Mutex::default(),
                launch: Box::new(move |shared| ClientActor::launch(dial.clone(), Arc::clone(shared))),
                check: Box::new(move |pattern| check.check_pattern(pattern)),
                actor: Mutex::default(),
                eager: Mutex::default(),
                closing: Notify::new(),
            }),
        }
    }

    /// Prepares a request. **Nothing is sent until it is polled**: await it for a single reply, or make
    /// it a stream of replies with [`Call::stream`]. Each poll-through is one request.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: martlet_core::ClientProxy) -> Result<(), martlet_core::CallError> {
    /// let sum: i64 = client.send("sum", [1, 2, 3]).await?;
    /// # Ok(()) }
    /// ```
    pub fn send<T: DeserializeOwned>(&self, pattern: impl Into<Pattern>, data: impl IntoRecord) -> Call<T> {
        let prepared = self.prepare(pattern.into(), data);
        Call { caller: Caller { client: self.clone(), prepared, step: Step::Prepared }, reply: PhantomData }
    }

    /// Sends an event, **at once**: it goes out whether or not the result is awaited. Awaiting it tells
    /// when the transporter has taken it or, where brokers confirm (RabbitMQ, Redis, MQTT at quality of service 1 and
    /// 2), the broker has; which says nothing about its handlers.
    pub fn emit(&self, pattern: impl Into<Pattern>, data: impl IntoRecord) -> Emit {
        self.start_event(self.prepare(pattern.into(), data))
    }

    /// As [`emit`](Self::emit), with metadata (which alone will do) or a timeout of its own. Headers are the record's.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: martlet_core::ClientProxy) -> Result<(), martlet_core::CallError> {
    /// use std::time::Duration;
    ///
    /// use martlet_core::EmitOptions;
    ///
    /// let options = EmitOptions::new().timeout(Duration::from_secs(120));
    /// client.emit_with("user.created", 42, options).await?;
    /// # Ok(()) }
    /// ```
    pub fn emit_with(
        &self,
        pattern: impl Into<Pattern>,
        data: impl IntoRecord,
        options: impl Into<EmitOptions>,
    ) -> Emit {
        let options = options.into();
        let mut prepared = self.prepare(pattern.into(), data);
        prepared.extras().metadata = options.metadata;
        if let Some(timeout) = options.timeout {
            prepared.set_timeout(timeout);
        }
        self.start_event(prepared)
    }

    #[inline]
    fn prepare(&self, pattern: Pattern, data: impl IntoRecord) -> Prepared {
        let format = self.shared.info.format;
        let mut extras = Extras::of_handler();
        let (data, headers) = data.into_record(format).unwrap_or_else(|error| {
            extras.get_or_insert_default().failed = Some(error);
            (Payload::null(format), Headers::new())
        });
        let timeout = self.shared.options.timeout;
        let message =
            OutboundMessage { id: None, pattern, data, metadata: Metadata::new(), timeout, headers };
        Prepared { message: Some(message), idempotent: false, extras }
    }

    fn start_event(&self, mut prepared: Prepared) -> Emit {
        let started = prepared.start(self, CallKind::Event, None);
        Emit { client: self.clone(), state: started.map(|(key, _)| key).map_err(Some), ended: false }
    }

    /// Connects now rather than at the first use.
    ///
    /// # Errors
    ///
    /// Why there is no connection, after the configured attempts.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the connecting.
    pub async fn connect(&self) -> Result<(), CallError> {
        if self.shared.status.current() == Some(ConnectionStatus::Connected) {
            return Ok(());
        }
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.shared.core.reopen();
        self.shared.eager.lock().push(sender);
        self.start()?;
        self.shared.core.demand.notify_one();
        match receiver.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(cause)) => Err(CallError::NotSent { cause }),
            Err(_) => Err(CallError::Closed),
        }
    }

    /// Closes the client: calls under way end as `Closed`, then the connection is closed. A later use
    /// connects anew after [`connect`](Self::connect).
    ///
    /// Cancel safe: closing goes on.
    pub async fn close(&self) {
        self.shared.core.close();
        self.shared.core.end_all(&CallError::Closed);
        // Whoever waits for a connection is told by this being dropped.
        self.shared.eager.lock().clear();
        let actor = self.shared.actor.lock().clone();
        if let Some(actor) = actor {
            // An error means that it has stopped already.
            let _ = actor.send(Close).await;
        }
        self.shared.actor.lock().take();
        self.shared.status.set(ConnectionStatus::Closed);
    }

    /// Waits for the calls under way, for at most `grace`, then closes.
    pub async fn close_gracefully(&self, grace: Duration) {
        self.shared.core.close();
        let deadline = Instant::now() + grace;
        while !self.shared.core.is_idle() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.close().await;
    }

    /// The current status; `None` before the first use.
    pub fn status(&self) -> Option<ConnectionStatus> {
        self.shared.status.current()
    }

    /// The current status, then every change.
    pub fn status_stream(&self) -> impl Stream<Item = ConnectionStatus> + Send + Unpin + 'static {
        self.shared.status.stream()
    }

    /// The cell behind [`status`](Self::status).
    pub fn status_cell(&self) -> &StatusCell {
        &self.shared.status
    }

    /// Where this client reports errors.
    pub fn events(&self) -> &EventBus {
        &self.shared.events
    }

    /// The driver's own handle, if it is of this type and there is a connection: NestJS's `unwrap()`.
    pub fn unwrap<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.shared.native.lock().clone()?.downcast().ok()
    }

    /// What it speaks.
    pub fn transport(&self) -> &TransportInfo {
        &self.shared.info
    }

    /// Shows the client in a supervision tree, as long as the place is kept.
    pub(crate) fn watch_in(&self, child: &Child) {
        let core = Arc::downgrade(&self.shared.core);
        child.watch_in_flight(move || core.upgrade().map_or(0, |core| core.pending() as u64));
    }

    /// Calls and events that have not ended.
    pub fn pending(&self) -> usize {
        self.shared.core.pending()
    }

    /// Slots of the correlation map in use: pending calls, and ended ones whose outcome nobody has read
    /// yet.
    pub fn occupied(&self) -> usize {
        self.shared.core.occupied()
    }

    /// Replies that came when nobody waited for them any more.
    pub fn late_replies(&self) -> u64 {
        self.shared.core.late()
    }

    /// The client as an address, for actors to message with [`SendMessage`] and [`EmitMessage`].
    ///
    /// # Errors
    ///
    /// [`CallError::Closed`] outside of an actix system.
    pub fn address(&self) -> Result<Addr<ClientActor>, CallError> {
        self.start()
    }

    /// Makes sure that the actor runs.
    fn start(&self) -> Result<Addr<ClientActor>, CallError> {
        let mut actor = self.shared.actor.lock();
        if let Some(running) = actor.as_ref().filter(|actor| actor.connected()) {
            return Ok(running.clone());
        }
        if actix_rt::Arbiter::try_current().is_none() {
            return Err(CallError::NotSent { cause: SessionError::fatal(StartError::NoSystem.to_string()) });
        }
        let address = (self.shared.launch)(&self.shared);
        *actor = Some(address.clone());
        Ok(address)
    }
}

// === calls ===

/// A call that has not begun.
struct Prepared {
    /// In the form in which it is queued, and moved there from here.
    message: Option<OutboundMessage>,
    idempotent: bool,
    /// What most calls do not have.
    extras: Option<Box<Extras>>,
}

#[derive(Default)]
struct Extras {
    failed: Option<EncodeError>,
    metadata: Metadata,
    headers: Headers,
    cancellation: Option<Cancellation>,
    ambient: Option<Ambient>,
}

impl Prepared {
    fn extras(&mut self) -> &mut Extras {
        self.extras.get_or_insert_default()
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        if let Some(message) = &mut self.message {
            message.timeout = timeout;
        }
    }

    /// Starts it; `cx` is of the task that waits for its reply, if that is known.
    fn start(
        &mut self,
        client: &ClientProxy,
        kind: CallKind,
        cx: Option<&TaskContext<'_>>,
    ) -> Result<(CallKey, Option<Cancelled>), CallError> {
        let shared = &*client.shared;
        let mut cancelled = None;
        if let Some(extras) = self.extras.take() {
            cancelled = extras.add_to(self.message.as_mut(), shared.options.propagate)?;
        }
        let Some(message) = &mut self.message else { return Err(CallError::Closed) };
        (shared.check)(&message.pattern).map_err(|reason| {
            CallError::Encode(Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(reason)))
        })?;
        let timeout = message.timeout;
        // A stream's timeout is for each reply: its handler has no deadline.
        if kind != CallKind::Single || !shared.options.propagate {
            message.timeout = None;
        }
        let waker = cx.map(|cx| cx.waker());
        let call = NewCall { message: &mut self.message, kind, timeout, idempotent: self.idempotent, waker };
        let (key, connected) = shared.core.insert(call)?;
        if !connected && let Err(error) = client.start() {
            shared.core.forget(key);
            return Err(error);
        }
        Ok((key, cancelled))
    }
}

type Cancelled = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Extras {
    /// What a call has of the handler that makes it.
    fn of_handler() -> Option<Box<Self>> {
        Ambient::map_current(|ambient| Box::new(Self { ambient: Some(ambient.clone()), ..Self::default() }))
    }

    #[cold]
    fn add_to(
        self,
        message: Option<&mut OutboundMessage>,
        propagate: bool,
    ) -> Result<Option<Cancelled>, CallError> {
        let Self { failed, metadata, headers, cancellation, ambient } = self;
        if let Some(error) = failed {
            return Err(CallError::Encode(Arc::new(error)));
        }
        let Some(message) = message else { return Ok(None) };
        message.metadata = metadata;
        for (name, value) in headers.iter() {
            message.headers.append(name, value);
        }
        if let Some(deadline) = ambient.as_ref().and_then(|ambient| ambient.deadline) {
            // A call made inside a handler never outlives the handler's own caller.
            let left = deadline.saturating_duration_since(Instant::now());
            message.timeout = Some(message.timeout.map_or(left, |timeout| timeout.min(left)));
        }
        if propagate
            && let Some(trace) = ambient.and_then(|ambient| ambient.trace)
            && message.metadata.get(TRACEPARENT_KEY).is_none()
        {
            insert_trace(&mut message.metadata, &trace.child());
        }
        Ok(cancellation.map(|token| Box::pin(async move { token.cancelled().await }) as Cancelled))
    }
}

fn insert_trace(metadata: &mut Metadata, trace: &TraceContext) {
    metadata.insert(TRACEPARENT_KEY, trace.to_string());
    if let Some(state) = trace.state() {
        metadata.insert(TRACESTATE_KEY, state);
    }
}

impl Shared {
    /// The next reply of a call, put `into`; `None` there when it has completed.
    fn poll_reply(
        &self,
        key: CallKey,
        cx: &mut TaskContext<'_>,
        into: &mut Option<Payload>,
    ) -> Poll<Result<Next, CallError>> {
        match std::task::ready!(self.core.poll_reply(key, cx, into)) {
            Ok(next) => {
                if let Some(map) = &self.options.map_response
                    && let Some(reply) = into.take()
                {
                    *into = Some(map(reply)?);
                }
                Poll::Ready(Ok(next))
            }
            Err(error) => Poll::Ready(Err(match (*error, &self.options.map_error) {
                (CallError::Remote(remote), Some(map)) => map(remote),
                (error, _) => error,
            })),
        }
    }
}

/// A call and whoever makes it: prepared, under way, ended, in one place, because a move costs more than most of what
/// is done with it.
struct Caller {
    client: ClientProxy,
    prepared: Prepared,
    step: Step,
}

enum Step {
    Prepared,
    Running { key: CallKey, cancelled: Option<Cancelled> },
    Ended,
}

impl Caller {
    /// The next reply, put `into`; `None` there when the call has completed. Frees the slot after the last one and
    /// after an error.
    fn poll_reply(
        &mut self,
        kind: CallKind,
        cx: &mut TaskContext<'_>,
        into: &mut Option<Payload>,
    ) -> Poll<Result<(), CallError>> {
        if let Step::Prepared = self.step {
            self.step = Step::Ended;
            let (key, cancelled) = self.prepared.start(&self.client, kind, Some(cx))?;
            // The task is woken by the reply; its token has still to know it.
            let known = cancelled.is_none();
            self.step = Step::Running { key, cancelled };
            if known {
                return Poll::Pending;
            }
        }
        let shared = &*self.client.shared;
        let Step::Running { key, cancelled } = &mut self.step else { return Poll::Ready(Ok(())) };
        if let Some(token) = cancelled
            && token.as_mut().poll(cx).is_ready()
        {
            *cancelled = None;
            shared.core.cancel(*key);
        }
        Poll::Ready(match std::task::ready!(shared.poll_reply(*key, cx, into)) {
            Ok(Next::Reply) => Ok(()),
            Ok(Next::Last | Next::End) => {
                self.step = Step::Ended;
                Ok(())
            }
            Err(error) => {
                // A reply that could not be mapped may have others behind it.
                self.end();
                Err(error)
            }
        })
    }

    /// Frees the slot; the peer is told if the call is under way.
    fn end(&mut self) {
        if let Step::Running { key, .. } = std::mem::replace(&mut self.step, Step::Ended) {
            self.client.shared.core.forget(key);
        }
    }

    fn format(&self) -> Format {
        self.client.shared.info.format
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.end();
    }
}

/// A request that is sent when it is first polled.
///
/// Awaited, it gives the first reply (NestJS's `firstValueFrom`); what follows is cancelled. A handler
/// that completes without a value gives `()` or `None` where the type allows it, else
/// [`CallError::NoValue`].
///
/// # Cancel safety
///
/// Dropping it frees its slot; a Martlet peer is told to stop the handler, a NestJS peer is not
/// disturbed.
#[must_use = "nothing is sent until it is awaited or polled"]
pub struct Call<T> {
    caller: Caller,
    reply: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for Call<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("started", &!matches!(self.caller.step, Step::Prepared)).finish()
    }
}

impl<T> Call<T> {
    fn change(mut self, change: impl FnOnce(&mut Prepared)) -> Self {
        if let Step::Prepared = self.caller.step {
            change(&mut self.caller.prepared);
        }
        self
    }

    /// How long to wait for the reply (a stream: for each), instead of the client's default.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.change(|call| call.set_timeout(Some(timeout)))
    }

    /// Waits for ever.
    pub fn no_timeout(self) -> Self {
        self.change(|call| call.set_timeout(None))
    }

    /// Declares that running the handler twice does no harm: the call is sent again when its connection
    /// is lost.
    pub fn idempotent(self) -> Self {
        self.change(|call| call.idempotent = true)
    }

    /// Adds packet metadata.
    pub fn metadata(self, key: impl Into<Box<str>>, value: impl Into<Box<str>>) -> Self {
        self.change(|call| {
            call.extras().metadata.insert(key, value);
        })
    }

    /// Adds a header, where the transporter has them.
    pub fn header(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.change(|call| call.extras().headers.append(name, value))
    }

    /// Sets the trace that the request belongs to. Inside a handler, the handler's own is taken.
    pub fn trace(self, trace: &TraceContext) -> Self {
        self.change(|call| insert_trace(&mut call.extras().metadata, trace))
    }

    /// Ends the call as [`CallError::Cancelled`] when the token is cancelled.
    pub fn cancel_on(self, token: Cancellation) -> Self {
        self.change(|call| call.extras().cancellation = Some(token))
    }

    /// Takes every reply, as a stream. Nothing is sent until it is polled.
    pub fn stream(self) -> ReplyStream<T> {
        ReplyStream { caller: self.caller, reply: PhantomData }
    }
}

fn decode<T: DeserializeOwned>(reply: &Payload) -> Result<T, CallError> {
    reply.decode().map_err(|error| CallError::Decode(Arc::new(error)))
}

impl<T: DeserializeOwned> Future for Call<T> {
    type Output = Result<T, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let caller = &mut self.caller;
        let mut reply = None;
        let outcome = std::task::ready!(caller.poll_reply(CallKind::Single, cx, &mut reply));
        // One reply is all: the rest of a stream is cancelled.
        caller.end();
        outcome?;
        Poll::Ready(match reply {
            Some(reply) => decode(&reply),
            None => Payload::null(caller.format()).decode().map_err(|_| CallError::NoValue),
        })
    }
}

impl<T> Unpin for Call<T> {}

/// The replies of one request. Ends after the completion or after the first error.
///
/// # Cancel safety
///
/// Dropping it frees its slot; a Martlet peer is told to stop the handler, a NestJS peer is not
/// disturbed.
#[must_use = "nothing is sent until it is polled"]
pub struct ReplyStream<T> {
    caller: Caller,
    reply: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for ReplyStream<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyStream").field("started", &!matches!(self.caller.step, Step::Prepared)).finish()
    }
}

impl<T> Unpin for ReplyStream<T> {}

impl<T: DeserializeOwned> Stream for ReplyStream<T> {
    type Item = Result<T, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        let caller = &mut self.caller;
        let mut reply = None;
        std::task::ready!(caller.poll_reply(CallKind::Stream, cx, &mut reply))?;
        Poll::Ready(reply.map(|reply| decode(&reply)))
    }
}

impl<T: DeserializeOwned> ReplyStream<T> {
    /// Every reply, once the handler has completed.
    ///
    /// # Errors
    ///
    /// The error that ended the stream; replies before it are dropped.
    pub async fn collect_all(mut self) -> Result<Vec<T>, CallError> {
        let mut replies = Vec::new();
        while let Some(reply) = self.next().await {
            replies.push(reply?);
        }
        Ok(replies)
    }
}

/// What an event may have of its own: [`ClientProxy::emit_with`].
#[derive(Debug, Clone, Default)]
pub struct EmitOptions {
    metadata: Metadata,
    /// Its own limit, or none; by default the client's.
    timeout: Option<Option<Duration>>,
}

impl EmitOptions {
    /// No metadata; the client's timeout.
    pub fn new() -> Self {
        Self::default()
    }

    /// The packet's metadata.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = metadata;
        self
    }

    /// How long connecting, sending and the broker's confirmation may take together, instead of the client's default; at the
    /// limit it ends as [`CallError::Timeout`]: what has been sent until then may arrive, what has not never does.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(Some(timeout));
        self
    }

    /// Waits for ever.
    pub fn no_timeout(mut self) -> Self {
        self.timeout = Some(None);
        self
    }
}

impl From<Metadata> for EmitOptions {
    fn from(metadata: Metadata) -> Self {
        Self::new().metadata(metadata)
    }
}

/// An event on its way. It goes out even when this is dropped.
pub struct Emit {
    client: ClientProxy,
    state: Result<CallKey, Option<CallError>>,
    ended: bool,
}

impl fmt::Debug for Emit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Emit")
    }
}

impl Unpin for Emit {}

impl Future for Emit {
    type Output = Result<(), CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        match &mut this.state {
            Ok(_) if this.ended => Poll::Ready(Ok(())),
            Ok(key) => {
                // An event has no replies.
                let outcome = std::task::ready!(this.client.shared.poll_reply(*key, cx, &mut None));
                this.ended = true;
                Poll::Ready(outcome.map(|_| ()))
            }
            Err(error) => Poll::Ready(error.take().map_or(Ok(()), Err)),
        }
    }
}

impl Drop for Emit {
    fn drop(&mut self) {
        if let (Ok(key), false) = (&self.state, self.ended) {
            self.client.shared.core.forget(*key);
        }
    }
}

// === the actor ===

/// The address of a client: answers [`SendMessage`] and [`EmitMessage`], and owns the connection.
pub struct ClientActor {
    shared: Arc<Shared>,
    drive: Box<dyn Fn(Arc<Shared>) -> futures::future::LocalBoxFuture<'static, ()>>,
    driver: Option<tokio::task::JoinHandle<()>>,
}

impl fmt::Debug for ClientActor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientActor").field("transport", &self.shared.info.name).finish()
    }
}

/// Asks a client actor to call: pattern, payload, and a limit of one's own.
#[derive(Debug, Clone, Message)]
#[rtype(result = "Result<Payload, CallError>")]
pub struct SendMessage {
    /// The pattern.
    pub pattern: Pattern,
    /// The payload.
    pub data: Payload,
    /// How long to wait; `None` for the client's default.
    pub timeout: Option<Duration>,
}

/// Asks a client actor to send an event.
#[derive(Debug, Clone, Message)]
#[rtype(result = "Result<(), CallError>")]
pub struct EmitMessage {
    /// The pattern.
    pub pattern: Pattern,
    /// The payload.
    pub data: Payload,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Close;

impl ClientActor {
    fn launch<D: Dial + Clone + Send + Sync>(dial: D, shared: Arc<Shared>) -> Addr<Self> {
        let actor = Self {
            shared,
            drive: Box::new(move |shared| Box::pin(drive(dial.clone(), shared))),
            driver: None,
        };
        actor.start()
    }

    /// Runs the driver as a watched task; one that panics is started again.
    fn spawn_driver(&mut self) {
        // A close that nobody waited for is over.
        let _ = self.shared.closing.notified().now_or_never();
        let shared = Arc::clone(&self.shared);
        let drive = (self.drive)(Arc::clone(&shared));
        let task = actix_rt::spawn(async move {
            // Whatever ends the driver (a panic, the end of its arbiter): nobody waits for ever.
            let guard = DriverGuard(Arc::clone(&shared));
            let timer = shared.core.run_timer();
            let result = tokio::select! {
                result = AssertUnwindSafe(drive).catch_unwind() => result,
                () = timer => Ok(()),
            };
            match result {
                Ok(()) => std::mem::forget(guard),
                Err(panic) => {
                    let error =
                        SessionError::lost(format!("the client driver panicked: {}", panic_text(panic)));
                    shared.events.emit(ServiceEvent::Session {
                        transport: Arc::clone(&shared.info.name),
                        peer: None,
                        error,
                    });
                }
            }
        });
        self.driver = Some(task);
    }

    /// Starts a driver that ended out of order anew.
    fn watch_driver(&mut self, ctx: &mut Context<Self>) {
        let ended = self.driver.as_ref().is_none_or(tokio::task::JoinHandle::is_finished);
        if ended && self.shared.core.is_closed() {
            ctx.stop();
        } else if ended {
            self.spawn_driver();
        }
    }
}

/// Ends every call when the driver ends out of order.
struct DriverGuard(Arc<Shared>);

impl Drop for DriverGuard {
    fn drop(&mut self) {
        let cause = SessionError::lost("the client's arbiter or driver ended");
        self.0.core.session_ended(&cause);
        self.0.core.fail_waiting(&cause);
        for waiting in self.0.eager.lock().drain(..) {
            // Whoever asked may have stopped waiting.
            let _ = waiting.send(Err(cause.clone()));
        }
        self.0.native.lock().take();
        self.0.status.set(ConnectionStatus::Disconnected);
    }
}

impl Actor for ClientActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(1024);
        self.spawn_driver();
        ctx.run_interval(Duration::from_millis(250), Self::watch_driver);
    }

    fn stopped(&mut self, _ctx: &mut Self::Context) {
        if let Some(driver) = self.driver.take() {
            driver.abort();
        }
    }
}

impl Handler<SendMessage> for ClientActor {
    type Result = ResponseFuture<Result<Payload, CallError>>;

    fn handle(&mut self, message: SendMessage, _ctx: &mut Self::Context) -> Self::Result {
        let proxy = ClientProxy { shared: Arc::clone(&self.shared) };
        Box::pin(async move {
            let mut call = proxy.send::<()>(message.pattern, message.data);
            if message.timeout.is_some() {
                call.caller.prepared.set_timeout(message.timeout);
            }
            let format = call.caller.format();
            let mut reply = None;
            std::future::poll_fn(|cx| call.caller.poll_reply(CallKind::Single, cx, &mut reply)).await?;
            Ok(reply.unwrap_or_else(|| Payload::null(format)))
        })
    }
}

impl Handler<EmitMessage> for ClientActor {
    type Result = ResponseFuture<Result<(), CallError>>;

    fn handle(&mut self, message: EmitMessage, _ctx: &mut Self::Context) -> Self::Result {
        let proxy = ClientProxy { shared: Arc::clone(&self.shared) };
        let emitted = proxy.emit(message.pattern, message.data);
        Box::pin(emitted)
    }
}

impl Handler<Close> for ClientActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: Close, ctx: &mut Self::Context) -> Self::Result {
        self.shared.closing.notify_one();
        let driver = self.driver.take();
        let address = ctx.address();
        Box::pin(async move {
            if let Some(driver) = driver {
                // The driver closes its session and ends; one that does not is stopped.
                if tokio::time::timeout(Duration::from_secs(2), driver).await.is_err() {
                    tracing::warn!(target: "martlet", "a client's session did not close within 2s");
                }
            }
            address.do_send(Stop);
        })
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Stop;

impl Handler<Stop> for ClientActor {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

// === the driver ===

/// Dials when there is demand, runs the session, decides what follows its end.
async fn drive<D: Dial>(dial: D, shared: Arc<Shared>) {
    let core = &shared.core;
    let mut lost = None;
    loop {
        if core.is_closed() {
            return;
        }
        let wanted = core.has_demand() || !shared.eager.lock().is_empty() || lost.is_some();
        if !wanted {
            tokio::select! {
                () = core.demand.notified() => {}
                () = shared.closing.notified() => return,
            }
            continue;
        }
        let connected = tokio::select! {
            connected = connect(&dial, &shared, lost.take()) => connected,
            () = shared.closing.notified() => return,
        };
        let session = match connected {
            Ok(session) => session,
            Err(cause) => {
                shared.status.set(ConnectionStatus::Disconnected);
                for waiting in shared.eager.lock().drain(..) {
                    // Whoever asked may have stopped waiting.
                    let _ = waiting.send(Err(cause.clone()));
                }
                core.fail_waiting(&cause);
                continue;
            }
        };
        let exit = run(session, &shared).await;
        *shared.native.lock() = None;
        if core.is_closed() {
            return;
        }
        let cause = exit.cause.unwrap_or_else(|| SessionError::lost("the connection was closed"));
        shared.events.emit(ServiceEvent::Session {
            transport: Arc::clone(&shared.info.name),
            peer: None,
            error: cause.clone(),
        });
        if shared.options.reconnect && cause.kind() != SessionErrorKind::Fatal {
            shared.status.set(ConnectionStatus::Reconnecting);
            lost = Some(exit.lived);
        } else {
            shared.status.set(ConnectionStatus::Disconnected);
        }
    }
}

async fn connect<D: Dial>(
    dial: &D,
    shared: &Shared,
    lost_after: Option<Duration>,
) -> Result<D::Session, SessionError> {
    let options = &shared.options;
    let mut backoff = Backoff::new(options.retry_delay);
    let reconnecting = lost_after.is_some();
    if !reconnecting {
        shared.status.set(ConnectionStatus::Connecting);
    } else if lost_after.is_some_and(|lived| lived < options.retry_delay.min) {
        // A session that ends at once would otherwise be dialled in a tight loop.
        tokio::time::sleep(backoff.next_pause()).await;
    }
    let attempts = match options.reconnect_attempts {
        Some(attempts) if reconnecting => attempts,
        _ => options.retry_attempts,
    };
    let mut attempt = 0;
    loop {
        let plan = SessionPlan { role: Role::Client, subscriptions: Vec::new() };
        let dialled = tokio::time::timeout(options.connect_timeout, dial.dial(plan)).await;
        let error = match dialled {
            Ok(Ok(session)) => return Ok(session),
            Ok(Err(error)) => error,
            Err(_) => SessionError::refused(format!("no connection within {:?}", options.connect_timeout)),
        };
        if error.kind() == SessionErrorKind::Fatal || attempt >= attempts {
            return Err(error);
        }
        attempt += 1;
        if reconnecting {
            shared.status.set(ConnectionStatus::Reconnecting);
        }
        tokio::time::sleep(backoff.next_pause()).await;
    }
}

async fn run<S: Session>(session: S, shared: &Arc<Shared>) -> SessionExit {
    let control = Arc::new(SessionControl::default());
    *shared.native.lock() = session.native();
    shared.core.session_started(&control);
    shared.status.set(ConnectionStatus::Connected);
    for waiting in shared.eager.lock().drain(..) {
        // Whoever asked may have stopped waiting.
        let _ = waiting.send(Ok(()));
    }
    let limits =
        SessionLimits { high_water_bytes: shared.options.high_water_bytes, ..SessionLimits::default() };
    let env = SessionEnv {
        transport: shared.info.clone(),
        events: shared.events.clone(),
        limits,
        control: Arc::clone(&control),
        server: None,
        client: Some(Arc::clone(&shared.core)),
    };
    let session = run_session(session, env);
    tokio::pin!(session);
    tokio::select! {
        exit = &mut session => exit,
        () = shared.closing.notified() => {
            control.abandon();
            session.await
        }
    }
}
