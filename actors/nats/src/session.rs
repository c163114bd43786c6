// SPDX-License-Identifier: MIT OR Apache-2.0
//! One session with a broker, for both roles: what arrives on which subscription decides what it is.

use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use async_nats::{Event, Message, ServerError, Subject};
use bytes::BytesMut;
use futures::future::LocalBoxFuture;
use martlet_core::Headers;
use martlet_core::error::SessionError;
use martlet_core::packet::{IncomingPacket, Raw, ResponseBody, ShortReply};
use martlet_core::pattern::Route;
use martlet_core::transport::{
    ContextData, Delivery, Inbound, Outbound, OutboundMessage, PacketId, PatternKey, Response, Session,
    SessionReader, SessionWriter, WriteError,
};

use crate::context::NatsContext;
use crate::link::{Link, Purpose, ROUND_TRIP_LIMIT};
use crate::wire::{self, Answer, WireError};

/// Where the replies to a delivery go.
#[derive(Debug, Clone)]
pub struct NatsReplyTo {
    subject: Option<Subject>,
    /// For the services discovery: which endpoint, since when.
    watched: Option<(u32, Instant)>,
}

/// A session over one NATS connection.
pub struct NatsSession {
    link: Rc<Link>,
    peer: Arc<str>,
}

impl std::fmt::Debug for NatsSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsSession").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl NatsSession {
    pub(crate) fn new(link: Rc<Link>, peer: Arc<str>) -> Self {
        Self { link, peer }
    }
}

impl Session for NatsSession {
    type ReplyTo = NatsReplyTo;
    type Reader = NatsReader;
    type Writer = NatsWriter;

    fn peer(&self) -> Arc<str> {
        Arc::clone(&self.peer)
    }

    fn native(&self) -> Option<ContextData> {
        Some(Arc::new(self.link.client.clone()))
    }

    fn split(self) -> (NatsReader, NatsWriter) {
        let reader = NatsReader {
            link: Rc::clone(&self.link),
            phase: Phase::Open,
            held: None,
            reports: VecDeque::new(),
            dropped: 0,
            progress: false,
        };
        let max_header_bytes = self.link.settings.common.max_header_bytes;
        let writer = NatsWriter {
            link: self.link,
            buffer: BytesMut::new(),
            usual: None,
            last_subject: None,
            max_header_bytes,
            closing: None,
        };
        (reader, writer)
    }
}

// === impl SessionReader ===

/// The half that reads.
pub struct NatsReader {
    link: Rc<Link>,
    phase: Phase,
    /// What was met among short replies, and is none: of which subscription, and the message, or that it has ended.
    held: Option<(usize, Option<Message>)>,
    /// What is to be reported before the next message.
    reports: VecDeque<String>,
    /// Messages that were dropped since the session began.
    dropped: u64,
    /// Something arrived since it was last looked.
    progress: bool,
}

impl std::fmt::Debug for NatsReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsReader").field("phase", &self.phase).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Phase {
    Open,
    /// Waiting for the broker to have sent everything.
    Draining {
        probe: Rc<std::cell::Cell<Option<u64>>>,
        limit: Pin<Box<tokio::time::Sleep>>,
    },
    /// Everything has arrived: what waits in the subscriptions is all there is.
    Last,
}

impl NatsReader {
    /// Looks at what the driver reported; an error when the connection is gone.
    fn take_signals(&mut self) -> Result<(), SessionError> {
        let mut slow = 0u64;
        let mut lost = false;
        for event in self.link.signals.take() {
            match event {
                Event::Disconnected | Event::Closed => lost = true,
                Event::SlowConsumer(_) | Event::ServerError(ServerError::SlowConsumer(_)) => slow += 1,
                Event::ServerError(error) => {
                    let text = match error {
                        ServerError::Other(text) => text,
                        other => other.to_string(),
                    };
                    self.reports.push_back(format!("the broker said: {text}"));
                    *self.link.last_words.borrow_mut() = Some(text);
                }
                Event::LameDuckMode => {
                    tracing::info!(target: "martlet", "the broker is about to shut down (lame duck mode)");
                }
                _ => {}
            }
        }
        if slow > 0 {
            self.dropped += slow;
            let capacity = self.link.settings.common.subscription_capacity;
            self.reports.push_back(format!(
                "{slow} messages (at least {} in this session) were dropped: {capacity} were waiting, the limit \
                 of subscriptionCapacity",
                self.dropped
            ));
        }
        if lost { Err(self.link.lost()) } else { Ok(()) }
    }

