// SPDX-License-Identifier: MIT OR Apache-2.0
//! The route table: what every session looks patterns up in. Immutable; the registry publishes a new one
//! on each change, and sessions pick it up without asking anyone.

use std::fmt;
use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use actix::Recipient;
use hashbrown::HashMap;
use serde::Serialize;

use crate::pattern::{Pattern, Route, route_of_incoming};
use crate::payload::Format;
use crate::replica::{Identity, InvokeBatch};
use crate::settlement::FailurePolicy;
use crate::transport::{Subscription, TransportId};

/// Whether a handler answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HandlerKind {
    /// It answers: NestJS's `@MessagePattern`.
    Message,
    /// It does not: NestJS's `@EventPattern`.
    Event,
}

/// What is known of a handler when it is registered.
#[derive(Debug, Clone)]
pub struct HandlerInfo {
    /// A name for reports: `Math::sum`.
    pub name: Arc<str>,
    /// Where it was registered.
    pub location: &'static Location<'static>,
    /// Whether it answers.
    pub kind: HandlerKind,
    /// Its pattern.
    pub pattern: Pattern,
    /// The only transporter it serves; `None` for all.
    pub transport: Option<TransportId>,
    /// Free values that transporters read (NestJS's `extras`; NATS reads `queue`).
    pub extras: Arc<serde_json::Map<String, serde_json::Value>>,
    /// How many of its requests run at once on one replica; `None` for no bound of its own.
    pub concurrency: Option<usize>,
    /// What becomes of a message for which it failed; `None` for what the server says.
    pub on_failure: Option<FailurePolicy>,
}

impl HandlerInfo {
    /// A handler of a kind for a pattern, without limits.
    #[track_caller]
    pub fn new(name: impl Into<Arc<str>>, kind: HandlerKind, pattern: impl Into<Pattern>) -> Self {
        Self {
            name: name.into(),
            location: Location::caller(),
            kind,
            pattern: pattern.into(),
            transport: None,
            extras: Arc::default(),
            concurrency: None,
            on_failure: None,
        }
    }

    pub(crate) fn place(&self) -> String {
        format!("{} ({}:{})", self.name, self.location.file(), self.location.line())
    }
}

/// Counters of one handler on one replica: written by its arbiter alone, read by anyone.
#[derive(Debug, Default)]
pub(crate) struct HandlerStats {
    pub(crate) in_flight: Counter,
    pub(crate) handled: Counter,
    pub(crate) failed: Counter,
    pub(crate) panicked: Counter,
}

/// A counter with a single writer, which therefore needs no locked instruction.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, change: i64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add_signed(change), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The replicas of a group of handlers that share one actor.
pub(crate) struct Replicas {
    /// By which the one on a thread is found there.
    pub(crate) identity: Identity,
    /// One per arbiter, or a single one.
    pub(crate) recipients: Vec<Recipient<InvokeBatch>>,
    pub(crate) mailbox_capacity: usize,
    /// Requests per message.
    pub(crate) batch_size: usize,
}

/// A registered handler, as routes refer to it.
pub(crate) struct HandlerRef {
    pub(crate) info: HandlerInfo,
    /// Kept alive by the registry alone: a table that is still in use keeps no handler that was unrouted.
    pub(crate) replicas: Weak<Replicas>,
    pub(crate) endpoint: u32,
    /// One per replica.
    pub(crate) stats: Vec<Arc<HandlerStats>>,
}

impl Replicas {
    /// The replica that serves an arbiter.
    pub(crate) fn on(&self, arbiter: usize) -> Option<&Recipient<InvokeBatch>> {
        match self.recipients.as_slice() {
            [only] => Some(only),
            many => many.get(arbiter).or_else(|| many.first()),
        }
    }
}

impl fmt::Debug for HandlerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerRef").field("info", &self.info).finish_non_exhaustive()
    }
}

/// One route: who answers it, who hears it.
#[derive(Debug, Clone)]
pub struct RouteEntry {
    pub(crate) route: Route,
    /// Its place in the table.
    pub(crate) index: u32,
    /// The raw spellings that NestJS clients send.
    spellings: Arc<[Arc<[u8]>]>,
    pub(crate) pattern: Pattern,
    pub(crate) message: Option<Arc<HandlerRef>>,
    pub(crate) events: Vec<Arc<HandlerRef>>,
}

impl RouteEntry {
    /// A route that nobody handles yet, of a handler's pattern.
    fn of(pattern: &Pattern) -> Self {
        let route = pattern.route().clone();
        let spellings = route.raw_spellings().into_iter().map(Arc::from).collect();
        Self { route, index: NOWHERE, spellings, pattern: pattern.clone(), message: None, events: Vec::new() }
    }

