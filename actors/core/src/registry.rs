// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pattern registry: the actor that owns every registration.
//!
//! It builds the replicas of a group on their arbiters, refuses two message handlers for one pattern, and
//! publishes a new immutable [`RouteTable`] per transporter on each change. Sessions never ask it anything.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use actix::{Actor, Addr, AtomicResponse, Context, Handler, Message, WrapFuture};
use actix::{ActorFutureExt, ActorTryFutureExt};
use hashbrown::HashMap;
use tokio::sync::watch;

use crate::arbiters::Arbiters;
use crate::error::StartError;
use crate::events::EventBus;
use crate::handler::{EscalateFn, HandlerGroup, Placement, ReplicaContext};
use crate::interceptor::Interceptor;
use crate::pattern::Route;
use crate::replica::{BUILD_TIMEOUT, HandlerActor, Identity};
use crate::route::{HandlerInfo, HandlerKind, HandlerRef, HandlerReport, HandlerStats, Replicas, RouteTable};
use crate::supervise::{Child, Escalation};
use crate::transport::{TransportId, TransportInfo};

/// Names a registration, so that it can be taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegistrationId(u64);

/// The handle of a registry: registers handlers from anywhere, at any time.
#[derive(Clone)]
pub struct Registry {
    actor: Addr<RegistryActor>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registry")
    }
}

impl Registry {
    /// Starts a registry on the current arbiter.
    pub(crate) fn start(
        arbiters: Arbiters,
        events: EventBus,
        child: Child,
        global: Arc<[Arc<dyn Interceptor>]>,
        escalate: EscalateFn,
        families: Arc<watch::Sender<()>>,
    ) -> Self {
        let actor = RegistryActor {
            families,
            arbiters,
            events,
            child,
            global,
            escalate,
            groups: BTreeMap::new(),
            messages: HashMap::new(),
            tables: HashMap::new(),
            transports: Vec::new(),
            next: 0,
            over: false,
        };
        Self { actor: actor.start() }
    }

    /// Routes groups of handlers, all of them or none. Traffic that flows is not disturbed; sessions see
    /// the new routes with their next message, brokers are subscribed before the first one.
    ///
    /// # Errors
    ///
    /// [`StartError::DuplicateHandler`] for two message handlers on one pattern, [`StartError::Panicked`]
    /// when a factory panics, [`StartError::Stopped`] when the service has stopped.
    ///
    /// # Cancel safety
    ///
    /// A registration under way is completed when the future is dropped; its id is lost.
    pub async fn register(&self, groups: Vec<HandlerGroup>) -> Result<RegistrationId, StartError> {
        self.actor.send(Register { groups }).await.map_err(|_| StartError::Stopped)?
    }

    /// Takes a registration back: its routes go at once, requests that were dispatched are finished.
    ///
    /// # Errors
    ///
    /// [`StartError::Stopped`] when the service has stopped.
    pub async fn unregister(&self, id: RegistrationId) -> Result<bool, StartError> {
        self.actor.send(Unregister { id }).await.map_err(|_| StartError::Stopped)
    }

    /// Counters of every handler.
    ///
    /// # Errors
    ///
    /// [`StartError::Stopped`] when the service has stopped.
    pub async fn report(&self) -> Result<Vec<HandlerReport>, StartError> {
        self.actor.send(Report).await.map_err(|_| StartError::Stopped)
    }

    /// Takes back all registrations, in reverse order, and takes no more: when the service stops.
    pub(crate) async fn release(&self) {
        // Stopped already: there are none.
        let _ = self.actor.send(Release).await;
    }

    pub(crate) async fn watch(
        &self,
        transport: TransportInfo,
    ) -> Result<watch::Receiver<Arc<RouteTable>>, StartError> {
        self.actor.send(Watch { transport }).await.map_err(|_| StartError::Stopped)?
    }
}

/// Owns the registrations. Lives on the service's main arbiter; never on a request's path.
pub(crate) struct RegistryActor {
    arbiters: Arbiters,
    events: EventBus,
    child: Child,
    families: Arc<watch::Sender<()>>,
    global: Arc<[Arc<dyn Interceptor>]>,
    escalate: EscalateFn,
    /// In registration order.
    groups: BTreeMap<u64, Registered>,
    /// The message handlers of each route: one, or one for each of several transporters.
    messages: HashMap<Route, Vec<Arc<HandlerRef>>>,
    tables: HashMap<TransportId, watch::Sender<Arc<RouteTable>>>,
    /// What the servers speak.
    transports: Vec<TransportInfo>,
    next: u64,
    /// The service has stopped.
    over: bool,
}

#[derive(Default)]
struct Registered {
    handlers: Vec<Arc<HandlerRef>>,
    /// Who runs them, kept alive as long as they are routed.
    _replicas: Vec<Arc<Replicas>>,
    /// Their place in the tree, kept as long as they are routed.
    _children: Vec<Child>,
}

#[derive(Message)]
#[rtype(result = "Result<RegistrationId, StartError>")]
struct Register {
    groups: Vec<HandlerGroup>,
}

