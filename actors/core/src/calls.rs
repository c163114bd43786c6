// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calls of a client that have not been read to their end, by the numbers in their ids.
//!
//! A slot is filled and emptied in place: to move what is known of a call in and out costs more than what is done with
//! it.

use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

use crate::correlation::CallKind;
use crate::error::CallError;
use crate::pending::Replies;
use crate::transport::OutboundMessage;

/// Names a call in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CallKey {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// What is known of a call.
#[derive(Default)]
pub(crate) struct Entry {
    /// 0 while the slot is free.
    generation: u32,
    /// Its place among the patterns.
    pub(crate) pattern: u32,
    pub(crate) kind: CallKind,
    pub(crate) sent: bool,
    /// An event that outlives its session: the transporter sends it again in the next one.
    pub(crate) carried: bool,
    pub(crate) idempotent: bool,
    /// The caller is gone (an emitted event): the entry goes with its end.
    pub(crate) detached: bool,
    /// How often a call was written; of an event, how many sessions it has outlived.
    pub(crate) attempts: u32,
    pub(crate) timeout: Option<Duration>,
    /// None without a timeout, and until the session has taken the call.
    pub(crate) deadline: Option<Instant>,
    pub(crate) waker: Option<Waker>,
    // Boxed, because errors are large and rare.
    pub(crate) ended: Option<Result<(), Box<CallError>>>,
    pub(crate) replies: Replies,
    /// Kept once written, of calls that may be sent again.
    pub(crate) again: Option<Box<OutboundMessage>>,
}

/// The calls.
#[derive(Default)]
pub(crate) struct Calls {
    slots: Vec<Entry>,
    free: Vec<u32>,
    /// Of the last call.
    generation: u32,
}

impl Calls {
    /// A slot for a new call; the entry is as [`Entry::default`] but for its generation.
    pub(crate) fn begin(&mut self) -> (CallKey, &mut Entry) {
        // 0 is of free slots.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let index = match self.free.pop() {
            Some(index) => index as usize,
            None => {
                self.slots.push(Entry::default());
                self.slots.len() - 1
            }
        };
        let entry = &mut self.slots[index];
        entry.generation = self.generation;
        (CallKey { index: index as u32, generation: self.generation }, entry)
    }

    pub(crate) fn get(&self, key: CallKey) -> Option<&Entry> {
        self.slots.get(key.index as usize).filter(|entry| entry.is(key))
    }

    pub(crate) fn get_mut(&mut self, key: CallKey) -> Option<&mut Entry> {
        self.slots.get_mut(key.index as usize).filter(|entry| entry.is(key))
    }

    /// Frees a slot and says what the call's pattern was.
    pub(crate) fn remove(&mut self, key: CallKey) -> Option<u32> {
        let entry = self.get_mut(key)?;
        entry.generation = 0;
        entry.kind = CallKind::default();
        entry.sent = false;
        entry.carried = false;
        entry.idempotent = false;
        entry.detached = false;
        entry.attempts = 0;
        entry.timeout = None;
        entry.deadline = None;
        entry.waker = None;
        entry.ended = None;
        entry.replies = Replies::default();
        entry.again = None;
        let pattern = std::mem::take(&mut entry.pattern);
        self.free.push(key.index);
        Some(pattern)
    }

    /// Slots in use.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.slots.iter_mut().filter(|entry| entry.generation != 0)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (CallKey, &Entry)> {
        let taken = self.slots.iter().enumerate().filter(|(_, entry)| entry.generation != 0);
        taken.map(|(index, entry)| (CallKey { index: index as u32, generation: entry.generation }, entry))
    }
}

impl Entry {
    /// Whether the slot is that call's, now.
    fn is(&self, key: CallKey) -> bool {
        self.generation == key.generation && key.generation != 0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::payload::{Format, Payload};

    #[test]
    fn a_slot_is_used_again_and_knows_nothing_of_the_call_before() {
        let mut calls = Calls::default();
        let (first, entry) = calls.begin();
        entry.sent = true;
        entry.carried = true;
        entry.idempotent = true;
        entry.attempts = 2;
        entry.timeout = Some(Duration::from_secs(1));
        entry.deadline = Some(Instant::now());
        entry.ended = Some(Ok(()));
        entry.replies.push_back(Payload::null(Format::Json));
        let (other, _) = calls.begin();
        assert_eq!((calls.len(), calls.remove(first), calls.len()), (2, Some(0), 1));
        assert!(
            calls.get(first).is_none() && calls.get_mut(first).is_none() && calls.remove(first).is_none()
        );
        let (again, entry) = calls.begin();
        assert_eq!(again.index, first.index);
        assert_ne!(again.generation, first.generation);
        assert!(!entry.sent && !entry.carried && !entry.idempotent && !entry.detached && entry.attempts == 0);
        assert!(entry.timeout.is_none() && entry.deadline.is_none() && entry.ended.is_none());
        assert_eq!(entry.replies.len(), 0);
        assert!(calls.get(first).is_none());
        assert_eq!(calls.iter().map(|(key, _)| key).collect::<Vec<_>>(), [again, other]);
    }

    #[test]
    fn a_free_slot_is_nobodys_and_no_call_is_of_generation_0() {
        let mut calls = Calls { generation: u32::MAX - 1, ..Calls::default() };
        let keys = [calls.begin().0, calls.begin().0];
        assert_eq!(keys.map(|key| key.generation), [u32::MAX, 1]);
        calls.remove(keys[0]);
        assert!(calls.get(CallKey { index: keys[0].index, generation: 0 }).is_none());
    }
}
