// SPDX-License-Identifier: MIT OR Apache-2.0
//! Publishing without waiting: messages are handed to the driver in one go, and what becomes of them is looked at
//! later, for many at once.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, ChannelState, PublisherConfirm};
use martlet_core::transport::PacketId;

/// How many bytes may be with the driver and not on the wire; further messages wait here.
const HANDED_LIMIT: usize = 256 * 1024;

/// After how many bytes it is looked whether they are on the wire.
const MARK_EVERY: usize = 16 * 1024;

/// A message to be published.
pub(crate) struct Outgoing {
    pub(crate) exchange: ShortString,
    pub(crate) key: ShortString,
    pub(crate) body: Bytes,
    pub(crate) properties: BasicProperties,
    pub(crate) mandatory: bool,
}

impl Outgoing {
    fn size(&self) -> usize {
        // About what method and properties take.
        self.body.len() + self.key.as_str().len() + 64
    }

    async fn publish(self, channel: &Channel) -> lapin::Result<PublisherConfirm> {
        let options = BasicPublishOptions { mandatory: self.mandatory, immediate: false };
        channel.basic_publish(self.exchange, self.key, options, &self.body, self.properties).await
    }
}

/// Publishes without confirmations: replies.
pub(crate) struct Replies {
    channel: Rc<Channel>,
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
    /// With the driver, and for some of them, how many bytes are on the wire when it is.
    marks: VecDeque<(usize, LocalBoxFuture<'static, lapin::Result<PublisherConfirm>>)>,
    handed_bytes: usize,
    since_mark: usize,
}

impl Replies {
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            channel: Rc::new(channel),
            queue: VecDeque::new(),
            queued_bytes: 0,
            marks: VecDeque::new(),
            handed_bytes: 0,
            since_mark: 0,
        }
    }

    pub(crate) fn push(&mut self, message: Outgoing) {
        self.queued_bytes += message.size();
        self.queue.push_back(message);
    }

    pub(crate) fn pending_bytes(&self) -> usize {
        self.queued_bytes + self.handed_bytes
    }

    /// Goes on with another channel; what was handed over and not written is lost with the old one.
    pub(crate) fn reopen(&mut self, channel: Channel) {
        self.channel = Rc::new(channel);
        self.marks.clear();
        self.handed_bytes = 0;
        self.since_mark = 0;
    }

    /// Hands over what there is; ready when all of it is on the wire. An error means that the channel is gone.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), lapin::Error>> {
        loop {
            while let Some((bytes, mark)) = self.marks.front_mut() {
                let Poll::Ready(written) = mark.as_mut().poll(cx) else { break };
                self.handed_bytes -= *bytes;
                self.marks.pop_front();
                drop(written?);
            }
            if self.queue.is_empty() || self.handed_bytes >= HANDED_LIMIT {
                break;
            }
            if !self.channel.status().connected() {
                // What waits here is not lost with it.
                let closed = lapin::ErrorKind::InvalidChannelState(ChannelState::Closed, "basic.publish");
                return Poll::Ready(Err(closed.into()));
            }
            self.hand_over();
        }
        if self.queue.is_empty() && self.marks.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn hand_over(&mut self) {
        let nobody = &mut Context::from_waker(Waker::noop());
        while self.handed_bytes < HANDED_LIMIT
            && let Some(message) = self.queue.pop_front()
        {
            let size = message.size();
            self.queued_bytes -= size;
            self.since_mark += size;
            self.handed_bytes += size;
            // The first poll hands a message over.
            if self.queue.is_empty() || self.since_mark >= MARK_EVERY {
                // Frames are written in order: when this one is on the wire, those before it are, too.
                let channel = Rc::clone(&self.channel);
                let mut mark = async move { message.publish(&channel).await }.boxed_local();
                let mark = match mark.as_mut().poll(nobody) {
                    Poll::Pending => mark,
                    Poll::Ready(done) => std::future::ready(done).boxed_local(),
                };
                self.marks.push_back((std::mem::take(&mut self.since_mark), mark));
            } else {
                // Nobody waits for more; an error is met again by the next one.
                let _ = pin!(message.publish(&self.channel)).poll(nobody);
            }
        }
    }
}

/// What a published message was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Request(PacketId),
    /// With what it is confirmed by.
    Event(Option<PacketId>),
}

/// What the broker said to a message, where somebody wants to know.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It has the event.
    Confirmed(PacketId),
    /// No queue is bound for it.
    Unroutable(PacketId),
    /// It was refused (its queue is full, for one).
    Refused(What),
}