#[derive(Message)]
#[rtype(result = "bool")]
struct Unregister {
    id: RegistrationId,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Release;

#[derive(Message)]
#[rtype(result = "Result<watch::Receiver<Arc<RouteTable>>, StartError>")]
struct Watch {
    transport: TransportInfo,
}

#[derive(Message)]
#[rtype(result = "Vec<HandlerReport>")]
struct Report;

impl Actor for RegistryActor {
    type Context = Context<Self>;
}

impl Handler<Register> for RegistryActor {
    // Registrations happen one after the other: each sees the ones before.
    type Result = AtomicResponse<Self, Result<RegistrationId, StartError>>;

    fn handle(&mut self, Register { groups }: Register, _ctx: &mut Self::Context) -> Self::Result {
        if let Err(error) = self.check(&groups) {
            return AtomicResponse::new(Box::pin(async { Err(error) }.into_actor(self)));
        }
        let build = build_groups(
            groups,
            self.arbiters.clone(),
            self.events.clone(),
            self.child.clone(),
            self.escalate.clone(),
            Arc::clone(&self.families),
            Arc::clone(&self.global),
        );
        AtomicResponse::new(Box::pin(build.into_actor(self).map_ok(|registered, actor, _| {
            let id = actor.next;
            actor.next += 1;
            let handlers = &registered.handlers;
            for handler in handlers.iter().filter(|handler| handler.info.kind == HandlerKind::Message) {
                let route = handler.info.pattern.route().clone();
                actor.messages.entry(route).or_default().push(Arc::clone(handler));
            }
            actor.publish(&[], handlers);
            actor.groups.insert(id, registered);
            RegistrationId(id)
        })))
    }
}

impl Handler<Unregister> for RegistryActor {
    type Result = AtomicResponse<Self, bool>;

    fn handle(&mut self, Unregister { id }: Unregister, _ctx: &mut Self::Context) -> Self::Result {
        AtomicResponse::new(Box::pin(async {}.into_actor(self).map(move |(), actor, _| {
            let Some(group) = actor.groups.remove(&id.0) else { return false };
            for handler in &group.handlers {
                let route = handler.info.pattern.route();
                if let Some(messages) = actor.messages.get_mut(route) {
                    messages.retain(|message| !Arc::ptr_eq(message, handler));
                    if messages.is_empty() {
                        actor.messages.remove(route);
                    }
                }
            }
            actor.publish(&group.handlers, &[]);
            true
        })))
    }
}

impl Handler<Release> for RegistryActor {
    type Result = ();

    fn handle(&mut self, _: Release, _ctx: &mut Self::Context) {
        self.over = true;
        while let Some((_, group)) = self.groups.pop_last() {
            drop(group);
        }
    }
}

impl Handler<Watch> for RegistryActor {
    type Result = actix::MessageResult<Watch>;

    fn handle(&mut self, Watch { transport }: Watch, _ctx: &mut Self::Context) -> Self::Result {
        let infos = self.handlers().map(|handler| &handler.info);
        if let Err(error) = check_policies(infos, &transport) {
            return actix::MessageResult(Err(error));
        }
        let id = transport.id;
        if !self.transports.iter().any(|known| known.id == id && known.settles == transport.settles) {
            self.transports.push(transport);
        }
        if !self.tables.contains_key(&id) {
            let handlers = self.handlers().filter(|handler| serves(handler, id));
            let table = RouteTable::default().changed([], handlers);
            self.tables.insert(id, watch::Sender::new(Arc::new(table)));
        }
        let sender = &self.tables[&id];
        actix::MessageResult(Ok(sender.subscribe()))
    }
}

impl Handler<Report> for RegistryActor {
    type Result = Vec<HandlerReport>;

    fn handle(&mut self, _: Report, _ctx: &mut Self::Context) -> Self::Result {
        self.handlers().map(|handler| handler.report()).collect()
    }
}

impl RegistryActor {
    fn handlers(&self) -> impl Iterator<Item = &Arc<HandlerRef>> {
        self.groups.values().flat_map(|group| &group.handlers)
    }

    /// Refuses a second message handler for a route, wherever both would be reachable, and anything after the stop.
    fn check(&self, groups: &[HandlerGroup]) -> Result<(), StartError> {
        if self.over {
            return Err(StartError::Stopped);
        }
        let mut have: HashMap<&Route, Vec<&HandlerInfo>> = HashMap::new();
        let new = groups.iter().flat_map(HandlerGroup::handlers);
        for info in new.filter(|info| info.kind == HandlerKind::Message) {
            let route = info.pattern.route();
            let others = have.entry(route).or_insert_with(|| {
                let registered = self.messages.get(route).into_iter().flatten();
                registered.map(|handler| &handler.info).collect()
            });
            let clash = others.iter().find(|other| match (other.transport, info.transport) {
                (Some(one), Some(two)) => one == two,
                _ => true,
            });
            if let Some(other) = clash {
                let transport = match info.transport.or(other.transport) {
                    Some(TransportId::TCP) => "tcp".to_owned(),
                    Some(TransportId::NATS) => "nats".to_owned(),
                    Some(TransportId(number)) => format!("transport {number}"),
                    None => "every transport".to_owned(),
                };
                return Err(StartError::DuplicateHandler {
                    pattern: info.pattern.route().to_string(),
                    transport,
                    first: other.place(),
                    second: info.place(),
                });
            }
            others.push(info);
        }
        for transport in &self.transports {
            check_policies(groups.iter().flat_map(HandlerGroup::handlers), transport)?;
        }
        Ok(())
    }

