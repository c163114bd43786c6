// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a running service or client reports: one bus, closed set of events, also written to `tracing`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::broadcast;

use crate::error::{RpcError, SessionError};
use crate::pattern::Route;

/// How many events a subscriber may lag behind before it loses the oldest.
pub const EVENT_BACKLOG: usize = 1024;

/// Something that an operator may want to know.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ServiceEvent {
    /// A session ended with an error, or could not begin.
    Session {
        /// The transporter's name.
        transport: Arc<str>,
        /// The peer, where known.
        peer: Option<Arc<str>>,
        /// Why.
        error: SessionError,
    },
    /// A peer sent something that cannot be read. It was dropped (or, where the protocol demands it, its
    /// connection was closed); nothing else was disturbed.
    BadInput {
        /// The transporter's name.
        transport: Arc<str>,
        /// The peer, where known.
        peer: Option<Arc<str>>,
        /// What is wrong with it.
        reason: String,
    },
    /// A request for which no handler is registered. The caller was told.
    NoMessageHandler {
        /// The transporter's name.
        transport: Arc<str>,
        /// The pattern as received, cut at 256 bytes.
        pattern: String,
    },
    /// An event for which no handler is registered.
    NoEventHandler {
        /// The transporter's name.
        transport: Arc<str>,
        /// The pattern as received, cut at 256 bytes.
        pattern: String,
    },
    /// A handler failed with an error that is not for callers.
    UnexpectedError {
        /// The handler's route.
        route: Route,
        /// The error with its cause.
        error: RpcError,
    },
    /// A handler panicked. Its request was answered with an error.
    HandlerPanicked {
        /// The handler's route.
        route: Route,
        /// The panic's text.
        cause: String,
    },
    /// A supervised child was rebuilt from its factory.
    Restarted {
        /// The child's name in the supervision tree.
        child: Arc<str>,
        /// How often it was restarted so far.
        restarts: u64,
        /// What ended it.
        cause: String,
    },
    /// A supervised child exceeded its restart intensity and is not restarted any more.
    GaveUp {
        /// The child's name in the supervision tree.
        child: Arc<str>,
        /// What ended it last.
        cause: String,
    },
    /// A message that has killed its handler before was refused.
    PoisonRefused {
        /// The handler's route.
        route: Route,
        /// How often it has killed the handler.
        kills: u32,
    },
    /// A message whose handler failed is tried again, as its failure policy says.
    Retry {
        /// The transporter's name.
        transport: Arc<str>,
        /// The route.
        route: Route,
        /// Which attempt comes: 2 for the first repetition.
        attempt: u32,
        /// After which pause.
        pause: Duration,
    },
    /// A bound was reached.
    BoundHit {
        /// The transporter's or handler's name.
        place: Arc<str>,
        /// The option that holds the bound.
        bound: &'static str,
        /// Its value.
        limit: u64,
        /// What was done about it.
        action: &'static str,
    },
    /// Requests still running when the grace period ended were abandoned.
    Abandoned {
        /// The transporter's name.
        transport: Arc<str>,
        /// How many.
        count: u64,
    },
}

impl ServiceEvent {
    /// A short, stable name, for metrics and filters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Session { .. } => "session",
            Self::BadInput { .. } => "bad_input",
            Self::NoMessageHandler { .. } => "no_message_handler",
            Self::NoEventHandler { .. } => "no_event_handler",
            Self::UnexpectedError { .. } => "unexpected_error",
            Self::HandlerPanicked { .. } => "handler_panicked",
            Self::Restarted { .. } => "restarted",
            Self::GaveUp { .. } => "gave_up",
            Self::PoisonRefused { .. } => "poison_refused",
            Self::Retry { .. } => "retry",
            Self::BoundHit { .. } => "bound_hit",
            Self::Abandoned { .. } => "abandoned",
        }
    }
}

