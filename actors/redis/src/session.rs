// SPDX-License-Identifier: MIT OR Apache-2.0
//! One session with a broker, for both roles: the subscription that a message came on decides what it is.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use martlet_core::error::SessionError;
use martlet_core::packet::{IncomingPacket, Raw};
use martlet_core::transport::{
    ContextData, Delivery, Inbound, Outbound, OutboundMessage, PacketId, PatternKey, Response, Session,
    SessionReader, SessionWriter, Taken, WriteError,
};

use crate::context::RedisContext;
use crate::link::Link;
use crate::publisher::Note;
use crate::subscriber::{Arrival, Served, Target};
use crate::wire::{self, WireError};

/// How long a drain waits for a broker that answers nothing.
const ROUND_TRIP_LIMIT: Duration = Duration::from_secs(2);

/// A scratch buffer that grew larger than this is not kept.
const SCRATCH: usize = 64 * 1024;

/// The channel that the replies to a delivery go to.
#[derive(Debug, Clone)]
pub struct RedisReplyTo {
    channel: Bytes,
}

/// A session over two Redis connections: one that subscribes, one that publishes.
pub struct RedisSession {
    link: Rc<Link>,
    peer: Arc<str>,
}

impl std::fmt::Debug for RedisSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisSession").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl RedisSession {
    pub(crate) fn new(link: Rc<Link>) -> Self {
        let peer = Arc::from(link.shown.as_str());
        Self { link, peer }
    }
}

impl Session for RedisSession {
    type ReplyTo = RedisReplyTo;
    type Reader = RedisReader;
    type Writer = RedisWriter;

    fn peer(&self) -> Arc<str> {
        Arc::clone(&self.peer)
    }

    fn native(&self) -> Option<ContextData> {
        Some(self.link.native())
    }

    fn split(self) -> (RedisReader, RedisWriter) {
        let reader = RedisReader { link: Rc::clone(&self.link), draining: None };
        (reader, RedisWriter { link: self.link, scratch: BytesMut::new() })
    }
}

// === impl SessionReader ===

/// The half that reads.
pub struct RedisReader {
    link: Rc<Link>,
    /// Until when the broker is waited for.
    draining: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl std::fmt::Debug for RedisReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisReader").field("draining", &self.draining.is_some()).finish_non_exhaustive()
    }
}

impl RedisReader {
    /// The next thing to read, if there is one.
    fn next(&self, packet: &mut IncomingPacket) -> Option<Inbound<RedisReplyTo>> {
        if let Some((receipt, refused)) = self.link.confirmed.borrow_mut().pop_front() {
            return Some(Inbound::Confirmed { receipt, refused });
        }
        if let Some(inbound) = self.link.side.borrow_mut().pop_front() {
            return Some(inbound);
        }
        loop {
            let arrival = {
                let mut subscriber = self.link.subscriber.borrow_mut();
                if let Some(reason) = subscriber.reports.pop_front().or_else(|| subscriber.take_dropped()) {
                    return Some(Inbound::Bad { reason });
                }
                subscriber.pop()?
            };
            if let Some(inbound) = self.read(arrival, packet) {
                return Some(inbound);
            }
        }
    }

    /// What an arrival is; `None` when it is not for the runtime.
    fn read(&self, arrival: Arrival, packet: &mut IncomingPacket) -> Option<Inbound<RedisReplyTo>> {
        let Arrival { target, channel, body } = arrival;
        match (target, channel) {
            (Target::Serve(served), None) => Some(self.deliver(&served, None, body, packet)),
            (Target::Serve(served), Some(channel)) => self.matched(&served, channel, body, packet),
            (Target::Cancel, _) => Some(Inbound::Cancel { id: body.into() }),
            (Target::Reply, channel) => self.reply(channel, body),
        }
    }

    /// A message on a channel that a glob matched.
    fn matched(
        &self,
        served: &Served,
        channel: Bytes,
        body: Bytes,
        packet: &mut IncomingPacket,
    ) -> Option<Inbound<RedisReplyTo>> {
        let codec = &*self.link.settings.codec;
        // REDIS-10: a reply is nothing to handle, least of all one of our own. Neither is a cancellation.
        if (wire::is_reply_channel(&channel) && wire::is_reply(codec, &body))
            || wire::is_cancel_channel(&channel)
        {
            return None;
        }
        Some(self.deliver(served, Some(channel), body, packet))
    }

