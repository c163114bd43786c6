// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session takes from its queue, and what it does when it takes nothing for a while.
//!
//! With `noAck` true the broker sends as fast as the socket takes. For a moment the gate holds it back by not reading
//! (RMQ-18). A broker gives up a peer that takes nothing for 15 s, and heartbeats are behind what is not read, so a
//! session whose handlers stay behind for longer cancels its consumer and reads on (RMQ-19):
//!
//! ```text
//! Consuming --gate closed for HOLD_LIMIT--> Pausing --cancelled--> Paused --room--> Resuming --> Consuming
//!     |                                                              |
//!     +---------------------drain----> Stopping --cancelled--> Stopped
//! ```
//!
//! What the broker had on its way when it heard of it waits in the backlog. A second consumer, which is given one
//! message at most and hands it back, keeps the queue from going with its last consumer meanwhile.
//!
//! A broker that blocks publishing reads nothing, so it does not hear of it. Then just so much is read that it does not
//! give up the session, until it reads again or the backlog is full.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::future::LocalBoxFuture;
use futures::{FutureExt, StreamExt};
use lapin::message::Delivery as Arrived;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, Consumer};
use martlet_core::error::SessionError;
use tokio::time::{Instant, Interval, Sleep, interval, sleep};

use crate::gate::Gate;
use crate::link::{Link, ROUND_TRIP_LIMIT, lost};

/// How long nothing may be read: less than any heartbeat, long enough for handlers that are merely busy.
const HOLD_LIMIT: Duration = Duration::from_millis(500);

/// How long a message may stay with the consumer that keeps the queue: less than any `consumer_timeout` that brokers
/// support, and than others on the queue should wait for it.
const KEEP_LIMIT: Duration = Duration::from_secs(10);

/// How often something is read of a broker that blocks. It gives up a peer that takes nothing for 15 s.
const TRICKLE_EVERY: Duration = Duration::from_secs(1);

/// How much of it at least: its system lets it write again when a good part of what it had written has been read.
const TRICKLE_BYTES: usize = 256 * 1024;

/// About what a message takes besides its body.
const MESSAGE_BYTES: usize = 256;

/// The messages of one session.
pub(crate) struct Intake {
    connection: Arc<Connection>,
    channel: Rc<Channel>,
    inbox: Inbox,
    tag: ShortString,
    queue: ShortString,
    flow: Flow,
    /// Keepers that are to go, and have not heard of it yet.
    leaving: Vec<Consumer>,
    draining: bool,
    /// Since which closing of the gate it is waited for, and for how long.
    held: Option<(u64, Pin<Box<Sleep>>)>,
    /// How long a broker is waited for that does not answer while the session ends.
    limit: Option<Pin<Box<Sleep>>>,
}

/// Bounds of what waits in a session.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Below half of it the queue is consumed again.
    pub(crate) buffer_bytes: usize,
    /// A message beyond is dropped.
    pub(crate) backlog_bytes: usize,
}

/// Messages that have arrived.
struct Inbox {
    gate: Arc<Gate>,
    /// The gate's bell, which the consumer rings.
    ringing: Waker,
    /// `None` while there is none.
    consumer: Option<Consumer>,
    /// Whether messages are taken from the driver before handlers want them, and within which bounds.
    room: Option<Room>,
    backlog: VecDeque<Arrived>,
    backlog_bytes: usize,
    /// While the broker blocks: when more may be read.
    trickle: Option<Interval>,
    dropped: u64,
    dropped_reported: u64,
}

