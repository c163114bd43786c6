// SPDX-License-Identifier: MIT OR Apache-2.0
//! One session with a broker, for both roles.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use martlet_core::Headers;
use martlet_core::codec::Codec;
use martlet_core::error::SessionError;
use martlet_core::packet::{IncomingPacket, Raw};
use martlet_core::pattern::Route;
use martlet_core::route::HandlerKind;
use martlet_core::transport::{
    ContextData, Delivery, Inbound, Outbound, OutboundMessage, PacketId, PatternKey, Response, Role, Session,
    SessionReader, SessionWriter, Settlement, Subscription, Taken, WriteError,
};
use tokio::time::Sleep;

use crate::cancel::{self, Cancellations};
use crate::context::MqttContext;
use crate::driver::{Publish, Refusal};
use crate::flow::What;
use crate::link::{AckTo, Control, Link, MAX_SIGNALS, Signal};
use crate::options::{Common, MqttQos, MqttSubscribeOptions};
use crate::record::PublishOptions;
use crate::replies::{Next, Replies};
use crate::topics::{self, Found, REPLY, Routes};
use crate::wire::{self, WireError};

/// How long a broker may take to answer when a session is drained or closed.
const ROUND_TRIP_LIMIT: Duration = Duration::from_secs(2);

/// How many filters one packet takes back.
const UNSUBSCRIBE_CHUNK: usize = 256;

/// What a session needs beyond its connection.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) common: Common,
    pub(crate) role: Role,
    pub(crate) client_id: String,
    pub(crate) subscribe_options: MqttSubscribeOptions,
    pub(crate) shared_group: Option<String>,
    pub(crate) manual_acks: bool,
    pub(crate) max_connection_attempts: i32,
    pub(crate) high_water_bytes: usize,
    pub(crate) user_properties: Headers,
    pub(crate) reply_idle: Duration,
    pub(crate) codec: Arc<dyn Codec>,
}

/// A connection as `unwrap()` shows it. (NestJS gives its driver's client; ours has none that others could use.)
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MqttConnection {
    /// The client id, which the broker may have assigned.
    pub client_id: String,
    /// 4 for MQTT 3.1.1, 5 for MQTT 5.
    pub protocol_version: u8,
    /// Whether the broker had kept the session.
    pub session_present: bool,
}

/// Where the replies to a delivery go, and how it is acknowledged.
#[derive(Debug, Clone)]
pub struct MqttReplyTo {
    topic: Bytes,
    ack: Option<AckTo>,
}

/// A session over one MQTT connection.
pub struct MqttSession {
    shared: Rc<RefCell<Shared>>,
    peer: Arc<str>,
    about: Arc<MqttConnection>,
}

impl std::fmt::Debug for MqttSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MqttSession").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// What the two halves share.
pub(crate) struct Shared {
    pub(crate) link: Link,
    pub(crate) settings: Arc<Settings>,
    pub(crate) routes: Routes,
    replies: Replies,
    cancellations: Cancellations,
    /// What the reader yields before the next message.
    ready: VecDeque<Inbound<MqttReplyTo>>,
    phase: Phase,
    scratch: BytesMut,
}

#[derive(Debug)]
enum Phase {
    Open,
    /// Waiting for the broker to have sent everything.
    Draining(Pin<Box<Sleep>>),
    /// What waits here is all there is.
    Last,
}

impl MqttSession {
    pub(crate) fn new(shared: Shared, peer: Arc<str>, about: MqttConnection) -> Self {
        Self { shared: Rc::new(RefCell::new(shared)), peer, about: Arc::new(about) }
    }
}

impl Session for MqttSession {
    type ReplyTo = MqttReplyTo;
    type Reader = MqttReader;
    type Writer = MqttWriter;

    fn peer(&self) -> Arc<str> {
        Arc::clone(&self.peer)
    }

    fn native(&self) -> Option<ContextData> {
        Some(Arc::clone(&self.about) as ContextData)
    }

    fn split(self) -> (MqttReader, MqttWriter) {
        let reader = MqttReader { shared: Rc::clone(&self.shared) };
        (reader, MqttWriter { shared: self.shared, closing: Closing::Not })
    }
}

// === impl Shared ===

impl Shared {
    pub(crate) fn new(link: Link, settings: Arc<Settings>) -> Self {
        Self {
            link,
            routes: Routes::new(settings.shared_group.clone()),
            replies: Replies::new(settings.reply_idle),
            settings,
            cancellations: Cancellations::default(),
            ready: VecDeque::new(),
            phase: Phase::Open,
            scratch: BytesMut::new(),
        }
    }

