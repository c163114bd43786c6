// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serving side of a transporter: a supervised connection actor (brokers) or listener actor (peers).
//!
//! ```text
//! ServerActor (control plane: status, stop)
//!    └─ driver task, watched and started anew if it panics
//!         ├─ dialled: one session task, redialled with backoff
//!         └─ listening: accepts peers, places each on an arbiter as a session task of its own
//! ```

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr, AsyncContext, Context, Handler, Message, ResponseFuture};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use slab::Slab;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;

use crate::arbiters::Arbiters;
use crate::backoff::{Backoff, BackoffOptions};
use crate::error::{SessionError, SessionErrorKind, StartError};
use crate::events::{EventBus, ServiceEvent};
use crate::interceptor::{Interceptor, Interceptors};
use crate::pattern::Route;
use crate::registry::Registry;
use crate::request::{AppData, ServerScope};
use crate::route::RouteTable;
use crate::session::{
    Abandoned, ServerEnv, SessionControl, SessionEnv, SessionExit, SessionLimits, run_session,
};
use crate::settlement::FailurePolicy;
use crate::status::{ConnectionStatus, StatusCell};
use crate::supervise::{Child, ChildState, panic_text};
use crate::transport::{Accept, ContextData, Dial, Listen, Open, Role, Session, SessionPlan, TransportInfo};

/// How a server behaves, whatever its transporter.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct ServerOptions {
    /// Requests and events in flight per session; at the limit the session stops reading. Default 1024.
    pub max_in_flight: usize,
    /// Connections open at once; further ones are closed at once and reported. Default 65,536. (Brokers:
    /// not used.)
    pub max_connections: usize,
    /// Bytes of replies of one session that may wait to be written before it stops reading. Default
    /// 256 KiB.
    pub high_water_bytes: usize,
    /// How often a lost listening socket or broker connection is tried again, over the server's life
    /// (listening) or in a row (brokers). Default: never for listening sockets, as NestJS; without end
    /// for brokers.
    pub retry_attempts: Option<u32>,
    /// Whether `retry_attempts`, where given, also serves the first connection to a broker. Default true;
    /// when false, a service whose broker cannot be reached fails to start at once.
    pub retry_first: bool,
    /// The pause before trying again. Default: from 50 ms to 5 s.
    pub retry_delay: BackoffOptions,
    /// How long stopping may take, where that is less than what the service allows. Default: what the
    /// service allows.
    pub grace_period: Option<Duration>,
    /// What becomes of a message whose handler failed, where its handler has no policy of its own. Refused at
    /// start where the transporter cannot honour it. Default: what NestJS does.
    pub on_failure: Option<FailurePolicy>,
    /// How long one attempt to connect to a broker may take. Default 10 s.
    pub connect_timeout: Duration,
    /// How long an accepted peer may take for its handshake (TLS). Default 10 s.
    pub handshake_timeout: Duration,
    /// How long what a peer has asked may still take once it has closed its sending side; then its connection is closed.
    /// Default 1 s: a NestJS client that closes waits for the other side to close, too. (Brokers: not used.)
    pub half_close_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_in_flight: 1024,
            max_connections: 65_536,
            high_water_bytes: 256 * 1024,
            retry_attempts: None,
            retry_first: true,
            retry_delay: BackoffOptions::default(),
            grace_period: None,
            on_failure: None,
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            half_close_timeout: Duration::from_secs(1),
        }
    }
}

impl ServerOptions {
    fn limits(&self) -> SessionLimits {
        SessionLimits {
            max_in_flight: self.max_in_flight.max(1),
            high_water_bytes: self.high_water_bytes.max(1),
            half_close: self.half_close_timeout,
            on_failure: self.on_failure,
            ..SessionLimits::default()
        }
    }
}

