// SPDX-License-Identifier: MIT OR Apache-2.0
//! Supervisors: children in order, what the end of one means for the others, and when to give up.
//!
//! ```text
//! Family (the handle)
//! └─ Branch task             one per supervisor: hears of ends, decides, begins again
//!    ├─ Slot task            one per actor (member.rs)
//!    └─ Branch task          a supervisor below it
//!       └─ Slot task …
//! ```
//!
//! A branch hears everything in one bounded queue: that a member ended, that its own supervisor wants it stopped or
//! begun again, that its family is over. It owns no user code; what it waits for are pauses and the shutdown time of
//! its members. An actor that is supervised alone is a branch with one member.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use futures::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::backoff::{Backoff, BackoffOptions};
use crate::events::{EventBus, ServiceEvent};
use crate::member::{Ended, Member, Slot};
use crate::supervise::{
    Child, ChildSpec, ChildState, RestartIntensity, RestartPolicy, RestartWindow, Supervisable,
};

/// Which children begin again when one of them has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Strategy {
    /// That one. The default.
    #[default]
    OneForOne,
    /// All: for children none of which makes sense with another one's fresh state.
    OneForAll,
    /// That one and those that were started after it: for children that depend on earlier ones.
    RestForOne,
}

/// Several children under one supervisor: started in order, stopped in reverse, begun again as the [`Strategy`] says.
///
/// A value that describes them; [`start`](Self::start) makes a [`Family`] of it,
/// [`SupervisorGroup`](crate::handler::SupervisorGroup) routes patterns to them.
///
/// - A child that ended begins again if its [`RestartPolicy`] says so. Those that the strategy takes along are stopped
///   first, in reverse order (`stopping` and `stopped` run; each has its [shutdown time](ChildSpec::shutdown)). After
///   the pause of the one that ended all begin again in order, with fresh state from their factories.
/// - Addresses and mailboxes stay over restarts, so children may keep each other's. What waits in a mailbox is handled
///   by the fresh state.
/// - A child that is not begun again (transient and stopped itself; temporary) is over: its address is closed, its
///   siblings are not disturbed, and their restarts do not bring it back. A temporary child that is stopped for a
///   sibling's sake is over, too.
/// - Every end that leads to a restart counts against one [`RestartIntensity`]. One too many, and the supervisor stops
///   all its children and has failed itself: towards its own supervisor like a child that panicked, or, at the top, as
///   [`start`](Self::start)'s `on_give_up`.
/// - A supervisor that is begun again by its own counts from zero.
///
/// # Examples
///
/// ```
/// use actix::prelude::*;
/// use martlet_core::supervise::{Child, ChildSpec, Strategy, Supervisor};
/// use martlet_core::EventBus;
/// # #[derive(Default)]
/// # struct Ledger;
/// # impl Actor for Ledger { type Context = Context<Self>; }
/// # impl Supervised for Ledger {}
/// # struct Till(Addr<Ledger>);
/// # impl Actor for Till { type Context = Context<Self>; }
/// # impl Supervised for Till {}
///
/// let shop = Supervisor::new(Strategy::RestForOne)
///     .intensity(3, std::time::Duration::from_secs(60))
///     .child("ledger", |_| ChildSpec::new(Ledger::default))
///     .child("till", |siblings| {
///         let ledger = siblings.address::<Ledger>("ledger");
///         ChildSpec::new(move || Till(ledger.clone()))
///     });
///
/// # System::new().block_on(async move {
/// let place = Child::root("shop", "supervisor");
/// let family = shop.start(place, EventBus::default(), |cause| eprintln!("the shop is closed: {cause}"));
/// let till: Addr<Till> = family.address("till").expect("a child of that name and type");
/// # drop(till);
/// family.stop().await;
/// # });
/// ```
#[derive(Clone)]
pub struct Supervisor {
    strategy: Strategy,
    intensity: RestartIntensity,
    backoff: BackoffOptions,
    children: Vec<(Arc<str>, Plant)>,
}