    /// Asks the broker for a route (MQTT-4), and for the cancellations of its requests.
    pub(crate) fn subscribe(&mut self, subscription: &Subscription) -> Result<(), String> {
        let route = &subscription.route;
        topics::check_filter(route)?;
        let mut options = self.settings.subscribe_options;
        if let Some(own) = subscription.extras.get("qos") {
            let number = own.as_u64().and_then(|number| u8::try_from(number).ok());
            options.qos = number
                .ok_or_else(|| format!("a quality of service is 0, 1 or 2, not {own}"))
                .and_then(MqttQos::try_from)
                .map_err(|reason| format!("extra qos: {reason}"))?;
        }
        let (filter, shared, identifier) = self.routes.add(route);
        // The protocol forbids it for shared subscriptions.
        options.nl &= !shared;
        self.link.subscribe(&filter, options, identifier, Control::Route(route.clone()))?;
        if subscription.kind == HandlerKind::Message
            && self.settings.common.cancellation
            && let Some(filter) = self.cancellations.add(route)
        {
            // MQTT-24.
            self.link.subscribe(&filter, MqttSubscribeOptions::default(), None, Control::Cancel)?;
        }
        Ok(())
    }

    /// Takes back what `subscribe` asked for.
    fn unsubscribe(&mut self, route: &Route) -> Result<(), String> {
        let own = self.routes.remove(route);
        let filters: Vec<String> = own.into_iter().chain(self.cancellations.remove(route)).collect();
        if filters.is_empty() { Ok(()) } else { self.link.unsubscribe(filters) }
    }