/// What a server gets from the service that runs it.
#[derive(Clone)]
pub struct ServerEnvironment {
    pub(crate) registry: Registry,
    pub(crate) arbiters: Arbiters,
    pub(crate) events: EventBus,
    pub(crate) app: Arc<AppData>,
    pub(crate) child: Child,
    pub(crate) escalate: crate::handler::EscalateFn,
}

impl fmt::Debug for ServerEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerEnvironment")
    }
}

/// Starts a server in a service, with what it alone puts around requests.
type Launch =
    Box<dyn FnOnce(ServerEnvironment, OwnScope) -> LocalBoxFuture<'static, Result<ServerHandle, StartError>>>;

/// What a server alone puts around its requests.
struct OwnScope {
    interceptors: Interceptors,
    inherit: bool,
}

/// A transporter's serving side, ready to be put into a service. Made from a [`Dial`] or a [`Listen`].
pub struct Server {
    info: TransportInfo,
    interceptors: Interceptors,
    inherit: bool,
    launch: Launch,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Server {
    /// A server that dials a broker and subscribes. `url` is what it calls itself in reports.
    pub fn dial<D: Dial>(dial: D, url: impl Into<String>, options: ServerOptions) -> Self {
        let info = dial.info();
        let url = url.into();
        Self {
            info: info.clone(),
            interceptors: Interceptors::new(),
            inherit: true,
            launch: Box::new(move |env, own| {
                let dial = std::rc::Rc::new(dial);
                let drive = move |state: Arc<ServerState>, tables| {
                    serve_dialled(std::rc::Rc::clone(&dial), state, tables).boxed_local()
                };
                launch(info, url, "connection", options, env, own, Box::new(drive)).boxed_local()
            }),
        }
    }

    /// A server that accepts peers.
    pub fn listen<L: Listen>(listen: L, options: ServerOptions) -> Self {
        let info = listen.info();
        Self {
            info: info.clone(),
            interceptors: Interceptors::new(),
            inherit: true,
            launch: Box::new(move |env, own| {
                let listen = std::rc::Rc::new(listen);
                let drive = move |state: Arc<ServerState>, tables| {
                    serve_listening(std::rc::Rc::clone(&listen), state, tables).boxed_local()
                };
                launch(info, String::new(), "listener", options, env, own, Box::new(drive)).boxed_local()
            }),
        }
    }

    /// What it speaks.
    pub fn info(&self) -> &TransportInfo {
        &self.info
    }

    /// Puts an interceptor around every request that comes by this server alone, outside the service's.
    #[must_use]
    pub fn interceptor(mut self, interceptor: Arc<dyn Interceptor>) -> Self {
        self.interceptors.push(interceptor);
        self
    }

    /// Whether the service's interceptors apply to requests that come by this server (NestJS's
    /// `inheritAppConfig`). Default true.
    #[must_use]
    pub fn inherit_app_config(mut self, inherit: bool) -> Self {
        self.inherit = inherit;
        self
    }

    /// Starts it; ready when it accepts work.
    ///
    /// # Errors
    ///
    /// [`StartError::Transport`] when it cannot listen or connect.
    pub async fn start(self, env: ServerEnvironment) -> Result<ServerHandle, StartError> {
        (self.launch)(env, OwnScope { interceptors: self.interceptors, inherit: self.inherit }).await
    }
}

type Tables = watch::Receiver<Arc<RouteTable>>;
type Drive = Box<dyn Fn(Arc<ServerState>, Tables) -> LocalBoxFuture<'static, Result<(), SessionError>>>;

/// What the driver, the actor and the handle of a server share.
struct ServerState {
    info: TransportInfo,
    options: ServerOptions,
    env: ServerEnvironment,
    scope: Arc<ServerScope>,
    status: StatusCell,
    child: Child,
    url: Mutex<String>,
    native: Mutex<Option<ContextData>>,
    ready: Mutex<Option<oneshot::Sender<Result<(), SessionError>>>>,
    /// Set when stopping; the instant is the end of the grace period.
    stop: watch::Sender<Option<Instant>>,
    report: Mutex<ServerReport>,
    /// Its sessions.
    peers: Arc<Peers>,
}

impl ServerState {
    fn ready(&self, result: Result<(), SessionError>) -> bool {
        match self.ready.lock().take() {
            // Whoever started the server may have stopped waiting.
            Some(waiting) => waiting.send(result).is_ok(),
            None => false,
        }
    }