/// Builds a member at its place.
type Plant = Arc<dyn Fn(&Plot<'_>, Child) -> Rc<dyn Member> + Send + Sync>;

/// Where members are built.
struct Plot<'a> {
    /// The supervisors above, each with a `/` behind it.
    path: &'a str,
    addresses: &'a Addresses,
    places: &'a RefCell<Vec<Child>>,
    events: &'a EventBus,
}

/// Every child's address, by its path. They keep the children alive that nobody else holds.
type Addresses = Rc<RefCell<BTreeMap<String, Box<dyn Any>>>>;

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervisor")
            .field("strategy", &self.strategy)
            .field("intensity", &self.intensity)
            .field("backoff", &self.backoff)
            .field("children", &self.children.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .finish()
    }
}

impl Supervisor {
    /// Without children, with the default intensity of 10 restarts in 10 s.
    #[must_use]
    pub fn new(strategy: Strategy) -> Self {
        Self {
            strategy,
            intensity: RestartIntensity::default(),
            backoff: BackoffOptions::between(Duration::from_millis(10), Duration::from_secs(1)),
            children: Vec::new(),
        }
    }

    /// How many restarts of children in how long are allowed; with one more it gives up. An end counts once, however
    /// many children begin again because of it. Default: 10 in 10 s.
    #[must_use]
    pub fn intensity(mut self, max_restarts: u32, within: Duration) -> Self {
        self.intensity = RestartIntensity { max_restarts, within };
        self
    }

    /// The pause before its own supervisor begins it again. (Its children have theirs.) Default: from 10 ms to 1 s.
    #[must_use]
    pub fn backoff(mut self, backoff: BackoffOptions) -> Self {
        self.backoff = backoff;
        self
    }

    /// Adds a child, which is started after those added before, whose addresses it gets. `spec` is called once per
    /// start of the family; the factory in it once per start of the child. The intensity of the specification is not
    /// looked at: the supervisor's counts.
    ///
    /// # Panics
    ///
    /// When there is a child of that name already.
    #[must_use]
    pub fn child<A>(
        self,
        name: impl Into<Arc<str>>,
        spec: impl Fn(&Siblings<'_>) -> ChildSpec<A> + Send + Sync + 'static,
    ) -> Self
    where
        A: Supervisable,
    {
        self.add(name.into(), "actor", move |plot, place| {
            let spec = spec(&Siblings { plot });
            let path = format!("{}{}", plot.path, place.name());
            let (slot, address) = Slot::new(spec, place);
            plot.addresses.borrow_mut().insert(path, Box::new(address));
            Rc::new(slot)
        })
    }

    /// Adds a supervisor below this one. Its children find their own siblings first, then those of this one that
    /// were started before.
    ///
    /// # Panics
    ///
    /// When there is a child of that name already.
    #[must_use]
    pub fn supervisor(self, name: impl Into<Arc<str>>, supervisor: Self) -> Self {
        self.add(name.into(), "supervisor", move |plot, place| {
            let path = format!("{}{}/", plot.path, place.name());
            let branch = supervisor.plant(&Plot { path: &path, ..*plot }, place.clone());
            let notices = branch.notices.clone();
            Rc::new(Below { place, backoff: supervisor.backoff, notices, branch: RefCell::new(Some(branch)) })
        })
    }

    fn add(
        mut self,
        name: Arc<str>,
        kind: &'static str,
        plant: impl Fn(&Plot<'_>, Child) -> Rc<dyn Member> + Send + Sync + 'static,
    ) -> Self {
        assert!(self.children.iter().all(|(other, _)| *other != name), "there is a child `{name}` already");
        let of = Arc::clone(&name);
        let plant = move |plot: &Plot<'_>, parent: Child| {
            let place = parent.child(Arc::clone(&of), kind);
            plot.places.borrow_mut().push(place.clone());
            plant(plot, place)
        };
        self.children.push((name, Arc::new(plant)));
        self
    }

    fn plant(&self, plot: &Plot<'_>, place: Child) -> Branch {
        let members = self.children.iter().map(|(_, plant)| plant(plot, place.clone())).collect();
        Branch::new(Some(place), plot.events.clone(), self, members)
    }

    /// Starts the children in order, on this arbiter, below `place` in the tree. `on_give_up` is called when the
    /// supervisor has given up, after its children were stopped.
    ///
    /// # Panics
    ///
    /// When a factory panics the first time; nothing is left running then. Outside of an actix system.
    pub fn start(&self, place: Child, events: EventBus, on_give_up: impl FnOnce(String) + 'static) -> Family {
        let addresses = Addresses::default();
        let places = RefCell::new(vec![place.clone()]);
        let plot = Plot { path: "", addresses: &addresses, places: &places, events: &events };
        let branch = self.plant(&plot, place);
        let notices = branch.notices.clone();
        let (over, ended) = watch::channel(());
        let kept = Rc::clone(&addresses);
        branch.begin_members();
        actix_rt::spawn(async move {
            let gave_up = branch.run(None).await;
            // Nobody waits for a child any more that the family itself kept alive.
            kept.borrow_mut().clear();
            drop(over);
            if let Some(cause) = gave_up {
                on_give_up(cause);
            }
        });
        Family { inner: Rc::new(FamilyInner { addresses, notices, ended, _places: places.into_inner() }) }
    }
}

/// The children that were started before the one that is being built.
pub struct Siblings<'a> {
    plot: &'a Plot<'a>,
}

