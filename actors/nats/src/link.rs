// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection to a broker: what the two halves of a session share.
//!
//! The driver's own reconnecting is off (reconnection has one owner, the runtime): its pool of servers is
//! replaced by an address that refuses at once, so that its task ends with the connection.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use async_nats::message::OutboundMessage;
use async_nats::{Client, Event, HeaderMap, ServerError, Subject, Subscriber};
use bytes::Bytes;
use futures::future::LocalBoxFuture;
use futures::task::AtomicWaker;
use futures::{FutureExt, Sink, StreamExt};
use martlet_core::codec::Codec;
use martlet_core::error::SessionError;
use martlet_core::pattern::Route;
use martlet_core::transport::Subscription;
use martlet_core::{HandlerKind, Headers};
use parking_lot::Mutex;

use crate::merge::Merge;
use crate::options::Common;
use crate::service::{Service, Verb};
use crate::wire;

/// What the subscriptions of a session are for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// Requests and events of a route; the number is its endpoint in the services discovery.
    Serve { route: Route, endpoint: u32 },
    /// Cancellations of requests of ours to handle.
    Cancel,
    /// Replies to requests of ours, and probes.
    Inbox,
    /// Services discovery.
    Discovery(Verb),
}

/// What the driver reports, taken from its callback.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    events: Mutex<Vec<Event>>,
    raised: AtomicBool,
    waker: AtomicWaker,
}

impl Signals {
    pub(crate) fn raise(&self, event: Event) {
        let mut events = self.events.lock();
        // A flood of the same event is counted, not hoarded.
        if events.len() < 1024 || matches!(event, Event::Disconnected | Event::Closed) {
            events.push(event);
        }
        drop(events);
        self.raised.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(crate) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    pub(crate) fn take(&self) -> Vec<Event> {
        self.raised.store(false, Ordering::Release);
        std::mem::take(&mut *self.events.lock())
    }

    pub(crate) fn register(&self, cx: &mut Context<'_>) {
        self.waker.register(cx.waker());
    }
}

/// Settings that a session needs beyond its connection.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) common: Common,
    pub(crate) queue: Option<String>,
    pub(crate) graceful_shutdown: bool,
    pub(crate) headers: Headers,
    /// Whether a deadline makes headers where there are none.
    pub(crate) deadline_header: bool,
    pub(crate) service: Option<Arc<Service>>,
    pub(crate) codec: Arc<dyn Codec>,
}

pub(crate) type Subscriptions = Merge<Purpose, Subscriber>;

pub(crate) struct Link {
    pub(crate) client: Client,
    pub(crate) signals: Arc<Signals>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) streams: RefCell<Subscriptions>,
    /// Subjects of replies begin with this; ends with a dot.
    pub(crate) inbox: String,
    out: RefCell<Out>,
    /// Subscribing, unsubscribing and draining, one after the other.
    chores: RefCell<VecDeque<LocalBoxFuture<'static, Result<(), SessionError>>>>,
    /// Subscriptions of each route, to take them back.
    served: RefCell<std::collections::HashMap<Route, Vec<usize>>>,
    probes: Cell<u64>,
    /// The last probe that came back.
    pub(crate) probed: Cell<u64>,
    /// What the broker said last, to explain the end of the connection.
    pub(crate) last_words: RefCell<Option<String>>,
}

struct Out {
    sink: Client,
    queue: VecDeque<OutboundMessage>,
    bytes: usize,
    /// The driver's task has ended.
    failed: bool,
}

/// Whether the driver's task was there to take a message. Sizes were checked before; a broker that has
/// lowered its bound since drops one message, not the session.
fn sent(result: Result<(), async_nats::PublishError>) -> bool {
    !matches!(result, Err(error) if error.kind() == async_nats::client::PublishErrorKind::Send)
}

