// SPDX-License-Identifier: MIT OR Apache-2.0
//! Supervision: actors rebuilt from their factory after a panic, behind the same address.
//!
//! The words are OTP's. A [`ChildSpec`] has a factory, a [`RestartPolicy`], a [`RestartIntensity`], a backoff and
//! a shutdown time; a [`Supervisor`] has several children in order, a [`Strategy`] and one intensity for all of
//! them. A supervised actor runs inside a future of ours around actix's public `ContextFut` (`member.rs`): a panic
//! in any of its handlers, timers or spawned futures is caught there, the state is replaced by a fresh one
//! from the factory, and the mailbox goes on (messages that arrive meanwhile wait in it). The message that
//! panicked is gone: its sender gets `MailboxError::Closed`, its route answers an error. What follows an end is
//! decided in one place (`supervisor.rs`), whether a child stands alone or has siblings.
//!
//! actix's own `Supervisor` restarts only after `ctx.stop()`, with the old state, at once and as often as
//! asked; a panic ends it for good.
//!
//! Needs `panic = "unwind"`, which is Rust's default.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use actix::{Actor, Addr, Context, Supervised};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::backoff::BackoffOptions;
use crate::events::EventBus;
pub use crate::supervisor::{Family, Siblings, Strategy, Supervisor};

/// When a child that ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RestartPolicy {
    /// Always: after a panic and after it stopped itself. The default.
    #[default]
    Permanent,
    /// After a panic only.
    Transient,
    /// Never.
    Temporary,
}

/// How many restarts in how long are allowed before the supervisor gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestartIntensity {
    /// This many restarts are allowed,
    pub max_restarts: u32,
    /// in this time.
    pub within: Duration,
}

impl Default for RestartIntensity {
    /// 10 restarts in 10 seconds.
    fn default() -> Self {
        Self { max_restarts: 10, within: Duration::from_secs(10) }
    }
}

/// Restarts seen lately, against an intensity. Pure but for the instants it is given.
#[derive(Debug)]
pub(crate) struct RestartWindow {
    intensity: RestartIntensity,
    restarts: VecDeque<Instant>,
}

impl RestartWindow {
    pub(crate) fn new(intensity: RestartIntensity) -> Self {
        Self { intensity, restarts: VecDeque::new() }
    }

    /// Counts a restart; `false` when it is one too many.
    pub(crate) fn allow(&mut self, now: Instant) -> bool {
        while let Some(first) = self.restarts.front()
            && now.duration_since(*first) >= self.intensity.within
        {
            self.restarts.pop_front();
        }
        if self.restarts.len() >= self.intensity.max_restarts as usize {
            return false;
        }
        self.restarts.push_back(now);
        true
    }
}

/// What a supervisor that gave up does to the service around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Escalation {
    /// The child stays down, its routes answer an error, the rest goes on. The default.
    #[default]
    Isolate,
    /// The service drains and stops, and says which child was the cause.
    StopService,
}

/// The text of a panic's payload.
pub(crate) fn panic_text(payload: Box<dyn Any + Send>) -> String {
    // Dropping a payload may panic again.
    let text = match payload.downcast::<String>() {
        Ok(text) => return *text,
        Err(payload) => match payload.downcast::<&'static str>() {
            Ok(text) => return (*text).to_owned(),
            Err(payload) => payload,
        },
    };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(text)));
    "a panic without a text".to_owned()
}

// === the tree ===

/// How a child of the tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ChildState {
    /// At work.
    Running,
    /// Waiting out its backoff.
    Restarting,
    /// Its supervisor gave up.
    Failed,
    /// Ended on purpose.
    Stopped,
}

/// One place in the supervision tree. Clones are the same place; it leaves the tree when the last clone
/// is dropped.
#[derive(Clone)]
pub struct Child {
    node: Arc<Node>,
}

struct Node {
    name: Arc<str>,
    kind: &'static str,
    state: Mutex<NodeState>,
    restarts: AtomicU64,
    in_flight: Mutex<Option<Gauge>>,
    children: Mutex<Vec<Weak<Node>>>,
}

/// Looks up a number that somebody else keeps.
type Gauge = Box<dyn Fn() -> u64 + Send + Sync>;

struct NodeState {
    state: ChildState,
    last_cause: Option<String>,
}