/// Publishes with confirmations: requests and events.
pub(crate) struct Confirmed {
    channel: Rc<Channel>,
    queue: VecDeque<(Outgoing, What)>,
    queued_bytes: usize,
    writing: VecDeque<(usize, What, LocalBoxFuture<'static, lapin::Result<PublisherConfirm>>)>,
    writing_bytes: usize,
    confirming: VecDeque<(What, PublisherConfirm)>,
    max_unconfirmed: usize,
    outcomes: Rc<RefCell<VecDeque<Outcome>>>,
}

impl Confirmed {
    /// On a channel in confirm mode.
    pub(crate) fn new(
        channel: Channel,
        max_unconfirmed: usize,
        outcomes: Rc<RefCell<VecDeque<Outcome>>>,
    ) -> Self {
        Self {
            channel: Rc::new(channel),
            queue: VecDeque::new(),
            queued_bytes: 0,
            writing: VecDeque::new(),
            writing_bytes: 0,
            confirming: VecDeque::new(),
            max_unconfirmed: max_unconfirmed.max(1),
            outcomes,
        }
    }

    pub(crate) fn push(&mut self, message: Outgoing, what: What) {
        self.queued_bytes += message.size();
        self.queue.push_back((message, what));
    }

    /// Takes a request back; false if it is on its way.
    pub(crate) fn withdraw(&mut self, id: &PacketId) -> bool {
        let found = self.queue.iter().position(|(_, what)| matches!(what, What::Request(have) if have == id));
        let Some((message, _)) = found.and_then(|at| self.queue.remove(at)) else { return false };
        self.queued_bytes -= message.size();
        true
    }

    pub(crate) fn pending_bytes(&self) -> usize {
        self.queued_bytes + self.writing_bytes
    }

    /// Whether the broker has said something to every message.
    pub(crate) fn is_confirmed(&self) -> bool {
        self.queue.is_empty() && self.writing.is_empty() && self.confirming.is_empty()
    }

    /// Hands over what there is, and takes what the broker has said; ready when all of it is on the wire.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), lapin::Error>> {
        loop {
            self.poll_written(cx)?;
            self.poll_confirmed(cx)?;
            if !self.hand_over() {
                break;
            }
        }
        if self.queue.is_empty() && self.writing.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn poll_written(&mut self, cx: &mut Context<'_>) -> Result<(), lapin::Error> {
        while let Some((bytes, what, write)) = self.writing.front_mut() {
            let Poll::Ready(confirm) = write.as_mut().poll(cx) else { break };
            self.writing_bytes -= *bytes;
            let what = *what;
            self.writing.pop_front();
            self.confirming.push_back((what, confirm?));
        }
        Ok(())
    }

    fn poll_confirmed(&mut self, cx: &mut Context<'_>) -> Result<(), lapin::Error> {
        while let Some((what, confirm)) = self.confirming.front_mut() {
            let Poll::Ready(confirmation) = confirm.poll_unpin(cx) else { break };
            let what = *what;
            self.confirming.pop_front();
            let confirmation = confirmation?;
            match what {
                what if confirmation.is_nack() => {
                    self.outcomes.borrow_mut().push_back(Outcome::Refused(what))
                }
                What::Event(Some(receipt)) => {
                    self.outcomes.borrow_mut().push_back(Outcome::Confirmed(receipt))
                }
                _ => {}
            }
            // The driver may hand a message back with the confirmation of another: its own property says which.
            if let Some(returned) = confirmation.take_message()
                && let Some(id) = returned.properties.correlation_id()
                && let Some(id) = PacketId::from_text(id.as_str().as_bytes())
            {
                self.outcomes.borrow_mut().push_back(Outcome::Unroutable(id));
            }
        }
        Ok(())
    }

    /// Whether anything was handed over.
    fn hand_over(&mut self) -> bool {
        let mut some = false;
        while self.writing_bytes < HANDED_LIMIT
            && self.writing.len() + self.confirming.len() < self.max_unconfirmed
            && let Some((message, what)) = self.queue.pop_front()
        {
            let size = message.size();
            self.queued_bytes -= size;
            self.writing_bytes += size;
            let channel = Rc::clone(&self.channel);
            let mut write = async move { message.publish(&channel).await }.boxed_local();
            // The first poll hands it over; what it says is met again when it is the first in line.
            let write = match write.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => write,
                Poll::Ready(done) => std::future::ready(done).boxed_local(),
            };
            self.writing.push_back((size, what, write));
            some = true;
        }
        some
    }
}