    fn deliver(
        &self,
        served: &Served,
        channel: Option<Bytes>,
        body: Bytes,
        packet: &mut IncomingPacket,
    ) -> Inbound<RedisReplyTo> {
        *packet = match wire::decode_request(&*self.link.settings.codec, body) {
            Ok(packet) => packet,
            Err(reason) => {
                let channel = channel.as_deref().unwrap_or(served.route.as_bytes());
                let channel = String::from_utf8_lossy(channel);
                return Inbound::Bad { reason: format!("message on {channel}: {reason}") };
            }
        };
        let is_event = packet.is_event();
        let (reply, context) = match channel {
            None => (served.reply.clone(), Arc::clone(&served.context)),
            Some(channel) => {
                let context: ContextData = Arc::new(RedisContext {
                    channel: String::from_utf8_lossy(&channel).into(),
                    pattern: Some(Arc::clone(&served.pattern)),
                });
                // REDIS-12.
                let reply = if is_event { channel } else { wire::reply_channel(&channel) };
                (reply, context)
            }
        };
        let delivery = Delivery {
            // REDIS-7.
            key: PatternKey::Route(served.route.clone()),
            reply_to: RedisReplyTo { channel: reply },
            context: Some(context),
        };
        if is_event { Inbound::Event(delivery) } else { Inbound::Request(delivery) }
    }

    /// A message on a reply channel, for one of the clients that listen there.
    fn reply(&self, glob_channel: Option<Bytes>, body: Bytes) -> Option<Inbound<RedisReplyTo>> {
        let link = &self.link;
        if glob_channel.is_some_and(|channel| link.subscriber.borrow().has_channel(&channel)) {
            // It also comes on the channel itself.
            return None;
        }
        let codec = &*link.settings.codec;
        let packet = match codec.decode_response(body.into()) {
            Ok(packet) => packet,
            Err(error) => return Some(Inbound::Bad { reason: format!("a reply: {error}") }),
        };
        let Some(raw) = packet.id.as_deref() else {
            return Some(Inbound::Bad { reason: "a reply has no id".to_owned() });
        };
        // REDIS-9: everybody who waits on the channel sees every reply.
        let id = wire::id_text(codec.format(), raw)?;
        if !link.replies.borrow().is_ours(id) {
            return None;
        }
        if packet.body.is_final()
            && let Some(id) = PacketId::from_text(id)
        {
            link.replies.borrow_mut().release(&id);
        }
        Some(Inbound::Response(Box::new(packet)))
    }
}

impl SessionReader<RedisReplyTo> for RedisReader {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<RedisReplyTo>, SessionError>>> {
        loop {
            if let Some(inbound) = self.next(packet) {
                return Poll::Ready(Some(Ok(inbound)));
            }
            self.link.poll_turn(cx)?;
            let nothing = self.link.subscriber.borrow().is_empty()
                && self.link.subscriber.borrow().reports.is_empty()
                && self.link.side.borrow().is_empty()
                && self.link.confirmed.borrow().is_empty();
            if !nothing {
                continue;
            }
            let Some(limit) = &mut self.draining else { return Poll::Pending };
            let ended = self.link.probed.get() || limit.as_mut().poll(cx).is_ready();
            return if ended { Poll::Ready(None) } else { Poll::Pending };
        }
    }

    fn drain(&mut self) {
        // REDIS-19.
        self.link.subscriber.borrow_mut().end_intake();
        self.draining = Some(Box::pin(tokio::time::sleep(ROUND_TRIP_LIMIT)));
    }
}

// === impl SessionWriter ===

/// The half that writes.
pub struct RedisWriter {
    link: Rc<Link>,
    scratch: BytesMut,
}

impl std::fmt::Debug for RedisWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisWriter").field("pending_bytes", &self.pending_bytes()).finish_non_exhaustive()
    }
}

