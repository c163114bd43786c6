// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers: groups of endpoints that share one state, and the routed actor that runs them.
//!
//! ```text
//! RegistryActor ── HandlerActor (one per group and arbiter, or a single one)
//!                    └─ endpoints, built by the group's factory
//! ```
//!
//! A session sends its requests, in batches, to the replica on its own arbiter. The handler's future is polled once in
//! place, inside the panic boundary; only one that is not ready becomes a task of its own. A panic answers
//! the request with an error and rebuilds the replica from its factory.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use actix::{Actor, Addr, Context, Handler, Message, Supervised};
use futures::FutureExt;
use futures::StreamExt;
use futures::future::LocalBoxFuture;
use futures::stream::LocalBoxStream;
use hashbrown::HashMap;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::error::RpcError;
use crate::events::{EventBus, ServiceEvent};
use crate::interceptor::{Interceptor, Interceptors, Next};
use crate::pattern::{Pattern, Route};
use crate::payload::Payload;
use crate::reply::{HandlerResult, IntoReply, Reply};
use crate::request::{FromRequest, Request, bad_payload};
use crate::responder::Responder;
use crate::route::{HandlerInfo, HandlerKind, HandlerStats};
use crate::supervise::{
    Child, ChildSpec, ChildState, Escalation, RestartIntensity, RestartWindow, panic_text,
};
use crate::trace::Ambient;
use crate::transport::TransportId;

/// How a call of an endpoint goes on.
pub enum Outcome {
    /// It is done.
    Ready(HandlerResult),
    /// It must be waited for.
    Future(LocalBoxFuture<'static, HandlerResult>),
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(result) => f.debug_tuple("Ready").field(result).finish(),
            Self::Future(_) => f.write_str("Future"),
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
}

#[derive(Clone)]
pub(crate) struct EscalateFn(pub(crate) Arc<dyn Fn(String) + Send + Sync>);

impl fmt::Debug for EscalateFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EscalateFn")
    }
}

type EndpointFactory = Arc<dyn Fn(&ReplicaContext) -> Vec<Box<dyn Endpoint>> + Send + Sync>;

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
    /// A message (same route, same payload) that made the handler panic this many times is refused.
    /// Default 3; 0 turns it off.
    pub poison_after: u32,
    /// Requests that wait for a free place of [`HandlerInfo::concurrency`], per handler and replica.
    /// Default 1024; more are answered with an overload error.
    pub max_waiting: usize,
    /// Requests that may wait in the replica's mailbox, for each session that sends there. Default 65,536;
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
    fn mailbox_batches(&self) -> usize {
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
        let calls: Vec<_> = defs.iter().map(|def| def.call).collect();
        Self {
            name: Arc::from(name),
            handlers,
            factory: Arc::new(move |_| {
                let controller = Rc::new(factory());
                calls
                    .iter()
                    .map(|call| {
                        let (controller, call) = (Rc::clone(&controller), *call);
                        Box::new(move |request| call(&controller, request)) as Box<dyn Endpoint>
                    })
                    .collect()
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
    /// Calls it.
    pub call: fn(&Rc<C>, Request) -> Outcome,
}

impl<C> fmt::Debug for HandlerDef<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerDef").field("info", &self.info).finish_non_exhaustive()
    }
}

// === handlers from functions ===

/// An async function that can be a handler: its arguments are extractors, its result is
/// `Result<R, E>` where `R: IntoReply` and `E: Into<RpcError>`.
#[diagnostic::on_unimplemented(
    message = "this function cannot be a handler",
    label = "not a handler",
    note = "a handler is `async fn(extractors…) -> Result<R, E>` with at most eight arguments, each of which implements `FromRequest` (such as `Data<T>`), `R: IntoReply` and `E: Into<RpcError>`"
)]
pub trait HandlerFn<Args>: Clone + Send + Sync + 'static {
    /// Calls it.
    fn call(self, request: Request) -> impl Future<Output = HandlerResult> + 'static;
}