    fn is_starting(&self) -> bool {
        self.ready.lock().is_some()
    }

    /// Nothing more is tried: the service is asked to stop.
    fn give_up(&self, cause: &SessionError) {
        self.child.failed_with(ChildState::Failed, &cause.to_string());
        self.env
            .events
            .emit(ServiceEvent::GaveUp { child: Arc::clone(self.child.name()), cause: cause.to_string() });
        (self.env.escalate.0)(format!("{}: {cause}", self.info.name));
    }

    fn session_failed(&self, peer: Option<Arc<str>>, error: SessionError) {
        self.env.events.emit(ServiceEvent::Session { transport: Arc::clone(&self.info.name), peer, error });
    }

    fn count(&self, exit: SessionExit) {
        let mut report = self.report.lock();
        report.done += exit.answered;
        report.handed_back += exit.handed_back;
        if exit.cause.is_some() {
            // Their callers went first. Counted only: over a long life the list would grow without end.
            report.lost += exit.abandoned.len() as u64 + exit.lost;
        } else {
            report.abandoned.extend(exit.abandoned);
        }
    }

    fn session_env(
        &self,
        tables: Tables,
        arbiter: usize,
        subscribed: HashSet<Route>,
        control: &Arc<SessionControl>,
    ) -> SessionEnv {
        SessionEnv {
            transport: self.info.clone(),
            events: self.env.events.clone(),
            limits: self.options.limits(),
            control: Arc::clone(control),
            server: Some(ServerEnv { scope: Arc::clone(&self.scope), tables, arbiter, subscribed }),
            client: None,
        }
    }
}

/// What a server did, from its start to its stop.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct ServerReport {
    /// The transporter.
    pub transport: String,
    /// Where it served.
    pub url: String,
    /// Requests and events that were finished.
    pub done: u64,
    /// Requests and events that were given back to the broker for another consumer.
    pub handed_back: u64,
    /// Requests and events whose connection was lost before they were finished. (A broker that settles
    /// gives them to another consumer.)
    pub lost: u64,
    /// Requests and events that were not finished when the grace period ended.
    pub abandoned: Vec<Abandoned>,
}

/// A running server.
#[derive(Clone)]
pub struct ServerHandle {
    state: Arc<ServerState>,
    actor: Addr<ServerActor>,
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerHandle").field("url", &self.url()).field("status", &self.status()).finish()
    }
}

impl ServerHandle {
    /// What it speaks.
    pub fn info(&self) -> &TransportInfo {
        &self.state.info
    }

    /// Where it serves, with the real port: `tcp://127.0.0.1:3000`.
    pub fn url(&self) -> String {
        self.state.url.lock().clone()
    }

    /// The current status.
    pub fn status(&self) -> Option<ConnectionStatus> {
        self.state.status.current()
    }

    /// The cell behind it, with every change.
    pub fn status_cell(&self) -> &StatusCell {
        &self.state.status
    }

    /// The driver's own handle, if it is of this type: NestJS's `unwrap()`.
    pub fn unwrap<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.state.native.lock().clone()?.downcast().ok()
    }

    /// Stops taking work, lets what was taken finish for at most `grace`, flushes, closes.
    ///
    /// # Cancel safety
    ///
    /// Stopping goes on when the future is dropped.
    pub async fn stop(&self, grace: Duration) -> ServerReport {
        // An error means that the actor has stopped already: the report stands.
        let _ = self.actor.send(Stop { grace }).await;
        let mut report = self.state.report.lock().clone();
        report.transport = self.state.info.name.to_string();
        report.url = self.url();
        report
    }
}