enum Flow {
    Consuming,
    Pausing(LocalBoxFuture<'static, Result<Consumer, lapin::Error>>),
    Paused(Keeper),
    Resuming(LocalBoxFuture<'static, Result<Consumer, lapin::Error>>),
    Stopping(LocalBoxFuture<'static, ()>),
    /// What waits here is all there is.
    Stopped,
}

/// The consumer that keeps the queue.
struct Keeper {
    consumer: Consumer,
    /// What it was given, and how long that may stay.
    kept: Option<(Box<Arrived>, Pin<Box<Sleep>>)>,
}

impl Intake {
    /// Takes what a consumer brings; with `room`, without acknowledgement.
    pub(crate) fn new(link: &Link, channel: Rc<Channel>, consumer: Consumer, room: Option<Room>) -> Self {
        let gate = Arc::clone(&link.gate);
        Self {
            connection: Arc::clone(&link.connection),
            channel,
            tag: consumer.tag(),
            queue: consumer.queue(),
            inbox: Inbox {
                ringing: Waker::from(Arc::clone(gate.bell())),
                gate,
                consumer: Some(consumer),
                room,
                backlog: VecDeque::new(),
                backlog_bytes: 0,
                trickle: None,
                dropped: 0,
                dropped_reported: 0,
            },
            flow: Flow::Consuming,
            leaving: Vec::new(),
            draining: false,
            held: None,
            limit: None,
        }
    }

    /// The next message; `None` once it is drained.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Arrived, SessionError>>> {
        loop {
            if let Some(arrived) = self.inbox.pop() {
                return Poll::Ready(Some(Ok(arrived)));
            }
            if let Poll::Ready(arrived) = self.inbox.poll_consumer(cx)? {
                return Poll::Ready(Some(Ok(arrived)));
            }
            match self.flow {
                Flow::Consuming if !self.draining => {
                    // RMQ-17: its queue was deleted. The runtime makes a new session, which declares it again.
                    return match self.inbox.consumer {
                        Some(_) => Poll::Pending,
                        None => Poll::Ready(Some(Err(self.inbox.deleted()))),
                    };
                }
                Flow::Stopped => return Poll::Ready(None),
                _ => self.tend(cx)?,
            }
            // A consumer that has just come is yet to be polled.
            let goes_on = matches!(self.flow, Flow::Consuming | Flow::Stopped);
            if self.inbox.backlog.is_empty() && !goes_on {
                return Poll::Pending;
            }
        }
    }

    /// Begins to end: the broker is asked to send no more.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
    }

    /// Messages dropped since the last report of it.
    pub(crate) fn take_dropped(&mut self) -> Option<String> {
        let inbox = &mut self.inbox;
        let fresh = inbox.dropped - inbox.dropped_reported;
        if fresh == 0 {
            return None;
        }
        inbox.dropped_reported = inbox.dropped;
        Some(format!(
            "{fresh} messages ({} in this session) were dropped: the broker had so many on their way when its consumer \
             was cancelled that backlogBytes, {}, was reached",
            inbox.dropped,
            inbox.room.map(|room| room.backlog_bytes).unwrap_or_default()
        ))
    }

    /// Does what is to be done whether or not messages are taken; to be called in each turn.
    pub(crate) fn tend(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        self.part(cx);
        loop {
            if self.gives_up(cx) {
                self.absorb(cx)?;
                self.flow = Flow::Stopped;
            }
            match &mut self.flow {
                Flow::Consuming if self.draining => self.flow = self.stop(),
                Flow::Consuming => {
                    if !self.is_held(cx) {
                        return Ok(());
                    }
                    self.flow = Flow::Pausing(self.pause());
                }
                Flow::Pausing(pausing) => {
                    let paused = pausing.as_mut().poll(cx);
                    self.absorb(cx)?;
                    let Poll::Ready(consumer) = paused else { return Ok(()) };
                    let consumer = consumer.map_err(|error| self.inbox.lost(&error))?;
                    self.flow = Flow::Paused(Keeper { consumer, kept: None });
                }
                Flow::Paused(keeper) => {
                    self.inbox.absorb(cx)?;
                    keeper.poll(&self.channel, &mut self.inbox, cx)?;
                    if self.inbox.consumer.is_some() {
                        return Ok(());
                    }
                    if !self.draining && !self.inbox.has_room() {
                        return Ok(());
                    }
                    // Replaced at once.
                    let Flow::Paused(keeper) = std::mem::replace(&mut self.flow, Flow::Stopped) else {
                        continue;
                    };
                    if !self.draining {
                        self.flow = Flow::Resuming(self.resume());
                    }
                    self.release(keeper);
                    self.part(cx);
                }
                Flow::Resuming(resuming) => {
                    let Poll::Ready(consumer) = resuming.as_mut().poll(cx) else { return Ok(()) };
                    let consumer = consumer.map_err(|error| self.inbox.lost(&error))?;
                    self.tag = consumer.tag();
                    self.inbox.consumer = Some(consumer);
                    self.flow = Flow::Consuming;
                }
                Flow::Stopping(cancelled) => {
                    let cancelled = cancelled.as_mut().poll(cx);
                    self.absorb(cx)?;
                    if cancelled.is_pending() {
                        return Ok(());
                    }
                    self.flow = Flow::Stopped;
                }
                Flow::Stopped => return Ok(()),
            }
        }
    }

    /// Whether the broker is not waited for any longer: it does not answer, and the session ends.
    fn gives_up(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.draining || matches!(self.flow, Flow::Stopped) {
            return false;
        }
        let limit = self.limit.get_or_insert_with(|| Box::pin(sleep(ROUND_TRIP_LIMIT)));
        limit.as_mut().poll(cx).is_ready()
    }

    /// Takes what has arrived into the backlog while the broker is asked for something.
    fn absorb(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        match self.connection.status().blocked() {
            true => self.inbox.trickle(cx),
            false => self.inbox.absorb(cx),
        }
    }

    /// Whether nothing has been read for so long that the broker must not be left waiting.
    fn is_held(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(closing) = self.inbox.gate.closing(cx) else {
            self.held = None;
            return false;
        };
        match &mut self.held {
            Some((since, limit)) if *since == closing => limit.as_mut().poll(cx).is_ready(),
            held => {
                let (_, limit) = held.insert((closing, Box::pin(sleep(HOLD_LIMIT))));
                limit.as_mut().poll(cx).is_ready()
            }
        }
    }

    /// RMQ-19: has another consumer keep the queue, and cancels the own one.
    fn pause(&mut self) -> LocalBoxFuture<'static, Result<Consumer, lapin::Error>> {
        self.held = None;
        let (channel, queue, tag) = (Rc::clone(&self.channel), self.queue.clone(), self.tag.clone());
        async move {
            // All three are on their way before the first is answered, and the broker takes them in this order.
            let ((), keeper, ()) = futures::try_join!(
                channel.basic_qos(1, BasicQosOptions::default()),
                channel.basic_consume(
                    queue,
                    ShortString::default(),
                    BasicConsumeOptions::default(),
                    FieldTable::default()
                ),
                channel.basic_cancel(tag, BasicCancelOptions::default()),
            )?;
            Ok(keeper)
        }
        .boxed_local()
    }