macro_rules! handler_fn {
    ($($arg:ident),*) => {
        impl<F, Fut, R, E, $($arg),*> HandlerFn<($($arg,)*)> for F
        where
            F: Fn($($arg),*) -> Fut + Clone + Send + Sync + 'static,
            Fut: Future<Output = Result<R, E>> + 'static,
            R: IntoReply + 'static,
            E: Into<RpcError> + 'static,
            $($arg: FromRequest + 'static,)*
        {
            #[allow(non_snake_case, unused_variables)]
            async fn call(self, request: Request) -> HandlerResult {
                let format = request.format();
                $(let $arg = $arg::from_request(&request).await?;)*
                drop(request);
                match self($($arg),*).await {
                    Ok(reply) => reply.into_reply(format),
                    Err(error) => Err(error.into()),
                }
            }
        }
    };
}

handler_fn!();
handler_fn!(A1);
handler_fn!(A1, A2);
handler_fn!(A1, A2, A3);
handler_fn!(A1, A2, A3, A4);
handler_fn!(A1, A2, A3, A4, A5);
handler_fn!(A1, A2, A3, A4, A5, A6);
handler_fn!(A1, A2, A3, A4, A5, A6, A7);
handler_fn!(A1, A2, A3, A4, A5, A6, A7, A8);

#[track_caller]
fn from_fn<H, Args>(kind: HandlerKind, pattern: Pattern, handler: H) -> HandlerGroup
where
    H: HandlerFn<Args>,
    Args: 'static,
{
    let name: Arc<str> = Arc::from(pattern.route().to_string());
    let info =
        HandlerInfo { location: Location::caller(), ..HandlerInfo::new(Arc::clone(&name), kind, pattern) };
    HandlerGroup::from_parts(name, vec![info], move |_| {
        let handler = handler.clone();
        vec![Box::new(move |request| Outcome::future(handler.clone().call(request))) as Box<dyn Endpoint>]
    })
}

/// A message handler from an async function.
///
/// # Examples
///
/// ```
/// use martlet_core::{Data, RpcError, message};
///
/// let sum = message("sum", |Data(numbers): Data<Vec<i64>>| async move {
///     Ok::<_, RpcError>(numbers.iter().sum::<i64>())
/// });
/// ```
#[track_caller]
pub fn message<H, Args>(pattern: impl Into<Pattern>, handler: H) -> HandlerGroup
where
    H: HandlerFn<Args>,
    Args: 'static,
{
    from_fn(HandlerKind::Message, pattern.into(), handler)
}

/// An event handler from an async function. Its result is discarded; an error is reported.
#[track_caller]
pub fn event<H, Args>(pattern: impl Into<Pattern>, handler: H) -> HandlerGroup
where
    H: HandlerFn<Args>,
    Args: 'static,
{
    from_fn(HandlerKind::Event, pattern.into(), handler)
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
    spec: ChildSpec<A>,
    handlers: Vec<HandlerInfo>,
    forwards: Vec<Forward<A>>,
}

type Forward<A> = Arc<dyn Fn(Addr<A>) -> Box<dyn Endpoint> + Send + Sync>;

impl<A: Actor> fmt::Debug for ActorGroup<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActorGroup").field("handlers", &self.handlers).finish_non_exhaustive()
    }
}

impl<A> ActorGroup<A>
where
    A: Actor<Context = Context<A>> + Supervised,
{
    /// An actor built by `factory`, once per replica and again after a panic.
    pub fn new(factory: impl Fn() -> A + Send + Sync + 'static) -> Self {
        Self::from_spec(ChildSpec::new(factory))
    }

    /// An actor with a child specification of one's own.
    pub fn from_spec(spec: ChildSpec<A>) -> Self {
        Self { spec, handlers: Vec::new(), forwards: Vec::new() }
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
            Box::new(forward_endpoint(address.recipient(), make.clone())) as Box<dyn Endpoint>
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
            let address = spec.clone().start(child, context.events.clone(), move |cause| (escalate.0)(cause));
            forwards
                .iter()
                .map(|forward| {
                    let routed = Routed { forward: forward(address.clone()), _place: place.clone() };
                    Box::new(routed) as Box<dyn Endpoint>
                })
                .collect()
        })
    }
}