impl fmt::Debug for Siblings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.plot.addresses.borrow().keys()).finish()
    }
}

impl Siblings<'_> {
    /// The address of a sibling, or of a child of a supervisor further up. It stays good over restarts.
    ///
    /// # Panics
    ///
    /// When no child of that name and type was started before: a mistake in the program, which shows when the family
    /// is started.
    #[track_caller]
    pub fn address<A: Actor>(&self, name: &str) -> Addr<A> {
        let addresses = self.plot.addresses.borrow();
        let mut scope = self.plot.path;
        loop {
            if let Some(found) = addresses.get(&format!("{scope}{name}")) {
                return found.downcast_ref::<Addr<A>>().cloned().unwrap_or_else(|| {
                    panic!("the child `{name}` is not a `{}`", std::any::type_name::<A>());
                });
            }
            if scope.is_empty() {
                let known: Vec<_> = addresses.keys().map(String::as_str).collect();
                panic!("no child `{name}` was started before; there are: {}", known.join(", "));
            }
            scope = scope.trim_end_matches('/').rfind('/').map_or("", |end| &scope[..=end]);
        }
    }
}

/// Running children of a [`Supervisor`]. Clones are the same family; when the last one is dropped, the children are
/// stopped in reverse order. The handle stays on the arbiter where the family was started; addresses may go anywhere.
#[derive(Clone)]
pub struct Family {
    inner: Rc<FamilyInner>,
}

struct FamilyInner {
    addresses: Addresses,
    notices: mpsc::Sender<Notice>,
    /// Closed when the family is over.
    ended: watch::Receiver<()>,
    /// So that children that failed are still seen in the tree.
    _places: Vec<Child>,
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.inner.addresses.borrow().keys()).finish()
    }
}

impl Family {
    /// The address of a child, by its name; of one below a supervisor of the family: `supervisor/child`. `None` when
    /// there is none of that name and type, or the family is over.
    pub fn address<A: Actor>(&self, path: &str) -> Option<Addr<A>> {
        self.inner.addresses.borrow().get(path)?.downcast_ref::<Addr<A>>().cloned()
    }

    /// The paths of the children, in alphabetical order.
    pub fn children(&self) -> Vec<String> {
        self.inner.addresses.borrow().keys().cloned().collect()
    }