    /// Consumes again.
    fn resume(&mut self) -> LocalBoxFuture<'static, Result<Consumer, lapin::Error>> {
        let (queue, tag) = (self.queue.clone(), self.tag.clone());
        let channel = Rc::clone(&self.channel);
        let mut consuming = async move {
            let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
            channel.basic_consume(queue, tag, options, FieldTable::default()).await
        }
        .boxed_local();
        // The first poll hands over: before the keeper goes, so that the queue is never without a consumer.
        match consuming.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => consuming,
            Poll::Ready(done) => std::future::ready(done).boxed_local(),
        }
    }

    /// Ends the keeper, and with what it was given. Its own end is not waited for, it comes behind messages that may
    /// fill the gate.
    fn release(&mut self, Keeper { consumer, kept }: Keeper) {
        hand_over(self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()));
        if let Some((kept, _)) = kept {
            self.inbox.end_with(&self.channel, *kept);
        }
        self.leaving.push(consumer);
    }

    /// Ends with what keepers are given until they hear of their end. Each by its own tag: when all are handed back at
    /// once, the driver forgets what other consumers of the channel have.
    fn part(&mut self, cx: &mut Context<'_>) {
        let Self { leaving, inbox, channel, draining, .. } = self;
        leaving.retain_mut(|keeper| {
            loop {
                match keeper.poll_next_unpin(cx) {
                    // Nobody may look at what waits here any more.
                    Poll::Ready(Some(Ok(given))) if *draining => hand_back(channel, &given),
                    Poll::Ready(Some(Ok(given))) => inbox.end_with(channel, given),
                    // Consuming meets an error, too.
                    Poll::Ready(_) => return false,
                    Poll::Pending => return true,
                }
            }
        });
    }

    fn stop(&self) -> Flow {
        let (channel, tag) = (Rc::clone(&self.channel), self.tag.clone());
        let cancelled = async move {
            // An error means that the consumer has ended already.
            let _ = channel.basic_cancel(tag, BasicCancelOptions::default()).await;
        };
        Flow::Stopping(cancelled.boxed_local())
    }
}

