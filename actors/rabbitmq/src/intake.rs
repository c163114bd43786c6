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

use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::future::LocalBoxFuture;
use futures::{FutureExt, StreamExt};
use lapin::message::Delivery as Arrived;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};
use martlet_core::error::SessionError;
use tokio::time::{Sleep, sleep};

use crate::gate::Gate;
use crate::link::{ROUND_TRIP_LIMIT, lost};

/// How long nothing may be read: less than any heartbeat, long enough for handlers that are merely busy.
const HOLD_LIMIT: Duration = Duration::from_millis(500);

/// About what a message takes besides its body.
const MESSAGE_BYTES: usize = 256;

/// The messages of one session.
pub(crate) struct Intake {
    channel: Rc<Channel>,
    inbox: Inbox,
    tag: ShortString,
    queue: ShortString,
    flow: Flow,
    draining: bool,
    /// Since which closing of the gate it is waited for, and for how long.
    held: Option<(u64, Pin<Box<Sleep>>)>,
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
    dropped: u64,
    dropped_reported: u64,
}

enum Flow {
    Consuming,
    Pausing(LocalBoxFuture<'static, Result<Consumer, lapin::Error>>),
    /// With the consumer that keeps the queue.
    Paused(Consumer),
    Resuming(LocalBoxFuture<'static, Result<Consumer, lapin::Error>>),
    Stopping {
        cancelled: LocalBoxFuture<'static, ()>,
        limit: Pin<Box<Sleep>>,
    },
    /// What waits here is all there is.
    Stopped,
}

impl Intake {
    /// Takes what a consumer brings; with `room`, without acknowledgement.
    pub(crate) fn new(channel: Rc<Channel>, gate: Arc<Gate>, consumer: Consumer, room: Option<Room>) -> Self {
        Self {
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
                dropped: 0,
                dropped_reported: 0,
            },
            flow: Flow::Consuming,
            draining: false,
            held: None,
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
                        None => Poll::Ready(Some(Err(deleted()))),
                    };
                }
                Flow::Stopped => return Poll::Ready(None),
                _ => self.tend(cx)?,
            }
            if self.inbox.backlog.is_empty() && !matches!(self.flow, Flow::Stopped) {
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

    /// Does what is to be done whether or not messages are taken; to be called once a turn.
    pub(crate) fn tend(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        loop {
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
                    self.inbox.absorb(cx)?;
                    let Poll::Ready(keeper) = paused else { return Ok(()) };
                    self.flow = Flow::Paused(keeper.map_err(|error| self.inbox.lost(&error))?);
                }
                Flow::Paused(keeper) => {
                    self.inbox.absorb(cx)?;
                    while let Poll::Ready(kept) = keeper.poll_next_unpin(cx) {
                        match kept {
                            // It goes back to the queue.
                            Some(Ok(_)) => {}
                            Some(Err(error)) => return Err(self.inbox.lost(&error)),
                            None => return Err(deleted()),
                        }
                    }
                    if self.inbox.consumer.is_some() {
                        return Ok(());
                    }
                    if self.draining {
                        self.flow = Flow::Stopped;
                    } else if self.inbox.has_room() {
                        let tag = keeper.tag();
                        self.flow = Flow::Resuming(self.resume(tag));
                    } else {
                        return Ok(());
                    }
                }
                Flow::Resuming(resuming) => {
                    let Poll::Ready(consumer) = resuming.as_mut().poll(cx) else { return Ok(()) };
                    let consumer = consumer.map_err(|error| self.inbox.lost(&error))?;
                    self.tag = consumer.tag();
                    self.inbox.consumer = Some(consumer);
                    self.flow = Flow::Consuming;
                }
                Flow::Stopping { cancelled, limit } => {
                    // A broker that does not answer is not waited for for ever.
                    let done = cancelled.as_mut().poll(cx).is_ready() || limit.as_mut().poll(cx).is_ready();
                    self.inbox.absorb(cx)?;
                    if !done {
                        return Ok(());
                    }
                    self.flow = Flow::Stopped;
                }
                Flow::Stopped => return Ok(()),
            }
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

    /// Consumes again; then the keeper goes, and what it was given is handed back.
    fn resume(&mut self, keeper: ShortString) -> LocalBoxFuture<'static, Result<Consumer, lapin::Error>> {
        let (queue, tag) = (self.queue.clone(), self.tag.clone());
        let channel = Rc::clone(&self.channel);
        let mut consuming = async move {
            let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
            channel.basic_consume(queue, tag, options, FieldTable::default()).await
        }
        .boxed_local();
        let channel = Rc::clone(&self.channel);
        let mut keeping = async move {
            // Errors mean that the channel is gone, which consuming says.
            let all = BasicNackOptions { multiple: true, requeue: true };
            let cancel = channel.basic_cancel(keeper, BasicCancelOptions::default());
            let _ = futures::join!(cancel, channel.basic_nack(0, all));
        }
        .boxed_local();
        // The first poll hands over: in this order, so that the queue is never without a consumer. The keeper's end
        // is not waited for, it comes behind messages that may fill the gate.
        let nobody = &mut Context::from_waker(Waker::noop());
        let consuming = match consuming.as_mut().poll(nobody) {
            Poll::Pending => consuming,
            Poll::Ready(done) => std::future::ready(done).boxed_local(),
        };
        let _ = keeping.as_mut().poll(nobody);
        consuming
    }