impl Link {
    pub(crate) fn new(client: Client, signals: Arc<Signals>, settings: Arc<Settings>) -> Rc<Self> {
        let inbox = format!("{}.", client.new_inbox());
        let out = Out { sink: client.clone(), queue: VecDeque::new(), bytes: 0, failed: false };
        Rc::new(Self {
            client,
            signals,
            settings,
            streams: RefCell::new(Merge::new()),
            inbox,
            out: RefCell::new(out),
            chores: RefCell::default(),
            served: RefCell::default(),
            probes: Cell::new(0),
            probed: Cell::new(0),
            last_words: RefCell::default(),
        })
    }

    // === writing ===

    pub(crate) fn push(
        &self,
        subject: Subject,
        reply: Option<Subject>,
        payload: Bytes,
        headers: Option<HeaderMap>,
    ) {
        let mut out = self.out.borrow_mut();
        let message = OutboundMessage { subject, reply, payload, headers };
        // Straight to the driver while it has room; an error is met again when flushing.
        let mut nobody = Context::from_waker(Waker::noop());
        if out.queue.is_empty()
            && matches!(Pin::new(&mut out.sink).poll_ready(&mut nobody), Poll::Ready(Ok(())))
        {
            out.failed |= !sent(Pin::new(&mut out.sink).start_send(message));
            return;
        }
        out.bytes += message.subject.len() + message.payload.len();
        out.queue.push_back(message);
    }

    pub(crate) fn pending_bytes(&self) -> usize {
        self.out.borrow().bytes
    }