/// A route to an actor. Keeps the actor's place in the tree, so that one that gave up is still seen there.
struct Routed {
    forward: Box<dyn Endpoint>,
    _place: Child,
}

impl Endpoint for Routed {
    fn call(&self, request: Request) -> Outcome {
        self.forward.call(request)
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
        vec![Box::new(forward_endpoint(actor.clone(), read)) as Box<dyn Endpoint>]
    })
}

fn forward_endpoint<M>(
    recipient: actix::Recipient<M>,
    make: impl Fn(&Request) -> Result<M, RpcError> + 'static,
) -> impl Fn(Request) -> Outcome + 'static
where
    M: Message + Send + 'static,
    M::Result: IntoOutcome + Send,
{
    move |request| {
        let message = match make(&request) {
            Ok(message) => message,
            Err(error) => return Outcome::Ready(Err(error)),
        };
        let format = request.format();
        drop(request);
        let asked = recipient.send(message);
        Outcome::future(async move {
            match asked.await {
                Ok(result) => result.into_outcome(format),
                Err(error) => Err(RpcError::unexpected(format!("the handler actor did not answer: {error}"))),
            }
        })
    }
}

/// The result of an actor's message that can be a reply: `Result<R, E>` or `()`.
#[diagnostic::on_unimplemented(
    message = "the result `{Self}` of this message cannot be a reply",
    note = "declare `#[rtype(result = \"Result<T, RpcError>\")]` where `T: serde::Serialize`, or no result for events"
)]
pub trait IntoOutcome {
    /// Makes it a handler's result.
    ///
    /// # Errors
    ///
    /// The failure of the handler.
    fn into_outcome(self, format: crate::payload::Format) -> HandlerResult;
}

impl<R: IntoReply, E: Into<RpcError>> IntoOutcome for Result<R, E> {
    fn into_outcome(self, format: crate::payload::Format) -> HandlerResult {
        self.map_err(Into::into)?.into_reply(format)
    }
}

impl IntoOutcome for () {
    fn into_outcome(self, _format: crate::payload::Format) -> HandlerResult {
        Ok(Reply::Empty)
    }
}

fn short_name<T>() -> &'static str {
    let name = std::any::type_name::<T>();
    let end = name.find('<').unwrap_or(name.len());
    let start = name.get(..end).and_then(|path| path.rfind("::")).map_or(0, |at| at + 2);
    name.get(start..).unwrap_or(name)
}

// === the routed actor ===

/// Requests for the handlers of one replica: what one turn of a session read for it, in order.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct InvokeBatch(pub(crate) Vec<Invoke>);

/// A request for a handler, with the duty to end it.
pub(crate) struct Invoke {
    pub(crate) endpoint: u32,
    pub(crate) request: Request,
    pub(crate) responder: Responder,
}

/// Runs the endpoints of one replica.
pub(crate) struct HandlerActor {
    replica: Rc<Replica>,
}

struct Replica {
    factory: EndpointFactory,
    context: ReplicaContext,
    endpoints: RefCell<Rc<Vec<Box<dyn Endpoint>>>>,
    handlers: Vec<HandlerState>,
    supervision: HandlerSupervision,
    window: RefCell<Option<RestartWindow>>,
    gave_up: RefCell<Option<String>>,
    poison: RefCell<HashMap<u64, u32>>,
    hasher: hashbrown::DefaultHashBuilder,
}

struct HandlerState {
    route: Route,
    stats: Arc<HandlerStats>,
    concurrency: Option<usize>,
    running: Cell<usize>,
    waiting: RefCell<VecDeque<Invoke>>,
}

/// How many distinct poisonous messages one replica remembers; the memory is cleared when it is full.
const MAX_POISON: usize = 4096;

/// The request's end, as counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Well,
    Failed,
    Panicked,
}

