// SPDX-License-Identifier: MIT OR Apache-2.0
//! The microservice: handlers, transporters, clients and state, started and stopped in order.
//!
//! ```text
//! Microservice              start: registry, handlers, clients, servers; stop: in reverse
//! ├─ RegistryActor          owns the routes
//! ├─ HandlerActor ×n        replicas, rebuilt from their factory
//! ├─ ClientActor ×n         one per declared client
//! └─ ServerActor ×n         one per transporter ── session tasks
//! ```

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, watch};

use crate::arbiters::Arbiters;
use crate::client::ClientProxy;
use crate::error::StartError;
use crate::events::{EventBus, ServiceEvent};
use crate::handler::{Controller, EscalateFn, HandlerGroup};
use crate::interceptor::{Interceptor, Interceptors};
use crate::registry::Registry;
use crate::request::AppData;
use crate::route::HandlerReport;
use crate::server::{Server, ServerEnvironment, ServerHandle, ServerReport};
use crate::session::Abandoned;
use crate::supervise::{Child, ChildState, TreeReport};

/// How long a stopping service waits for what it has taken: NestJS's `gracePeriod` default.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// What supervised families have to stop in, even when the grace period is over.
const LEAST_FAMILY_GRACE: Duration = Duration::from_millis(100);

/// Composes a service.
#[must_use = "a service does nothing until it is started or run"]
pub struct Microservice {
    name: Arc<str>,
    threads: Threads,
    groups: Vec<HandlerGroup>,
    servers: Vec<Server>,
    app: AppData,
    interceptors: Interceptors,
    events: EventBus,
    grace: Duration,
}

enum Threads {
    Current,
    Pool(Option<usize>),
}

impl fmt::Debug for Microservice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Microservice")
            .field("name", &self.name)
            .field("groups", &self.groups)
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

impl Default for Microservice {
    fn default() -> Self {
        Self::new()
    }
}

impl Microservice {
    /// A service without handlers and transporters.
    pub fn new() -> Self {
        Self {
            name: Arc::from("service"),
            threads: Threads::Pool(None),
            groups: Vec::new(),
            servers: Vec::new(),
            app: AppData::default(),
            interceptors: Interceptors::new(),
            events: EventBus::default(),
            grace: DEFAULT_GRACE,
        }
    }

    /// Names the service in reports. Default `service`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Works on `threads` arbiters of its own. Default: one per core.
    pub fn arbiters(mut self, threads: usize) -> Self {
        self.threads = Threads::Pool(Some(threads));
        self
    }

    /// Works on the arbiter it is started on, and starts no thread: for embedding and for tests.
    pub fn on_current_arbiter(mut self) -> Self {
        self.threads = Threads::Current;
        self
    }

    /// Adds the handlers of a controller; `factory` builds its state once per arbiter, and again after a
    /// panic. For a single instance, or other settings: [`handlers`](Self::handlers) with
    /// [`HandlerGroup::controller`].
    pub fn controller<C: Controller>(self, factory: impl Fn() -> C + Send + Sync + 'static) -> Self {
        self.handlers(HandlerGroup::controller(factory))
    }

    /// Adds a group of handlers.
    pub fn handlers(mut self, group: HandlerGroup) -> Self {
        self.groups.push(group);
        self
    }

    /// Serves on one more transporter.
    pub fn server(mut self, server: impl Into<Server>) -> Self {
        self.servers.push(server.into());
        self
    }

    /// Declares a client that handlers get by this name. It connects at its first use and is closed with
    /// the service.
    pub fn client(mut self, name: impl Into<String>, client: impl Into<ClientProxy>) -> Self {
        self.app.clients.insert(name.into(), client.into());
        self
    }

    /// Declares several clients, a name each; see [`client`](Self::client).
    pub fn clients<N, C>(mut self, clients: impl IntoIterator<Item = (N, C)>) -> Self
    where
        N: Into<String>,
        C: Into<ClientProxy>,
    {
        self.app.clients.extend(clients.into_iter().map(|(name, client)| (name.into(), client.into())));
        self
    }