    /// Writes the payload of a request or event into `scratch`.
    fn encode<'a>(&mut self, message: &'a OutboundMessage) -> Result<(PublishOptions, &'a str), String> {
        let v5 = self.link.version.is_v5();
        let options = PublishOptions::read(&message.headers, &self.settings.user_properties, v5)?;
        wire::encode_request(&*self.settings.codec, message, &mut self.scratch)?;
        Ok((options, message.pattern.route().as_str()))
    }

    /// Sends a request or event. Says whether the broker is to acknowledge it.
    fn send(&mut self, message: &OutboundMessage, what: What) -> Result<bool, String> {
        let (options, topic) = self.encode(message)?;
        self.link.publish([topic.as_bytes(), &[]], &mut self.scratch, options, what)
    }

    fn event(&mut self, mut message: OutboundMessage, what: What) -> Result<Taken, WriteError> {
        message.put_timeout();
        match self.send(&message, what) {
            // MQTT-21: it goes with the flow from session to session until the broker has it.
            Ok(true) => Ok(Taken::Carried),
            Ok(false) => Ok(Taken::Written),
            Err(reason) => Err(refused(reason)),
        }
    }

    fn request(&mut self, mut message: OutboundMessage) -> Result<(), String> {
        message.put_timeout();
        // Always present on requests.
        let Some(id) = message.id else { return Ok(()) };
        if !self.replies.is_subscribed(message.pattern.route()) {
            // It is going to wait: what cannot be sent is refused now.
            let (options, topic) = self.encode(&message)?;
            self.link.check(topic.as_bytes(), &self.scratch, &options)?;
        }
        match self.replies.request(id, message) {
            Next::Publish(message) => {
                let sent = self.send(&message, What::Request(id));
                if sent.is_err() {
                    self.replies.end(&id);
                }
                sent.map(drop)
            }
            Next::Wait => Ok(()),
            Next::Subscribe(key, filter) => {
                let options = MqttSubscribeOptions::default();
                let asked = self.link.subscribe(&filter, options, None, Control::Reply(key));
                if asked.is_err() {
                    self.replies.refused(key);
                }
                asked
            }
        }
    }

    /// MQTT-24: nobody waits for a call any more; its handler is to hear of it.
    fn cancel(&mut self, id: PacketId, route: &Route) -> Result<(), String> {
        let is_published = self.replies.cancel(&id) && !self.link.flow.withdraw(id);
        if !is_published || !self.settings.common.cancellation {
            return Ok(());
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(&Raw::text(self.settings.codec.format(), &id.text()));
        let topic = [cancel::PREFIX.as_bytes(), route.as_bytes()];
        self.link.publish(topic, &mut self.scratch, PublishOptions::default(), What::Unwatched).map(drop)
    }

    fn respond(&mut self, response: &Response<MqttReplyTo>) -> Result<(), String> {
        let Response { reply_to: MqttReplyTo { topic: to, .. }, id, body, headers } = response;
        let options = match headers {
            // MQTT-12: a record as a result is honoured.
            Some(headers) => PublishOptions::read(headers, &Headers::new(), self.link.version.is_v5())?,
            None => PublishOptions::default(),
        };
        wire::encode_response(&*self.settings.codec, id, body, &mut self.scratch)?;
        self.link.publish([to, REPLY.as_bytes()], &mut self.scratch, options, What::Unwatched).map(drop)
    }

    /// A call ends with an error of ours.
    fn fail(&mut self, id: &PacketId, reason: &str) {
        let packet = wire::failed_call(self.settings.codec.format(), id, reason);
        self.ready.push_back(Inbound::Response(Box::new(packet)));
    }

    fn report(&mut self, reason: String) {
        self.ready.push_back(Inbound::Bad { reason });
    }

    /// What the broker has answered since the last time.
    fn take_signals(&mut self) {
        while self.ready.len() < MAX_SIGNALS
            && let Some(signal) = self.link.signals.pop_front()
        {
            match signal {
                Signal::Unsubscribed => {}
                Signal::Report(reason) => self.report(reason),
                Signal::Subscribed(Control::Gone | Control::Route(_) | Control::Cancel, None) => {}
                Signal::Subscribed(Control::Gone, Some(_)) => {}
                Signal::Subscribed(Control::Route(route), Some(refusal)) => {
                    let reason = because(&refusal);
                    self.routes.remove(&route);
                    self.report(format!("pattern {route}: the broker refused the subscription: {reason}"));
                }
                // MQTT-24: served all the same. Said once.
                Signal::Subscribed(Control::Cancel, Some(refusal)) => {
                    if self.link.is_first_refusal() {
                        let (topics, reason) = (cancel::PREFIX, because(&refusal));
                        self.report(format!(
                            "handlers do not hear of cancelled calls: the broker refused the subscription of topics below \
                             {topics}: {reason}"
                        ));
                    }
                }
                Signal::Subscribed(Control::Reply(key), None) => {
                    for message in self.replies.subscribed(key) {
                        // Always present on requests.
                        let Some(id) = message.id else { continue };
                        if let Err(reason) = self.send(&message, What::Request(id)) {
                            self.replies.end(&id);
                            self.fail(&id, &reason);
                        }
                    }
                }
                // MQTT-9.
                Signal::Subscribed(Control::Reply(key), Some(refusal)) => {
                    let reason = because(&refusal);
                    for id in self.replies.refused(key) {
                        self.fail(
                            &id,
                            &format!("the broker refused the subscription of the reply topic: {reason}"),
                        );
                    }
                }
                Signal::Refused(id, refusal) => {
                    self.replies.end(&id);
                    match refusal {
                        Refusal::NoSubscribers => self.ready.push_back(Inbound::Unreachable { id }),
                        Refusal::Because(reason) => {
                            self.fail(&id, &format!("the broker refused the request: {reason}"));
                        }
                    }
                }
            }
        }
    }

    /// Makes an arrival of a message; `None` when it is not for the runtime.
    fn read(&mut self, publish: Publish, packet: &mut IncomingPacket) -> Option<Inbound<MqttReplyTo>> {
        let ack = (publish.qos != MqttQos::AtMostOnce).then_some(AckTo { id: publish.id, qos: publish.qos });
        let inbound = match self.settings.role {
            Role::Server => self.deliver(publish, ack, packet),
            Role::Client => self.reply(&publish),
        };
        let is_settled_later =
            self.settings.manual_acks && matches!(&inbound, Some(Inbound::Request(_) | Inbound::Event(_)));
        if let (Some(ack), false) = (ack, is_settled_later) {
            self.link.acknowledge(ack, matches!(inbound, Some(Inbound::Bad { .. })));
        }
        inbound
    }

    fn reply(&mut self, publish: &Publish) -> Option<Inbound<MqttReplyTo>> {
        let packet = match self.settings.codec.decode_response((&publish.payload).into()) {
            Ok(packet) => packet,
            Err(error) => {
                let topic = String::from_utf8_lossy(&publish.topic);
                return Some(Inbound::Bad { reason: format!("reply on {topic}: {error}") });
            }
        };
        let id = wire::packet_id(packet.id.as_ref()?)?;
        if packet.body.is_final() {
            self.replies.end(&id);
        }
        self.replies.is_ours(&id).then(|| Inbound::Response(Box::new(packet)))
    }

    fn deliver(
        &mut self,
        publish: Publish,
        ack: Option<AckTo>,
        packet: &mut IncomingPacket,
    ) -> Option<Inbound<MqttReplyTo>> {
        let topic = std::str::from_utf8(&publish.topic).unwrap_or_default();
        // MQTT-24: whatever subscription it came by.
        if cancel::is_cancellation(topic) {
            let wanted = self.settings.common.cancellation;
            return wanted.then(|| Inbound::Cancel { id: publish.payload.into() });
        }
        let identifiers =
            publish.properties.as_ref().map(|properties| properties.subscription_identifiers.as_slice());
        let (route, wild) = match self.routes.find(topic, identifiers.unwrap_or_default()) {
            Found::Handler(route, wild) => (route.clone(), wild),
            Found::Copy | Found::Nobody => return None,
        };
        let codec = &*self.settings.codec;
        // MQTT-8.
        if wild && topic.ends_with(REPLY) && wire::is_reply(codec, &publish.payload) {
            return None;
        }
        *packet = match wire::decode_request(codec, &publish.payload) {
            Ok(packet) => packet,
            Err(reason) => return Some(Inbound::Bad { reason: format!("message on {topic}: {reason}") }),
        };
        let is_event = packet.is_event();
        let context = MqttContext {
            topic: publish.topic.clone(),
            qos: publish.qos,
            retain: publish.retain,
            dup: publish.dup,
            packet_id: ack.map(|ack| ack.id),
            properties: publish.properties,
        };
        let delivery = Delivery {
            key: PatternKey::Route(route),
            reply_to: MqttReplyTo { topic: publish.topic, ack: ack.filter(|_| self.settings.manual_acks) },
            context: Some(Arc::new(context)),
        };
        Some(if is_event { Inbound::Event(delivery) } else { Inbound::Request(delivery) })
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<MqttReplyTo>, SessionError>>> {
        loop {
            self.take_signals();
            if let Some(inbound) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(inbound)));
            }
            if let Some((receipt, refused)) = self.link.flow.next_confirmed() {
                return Poll::Ready(Some(Ok(Inbound::Confirmed { receipt, refused })));
            }
            if let Some(reason) = self.link.take_dropped() {
                return Poll::Ready(Some(Ok(Inbound::Bad { reason })));
            }
            while let Some(publish) = self.link.next_arrival() {
                if let Some(inbound) = self.read(publish, packet) {
                    return Poll::Ready(Some(Ok(inbound)));
                }
            }
            if let Err(error) = self.link.check_ended() {
                return Poll::Ready(Some(Err(error)));
            }
            if let Phase::Draining(limit) = &mut self.phase
                && (self.link.controls() == 0 || limit.as_mut().poll(cx).is_ready())
            {
                self.link.intake = false;
                self.phase = Phase::Last;
            }
            if matches!(self.phase, Phase::Last) {
                return Poll::Ready(None);
            }
            self.link.poll_read(cx);
            if !self.link.has_news() {
                // Acknowledgements of what was read.
                return match self.link.poll_write(cx) {
                    Ok(_) => Poll::Pending,
                    Err(error) => Poll::Ready(Some(Err(error))),
                };
            }
        }
    }

    /// Stops intake. The broker is told, except where it is to keep what comes for the next session (MQTT-18).
    fn drain(&mut self) {
        if self.settings.role == Role::Client {
            return;
        }
        if !self.settings.common.clean {
            self.link.intake = false;
            self.phase = Phase::Last;
            return;
        }
        let filters: Vec<String> = self.routes.filters().map(str::to_owned).collect();
        for chunk in filters.chunks(UNSUBSCRIBE_CHUNK) {
            if let Err(reason) = self.link.unsubscribe(chunk.to_vec()) {
                self.report(reason);
            }
        }
        self.phase = Phase::Draining(Box::pin(tokio::time::sleep(ROUND_TRIP_LIMIT)));
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        for filter in self.replies.poll_idle(cx) {
            // Nobody waits for it; without room it stays subscribed.
            let _ = self.link.unsubscribe(vec![filter]);
        }
        let flushed = self.link.poll_work(cx)?;
        if self.link.signals.is_empty() {
            return flushed.map(Ok);
        }
        // What waited for a reply topic can go now.
        self.take_signals();
        if !self.ready.is_empty() {
            cx.waker().wake_by_ref();
        }
        self.link.poll_write(cx)?.map(Ok)
    }
}