impl HandlerActor {
    /// Builds the replica. Fails with the panic's text when its factory panics.
    pub(crate) fn build(
        group: &HandlerGroup,
        stats: &[Arc<HandlerStats>],
        context: ReplicaContext,
        global: &Arc<[Arc<dyn Interceptor>]>,
    ) -> Result<Self, String> {
        let factory = with_interceptors(group, global);
        let endpoints =
            catch_unwind(AssertUnwindSafe(|| factory(&context))).map_err(panic_text).and_then(|built| {
                if built.len() == group.handlers.len() {
                    Ok(built)
                } else {
                    Err(format!(
                        "the factory built {} endpoints for {} handlers",
                        built.len(),
                        group.handlers.len()
                    ))
                }
            })?;
        let handlers = group
            .handlers
            .iter()
            .zip(stats)
            .map(|((info, _), stats)| HandlerState {
                route: info.pattern.route().clone(),
                stats: Arc::clone(stats),
                concurrency: info.concurrency,
                running: Cell::new(0),
                waiting: RefCell::default(),
            })
            .collect();
        Ok(Self {
            replica: Rc::new(Replica {
                factory,
                context,
                endpoints: RefCell::new(Rc::new(endpoints)),
                handlers,
                supervision: group.supervision,
                window: RefCell::new(group.supervision.intensity.map(RestartWindow::new)),
                gave_up: RefCell::default(),
                poison: RefCell::default(),
                hasher: hashbrown::DefaultHashBuilder::default(),
            }),
        })
    }
}

/// The group's factory, with the interceptors put around each endpoint.
fn with_interceptors(group: &HandlerGroup, global: &Arc<[Arc<dyn Interceptor>]>) -> EndpointFactory {
    let chains: Vec<Arc<[Arc<dyn Interceptor>]>> = group
        .handlers
        .iter()
        .map(|(_, own)| group.interceptors.iter().chain(own).cloned().collect())
        .collect();
    let global = Arc::clone(global);
    let inner = Arc::clone(&group.factory);
    Arc::new(move |context| {
        inner(context)
            .into_iter()
            .zip(&chains)
            .map(|(endpoint, chain)| {
                let (endpoint, chain, global) = (Rc::new(endpoint), Arc::clone(chain), Arc::clone(&global));
                Box::new(move |request: Request| {
                    let inherits = request.0.scope.server.inherit && !global.is_empty();
                    if !inherits && chain.is_empty() && request.0.scope.server.interceptors.is_empty() {
                        return endpoint.call(request);
                    }
                    let (endpoint, chain, global) =
                        (Rc::clone(&endpoint), Arc::clone(&chain), Arc::clone(&global));
                    Outcome::future(async move {
                        let scope = Arc::clone(&request.0.scope.server);
                        let inherited: &[_] = if scope.inherit { &global } else { &[] };
                        Next::new([&scope.interceptors, inherited, &chain], &**endpoint).run(request).await
                    })
                }) as Box<dyn Endpoint>
            })
            .collect()
    })
}

impl Actor for HandlerActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(self.replica.supervision.mailbox_batches());
    }
}

impl Handler<InvokeBatch> for HandlerActor {
    type Result = ();

    fn handle(&mut self, InvokeBatch(batch): InvokeBatch, _ctx: &mut Self::Context) {
        for invoke in batch {
            self.replica.accept(invoke);
        }
    }
}

impl Replica {
    fn accept(self: &Rc<Self>, invoke: Invoke) {
        let Some(handler) = self.handlers.get(invoke.endpoint as usize) else { return };
        if let Some(max) = handler.concurrency
            && handler.running.get() >= max
        {
            let mut waiting = handler.waiting.borrow_mut();
            if waiting.len() < self.supervision.max_waiting {
                waiting.push_back(invoke);
            } else {
                drop(waiting);
                self.context.events.emit(ServiceEvent::BoundHit {
                    place: Arc::from(handler.route.as_ref()),
                    bound: "max_waiting",
                    limit: self.supervision.max_waiting as u64,
                    action: "the request was answered with an overload error",
                });
                invoke.responder.fail(&overloaded());
            }
            return;
        }
        self.start(invoke);
    }