async fn launch(
    info: TransportInfo,
    url: String,
    kind: &'static str,
    options: ServerOptions,
    env: ServerEnvironment,
    OwnScope { interceptors, inherit }: OwnScope,
    drive: Drive,
) -> Result<ServerHandle, StartError> {
    if let Some(policy) = &options.on_failure
        && let Some(reason) = info.settles.refuses(policy)
    {
        return Err(StartError::FailurePolicy {
            of: "the server".to_owned(),
            transport: info.name.to_string(),
            reason,
        });
    }
    let tables = env.registry.watch(info.clone()).await?;
    let (ready, started) = oneshot::channel();
    let scope =
        Arc::new(ServerScope { app: Arc::clone(&env.app), transport: info.clone(), interceptors, inherit });
    let child = env.child.child(Arc::clone(&info.name), kind);
    let peers = Arc::new(Peers::default());
    let watched = Arc::clone(&peers);
    child.watch_in_flight(move || watched.in_flight());
    let transport = info.name.to_string();
    let state = Arc::new(ServerState {
        info,
        options,
        env,
        scope,
        status: StatusCell::default(),
        child,
        url: Mutex::new(url),
        native: Mutex::default(),
        ready: Mutex::new(Some(ready)),
        stop: watch::Sender::new(None),
        report: Mutex::default(),
        peers,
    });
    let actor = ServerActor { state: Arc::clone(&state), tables, drive, done: Arc::default() }.start();
    match started.await {
        Ok(Ok(())) => Ok(ServerHandle { state, actor }),
        Ok(Err(cause)) => Err(StartError::Transport { transport, cause }),
        Err(_) => Err(StartError::Stopped),
    }
}

/// The control plane of one server.
pub(crate) struct ServerActor {
    state: Arc<ServerState>,
    tables: Tables,
    drive: Drive,
    done: Arc<Notify>,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Stop {
    grace: Duration,
}

/// The driver ended; `Err` with a panic's text when it ended out of order.
#[derive(Message)]
#[rtype(result = "()")]
struct DriverEnded(Result<Result<(), SessionError>, String>);

impl Actor for ServerActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.spawn_driver(ctx);
    }
}

impl ServerActor {
    fn spawn_driver(&mut self, ctx: &mut Context<Self>) {
        let drive = (self.drive)(Arc::clone(&self.state), self.tables.clone());
        let address = ctx.address();
        actix_rt::spawn(async move {
            let ended = AssertUnwindSafe(drive).catch_unwind().await.map_err(panic_text);
            // The actor may be gone with its arbiter.
            address.do_send(DriverEnded(ended));
        });
    }
}

impl Handler<DriverEnded> for ServerActor {
    type Result = ();

    fn handle(&mut self, DriverEnded(ended): DriverEnded, ctx: &mut Self::Context) {
        let stopping = self.state.stop.borrow().is_some();
        match ended {
            Ok(Ok(())) => {
                self.state.status.set(ConnectionStatus::Closed);
                self.state.child.set_state(ChildState::Stopped);
            }
            Ok(Err(cause)) => {
                self.state.status.set(ConnectionStatus::Disconnected);
                self.state.child.failed_with(ChildState::Failed, &cause.to_string());
                if !self.state.ready(Err(cause.clone())) && !stopping {
                    self.state.give_up(&cause);
                }
            }
            Err(cause) if self.state.is_starting() => {
                self.state.status.set(ConnectionStatus::Disconnected);
                self.state.child.failed_with(ChildState::Failed, &cause);
                self.state.ready(Err(SessionError::fatal(format!("the transporter panicked: {cause}"))));
            }
            Err(cause) => {
                self.state.child.failed_with(ChildState::Restarting, &cause);
                let restarts = self.state.child.count_restart();
                self.state.env.events.emit(ServiceEvent::Restarted {
                    child: Arc::clone(self.state.child.name()),
                    restarts,
                    cause,
                });
                if !stopping {
                    let pause = self.state.options.retry_delay.min.max(Duration::from_millis(10));
                    ctx.run_later(pause, Self::spawn_driver);
                    return;
                }
            }
        }
        // A permit is kept for a stop that comes later.
        self.done.notify_one();
    }
}

