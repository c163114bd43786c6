// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two connections of a session, and what its two halves share.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use deadpool_redis::Pool;
use martlet_core::codec::Codec;
use martlet_core::error::SessionError;
use martlet_core::packet::{Raw, ResponseBody, ResponsePacket};
use martlet_core::payload::Payload;
use martlet_core::transport::{ContextData, Inbound, PacketId, Role, Subscription};
use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};

use crate::context::RedisContext;
use crate::options::Common;
use crate::publisher::{Note, Outcome, Publisher};
use crate::replies::{Ask, ReplyChannels};
use crate::session::RedisReplyTo;
use crate::subscriber::{Asked, RedisSubscriber, Served, Subscriber, Target, broker_error};
use crate::wire;

/// What a transporter's sessions have in common.
pub(crate) struct Settings {
    pub(crate) common: Common,
    /// Server only.
    pub(crate) wildcards: bool,
    /// Client only.
    pub(crate) wildcard_replies: bool,
    /// Client only.
    pub(crate) max_reply_channels: usize,
    pub(crate) codec: Arc<dyn Codec>,
}

/// An error as NestJS puts it into a reply.
#[derive(Serialize)]
struct Told<'a> {
    status: &'static str,
    message: &'a str,
}

/// One session's connections and their state. All of it belongs to the session's task.
pub(crate) struct Link {
    pub(crate) settings: Arc<Settings>,
    pub(crate) role: Role,
    pub(crate) shown: String,
    pool: Pool,
    pub(crate) subscriber: RefCell<Subscriber>,
    pub(crate) publisher: RefCell<Publisher>,
    pub(crate) replies: RefCell<ReplyChannels>,
    /// What is to be read before the next message.
    pub(crate) side: RefCell<VecDeque<Inbound<RedisReplyTo>>>,
    /// Events that the broker has taken, or refused: why.
    pub(crate) confirmed: RefCell<VecDeque<(PacketId, Option<String>)>>,
    ticker: RefCell<Option<Interval>>,
    asked_ping: Cell<bool>,
    /// The broker has done everything that was asked of it before a drain.
    pub(crate) probed: Cell<bool>,
}

impl Link {
    pub(crate) fn new(
        settings: Arc<Settings>,
        role: Role,
        shown: String,
        pool: Pool,
        subscriber: Subscriber,
        publisher: Publisher,
    ) -> Rc<Self> {
        let every = settings.common.ping_interval;
        let ticker = (every > Duration::ZERO).then(|| {
            let mut ticker = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
            ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticker
        });
        let limit = settings.max_reply_channels;
        Rc::new(Self {
            settings,
            role,
            shown,
            pool,
            subscriber: RefCell::new(subscriber),
            publisher: RefCell::new(publisher),
            replies: RefCell::new(ReplyChannels::new(limit)),
            side: RefCell::new(VecDeque::new()),
            confirmed: RefCell::default(),
            ticker: RefCell::new(ticker),
            asked_ping: Cell::new(false),
            probed: Cell::new(false),
        })
    }

    /// NestJS's `unwrap()`: publisher, subscriber.
    pub(crate) fn native(&self) -> ContextData {
        let native: (Pool, RedisSubscriber) = (self.pool.clone(), self.subscriber.borrow().handle());
        Arc::new(native)
    }

    /// Closes the pool: a closed client or server has no connections. The next session makes a new one.
    pub(crate) fn close_pool(&self) {
        self.pool.close();
    }

    /// Subscribes a route, and the channel of its cancellations.
    pub(crate) fn serve(settings: &Settings, subscriber: &mut Subscriber, subscription: &Subscription) {
        let (route, glob) = (&subscription.route, settings.wildcards);
        let text: Arc<str> = Arc::from(route.as_str());
        let served = Rc::new(Served {
            route: route.clone(),
            reply: wire::reply_channel(route.as_bytes()),
            context: Arc::new(RedisContext { channel: Arc::clone(&text), pattern: None }),
            pattern: text,
        });
        subscriber.subscribe(Bytes::copy_from_slice(route.as_bytes()), glob, Target::Serve(served));
        if settings.common.cancellation {
            subscriber.subscribe(wire::cancel_channel(route), glob, Target::Cancel);
        }
    }

    /// Ends what `serve` began.
    pub(crate) fn unserve(&self, route: &str) {
        let glob = self.settings.wildcards;
        let mut subscriber = self.subscriber.borrow_mut();
        subscriber.unsubscribe(route.as_bytes(), glob);
        subscriber.unsubscribe(&wire::cancel_channel(route), glob);
    }

    /// A request: published at once, or when its reply channel is subscribed.
    pub(crate) fn request(&self, id: PacketId, route: &martlet_core::Route, body: &BytesMut) {
        let mut replies = self.replies.borrow_mut();
        match replies.request(id, route, body) {
            Ask::Publish => {
                self.publisher.borrow_mut().publish(route.as_bytes(), body, Note::Request(id));
            }
            Ask::Wait => {}
            Ask::Subscribe(channel) => {
                let mut subscriber = self.subscriber.borrow_mut();
                subscriber.subscribe(channel, false, Target::Reply);
                while let Some(idle) = replies.evict() {
                    subscriber.unsubscribe(&idle, false);
                }
            }
        }
    }