    /// Stops the children in reverse order; ready when all have ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not undo it.
    pub async fn stop(&self) {
        self.inner.over();
        let mut ended = self.inner.ended.clone();
        // An error is the end.
        while ended.changed().await.is_ok() {}
    }
}

impl FamilyInner {
    fn over(&self) {
        // Full or closed: it knows already.
        let _ = self.notices.try_send(Notice::Close(None));
    }
}

impl Drop for FamilyInner {
    fn drop(&mut self) {
        self.over();
    }
}

/// Starts one actor that has no siblings.
pub(crate) fn start_alone<A>(
    spec: ChildSpec<A>,
    place: Child,
    events: EventBus,
    on_give_up: Box<dyn FnOnce(String)>,
) -> Addr<A>
where
    A: Supervisable,
{
    let RestartIntensity { max_restarts, within } = spec.intensity;
    let supervisor = Supervisor::new(Strategy::OneForOne).intensity(max_restarts, within);
    let (slot, address) = Slot::new(spec, place);
    let branch = Branch::new(None, events, &supervisor, vec![Rc::new(slot)]);
    branch.begin_members();
    actix_rt::spawn(async move {
        if let Some(cause) = branch.run(None).await {
            on_give_up(cause);
        }
    });
    address
}

// === impl Branch ===

/// What a branch hears.
enum Notice {
    /// A member has ended: with the cause if it did not stop itself.
    Ended { member: usize, cause: Option<String> },
    /// Its own supervisor wants it stopped, to begin it again or for good. Dropped when done, as the ones below.
    Stop(oneshot::Sender<()>),
    /// Its own supervisor begins it again.
    Restart(oneshot::Sender<()>),
    /// It is over.
    Close(Option<oneshot::Sender<()>>),
}

/// A supervisor at work.
struct Branch {
    /// Of an actor that is supervised alone there is none but the actor's.
    place: Option<Child>,
    events: EventBus,
    strategy: Strategy,
    intensity: RestartIntensity,
    window: RestartWindow,
    /// In the order of their start.
    members: Vec<Watched>,
    /// Those that begin again after a pause.
    pending: Vec<Pending>,
    /// Neither stopped nor given up.
    up: bool,
    /// Why it gave up, until its own supervisor was told.
    gave_up: Option<String>,
    notices: mpsc::Sender<Notice>,
    heard: mpsc::Receiver<Notice>,
}

/// A member and what its supervisor remembers of it.
struct Watched {
    member: Rc<dyn Member>,
    backoff: Backoff,
    running_since: Instant,
    /// It is not begun again.
    over: bool,
}

struct Pending {
    at: Instant,
    /// In the order of their start.
    members: Vec<usize>,
    cause: String,
}

impl Branch {
    fn new(
        place: Option<Child>,
        events: EventBus,
        supervisor: &Supervisor,
        members: Vec<Rc<dyn Member>>,
    ) -> Self {
        // A member ends once before it is begun again from here, its own supervisor waits for each answer, and a
        // family says at most twice that it is over: the queue cannot be full.
        let (notices, heard) = mpsc::channel(members.len() + 4);
        let remember = |member: Rc<dyn Member>| Watched {
            backoff: Backoff::new(member.backoff()),
            member,
            running_since: Instant::now(),
            over: false,
        };
        Self {
            place,
            events,
            strategy: supervisor.strategy,
            intensity: supervisor.intensity,
            window: RestartWindow::new(supervisor.intensity),
            members: members.into_iter().map(remember).collect(),
            pending: Vec::new(),
            up: true,
            gave_up: None,
            notices,
            heard,
        }
    }

