// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers: groups of endpoints that share one state, and the routed actor that runs them.
//!
//! ```text
//! RegistryActor ── HandlerActor (one per group and arbiter, or a single one)
//!                    └─ endpoints, built by the group's factory
//! ```
//!
//! A session calls the replica on its own arbiter in place; to one on another arbiter it sends its requests in batches.
//! The handler's future is polled once in place, inside the panic boundary; only one that is not ready becomes a task of
//! its own. A panic answers the request with an error and rebuilds the replica from its factory.

use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;

use actix::{Actor, Addr, Context, Handler, Message};
use futures::future::LocalBoxFuture;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::error::RpcError;
use crate::events::EventBus;
use crate::forward::forward;
use crate::interceptor::{Interceptor, Interceptors};
use crate::pattern::Pattern;
use crate::payload::{Format, Payload};
use crate::reply::{HandlerResult, IntoReply, Reply, Streaming, TryStreaming};
use crate::request::{Request, bad_payload};
use crate::route::{HandlerInfo, HandlerKind};
use crate::settlement::FailurePolicy;
use crate::supervise::{Child, ChildSpec, Escalation, Family, RestartIntensity, Supervisable, Supervisor};
use crate::transport::TransportId;

/// How a call of an endpoint goes on.
pub enum Outcome {
    /// It is done.
    Ready(HandlerResult),
    /// It must be waited for.
    Future(LocalBoxFuture<'static, HandlerResult>),
    /// The same, and it has been polled once, in vain.
    Started(LocalBoxFuture<'static, HandlerResult>),
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(result) => f.debug_tuple("Ready").field(result).finish(),
            Self::Future(_) => f.write_str("Future"),
            Self::Started(_) => f.write_str("Started"),
        }
    }
}

impl Outcome {
    /// Boxes a handler's future.
    pub fn future(future: impl Future<Output = HandlerResult> + 'static) -> Self {
        Self::Future(Box::pin(future))
    }
}

/// Something that can be called with a request; it lives on one arbiter and need not be `Send`.
pub trait Endpoint: 'static {
    /// Handles a request.
    fn call(&self, request: Request) -> Outcome;

    /// The same. An endpoint that answers at once with one plain value (or with none) may leave it in `place`, which is
    /// empty before, and return `None`: a value is large, and this way it is written where it is sent from. Default:
    /// what [`call`](Self::call) returns.
    fn call_in_place(&self, request: Request, _place: &mut Option<Payload>) -> Option<Outcome> {
        Some(self.call(request))
    }
}

impl<F: Fn(Request) -> Outcome + 'static> Endpoint for F {
    fn call(&self, request: Request) -> Outcome {
        self(request)
    }
}

/// Where a replica is being built, and for whom.
#[derive(Debug, Clone)]
pub struct ReplicaContext {
    /// The number of the arbiter in the service's pool.
    pub arbiter: usize,
    /// The replica's place in the supervision tree.
    pub child: Child,
    /// Where it reports.
    pub events: EventBus,
    pub(crate) escalate: EscalateFn,
    /// Families are counted by their subscriptions, so that a stop can wait for them.
    pub(crate) families: Arc<watch::Sender<()>>,
}

#[derive(Clone)]
pub(crate) struct EscalateFn(pub(crate) Arc<dyn Fn(String) + Send + Sync>);

impl fmt::Debug for EscalateFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EscalateFn")
    }
}

pub(crate) type EndpointFactory = Arc<dyn Fn(&ReplicaContext) -> Vec<Box<dyn Endpoint>> + Send + Sync>;

/// Where the replicas of a group live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// One on each arbiter: a request is served where it arrived. The default.
    #[default]
    PerArbiter,
    /// A single one, for state that must be one; requests from other arbiters pay a thread hop.
    Singleton,
}

