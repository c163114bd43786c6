// SPDX-License-Identifier: MIT OR Apache-2.0
//! The broker in the middle of a network in broker mode: subscriptions, routing, settlement.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use martlet_core::transport::{PacketId, Settlement, Subscription};
use martlet_core::{Headers, Route};

use super::line::{Frame, HubDelivery, Line};

/// How deliveries ended, as an in-memory broker that settles counted them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settlements {
    /// Every handler finished without an error.
    pub done: u64,
    /// A handler failed.
    pub failed: u64,
    /// Nobody handled it.
    pub unhandled: u64,
    /// A handler failed, and it was given back.
    pub requeued: u64,
    /// A handler failed, and it was dead-lettered.
    pub dead_lettered: u64,
    /// A handler failed, and it was discarded.
    pub discarded: u64,
    /// Given back by a service that stopped.
    pub handed_back: u64,
    /// Delivered once more, because it was handed back or its consumer's connection ended.
    pub redelivered: u64,
}

/// What a session hands to the hub.
#[derive(Debug)]
pub(super) enum Post {
    Publish { subject: Route, bytes: Bytes, headers: Headers, id: Option<PacketId> },
    Respond { client: Option<u64>, bytes: Bytes },
    Settle { tag: u64, settlement: Settlement },
    Subscribe(Subscription),
    Unsubscribe(Route),
    Cancel(Bytes),
}

#[derive(Debug, Default)]
pub(super) struct Hub {
    settles: bool,
    wildcards: bool,
    next: u64,
    turn: usize,
    sessions: BTreeMap<u64, Member>,
    unsettled: HashMap<u64, (u64, Message)>,
    /// Given back, and nobody there to take it.
    backlog: VecDeque<Message>,
    counts: Settlements,
}

#[derive(Debug)]
struct Member {
    line: Arc<Line>,
    routes: Vec<Route>,
}

#[derive(Debug, Clone)]
struct Message {
    subject: Route,
    bytes: Bytes,
    headers: Headers,
    reply: Option<u64>,
}

impl Hub {
    pub(super) fn new(settles: bool, wildcards: bool) -> Self {
        Self { settles, wildcards, ..Self::default() }
    }

    pub(super) fn join(&mut self, line: Arc<Line>, subscriptions: &[Subscription]) -> u64 {
        let id = self.next;
        self.next += 1;
        let routes = subscriptions.iter().map(|subscription| subscription.route.clone()).collect();
        self.sessions.insert(id, Member { line, routes });
        self.retry_backlog();
        id
    }

    /// A session has gone: what it had not settled is given to others.
    pub(super) fn leave(&mut self, id: u64) {
        self.sessions.remove(&id);
        let mut orphans: Vec<_> =
            self.unsettled.iter().filter(|(_, (session, _))| *session == id).map(|(tag, _)| *tag).collect();
        orphans.sort_unstable();
        for tag in orphans {
            self.redeliver(tag);
        }
    }

    pub(super) fn settlements(&self) -> Settlements {
        self.counts
    }

    pub(super) fn unsettled(&self) -> usize {
        self.unsettled.len() + self.backlog.len()
    }

    pub(super) fn subscribed(&self) -> Vec<Route> {
        self.sessions.values().flat_map(|member| member.routes.iter().cloned()).collect()
    }

    pub(super) fn post(&mut self, from: u64, post: Post) {
        match post {
            Post::Publish { subject, bytes, headers, id } => {
                let message = Message { subject, bytes, headers, reply: id.is_some().then_some(from) };
                if !self.route(&message, id.is_none() && !self.settles)
                    && let (Some(id), Some(member)) = (id, self.sessions.get(&from))
                {
                    member.line.force(Frame::Unreachable(id));
                }
            }
            Post::Respond { client, bytes } => {
                if let Some(member) = client.and_then(|client| self.sessions.get(&client)) {
                    member.line.force(Frame::Packet { bytes, headers: Headers::new() });
                }
            }
            Post::Settle { tag, settlement } => self.settle(tag, settlement),
            Post::Subscribe(subscription) => {
                if let Some(member) = self.sessions.get_mut(&from) {
                    member.routes.push(subscription.route);
                }
                self.retry_backlog();
            }
            Post::Unsubscribe(route) => {
                if let Some(member) = self.sessions.get_mut(&from) {
                    member.routes.retain(|have| *have != route);
                }
            }
            Post::Cancel(id) => {
                for member in self.sessions.values().filter(|member| !member.routes.is_empty()) {
                    member.line.force(Frame::Cancel(id.clone()));
                }
            }
        }
    }

    fn settle(&mut self, tag: u64, settlement: Settlement) {
        match settlement {
            Settlement::Done | Settlement::Finished => self.counts.done += 1,
            Settlement::Failed => self.counts.failed += 1,
            Settlement::Unhandled => self.counts.unhandled += 1,
            Settlement::DeadLetter => self.counts.dead_lettered += 1,
            Settlement::Discard => self.counts.discarded += 1,
            Settlement::Requeue => {
                self.counts.requeued += 1;
                self.redeliver(tag);
            }
            _ => {
                self.counts.handed_back += 1;
                // Its consumer is stopping; it must not get it again.
                if let Some((session, _)) = self.unsettled.get(&tag)
                    && let Some(member) = self.sessions.get_mut(session)
                {
                    member.routes.clear();
                }
                self.redeliver(tag);
            }
        }
        self.unsettled.remove(&tag);
    }

    fn redeliver(&mut self, tag: u64) {
        let Some((_, message)) = self.unsettled.remove(&tag) else { return };
        if self.route(&message, false) {
            self.counts.redelivered += 1;
        } else {
            self.backlog.push_back(message);
        }
    }

    fn retry_backlog(&mut self) {
        for message in std::mem::take(&mut self.backlog) {
            if self.route(&message, false) {
                self.counts.redelivered += 1;
            } else {
                self.backlog.push_back(message);
            }
        }
    }

    /// Delivers to one subscriber, or to all; `false` when there is none.
    fn route(&mut self, message: &Message, all: bool) -> bool {
        let mut takers: Vec<(u64, Arc<Line>, Route)> = self
            .sessions
            .iter()
            .filter_map(|(id, member)| {
                let route = member.routes.iter().find(|route| self.matches(route, &message.subject))?;
                Some((*id, Arc::clone(&member.line), route.clone()))
            })
            .collect();
        if takers.is_empty() {
            return false;
        }
        if !all && takers.len() > 1 {
            self.turn = self.turn.wrapping_add(1);
            let index = self.turn % takers.len();
            takers = vec![takers.swap_remove(index)];
        }
        for (session, line, route) in takers {
            let tag = self.next;
            self.next += 1;
            if self.settles {
                self.unsettled.insert(tag, (session, message.clone()));
            }
            let Message { subject, bytes, headers, reply } = message.clone();
            line.force(Frame::Delivery(HubDelivery { bytes, headers, route, subject, tag, reply }));
        }
        true
    }

    fn matches(&self, route: &str, subject: &str) -> bool {
        if !self.wildcards {
            return route == subject;
        }
        let (mut route, mut subject) = (route.split('.'), subject.split('.'));
        loop {
            match (route.next(), subject.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(_)) => {}
                (Some(one), Some(other)) if one == other => {}
                _ => return false,
            }
        }
    }
}
