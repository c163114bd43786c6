// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many subscriptions read as one stream: only those that have something are polled, and a message costs
//! no allocation.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::Stream;
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use slab::Slab;

/// Messages of one stream in a row before the others have their turn.
const TURN: u32 = 64;

/// The merged streams, each with a tag.
pub(crate) struct Merge<T, S> {
    slots: Slab<Slot<T, S>>,
    ready: Arc<Ready>,
    current: Option<(usize, u32)>,
}

struct Slot<T, S> {
    tag: T,
    /// Absent while someone has borrowed it.
    stream: Option<S>,
    node: Arc<Node>,
    waker: Waker,
}

#[derive(Default)]
struct Ready {
    queue: Mutex<VecDeque<usize>>,
    waker: AtomicWaker,
}

/// Puts its stream into the queue when woken.
struct Node {
    key: usize,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for Node {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.ready.queue.lock().push_back(self.key);
            self.ready.waker.wake();
        }
    }
}

impl<T, S: Stream + Unpin> Merge<T, S> {
    pub(crate) fn new() -> Self {
        Self { slots: Slab::new(), ready: Arc::default(), current: None }
    }

    /// Adds a stream; the key names it.
    pub(crate) fn insert(&mut self, tag: T, stream: S) -> usize {
        let entry = self.slots.vacant_entry();
        let key = entry.key();
        let node = Arc::new(Node { key, queued: AtomicBool::new(false), ready: Arc::clone(&self.ready) });
        let waker = Waker::from(Arc::clone(&node));
        entry.insert(Slot { tag, stream: Some(stream), node: Arc::clone(&node), waker });
        node.wake_by_ref();
        key
    }

    /// Borrows a stream; nothing is read from it until it is put back.
    pub(crate) fn take(&mut self, key: usize) -> Option<S> {
        self.slots.get_mut(key)?.stream.take()
    }

    /// Gives a borrowed stream back.
    pub(crate) fn put_back(&mut self, key: usize, stream: S) {
        if let Some(slot) = self.slots.get_mut(key) {
            slot.stream = Some(stream);
            slot.node.wake_by_ref();
        }
    }

    pub(crate) fn tag(&self, key: usize) -> Option<&T> {
        self.slots.get(key).map(|slot| &slot.tag)
    }

    pub(crate) fn remove(&mut self, key: usize) -> Option<(T, Option<S>)> {
        self.slots.try_remove(key).map(|slot| (slot.tag, slot.stream))
    }

    pub(crate) fn keys(&self) -> Vec<usize> {
        self.slots.iter().map(|(key, _)| key).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether a stream waits to be polled.
    pub(crate) fn has_ready(&self) -> bool {
        self.current.is_some() || !self.ready.queue.lock().is_empty()
    }

    /// Reads the next item, with its stream's key and tag; `None` when that stream has ended. It is large, and read from where
    /// the stream has put it.
    pub(crate) fn poll_next<R>(
        &mut self,
        cx: &mut Context<'_>,
        read: impl FnOnce(&mut Context<'_>, (usize, &T), Option<S::Item>) -> R,
    ) -> Poll<R> {
        loop {
            let (key, left) = match self.current.take() {
                Some(current) => current,
                None => match self.next_ready(cx) {
                    Some(key) => (key, TURN),
                    None => return Poll::Pending,
                },
            };
            let Some(slot) = self.slots.get_mut(key) else { continue };
            let Some(stream) = &mut slot.stream else { continue };
            match Pin::new(stream).poll_next(&mut Context::from_waker(&slot.waker)) {
                Poll::Ready(item) => {
                    if left > 1 {
                        self.current = Some((key, left - 1));
                    } else {
                        slot.node.wake_by_ref();
                    }
                    return Poll::Ready(read(cx, (key, &slot.tag), item));
                }
                Poll::Pending if !tokio::task::coop::has_budget_remaining() => {
                    // It may well have something: the task has had its share of the thread.
                    slot.node.wake_by_ref();
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Pending => {}
            }
        }
    }

    fn next_ready(&mut self, cx: &mut Context<'_>) -> Option<usize> {
        let pop = || {
            let key = self.ready.queue.lock().pop_front()?;
            Some(key)
        };
        let key = match pop() {
            Some(key) => key,
            None => {
                self.ready.waker.register(cx.waker());
                pop()?
            }
        };
        if let Some(slot) = self.slots.get(key) {
            slot.node.queued.store(false, Ordering::Release);
        }
        Some(key)
    }
}