/// How a group's replicas are supervised and bounded.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct HandlerSupervision {
    /// Rebuilds after panics before the replica gives up; `None` (the default) for no limit: a panic in
    /// one request does not take the handler away from the others. (Handler actors have a limit by
    /// default, see [`ChildSpec::intensity`].)
    pub intensity: Option<RestartIntensity>,
    /// What happens when a replica gives up. Default: its routes answer an error, the rest goes on.
    pub escalation: Escalation,
    /// A message (same route, same payload) that made the handler panic this many times is refused. Of an actor, panics in
    /// its `handle` and in the futures that it answers with count, not those in futures that it polls itself.
    /// Default 3; 0 turns it off.
    pub poison_after: u32,
    /// Requests that wait for a free place of [`HandlerInfo::concurrency`], per handler and replica.
    /// Default 1024; more are answered with an overload error.
    pub max_waiting: usize,
    /// Requests that may wait in the replica's mailbox, for each session on another arbiter that sends there (those on
    /// its own call it without: `concurrency` and `max_waiting` bound them). Default 65,536;
    /// further ones are answered with an overload error.
    pub mailbox_capacity: usize,
}

impl Default for HandlerSupervision {
    fn default() -> Self {
        Self {
            intensity: None,
            escalation: Escalation::Isolate,
            poison_after: 3,
            max_waiting: 1024,
            mailbox_capacity: 65_536,
        }
    }
}

/// How many requests a session sends to a replica as one message.
const MAX_BATCH: usize = 32;

impl HandlerSupervision {
    /// How many requests one message to the replica holds at the most.
    pub(crate) fn batch_size(&self) -> usize {
        self.mailbox_capacity.clamp(1, MAX_BATCH)
    }

    /// How many such messages its mailbox holds.
    pub(crate) fn mailbox_batches(&self) -> usize {
        (self.mailbox_capacity / self.batch_size()).max(1)
    }
}

/// One or more handlers that share one state: what is registered.
#[derive(Clone)]
pub struct HandlerGroup {
    pub(crate) name: Arc<str>,
    pub(crate) handlers: Vec<(HandlerInfo, Interceptors)>,
    pub(crate) factory: EndpointFactory,
    pub(crate) placement: Placement,
    pub(crate) interceptors: Interceptors,
    pub(crate) supervision: HandlerSupervision,
}

impl fmt::Debug for HandlerGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerGroup")
            .field("name", &self.name)
            .field("handlers", &self.handlers.iter().map(|(info, _)| info).collect::<Vec<_>>())
            .field("placement", &self.placement)
            .finish_non_exhaustive()
    }
}

impl HandlerGroup {
    /// A group from its parts; `factory` builds one endpoint for each handler, in order.
    pub fn from_parts(
        name: impl Into<Arc<str>>,
        handlers: Vec<HandlerInfo>,
        factory: impl Fn(&ReplicaContext) -> Vec<Box<dyn Endpoint>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            handlers: handlers.into_iter().map(|info| (info, Interceptors::new())).collect(),
            factory: Arc::new(factory),
            placement: Placement::default(),
            interceptors: Interceptors::new(),
            supervision: HandlerSupervision::default(),
        }
    }

    /// A group of the handlers of a controller; `factory` builds its state, once per replica and again
    /// after a panic.
    pub fn controller<C: Controller>(factory: impl Fn() -> C + Send + Sync + 'static) -> Self {
        let defs = C::handlers();
        let name = C::name();
        let handlers = defs.iter().map(|def| (def.info.clone(), def.interceptors.clone())).collect();
        let endpoints: Vec<_> = defs.iter().map(|def| def.endpoint).collect();
        Self {
            name: Arc::from(name),
            handlers,
            factory: Arc::new(move |_| {
                let controller = Rc::new(factory());
                endpoints.iter().map(|endpoint| endpoint(&controller)).collect()
            }),
            placement: Placement::default(),
            interceptors: C::interceptors(),
            supervision: HandlerSupervision::default(),
        }
    }

    /// Keeps a single replica, for state that must be one. Default: one per arbiter.
    #[must_use]
    pub fn singleton(mut self) -> Self {
        self.placement = Placement::Singleton;
        self
    }

    /// Limits every handler of the group to one transporter. Default: all.
    #[must_use]
    pub fn transport(mut self, transport: TransportId) -> Self {
        for (info, _) in &mut self.handlers {
            info.transport = Some(transport);
        }
        self
    }

    /// Sets an extra of every handler of the group (NestJS's `extras`): NATS reads `queue`.
    #[must_use]
    pub fn extra(mut self, key: impl Into<String>, value: impl Into<serde_json::Value>) -> Self {
        let (key, value) = (key.into(), value.into());
        for (info, _) in &mut self.handlers {
            Arc::make_mut(&mut info.extras).insert(key.clone(), value.clone());
        }
        self
    }

    /// What becomes of a message for which a handler of the group failed. Refused when the group is registered with
    /// a service one of whose transporters cannot honour it (see [`transport`](Self::transport)). Default: what the
    /// server says.
    #[must_use]
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        for (info, _) in &mut self.handlers {
            info.on_failure = Some(policy);
        }
        self
    }

    /// Bounds how many requests of each handler run at once on one replica; further ones wait, up to
    /// `max_waiting`. 1 serialises. Default: no bound of its own.
    #[must_use]
    pub fn concurrency(mut self, max: usize) -> Self {
        for (info, _) in &mut self.handlers {
            info.concurrency = Some(max.max(1));
        }
        self
    }

    /// Adds an interceptor around every handler of the group, inside those added before.
    #[must_use]
    pub fn interceptor(mut self, interceptor: Arc<dyn Interceptor>) -> Self {
        self.interceptors.push(interceptor);
        self
    }

    /// Names the group in reports.
    #[must_use]
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        if let [(info, _)] = self.handlers.as_mut_slice() {
            info.name = Arc::clone(&self.name);
        }
        self
    }

    /// Changes supervision and bounds.
    #[must_use]
    pub fn supervision(mut self, change: impl FnOnce(&mut HandlerSupervision)) -> Self {
        change(&mut self.supervision);
        self
    }

    /// The handlers of the group.
    pub fn handlers(&self) -> impl Iterator<Item = &HandlerInfo> {
        self.handlers.iter().map(|(info, _)| info)
    }
}

