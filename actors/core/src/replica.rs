// SPDX-License-Identifier: MIT OR Apache-2.0
//! The routed actor: one replica of a group of handlers, on its arbiter.
//!
//! It runs each request inside the panic boundary, in place if it is ready at once, else as a task of its
//! own; it counts, bounds concurrency, remembers poisonous messages, and is rebuilt from its factory after
//! a panic.
//!
//! Sessions on the replica's own arbiter call it in place ([`here`]); what comes from other arbiters comes as messages.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use actix::{Actor, Context, Handler, Message};
use futures::FutureExt;
use futures::StreamExt;
use futures::future::LocalBoxFuture;
use futures::stream::LocalBoxStream;
use hashbrown::HashMap;
use tokio::time::Instant;

use crate::error::RpcError;
use crate::events::ServiceEvent;
use crate::forward::ActorPanicked;
use crate::handler::{Endpoint, EndpointFactory, HandlerGroup, HandlerSupervision, Outcome, ReplicaContext};
use crate::headers::Headers;
use crate::in_flight::End;
use crate::interceptor::{Interceptor, Next};
use crate::packet::ResponseBody;
use crate::pattern::Route;
use crate::payload::{Format, Payload};
use crate::reply::{HandlerResult, Reply};
use crate::request::{Request, Scope};
use crate::responder::{Finished, RequestKey, Responder};
use crate::route::HandlerStats;
use crate::supervise::{ChildState, Escalation, RestartWindow, panic_text};
use crate::trace::Ambient;

/// Requests for the handlers of one replica: what one turn of a session read for it, in order. What is not
/// answered when it is dropped (an actor that has stopped) is answered with an error.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct InvokeBatch {
    pub(crate) scope: Arc<Scope>,
    pub(crate) invokes: Vec<Invoke>,
}

impl Drop for InvokeBatch {
    fn drop(&mut self) {
        for Invoke { duty, .. } in self.invokes.drain(..) {
            drop(duty.into_responder(&self.scope));
        }
    }
}

/// A request for a handler, with the duty to end it.
pub(crate) struct Invoke {
    pub(crate) endpoint: u32,
    pub(crate) request: Request,
    pub(crate) duty: Duty,
}

/// Who must be answered.
pub(crate) enum Duty {
    /// The slot of a request that one handler serves: the usual case, in which the batch stands in for a responder.
    Slot(RequestKey),
    /// Someone else.
    Own(Responder),
}

impl Duty {
    /// Makes it a duty that can be kept.
    pub(crate) fn into_responder(self, scope: &Arc<Scope>) -> Responder {
        match self {
            Self::Slot(slot) => Responder::new(Arc::clone(&scope.sink), slot, scope.server.transport.format),
            Self::Own(responder) => responder,
        }
    }
}

/// What one batch has finished, handed to the session in few steps.
struct Turn {
    scope: Arc<Scope>,
    done: Vec<Finished>,
}

/// How many finished requests wait for each other before the session hears of them.
const HAND_IN: usize = 16;

impl Turn {
    fn end(&mut self, duty: Duty, end: End) {
        let End { body, headers, failed } = end;
        match duty {
            Duty::Slot(slot) => {
                self.done.push(Finished::new(slot, body, headers, failed));
                if self.done.len() >= HAND_IN {
                    self.hand_in();
                }
            }
            Duty::Own(responder) => responder.finish(body, headers, failed),
        }
    }