impl Handler<Stop> for ServerActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, Stop { grace }: Stop, _ctx: &mut Self::Context) -> Self::Result {
        let grace = self.state.options.grace_period.map_or(grace, |own| own.min(grace));
        let deadline = Instant::now() + grace;
        self.state.stop.send_replace(Some(deadline));
        let done = Arc::clone(&self.done);
        Box::pin(async move {
            done.notified().await;
            // For whoever else waits for the same stop.
            done.notify_one();
        })
    }
}

/// Waits until the server is told to stop, and says until when it may finish.
async fn stopped(stop: &mut watch::Receiver<Option<Instant>>) -> Instant {
    match stop.wait_for(Option::is_some).await {
        Ok(deadline) => deadline.unwrap_or_else(Instant::now),
        Err(_) => Instant::now(),
    }
}

/// Drains a session until the deadline, then abandons what is left.
async fn drain<T>(control: &SessionControl, deadline: Instant, session: impl Future<Output = T>) -> T {
    control.drain();
    tokio::pin!(session);
    match tokio::time::timeout_at(deadline, &mut session).await {
        Ok(exit) => exit,
        Err(_) => {
            control.abandon();
            session.await
        }
    }
}

// === brokers ===

async fn serve_dialled<D: Dial>(
    dial: std::rc::Rc<D>,
    state: Arc<ServerState>,
    tables: Tables,
) -> Result<(), SessionError> {
    let mut stop = state.stop.subscribe();
    let mut backoff = Backoff::new(state.options.retry_delay);
    let mut failures = 0u32;
    state.status.set(ConnectionStatus::Connecting);
    let mut started = false;
    loop {
        let plan = {
            let table = Arc::clone(&tables.borrow());
            let mut subscriptions = Vec::new();
            for entry in table.iter() {
                match dial.check_pattern(&entry.pattern) {
                    Ok(()) => subscriptions.push(entry.subscription()),
                    Err(reason) if !started => {
                        return Err(SessionError::fatal(format!("pattern {}: {reason}", entry.route)));
                    }
                    // Registered since: the session tries to subscribe it, which is refused and reported.
                    Err(_) => {}
                }
            }
            SessionPlan { role: Role::Server, subscriptions }
        };
        let planned = plan.subscriptions.iter().map(|subscription| subscription.route.clone()).collect();
        let limit = state.options.connect_timeout;
        let dialled = tokio::select! {
            dialled = tokio::time::timeout(limit, dial.dial(plan)) => dialled,
            _ = stopped(&mut stop) => return Ok(()),
        };
        let error = match dialled
            .unwrap_or_else(|_| Err(SessionError::refused(format!("no connection within {limit:?}"))))
        {
            Ok(session) => {
                failures = 0;
                started = true;
                let mut fresh = tables.clone();
                // What changed while dialling is subscribed by the session.
                fresh.mark_changed();
                let exit = run_dialled(session, &state, fresh, planned, &mut stop).await;
                let lived = exit.lived;
                let cause = exit.cause.clone();
                state.count(exit);
                if stop.borrow().is_some() {
                    return Ok(());
                }
                if lived > backoff.current() {
                    backoff.reset();
                }
                cause.unwrap_or_else(|| SessionError::lost("the connection was closed"))
            }
            Err(error)
                if state.is_starting()
                    && (state.options.retry_attempts.is_none() || !state.options.retry_first) =>
            {
                return Err(error);
            }
            Err(error) => {
                failures += 1;
                error
            }
        };
        state.session_failed(None, error.clone());
        let spent = state.options.retry_attempts.is_some_and(|attempts| failures > attempts);
        if error.kind() == SessionErrorKind::Fatal || spent {
            return Err(error);
        }
        state.status.set(ConnectionStatus::Reconnecting);
        state.child.failed_with(ChildState::Restarting, &error.to_string());
        tokio::select! {
            () = tokio::time::sleep(backoff.next_pause()) => {}
            _ = stopped(&mut stop) => return Ok(()),
        }
        state.child.count_restart();
    }
}