    fn start(self: &Rc<Self>, invoke: Invoke) {
        let Invoke { endpoint: index, request, responder } = invoke;
        let handler = &self.handlers[index as usize];
        if let Some(cause) = &*self.gave_up.borrow() {
            responder.fail(&RpcError::unexpected(format!("handler {} gave up: {cause}", handler.route)));
            return;
        }
        if let Some(deadline) = request.0.deadline
            && Instant::now() >= deadline
        {
            // Its caller has stopped waiting: running it would be work for nobody.
            responder.fail(&deadline_exceeded());
            return;
        }
        if !self.poison.borrow().is_empty()
            && let Some(kills) = self.kills(&handler.route, request.0.data.as_ref())
        {
            self.context.events.emit(ServiceEvent::PoisonRefused { route: handler.route.clone(), kills });
            responder.fail(&poisoned(kills));
            return;
        }
        handler.stats.in_flight.add(1);
        handler.running.set(handler.running.get() + 1);
        let data = request.0.data.as_ref().filter(|_| self.supervision.poison_after > 0).cloned();
        let deadline = request.0.deadline;
        let ambient = request.0.metadata.is_some().then(|| Ambient { trace: request.trace(), deadline });
        let endpoints = Rc::clone(&self.endpoints.borrow());
        let enter = |work: &mut dyn FnMut() -> Poll<HandlerResult>| match &ambient {
            Some(ambient) => ambient.enter(work),
            None => work(),
        };

        let mut request = Some(request);
        let mut future = None;
        let first = catch_unwind(AssertUnwindSafe(|| {
            enter(&mut || {
                let Some(request) = request.take() else { return Poll::Pending };
                match endpoints[index as usize].call(request) {
                    Outcome::Ready(result) => Poll::Ready(result),
                    Outcome::Future(mut made) => {
                        let mut cx = TaskContext::from_waker(std::task::Waker::noop());
                        match made.as_mut().poll(&mut cx) {
                            Poll::Ready(result) => Poll::Ready(result),
                            Poll::Pending => {
                                future = Some(made);
                                Poll::Pending
                            }
                        }
                    }
                }
            })
        }));
        drop(endpoints);
        match first {
            Err(panic) => {
                responder_fail(responder);
                self.panicked(index, data.as_ref(), panic_text(panic));
                self.finished(index, Ended::Panicked);
            }
            Ok(Poll::Ready(Ok(Reply::Stream(stream)))) => {
                self.spawn(index, responder, data, deadline, ambient, Job::Stream(stream))
            }
            Ok(Poll::Ready(result)) => {
                let ended = self.answer(index, result, responder);
                self.finished(index, ended);
            }
            Ok(Poll::Pending) => match future {
                Some(future) => self.spawn(index, responder, data, deadline, ambient, Job::Future(future)),
                // Not reached: the endpoint is called exactly once.
                None => drop(responder),
            },
        }
    }

    /// Answers a result that is not a stream.
    fn answer(&self, index: u32, result: HandlerResult, responder: Responder) -> Ended {
        match result {
            Ok(Reply::Empty) => responder.end(None, None),
            Ok(Reply::Value(payload)) => responder.end(Some(payload), None),
            Ok(Reply::Record(payload, headers)) => responder.end(Some(payload), Some(headers)),
            Ok(Reply::Stream(_)) => responder.fail(&RpcError::unexpected("a stream inside a stream")),
            Err(error) => {
                responder.fail(&error);
                self.report(index, error);
                return Ended::Failed;
            }
        }
        Ended::Well
    }

    fn report(&self, index: u32, error: RpcError) {
        if error.is_unexpected() {
            let route = self.handlers[index as usize].route.clone();
            self.context.events.emit(ServiceEvent::UnexpectedError { route, error });
        }
    }

