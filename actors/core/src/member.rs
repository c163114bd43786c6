// SPDX-License-Identifier: MIT OR Apache-2.0
//! A member of a supervisor: something that runs, ends, and can be stopped and begun again by whoever supervises it.
//!
//! ```text
//! Branch (supervisor.rs)     decides
//! └─ Member ×n               a Slot, or a branch below this one
//!    └─ Slot                 one actor: its ContextFut, polled by a task of its own inside `catch_unwind`
//! ```
//!
//! A slot never decides what follows its actor's end: it tells its branch and waits, with the mailbox open. Slot and
//! branch live on one arbiter, so they share state without locks.

use std::cell::RefCell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll, Waker};

use actix::dev::{ContextFut, channel};
use actix::{ActorContext, Addr, Context};
use futures::future::LocalBoxFuture;
use tokio::sync::oneshot;
use tokio::time::Sleep;

use crate::backoff::BackoffOptions;
use crate::supervise::{Child, ChildSpec, RestartPolicy, Supervisable, panic_text, with_factory};

/// Tells the supervisor that a member has ended: with the cause if it did not stop itself.
pub(crate) type Ended = Box<dyn Fn(Option<String>)>;

/// What a supervisor can do with each of its children.
pub(crate) trait Member {
    /// Its place in the tree.
    fn place(&self) -> &Child;

    /// When it is begun again.
    fn policy(&self) -> RestartPolicy;

    /// The pause before.
    fn backoff(&self) -> BackoffOptions;

    /// Whether anybody can still reach it.
    fn connected(&self) -> bool;

    /// Sets it to work, for the first time.
    fn begin(&self, ended: Ended);

    /// Ends it in order; ready when it has ended. It can be begun again: its mailbox goes on.
    fn stop(&self) -> LocalBoxFuture<'static, ()>;

    /// Begins again, with fresh state, what has ended; `Ok(false)` when nobody can reach it any more.
    fn restart(&self) -> LocalBoxFuture<'static, Result<bool, String>>;

    /// Drops it and closes its mailbox, for good; ready when that is done.
    fn close(&self) -> LocalBoxFuture<'static, ()>;
}

/// One actor. Clones are the same one.
pub(crate) struct Slot<A>
where
    A: Supervisable,
{
    spec: Rc<ChildSpec<A>>,
    place: Child,
    inner: Rc<RefCell<Inner<A>>>,
}

struct Inner<A>
where
    A: Supervisable,
{
    /// Gone once closed.
    future: Option<ContextFut<A, Context<A>>>,
    phase: Phase,
    waker: Option<Waker>,
}

enum Phase {
    Running,
    /// Asked to stop; it has until then.
    Stopping(Pin<Box<Sleep>>, oneshot::Sender<()>),
    /// Has ended, and waits for what its supervisor decides.
    Idle,
}

impl<A> Clone for Slot<A>
where
    A: Supervisable,
{
    fn clone(&self) -> Self {
        Self { spec: Rc::clone(&self.spec), place: self.place.clone(), inner: Rc::clone(&self.inner) }
    }
}

impl<A> Slot<A>
where
    A: Supervisable,
{
    /// Builds the actor; a panic of its factory is the caller's.
    pub(crate) fn new(spec: ChildSpec<A>, place: Child) -> (Self, Addr<A>) {
        let (sender, receiver) = channel::channel(spec.mailbox_capacity);
        let actor = (spec.factory)();
        let future = Some(Context::with_receiver(receiver).into_future(actor));
        let inner = Inner { future, phase: Phase::Running, waker: None };
        (Self { spec: Rc::new(spec), place, inner: Rc::new(RefCell::new(inner)) }, Addr::new(sender))
    }

    /// Lets its task look at it again.
    fn wake(&self) {
        let waker = self.inner.borrow_mut().waker.take();
        waker.into_iter().for_each(Waker::wake);
    }
}

impl<A> Member for Slot<A>
where
    A: Supervisable,
{
    fn place(&self) -> &Child {
        &self.place
    }

    fn policy(&self) -> RestartPolicy {
        self.spec.policy
    }

    fn backoff(&self) -> BackoffOptions {
        self.spec.backoff
    }

    fn connected(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        inner.future.as_mut().is_some_and(|future| future.ctx().connected())
    }

    fn begin(&self, ended: Ended) {
        actix_rt::spawn(Running { inner: Rc::clone(&self.inner), ended });
    }

    fn stop(&self) -> LocalBoxFuture<'static, ()> {
        let (done, stopped) = oneshot::channel();
        {
            let mut inner = self.inner.borrow_mut();
            let Inner { future: Some(future), phase: phase @ Phase::Running, .. } = &mut *inner else {
                return Box::pin(std::future::ready(()));
            };
            future.ctx().stop();
            *phase = Phase::Stopping(Box::pin(tokio::time::sleep(self.spec.shutdown)), done);
        }
        self.wake();
        Box::pin(async {
            // Dropped with its task when the arbiter stops: then it has ended, too.
            let _ = stopped.await;
        })
    }

    fn restart(&self) -> LocalBoxFuture<'static, Result<bool, String>> {
        let restarted = {
            let mut inner = self.inner.borrow_mut();
            let Inner { future: Some(future), phase, .. } = &mut *inner else {
                return Box::pin(std::future::ready(Ok(false)));
            };
            let (restarted, renewed) =
                with_factory(&self.spec.factory, || catch_unwind(AssertUnwindSafe(|| future.restart())));
            let restarted = restarted.map_err(panic_text);
            if restarted == Ok(true) {
                *phase = Phase::Running;
                if !renewed {
                    tracing::warn!(
                        target: "martlet",
                        child = %self.place.name(),
                        "restarted with its old state: derive Supervised, or call martlet::supervise::rebuilt()",
                    );
                }
            }
            restarted
        };
        self.wake();
        Box::pin(std::future::ready(restarted))
    }

    fn close(&self) -> LocalBoxFuture<'static, ()> {
        let future = self.inner.borrow_mut().future.take();
        // Destructors are the user's code.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(future))) {
            let (child, cause) = (self.place.name(), panic_text(panic));
            tracing::error!(target: "martlet", %child, "panicked while it ended: {cause}");
        }
        self.wake();
        Box::pin(std::future::ready(()))
    }
}

/// The task that runs a slot's actor.
struct Running<A>
where
    A: Supervisable,
{
    inner: Rc<RefCell<Inner<A>>>,
    ended: Ended,
}

impl<A> Future for Running<A>
where
    A: Supervisable,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<()> {
        let mut inner = self.inner.borrow_mut();
        let Inner { future, phase, waker } = &mut *inner;
        let Some(future) = future else { return Poll::Ready(()) };
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        if matches!(phase, Phase::Idle) {
            return Poll::Pending;
        }
        let cause = match catch_unwind(AssertUnwindSafe(|| Pin::new(future).poll(cx))) {
            Ok(Poll::Pending) => {
                let Phase::Stopping(limit, _) = phase else { return Poll::Pending };
                if limit.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                None
            }
            Ok(Poll::Ready(())) => None,
            Err(panic) => Some(panic_text(panic)),
        };
        let was = std::mem::replace(phase, Phase::Idle);
        drop(inner);
        match was {
            // Whoever waited may have gone.
            Phase::Stopping(_, done) => drop(done.send(())),
            Phase::Running => (self.ended)(cause),
            Phase::Idle => {}
        }
        Poll::Pending
    }
}