    fn stop(&self) -> Flow {
        let (channel, tag) = (Rc::clone(&self.channel), self.tag.clone());
        let cancelled = async move {
            // An error means that the consumer has ended already.
            let _ = channel.basic_cancel(tag, BasicCancelOptions::default()).await;
        };
        Flow::Stopping { cancelled: cancelled.boxed_local(), limit: Box::pin(sleep(ROUND_TRIP_LIMIT)) }
    }
}

fn deleted() -> SessionError {
    SessionError::lost("the broker has cancelled the consumer: its queue was deleted")
}

fn cost(arrived: &Arrived) -> usize {
    arrived.data.len() + MESSAGE_BYTES
}

impl Inbox {
    fn pop(&mut self) -> Option<Arrived> {
        let arrived = self.backlog.pop_front()?;
        self.backlog_bytes -= cost(&arrived);
        Some(arrived)
    }

    /// The connection is lost, and what waits here with it.
    fn lost(&self, error: &lapin::Error) -> SessionError {
        match self.backlog.len() {
            0 => lost(error),
            waiting => lost(&format_args!("{error}; {waiting} messages that waited here are lost with it")),
        }
    }

    /// Whether so little waits that more may come.
    fn has_room(&self) -> bool {
        self.room.is_none_or(|room| self.backlog_bytes <= room.buffer_bytes / 2)
    }

    /// The next message from the driver; nothing once it has ended.
    fn poll_consumer(&mut self, cx: &mut Context<'_>) -> Result<Poll<Arrived>, SessionError> {
        while let Some(consumer) = &mut self.consumer {
            match consumer.poll_next_unpin(&mut Context::from_waker(&self.ringing)) {
                Poll::Ready(Some(Ok(arrived))) => {
                    self.gate.taken(arrived.data.len());
                    return Ok(Poll::Ready(arrived));
                }
                Poll::Ready(Some(Err(error))) => return Err(self.lost(&error)),
                Poll::Ready(None) => self.consumer = None,
                Poll::Pending if self.gate.bell().listen(cx) => {}
                Poll::Pending => break,
            }
        }
        self.gate.empty();
        Ok(Poll::Pending)
    }

    /// Takes what has arrived into the backlog, so that the driver reads on.
    fn absorb(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        let Some(room) = self.room else { return Ok(()) };
        while let Poll::Ready(arrived) = self.poll_consumer(cx)? {
            let cost = cost(&arrived);
            if self.backlog_bytes + cost > room.backlog_bytes {
                self.dropped += 1;
                continue;
            }
            self.backlog_bytes += cost;
            self.backlog.push_back(arrived);
        }
        Ok(())
    }
}