// === controllers ===

/// A set of handlers on one state: what `#[controller]` implements.
pub trait Controller: Sized + 'static {
    /// A name for reports.
    fn name() -> &'static str {
        std::any::type_name::<Self>()
    }

    /// Interceptors around every handler.
    fn interceptors() -> Interceptors {
        Interceptors::new()
    }

    /// The handlers.
    fn handlers() -> Vec<HandlerDef<Self>>;
}

/// One handler of a controller.
pub struct HandlerDef<C> {
    /// What is known of it.
    pub info: HandlerInfo,
    /// Interceptors around it, inside the controller's.
    pub interceptors: Interceptors,
    /// Makes what calls it on a controller, as [`endpoint`](crate::function::endpoint) does from an async function.
    pub endpoint: fn(&Rc<C>) -> Box<dyn Endpoint>,
}

impl<C> fmt::Debug for HandlerDef<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerDef").field("info", &self.info).finish_non_exhaustive()
    }
}

// === handler actors ===

/// A handler actor: an actix actor of the user's, started under supervision, whose messages are routed.
///
/// # Examples
///
/// ```
/// use actix::prelude::*;
/// use martlet_core::{ActorGroup, RpcError};
///
/// #[derive(serde::Deserialize, Message)]
/// #[rtype(result = "Result<u64, RpcError>")]
/// struct Add(u64);
///
/// struct Total(u64);
/// impl Actor for Total { type Context = Context<Self>; }
/// impl Supervised for Total {
///     fn restarting(&mut self, _: &mut Context<Self>) {
///         if let Some(fresh) = martlet_core::supervise::rebuilt() { *self = fresh; }
///     }
/// }
/// impl Handler<Add> for Total {
///     type Result = Result<u64, RpcError>;
///     fn handle(&mut self, add: Add, _: &mut Context<Self>) -> Self::Result {
///         self.0 += add.0;
///         Ok(self.0)
///     }
/// }
///
/// let group = ActorGroup::new(|| Total(0)).message::<Add>("add").build().singleton();
/// ```
pub struct ActorGroup<A: Actor> {
    spec: SpecFn<A>,
    handlers: Vec<HandlerInfo>,
    forwards: Vec<Forward<A>>,
}

type SpecFn<A> = Arc<dyn Fn(&ReplicaContext) -> ChildSpec<A> + Send + Sync>;