    fn add(&mut self, handler: &Arc<HandlerRef>) {
        match handler.info.kind {
            HandlerKind::Message => self.message = Some(Arc::clone(handler)),
            HandlerKind::Event => self.events.push(Arc::clone(handler)),
        }
    }

    fn remove(&mut self, handler: &Arc<HandlerRef>) {
        self.message.take_if(|mine| Arc::ptr_eq(mine, handler));
        self.events.retain(|mine| !Arc::ptr_eq(mine, handler));
    }

    fn is_empty(&self) -> bool {
        self.message.is_none() && self.events.is_empty()
    }

    fn place(&self) -> Place {
        Place { route: self.route.clone(), pattern: self.pattern.clone() }
    }

    /// The route.
    pub fn route(&self) -> &Route {
        &self.route
    }

    /// The subscription a broker transporter makes for it.
    pub fn subscription(&self) -> Subscription {
        let first = self.message.as_ref().or_else(|| self.events.first());
        Subscription {
            route: self.route.clone(),
            pattern: self.pattern.clone(),
            kind: if self.message.is_some() { HandlerKind::Message } else { HandlerKind::Event },
            extras: first.map(|handler| Arc::clone(&handler.info.extras)).unwrap_or_default(),
        }
    }
}

/// An immutable table of routes.
///
/// A changed table shares the bulk of the one before: what has changed since lies over it, and is worked into a new
/// bulk when it has become too much. So a change costs about the square root of the number of routes, and looking up
/// is one step more only while something lies over.
#[derive(Debug, Default)]
pub struct RouteTable {
    bulk: Arc<Bulk>,
    recent: Recent,
    len: usize,
}

#[derive(Debug, Default)]
struct Bulk {
    routes: HashMap<Route, Arc<RouteEntry>>,
    /// By raw spelling, so that the usual look-up parses nothing.
    spellings: HashMap<Arc<[u8]>, Arc<RouteEntry>>,
    /// By index: in registration order, for subscriptions.
    order: Vec<Place>,
}

/// What an index of a table stands for.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) route: Route,
    pub(crate) pattern: Pattern,
}

/// What is not, or no more, as the bulk has it; `None` for a route that is gone.
#[derive(Debug, Default, Clone)]
struct Recent {
    routes: HashMap<Route, Option<Arc<RouteEntry>>>,
    spellings: HashMap<Arc<[u8]>, Option<Arc<RouteEntry>>>,
    /// Goes on where the bulk's ends.
    order: Vec<Place>,
}

/// The index of an entry that has no place yet.
const NOWHERE: u32 = u32::MAX;

impl Recent {
    fn size(&self) -> usize {
        self.routes.len().max(self.order.len())
    }

    fn set(&mut self, route: Route, spellings: &[Arc<[u8]>], entry: Option<Arc<RouteEntry>>) {
        for spelling in spellings {
            self.spellings.insert(Arc::clone(spelling), entry.clone());
        }
        self.routes.insert(route, entry);
    }
}

impl Bulk {
    fn of(entries: impl Iterator<Item = RouteEntry>) -> Self {
        let mut bulk = Self::default();
        for (index, mut entry) in entries.enumerate() {
            entry.index = index as u32;
            let entry = Arc::new(entry);
            for spelling in entry.spellings.iter() {
                bulk.spellings.insert(Arc::clone(spelling), Arc::clone(&entry));
            }
            bulk.order.push(entry.place());
            bulk.routes.insert(entry.route.clone(), entry);
        }
        bulk
    }

    /// How much may lie over it.
    fn bears(&self) -> usize {
        2 * self.routes.len().isqrt()
    }
}