    /// Makes an arrival of a message; `None` when it is not for the runtime.
    #[inline]
    fn read(
        link: &Link,
        purpose: &Purpose,
        message: Message,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Option<Inbound<NatsReplyTo>> {
        match purpose {
            Purpose::Serve { route, endpoint } => {
                if wire::is_cancel_subject(&message.subject) {
                    // A handler of everything (`>`) does not handle this.
                    return None;
                }
                let key = PatternKey::Route(route.clone());
                Some(deliver(link, key, *endpoint, message, packet))
            }
            Purpose::Inbox => {
                let token = wire::last_token(&message.subject);
                if link.take_probe(token) {
                    return None;
                }
                let mut reply = ShortReply::default();
                if Self::read_short(link, &message, &mut reply) {
                    return Some(Inbound::Reply(reply));
                }
                let id = PacketId::from_text(token.as_bytes())?;
                let status = message.status.map(|status| status.as_u16());
                match wire::decode_response(&*link.settings.codec, token, status, &message.payload) {
                    Answer::Reply(packet) => Some(Inbound::Response(Box::new(packet))),
                    Answer::Nobody => Some(Inbound::Unreachable { id }),
                    Answer::Foreign => None,
                }
            }
            Purpose::Cancel => Some(Inbound::Cancel { id: message.payload.into() }),
            Purpose::Discovery(verb) => {
                if let (Some(service), Some(reply)) = (&link.settings.service, message.reply) {
                    link.push(reply, None, service.answer(*verb), None);
                    // Written at the next turn.
                    cx.waker().wake_by_ref();
                }
                None
            }
        }
    }

    /// Reads a reply that is one short value; false when it is another message.
    #[inline]
    fn read_short(link: &Link, message: &Message, reply: &mut ShortReply) -> bool {
        message.status.is_none()
            && link.settings.codec.read_short_response(&message.payload, reply)
            && PacketId::from_text(wire::last_token(&message.subject).as_bytes()) == Some(reply.id)
    }

    /// Whether everything that there will ever be has been read.
    fn is_drained(&mut self, cx: &mut Context<'_>) -> bool {
        if let Phase::Draining { probe, limit } = &mut self.phase {
            let returned = probe.get().is_some_and(|probe| self.link.probed.get() >= probe);
            if !returned {
                if limit.as_mut().poll(cx).is_pending() {
                    return false;
                }
                if std::mem::take(&mut self.progress) {
                    // The broker is still sending: the limit is for one that does not answer.
                    limit.as_mut().reset(tokio::time::Instant::now() + ROUND_TRIP_LIMIT);
                    cx.waker().wake_by_ref();
                    return false;
                }
            }
            self.phase = Phase::Last;
            // What arrived before the probe may have to be asked for once more.
            cx.waker().wake_by_ref();
            return false;
        }
        matches!(self.phase, Phase::Last) && !self.link.streams.borrow().has_ready()
    }
}

/// A request or event.
fn deliver(
    link: &Link,
    key: PatternKey,
    endpoint: u32,
    message: Message,
    packet: &mut IncomingPacket,
) -> Inbound<NatsReplyTo> {
    let Message { subject, reply, payload, headers, .. } = message;
    let headers = match &headers {
        None => Headers::new(),
        Some(map) => {
            let limit = link.settings.common.max_header_bytes;
            let size = wire::header_bytes(map);
            if size > limit {
                let reason = format!(
                    "message on {}: headers of {size} bytes exceed maxHeaderBytes, {limit}",
                    &*subject
                );
                return Inbound::Bad { reason };
            }
            wire::headers_of(map)
        }
    };
    if let Err(reason) = wire::read_request(&*link.settings.codec, payload, &headers, packet) {
        return Inbound::Bad { reason: format!("message on {}: {reason}", &*subject) };
    }
    let is_event = packet.is_event();
    let watched = (endpoint != u32::MAX && !is_event).then(|| (endpoint, Instant::now()));
    let delivery = Delivery {
        key,
        reply_to: NatsReplyTo { subject: reply.clone(), watched },
        context: Some(Arc::new(NatsContext { subject, reply, headers })),
    };
    if is_event { Inbound::Event(delivery) } else { Inbound::Request(delivery) }
}

impl SessionReader<NatsReplyTo> for NatsReader {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<NatsReplyTo>, SessionError>>> {
        loop {
            if self.link.signals.is_raised() {
                self.take_signals()?;
            }
            if let Some(reason) = self.reports.pop_front() {
                return Poll::Ready(Some(Ok(Inbound::Bad { reason })));
            }
            let link = &self.link;
            let mut streams = link.streams.borrow_mut();
            let next = match self.held.take() {
                Some((key, message)) => Poll::Ready(match (streams.tag(key), message) {
                    (_, None) => None,
                    // Forgotten meanwhile, and what had arrived for it with it.
                    (None, Some(_)) => Some(None),
                    (Some(purpose), Some(message)) => Some(Self::read(link, purpose, message, cx, packet)),
                }),
                None => streams.poll_next(cx, |cx, (_, purpose), message| {
                    Some(Self::read(link, purpose, message?, cx, packet))
                }),
            };
            drop(streams);
            match next {
                Poll::Ready(Some(Some(inbound))) => {
                    self.progress = true;
                    return Poll::Ready(Some(Ok(inbound)));
                }
                Poll::Ready(Some(None)) => self.progress = true,
                // We never end a subscription without removing it: the driver's task has ended.
                Poll::Ready(None) => return Poll::Ready(Some(Err(self.link.lost()))),
                Poll::Pending => {
                    if self.is_drained(cx) {
                        return Poll::Ready(None);
                    }
                    self.link.signals.register(cx);
                    if !self.link.signals.is_raised() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn take_replies(&mut self, cx: &mut Context<'_>, replies: &mut Vec<ShortReply>, max: usize) {
        let (link, held) = (&self.link, &mut self.held);
        let mut streams = link.streams.borrow_mut();
        for _ in 0..max {
            if held.is_some() {
                return;
            }
            let next = streams.poll_next(cx, |_, (key, purpose), message| {
                if let (Purpose::Inbox, Some(message)) = (purpose, &message) {
                    // Read where it stays.
                    replies.push(ShortReply::default());
                    if replies.last_mut().is_some_and(|reply| Self::read_short(link, message, reply)) {
                        return;
                    }
                    replies.pop();
                }
                *held = Some((key, message));
            });
            if next.is_pending() {
                return;
            }
            self.progress = true;
        }
    }

    fn drain(&mut self) {
        let link = &self.link;
        let intake: Vec<usize> = {
            let streams = link.streams.borrow();
            let inbox = |key: &usize| matches!(streams.tag(*key), Some(Purpose::Inbox));
            streams.keys().into_iter().filter(|key| !inbox(key)).collect()
        };
        if !link.settings.graceful_shutdown {
            link.forget(&intake);
            self.phase = Phase::Last;
            return;
        }
        let probe = Rc::new(std::cell::Cell::new(None));
        let (weak, sent) = (Rc::downgrade(link), Rc::clone(&probe));
        link.add_chore(async move {
            Link::unsubscribe(weak.clone(), intake).await?;
            if let Some(link) = weak.upgrade() {
                sent.set(Some(link.send_probe().await?));
            }
            Ok(())
        });
        self.phase = Phase::Draining { probe, limit: Box::pin(tokio::time::sleep(ROUND_TRIP_LIMIT)) };
    }
}

// === impl SessionWriter ===

/// The half that writes.
pub struct NatsWriter {
    link: Rc<Link>,
    buffer: BytesMut,
    /// Of the last call that had a deadline and nothing else to tell.
    usual: Option<wire::UsualCall>,
    last_subject: Option<(Route, Subject)>,
    max_header_bytes: usize,
    closing: Option<LocalBoxFuture<'static, Result<(), SessionError>>>,
}

impl std::fmt::Debug for NatsWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsWriter").field("pending_bytes", &self.pending_bytes()).finish_non_exhaustive()
    }
}

impl NatsWriter {
    fn message(
        &mut self,
        message: &mut OutboundMessage,
        id: Option<PacketId>,
        reply: Option<Subject>,
    ) -> Result<(), WireError> {
        let (fixed, limit) = (&self.link.settings.headers, self.max_header_bytes);
        let deadline_header = self.link.settings.deadline_header;
        let codec = &*self.link.settings.codec;
        let (size, body, headers);
        if let Some(timeout) = message.timeout
            && message.metadata.is_empty()
            && message.headers.is_empty()
            && fixed.is_empty()
        {
            // Most calls carry the client's own timeout and nothing else: it is put in words once.
            let usual = match self.usual.take() {
                Some(usual) if usual.timeout == timeout => usual,
                _ => wire::UsualCall::new(timeout, limit, deadline_header)?,
            };
            let usual = self.usual.insert(usual);
            body = wire::encode_request(codec, message, id, Some(&usual.metadata), &mut self.buffer)?;
            (size, headers) = (usual.header_bytes, usual.headers.clone());
        } else {
            message.put_timeout();
            headers = wire::headers_for(&message.headers, fixed, &message.metadata, limit, deadline_header)?;
            let metadata = Some(&message.metadata).filter(|metadata| !metadata.is_empty());
            body = wire::encode_request(codec, message, id, metadata, &mut self.buffer)?;
            size = headers.as_ref().map_or(0, wire::header_bytes);
        }
        wire::check_size(size + body.len(), self.link.client.max_payload())?;
        let subject = self.subject(message.pattern.route());
        self.link.push(subject, reply, body, headers);
        Ok(())
    }

