// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one turn of a session has read for one replica: it gets its slots in one go and travels as one message.

use std::sync::{Arc, Weak};

use actix::prelude::SendError;

use crate::events::ServiceEvent;
use crate::in_flight::{Admission, Shared};
use crate::replica::{Duty, Invoke, InvokeBatch, overloaded};
use crate::request::{Parts, Scope};
use crate::responder::{Responder, SlotKey};
use crate::route::{HandlerRef, Replicas};
use crate::session::SessionEnv;

/// Requests for one replica that are not yet sent there, and their slots-to-be.
pub(crate) struct Batch<R> {
    /// Where it goes, and the handler of its first request.
    to: Option<(Arc<Replicas>, Arc<HandlerRef>)>,
    invokes: Vec<Invoke>,
    /// For those whose duty is a slot, in order.
    admissions: Vec<Admission<R>>,
    /// How many there were last time, which the next one is likely to have, too.
    room: usize,
}

impl<R> Default for Batch<R> {
    fn default() -> Self {
        Self { to: None, invokes: Vec::new(), admissions: Vec::new(), room: 0 }
    }
}

impl<R> Batch<R> {
    /// Whether a request for this handler can go with it; else it must be sent first, which keeps the order.
    pub(crate) fn fits(&self, handler: &Arc<HandlerRef>) -> bool {
        self.to.as_ref().is_some_and(|(replicas, _)| {
            Weak::as_ptr(&handler.replicas) == Arc::as_ptr(replicas)
                && self.invokes.len() < replicas.batch_size
        })
    }

    /// Begins with requests for this handler's replica; false when it is no longer there.
    pub(crate) fn begin(&mut self, handler: &Arc<HandlerRef>) -> bool {
        self.to = handler.replicas.upgrade().map(|replicas| (replicas, Arc::clone(handler)));
        self.to.is_some()
    }

    /// Adds a request that gets its slot when the batch is sent.
    pub(crate) fn push(&mut self, handler: &Arc<HandlerRef>, parts: Parts, admission: Admission<R>) {
        if self.admissions.is_empty() {
            self.admissions.reserve(self.room);
        }
        self.admissions.push(admission);
        self.add(handler, parts, Duty::Slot(SlotKey::NONE));
    }

    /// Adds a request that has its slot, and someone who answers it.
    pub(crate) fn push_with(&mut self, handler: &Arc<HandlerRef>, parts: Parts, responder: Responder) {
        self.add(handler, parts, Duty::Own(responder));
    }

    fn add(&mut self, handler: &Arc<HandlerRef>, parts: Parts, duty: Duty) {
        if self.invokes.is_empty() {
            self.invokes.reserve(self.room);
        }
        self.invokes.push(Invoke { endpoint: handler.endpoint, parts, duty });
    }

    /// Gives its requests their slots, and sends them.
    pub(crate) fn send(&mut self, shared: &Shared<R>, env: &SessionEnv, scope: Option<&Arc<Scope>>) {
        let Some((replicas, handler)) = self.to.take() else { return };
        let (Some(server), Some(scope)) = (&env.server, scope) else { return };
        // An idle connection keeps no memory for them.
        let mut invokes = std::mem::take(&mut self.invokes);
        let admissions = std::mem::take(&mut self.admissions);
        self.room = invokes.len();
        if !admissions.is_empty() {
            let mut inner = shared.inner.lock();
            let waiting = invokes.iter_mut().filter(|invoke| matches!(invoke.duty, Duty::Slot(_)));
            for (invoke, admission) in waiting.zip(admissions) {
                let slot = inner.admit(admission);
                invoke.parts.slot = slot;
                invoke.duty = Duty::Slot(slot);
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