/// The supervision tree as a value: who runs, restarts, last cause, in flight.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct TreeReport {
    /// The child's name.
    pub name: String,
    /// What it is: `service`, `registry`, `handlers`, `supervisor`, `actor`, `connection`, `listener`, `client`.
    pub kind: &'static str,
    /// How it is.
    pub state: ChildState,
    /// How often it was restarted.
    pub restarts: u64,
    /// What ended it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_cause: Option<String>,
    /// Requests and events it works on now.
    pub in_flight: u64,
    /// Those it supervises.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<TreeReport>,
}

impl TreeReport {
    /// The first place of a name in this part of the tree.
    pub fn find(&self, name: &str) -> Option<&TreeReport> {
        if self.name == name {
            return Some(self);
        }
        self.children.iter().find_map(|child| child.find(name))
    }
}

impl fmt::Debug for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Child").field("name", &self.node.name).field("kind", &self.node.kind).finish()
    }
}

impl Child {
    /// A root.
    pub fn root(name: impl Into<Arc<str>>, kind: &'static str) -> Self {
        Self {
            node: Arc::new(Node {
                name: name.into(),
                kind,
                state: Mutex::new(NodeState { state: ChildState::Running, last_cause: None }),
                restarts: AtomicU64::new(0),
                in_flight: Mutex::default(),
                children: Mutex::default(),
            }),
        }
    }

    /// A child of this one.
    pub fn child(&self, name: impl Into<Arc<str>>, kind: &'static str) -> Self {
        let child = Self::root(name, kind);
        let mut children = self.node.children.lock();
        // Those that left are swept when they may be half of all: a hundred thousand children cost no more
        // than that many steps.
        if children.len() == children.capacity() {
            children.retain(|weak| weak.strong_count() > 0);
        }
        children.push(Arc::downgrade(&child.node));
        child
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.node.name
    }

    /// Its state.
    pub fn state(&self) -> ChildState {
        self.node.state.lock().state
    }

    pub(crate) fn set_state(&self, state: ChildState) {
        self.node.state.lock().state = state;
    }

    pub(crate) fn failed_with(&self, state: ChildState, cause: &str) {
        let mut now = self.node.state.lock();
        now.state = state;
        now.last_cause = Some(cause.to_owned());
    }

    /// Counts a restart and says how many there were.
    pub(crate) fn count_restart(&self) -> u64 {
        self.node.restarts.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Where to look up what it works on.
    pub(crate) fn watch_in_flight(&self, gauge: impl Fn() -> u64 + Send + Sync + 'static) {
        *self.node.in_flight.lock() = Some(Box::new(gauge));
    }

    /// This part of the tree, as a value.
    pub fn report(&self) -> TreeReport {
        self.node.report()
    }
}

impl Node {
    fn report(&self) -> TreeReport {
        let children: Vec<_> = self.children.lock().iter().filter_map(Weak::upgrade).collect();
        let state = self.state.lock();
        TreeReport {
            name: self.name.to_string(),
            kind: self.kind,
            state: state.state,
            restarts: self.restarts.load(Ordering::Relaxed),
            last_cause: state.last_cause.clone(),
            in_flight: self.in_flight.lock().as_ref().map(|gauge| gauge()).unwrap_or_default(),
            children: children.iter().map(|child| child.report()).collect(),
        }
    }
}

// === supervised actors ===

/// How a supervised child is built and how its end is answered.
pub struct ChildSpec<A> {
    pub(crate) factory: Arc<dyn Fn() -> A + Send + Sync>,
    pub(crate) policy: RestartPolicy,
    pub(crate) intensity: RestartIntensity,
    pub(crate) backoff: BackoffOptions,
    pub(crate) shutdown: Duration,
    pub(crate) mailbox_capacity: usize,
}

impl<A> Clone for ChildSpec<A> {
    fn clone(&self) -> Self {
        Self { factory: Arc::clone(&self.factory), ..*self }
    }
}

impl<A> fmt::Debug for ChildSpec<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildSpec")
            .field("policy", &self.policy)
            .field("intensity", &self.intensity)
            .field("backoff", &self.backoff)
            .field("shutdown", &self.shutdown)
            .field("mailbox_capacity", &self.mailbox_capacity)
            .finish_non_exhaustive()
    }
}

/// An actor that can be supervised: with actix's plain `Context`, and `Supervised` as the derive macro writes it.
/// Implemented for all of them.
#[diagnostic::on_unimplemented(
    message = "the actor `{Self}` cannot be supervised",
    label = "not a supervised actor",
    note = "derive `martlet::Supervised` for it: after a panic it is replaced by a fresh one from its factory",
    note = "its context must be `actix::Context<Self>`"
)]
pub trait Supervisable: Actor<Context = Context<Self>> + Supervised {}