async fn run_dialled<S: Session>(
    session: S,
    state: &Arc<ServerState>,
    tables: Tables,
    planned: HashSet<Route>,
    stop: &mut watch::Receiver<Option<Instant>>,
) -> SessionExit {
    let control = Arc::new(SessionControl::default());
    let _listed = Listed::new(&state.peers, &control);
    *state.native.lock() = session.native();
    state.status.set(ConnectionStatus::Connected);
    state.child.set_state(ChildState::Running);
    state.ready(Ok(()));
    // A task of its own, so that a panic in a transporter ends this session and nothing else.
    let env = state.session_env(tables, 0, planned, &control);
    let task = AssertUnwindSafe(run_session(session, env)).catch_unwind();
    tokio::pin!(task);
    let ended = tokio::select! {
        ended = &mut task => ended,
        deadline = stopped(stop) => {
            state.status.set(ConnectionStatus::Draining);
            drain(&control, deadline, task).await
        }
    };
    *state.native.lock() = None;
    ended.unwrap_or_else(|panic| SessionExit::panicked(&control, panic))
}

// === listeners ===

/// The sessions of a server, on all arbiters.
#[derive(Default)]
struct Peers {
    sessions: Mutex<Slab<Arc<SessionControl>>>,
    gone: Notify,
}

impl Peers {
    fn len(&self) -> usize {
        self.sessions.lock().len()
    }

    /// Requests and events in flight, over all of them.
    fn in_flight(&self) -> u64 {
        self.sessions.lock().iter().map(|(_, control)| control.in_flight()).sum()
    }
}

/// Keeps a peer listed for as long as its session runs.
struct Listed {
    peers: Arc<Peers>,
    key: usize,
}

impl Listed {
    fn new(peers: &Arc<Peers>, control: &Arc<SessionControl>) -> Self {
        let key = peers.sessions.lock().insert(Arc::clone(control));
        Self { peers: Arc::clone(peers), key }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.peers.sessions.lock().remove(self.key);
        self.peers.gone.notify_waiters();
    }
}

async fn serve_listening<L: Listen>(
    listen: std::rc::Rc<L>,
    state: Arc<ServerState>,
    tables: Tables,
) -> Result<(), SessionError> {
    let mut stop = state.stop.subscribe();
    let mut backoff = Backoff::new(state.options.retry_delay);
    let mut attempts = 0;
    let peers = Arc::clone(&state.peers);
    let deadline = loop {
        let bound = tokio::select! {
            bound = listen.bind() => bound,
            deadline = stopped(&mut stop) => break deadline,
        };
        let error = match bound {
            Ok(mut bound) => {
                *state.url.lock() = bound.local_url();
                *state.native.lock() = bound.native();
                state.status.set(ConnectionStatus::Connected);
                state.child.set_state(ChildState::Running);
                state.ready(Ok(()));
                tokio::select! {
                    error = accept_all(&mut bound, &state, &tables, &peers) => error,
                    deadline = stopped(&mut stop) => break deadline,
                }
            }
            Err(error) if state.is_starting() => return Err(error),
            Err(error) => error,
        };
        state.status.set(ConnectionStatus::Disconnected);
        *state.native.lock() = None;
        state.session_failed(None, error.clone());
        if attempts >= state.options.retry_attempts.unwrap_or(0) {
            // Who is connected is served until the service stops, which this asks for.
            state.give_up(&error);
            drain_peers(&peers, stopped(&mut stop).await).await;
            return Err(error);
        }
        attempts += 1;
        state.child.failed_with(ChildState::Restarting, &error.to_string());
        tokio::select! {
            () = tokio::time::sleep(backoff.next_pause()) => {}
            deadline = stopped(&mut stop) => break deadline,
        }
        state.child.count_restart();
    };
    // The listening socket is closed by now.
    state.status.set(ConnectionStatus::Draining);
    *state.native.lock() = None;
    drain_peers(&peers, deadline).await;
    Ok(())
}