    fn hand_in(&mut self) {
        if !self.done.is_empty() {
            self.scope.sink.push_all(&mut self.done.drain(..));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.hand_in();
    }
}

/// Runs the endpoints of one replica.
pub(crate) struct HandlerActor {
    replica: Rc<Replica>,
    identity: Identity,
}

/// Names the replicas of one group: it is one of a kind as long as one of them lives.
pub(crate) type Identity = Arc<()>;

thread_local! {
    /// The replicas that run on this thread, by the identity of their group.
    static HERE: RefCell<HashMap<usize, Weak<Replica>>> = RefCell::default();
}

/// The replica of a group that runs on this thread, if there is one.
pub(crate) fn here(identity: &Identity) -> Option<Rc<Replica>> {
    HERE.with_borrow(|here| here.get(&(Arc::as_ptr(identity) as usize))?.upgrade())
}

impl Drop for HandlerActor {
    fn drop(&mut self) {
        let place = Arc::as_ptr(&self.identity) as usize;
        // When the thread ends, what it knew has gone before.
        let _ = HERE.try_with(|here| here.borrow_mut().remove(&place));
    }
}

/// The endpoints of one replica and what is known of them. It never leaves its thread.
pub(crate) struct Replica {
    factory: EndpointFactory,
    context: ReplicaContext,
    endpoints: RefCell<Rc<Vec<Box<dyn Endpoint>>>>,
    handlers: Vec<HandlerState>,
    supervision: HandlerSupervision,
    window: RefCell<Option<RestartWindow>>,
    gave_up: RefCell<Option<String>>,
    poison: RefCell<HashMap<u64, u32>>,
    hasher: hashbrown::DefaultHashBuilder,
    /// Kept for the next batch.
    done: RefCell<Vec<Finished>>,
}

struct HandlerState {
    route: Route,
    stats: Arc<HandlerStats>,
    concurrency: Option<usize>,
    running: Cell<usize>,
    waiting: RefCell<VecDeque<(Request, Responder)>>,
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
        identity: Identity,
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
                done: RefCell::default(),
            }),
            identity,
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
                Box::new(Intercepted { endpoint, chain, global }) as Box<dyn Endpoint>
            })
            .collect()
    })
}

/// An endpoint with interceptors around it, if there are any where a request comes from.
struct Intercepted {
    endpoint: Rc<Box<dyn Endpoint>>,
    chain: Arc<[Arc<dyn Interceptor>]>,
    global: Arc<[Arc<dyn Interceptor>]>,
}

impl Intercepted {
    fn is_bare(&self, request: &Request) -> bool {
        let server = &request.0.scope.server;
        let inherits = server.inherit && !self.global.is_empty();
        !inherits && self.chain.is_empty() && server.interceptors.is_empty()
    }
}

impl Endpoint for Intercepted {
    fn call(&self, request: Request) -> Outcome {
        if self.is_bare(&request) {
            return self.endpoint.call(request);
        }
        let (endpoint, chain, global) =
            (Rc::clone(&self.endpoint), Arc::clone(&self.chain), Arc::clone(&self.global));
        Outcome::future(async move {
            let scope = Arc::clone(&request.0.scope.server);
            let inherited: &[_] = if scope.inherit { &global } else { &[] };
            Next::new([&scope.interceptors, inherited, &chain], &**endpoint).run(request).await
        })
    }

    fn call_in_place(&self, request: Request, place: &mut Option<Payload>) -> Option<Outcome> {
        match self.is_bare(&request) {
            true => self.endpoint.call_in_place(request, place),
            false => Some(self.call(request)),
        }
    }
}

impl Actor for HandlerActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(self.replica.supervision.mailbox_batches());
        let place = Arc::as_ptr(&self.identity) as usize;
        HERE.with_borrow_mut(|here| here.insert(place, Rc::downgrade(&self.replica)));
    }
}

impl Handler<InvokeBatch> for HandlerActor {
    type Result = ();

    fn handle(&mut self, mut batch: InvokeBatch, _ctx: &mut Self::Context) {
        let mut turn = Turn { scope: Arc::clone(&batch.scope), done: self.replica.done.take() };
        for invoke in batch.invokes.drain(..) {
            self.replica.accept(invoke, &mut turn);
        }
        turn.hand_in();
        self.replica.done.replace(std::mem::take(&mut turn.done));
    }
}

/// How a call of a handler goes on; see [`Replica::go_on_with`].
pub(crate) enum Begun {
    /// It is done, with the body that was given.
    Answered,
    /// It is done.
    Ended(End),
    /// It is not done.
    GoesOn(Rest),
}

/// What is left to be done for a request.
pub(crate) enum Rest {
    /// It goes on as a task.
    Unfinished(Box<Unfinished>),
    /// The handler has as many requests as it may run at once.
    MustWait(Request),
}

/// What has been begun and was not ready at once.
pub(crate) struct Unfinished {
    job: Job,
    data: Option<Payload>,
    deadline: Option<Instant>,
    ambient: Option<Ambient>,
}

/// The end without a value: what an answer is written over.
pub(crate) const NOTHING: ResponseBody = ResponseBody::Last(None);

impl Begun {
    /// How it ended, if it did; with `body` as it was filled.
    pub(crate) fn ended(self, body: &mut ResponseBody) -> Result<End, Rest> {
        match self {
            Self::Answered => {
                Ok(End { body: std::mem::replace(body, NOTHING), headers: None, failed: false })
            }
            Self::Ended(end) => Ok(end),
            Self::GoesOn(rest) => Err(rest),
        }
    }
}

