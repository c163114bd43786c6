// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wakes a session once for all the messages that the driver makes of what it has read together.
//!
//! The driver's own thread wakes whoever waits for a message with each of them. A session that runs for each costs the
//! system more than the message itself, so it is woken when the driver is done with what it has read:
//!
//! ```text
//! driver:   read --begin--> messages, each rings --done--> read …
//! session:                                          woken: takes all of them
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake};

use futures::task::AtomicWaker;

/// What the driver rings, and the session hears.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    /// Whether the driver has read something that it is not done with.
    busy: AtomicBool,
    rung: AtomicBool,
    session: AtomicWaker,
}

impl Bell {
    /// The driver has read something, and messages may come of it.
    pub(crate) fn begin(&self) {
        if !self.busy.load(Ordering::Relaxed) {
            self.busy.store(true, Ordering::SeqCst);
        }
    }

    /// Whether [`done`](Self::done) is to come.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// The driver is done with what it has read, or has ended.
    pub(crate) fn done(&self) {
        // Whoever rings while this runs sees that the driver is done, or is seen here: one order for both.
        if self.busy.swap(false, Ordering::SeqCst) && self.rung.load(Ordering::SeqCst) {
            self.session.wake();
        }
    }

    /// `cx` is woken when it has rung; whether it has since this was last asked.
    pub(crate) fn listen(&self, cx: &mut Context<'_>) -> bool {
        self.register(cx);
        self.rung.swap(false, Ordering::SeqCst)
    }

    /// `cx` is the session, to be woken.
    pub(crate) fn register(&self, cx: &mut Context<'_>) {
        self.session.register(cx.waker());
    }

    /// Wakes the session now.
    pub(crate) fn wake(&self) {
        self.session.wake();
    }
}

/// A message has come.
impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::SeqCst);
        if !self.busy.load(Ordering::SeqCst) {
            self.session.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::task::Waker;

    #[derive(Default)]
    struct Counted(AtomicU32);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A bell that a session listens to, and how often that was woken.
    fn listened() -> (Arc<Bell>, Waker, Waker, impl Fn() -> u32) {
        let (bell, counted) = (Arc::<Bell>::default(), Arc::<Counted>::default());
        let (ringing, session) = (Waker::from(Arc::clone(&bell)), Waker::from(Arc::clone(&counted)));
        assert!(!bell.listen(&mut Context::from_waker(&session)));
        (bell, ringing, session, move || counted.0.load(Ordering::SeqCst))
    }

    #[test]
    fn messages_that_were_read_together_wake_once_and_when_the_driver_is_done() {
        let (bell, ringing, session, woken) = listened();
        bell.begin();
        for _ in 0..3 {
            ringing.wake_by_ref();
            bell.begin();
        }
        assert_eq!(woken(), 0);
        bell.done();
        assert_eq!(woken(), 1);
        assert!(bell.listen(&mut Context::from_waker(&session)));
        assert!(!bell.listen(&mut Context::from_waker(&session)));
        bell.done();
        assert_eq!(woken(), 1);
    }

    #[test]
    fn what_rings_outside_of_a_round_wakes_at_once() {
        let (bell, ringing, _session, woken) = listened();
        ringing.wake_by_ref();
        assert_eq!(woken(), 1);
        bell.begin();
        bell.done();
        // Nobody listens any more, and nothing is lost by it: the session looks before it listens anew.
        assert_eq!(woken(), 1);
    }

    #[test]
    fn a_round_without_a_message_wakes_nobody() {
        let (bell, _ringing, _session, woken) = listened();
        bell.begin();
        assert!(bell.is_busy());
        bell.done();
        assert_eq!((woken(), bell.is_busy()), (0, false));
    }
}