    /// Hands what is queued to the driver.
    pub(crate) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        let chores = self.poll_chores(cx)?;
        let mut out = self.out.borrow_mut();
        let out = &mut *out;
        while !out.queue.is_empty() {
            let gone = |_| self.lost();
            std::task::ready!(Pin::new(&mut out.sink).poll_ready(cx)).map_err(gone)?;
            let Some(message) = out.queue.pop_front() else { break };
            out.bytes -= message.subject.len() + message.payload.len();
            out.failed |= !sent(Pin::new(&mut out.sink).start_send(message));
        }
        if out.failed {
            return Poll::Ready(Err(self.lost()));
        }
        chores.map(Ok)
    }

    /// Why the session is over; calls under way end with it (NATS-18).
    pub(crate) fn lost(&self) -> SessionError {
        match self.last_words.borrow().as_deref() {
            Some(words) => SessionError::lost(format!("the connection to the broker was lost: {words}")),
            None => SessionError::lost("the connection to the broker was lost"),
        }
    }

    // === chores ===

    pub(crate) fn add_chore(&self, chore: impl Future<Output = Result<(), SessionError>> + 'static) {
        self.chores.borrow_mut().push_back(chore.boxed_local());
    }

    pub(crate) fn clear_chores(&self) {
        let chores = std::mem::take(&mut *self.chores.borrow_mut());
        drop(chores);
    }

    fn poll_chores(&self, cx: &mut Context<'_>) -> Result<Poll<()>, SessionError> {
        loop {
            // A chore may add another: the queue is not borrowed while it runs.
            let Some(mut chore) = self.chores.borrow_mut().pop_front() else { return Ok(Poll::Ready(())) };
            if chore.as_mut().poll(cx)?.is_pending() {
                self.chores.borrow_mut().push_front(chore);
                return Ok(Poll::Pending);
            }
        }
    }

    // === subscriptions ===

    /// Subscribes a route, and the cancellations of its requests.
    pub(crate) async fn serve(&self, subscription: &Subscription) -> Result<(), SessionError> {
        // NATS-1, NATS-7, NATS-14, NATS-15: the broker matches, the subscription says which route.
        let own = subscription.extras.get("queue").and_then(serde_json::Value::as_str);
        let queue = own.or(self.settings.queue.as_deref()).filter(|queue| !queue.is_empty());
        let route = &subscription.route;
        let stream = self.subscribe(route.to_string(), queue).await?;
        let endpoint = match &self.settings.service {
            Some(service) if subscription.kind == HandlerKind::Message => service.endpoint(route, queue),
            _ => u32::MAX,
        };
        let purpose = Purpose::Serve { route: route.clone(), endpoint };
        let mut keys = vec![self.streams.borrow_mut().insert(purpose, stream)];
        if subscription.kind == HandlerKind::Message && self.settings.common.cancellation {
            let stream = self.subscribe(wire::cancel_subject(route), None).await?;
            keys.push(self.streams.borrow_mut().insert(Purpose::Cancel, stream));
        }
        self.served.borrow_mut().insert(route.clone(), keys);
        Ok(())
    }

    pub(crate) async fn subscribe(
        &self,
        subject: String,
        queue: Option<&str>,
    ) -> Result<Subscriber, SessionError> {
        let refused = |error: async_nats::SubscribeError| match error.kind() {
            async_nats::client::SubscribeErrorKind::Other => self.lost(),
            _ => SessionError::fatal(format!("cannot subscribe to {subject:?} (queue {queue:?}): {error}")),
        };
        let subscribed = match queue {
            Some(queue) => self.client.queue_subscribe(subject.clone(), queue.to_owned()).await,
            None => self.client.subscribe(subject.clone()).await,
        };
        subscribed.map_err(refused)
    }

    /// Takes a route's subscriptions back; what has arrived for them is still delivered.
    pub(crate) async fn unserve(weak: Weak<Self>, route: Route) -> Result<(), SessionError> {
        let Some(link) = weak.upgrade() else { return Ok(()) };
        let keys = link.served.borrow_mut().remove(&route).unwrap_or_default();
        if let Some(service) = &link.settings.service {
            service.remove(&route);
        }
        Self::unsubscribe(weak.clone(), keys.clone()).await?;
        let probe = link.send_probe().await?;
        drop(link);
        Self::probe_returned(weak.clone(), probe).await;
        if let Some(link) = weak.upgrade() {
            link.forget(&keys);
        }
        Ok(())
    }

    /// Removes subscriptions for good.
    pub(crate) fn forget(&self, keys: &[usize]) {
        for key in keys {
            drop(self.streams.borrow_mut().remove(*key));
        }
    }

    /// NATS-19: tells the broker to send no more on these subscriptions, and goes on reading them.
    ///
    /// The driver's `unsubscribe` and `drain` drop what is under way from the broker. A number of messages
    /// that the broker cannot read as one makes it end the subscription at once (as `UNSUB` without a number
    /// does), while the driver waits for that many and goes on delivering.
    pub(crate) async fn unsubscribe(weak: Weak<Self>, keys: Vec<usize>) -> Result<(), SessionError> {
        for key in keys {
            let Some(link) = weak.upgrade() else { return Ok(()) };
            let Some(mut stream) = link.streams.borrow_mut().take(key) else { continue };
            let told = stream.unsubscribe_after(u64::MAX).await;
            link.streams.borrow_mut().put_back(key, stream);
            told.map_err(|_| link.lost())?;
        }
        Ok(())
    }

    // === round trips ===

    /// Sends a message to ourselves. The broker works off a connection's lines in order: when it is back,
    /// everything sent before has been done, and everything delivered before has arrived.
    pub(crate) async fn send_probe(&self) -> Result<u64, SessionError> {
        let number = self.probes.get() + 1;
        self.probes.set(number);
        let subject = format!("{}p{number}", self.inbox);
        self.client.publish(subject, Bytes::from_static(b"null")).await.map_err(|_| self.lost())?;
        Ok(number)
    }

    /// Whether a message in the inbox is a probe; notes it.
    pub(crate) fn take_probe(&self, token: &str) -> bool {
        let Some(number) = token.strip_prefix('p').and_then(|number| number.parse().ok()) else {
            return false;
        };
        self.probed.set(self.probed.get().max(number));
        true
    }

    /// Waits until whoever reads has seen the probe, within bounds.
    async fn probe_returned(weak: Weak<Self>, probe: u64) {
        let waited = tokio::time::timeout(ROUND_TRIP_LIMIT, async {
            while weak.upgrade().is_some_and(|link| link.probed.get() < probe) {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        });
        // A broker that does not answer is seen by its missing pings.
        let _ = waited.await;
    }

    /// Ends the connection: everything written has reached the broker (if it still answers) when this is
    /// ready, and the driver's task has been told to end.
    pub(crate) async fn close(self: Rc<Self>) -> Result<(), SessionError> {
        let round_trip = async {
            let probe = self.send_probe().await?;
            std::future::poll_fn(|cx| {
                while self.probed.get() < probe {
                    let next = self.streams.borrow_mut().poll_next(cx, |_, (key, _), item| match item {
                        Some(message) => {
                            self.take_probe(wire::last_token(&message.subject));
                            None
                        }
                        None => Some(key),
                    });
                    match next {
                        Poll::Ready(None) => {}
                        Poll::Ready(Some(ended)) => self.forget(&[ended]),
                        Poll::Pending => return Poll::Pending,
                    }
                    if self.streams.borrow().is_empty() {
                        break;
                    }
                }
                Poll::Ready(())
            })
            .await;
            Ok::<_, SessionError>(())
        };
        if let Ok(result) = tokio::time::timeout(ROUND_TRIP_LIMIT, round_trip).await {
            result?;
        } else {
            self.client.flush().await.map_err(|_| self.lost())?;
        }
        // An error means that its task has ended already.
        let _ = self.client.drain().await;
        Ok(())
    }

    /// Waits, at the begin of a session, until the broker has done everything that was sent.
    pub(crate) async fn settle(&self, inbox: &mut Subscriber) -> Result<(), SessionError> {
        let probe = self.send_probe().await?;
        std::future::poll_fn(|cx| {
            self.signals.register(cx);
            if self.signals.is_raised() {
                for event in self.signals.take() {
                    if let Some(done) = self.settle_event(&event) {
                        return Poll::Ready(done);
                    }
                }
            }
            while let Poll::Ready(message) = inbox.poll_next_unpin(cx) {
                let Some(message) = message else { return Poll::Ready(Err(self.lost())) };
                if self.take_probe(wire::last_token(&message.subject)) && self.probed.get() >= probe {
                    return Poll::Ready(Ok(()));
                }
            }
            Poll::Pending
        })
        .await
    }

    fn settle_event(&self, event: &Event) -> Option<Result<(), SessionError>> {
        match event {
            Event::Disconnected | Event::Closed => Some(Err(self.lost())),
            Event::ServerError(ServerError::Other(text)) => {
                if let Some(subject) = denied_subject(text)
                    && !wire::is_cancel_subject(subject)
                    && !subject.starts_with("$SRV.")
                {
                    return Some(Err(SessionError::fatal(format!("the broker said: {text}"))));
                }
                *self.last_words.borrow_mut() = Some(text.clone());
                None
            }
            Event::ServerError(error) => {
                *self.last_words.borrow_mut() = Some(error.to_string());
                None
            }
            _ => None,
        }
    }
}

/// How long a broker may take to answer when a session is opened, drained or closed.
pub(crate) const ROUND_TRIP_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);

/// The subject of a permissions error.
fn denied_subject(text: &str) -> Option<&str> {
    if !text.to_ascii_lowercase().starts_with("permissions violation") {
        return None;
    }
    // The last quote is of the subject; the subject may have quotes itself.
    let (_, rest) = text.split_once('"')?;
    rest.rsplit_once('"').map(|(subject, _)| subject)
}

impl Drop for Link {
    fn drop(&mut self) {
        // The driver's task must not outlive the session, even where the application holds a client.
        let client = self.client.clone();
        if client.drain().now_or_never().is_none()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { client.drain().await });
        }
    }
}