    fn spawn(
        self: &Rc<Self>,
        index: u32,
        responder: Responder,
        data: Option<Payload>,
        deadline: Option<Instant>,
        ambient: Option<Ambient>,
        job: Job,
    ) {
        let replica = Rc::clone(self);
        let responder = Rc::new(RefCell::new(Some(responder)));
        let work = {
            let (replica, responder) = (Rc::clone(self), Rc::clone(&responder));
            async move {
                let result = match job {
                    Job::Future(future) => future.await,
                    Job::Stream(stream) => Ok(Reply::Stream(stream)),
                };
                let Some(responder) = responder.take() else { return Ended::Failed };
                match result {
                    Ok(Reply::Stream(stream)) => replica.pump(index, stream, responder, deadline).await,
                    other => replica.answer(index, other, responder),
                }
            }
        };
        let task = {
            let responder = Rc::clone(&responder);
            async move {
                // Counts the end even when the task is aborted.
                let mut finish = Finish { replica: Rc::clone(&replica), index, ended: Ended::Failed };
                let work = AssertUnwindSafe(work).catch_unwind();
                let work = async {
                    match ambient {
                        Some(ambient) => ambient.scope(work).await,
                        None => work.await,
                    }
                };
                let ended = match deadline {
                    Some(deadline) => match tokio::time::timeout_at(deadline, work).await {
                        Ok(ended) => ended,
                        Err(_) => {
                            if let Some(responder) = responder.take() {
                                responder.fail(&deadline_exceeded());
                            }
                            Ok(Ended::Failed)
                        }
                    },
                    None => work.await,
                };
                finish.ended = match ended {
                    Ok(ended) => ended,
                    Err(panic) => {
                        if let Some(responder) = responder.take() {
                            responder_fail(responder);
                        }
                        replica.panicked(index, data.as_ref(), panic_text(panic));
                        Ended::Panicked
                    }
                };
            }
        };
        let handle = tokio::task::spawn_local(task);
        if let Some(responder) = &*responder.borrow() {
            responder.attach(handle.abort_handle());
        }
    }

    /// Sends a stream's items. Completion that is already known is merged into the last item, as NestJS
    /// does; one that comes later is a packet of its own.
    async fn pump(
        &self,
        index: u32,
        mut stream: LocalBoxStream<'static, Result<Payload, RpcError>>,
        responder: Responder,
        deadline: Option<Instant>,
    ) -> Ended {
        let mut item = match by(deadline, stream.next()).await {
            Ok(Some(item)) => item,
            Ok(None) => {
                responder.end(None, None);
                return Ended::Well;
            }
            Err(error) => {
                responder.fail(&error);
                return Ended::Failed;
            }
        };
        loop {
            let payload = match item {
                Ok(payload) => payload,
                Err(error) => {
                    responder.fail(&error);
                    self.report(index, error);
                    return Ended::Failed;
                }
            };
            item = match stream.next().now_or_never() {
                Some(None) => {
                    responder.end(Some(payload), None);
                    return Ended::Well;
                }
                Some(Some(next)) => {
                    responder.item(payload);
                    next
                }
                None => {
                    responder.item(payload);
                    if responder.is_gone() {
                        return Ended::Well;
                    }
                    match by(deadline, stream.next()).await {
                        Ok(Some(next)) => next,
                        Ok(None) => {
                            responder.end(None, None);
                            return Ended::Well;
                        }
                        Err(error) => {
                            responder.fail(&error);
                            return Ended::Failed;
                        }
                    }
                }
            };
            if responder.ready().await.is_err() {
                return Ended::Well;
            }
        }
    }

    fn finished(self: &Rc<Self>, index: u32, ended: Ended) {
        let handler = &self.handlers[index as usize];
        let stats = &handler.stats;
        stats.in_flight.add(-1);
        stats.handled.add(1);
        match ended {
            Ended::Well => {}
            Ended::Failed => {
                stats.failed.add(1);
            }
            Ended::Panicked => {
                stats.failed.add(1);
                stats.panicked.add(1);
            }
        }
        handler.running.set(handler.running.get() - 1);
        if handler.concurrency.is_some() {
            // Those whose callers have gone meanwhile are not begun.
            let next = loop {
                let next = handler.waiting.borrow_mut().pop_front();
                if next.as_ref().is_none_or(|next| !next.responder.is_gone()) {
                    break next;
                }
            };
            if let Some(next) = next {
                // A task of its own, so that a long queue of ready handlers does not recurse.
                let replica = Rc::clone(self);
                handler.running.set(handler.running.get() + 1);
                tokio::task::spawn_local(async move {
                    let handler = &replica.handlers[index as usize];
                    handler.running.set(handler.running.get() - 1);
                    replica.start(next);
                });
            }
        }
    }