    /// Bytes that wait for the broker.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.publisher.borrow().pending_bytes()
            + self.replies.borrow().waiting_bytes()
            + self.subscriber.borrow().pending_bytes()
    }

    /// One turn of the subscribing connection: writes, reads, looks at answers. Whatever it does, the task is
    /// woken when there is more to do.
    pub(crate) fn poll_turn(&self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        self.watch(cx)?;
        let mut subscriber = self.subscriber.borrow_mut();
        subscriber.poll_read(cx)?;
        while let Some((asked, result)) = subscriber.answers.pop_front() {
            self.answered(&mut subscriber, asked, result, cx)?;
        }
        // Ready or not, the task is woken when the rest can be written.
        if let Poll::Ready(written) = subscriber.poll_write(cx) {
            written?;
        }
        Ok(())
    }

    /// The watchdog: a broker that answers nothing is given up.
    fn watch(&self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        let mut ticker = self.ticker.borrow_mut();
        let Some(ticker) = ticker.as_mut() else { return Ok(()) };
        while ticker.poll_tick(cx).is_ready() {
            let mut subscriber = self.subscriber.borrow_mut();
            let heard = std::mem::take(&mut subscriber.heard);
            let alive = self.publisher.borrow_mut().is_alive();
            // What came in while this task had no turn counts, too.
            if self.asked_ping.get() && !heard {
                subscriber.poll_read(cx)?;
            }
            if (self.asked_ping.get() && !heard && !subscriber.heard) || !alive {
                let every = self.settings.common.ping_interval;
                return Err(SessionError::lost(format!(
                    "the broker did not answer within {every:?} ({})",
                    self.shown
                )));
            }
            subscriber.ask(Asked::Ping, &[b"PING"]);
            self.asked_ping.set(true);
            cx.waker().wake_by_ref();
        }
        Ok(())
    }

    fn answered(
        &self,
        subscriber: &mut Subscriber,
        asked: Asked,
        result: Result<i64, String>,
        cx: &mut Context<'_>,
    ) -> Result<(), SessionError> {
        match (asked, result) {
            (Asked::Subscribe { channel, glob: false }, Ok(_)) if self.role == Role::Client => {
                let Some((route, waiting)) = self.replies.borrow_mut().confirmed(&channel) else {
                    return Ok(());
                };
                let mut publisher = self.publisher.borrow_mut();
                for (id, body) in waiting {
                    publisher.publish(route.as_bytes(), &body, Note::Request(id));
                }
                cx.waker().wake_by_ref();
            }
            (Asked::Subscribe { channel, glob }, Err(text)) => {
                subscriber.forget(&channel, glob);
                if wire::is_cancel_channel(&channel) {
                    return Ok(());
                }
                let error = broker_error(
                    &self.shown,
                    Some(&Asked::Subscribe { channel: channel.clone(), glob }),
                    &text,
                );
                if self.role == Role::Server || glob {
                    subscriber.reports.push_back(error.to_string());
                    return Ok(());
                }
                // REDIS-8.
                let waited = self.replies.borrow_mut().refused(&channel);
                let mut side = self.side.borrow_mut();
                for id in waited {
                    side.push_back(self.failed(id, &error.to_string()));
                }
            }
            (Asked::Probe, _) => self.probed.set(true),
            (asked, Err(text)) => return Err(broker_error(&self.shown, Some(&asked), &text)),
            (_, Ok(_)) => {}
        }
        Ok(())
    }

    /// The end of a request that the broker refused.
    fn failed(&self, id: PacketId, message: &str) -> Inbound<RedisReplyTo> {
        let format = self.settings.codec.format();
        let told = Told { status: "error", message };
        let error = Payload::encode(format, &told).unwrap_or_else(|_| Payload::null(format));
        Inbound::Response(Box::new(ResponsePacket {
            id: Some(Raw::text(format, &id.text())),
            status: None,
            body: ResponseBody::Error(error),
            foreign: false,
        }))
    }

    /// Publishes what is to be published; ready when the broker has answered for all of it.
    pub(crate) fn poll_publish(&self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        let believed = self.settings.common.receiver_count;
        let flushed = self.publisher.borrow_mut().poll_flush(cx, |note, outcome| match (note, outcome) {
            // REDIS-13, REDIS-14.
            (Note::Request(id), Outcome::Receivers(0)) if believed => {
                self.replies.borrow_mut().release(&id);
                self.side.borrow_mut().push_back(Inbound::Unreachable { id });
            }
            (Note::Item(id), Outcome::Receivers(0)) if believed => {
                self.side.borrow_mut().push_back(Inbound::Cancel { id });
            }
            (Note::Request(id), Outcome::Refused(text)) => {
                self.replies.borrow_mut().release(&id);
                let failed = self.failed(id, &format!("the broker refused the request: {text}"));
                self.side.borrow_mut().push_back(failed);
            }
            (Note::Event(receipt), outcome) => {
                let refused = match outcome {
                    Outcome::Refused(text) => Some(format!("the broker refused the event: {text}")),
                    Outcome::Receivers(_) => None,
                };
                self.confirmed.borrow_mut().push_back((receipt, refused));
            }
            (_, Outcome::Refused(text)) => {
                let reason = format!("the broker refused a message: {text}");
                self.side.borrow_mut().push_back(Inbound::Bad { reason });
            }
            (_, Outcome::Receivers(_)) => {}
        });
        if !self.side.borrow().is_empty() || !self.confirmed.borrow().is_empty() {
            cx.waker().wake_by_ref();
        }
        flushed
    }
}
