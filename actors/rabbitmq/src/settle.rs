// SPDX-License-Identifier: MIT OR Apache-2.0
//! Acknowledgements: gathered from the runtime and from handlers on any thread, told to the broker when the session flushes.

use std::collections::VecDeque;
use std::task::Context;

use futures::task::AtomicWaker;
use parking_lot::Mutex;

use crate::context::SettleError;

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ack,
    Nack { requeue: bool },
}

/// Where acknowledgements of one session wait for its next turn.
#[derive(Debug, Default)]
pub(crate) struct Settler {
    inner: Mutex<Waiting>,
    waker: AtomicWaker,
}

#[derive(Debug, Default)]
struct Waiting {
    verdicts: Vec<(u64, Verdict)>,
    closed: bool,
}

impl Settler {
    pub(crate) fn push(&self, tag: u64, verdict: Verdict) -> Result<(), SettleError> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(SettleError::SessionEnded);
        }
        let first = inner.verdicts.is_empty();
        inner.verdicts.push((tag, verdict));
        drop(inner);
        if first {
            self.waker.wake();
        }
        Ok(())
    }

    /// Puts everything that waits at the end of `into`; `cx` is woken when more comes.
    pub(crate) fn take(&self, cx: &mut Context<'_>, into: &mut Vec<(u64, Verdict)>) {
        self.waker.register(cx.waker());
        into.append(&mut self.inner.lock().verdicts);
    }

    pub(crate) fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closed = true;
        inner.verdicts.clear();
    }
}

/// One frame to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SettleFrame {
    /// This message, or with `multiple` every one up to it that is not settled.
    Ack {
        tag: u64,
        multiple: bool,
    },
    Nack {
        tag: u64,
        requeue: bool,
    },
}

/// Which messages of a channel are not settled: they are numbered from one, without gaps.
#[derive(Debug)]
pub(crate) struct Window {
    /// The lowest number that is not settled.
    base: u64,
    /// From `base` on, whether each is settled.
    settled: VecDeque<bool>,
}

impl Default for Window {
    fn default() -> Self {
        Self { base: 1, settled: VecDeque::new() }
    }
}

impl Window {
    /// RMQ-16: makes frames of verdicts, one for all acknowledgements that leave no message open before them.
    pub(crate) fn frames(&mut self, verdicts: &mut Vec<(u64, Verdict)>, out: &mut Vec<SettleFrame>) {
        for (tag, _) in verdicts.iter() {
            let Some(place) = tag.checked_sub(self.base) else { continue };
            let place = place as usize;
            if place >= self.settled.len() {
                self.settled.resize(place + 1, false);
            }
            self.settled[place] = true;
        }
        while self.settled.front() == Some(&true) {
            self.settled.pop_front();
            self.base += 1;
        }
        let mut upto = 0;
        let mut covered = 0;
        for (tag, verdict) in verdicts.iter() {
            match verdict {
                // Before the acknowledgement that would otherwise cover them.
                Verdict::Nack { requeue } => out.push(SettleFrame::Nack { tag: *tag, requeue: *requeue }),
                Verdict::Ack if *tag < self.base => {
                    upto = upto.max(*tag);
                    covered += 1;
                }
                Verdict::Ack => {}
            }
        }
        if covered > 0 {
            out.push(SettleFrame::Ack { tag: upto, multiple: covered > 1 });
        }
        for (tag, verdict) in verdicts.drain(..) {
            if verdict == Verdict::Ack && tag >= self.base {
                out.push(SettleFrame::Ack { tag, multiple: false });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NACK: Verdict = Verdict::Nack { requeue: true };

    fn ack(tag: u64, multiple: bool) -> SettleFrame {
        SettleFrame::Ack { tag, multiple }
    }

    #[track_caller]
    fn check(window: &mut Window, verdicts: &[(u64, Verdict)], expected: &[SettleFrame]) {
        let mut out = Vec::new();
        window.frames(&mut verdicts.to_vec(), &mut out);
        assert_eq!(out, expected);
    }

    #[test]
    fn acknowledgements_without_a_gap_are_one_frame() {
        let mut window = Window::default();
        check(&mut window, &[(2, Verdict::Ack), (1, Verdict::Ack), (3, Verdict::Ack)], &[ack(3, true)]);
        check(&mut window, &[(4, Verdict::Ack)], &[ack(4, false)]);
    }

    #[test]
    fn one_that_is_open_is_never_covered() {
        let mut window = Window::default();
        check(
            &mut window,
            &[(1, Verdict::Ack), (3, Verdict::Ack), (4, Verdict::Ack)],
            &[ack(1, false), ack(3, false), ack(4, false)],
        );
        check(&mut window, &[(2, Verdict::Ack), (5, Verdict::Ack)], &[ack(5, true)]);
    }

    #[test]
    fn refusals_go_first_and_alone() {
        let mut window = Window::default();
        check(
            &mut window,
            &[(1, Verdict::Ack), (2, NACK), (3, Verdict::Ack)],
            &[SettleFrame::Nack { tag: 2, requeue: true }, ack(3, true)],
        );
        check(&mut window, &[(4, NACK)], &[SettleFrame::Nack { tag: 4, requeue: true }]);
        check(&mut window, &[(5, Verdict::Ack)], &[ack(5, false)]);
    }

    #[test]
    fn nothing_is_taken_once_the_session_is_over() {
        let settler = Settler::default();
        assert_eq!(settler.push(1, Verdict::Ack), Ok(()));
        settler.close();
        assert_eq!(settler.push(2, Verdict::Ack), Err(SettleError::SessionEnded));
    }
}
