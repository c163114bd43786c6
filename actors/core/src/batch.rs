// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a session's requests go: a replica on its own arbiter is called in place; for one on another arbiter those of
//! one turn are collected, get their slots in one go and travel as one message.

use std::rc::Rc;
use std::sync::{Arc, Weak};

use actix::prelude::SendError;

use crate::events::ServiceEvent;
use crate::in_flight::{Shared, Slot};
use crate::replica::{self, Duty, Invoke, InvokeBatch, Replica, overloaded};
use crate::request::{Request, Scope};
use crate::responder::{RequestKey, Responder};
use crate::route::{HandlerRef, Replicas};
use crate::session::SessionEnv;

/// Where the next request goes, and those that are not yet sent to another arbiter.
pub(crate) struct Batch<R> {
    to: Option<Target>,
    invokes: Vec<Invoke>,
    /// For those whose duty is a slot, in order.
    slots: Vec<Slot<R>>,
    /// How many there were last time, which the next one is likely to have, too.
    room: usize,
}

/// The replica that was asked for last: found once, and kept alive until the turn ends.
struct Target {
    replicas: Arc<Replicas>,
    /// The handler of its first request.
    handler: Arc<HandlerRef>,
    /// On this arbiter.
    here: Option<Rc<Replica>>,
}

impl<R> Default for Batch<R> {
    fn default() -> Self {
        Self { to: None, invokes: Vec::new(), slots: Vec::new(), room: 0 }
    }
}

impl<R> Batch<R> {
    /// Whether the next request can go to this handler; else this is sent, and aimed anew.
    pub(crate) fn aims_at(&self, handler: &Arc<HandlerRef>) -> bool {
        self.to.as_ref().is_some_and(|to| {
            Weak::as_ptr(&handler.replicas) == Arc::as_ptr(&to.replicas)
                && self.invokes.len() < to.replicas.batch_size
        })
    }

    /// Goes on with requests for this handler's replica; false when it is no longer there.
    pub(crate) fn aim(&mut self, handler: &Arc<HandlerRef>) -> bool {
        self.to = handler.replicas.upgrade().map(|replicas| {
            let here = replica::here(&replicas.identity);
            Target { replicas, handler: Arc::clone(handler), here }
        });
        self.to.is_some()
    }

    /// The replica, if it is on this arbiter: it is called, and nothing is added here.
    pub(crate) fn here(&self) -> Option<&Rc<Replica>> {
        self.to.as_ref()?.here.as_ref()
    }

    /// Adds a request that gets its slot when it is sent.
    pub(crate) fn push(&mut self, handler: &Arc<HandlerRef>, request: Request, slot: Slot<R>) {
        if self.slots.is_empty() {
            self.slots.reserve(self.room);
        }
        self.slots.push(slot);
        self.add(handler, request, Duty::Slot(RequestKey::NONE));
    }

    /// Adds a request that has its slot, and someone who answers it.
    pub(crate) fn push_with(&mut self, handler: &Arc<HandlerRef>, request: Request, responder: Responder) {
        self.add(handler, request, Duty::Own(responder));
    }

    fn add(&mut self, handler: &Arc<HandlerRef>, request: Request, duty: Duty) {
        if self.invokes.is_empty() {
            self.invokes.reserve(self.room);
        }
        self.invokes.push(Invoke { endpoint: handler.endpoint, request, duty });
    }

    /// Ends the turn with this replica: what was added gets its slots and is sent.
    pub(crate) fn send(&mut self, shared: &Shared<R>, env: &SessionEnv, scope: Option<&Arc<Scope>>) {
        let Some(Target { replicas, handler, .. }) = self.to.take() else { return };
        if self.invokes.is_empty() {
            return;
        }
        let (Some(server), Some(scope)) = (&env.server, scope) else { return };
        // An idle connection keeps no memory for them.
        let mut invokes = std::mem::take(&mut self.invokes);
        let slots = std::mem::take(&mut self.slots);
        self.room = invokes.len();
        if !slots.is_empty() {
            let mut inner = shared.inner.lock();
            let waiting = invokes.iter_mut().filter(|invoke| matches!(invoke.duty, Duty::Slot(_)));
            for (invoke, slot) in waiting.zip(slots) {
                let key = shared.next_key();
                inner.slots.insert(key, slot);
                invoke.request.0.slot = key;
                invoke.duty = Duty::Slot(key);
            }
        }
        let batch = InvokeBatch { scope: Arc::clone(scope), invokes };
        // Whoever is not answered here is answered by the batch being dropped.
        let Some(replica) = replicas.on(server.arbiter) else { return };
        match replica.try_send(batch) {
            Ok(()) => {}
            Err(SendError::Full(mut batch)) => {
                env.events.emit(ServiceEvent::BoundHit {
                    place: Arc::clone(&handler.info.name),
                    bound: "mailbox_capacity",
                    limit: replicas.mailbox_capacity as u64,
                    action: "the requests were answered with an overload error",
                });
                for invoke in batch.invokes.drain(..) {
                    invoke.duty.into_responder(scope).fail(&overloaded());
                }
            }
            // Unrouted meanwhile.
            Err(SendError::Closed(batch)) => drop(batch),
        }
    }
}
