// SPDX-License-Identifier: MIT OR Apache-2.0
//! The route table: what every session looks patterns up in. Immutable; the registry publishes a new one
//! on each change, and sessions pick it up without asking anyone.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use actix::Recipient;
use hashbrown::HashMap;
use serde::Serialize;

use crate::pattern::{Pattern, Route, route_of_incoming};
use crate::payload::Format;
use crate::replica::InvokeBatch;
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
    /// One per arbiter, or a single one.
    pub(crate) recipients: Vec<Recipient<InvokeBatch>>,
    pub(crate) mailbox_capacity: usize,
    /// Requests per message.
    pub(crate) batch_size: usize,
}

/// A registered handler, as routes refer to it.
pub(crate) struct HandlerRef {
    pub(crate) info: HandlerInfo,
    pub(crate) replicas: Arc<Replicas>,
    pub(crate) endpoint: u32,
    /// One per replica.
    pub(crate) stats: Vec<Arc<HandlerStats>>,
}

impl HandlerRef {
    /// The replica that serves an arbiter.
    pub(crate) fn replica(&self, arbiter: usize) -> Option<&Recipient<InvokeBatch>> {
        match self.replicas.recipients.as_slice() {
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
#[derive(Debug)]
pub struct RouteEntry {
    pub(crate) route: Route,
    /// Its place in the table.
    pub(crate) index: u32,
    pub(crate) pattern: Pattern,
    pub(crate) message: Option<Arc<HandlerRef>>,
    pub(crate) events: Vec<Arc<HandlerRef>>,
}

impl RouteEntry {
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
#[derive(Debug, Default)]
pub struct RouteTable {
    routes: HashMap<Route, Arc<RouteEntry>>,
    /// The raw spellings that NestJS clients send, so that the usual look-up parses nothing.
    spellings: HashMap<Box<[u8]>, Arc<RouteEntry>>,
    /// By place: in registration order, for subscriptions.
    entries: Vec<Arc<RouteEntry>>,
}

impl RouteTable {
    pub(crate) fn build(entries: Vec<RouteEntry>) -> Self {
        let mut table = Self::default();
        for (index, mut entry) in entries.into_iter().enumerate() {
            entry.index = index as u32;
            let entry = Arc::new(entry);
            for spelling in entry.route.raw_spellings() {
                table.spellings.insert(spelling.into_boxed_slice(), Arc::clone(&entry));
            }
            table.entries.push(Arc::clone(&entry));
            table.routes.insert(entry.route.clone(), entry);
        }
        table
    }

    /// The route at a place.
    pub(crate) fn route_at(&self, index: u32) -> Option<&Route> {
        Some(&self.entries.get(index as usize)?.route)
    }

    /// The entry at a place that came from this table.
    pub(crate) fn entry_at(&self, index: u32) -> &RouteEntry {
        &self.entries[index as usize]
    }

    /// Finds a route by its canonical text.
    pub fn get(&self, route: &Route) -> Option<&Arc<RouteEntry>> {
        self.routes.get(route)
    }

    /// Finds a route by the raw bytes of a packet's pattern: as they are, then normalised.
    pub fn find(&self, format: Format, raw: &[u8]) -> Option<&Arc<RouteEntry>> {
        if format == Format::Json
            && let Some(entry) = self.spellings.get(raw)
        {
            return Some(entry);
        }
        self.routes.get(&route_of_incoming(format, raw)?)
    }

    /// Every route, in registration order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<RouteEntry>> {
        self.entries.iter()
    }

    /// How many routes there are.
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
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
