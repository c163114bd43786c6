// SPDX-License-Identifier: MIT OR Apache-2.0
//! One session with a broker, for both roles.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use futures::future::LocalBoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use lapin::message::Delivery as Arrived;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer, Event};
use martlet_core::error::{RpcError, SessionError};
use martlet_core::packet::{IncomingPacket, Raw, ResponseBody, ResponsePacket};
use martlet_core::transport::{
    ContextData, Delivery, Inbound, Outbound, OutboundMessage, PacketId, PatternKey, Response, Session,
    SessionReader, SessionWriter, Settlement, Subscription, Taken, WriteError,
};

use crate::cancel::{Hearing, Telling};
use crate::context::RmqContext;
use crate::intake::Intake;
use crate::link::{self, Link, ROUND_TRIP_LIMIT, Settings, Side, lost};
use crate::publish::{Confirmed, Outcome, Outgoing, Replies, What};
use crate::routes::Routes;
use crate::settle::{SettleFrame, Settler, Verdict, Window};
use crate::wire::{self, Limits, WireError};

/// Where the replies to a delivery go, and how it is settled: the message it was.
#[derive(Debug, Clone)]
pub struct RmqReplyTo {
    message: Arc<RmqContext>,
}

/// What the halves share.
struct Shared {
    link: Link,
    settings: Arc<Settings>,
    /// Where messages are consumed and settled; a client publishes here, too.
    channel: Rc<Channel>,
    intake: RefCell<Intake>,
    /// `None` where nothing is acknowledged.
    settler: Option<Arc<Settler>>,
    /// With wildcards.
    routes: RefCell<Option<Routes>>,
    outcomes: Rc<RefCell<VecDeque<Outcome>>>,
    /// A server's, with the option `cancellation`.
    hearing: RefCell<Option<Hearing>>,
    /// What is to be reported before the next message.
    reports: RefCell<VecDeque<String>>,
}

impl Shared {
    fn report(&self, reason: String) {
        let mut reports = self.reports.borrow_mut();
        if reports.len() < 1024 {
            reports.push_back(reason);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(settler) = &self.settler {
            settler.close();
        }
    }
}

/// A session over one AMQP connection.
pub struct RmqSession {
    shared: Rc<Shared>,
    out: Out,
    queue: ShortString,
    peer: Arc<str>,
}

impl std::fmt::Debug for RmqSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RmqSession").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl RmqSession {
    pub(crate) fn server(
        link: Link,
        settings: Arc<Settings>,
        peer: Arc<str>,
        channel: Channel,
        consumer: Consumer,
        (queue, replies, subscriptions): (ShortString, Channel, &[Subscription]),
    ) -> Self {
        let settler = (!settings.common.no_ack).then(Arc::default);
        let routes = settings.common.wildcards.then(|| {
            let mut routes = Routes::default();
            subscriptions.iter().for_each(|subscription| routes.add(subscription.route.clone()));
            routes
        });
        let out = Out::Server(Replies::new(replies));
        Self::new(link, settings, peer, channel, consumer, (queue, settler, routes), |_| out)
    }

    pub(crate) fn client(
        link: Link,
        settings: Arc<Settings>,
        peer: Arc<str>,
        channel: Channel,
        consumer: Consumer,
    ) -> Self {
        let max = match settings.side {
            Side::Client { max_unconfirmed, .. } => max_unconfirmed,
            Side::Server { .. } => 1,
        };
        let publish = channel.clone();
        let parts = (ShortString::default(), None, None);
        Self::new(link, settings, peer, channel, consumer, parts, |outcomes| {
            Out::Client(Confirmed::new(publish, max, outcomes))
        })
    }

    fn new(
        link: Link,
        settings: Arc<Settings>,
        peer: Arc<str>,
        channel: Channel,
        consumer: Consumer,
        (queue, settler, routes): (ShortString, Option<Arc<Settler>>, Option<Routes>),
        out: impl FnOnce(Rc<RefCell<VecDeque<Outcome>>>) -> Out,
    ) -> Self {
        let outcomes = Rc::<RefCell<VecDeque<Outcome>>>::default();
        let out = out(Rc::clone(&outcomes));
        let channel = Rc::new(channel);
        let intake = Intake::new(&link, Rc::clone(&channel), consumer, settings.room());
        let shared = Shared {
            link,
            settings,
            channel,
            intake: RefCell::new(intake),
            settler,
            routes: RefCell::new(routes),
            outcomes,
            hearing: RefCell::default(),
            reports: RefCell::default(),
        };
        Self { shared: Rc::new(shared), out, queue, peer }
    }