impl<A: Actor<Context = Context<A>> + Supervised> Supervisable for A {}

impl<A: Supervisable> ChildSpec<A> {
    /// A permanent child with the default intensity, a backoff from 10 ms to 1 s, a shutdown time of 5 s and a mailbox
    /// of 1024.
    pub fn new(factory: impl Fn() -> A + Send + Sync + 'static) -> Self {
        Self {
            factory: Arc::new(factory),
            policy: RestartPolicy::default(),
            intensity: RestartIntensity::default(),
            backoff: BackoffOptions::between(Duration::from_millis(10), Duration::from_secs(1)),
            shutdown: Duration::from_secs(5),
            mailbox_capacity: 1024,
        }
    }

    /// When it is started again. Default: always.
    #[must_use]
    pub fn policy(mut self, policy: RestartPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// How many restarts in how long are allowed; one more and its supervisor gives up: the mailbox is
    /// closed. Default: 10 in 10 s. It is that of a child started alone: in a [`Supervisor`], the supervisor's own
    /// counts for all of its children.
    #[must_use]
    pub fn intensity(mut self, max_restarts: u32, within: Duration) -> Self {
        self.intensity = RestartIntensity { max_restarts, within };
        self
    }

    /// The pause before a restart; messages that arrive meanwhile wait in the mailbox. Default: from
    /// 10 ms to 1 s.
    #[must_use]
    pub fn backoff(mut self, backoff: BackoffOptions) -> Self {
        self.backoff = backoff;
        self
    }

    /// How long it may take to end when its [`Supervisor`] stops it: an actor whose `stopping` answers
    /// `Running::Continue` has that long to finish what it does and to call `ctx.stop()` again; then it is dropped.
    /// Default 5 s. (A child started alone ends when nobody has its address.)
    #[must_use]
    pub fn shutdown(mut self, time: Duration) -> Self {
        self.shutdown = time;
        self
    }

    /// How many messages may wait. Default 1024; a full mailbox refuses (`try_send`) or makes the sender
    /// wait (`send`).
    #[must_use]
    pub fn mailbox_capacity(mut self, messages: usize) -> Self {
        self.mailbox_capacity = messages;
        self
    }

    /// Builds the actor on this arbiter, under supervision. The address stays the same over restarts.
    ///
    /// # Panics
    ///
    /// When the factory panics the first time, or outside of an actix system.
    pub fn start(self, child: Child, events: EventBus, on_give_up: impl FnOnce(String) + 'static) -> Addr<A> {
        crate::supervisor::start_alone(self, child, events, Box::new(on_give_up))
    }
}

thread_local! {
    static FACTORY: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
}

/// Runs `restart` with the factory at hand for [`rebuilt`], and says whether it was used.
pub(crate) fn with_factory<A: 'static, T>(
    factory: &Arc<dyn Fn() -> A + Send + Sync>,
    restart: impl FnOnce() -> T,
) -> (T, bool) {
    FACTORY.set(Some(Box::new(Arc::clone(factory))));
    let restarted = restart();
    (restarted, FACTORY.take().is_none())
}

/// A fresh actor from the factory, inside `Supervised::restarting` only.
///
/// The derive macro `Supervised` calls it; an implementation by hand reads:
///
/// ```
/// # use actix::prelude::*;
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// impl actix::Supervised for Counter {
///     fn restarting(&mut self, _ctx: &mut Context<Self>) {
///         if let Some(fresh) = martlet_core::supervise::rebuilt() {
///             *self = fresh;
///         }
///     }
/// }
/// ```
pub fn rebuilt<A: 'static>() -> Option<A> {
    let factory = FACTORY.with_borrow_mut(Option::take)?;
    let factory = factory.downcast::<Arc<dyn Fn() -> A + Send + Sync>>().ok()?;
    Some(factory())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_window_forgets_old_restarts() {
        let mut window =
            RestartWindow::new(RestartIntensity { max_restarts: 2, within: Duration::from_secs(1) });
        let start = Instant::now();
        assert!(window.allow(start));
        assert!(window.allow(start));
        assert!(!window.allow(start + Duration::from_millis(999)));
        assert!(window.allow(start + Duration::from_millis(1000)));
    }
}
