// SPDX-License-Identifier: MIT OR Apache-2.0
//! A client's reply topics: subscribed before the first request, shared by all calls, given up when idle.

use std::collections::HashMap;
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use martlet_core::pattern::Route;
use martlet_core::transport::{OutboundMessage, PacketId};
use slab::Slab;
use tokio::time::{Instant, Sleep};

use crate::topics::REPLY;

/// A reply topic.
#[derive(Debug)]
struct Topic {
    route: Route,
    state: State,
    /// Calls that wait for a reply on it.
    calls: usize,
    idle_since: Instant,
    /// It is in the queue of idle topics.
    is_queued: bool,
}

#[derive(Debug)]
enum State {
    /// The broker has not confirmed it: requests wait, so that no reply is missed (MQTT-9).
    Subscribing(Vec<OutboundMessage>),
    Subscribed,
}

/// What is to be done with a request.
#[derive(Debug)]
pub(crate) enum Next {
    /// Publish it.
    Publish(OutboundMessage),
    /// Subscribe this filter; the request waits.
    Subscribe(usize, String),
    /// Nothing: it waits.
    Wait,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Replies {
    idle_for: Duration,
    topics: Slab<Topic>,
    by_route: HashMap<Route, usize>,
    pending: HashMap<PacketId, usize>,
    idle: Vec<usize>,
    timer: Option<Pin<Box<Sleep>>>,
    waiting_bytes: usize,
    /// What every id of this client begins with.
    prefix: Option<[u8; PREFIX]>,
}

const PREFIX: usize = 7;

fn prefix_of(id: &PacketId) -> [u8; PREFIX] {
    let mut prefix = [0; PREFIX];
    prefix.copy_from_slice(&id.text().as_bytes()[..PREFIX]);
    prefix
}

fn filter_of(route: &Route) -> String {
    format!("{route}{REPLY}")
}

fn size_of(message: &OutboundMessage) -> usize {
    message.data.bytes().len() + 64
}

impl Replies {
    pub(crate) fn new(idle_for: Duration) -> Self {
        Self {
            idle_for,
            topics: Slab::new(),
            by_route: HashMap::new(),
            pending: HashMap::new(),
            idle: Vec::new(),
            timer: None,
            waiting_bytes: 0,
            prefix: None,
        }
    }

    /// Whether requests to a route need not wait.
    pub(crate) fn is_subscribed(&self, route: &Route) -> bool {
        let topic = self.by_route.get(route).and_then(|key| self.topics.get(*key));
        topic.is_some_and(|topic| matches!(topic.state, State::Subscribed))
    }

    /// A request is to be sent.
    pub(crate) fn request(&mut self, id: PacketId, message: OutboundMessage) -> Next {
        self.prefix = Some(prefix_of(&id));
        let route = message.pattern.route();
        if let Some(&key) = self.by_route.get(route) {
            self.pending.insert(id, key);
            let topic = &mut self.topics[key];
            topic.calls += 1;
            return match &mut topic.state {
                State::Subscribed => Next::Publish(message),
                State::Subscribing(waiting) => {
                    self.waiting_bytes += size_of(&message);
                    waiting.push(message);
                    Next::Wait
                }
            };
        }
        let route = route.clone();
        let filter = filter_of(&route);
        self.waiting_bytes += size_of(&message);
        let key = self.topics.insert(Topic {
            route: route.clone(),
            state: State::Subscribing(vec![message]),
            calls: 1,
            idle_since: Instant::now(),
            is_queued: false,
        });
        self.by_route.insert(route, key);
        self.pending.insert(id, key);
        Next::Subscribe(key, filter)
    }