    /// Shares a value with every handler, by its type.
    pub fn state<T: Send + Sync + 'static>(mut self, value: T) -> Self {
        self.app.state.insert(value);
        self
    }

    /// Puts an interceptor around every handler, inside those added before.
    pub fn interceptor(mut self, interceptor: Arc<dyn Interceptor>) -> Self {
        self.interceptors.push(interceptor);
        self
    }

    /// Calls `callback` for everything the service reports.
    pub fn on(self, callback: impl Fn(&ServiceEvent) + Send + Sync + 'static) -> Self {
        self.events.on(callback);
        self
    }

    /// How long [`run`](Self::run) lets work finish after a signal. Default 10 s.
    pub fn grace_period(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Starts the service; ready when every transporter accepts work. Must be called inside an actix
    /// system.
    ///
    /// # Errors
    ///
    /// The first thing that could not start; what had started is stopped again.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropping the future leaves what had started running until the system ends.
    pub async fn start(self) -> Result<RunningService, StartError> {
        let arbiters = match self.threads {
            Threads::Current => Arbiters::current()?,
            Threads::Pool(Some(threads)) => Arbiters::pool(threads)?,
            Threads::Pool(None) => {
                Arbiters::pool(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))?
            }
        };
        if cfg!(panic = "abort") {
            tracing::warn!(target: "martlet", "built with panic = \"abort\": a panic ends the process, supervision cannot help");
        }
        let root = Child::root(self.name, "service");
        let escalation = Arc::new(Escalated::default());
        let escalate = {
            let escalation = Arc::clone(&escalation);
            EscalateFn(Arc::new(move |cause| escalation.raise(cause)))
        };
        let registry_child = root.child("registry", "registry");
        let families = Arc::new(watch::Sender::new(()));
        let registry = Registry::start(
            arbiters.clone(),
            self.events.clone(),
            registry_child.clone(),
            self.interceptors.into(),
            escalate.clone(),
            Arc::clone(&families),
        );
        let clients = self.app.clients.iter().map(|(name, client)| {
            let child = root.child(name.as_str(), "client");
            client.watch_in(&child);
            child
        });
        let clients = clients.collect();
        let app = Arc::new(self.app);
        let service = RunningService {
            inner: Arc::new(Inner {
                registry,
                registry_child,
                families,
                clients,
                arbiters,
                events: self.events,
                app,
                root,
                serving: Mutex::default(),
                grace: self.grace,
                escalation,
                escalate,
                stopped: watch::Sender::new(None),
                stopping: tokio::sync::Mutex::new(()),
            }),
        };
        if let Err(error) = service.begin(self.groups, self.servers).await {
            service.stop(Duration::ZERO).await;
            return Err(error);
        }
        Ok(service)
    }

    /// Starts the service, runs it until SIGINT or SIGTERM (or an escalation), drains it and says how it
    /// went.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn run(self) -> Result<ServiceReport, StartError> {
        if self.servers.is_empty() {
            tracing::warn!(target: "martlet", "the service has no transporter and cannot be reached: add one with `server`");
        }
        let service = self.start().await?;
        service.run_until(shutdown_signal()).await
    }
}

/// Waits for SIGINT or SIGTERM and gives its name. From this call on, not only from its first poll, they do
/// not end the process: call it before you say that the service is ready.
///
/// # Panics
///
/// Outside of an actix system.
pub fn shutdown_signal() -> impl Future<Output = &'static str> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind, name: &'static str| match signal(kind) {
            Ok(signal) => Some(signal),
            Err(error) => {
                tracing::warn!(target: "martlet", %error, "cannot listen for {name}");
                None
            }
        };
        let interrupt = listen(SignalKind::interrupt(), "SIGINT");
        let terminate = listen(SignalKind::terminate(), "SIGTERM");
        async move {
            let wait = async |signal: Option<tokio::signal::unix::Signal>| {
                let received = match signal {
                    Some(mut signal) => signal.recv().await,
                    None => None,
                };
                if received.is_none() {
                    std::future::pending().await
                }
            };
            tokio::select! {
                () = wait(interrupt) => "SIGINT",
                () = wait(terminate) => "SIGTERM",
            }
        }
    }
    #[cfg(not(unix))]
    async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        "SIGINT"
    }
}

/// Why the service must stop, if a supervisor said so.
#[derive(Default)]
struct Escalated {
    cause: Mutex<Option<String>>,
    raised: Notify,
}

impl Escalated {
    fn raise(&self, cause: String) {
        self.cause.lock().get_or_insert(cause);
        self.raised.notify_one();
    }
}