    /// A route as a subject; callers mostly call the same one again.
    fn subject(&mut self, route: &Route) -> Subject {
        match &self.last_subject {
            Some((last, subject)) if last == route => subject.clone(),
            _ => {
                let subject = Subject::from(route.as_str());
                self.last_subject = Some((route.clone(), subject.clone()));
                subject
            }
        }
    }

    fn response(&mut self, response: &mut Response<NatsReplyTo>) -> Result<(), WireError> {
        let Response { reply_to, id, body, headers } = response;
        let headers = match headers {
            Some(own) => wire::headers_for(
                own,
                &Headers::new(),
                &martlet_core::Metadata::new(),
                self.max_header_bytes,
                false,
            )?,
            None => None,
        };
        let body = wire::encode_response(&*self.link.settings.codec, id, body, &mut self.buffer)?;
        let size = body.len() + headers.as_ref().map_or(0, wire::header_bytes);
        wire::check_size(size, self.link.client.max_payload())?;
        if let Some(to) = reply_to.subject.take() {
            self.link.push(to, None, body, headers);
        }
        Ok(())
    }
}

impl SessionWriter<NatsReplyTo> for NatsWriter {
    fn write(&mut self, item: Outbound<NatsReplyTo>) -> Result<(), WriteError> {
        let refused = |error: WireError| WriteError::Item(Arc::new(error));
        match item {
            // It always has one.
            Outbound::Request(message) => message.id.map_or(Ok(()), |id| self.write_request(message, id)),
            // NATS-3.
            Outbound::Event(mut message) => self.message(&mut message, None, None).map_err(refused),
            Outbound::Subscribe(subscription) => {
                if let Err(reason) = wire::check_subject(&subscription.route) {
                    return Err(WriteError::Item(Arc::from(
                        Box::<dyn std::error::Error + Send + Sync>::from(format!(
                            "pattern {}: {reason}",
                            subscription.route
                        )),
                    )));
                }
                let link = Rc::downgrade(&self.link);
                self.link.add_chore(async move {
                    match link.upgrade() {
                        Some(link) => link.serve(&subscription).await,
                        None => Ok(()),
                    }
                });
                Ok(())
            }
            Outbound::Unsubscribe(route) => {
                self.link.add_chore(Link::unserve(Rc::downgrade(&self.link), route));
                Ok(())
            }
            Outbound::Cancel { id, route } => {
                if self.link.settings.common.cancellation {
                    let subject = wire::cancel_subject(&route).into();
                    let id = Raw::text(self.link.settings.codec.format(), &id.text());
                    self.link.push(subject, None, id.into(), None);
                }
                Ok(())
            }
            // It acknowledges nothing, so nothing else is ever asked of it.
            _ => Ok(()),
        }
    }