impl fmt::Display for ServiceEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = |peer: &Option<Arc<str>>| peer.as_ref().map(|p| format!(" ({p})")).unwrap_or_default();
        match self {
            Self::Session { transport, peer: p, error } => {
                write!(f, "{transport} session ended{}: {error}", peer(p))
            }
            Self::BadInput { transport, peer: p, reason } => {
                write!(f, "{transport} bad input{}: {reason}", peer(p))
            }
            // The texts of NestJS's own log lines.
            Self::NoMessageHandler { transport, pattern } => {
                write!(
                    f,
                    "{transport}: There is no matching message handler defined in the remote service. Pattern: {pattern}"
                )
            }
            Self::NoEventHandler { transport, pattern } => {
                write!(
                    f,
                    "{transport}: There is no matching event handler defined in the remote service. Event pattern: {pattern}"
                )
            }
            Self::UnexpectedError { route, error } => write!(f, "handler {route} failed: {error}"),
            Self::HandlerPanicked { route, cause } => write!(f, "handler {route} panicked: {cause}"),
            Self::Restarted { child, restarts, cause } => {
                write!(f, "{child} restarted (restart {restarts}): {cause}")
            }
            Self::GaveUp { child, cause } => write!(f, "{child} gave up: {cause}"),
            Self::PoisonRefused { route, kills } => {
                write!(f, "handler {route}: refused a message that has killed it {kills} times")
            }
            Self::Retry { transport, route, attempt, pause } => {
                write!(f, "{transport}: handler {route} failed, attempt {attempt} follows in {pause:?}")
            }
            Self::BoundHit { place, bound, limit, action } => {
                write!(f, "{place}: {bound} reached its limit of {limit}: {action}")
            }
            Self::Abandoned { transport, count } => {
                write!(f, "{transport}: {count} requests abandoned at the end of the grace period")
            }
        }
    }
}

type Callback = Arc<dyn Fn(&ServiceEvent) + Send + Sync>;

/// Where a service or a client reports. Clones share one bus.
#[derive(Clone)]
pub struct EventBus {
    inner: Arc<Inner>,
}

struct Inner {
    callbacks: RwLock<Vec<Callback>>,
    sender: broadcast::Sender<ServiceEvent>,
}

impl fmt::Debug for EventBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBus").finish_non_exhaustive()
    }
}

impl Default for EventBus {
    fn default() -> Self {
        let (sender, _) = broadcast::channel(EVENT_BACKLOG);
        Self { inner: Arc::new(Inner { callbacks: RwLock::default(), sender }) }
    }
}

impl EventBus {
    /// Calls `callback` for every event from now on, on the thread where the event happens. It must be
    /// quick; a panic in it is contained.
    pub fn on(&self, callback: impl Fn(&ServiceEvent) + Send + Sync + 'static) {
        self.inner.callbacks.write().push(Arc::new(callback));
    }

    /// A receiver of every event from now on. One that lags more than [`EVENT_BACKLOG`] events behind
    /// loses the oldest and is told how many.
    pub fn subscribe(&self) -> broadcast::Receiver<ServiceEvent> {
        self.inner.sender.subscribe()
    }

    /// Reports an event.
    pub fn emit(&self, event: ServiceEvent) {
        match &event {
            ServiceEvent::Restarted { .. }
            | ServiceEvent::NoEventHandler { .. }
            | ServiceEvent::Retry { .. } => {
                tracing::warn!(target: "martlet", event = event.name(), "{event}");
            }
            _ => tracing::error!(target: "martlet", event = event.name(), "{event}"),
        }
        let callbacks = self.inner.callbacks.read().clone();
        for callback in callbacks {
            let call = std::panic::AssertUnwindSafe(|| callback(&event));
            if std::panic::catch_unwind(call).is_err() {
                tracing::error!(target: "martlet", "an event callback panicked");
            }
        }
        // Nobody listening is fine.
        let _ = self.inner.sender.send(event);
    }
}