fn refused(reason: String) -> WriteError {
    WriteError::Item(Arc::new(WireError(reason)))
}

fn because(refusal: &Refusal) -> &str {
    match refusal {
        Refusal::NoSubscribers => "nobody subscribes to it",
        Refusal::Because(reason) => reason,
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self.settings.common.clean {
            self.link.keep_reply_filters(self.replies.filters());
        }
    }
}

// === impl SessionReader ===

/// The half that reads.
pub struct MqttReader {
    shared: Rc<RefCell<Shared>>,
}

impl std::fmt::Debug for MqttReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MqttReader").finish_non_exhaustive()
    }
}

impl SessionReader<MqttReplyTo> for MqttReader {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<MqttReplyTo>, SessionError>>> {
        self.shared.borrow_mut().poll_next(cx, packet)
    }

    fn drain(&mut self) {
        self.shared.borrow_mut().drain();
    }

    /// MQTT-18: a session that follows at once could else overtake the last acknowledgements of this one in the broker, and
    /// get their messages again.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.shared.borrow_mut().link.poll_linger(cx)
    }
}

// === impl SessionWriter ===

/// The half that writes.
pub struct MqttWriter {
    shared: Rc<RefCell<Shared>>,
    closing: Closing,
}

#[derive(Debug)]
enum Closing {
    Not,
    /// Waiting for the broker to have acknowledged everything.
    Finishing(Pin<Box<Sleep>>),
    /// DISCONNECT is on its way.
    Goodbye,
}