    /// Supervises the members until it is over; the cause if it gave up. `above` is told
    /// each time it gives up, and decides; without one that is the end.
    async fn run(mut self, above: Option<Ended>) -> Option<String> {
        loop {
            match (&above, self.gave_up.take()) {
                (Some(tell), Some(cause)) => tell(Some(cause)),
                (None, Some(cause)) => {
                    self.close().await;
                    return Some(cause);
                }
                // Nobody is left, and nobody can come.
                (None, None) if self.members.iter().all(|member| member.over) => {
                    self.close().await;
                    return None;
                }
                _ => {}
            }
            let due = self.pending.iter().map(|pending| pending.at).min();
            let pause = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // What was heard comes first: an end from before a restart is over and done with then.
            let notice = tokio::select! {
                biased;
                notice = self.heard.recv() => notice,
                () = pause => {
                    self.restart_due().await;
                    continue;
                }
            };
            match notice {
                Some(Notice::Ended { member, cause }) => self.ended(member, cause).await,
                Some(Notice::Stop(_done)) => self.stop().await,
                Some(Notice::Restart(_done)) => {
                    self.up = true;
                    self.window = RestartWindow::new(self.intensity);
                    let all = (0..self.members.len()).collect();
                    self.restart(all, "its supervisor began again").await;
                }
                Some(Notice::Close(_done)) => {
                    self.stop().await;
                    self.close().await;
                    return None;
                }
                // It has a sender itself.
                None => return None,
            }
        }
    }

    fn begin_members(&self) {
        for (number, Watched { member, .. }) in self.members.iter().enumerate() {
            let notices = self.notices.clone();
            member.begin(Box::new(move |cause| {
                // Closed: it is over.
                let _ = notices.try_send(Notice::Ended { member: number, cause });
            }));
        }
    }

    /// Decides what follows the end of a member.
    async fn ended(&mut self, number: usize, cause: Option<String>) {
        let waits = self.pending.iter().any(|pending| pending.members.contains(&number));
        let it = &mut self.members[number];
        // It was stopped, or taken along by another one's restart, after it had ended.
        if !self.up || waits || it.over {
            return;
        }
        let place = it.member.place().clone();
        let crashed = cause.is_some();
        let cause = cause.unwrap_or_else(|| "it stopped itself".to_owned());
        let begins_again = match it.member.policy() {
            RestartPolicy::Permanent => true,
            RestartPolicy::Transient => crashed,
            RestartPolicy::Temporary => false,
        };
        if !begins_again || !it.member.connected() {
            let state = if crashed && !begins_again { ChildState::Failed } else { ChildState::Stopped };
            place.failed_with(state, &cause);
            it.over = true;
            return it.member.close().await;
        }
        let now = Instant::now();
        if now.duration_since(it.running_since) > it.backoff.current() {
            it.backoff.reset();
        }
        let pause = it.backoff.next_pause();
        if !self.window.allow(now) {
            return self.give_up(number, cause).await;
        }
        let taken = match self.strategy {
            Strategy::OneForOne => number..number + 1,
            Strategy::OneForAll => 0..self.members.len(),
            Strategy::RestForOne => number..self.members.len(),
        };
        let why = format!("{} ended: {cause}", place.name());
        for other in taken.clone().rev().filter(|other| *other != number) {
            let it = &mut self.members[other];
            if it.over {
                continue;
            }
            it.member.stop().await;
            if it.member.policy() == RestartPolicy::Temporary {
                it.member.place().failed_with(ChildState::Stopped, &why);
                it.over = true;
                it.member.close().await;
            } else {
                it.member.place().failed_with(ChildState::Restarting, &why);
            }
        }
        place.failed_with(ChildState::Restarting, &cause);
        // Those that waited already wait for this one now.
        self.pending.retain(|pending| !pending.members.iter().any(|member| taken.contains(member)));
        self.pending.push(Pending { at: Instant::now() + pause, members: taken.collect(), cause });
    }

    async fn restart_due(&mut self) {
        let now = Instant::now();
        let (due, later) =
            std::mem::take(&mut self.pending).into_iter().partition(|pending| pending.at <= now);
        self.pending = later;
        let due: Vec<Pending> = due;
        for Pending { members, cause, .. } in due {
            if !self.up {
                // One of those before was too much: it has given up.
                break;
            }
            self.restart(members, &cause).await;
        }
    }