type Forward<A> = Arc<dyn Fn(Addr<A>) -> Box<dyn Endpoint> + Send + Sync>;

impl<A: Actor> fmt::Debug for ActorGroup<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActorGroup").field("handlers", &self.handlers).finish_non_exhaustive()
    }
}

impl<A: Supervisable> ActorGroup<A> {
    /// An actor built by `factory`, once per replica and again after a panic.
    pub fn new(factory: impl Fn() -> A + Send + Sync + 'static) -> Self {
        Self::from_spec(ChildSpec::new(factory))
    }

    /// An actor with a child specification of one's own.
    pub fn from_spec(spec: ChildSpec<A>) -> Self {
        Self::supervising(move |_| spec.clone())
    }

    /// An actor that knows its own place, so that it can start others there: with [`ChildSpec::start`], whose
    /// `on_give_up` leaves to it what follows, or as a [`Supervisor`]'s family. For children that are known beforehand
    /// there is [`SupervisorGroup`]. Children end with the parent's state that holds their addresses or their family.
    ///
    /// # Examples
    ///
    /// ```
    /// use actix::prelude::*;
    /// use martlet_core::handler::ReplicaContext;
    /// use martlet_core::supervise::ChildSpec;
    /// use martlet_core::{ActorGroup, RpcError};
    /// # #[derive(Default)]
    /// # struct Worker;
    /// # impl Actor for Worker { type Context = Context<Self>; }
    /// # impl Supervised for Worker {}
    /// # #[derive(serde::Deserialize, Message)]
    /// # #[rtype(result = "Result<u64, RpcError>")]
    /// # struct Work(u64);
    ///
    /// #[derive(Message)]
    /// #[rtype(result = "()")]
    /// struct GaveUp(String);
    ///
    /// struct Parent { place: ReplicaContext, worker: Option<Addr<Worker>> }
    ///
    /// impl Actor for Parent {
    ///     type Context = Context<Self>;
    ///     fn started(&mut self, ctx: &mut Context<Self>) {
    ///         let parent = ctx.address().downgrade();
    ///         let place = self.place.child.child("worker", "actor");
    ///         self.worker = Some(ChildSpec::new(Worker::default).start(place, self.place.events.clone(), move |cause| {
    ///             if let Some(parent) = parent.upgrade() {
    ///                 let _ = parent.try_send(GaveUp(cause));
    ///             }
    ///         }));
    ///     }
    /// }
    ///
    /// impl Handler<GaveUp> for Parent {
    ///     type Result = ();
    ///     fn handle(&mut self, GaveUp(cause): GaveUp, _: &mut Context<Self>) {
    ///         panic!("the worker gave up: {cause}");
    ///     }
    /// }
    /// # impl Supervised for Parent {
    /// #     fn restarting(&mut self, _: &mut Context<Self>) {
    /// #         if let Some(fresh) = martlet_core::supervise::rebuilt() { *self = fresh; }
    /// #     }
    /// # }
    /// # impl Handler<Work> for Parent {
    /// #     type Result = Result<u64, RpcError>;
    /// #     fn handle(&mut self, work: Work, _: &mut Context<Self>) -> Self::Result { Ok(work.0) }
    /// # }
    ///
    /// let group = ActorGroup::supervising(|place| {
    ///     let place = place.clone();
    ///     ChildSpec::new(move || Parent { place: place.clone(), worker: None })
    /// });
    /// let group = group.message::<Work>("work").build();
    /// ```
    pub fn supervising(spec: impl Fn(&ReplicaContext) -> ChildSpec<A> + Send + Sync + 'static) -> Self {
        Self { spec: Arc::new(spec), handlers: Vec::new(), forwards: Vec::new() }
    }

    /// Routes a pattern to the actor's handler for `M`; the payload is read as `M`, the result is the
    /// reply.
    #[track_caller]
    #[must_use]
    pub fn message<M>(self, pattern: impl Into<Pattern>) -> Self
    where
        A: Handler<M>,
        M: Message + DeserializeOwned + Send + 'static,
        M::Result: IntoOutcome + Send,
        <A as Actor>::Context: actix::dev::ToEnvelope<A, M>,
    {
        self.add::<M>(HandlerKind::Message, pattern.into(), |request| request.data().map_err(bad_payload))
    }