impl RouteTable {
    /// This table without some handlers and with others, in order.
    pub(crate) fn changed<'a>(
        &self,
        removed: impl IntoIterator<Item = &'a Arc<HandlerRef>>,
        added: impl IntoIterator<Item = &'a Arc<HandlerRef>>,
    ) -> Self {
        let mut changed: HashMap<&Route, RouteEntry> = HashMap::new();
        let mut order = Vec::new();
        let current = |pattern: &Pattern| match self.get(pattern.route()) {
            Some(entry) => RouteEntry::clone(entry),
            None => RouteEntry::of(pattern),
        };
        for handler in removed {
            let pattern = &handler.info.pattern;
            changed.entry(pattern.route()).or_insert_with(|| current(pattern)).remove(handler);
        }
        for handler in added {
            let pattern = &handler.info.pattern;
            let entry = changed.entry(pattern.route()).or_insert_with(|| current(pattern));
            if entry.is_empty() {
                // It is new, or it had lost its handlers: it comes last.
                entry.index = NOWHERE;
                order.push(pattern.route());
            }
            entry.add(handler);
        }
        let mut recent = self.recent.clone();
        let mut len = self.len;
        let known = changed.extract_if(|_, entry| entry.index != NOWHERE).collect::<Vec<_>>();
        for (route, entry) in known {
            let spellings = Arc::clone(&entry.spellings);
            let entry = (!entry.is_empty()).then(|| Arc::new(entry));
            len -= usize::from(entry.is_none());
            recent.set(route.clone(), &spellings, entry);
        }
        for route in order {
            let Some(mut entry) = changed.remove(route) else { continue };
            entry.index = (self.bulk.order.len() + recent.order.len()) as u32;
            len += usize::from(self.get(route).is_none());
            let entry = Arc::new(entry);
            recent.order.push(entry.place());
            recent.set(route.clone(), &entry.spellings, Some(Arc::clone(&entry)));
        }
        let layered = Self { bulk: Arc::clone(&self.bulk), recent, len };
        if layered.recent.size() <= layered.bulk.bears() {
            return layered;
        }
        let bulk = Bulk::of(layered.iter().map(|entry| RouteEntry::clone(entry)));
        Self { bulk: Arc::new(bulk), recent: Recent::default(), len }
    }

    /// The routes that may have come, gone or changed since an earlier table: few after a few changes, and in the worst
    /// case those of both tables.
    pub fn changed_since(&self, earlier: &RouteTable) -> Vec<Route> {
        if Arc::ptr_eq(&self.bulk, &earlier.bulk) {
            let mut routes: Vec<_> = self.recent.routes.keys().cloned().collect();
            let more = earlier.recent.routes.keys().filter(|route| !self.recent.routes.contains_key(*route));
            routes.extend(more.cloned());
            return routes;
        }
        let gone = earlier.iter().filter(|entry| self.get(&entry.route).is_none());
        self.iter().chain(gone).map(|entry| entry.route.clone()).collect()
    }

    /// The route at a place.
    pub(crate) fn route_at(&self, index: u32) -> Option<&Route> {
        let index = index as usize;
        let entry = match index.checked_sub(self.bulk.order.len()) {
            None => self.bulk.order.get(index),
            Some(later) => self.recent.order.get(later),
        };
        Some(&entry?.route)
    }

    /// What an index of this table stands for.
    pub(crate) fn place_at(&self, index: u32) -> &Place {
        let index = index as usize;
        match index.checked_sub(self.bulk.order.len()) {
            None => &self.bulk.order[index],
            Some(later) => &self.recent.order[later],
        }
    }

    /// Finds a route by its canonical text.
    pub fn get(&self, route: &Route) -> Option<&Arc<RouteEntry>> {
        match self.recent.routes.get(route) {
            Some(changed) => changed.as_ref(),
            None => self.bulk.routes.get(route),
        }
    }

    /// Finds a route by the raw bytes of a packet's pattern: as they are, then normalised.
    pub fn find(&self, format: Format, raw: &[u8]) -> Option<&Arc<RouteEntry>> {
        if format == Format::Json {
            // Nothing lies over most tables, and then this looks at nothing.
            if let Some(changed) = self.recent.spellings.get(raw) {
                return changed.as_ref();
            }
            if let Some(entry) = self.bulk.spellings.get(raw) {
                return Some(entry);
            }
        }
        self.get(&route_of_incoming(format, raw)?)
    }

    /// Every route, in registration order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<RouteEntry>> {
        let order = self.bulk.order.iter().chain(&self.recent.order).enumerate();
        // A route that went and came back has its old place as well.
        order.filter_map(|(index, old)| self.get(&old.route).filter(|entry| entry.index as usize == index))
    }

    /// How many routes there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Counters of a handler, as a value.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct HandlerReport {
    /// The handler's name.
    pub name: String,
    /// Its route.
    pub route: String,
    /// Whether it answers.
    pub kind: HandlerKind,
    /// Requests and events it works on now.
    pub in_flight: u64,
    /// Requests and events it finished.
    pub handled: u64,
    /// Of those, how many failed.
    pub failed: u64,
    /// Of those, how many panicked.
    pub panicked: u64,
}

impl HandlerRef {
    pub(crate) fn report(&self) -> HandlerReport {
        let sum = |of: fn(&HandlerStats) -> &Counter| self.stats.iter().map(|stats| of(stats).get()).sum();
        HandlerReport {
            name: self.info.name.to_string(),
            route: self.info.pattern.route().to_string(),
            kind: self.info.kind,
            in_flight: sum(|stats| &stats.in_flight),
            handled: sum(|stats| &stats.handled),
            failed: sum(|stats| &stats.failed),
            panicked: sum(|stats| &stats.panicked),
        }
    }
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
