// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the correlation map keeps of calls under way: replies that wait to be read, deadlines, patterns.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use slab::Slab;
use tokio::time::Instant;

use crate::calls::CallKey;
use crate::pattern::{Pattern, Route};
use crate::payload::Payload;

/// Replies that wait to be read: nearly always one at the most, which costs no allocation.
#[derive(Default)]
pub(crate) enum Replies {
    #[default]
    None,
    One(Payload),
    // Boxed once more, so that an entry is small.
    #[allow(clippy::box_collection)]
    Many(Box<VecDeque<Payload>>),
}

impl Replies {
    pub(crate) fn push_back(&mut self, reply: Payload) {
        match self {
            Self::None => *self = Self::One(reply),
            Self::Many(replies) => replies.push_back(reply),
            Self::One(_) => {
                let Self::One(first) = std::mem::take(self) else { return };
                *self = Self::Many(Box::new(VecDeque::from([first, reply])));
            }
        }
    }

    /// Moves the first one, if there is one.
    pub(crate) fn pop_into(&mut self, into: &mut Option<Payload>) {
        match self {
            Self::None => {}
            Self::Many(replies) => *into = replies.pop_front(),
            Self::One(_) => {
                if let Self::One(reply) = std::mem::take(self) {
                    *into = Some(reply);
                }
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(_) => 1,
            Self::Many(replies) => replies.len(),
        }
    }
}

/// Deadlines, in the order they pass. Those of calls with one timeout come in that order; others are sorted in.
#[derive(Default)]
pub(crate) struct Deadlines {
    queue: VecDeque<Mark>,
    others: BinaryHeap<Reverse<Mark>>,
}

/// When, and of which call.
pub(crate) type Mark = (Instant, CallKey);

impl Deadlines {
    /// Adds a mark. Ended calls leave theirs behind (`is_over`): these go when they are first, a few at a time, because
    /// calls end about in the order in which they began; and all at once when most are such, with `calls` under way.
    pub(crate) fn push(&mut self, mark: Mark, calls: usize, is_over: impl Fn(&Mark) -> bool) {
        for _ in 0..2 {
            if self.queue.front().is_some_and(&is_over) {
                self.queue.pop_front();
            }
        }
        if self.queue.len() + self.others.len() > 2 * calls + 1024 {
            self.queue.retain(|mark| !is_over(mark));
            self.others.retain(|Reverse(mark)| !is_over(mark));
        }
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

    fn key(index: u32) -> CallKey {
        CallKey { index, generation: 1 }
    }

    fn passed(deadlines: &mut Deadlines, since: Instant) -> Vec<u64> {
        let mut passed = Vec::new();
        while let Some((at, _)) = deadlines.peek() {
            passed.push((at - since).as_secs());
            deadlines.pop();
        }
        passed
    }

    #[test]
    fn deadlines_come_in_the_order_they_pass() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        let times = [5, 7, 7, 3, 9, 1, 8, 9, 2];
        for (index, seconds) in times.into_iter().enumerate() {
            deadlines.push((start + Duration::from_secs(seconds), key(index as u32)), 9, |_| false);
        }
        assert_eq!(passed(&mut deadlines, start), [1, 2, 3, 5, 7, 7, 8, 9, 9]);
    }

    #[test]
    fn marks_of_ended_calls_go_when_they_are_first_or_most() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        let is_over = |mark: &Mark| mark.1.index != 0 && mark.1.index < 5000;
        for index in 1..=5001 {
            deadlines.push((start + Duration::from_secs(index), key(index as u32)), 2, is_over);
            assert!(deadlines.queue.len() <= 3, "one ends before the next begins");
        }
        assert_eq!(passed(&mut deadlines, start), [5000, 5001]);
        // One that lasts holds the others up, until there are too many.
        deadlines.push((start, key(0)), 1, is_over);
        for index in 1..4000 {
            deadlines.push((start + Duration::from_secs(index), key(index as u32)), 1, is_over);
            deadlines.push((start - Duration::from_secs(1), key(index as u32)), 1, is_over);
            assert!(deadlines.queue.len() + deadlines.others.len() <= 2 + 1024 + 1);
        }
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