    /// Answers a panic of the user's code: remembers the message, rebuilds the endpoints.
    fn panicked(&self, index: u32, data: Option<&Payload>, cause: String) {
        let route = self.handlers[index as usize].route.clone();
        self.context
            .events
            .emit(ServiceEvent::HandlerPanicked { route: route.clone(), cause: cause.clone() });
        if self.supervision.poison_after > 0 {
            let key = self.message_key(&route, data);
            let mut poison = self.poison.borrow_mut();
            if poison.len() >= MAX_POISON && !poison.contains_key(&key) {
                poison.clear();
            }
            *poison.entry(key).or_insert(0) += 1;
        }
        let allowed = self.window.borrow_mut().as_mut().is_none_or(|window| window.allow(Instant::now()));
        if !allowed {
            self.give_up(cause);
            return;
        }
        match catch_unwind(AssertUnwindSafe(|| (self.factory)(&self.context))) {
            Ok(built) => {
                let old = self.endpoints.replace(Rc::new(built));
                // The old state may be broken: its destructor is the user's code, too.
                let _ = catch_unwind(AssertUnwindSafe(|| drop(old)));
                self.context.child.failed_with(ChildState::Running, &cause);
                self.context.child.count_restart();
            }
            Err(panic) => self.give_up(format!("its factory panicked: {}", panic_text(panic))),
        }
    }

    fn give_up(&self, cause: String) {
        self.context.child.failed_with(ChildState::Failed, &cause);
        let child = self.context.child.name().clone();
        self.context.events.emit(ServiceEvent::GaveUp { child, cause: cause.clone() });
        *self.gave_up.borrow_mut() = Some(cause.clone());
        if self.supervision.escalation == Escalation::StopService {
            (self.context.escalate.0)(cause);
        }
    }

    fn message_key(&self, route: &Route, data: Option<&Payload>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(route.as_ref().as_bytes());
        if let Some(data) = data {
            hasher.write(data.bytes());
        }
        hasher.finish()
    }

    /// How often a message has killed its handler, if too often.
    fn kills(&self, route: &Route, data: Option<&Payload>) -> Option<u32> {
        let limit = self.supervision.poison_after;
        let kills = *self.poison.borrow().get(&self.message_key(route, data))?;
        (limit > 0 && kills >= limit).then_some(kills)
    }
}

enum Job {
    Future(LocalBoxFuture<'static, HandlerResult>),
    Stream(LocalBoxStream<'static, Result<Payload, RpcError>>),
}

/// Counts the end of a task, however it comes.
struct Finish {
    replica: Rc<Replica>,
    index: u32,
    ended: Ended,
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.replica.finished(self.index, self.ended);
    }
}

/// Waits no longer than until the caller stops waiting.
async fn by<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Result<T, RpcError> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.map_err(|_| deadline_exceeded()),
        None => Ok(work.await),
    }
}

/// The answer to a caller that stopped waiting, for those who still read it.
fn deadline_exceeded() -> RpcError {
    RpcError::message("Deadline exceeded")
}

fn responder_fail(responder: Responder) {
    responder.fail(&RpcError::unexpected("the handler panicked"));
}

/// The answer when a bound of the service is reached.
pub(crate) fn overloaded() -> RpcError {
    RpcError::message("Service overloaded")
}

fn poisoned(kills: u32) -> RpcError {
    RpcError::json(serde_json::json!({
        "status": "error",
        "message": format!("Message refused: it has killed its handler {kills} times"),
        "code": "POISONED_MESSAGE",
    }))
}

/// How long a replica may take to be built on its arbiter.
pub(crate) const BUILD_TIMEOUT: Duration = Duration::from_secs(30);