    /// Routes an event pattern to the actor's handler for `M`.
    #[track_caller]
    #[must_use]
    pub fn event<M>(self, pattern: impl Into<Pattern>) -> Self
    where
        A: Handler<M>,
        M: Message + DeserializeOwned + Send + 'static,
        M::Result: IntoOutcome + Send,
        <A as Actor>::Context: actix::dev::ToEnvelope<A, M>,
    {
        self.add::<M>(HandlerKind::Event, pattern.into(), |request| request.data().map_err(bad_payload))
    }

    /// Routes a pattern to the actor's handler for `M`, which `make` builds from the whole request.
    #[track_caller]
    #[must_use]
    pub fn message_with<M>(
        self,
        pattern: impl Into<Pattern>,
        make: impl Fn(&Request) -> Result<M, RpcError> + Clone + Send + Sync + 'static,
    ) -> Self
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: IntoOutcome + Send,
        <A as Actor>::Context: actix::dev::ToEnvelope<A, M>,
    {
        self.add::<M>(HandlerKind::Message, pattern.into(), make)
    }

    #[track_caller]
    fn add<M>(
        mut self,
        kind: HandlerKind,
        pattern: Pattern,
        make: impl Fn(&Request) -> Result<M, RpcError> + Clone + Send + Sync + 'static,
    ) -> Self
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: IntoOutcome + Send,
        <A as Actor>::Context: actix::dev::ToEnvelope<A, M>,
    {
        let name = format!("{}::{}", short_name::<A>(), short_name::<M>());
        self.handlers.push(HandlerInfo::new(name, kind, pattern));
        self.forwards.push(Arc::new(move |address: Addr<A>| {
            Box::new(forward(address.recipient(), make.clone())) as Box<dyn Endpoint>
        }));
        self
    }

    /// The group to register.
    pub fn build(self) -> HandlerGroup {
        let Self { spec, handlers, forwards } = self;
        HandlerGroup::from_parts(short_name::<A>(), handlers, move |context| {
            let child = context.child.child(short_name::<A>(), "actor");
            let escalate = context.escalate.clone();
            let place = child.clone();
            let spec = spec(&ReplicaContext { child: child.clone(), ..context.clone() });
            let address = spec.start(child, context.events.clone(), move |cause| (escalate.0)(cause));
            forwards
                .iter()
                .map(|forward| {
                    let routed = Routed { forward: forward(address.clone()), _kept: place.clone() };
                    Box::new(routed) as Box<dyn Endpoint>
                })
                .collect()
        })
    }
}

/// A route to an actor, and what lives as long as it: the actor's place in the tree, so that one that gave up is
/// still seen there, or the family it belongs to.
struct Routed<K> {
    forward: Box<dyn Endpoint>,
    _kept: K,
}

impl<K: 'static> Endpoint for Routed<K> {
    fn call(&self, request: Request) -> Outcome {
        self.forward.call(request)
    }
}

/// Handler actors under one [`Supervisor`]: a family per replica, with routes to its children.
///
/// The family stands below the group in the supervision tree. When it gives up, its routes answer errors and
/// [`HandlerSupervision::escalation`] decides whether the service goes on. When the group is unrouted, or the service
/// stops, the children are stopped in reverse order.
///
/// # Examples
///
/// ```
/// use actix::prelude::*;
/// use martlet_core::handler::SupervisorGroup;
/// use martlet_core::supervise::{ChildSpec, Strategy, Supervisor};
/// # use martlet_core::RpcError;
/// # #[derive(Default)]
/// # struct Ledger;
/// # impl Actor for Ledger { type Context = Context<Self>; }
/// # impl Supervised for Ledger {}
/// # struct Till(Addr<Ledger>);
/// # impl Actor for Till { type Context = Context<Self>; }
/// # impl Supervised for Till {}
/// # #[derive(serde::Deserialize, Message)]
/// # #[rtype(result = "Result<u64, RpcError>")]
/// # struct Coin(u64);
/// # impl Handler<Coin> for Till {
/// #     type Result = Result<u64, RpcError>;
/// #     fn handle(&mut self, coin: Coin, _: &mut Context<Self>) -> Self::Result { Ok(coin.0) }
/// # }
///
/// let shop = Supervisor::new(Strategy::RestForOne).child("ledger", |_| ChildSpec::new(Ledger::default)).child(
///     "till",
///     |siblings| {
///         let ledger = siblings.address::<Ledger>("ledger");
///         ChildSpec::new(move || Till(ledger.clone()))
///     },
/// );
/// let shop = SupervisorGroup::new("shop", shop).message::<Till, Coin>("till", "coin").build().singleton();
/// ```
pub struct SupervisorGroup {
    name: Arc<str>,
    supervisor: Supervisor,
    handlers: Vec<HandlerInfo>,
    forwards: Vec<FamilyForward>,
}