    fn write_response(&mut self, response: &mut Response<NatsReplyTo>) -> Result<(), WriteError> {
        // It may have an id and nowhere to send a reply to, which NestJS ignores, too.
        if response.reply_to.subject.is_some() {
            self.response(response).map_err(|error| WriteError::Item(Arc::new(error)))?;
        }
        if response.body.is_final()
            && let Some(service) = &self.link.settings.service
            && let Some((endpoint, since)) = response.reply_to.watched.take()
        {
            let error = match &response.body {
                ResponseBody::Error(error) => Some(error.bytes()),
                _ => None,
            };
            service.ended(endpoint, since.elapsed(), error);
        }
        Ok(())
    }

    fn write_request(&mut self, mut message: OutboundMessage, id: PacketId) -> Result<(), WriteError> {
        let reply = wire::reply_subject(&self.link.inbox, id, &mut self.buffer);
        self.message(&mut message, Some(id), Some(reply)).map_err(|error| WriteError::Item(Arc::new(error)))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        self.link.poll_flush(cx)
    }

    fn pending_bytes(&self) -> usize {
        self.link.pending_bytes()
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        if self.closing.is_none() {
            std::task::ready!(self.link.poll_flush(cx))?;
        }
        let link = &self.link;
        self.closing.get_or_insert_with(|| Box::pin(Rc::clone(link).close())).as_mut().poll(cx)
    }
}

impl Drop for NatsWriter {
    fn drop(&mut self) {
        // Chores hold the link, and the link holds them.
        self.link.clear_chores();
    }
}