/// A running service. Clones are the same service; dropping them does not stop it.
#[derive(Clone)]
pub struct RunningService {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    registry_child: Child,
    /// Supervisors' families at work are subscribed.
    families: Arc<watch::Sender<()>>,
    /// The clients' places in the tree.
    clients: Vec<Child>,
    arbiters: Arbiters,
    events: EventBus,
    app: Arc<AppData>,
    root: Child,
    serving: Mutex<Serving>,
    grace: Duration,
    escalation: Arc<Escalated>,
    escalate: EscalateFn,
    stopped: watch::Sender<Option<Arc<ServiceReport>>>,
    stopping: tokio::sync::Mutex<()>,
}

/// The transporters, and whether a stop has begun.
#[derive(Default)]
struct Serving {
    servers: Vec<ServerHandle>,
    over: bool,
}

impl fmt::Debug for RunningService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningService").field("servers", &self.servers()).finish_non_exhaustive()
    }
}

/// How a service ended.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct ServiceReport {
    /// What ended it: a signal's name, `stop`, or what a supervisor that gave up said.
    pub cause: String,
    /// Whether everything that was taken was finished (or its caller had gone), and no supervisor gave up.
    pub clean: bool,
    /// What each transporter did.
    pub servers: Vec<ServerReport>,
}

impl ServiceReport {
    /// Requests and events that were finished, over all transporters.
    pub fn done(&self) -> u64 {
        self.servers.iter().map(|server| server.done).sum()
    }

    /// Requests and events that were given back to a broker for another consumer.
    pub fn handed_back(&self) -> u64 {
        self.servers.iter().map(|server| server.handed_back).sum()
    }

    /// Requests and events whose connection was lost before they were finished.
    pub fn lost(&self) -> u64 {
        self.servers.iter().map(|server| server.lost).sum()
    }

    /// Requests and events that were not finished when the grace period ended.
    pub fn abandoned(&self) -> impl Iterator<Item = &Abandoned> {
        self.servers.iter().flat_map(|server| &server.abandoned)
    }
}

impl RunningService {
    async fn begin(&self, groups: Vec<HandlerGroup>, servers: Vec<Server>) -> Result<(), StartError> {
        if !groups.is_empty() {
            self.inner.registry.register(groups).await?;
        }
        for server in servers {
            self.serve(server).await?;
        }
        Ok(())
    }

    /// Serves on one more transporter.
    ///
    /// # Errors
    ///
    /// When it cannot start; [`StartError::Stopped`] when the service stops or has stopped.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropping the future may leave the transporter running until the system ends.
    pub async fn serve(&self, server: Server) -> Result<ServerHandle, StartError> {
        let env = ServerEnvironment {
            registry: self.inner.registry.clone(),
            arbiters: self.inner.arbiters.clone(),
            events: self.inner.events.clone(),
            app: Arc::clone(&self.inner.app),
            child: self.inner.root.clone(),
            escalate: self.inner.escalate.clone(),
        };
        if self.inner.serving.lock().over {
            return Err(StartError::Stopped);
        }
        let handle = server.start(env).await?;
        let over = {
            let mut serving = self.inner.serving.lock();
            serving.servers.push(handle.clone());
            serving.over
        };
        if over {
            // A stop that began meanwhile does not know it.
            handle.stop(Duration::ZERO).await;
            return Err(StartError::Stopped);
        }
        Ok(handle)
    }

    /// Registers handlers and takes them back, at any time, from anywhere.
    pub fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    /// The transporters it serves on.
    pub fn servers(&self) -> Vec<ServerHandle> {
        self.inner.serving.lock().servers.clone()
    }

    /// The URL of the first transporter, with the real port.
    pub fn url(&self) -> String {
        self.servers().first().map(ServerHandle::url).unwrap_or_default()
    }

    /// A client by its declared name.
    ///
    /// # Errors
    ///
    /// [`StartError::UnknownClient`] names those there are.
    pub fn client(&self, name: &str) -> Result<ClientProxy, StartError> {
        self.inner.app.clients.get(name).cloned().ok_or_else(|| {
            let mut declared: Vec<_> = self.inner.app.clients.keys().cloned().collect();
            declared.sort();
            let declared = if declared.is_empty() { "none".to_owned() } else { declared.join(", ") };
            StartError::UnknownClient { name: name.to_owned(), declared }
        })
    }