type FamilyForward = Arc<dyn Fn(&Family) -> Box<dyn Endpoint> + Send + Sync>;

impl fmt::Debug for SupervisorGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SupervisorGroup")
            .field("supervisor", &self.supervisor)
            .field("handlers", &self.handlers)
            .finish_non_exhaustive()
    }
}

impl SupervisorGroup {
    /// A family by its name in the supervision tree, without routes.
    pub fn new(name: impl Into<Arc<str>>, supervisor: Supervisor) -> Self {
        Self { name: name.into(), supervisor, handlers: Vec::new(), forwards: Vec::new() }
    }

    /// Routes a pattern to the handler for `M` of a child, by the child's name (`supervisor/child` for one below a
    /// supervisor of the family). No child of that name and type: [`StartError::Panicked`](crate::StartError::Panicked)
    /// at start, which names those there are.
    #[track_caller]
    #[must_use]
    pub fn message<A, M>(self, child: &str, pattern: impl Into<Pattern>) -> Self
    where
        A: Actor<Context = Context<A>> + Handler<M>,
        M: Message + DeserializeOwned + Send + 'static,
        M::Result: IntoOutcome + Send,
        <A as Actor>::Context: actix::dev::ToEnvelope<A, M>,
    {
        self.add::<A, M>(HandlerKind::Message, child, pattern.into())
    }

    /// Routes an event pattern to the handler for `M` of a child; see [`message`](Self::message).
    #[track_caller]
    #[must_use]
    pub fn event<A, M>(self, child: &str, pattern: impl Into<Pattern>) -> Self
    where
        A: Actor<Context = Context<A>> + Handler<M>,
        M: Message + DeserializeOwned + Send + 'static,
        M::Result: IntoOutcome + Send,
        <A as Actor>::Context: actix::dev::ToEnvelope<A, M>,
    {
        self.add::<A, M>(HandlerKind::Event, child, pattern.into())
    }

    #[track_caller]
    fn add<A, M>(mut self, kind: HandlerKind, child: &str, pattern: Pattern) -> Self
    where
        A: Actor<Context = Context<A>> + Handler<M>,
        M: Message + DeserializeOwned + Send + 'static,
        M::Result: IntoOutcome + Send,
        <A as Actor>::Context: actix::dev::ToEnvelope<A, M>,
    {
        let child = child.to_owned();
        let info = HandlerInfo::new(format!("{child}::{}", short_name::<M>()), kind, pattern);
        self.handlers.push(info);
        self.forwards.push(Arc::new(move |family| {
            let Some(address) = family.address::<A>(&child) else {
                let (wanted, known) = (short_name::<A>(), family.children().join(", "));
                panic!("the family has no `{wanted}` named `{child}` to route to; its children are: {known}");
            };
            let read = |request: &Request| request.data::<M>().map_err(bad_payload);
            Box::new(forward(address.recipient(), read))
        }));
        self
    }

    /// The group to register.
    pub fn build(self) -> HandlerGroup {
        let Self { name, supervisor, handlers, forwards } = self;
        let of = Arc::clone(&name);
        HandlerGroup::from_parts(name, handlers, move |context| {
            let (escalate, running) = (context.escalate.clone(), context.families.subscribe());
            let place = context.child.child(Arc::clone(&of), "supervisor");
            let family = supervisor.start(place, context.events.clone(), move |cause| {
                drop(running);
                (escalate.0)(cause);
            });
            let route = |forward: &FamilyForward| {
                let routed = Routed { forward: forward(&family), _kept: family.clone() };
                Box::new(routed) as Box<dyn Endpoint>
            };
            forwards.iter().map(route).collect()
        })
    }
}