async fn accept_all<A: Accept>(
    bound: &mut A,
    state: &Arc<ServerState>,
    tables: &Tables,
    peers: &Arc<Peers>,
) -> SessionError {
    loop {
        let peer = match bound.accept().await {
            Ok(peer) => peer,
            Err(error) => return error,
        };
        let open = peers.len();
        if open >= state.options.max_connections {
            state.env.events.emit(ServiceEvent::BoundHit {
                place: Arc::clone(&state.info.name),
                bound: "max_connections",
                limit: state.options.max_connections as u64,
                action: "the new connection was closed",
            });
            continue;
        }
        let control = Arc::new(SessionControl::default());
        let listed = Listed::new(peers, &control);
        let arbiter = state.env.arbiters.next();
        let (state, tables) = (Arc::clone(state), tables.clone());
        // Not waited for; its end is seen by its leaving the list.
        drop(
            state
                .env
                .arbiters
                .clone()
                .run_on(arbiter, move || serve_peer(peer, state, tables, arbiter, control, listed)),
        );
    }
}

async fn serve_peer<P: Open>(
    peer: P,
    state: Arc<ServerState>,
    tables: Tables,
    arbiter: usize,
    control: Arc<SessionControl>,
    listed: Listed,
) {
    let _listed = listed;
    let limit = state.options.handshake_timeout;
    let opening = AssertUnwindSafe(peer.open()).catch_unwind();
    let session = match tokio::time::timeout(limit, opening).await {
        Ok(Ok(Ok(session))) => session,
        Ok(Ok(Err(error))) => return state.session_failed(None, error),
        Ok(Err(panic)) => {
            let error = SessionError::lost(format!("the session panicked: {}", panic_text(panic)));
            return state.session_failed(None, error);
        }
        Err(_) => {
            return state
                .session_failed(None, SessionError::refused(format!("no handshake within {limit:?}")));
        }
    };
    let name = session.peer();
    let env = state.session_env(tables, arbiter, HashSet::new(), &control);
    let ended = AssertUnwindSafe(run_session(session, env)).catch_unwind().await;
    let panicked = ended.is_err();
    let exit = ended.unwrap_or_else(|panic| SessionExit::panicked(&control, panic));
    if let Some(error) = &exit.cause
        && (panicked || error.kind() != SessionErrorKind::Lost)
    {
        state.session_failed(Some(name), error.clone());
    }
    state.count(exit);
}

async fn drain_peers(peers: &Peers, deadline: Instant) {
    let wait = async {
        loop {
            let gone = peers.gone.notified();
            if peers.len() == 0 {
                return;
            }
            gone.await;
        }
    };
    let each = |tell: fn(&SessionControl)| {
        let sessions = peers.sessions.lock();
        sessions.iter().for_each(|(_, control)| tell(control));
    };
    each(SessionControl::drain);
    tokio::pin!(wait);
    if tokio::time::timeout_at(deadline, &mut wait).await.is_err() {
        each(SessionControl::abandon);
        // Abandoned sessions flush what they have; a peer that does not read is not waited for.
        if tokio::time::timeout(Duration::from_secs(3), wait).await.is_err() {
            tracing::warn!(target: "martlet", peers = peers.len(), "peers did not close after the grace period");
        }
    }
}