impl End {
    fn failed(error: &RpcError, format: Format) -> Self {
        Self { body: ResponseBody::Error(error.to_payload(format)), headers: None, failed: true }
    }
}

impl Replica {
    /// Runs what came as a message.
    fn accept(self: &Rc<Self>, invoke: Invoke, turn: &mut Turn) {
        let Invoke { endpoint: index, request, duty } = invoke;
        let mut body = NOTHING;
        match self.begin(index, request, &mut body).ended(&mut body) {
            Ok(end) => turn.end(duty, end),
            Err(rest) => self.go_on_with(index, rest, duty.into_responder(&turn.scope)),
        }
    }

    /// Goes on with what has been begun, now that it has its responder.
    pub(crate) fn go_on_with(self: &Rc<Self>, index: u32, rest: Rest, responder: Responder) {
        match rest {
            Rest::Unfinished(rest) => self.go_on(index, *rest, responder),
            Rest::MustWait(request) => self.wait(index, request, responder),
        }
    }

    /// Runs a request that has its responder.
    pub(crate) fn call(self: &Rc<Self>, index: u32, request: Request, responder: Responder) {
        let mut body = NOTHING;
        match self.begin(index, request, &mut body).ended(&mut body) {
            Ok(End { body, headers, failed }) => responder.finish(body, headers, failed),
            Err(rest) => self.go_on_with(index, rest, responder),
        }
    }

    /// Calls a handler, and polls it once. A plain answer is written to `body`, which is [`NOTHING`] before.
    pub(crate) fn begin(self: &Rc<Self>, index: u32, request: Request, body: &mut ResponseBody) -> Begun {
        let handler = &self.handlers[index as usize];
        match handler.concurrency {
            Some(max) if handler.running.get() >= max => Begun::GoesOn(Rest::MustWait(request)),
            _ => self.begin_now(index, request, body),
        }
    }

    /// Keeps a request until its handler has a place for it.
    fn wait(&self, index: u32, request: Request, responder: Responder) {
        let handler = &self.handlers[index as usize];
        let mut waiting = handler.waiting.borrow_mut();
        if waiting.len() < self.supervision.max_waiting {
            return waiting.push_back((request, responder));
        }
        drop(waiting);
        self.context.events.emit(ServiceEvent::BoundHit {
            place: Arc::from(handler.route.as_ref()),
            bound: "max_waiting",
            limit: self.supervision.max_waiting as u64,
            action: "the request was answered with an overload error",
        });
        responder.fail(&overloaded());
    }

    /// The same as [`begin`](Self::begin) for a request that has its place.
    fn begin_now(self: &Rc<Self>, index: u32, request: Request, body: &mut ResponseBody) -> Begun {
        let handler = &self.handlers[index as usize];
        let format = request.format();
        // What is refused takes no place: it leaves it to the next.
        let refused = |error: RpcError| {
            self.next_waiting(index);
            Begun::Ended(End::failed(&error, format))
        };
        if let Some(cause) = &*self.gave_up.borrow() {
            return refused(RpcError::unexpected(format!("handler {} gave up: {cause}", handler.route)));
        }
        if let Some(deadline) = request.0.deadline
            && Instant::now() >= deadline
        {
            // Its caller has stopped waiting: running it would be work for nobody.
            return refused(deadline_exceeded());
        }
        if !self.poison.borrow().is_empty()
            && let Some(kills) = self.kills(&handler.route, request.0.packet.data.as_ref())
        {
            self.context.events.emit(ServiceEvent::PoisonRefused { route: handler.route.clone(), kills });
            return refused(poisoned(kills));
        }
        handler.stats.in_flight.add(1);
        handler.running.set(handler.running.get() + 1);
        let data = request.0.packet.data.as_ref().filter(|_| self.supervision.poison_after > 0).cloned();
        let deadline = request.0.deadline;
        let ambient =
            request.0.packet.metadata.is_some().then(|| Ambient { trace: request.trace(), deadline });
        let endpoints = Rc::clone(&self.endpoints.borrow());
        let mut none = None;
        let place = if let ResponseBody::Last(place) = body { place } else { &mut none };
        let endpoint = &*endpoints[index as usize];
        // Written here only if it is needed, rather than handed through.
        let mut outcome = None;
        let call = || match endpoint.call_in_place(request, place) {
            None => {}
            Some(Outcome::Future(mut made)) => {
                let mut cx = TaskContext::from_waker(std::task::Waker::noop());
                outcome = Some(match made.as_mut().poll(&mut cx) {
                    Poll::Ready(result) => Outcome::Ready(result),
                    Poll::Pending => Outcome::Started(made),
                });
            }
            Some(other) => outcome = Some(other),
        };
        let called = catch_unwind(AssertUnwindSafe(|| match &ambient {
            Some(ambient) => ambient.enter(call),
            None => call(),
        }));
        if let Err(panic) = called {
            drop(endpoints);
            self.panicked(index, data.as_ref(), panic);
            self.finished(index, Ended::Panicked);
            return refused(RpcError::unexpected("the handler panicked"));
        }
        let job = match outcome {
            None => {
                self.finished(index, Ended::Well);
                return Begun::Answered;
            }
            Some(Outcome::Ready(Ok(Reply::Stream(stream)))) => Job::Stream(stream),
            Some(Outcome::Ready(Ok(reply))) => {
                self.finished(index, Ended::Well);
                let (last, headers) = last_of(reply);
                return Begun::Ended(End { body: ResponseBody::Last(last), headers, failed: false });
            }
            Some(Outcome::Ready(Err(error))) => {
                let end = End::failed(&error, format);
                self.report(index, error);
                self.finished(index, Ended::Failed);
                return Begun::Ended(end);
            }
            Some(Outcome::Future(future) | Outcome::Started(future)) => Job::Future(future),
        };
        Begun::GoesOn(Rest::Unfinished(Box::new(Unfinished { job, data, deadline, ambient })))
    }