    /// The broker has confirmed a reply topic: what waited for it can go, except what was given up meanwhile.
    pub(crate) fn subscribed(&mut self, key: usize) -> Vec<OutboundMessage> {
        let Some(topic) = self.topics.get_mut(key) else { return Vec::new() };
        let State::Subscribing(waiting) = std::mem::replace(&mut topic.state, State::Subscribed) else {
            return Vec::new();
        };
        self.waiting_bytes -= waiting.iter().map(size_of).sum::<usize>();
        if topic.calls == 0 {
            self.is_idle_now(key);
        }
        let wanted = |message: &OutboundMessage| message.id.is_some_and(|id| self.pending.contains_key(&id));
        waiting.into_iter().filter(wanted).collect()
    }

    /// The broker has refused a reply topic: the calls that end with it.
    pub(crate) fn refused(&mut self, key: usize) -> Vec<PacketId> {
        let Some(topic) = self.topics.try_remove(key) else { return Vec::new() };
        self.by_route.remove(&topic.route);
        if let State::Subscribing(waiting) = &topic.state {
            self.waiting_bytes -= waiting.iter().map(size_of).sum::<usize>();
        }
        let calls: Vec<_> = self.pending.iter().filter(|(_, of)| **of == key).map(|(id, _)| *id).collect();
        for id in &calls {
            self.pending.remove(id);
        }
        calls
    }

    /// A call has ended. False if it had ended before, or is none of ours.
    pub(crate) fn end(&mut self, id: &PacketId) -> bool {
        let Some(key) = self.pending.remove(id) else { return false };
        if let Some(topic) = self.topics.get_mut(key) {
            topic.calls -= 1;
            if topic.calls == 0 && matches!(topic.state, State::Subscribed) {
                self.is_idle_now(key);
            }
        }
        true
    }

    /// Nobody waits for a call any more. True if its request has been handed over to be published, and no reply has
    /// ended it.
    pub(crate) fn cancel(&mut self, id: &PacketId) -> bool {
        let topic = self.pending.get(id).and_then(|key| self.topics.get(*key));
        let is_published = topic.is_some_and(|topic| matches!(topic.state, State::Subscribed));
        self.end(id);
        is_published
    }

    /// Whether a reply is to a call of this client, ended or not. Others share the reply topics.
    pub(crate) fn is_ours(&self, id: &PacketId) -> bool {
        self.prefix.is_some_and(|prefix| prefix == prefix_of(id))
    }

    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    /// The filters that the broker knows of.
    pub(crate) fn filters(&self) -> Vec<String> {
        self.topics.iter().map(|(_, topic)| filter_of(&topic.route)).collect()
    }

    fn is_idle_now(&mut self, key: usize) {
        let topic = &mut self.topics[key];
        topic.idle_since = Instant::now();
        if !std::mem::replace(&mut topic.is_queued, true) {
            self.idle.push(key);
        }
    }

    /// The filters of topics that nobody has used for long enough: they are to be unsubscribed.
    pub(crate) fn poll_idle(&mut self, cx: &mut Context<'_>) -> Vec<String> {
        let mut gone = Vec::new();
        if self.idle.is_empty() {
            return gone;
        }
        if let Some(timer) = &mut self.timer
            && timer.as_mut().poll(cx).is_pending()
        {
            return gone;
        }
        let now = Instant::now();
        let mut soonest: Option<Instant> = None;
        let (topics, by_route, idle_for) = (&mut self.topics, &mut self.by_route, self.idle_for);
        self.idle.retain(|&key| {
            let Some(topic) = topics.get_mut(key) else { return false };
            let until = topic.idle_since + idle_for;
            if topic.calls > 0 {
                topic.is_queued = false;
                return false;
            }
            if until > now {
                soonest = Some(soonest.map_or(until, |soonest| soonest.min(until)));
                return true;
            }
            let topic = topics.remove(key);
            by_route.remove(&topic.route);
            gone.push(filter_of(&topic.route));
            false
        });
        // Not too often: every time looks at every idle topic.
        self.timer = soonest.map(|soonest| {
            let mut timer = Box::pin(tokio::time::sleep_until(soonest.max(now + idle_for / 4)));
            if timer.as_mut().poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
            timer
        });
        gone
    }
}

#[cfg(test)]
#[path = "replies_tests.rs"]
mod tests;