/// A handler that passes the payload to an actor that runs already; unroute it, or stop the actor, at
/// any time (a stopped actor's route answers "Internal server error").
#[track_caller]
pub fn message_to<M>(pattern: impl Into<Pattern>, actor: actix::Recipient<M>) -> HandlerGroup
where
    M: Message + DeserializeOwned + Send + 'static,
    M::Result: IntoOutcome + Send,
{
    to_recipient(HandlerKind::Message, pattern.into(), actor)
}

/// An event handler that passes the payload to an actor that runs already.
#[track_caller]
pub fn event_to<M>(pattern: impl Into<Pattern>, actor: actix::Recipient<M>) -> HandlerGroup
where
    M: Message + DeserializeOwned + Send + 'static,
    M::Result: IntoOutcome + Send,
{
    to_recipient(HandlerKind::Event, pattern.into(), actor)
}

#[track_caller]
fn to_recipient<M>(kind: HandlerKind, pattern: Pattern, actor: actix::Recipient<M>) -> HandlerGroup
where
    M: Message + DeserializeOwned + Send + 'static,
    M::Result: IntoOutcome + Send,
{
    let name = short_name::<M>();
    let info = HandlerInfo { location: Location::caller(), ..HandlerInfo::new(name, kind, pattern) };
    HandlerGroup::from_parts(name, vec![info], move |_| {
        let read = |request: &Request| request.data::<M>().map_err(bad_payload);
        vec![Box::new(forward(actor.clone(), read)) as Box<dyn Endpoint>]
    })
}

/// The result of an actor's message, or of a function, that can be a reply: `Result<R, E>`, a [`Streaming`] or
/// [`TryStreaming`], or `()`.
#[diagnostic::on_unimplemented(
    message = "the result `{Self}` cannot be a reply",
    note = "declare `#[rtype(result = \"Result<T, RpcError>\")]` where `T: serde::Serialize`, or no result for events"
)]
pub trait IntoOutcome {
    /// Makes it a handler's result.
    ///
    /// # Errors
    ///
    /// The failure of the handler.
    fn into_outcome(self, format: Format) -> HandlerResult;

    /// The same; a plain value may be left in `place`: see [`Endpoint::call_in_place`].
    #[doc(hidden)]
    fn put_outcome(self, format: Format, _place: &mut Option<Payload>) -> Option<HandlerResult>
    where
        Self: Sized,
    {
        Some(self.into_outcome(format))
    }
}

impl<R: IntoReply, E: Into<RpcError>> IntoOutcome for Result<R, E> {
    fn into_outcome(self, format: Format) -> HandlerResult {
        self.map_err(Into::into)?.into_reply(format)
    }

    fn put_outcome(self, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult> {
        match self {
            Ok(value) => value.put_reply(format, place),
            Err(error) => Some(Err(error.into())),
        }
    }
}

impl<S> IntoOutcome for Streaming<S>
where
    Self: IntoReply,
{
    fn into_outcome(self, format: Format) -> HandlerResult {
        self.into_reply(format)
    }
}

impl<S> IntoOutcome for TryStreaming<S>
where
    Self: IntoReply,
{
    fn into_outcome(self, format: Format) -> HandlerResult {
        self.into_reply(format)
    }
}

impl IntoOutcome for () {
    fn into_outcome(self, _format: Format) -> HandlerResult {
        Ok(Reply::Empty)
    }

    fn put_outcome(self, _format: Format, _place: &mut Option<Payload>) -> Option<HandlerResult> {
        None
    }
}

fn short_name<T>() -> &'static str {
    let name = std::any::type_name::<T>();
    let end = name.find('<').unwrap_or(name.len());
    let start = name.get(..end).and_then(|path| path.rfind("::")).map_or(0, |at| at + 2);
    name.get(start..).unwrap_or(name)
}
