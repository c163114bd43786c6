// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the correlation map keeps of calls under way: replies that wait to be read, deadlines, patterns.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use slab::Slab;
use tokio::time::Instant;

use crate::packet::Raw;
use crate::pattern::{Pattern, Route};
use crate::payload::{Format, Payload};

/// A reply that waits to be read.
pub(crate) enum Reply {
    Short(Raw),
    Long(Payload),
}

impl Reply {
    pub(crate) fn into_payload(self, format: Format) -> Payload {
        match self {
            Self::Short(raw) => Payload::new(format, raw.into()),
            Self::Long(payload) => payload,
        }
    }
}

/// Replies that wait to be read: nearly always one at the most, which costs no allocation.
#[derive(Default)]
pub(crate) struct Replies {
    first: Option<Reply>,
    // Boxed once more, so that an entry without it is small.
    #[allow(clippy::box_collection)]
    more: Option<Box<VecDeque<Reply>>>,
}

impl Replies {
    pub(crate) fn push_back(&mut self, reply: Reply) {
        if self.first.is_none() {
            self.first = Some(reply);
        } else {
            self.more.get_or_insert_default().push_back(reply);
        }
    }

    pub(crate) fn pop_front(&mut self) -> Option<Reply> {
        let first = self.first.take();
        if let Some(more) = &mut self.more {
            self.first = more.pop_front();
        }
        first
    }

    pub(crate) fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.more.as_ref().map_or(0, |more| more.len())
    }
}

/// Deadlines, in the order they pass. Those of calls with one timeout come in that order; others are sorted in.
#[derive(Default)]
pub(crate) struct Deadlines {
    queue: VecDeque<Mark>,
    others: BinaryHeap<Reverse<Mark>>,
}

/// When, and the index and the generation of the call.
pub(crate) type Mark = (Instant, u32, u32);

impl Deadlines {
    pub(crate) fn len(&self) -> usize {
        self.queue.len() + self.others.len()
    }

    pub(crate) fn push(&mut self, mark: Mark) {
        if self.queue.back().is_none_or(|last| last.0 <= mark.0) {
            self.queue.push_back(mark);
        } else {
            self.others.push(Reverse(mark));
        }
    }

    pub(crate) fn peek(&self) -> Option<Mark> {
        match (self.queue.front(), self.others.peek()) {
            (Some(queued), Some(Reverse(other))) => Some(*queued.min(other)),
            (Some(mark), None) | (None, Some(Reverse(mark))) => Some(*mark),
            (None, None) => None,
        }
    }

    pub(crate) fn pop(&mut self) {
        match (self.queue.front(), self.others.peek()) {
            (Some(queued), Some(Reverse(other))) if other < queued => drop(self.others.pop()),
            (Some(_), _) => drop(self.queue.pop_front()),
            (None, _) => drop(self.others.pop()),
        }
    }

    pub(crate) fn retain(&mut self, keep: impl Fn(&Mark) -> bool) {
        self.queue.retain(&keep);
        self.others.retain(|Reverse(mark)| keep(mark));
    }
}

/// The patterns of the calls, each once for all calls in a row that share it.
#[derive(Default)]
pub(crate) struct Patterns {
    kept: Slab<(Pattern, u32)>,
    last: Option<u32>,
}

impl Patterns {
    pub(crate) fn keep(&mut self, pattern: &Pattern) -> u32 {
        if let Some(last) = self.last
            && let Some((known, calls)) = self.kept.get_mut(last as usize)
            && known.is_same(pattern)
        {
            *calls += 1;
            return last;
        }
        let place = self.kept.insert((pattern.clone(), 1)) as u32;
        if let Some(before) = self.last.replace(place) {
            self.drop_unused(before);
        }
        place
    }

    pub(crate) fn release(&mut self, place: u32) {
        if let Some((_, calls)) = self.kept.get_mut(place as usize) {
            *calls -= 1;
            self.drop_unused(place);
        }
    }

    /// The last one may well be that of the next call.
    pub(crate) fn drop_unused(&mut self, place: u32) {
        if self.last != Some(place) && self.kept.get(place as usize).is_some_and(|(_, calls)| *calls == 0) {
            self.kept.remove(place as usize);
        }
    }

    pub(crate) fn route(&self, place: u32) -> Option<&Route> {
        self.kept.get(place as usize).map(|(pattern, _)| pattern.route())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn deadlines_come_in_the_order_they_pass() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        let times = [5, 7, 7, 3, 9, 1, 8, 9, 2];
        for (index, seconds) in times.into_iter().enumerate() {
            deadlines.push((start + Duration::from_secs(seconds), index as u32, 0));
        }
        deadlines.retain(|(_, index, _)| *index != 6);
        assert_eq!(deadlines.len(), times.len() - 1);
        let mut passed = Vec::new();
        while let Some((at, ..)) = deadlines.peek() {
            passed.push((at - start).as_secs());
            deadlines.pop();
        }
        assert_eq!(passed, [1, 2, 3, 5, 7, 7, 9, 9]);
    }

    #[test]
    fn a_pattern_is_kept_once_and_only_as_long_as_a_call_needs_it() {
        let mut patterns = Patterns::default();
        let (a, b) = (Pattern::from("a"), Pattern::from("b"));
        let (first, again) = (patterns.keep(&a), patterns.keep(&a));
        assert_eq!(first, again);
        let other = patterns.keep(&b);
        assert_eq!(patterns.route(first).unwrap().as_str(), "a");
        assert_eq!(patterns.route(other).unwrap().as_str(), "b");
        patterns.release(first);
        assert!(patterns.route(first).is_some());
        patterns.release(again);
        assert!(patterns.route(first).is_none());
        patterns.release(other);
        assert_eq!(patterns.keep(&b), other, "the last one stays for the next call");
        patterns.release(other);
        assert_ne!(patterns.keep(&a), other);
        assert_eq!(patterns.kept.len(), 1);
    }
}