    /// Begins again what has ended, in order.
    async fn restart(&mut self, members: Vec<usize>, cause: &str) {
        for number in members {
            let it = &mut self.members[number];
            if it.over {
                continue;
            }
            let place = it.member.place().clone();
            match it.member.restart().await {
                Ok(true) => {
                    it.running_since = Instant::now();
                    place.set_state(ChildState::Running);
                    let restarts = place.count_restart();
                    let (child, cause) = (place.name().clone(), cause.to_owned());
                    self.events.emit(ServiceEvent::Restarted { child, restarts, cause });
                }
                Ok(false) => {
                    place.set_state(ChildState::Stopped);
                    it.over = true;
                    it.member.close().await;
                }
                Err(cause) => {
                    self.ended(number, Some(cause)).await;
                    // Where others depend on it, they wait with it.
                    if !self.up || self.strategy != Strategy::OneForOne {
                        return;
                    }
                }
            }
        }
    }

    async fn give_up(&mut self, number: usize, cause: String) {
        let member = self.members[number].member.place().clone();
        self.stop().await;
        member.failed_with(ChildState::Failed, &cause);
        let (place, cause) = match &self.place {
            Some(place) => (place, format!("{} ended too often: {cause}", member.name())),
            None => (&member, cause),
        };
        place.failed_with(ChildState::Failed, &cause);
        self.events.emit(ServiceEvent::GaveUp { child: place.name().clone(), cause: cause.clone() });
        self.gave_up = Some(cause);
    }

    /// Stops the members in reverse order; they can be begun again.
    async fn stop(&mut self) {
        self.up = false;
        self.pending.clear();
        for it in self.members.iter().rev().filter(|it| !it.over) {
            it.member.stop().await;
            it.member.place().set_state(ChildState::Stopped);
        }
    }

    /// Drops the members, in reverse order.
    async fn close(&mut self) {
        if let Some(place) = &self.place
            && place.state() != ChildState::Failed
        {
            place.set_state(ChildState::Stopped);
        }
        for it in self.members.iter().rev().filter(|it| !it.over) {
            it.member.close().await;
        }
    }
}

/// A branch as a member of the one above it.
struct Below {
    place: Child,
    backoff: BackoffOptions,
    notices: mpsc::Sender<Notice>,
    /// Until it begins.
    branch: RefCell<Option<Branch>>,
}

impl Below {
    /// Tells the branch and waits until it has done that.
    fn ask(&self, notice: impl FnOnce(oneshot::Sender<()>) -> Notice) -> LocalBoxFuture<'static, ()> {
        let (done, answered) = oneshot::channel();
        let told = self.notices.try_send(notice(done));
        Box::pin(async move {
            // It drops the sender. Not told: it is over.
            if told.is_ok() {
                let _ = answered.await;
            }
        })
    }
}

impl Member for Below {
    fn place(&self) -> &Child {
        &self.place
    }

    fn policy(&self) -> RestartPolicy {
        RestartPolicy::Permanent
    }

    fn backoff(&self) -> BackoffOptions {
        self.backoff
    }

    fn connected(&self) -> bool {
        !self.notices.is_closed()
    }

    fn begin(&self, ended: Ended) {
        if let Some(branch) = self.branch.borrow_mut().take() {
            branch.begin_members();
            actix_rt::spawn(branch.run(Some(ended)));
        }
    }

    fn stop(&self) -> LocalBoxFuture<'static, ()> {
        self.ask(Notice::Stop)
    }

    fn restart(&self) -> LocalBoxFuture<'static, Result<bool, String>> {
        let restarted = self.ask(Notice::Restart);
        Box::pin(async {
            restarted.await;
            Ok(true)
        })
    }

    fn close(&self) -> LocalBoxFuture<'static, ()> {
        self.ask(|done| Notice::Close(Some(done)))
    }
}