fn cost(arrived: &Arrived) -> usize {
    arrived.data.len() + MESSAGE_BYTES
}

impl Keeper {
    /// Takes what it is given, and ends with that in time.
    fn poll(
        &mut self,
        channel: &Channel,
        inbox: &mut Inbox,
        cx: &mut Context<'_>,
    ) -> Result<(), SessionError> {
        loop {
            while let Some((kept, limit)) = &mut self.kept
                && limit.as_mut().poll(cx).is_ready()
            {
                if is_counted(kept) && !inbox.has_backlog_for(cost(kept)) {
                    // It stays until there is room: going back counts.
                    limit.as_mut().reset(Instant::now() + KEEP_LIMIT);
                } else if let Some((kept, _)) = self.kept.take() {
                    inbox.end_with(channel, *kept);
                }
            }
            match self.consumer.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(kept))) => {
                    self.kept = Some((Box::new(kept), Box::pin(sleep(KEEP_LIMIT))));
                }
                Poll::Ready(Some(Err(error))) => return Err(inbox.lost(&error)),
                Poll::Ready(None) => return Err(inbox.deleted()),
                Poll::Pending => return Ok(()),
            }
        }
    }
}

fn hand_back(channel: &Channel, given: &Arrived) {
    let requeue = BasicNackOptions { multiple: false, requeue: true };
    hand_over(channel.basic_nack(given.delivery_tag, requeue));
}

/// Tells the broker something: the first poll does. An error means that the channel is gone, which consuming says.
fn hand_over(told: impl Future<Output = lapin::Result<()>>) {
    let _ = pin!(told).poll(&mut Context::from_waker(Waker::noop()));
}

/// Whether its queue counts how often it came back, and has begun to.
fn is_counted(arrived: &Arrived) -> bool {
    let headers = arrived.properties.headers().as_ref();
    let count = headers.and_then(|headers| headers.inner().get("x-delivery-count"));
    count.is_some_and(|count| match count {
        AMQPValue::LongLongInt(count) => *count > 0,
        AMQPValue::LongInt(count) => *count > 0,
        AMQPValue::LongUInt(count) => *count > 0,
        AMQPValue::ShortInt(count) => *count > 0,
        AMQPValue::ShortUInt(count) => *count > 0,
        AMQPValue::ShortShortInt(count) => *count > 0,
        AMQPValue::ShortShortUInt(count) => *count > 0,
        _ => false,
    })
}

impl Inbox {
    fn pop(&mut self) -> Option<Arrived> {
        let arrived = self.backlog.pop_front()?;
        self.backlog_bytes -= cost(&arrived);
        Some(arrived)
    }

    /// The connection is lost, and what waits here with it.
    fn lost(&self, error: &lapin::Error) -> SessionError {
        lost(&format_args!("{error}{}", self.waiting()))
    }