    /// With what is heard of cancelled calls, and what is to be reported of it.
    pub(crate) fn hearing(self, (hearing, report): (Option<Hearing>, Option<String>)) -> Self {
        report.into_iter().for_each(|report| self.shared.report(report));
        self.shared.hearing.replace(hearing);
        self
    }
}

impl Session for RmqSession {
    type ReplyTo = RmqReplyTo;
    type Reader = RmqReader;
    type Writer = RmqWriter;

    fn peer(&self) -> Arc<str> {
        Arc::clone(&self.peer)
    }

    fn native(&self) -> Option<ContextData> {
        Some(Arc::clone(&self.shared.link.connection) as ContextData)
    }

    fn split(self) -> (RmqReader, RmqWriter) {
        let Self { shared, out, queue, .. } = self;
        let reader = RmqReader {
            events: shared.link.connection.events_listener().boxed(),
            shared: Rc::clone(&shared),
        };
        let writer = RmqWriter::new(shared, out, queue);
        (reader, writer)
    }
}

// === impl SessionReader ===

/// The half that reads.
pub struct RmqReader {
    shared: Rc<Shared>,
    events: BoxStream<'static, Event>,
}

impl std::fmt::Debug for RmqReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RmqReader").finish_non_exhaustive()
    }
}

impl RmqReader {
    /// Looks at what the driver reports of the connection.
    fn take_events(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        while let Poll::Ready(Some(event)) = self.events.poll_next_unpin(cx) {
            match event {
                Event::ConnectionBlocked(reason) => {
                    self.shared
                        .report(format!("the broker has blocked publishing, messages wait here: {reason}"));
                }
                Event::ConnectionUnblocked => {
                    self.shared.report("the broker takes messages again".to_owned());
                }
                Event::Error(error) if !self.shared.link.connection.status().connected() => {
                    return Err(lost(&error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// RMQ-20: the next request that nobody waits for.
    fn poll_cancelled(&self, cx: &mut Context<'_>) -> Option<Inbound<RmqReplyTo>> {
        let mut hearing = self.shared.hearing.borrow_mut();
        let heard = hearing.as_mut()?;
        if let Some(reason) = heard.take_forgotten() {
            return Some(Inbound::Bad { reason });
        }
        match heard.poll_next(cx) {
            Poll::Pending => None,
            Poll::Ready(Some(id)) => Some(Inbound::Cancel { id: id.into() }),
            Poll::Ready(None) => {
                *hearing = None;
                let reason = "cancelled calls are no more heard of in this session".to_owned();
                // The reader sees a connection that is lost.
                self.shared.link.connection.status().connected().then_some(Inbound::Bad { reason })
            }
        }
    }

    fn deliver(&mut self, arrived: Arrived, packet: &mut IncomingPacket) -> Inbound<RmqReplyTo> {
        let shared = &self.shared;
        let Arrived { delivery_tag, exchange, routing_key, redelivered, properties, data, .. } = arrived;
        let content = Bytes::from(data);
        let codec = &*shared.settings.codec;
        *packet = match wire::decode_request(codec, content.clone()) {
            Ok(packet) => packet,
            Err(reason) => {
                // RMQ-9: no handler will ever see it.
                if let Some(settler) = &shared.settler {
                    let _ = settler.push(delivery_tag, Verdict::Nack { requeue: false });
                }
                let key = routing_key.as_str();
                return Inbound::Bad { reason: format!("message with routing key {key:?}: {reason}") };
            }
        };
        let is_event = packet.is_event();
        let key = match (&packet.pattern, shared.routes.borrow_mut().as_mut()) {
            (Some(raw), Some(routes)) => routes.key_of(codec.format(), raw),
            _ => PatternKey::Packet,
        };
        let message = Arc::new(RmqContext {
            pattern: packet.pattern.clone(),
            format: codec.format(),
            content,
            properties,
            exchange,
            routing_key,
            redelivered,
            tag: delivery_tag,
            settled: AtomicBool::new(false),
            settler: shared.settler.clone(),
        });
        let delivery =
            Delivery { key, reply_to: RmqReplyTo { message: Arc::clone(&message) }, context: Some(message) };
        // RMQ-9: the id in the body decides, not the reply address.
        if is_event { Inbound::Event(delivery) } else { Inbound::Request(delivery) }
    }

    /// RMQ-10: a reply, by its correlation alone.
    fn reply(&self, arrived: Arrived) -> Inbound<RmqReplyTo> {
        let Some(id) = arrived.properties.correlation_id() else {
            return Inbound::Bad { reason: "a reply has no correlationId".to_owned() };
        };
        let id = id.as_str();
        if PacketId::from_text(id.as_bytes()).is_none() {
            return Inbound::Bad {
                reason: format!("a reply has the correlationId {id:?}, which no call has"),
            };
        }
        let body = Bytes::from(arrived.data);
        Inbound::Response(Box::new(wire::decode_response(&*self.shared.settings.codec, id, &body)))
    }

    fn outcome(&self, outcome: Outcome) -> Inbound<RmqReplyTo> {
        match outcome {
            Outcome::Unroutable(id) => Inbound::Unreachable { id },
            Outcome::Confirmed(receipt) => Inbound::Confirmed { receipt, refused: None },
            Outcome::Refused(What::Event(Some(receipt))) => {
                Inbound::Confirmed { receipt, refused: Some("the broker refused the event".to_owned()) }
            }
            Outcome::Refused(What::Event(None)) => {
                Inbound::Bad { reason: "the broker refused an event".to_owned() }
            }
            Outcome::Refused(What::Request(id)) => {
                let format = self.shared.settings.codec.format();
                let error = RpcError::message("the broker refused the request");
                Inbound::Response(Box::new(ResponsePacket {
                    id: Some(Raw::text(format, &id.text())),
                    status: None,
                    body: ResponseBody::Error(error.to_payload(format)),
                    foreign: false,
                }))
            }
        }
    }
}

impl SessionReader<RmqReplyTo> for RmqReader {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<RmqReplyTo>, SessionError>>> {
        loop {
            let outcome = self.shared.outcomes.borrow_mut().pop_front();
            if let Some(outcome) = outcome {
                return Poll::Ready(Some(Ok(self.outcome(outcome))));
            }
            let report = self.shared.reports.borrow_mut().pop_front();
            if let Some(reason) = report.or_else(|| self.shared.intake.borrow_mut().take_dropped()) {
                return Poll::Ready(Some(Ok(Inbound::Bad { reason })));
            }
            if let Some(cancelled) = self.poll_cancelled(cx) {
                return Poll::Ready(Some(Ok(cancelled)));
            }
            let arrived = self.shared.intake.borrow_mut().poll_next(cx)?;
            match arrived {
                Poll::Ready(Some(arrived)) => {
                    let inbound = match self.shared.settings.side {
                        Side::Server { .. } => self.deliver(arrived, packet),
                        Side::Client { .. } => self.reply(arrived),
                    };
                    return Poll::Ready(Some(Ok(inbound)));
                }
                Poll::Ready(None) => {
                    let dropped = self.shared.intake.borrow_mut().take_dropped();
                    return Poll::Ready(dropped.map(|reason| Ok(Inbound::Bad { reason })));
                }
                Poll::Pending => {
                    self.take_events(cx)?;
                    if self.shared.reports.borrow().is_empty() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn drain(&mut self) {
        if matches!(self.shared.settings.side, Side::Server { .. }) {
            self.shared.intake.borrow_mut().drain();
        }
    }
}

// === impl SessionWriter ===

enum Out {
    Server(Replies),
    Client(Confirmed),
}

/// A channel that is being opened.
type Opening = LocalBoxFuture<'static, Result<Channel, lapin::Error>>;

/// The half that writes.
pub struct RmqWriter {
    shared: Rc<Shared>,
    out: Out,
    /// A client's, with the option `cancellation`.
    telling: Option<Telling>,
    queue: ShortString,
    buffer: BytesMut,
    limits: Limits,
    /// What requests and events go to.
    exchange: ShortString,
    key: ShortString,
    /// What messages without properties of their own are sent with.
    base: BasicProperties,
    reply_to: ShortString,
    opening: Option<Opening>,
    window: Window,
    verdicts: Vec<(u64, Verdict)>,
    frames: Vec<SettleFrame>,
    /// The last acknowledgement that was handed to the driver.
    settling: Option<LocalBoxFuture<'static, ()>>,
    /// Bindings, one after the other.
    chores: VecDeque<LocalBoxFuture<'static, Result<(), SessionError>>>,
    closing: Option<LocalBoxFuture<'static, ()>>,
}

impl std::fmt::Debug for RmqWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RmqWriter").field("pending_bytes", &self.pending_bytes()).finish_non_exhaustive()
    }
}

impl RmqWriter {
    fn new(shared: Rc<Shared>, out: Out, queue: ShortString) -> Self {
        let common = &shared.settings.common;
        // Names were checked when they were declared.
        let short = |text: &str| ShortString::try_new(text).unwrap_or_default();
        let (exchange, key) = match common.wildcards || common.is_fanout() {
            true => (short(common.exchange_name().unwrap_or_default()), ShortString::default()),
            false => (ShortString::default(), short(&common.queue)),
        };
        let (base, reply_to) = match &shared.settings.side {
            Side::Server { .. } => {
                (wire::base_properties(&FieldTable::default(), None), ShortString::default())
            }
            Side::Client { headers, persistent, reply_queue, .. } => {
                (wire::base_properties(headers, Some(*persistent)), short(reply_queue))
            }
        };
        let telling = match out {
            Out::Client(_) => Telling::new(&shared.link.connection, &shared.settings),
            Out::Server(_) => None,
        };
        let mut limits = shared.settings.limits();
        // Headers and properties are one frame.
        let frame = shared.link.connection.configuration().frame_max() as usize;
        limits.header_bytes = limits.header_bytes.min(frame.saturating_sub(1024).max(1024));
        Self {
            limits,
            shared,
            out,
            telling,
            queue,
            buffer: BytesMut::new(),
            exchange,
            key,
            base,
            reply_to,
            opening: None,
            window: Window::default(),
            verdicts: Vec::new(),
            frames: Vec::new(),
            settling: None,
            chores: VecDeque::new(),
            closing: None,
        }
    }

    /// A request, or an event with what it is confirmed by.
    fn message(&mut self, mut message: OutboundMessage, receipt: Option<PacketId>) -> Result<(), WireError> {
        let Out::Client(out) = &mut self.out else { return Ok(()) };
        message.put_timeout();
        let mut properties = self.base.clone();
        let what = match message.id {
            Some(id) => {
                properties = properties.with_reply_to(self.reply_to.clone());
                What::Request(id)
            }
            None => What::Event(receipt),
        };
        properties = wire::with_own(properties, &message.headers, self.limits)?;
        if let Some(id) = message.id {
            // RMQ-7: a record cannot change it.
            properties = properties.with_correlation_id(wire::short("the id", &id.text())?);
        }
        let key = match self.exchange.as_str().is_empty() {
            true => self.key.clone(),
            // RMQ-6: the route, which is what servers bind.
            false => wire::short("the routing key", message.pattern.route())?,
        };
        let codec = &*self.shared.settings.codec;
        let body = wire::encode_request(codec, &message, self.limits, &mut self.buffer)?;
        // RMQ-11: a request that nobody is bound for comes back, rather than to be waited for.
        let mandatory = message.id.is_some();
        out.push(Outgoing { exchange: self.exchange.clone(), key, body, properties, mandatory }, what);
        Ok(())
    }

    fn response(&mut self, response: &Response<RmqReplyTo>) -> Result<(), WireError> {
        let Response { reply_to: RmqReplyTo { message: to }, id, body, headers } = response;
        let Out::Server(replies) = &mut self.out else { return Ok(()) };
        // RMQ-8: without an address the reply is lost, as in NestJS.
        let Some(address) = to.properties.reply_to().as_ref().filter(|address| !address.as_str().is_empty())
        else {
            let pattern = to.pattern();
            self.shared
                .report(format!("a reply to a request for {pattern} was dropped: it named no replyTo"));
            return Ok(());
        };
        if !wire::is_sound_reply_address(address.as_str()) {
            // RMQ-12: the broker would close the connection.
            let address = address.as_str();
            self.shared.report(format!(
                "the reply to {address:?} was dropped: the broker has given out no such address"
            ));
            return Ok(());
        }
        let mut properties = self.base.clone();
        if let Some(own) = headers {
            properties = wire::with_own(properties, own, self.limits)?;
        }
        if let Some(id) = to.properties.correlation_id() {
            properties = properties.with_correlation_id(id.clone());
        }
        let codec = &*self.shared.settings.codec;
        let body = wire::encode_response(codec, id, body, self.limits, &mut self.buffer)?;
        let reply = Outgoing {
            exchange: ShortString::default(),
            key: address.clone(),
            body,
            properties,
            mandatory: false,
        };
        replies.push(reply);
        Ok(())
    }

    /// RMQ-16: what becomes of a message that was delivered for acknowledgement.
    fn settle(&mut self, message: &RmqContext, settlement: Settlement) {
        let verdict = match settlement {
            // NestJS leaves it to the handler.
            Settlement::Finished | Settlement::Failed => return,
            Settlement::Done | Settlement::Discard => Verdict::Ack,
            Settlement::Requeue | Settlement::HandedBack => Verdict::Nack { requeue: true },
            _ => Verdict::Nack { requeue: false },
        };
        // An error means that the handler has settled it by itself.
        let _ = message.settle(verdict);
    }

    /// Tells the broker what has been settled since the last turn.
    fn write_settled(&mut self, cx: &mut Context<'_>) {
        let Some(settler) = &self.shared.settler else { return };
        settler.take(cx, &mut self.verdicts);
        if self.verdicts.is_empty() {
            return;
        }
        self.window.frames(&mut self.verdicts, &mut self.frames);
        let last = self.frames.len();
        for (number, frame) in self.frames.drain(..).enumerate() {
            let channel = Rc::clone(&self.shared.channel);
            let told = async move {
                // An error means that the channel is gone, which the reader sees.
                let _ = match frame {
                    SettleFrame::Ack { tag, multiple } => {
                        channel.basic_ack(tag, BasicAckOptions { multiple }).await
                    }
                    SettleFrame::Nack { tag, requeue } => {
                        channel.basic_nack(tag, BasicNackOptions { multiple: false, requeue }).await
                    }
                };
            };
            let mut told = told.boxed_local();
            // The first poll hands it over.
            let pending = told.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
            if number + 1 == last && pending {
                self.settling = Some(told);
            }
        }
    }

    fn poll_settled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(settling) = &mut self.settling {
            std::task::ready!(settling.as_mut().poll(cx));
            self.settling = None;
        }
        Poll::Ready(())
    }

    fn poll_chores(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        while let Some(chore) = self.chores.front_mut() {
            std::task::ready!(chore.as_mut().poll(cx))?;
            self.chores.pop_front();
        }
        Poll::Ready(Ok(()))
    }

    /// Writes messages.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        let shared = &self.shared;
        match &mut self.out {
            Out::Client(out) => out.poll_flush(cx).map_err(|error| lost(&error)),
            Out::Server(replies) => poll_replies(shared, replies, &mut self.opening, cx)?.map(Ok),
        }
    }
}

/// RMQ-12: writes replies, on a new channel if the broker has closed theirs.
fn poll_replies(
    shared: &Shared,
    replies: &mut Replies,
    opening: &mut Option<Opening>,
    cx: &mut Context<'_>,
) -> Result<Poll<()>, SessionError> {
    loop {
        if let Some(open) = opening {
            let Poll::Ready(channel) = open.as_mut().poll(cx) else { return Ok(Poll::Pending) };
            *opening = None;
            replies.reopen(channel.map_err(|error| lost(&error))?);
        }
        match replies.poll_flush(cx) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Ok(())) => return Ok(Poll::Ready(())),
            Poll::Ready(Err(error)) => {
                if !shared.link.connection.status().connected() {
                    return Err(lost(&error));
                }
                shared.report(format!(
                    "the broker has closed the channel for replies, some may be lost; it is opened anew: {error}"
                ));
                cx.waker().wake_by_ref();
                let connection = Arc::clone(&shared.link.connection);
                *opening = Some(async move { connection.create_channel().await }.boxed_local());
            }
        }
    }
}

impl SessionWriter<RmqReplyTo> for RmqWriter {
    fn write(&mut self, item: Outbound<RmqReplyTo>) -> Result<(), WriteError> {
        let refused = |error: WireError| WriteError::Item(Arc::new(error));
        match item {
            Outbound::Request(message) | Outbound::Event(message) => {
                self.message(message, None).map_err(refused)
            }
            Outbound::Settle { delivery, settlement } => {
                self.settle(&delivery.message, settlement);
                Ok(())
            }
            Outbound::Subscribe(subscription) => {
                let shared = &self.shared;
                let mut routes = shared.routes.borrow_mut();
                let Some(routes) = routes.as_mut() else { return Ok(()) };
                let short = wire::short("the routing key", &subscription.route).map_err(refused)?;
                routes.add(subscription.route);
                let (settings, channel) = (Arc::clone(&shared.settings), Rc::clone(&shared.channel));
                let queue = self.queue.clone();
                let exchange = match self.exchange.as_str() {
                    "" => queue.clone(),
                    _ => self.exchange.clone(),
                };
                self.chores.push_back(
                    async move { link::bind(&settings, &channel, &queue, &exchange, short.as_str()).await }
                        .boxed_local(),
                );
                Ok(())
            }
            Outbound::Unsubscribe(route) => {
                // The queue stays bound: other services may be on it.
                if let Some(routes) = self.shared.routes.borrow_mut().as_mut() {
                    routes.remove(&route);
                }
                Ok(())
            }
            Outbound::Cancel { id, .. } => {
                let Out::Client(out) = &mut self.out else { return Ok(()) };
                // RMQ-20: what has not left yet need not.
                if !out.withdraw(&id)
                    && let Some(telling) = &mut self.telling
                {
                    let format = self.shared.settings.codec.format();
                    telling.push(Raw::text(format, &id.text()).into());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn write_response(&mut self, response: &mut Response<RmqReplyTo>) -> Result<(), WriteError> {
        self.response(response).map_err(|error| WriteError::Item(Arc::new(error)))
    }

    fn write_event(&mut self, message: OutboundMessage, receipt: PacketId) -> Result<Taken, WriteError> {
        match self.message(message, Some(receipt)) {
            Ok(()) => Ok(Taken::Confirming),
            Err(error) => Err(WriteError::Item(Arc::new(error))),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        self.shared.intake.borrow_mut().tend(cx)?;
        if let Some(hearing) = self.shared.hearing.borrow_mut().as_mut() {
            hearing.tend(cx);
        }
        if let Some(report) = self.telling.as_mut().and_then(|telling| telling.poll(cx)) {
            self.shared.report(report);
            cx.waker().wake_by_ref();
        }
        self.write_settled(cx);
        let chores = self.poll_chores(cx)?;
        let settled = self.poll_settled(cx);
        let out = self.poll_out(cx)?;
        if chores.is_ready() && settled.is_ready() { out.map(Ok) } else { Poll::Pending }
    }

    fn pending_bytes(&self) -> usize {
        match &self.out {
            Out::Client(out) => out.pending_bytes(),
            Out::Server(replies) => replies.pending_bytes(),
        }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        std::task::ready!(self.poll_flush(cx))?;
        if let Out::Client(out) = &self.out
            && !out.is_confirmed()
        {
            return Poll::Pending;
        }
        let connection = Arc::clone(&self.shared.link.connection);
        let closing = self.closing.get_or_insert_with(|| {
            async move {
                // The broker may have gone meanwhile.
                let close = connection.close(200, "OK".into());
                let _ = tokio::time::timeout(ROUND_TRIP_LIMIT, close).await;
            }
            .boxed_local()
        });
        closing.as_mut().poll(cx).map(Ok)
    }
}