impl RedisWriter {
    fn message(
        &mut self,
        message: &mut OutboundMessage,
        id: Option<PacketId>,
        note: Note,
    ) -> Result<(), WireError> {
        message.put_timeout();
        let settings = &self.link.settings;
        let limit = settings.common.max_payload_bytes;
        wire::encode_request(&*settings.codec, message, id, limit, &mut self.scratch)?;
        let route = message.pattern.route();
        match id {
            Some(id) => self.link.request(id, route, &self.scratch),
            None => self.link.publisher.borrow_mut().publish(route.as_bytes(), &self.scratch, note),
        }
        Ok(())
    }

    fn response(&mut self, response: &Response<RedisReplyTo>) -> Result<(), WireError> {
        let Response { reply_to, id, body, headers: _ } = response;
        let settings = &self.link.settings;
        let limit = settings.common.max_payload_bytes;
        wire::encode_response(&*settings.codec, id, body, limit, &mut self.scratch)?;
        let note = if body.is_final() { Note::Plain } else { Note::Item(id.clone()) };
        self.link.publisher.borrow_mut().publish(&reply_to.channel, &self.scratch, note);
        Ok(())
    }

    /// After each item: the scratch buffer is empty again.
    fn written(&mut self, result: Result<(), WireError>) -> Result<(), WriteError> {
        self.scratch.clear();
        if self.scratch.capacity() > SCRATCH {
            self.scratch = BytesMut::new();
        }
        result.map_err(|error| WriteError::Item(Arc::new(error)))
    }

    fn put(&mut self, item: Outbound<RedisReplyTo>) -> Result<(), WireError> {
        match item {
            Outbound::Request(mut message) | Outbound::Event(mut message) => {
                let id = message.id;
                self.message(&mut message, id, Note::Plain)
            }
            Outbound::Subscribe(subscription) => {
                let route = &subscription.route;
                wire::check_channel(route)
                    .map_err(|reason| WireError::Channel { reason: format!("pattern {route}: {reason}") })?;
                let mut subscriber = self.link.subscriber.borrow_mut();
                Link::serve(&self.link.settings, &mut subscriber, &subscription);
                Ok(())
            }
            Outbound::Unsubscribe(route) => {
                self.link.unserve(&route);
                Ok(())
            }
            Outbound::Cancel { id, route } => {
                let unsent = self.link.replies.borrow_mut().release(&id);
                if !unsent && self.link.settings.common.cancellation {
                    // REDIS-16.
                    let body = Raw::text(self.link.settings.codec.format(), &id.text());
                    let channel = wire::cancel_channel(&route);
                    self.link.publisher.borrow_mut().publish(&channel, &body, Note::Plain);
                }
                Ok(())
            }
            // It acknowledges nothing, so nothing else is ever asked of it.
            _ => Ok(()),
        }
    }
}

impl SessionWriter<RedisReplyTo> for RedisWriter {
    fn write(&mut self, item: Outbound<RedisReplyTo>) -> Result<(), WriteError> {
        let result = self.put(item);
        self.written(result)
    }

    fn write_response(&mut self, response: &mut Response<RedisReplyTo>) -> Result<(), WriteError> {
        let result = self.response(response);
        self.written(result)
    }

    fn write_request(&mut self, mut message: OutboundMessage, id: PacketId) -> Result<(), WriteError> {
        let result = self.message(&mut message, Some(id), Note::Plain);
        self.written(result)
    }

    // REDIS-2.
    fn write_event(&mut self, mut message: OutboundMessage, receipt: PacketId) -> Result<Taken, WriteError> {
        let result = self.message(&mut message, None, Note::Event(receipt));
        self.written(result).map(|()| Taken::Confirming)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        // Here, because it is called in every turn, also when nothing is read.
        self.link.poll_turn(cx)?;
        let published = self.link.poll_publish(cx)?;
        if published.is_ready() && self.link.pending_bytes() == 0 {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }

    fn pending_bytes(&self) -> usize {
        self.link.pending_bytes()
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        std::task::ready!(self.link.poll_publish(cx))?;
        self.link.close_pool();
        Poll::Ready(Ok(()))
    }
}