    /// RMQ-17: the queue is gone. The session ends with it, and what waits here.
    fn deleted(&self) -> SessionError {
        let what = "the broker has cancelled the consumer: its queue was deleted";
        SessionError::lost(format!("{what}{}", self.waiting()))
    }

    fn waiting(&self) -> String {
        match self.backlog.len() {
            0 => String::new(),
            waiting => format!("; {waiting} messages that waited here are lost with it"),
        }
    }

    /// RMQ-19: what a keeper was given goes back. A queue that counts how often a message comes back would refuse it some
    /// day: one that came back before is taken as if it had come without acknowledgement, where there is room.
    fn end_with(&mut self, channel: &Channel, given: Arrived) {
        if is_counted(&given) && self.has_backlog_for(cost(&given)) {
            hand_over(channel.basic_ack(given.delivery_tag, BasicAckOptions::default()));
            self.push(given);
        } else {
            hand_back(channel, &given);
        }
    }

    /// Whether so little waits that more may come.
    fn has_room(&self) -> bool {
        self.room.is_none_or(|room| self.backlog_bytes <= room.buffer_bytes / 2)
    }

    /// The next message from the driver, which reads on for it; nothing once it has ended.
    fn poll_consumer(&mut self, cx: &mut Context<'_>) -> Result<Poll<Arrived>, SessionError> {
        let arrived = self.poll_arrived(cx)?;
        match &arrived {
            Poll::Ready(arrived) => self.gate.taken(arrived.data.len()),
            Poll::Pending => self.gate.empty(),
        }
        Ok(arrived)
    }

    fn poll_arrived(&mut self, cx: &mut Context<'_>) -> Result<Poll<Arrived>, SessionError> {
        while let Some(consumer) = &mut self.consumer {
            match consumer.poll_next_unpin(&mut Context::from_waker(&self.ringing)) {
                Poll::Ready(Some(Ok(arrived))) => return Ok(Poll::Ready(arrived)),
                Poll::Ready(Some(Err(error))) => return Err(self.lost(&error)),
                Poll::Ready(None) => self.consumer = None,
                Poll::Pending if self.gate.bell().listen(cx) => {}
                Poll::Pending => break,
            }
        }
        Ok(Poll::Pending)
    }

    /// Whether so many bytes more may wait here.
    fn has_backlog_for(&self, bytes: usize) -> bool {
        self.room.is_some_and(|room| self.backlog_bytes + bytes <= room.backlog_bytes)
    }

    fn push(&mut self, arrived: Arrived) {
        self.backlog_bytes += cost(&arrived);
        self.backlog.push_back(arrived);
    }

    /// Takes what has arrived into the backlog, so that the driver reads on.
    fn absorb(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        self.trickle = None;
        if self.room.is_none() {
            return Ok(());
        }
        while let Poll::Ready(arrived) = self.poll_consumer(cx)? {
            if self.has_backlog_for(cost(&arrived)) {
                self.push(arrived);
            } else {
                self.dropped += 1;
            }
        }
        Ok(())
    }

    /// Reads so little into the backlog that it lasts, and so much that the broker, and the driver's own heartbeats, see
    /// somebody reading. Nothing is dropped: with the backlog full, nothing is read.
    fn trickle(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        let Some(room) = self.room else { return Ok(()) };
        let ticks = self.trickle.get_or_insert_with(|| interval(TRICKLE_EVERY));
        let mut more = false;
        while ticks.poll_tick(cx).is_ready() {
            more = true;
        }
        while self.backlog_bytes < room.backlog_bytes {
            // What is taken gives no credit: what comes of one tick is bounded by bytes on the wire.
            let Poll::Ready(arrived) = self.poll_arrived(cx)? else {
                if more {
                    self.gate.grant((room.buffer_bytes / 4).max(TRICKLE_BYTES));
                }
                break;
            };
            self.push(arrived);
        }
        Ok(())
    }
}