    /// Answers a result that is not a stream.
    fn answer(&self, index: u32, result: HandlerResult, responder: Responder) -> Ended {
        match result {
            Ok(reply) => {
                let (last, headers) = last_of(reply);
                responder.end(last, headers);
            }
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

    /// Makes a task of what was not ready at once.
    fn go_on(self: &Rc<Self>, index: u32, rest: Unfinished, responder: Responder) {
        let Unfinished { job, data, deadline, ambient } = rest;
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
                            responder.fail(&RpcError::unexpected("the handler panicked"));
                        }
                        replica.panicked(index, data.as_ref(), panic);
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
        self.next_waiting(index);
    }

    /// Begins the next request that waits for a place of its handler, if there is a place.
    fn next_waiting(self: &Rc<Self>, index: u32) {
        let handler = &self.handlers[index as usize];
        if handler.concurrency.is_none_or(|max| handler.running.get() >= max) {
            return;
        }
        // Those whose callers have gone meanwhile are not begun.
        let next = loop {
            let next = handler.waiting.borrow_mut().pop_front();
            if next.as_ref().is_none_or(|(_, responder)| !responder.is_gone()) {
                break next;
            }
        };
        if let Some((request, responder)) = next {
            // A task of its own, so that a long queue of ready handlers does not recurse.
            let replica = Rc::clone(self);
            handler.running.set(handler.running.get() + 1);
            tokio::task::spawn_local(async move {
                let handler = &replica.handlers[index as usize];
                handler.running.set(handler.running.get() - 1);
                replica.call(index, request, responder);
            });
        }
    }

    /// Answers a panic of the user's code: remembers the message, rebuilds the endpoints.
    fn panicked(&self, index: u32, data: Option<&Payload>, panic: Box<dyn Any + Send>) {
        let of_actor = panic.is::<ActorPanicked>();
        let cause = if of_actor { "the handler actor panicked".to_owned() } else { panic_text(panic) };
        let route = self.handlers[index as usize].route.clone();
        self.context
            .events
            .emit(ServiceEvent::HandlerPanicked { route: route.clone(), cause: cause.clone() });
        if self.supervision.poison_after > 0 {
            let key = self.message_key(&route, data);
            let mut poison = self.poison.borrow_mut();
            if poison.len() >= MAX_POISON && !poison.contains_key(&key) {
                poison.clear();
                self.context.events.emit(ServiceEvent::BoundHit {
                    place: Arc::from(route.as_ref()),
                    bound: "poison_memory",
                    limit: MAX_POISON as u64,
                    action: "the poisonous messages that were remembered are forgotten",
                });
            }
            *poison.entry(key).or_insert(0) += 1;
        }
        if of_actor {
            return;
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

/// What a reply that is not a stream ends with. (Streams are told apart before.)
fn last_of(reply: Reply) -> (Option<Payload>, Option<Headers>) {
    match reply {
        Reply::Empty | Reply::Stream(_) => (None, None),
        Reply::Value(payload) => (Some(payload), None),
        Reply::Record(payload, headers) => (Some(payload), Some(headers)),
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