    /// Where the service reports.
    pub fn events(&self) -> &EventBus {
        &self.inner.events
    }

    /// The arbiters it works on.
    pub fn arbiters(&self) -> &Arbiters {
        &self.inner.arbiters
    }

    /// The supervision tree, as a value: who runs, restarts, last cause, in flight. Serialises to JSON.
    pub fn tree(&self) -> TreeReport {
        self.inner.root.report()
    }

    /// Counters of every handler.
    ///
    /// # Errors
    ///
    /// [`StartError::Stopped`] when the service has stopped.
    pub async fn handler_reports(&self) -> Result<Vec<HandlerReport>, StartError> {
        self.inner.registry.report().await
    }

    /// Runs until `shutdown` completes or a supervisor escalates, then drains with the service's grace
    /// period.
    ///
    /// # Errors
    ///
    /// None today; the type leaves room.
    pub async fn run_until<C: Into<String>>(
        &self,
        shutdown: impl Future<Output = C>,
    ) -> Result<ServiceReport, StartError> {
        let mut stopped = self.inner.stopped.subscribe();
        let ended = async {
            tokio::select! {
                cause = shutdown => Err(cause.into()),
                () = self.inner.escalation.raised.notified() => Err("escalation".to_owned()),
                report = stopped.wait_for(Option::is_some) => match report {
                    // Somebody else has stopped it.
                    Ok(report) => report.as_deref().cloned().ok_or_else(|| "stop".to_owned()),
                    Err(_) => Err("stop".to_owned()),
                },
            }
        };
        // An actix system polls its main future, which this mostly is, whenever anything on its thread is woken: with
        // every request. In here it is polled when it is woken itself.
        let mut ended = FuturesUnordered::from_iter([ended]);
        match ended.select_next_some().await {
            Ok(report) => Ok(report),
            Err(cause) => Ok(self.finish(cause, self.inner.grace).await),
        }
    }

    /// Stops the service in order: the transporters stop taking work, what was taken finishes (or the
    /// grace period ends), replies are flushed, sessions closed; then the clients, then the handlers (the children of
    /// a [`SupervisorGroup`](crate::handler::SupervisorGroup) one by one, in reverse order), then the threads.
    /// A second stop waits for the first.
    ///
    /// # Cancel safety
    ///
    /// A stop that was begun goes on only while it is polled; call it again to complete it.
    pub async fn stop(&self, grace: Duration) -> ServiceReport {
        self.finish("stop".to_owned(), grace).await
    }

    async fn finish(&self, cause: String, grace: Duration) -> ServiceReport {
        let _one_at_a_time = self.inner.stopping.lock().await;
        if let Some(report) = self.inner.stopped.borrow().as_deref() {
            return report.clone();
        }
        let began = tokio::time::Instant::now();
        let servers = {
            let mut serving = self.inner.serving.lock();
            serving.over = true;
            serving.servers.clone()
        };
        let servers = futures::future::join_all(servers.iter().map(|server| server.stop(grace))).await;
        for client in self.inner.app.clients.values() {
            client.close().await;
        }
        self.inner.clients.iter().for_each(|child| child.set_state(ChildState::Stopped));
        self.inner.registry.release().await;
        // Supervisors stop their children in order; what was abandoned may still hold them.
        let left = grace.saturating_sub(began.elapsed()).max(LEAST_FAMILY_GRACE);
        if tokio::time::timeout(left, self.inner.families.closed()).await.is_err() {
            tracing::warn!(target: "martlet", "supervised actors had not stopped within {left:?} and were dropped");
        }
        self.inner.registry_child.set_state(ChildState::Stopped);
        self.inner.root.set_state(ChildState::Stopped);
        self.inner.arbiters.stop().await;
        for server in servers.iter().filter(|server| !server.abandoned.is_empty()) {
            self.inner.events.emit(ServiceEvent::Abandoned {
                transport: Arc::from(server.transport.as_str()),
                count: server.abandoned.len() as u64,
            });
        }
        let escalated = self.inner.escalation.cause.lock().clone();
        let clean = escalated.is_none() && servers.iter().all(|server| server.abandoned.is_empty());
        let report = ServiceReport { cause: escalated.unwrap_or(cause), clean, servers };
        self.inner.stopped.send_replace(Some(Arc::new(report.clone())));
        report
    }
}