impl std::fmt::Debug for MqttWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MqttWriter").field("pending_bytes", &self.pending_bytes()).finish_non_exhaustive()
    }
}

impl SessionWriter<MqttReplyTo> for MqttWriter {
    fn write(&mut self, item: Outbound<MqttReplyTo>) -> Result<(), WriteError> {
        let shared = &mut *self.shared.borrow_mut();
        match item {
            Outbound::Request(message) => shared.request(message).map_err(refused),
            // For those that nobody waits for.
            Outbound::Event(message) => shared.event(message, What::Unwatched).map(drop),
            Outbound::Settle { delivery, settlement } => {
                if let Some(ack) = delivery.ack {
                    match settlement {
                        // MQTT-15: the broker delivers it again when the session goes on.
                        Settlement::HandedBack => {}
                        Settlement::Done | Settlement::Finished | Settlement::Discard => {
                            shared.link.acknowledge(ack, false);
                        }
                        _ => shared.link.acknowledge(ack, true),
                    }
                }
                Ok(())
            }
            Outbound::Subscribe(subscription) => shared
                .subscribe(&subscription)
                .map_err(|reason| refused(format!("pattern {}: {reason}", subscription.route))),
            Outbound::Unsubscribe(route) => shared.unsubscribe(&route).map_err(refused),
            Outbound::Cancel { id, route } => shared.cancel(id, &route).map_err(refused),
            // Nothing else is ever asked of it.
            _ => Ok(()),
        }
    }

    fn write_response(&mut self, response: &mut Response<MqttReplyTo>) -> Result<(), WriteError> {
        self.shared.borrow_mut().respond(response).map_err(refused)
    }

    fn write_event(&mut self, message: OutboundMessage, receipt: PacketId) -> Result<Taken, WriteError> {
        self.shared.borrow_mut().event(message, What::Event(receipt))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        self.shared.borrow_mut().poll_flush(cx)
    }

    fn pending_bytes(&self) -> usize {
        let shared = self.shared.borrow();
        // Nothing is waited for once the connection is gone: it must be read to its end.
        if shared.link.is_gone() { 0 } else { shared.link.pending_bytes() + shared.replies.waiting_bytes() }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        let link = &mut self.shared.borrow_mut().link;
        link.intake = false;
        loop {
            match &mut self.closing {
                Closing::Not => {
                    self.closing = Closing::Finishing(Box::pin(tokio::time::sleep(ROUND_TRIP_LIMIT)))
                }
                Closing::Finishing(limit) => {
                    let written = link.poll_work(cx)?;
                    link.check_alive()?;
                    if written.is_pending() || !link.flow.is_idle() {
                        std::task::ready!(limit.as_mut().poll(cx));
                    }
                    link.say_goodbye();
                    self.closing = Closing::Goodbye;
                }
                Closing::Goodbye => {
                    // A broker that has closed its side already has nothing to say.
                    if let Ok(Poll::Pending) = link.poll_write(cx) {
                        return Poll::Pending;
                    }
                    std::task::ready!(link.poll_shutdown(cx));
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}