    fn publish(&self, removed: &[Arc<HandlerRef>], added: &[Arc<HandlerRef>]) {
        for (transport, sender) in &self.tables {
            let of_it = |handlers: &'_ [Arc<HandlerRef>]| {
                handlers.iter().filter(|handler| serves(handler, *transport)).cloned().collect::<Vec<_>>()
            };
            let (removed, added) = (of_it(removed), of_it(added));
            if removed.is_empty() && added.is_empty() {
                continue;
            }
            let table = sender.borrow().changed(&removed, &added);
            sender.send_replace(Arc::new(table));
        }
    }
}

/// Whether a handler serves a transporter.
fn serves(handler: &HandlerRef, transport: TransportId) -> bool {
    handler.info.transport.is_none_or(|only| only == transport)
}

/// Refuses a handler's failure policy that a transporter which serves it cannot honour.
fn check_policies<'a>(
    handlers: impl Iterator<Item = &'a HandlerInfo>,
    transport: &TransportInfo,
) -> Result<(), StartError> {
    for info in handlers.filter(|info| info.transport.is_none_or(|only| only == transport.id)) {
        if let Some(reason) = info.on_failure.as_ref().and_then(|policy| transport.settles.refuses(policy)) {
            return Err(StartError::FailurePolicy {
                of: format!("handler {}", info.place()),
                transport: transport.name.to_string(),
                reason,
            });
        }
    }
    Ok(())
}

/// Builds the replicas of every group on their arbiters.
async fn build_groups(
    groups: Vec<HandlerGroup>,
    arbiters: Arbiters,
    events: EventBus,
    child: Child,
    escalate: EscalateFn,
    families: Arc<watch::Sender<()>>,
    global: Arc<[Arc<dyn Interceptor>]>,
) -> Result<Registered, StartError> {
    let mut registered = Registered::default();
    for group in groups {
        let count = match group.placement {
            Placement::PerArbiter => arbiters.len(),
            Placement::Singleton => 1,
        };
        let group = Arc::new(group);
        let identity = Identity::default();
        // An actor of the group that gives up escalates as its group does.
        let escalate = match group.supervision.escalation {
            Escalation::StopService => escalate.clone(),
            Escalation::Isolate => EscalateFn(Arc::new(|_| {})),
        };
        let mut building = Vec::new();
        let mut replica_stats: Vec<Vec<Arc<HandlerStats>>> = Vec::new();
        for arbiter in 0..count {
            let name: Arc<str> = if count == 1 {
                Arc::clone(&group.name)
            } else {
                Arc::from(format!("{}#{arbiter}", group.name))
            };
            let place = child.child(name, "handlers");
            registered._children.push(place.clone());
            let context = ReplicaContext {
                arbiter,
                child: place.clone(),
                events: events.clone(),
                escalate: escalate.clone(),
                families: Arc::clone(&families),
            };
            let stats: Vec<Arc<HandlerStats>> = group.handlers.iter().map(|_| Arc::default()).collect();
            replica_stats.push(stats.clone());
            let watched = stats.clone();
            place.watch_in_flight(move || watched.iter().map(|stats| stats.in_flight.get()).sum());
            let (group, global, identity) = (Arc::clone(&group), Arc::clone(&global), Arc::clone(&identity));
            building.push(arbiters.run_on(arbiter, move || async move {
                let built = HandlerActor::build(&group, &stats, context, &global, identity);
                built.map(|actor| actor.start().recipient())
            }));
        }
        let mut recipients = Vec::new();
        for built in building {
            let what = format!("the factory of {}", group.name);
            let panicked = |cause: String| StartError::Panicked { what, cause };
            recipients.push(match tokio::time::timeout(BUILD_TIMEOUT, built).await {
                Ok(Ok(Ok(recipient))) => recipient,
                Ok(Ok(Err(cause))) => return Err(panicked(cause)),
                Ok(Err(_)) => return Err(panicked("its arbiter has stopped".to_owned())),
                Err(_) => return Err(panicked(format!("it took longer than {BUILD_TIMEOUT:?}"))),
            });
        }
        let replicas = Arc::new(Replicas {
            identity,
            recipients,
            mailbox_capacity: group.supervision.mailbox_capacity,
            batch_size: group.supervision.batch_size(),
        });
        for (endpoint, (info, _)) in group.handlers.iter().enumerate() {
            registered.handlers.push(Arc::new(HandlerRef {
                info: info.clone(),
                replicas: Arc::downgrade(&replicas),
                endpoint: endpoint as u32,
                stats: replica_stats.iter().map(|stats| Arc::clone(&stats[endpoint])).collect(),
            }));
        }
        registered._replicas.push(replicas);
    }
    Ok(registered)
}
