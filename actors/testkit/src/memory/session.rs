// SPDX-License-Identifier: MIT OR Apache-2.0
//! The session of the in-memory transporter, for both ends and both modes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use martlet_core::packet::{IncomingPacket, OutgoingPacket, PatternText, Raw};
use martlet_core::transport::{
    ContextData, Delivery, Inbound, Outbound, OutboundMessage, PatternKey, Response, Role, Session,
    SessionReader, SessionWriter, WriteError,
};
use martlet_core::{Headers, Route, SessionError};

use super::Net;
use super::hub::Post;
use super::line::{Frame, HubDelivery, Line};

/// The context of a message that came by the in-memory transporter: take it as `Ctx<MemoryContext>`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MemoryContext {
    /// Who sent it.
    pub peer: Arc<str>,
    /// The headers it came with.
    pub headers: Headers,
    /// What it was published to; only in broker mode.
    pub subject: Option<Route>,
}

/// What is needed to answer a delivery.
#[derive(Debug, Clone, Copy)]
pub struct MemoryReply {
    client: Option<u64>,
    tag: u64,
}

/// One end of an in-memory connection.
#[derive(Debug)]
pub struct MemorySession {
    reader: MemoryReader,
    writer: MemoryWriter,
}

#[derive(Debug)]
pub(super) enum Out {
    Line(Arc<Line>),
    Hub(u64),
}

impl MemorySession {
    pub(super) fn new(net: &Arc<Net>, role: Role, peer: Arc<str>, incoming: Arc<Line>, out: Out) -> Self {
        Self {
            reader: MemoryReader { net: Arc::clone(net), role, peer, line: incoming, left: None },
            writer: MemoryWriter {
                net: Arc::clone(net),
                out,
                waiting: VecDeque::new(),
                pending_bytes: 0,
                closed: false,
            },
        }
    }
}

impl Session for MemorySession {
    type ReplyTo = MemoryReply;
    type Reader = MemoryReader;
    type Writer = MemoryWriter;

    fn peer(&self) -> Arc<str> {
        Arc::clone(&self.reader.peer)
    }

    fn native(&self) -> Option<ContextData> {
        Some(Arc::new(super::MemoryNetwork { net: Arc::clone(&self.reader.net) }))
    }

    fn split(self) -> (MemoryReader, MemoryWriter) {
        (self.reader, self.writer)
    }
}

/// The half that reads.
#[derive(Debug)]
pub struct MemoryReader {
    net: Arc<Net>,
    role: Role,
    peer: Arc<str>,
    line: Arc<Line>,
    /// Draining: how many frames are still taken.
    left: Option<usize>,
}

impl Drop for MemoryReader {
    fn drop(&mut self) {
        self.line.close_reader();
    }
}

impl MemoryReader {
    fn read(&self, frame: Frame, packet: &mut IncomingPacket) -> Inbound<MemoryReply> {
        let limit = self.net.options.max_frame_bytes;
        if frame.len() > limit {
            return Inbound::Bad {
                reason: format!("a frame of {} bytes exceeds the limit of {limit}", frame.len()),
            };
        }
        match (frame, self.role) {
            (Frame::Packet { bytes, .. }, Role::Client) => {
                match self.net.options.codec.decode_response(bytes.into()) {
                    Ok(packet) => Inbound::Response(Box::new(packet)),
                    Err(error) => Inbound::Bad { reason: error.to_string() },
                }
            }
            (Frame::Packet { bytes, headers }, Role::Server) => {
                self.request(&bytes, headers, None, MemoryReply { client: None, tag: 0 }, packet)
            }
            (Frame::Delivery(HubDelivery { bytes, headers, route, subject, tag, reply }), _) => {
                let to = MemoryReply { client: reply, tag };
                self.request(&bytes, headers, Some((route, subject)), to, packet)
            }
            (Frame::Unreachable(id), _) => Inbound::Unreachable { id },
            (Frame::Cancel(id), _) => Inbound::Cancel { id: id.into() },
        }
    }

    fn request(
        &self,
        bytes: &Bytes,
        headers: Headers,
        routed: Option<(Route, Route)>,
        reply_to: MemoryReply,
        packet: &mut IncomingPacket,
    ) -> Inbound<MemoryReply> {
        if let Err(error) = self.net.options.codec.read_request(bytes.into(), packet) {
            return Inbound::Bad { reason: error.to_string() };
        }
        let is_event = packet.is_event();
        let (key, subject) = match routed {
            Some((route, subject)) => (PatternKey::Route(route), Some(subject)),
            None => (PatternKey::Packet, None),
        };
        let context = Arc::new(MemoryContext { peer: Arc::clone(&self.peer), headers, subject });
        let delivery = Delivery { key, reply_to, context: Some(context as ContextData) };
        if is_event { Inbound::Event(delivery) } else { Inbound::Request(delivery) }
    }
}

impl SessionReader<MemoryReply> for MemoryReader {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<MemoryReply>, SessionError>>> {
        if self.left == Some(0) {
            return Poll::Ready(None);
        }
        let frame = std::task::ready!(self.line.poll_frame(cx));
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        Poll::Ready(frame.map(|frame| frame.map(|frame| self.read(frame, packet))))
    }

    fn drain(&mut self) {
        self.left.get_or_insert(self.line.waiting());
    }

    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if matches!(self.net.mode(), super::Mode::Broker) {
            return Poll::Ready(());
        }
        loop {
            match std::task::ready!(self.line.poll_frame(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(()),
            }
        }
    }
}

/// The half that writes.
#[derive(Debug)]
pub struct MemoryWriter {
    net: Arc<Net>,
    out: Out,
    waiting: VecDeque<(usize, Sending)>,
    pending_bytes: usize,
    closed: bool,
}

#[derive(Debug)]
enum Sending {
    Frame(Frame),
    Post(Post),
}

impl Drop for MemoryWriter {
    fn drop(&mut self) {
        match &self.out {
            Out::Line(line) => line.finish(),
            Out::Hub(session) => self.net.hub.lock().leave(*session),
        }
    }
}

impl MemoryWriter {
    fn push(&mut self, len: usize, sending: Sending) -> Result<(), WriteError> {
        let limit = self.net.options.max_frame_bytes;
        if len > limit {
            let reason: Box<dyn std::error::Error + Send + Sync> =
                format!("a frame of {len} bytes exceeds the limit of {limit}").into();
            return Err(WriteError::Item(Arc::from(reason)));
        }
        self.pending_bytes += len;
        self.waiting.push_back((len, sending));
        Ok(())
    }

    fn message(&mut self, mut message: OutboundMessage) -> Result<(), WriteError> {
        message.put_timeout();
        let OutboundMessage { id, pattern, data, metadata, headers, .. } = message;
        // NestJS sends an event's pattern as its route.
        let text = match id {
            Some(_) => PatternText::Given(&pattern),
            None => PatternText::Route(pattern.route()),
        };
        let id_text = id.map(|id| id.text());
        let packet = OutgoingPacket {
            pattern: text,
            data: Some(&data),
            id: id_text.as_deref(),
            metadata: Some(&metadata).filter(|metadata| !metadata.is_empty()),
        };
        let mut bytes = BytesMut::new();
        self.net.options.codec.encode_request(&packet, &mut bytes).map_err(item)?;
        let bytes = bytes.freeze();
        let len = bytes.len();
        let sending = match self.out {
            Out::Line(_) => Sending::Frame(Frame::Packet { bytes, headers }),
            Out::Hub(_) => {
                Sending::Post(Post::Publish { subject: pattern.route().clone(), bytes, headers, id })
            }
        };
        self.push(len, sending)
    }
}

fn item(error: impl std::error::Error + Send + Sync + 'static) -> WriteError {
    WriteError::Item(Arc::new(error))
}

impl SessionWriter<MemoryReply> for MemoryWriter {
    fn write(&mut self, item: Outbound<MemoryReply>) -> Result<(), WriteError> {
        let hub = matches!(self.out, Out::Hub(_));
        match item {
            Outbound::Request(message) | Outbound::Event(message) => self.message(message),
            Outbound::Cancel { id, .. } => {
                let raw = Bytes::from(Raw::text(self.net.options.codec.format(), &id.text()));
                self.push(
                    raw.len(),
                    if hub { Sending::Post(Post::Cancel(raw)) } else { Sending::Frame(Frame::Cancel(raw)) },
                )
            }
            Outbound::Settle { delivery, settlement } if hub => {
                self.push(0, Sending::Post(Post::Settle { tag: delivery.tag, settlement }))
            }
            Outbound::Subscribe(subscription) if hub => {
                self.push(0, Sending::Post(Post::Subscribe(subscription)))
            }
            Outbound::Unsubscribe(route) if hub => self.push(0, Sending::Post(Post::Unsubscribe(route))),
            // Peers neither subscribe nor settle.
            _ => Ok(()),
        }
    }

    fn write_response(&mut self, response: &mut Response<MemoryReply>) -> Result<(), WriteError> {
        let Response { reply_to, id, body, headers } = response;
        let mut bytes = BytesMut::new();
        self.net.options.codec.encode_response(Some(id), body, None, &mut bytes).map_err(item)?;
        let bytes = bytes.freeze();
        let len = bytes.len();
        let sending = match self.out {
            Out::Hub(_) => Sending::Post(Post::Respond { client: reply_to.client, bytes }),
            Out::Line(_) => {
                Sending::Frame(Frame::Packet { bytes, headers: headers.take().unwrap_or_default() })
            }
        };
        self.push(len, sending)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        while !self.waiting.is_empty() {
            if let Out::Line(line) = &self.out {
                std::task::ready!(line.poll_room(cx))?;
            }
            let Some((len, sending)) = self.waiting.pop_front() else { break };
            self.pending_bytes -= len;
            match (sending, &self.out) {
                (Sending::Frame(frame), Out::Line(line)) => line.force(frame),
                (Sending::Post(post), Out::Hub(session)) => {
                    let session = *session;
                    self.net.post(session, post)?;
                }
                // A session writes frames or posts, by its kind.
                _ => {}
            }
        }
        Poll::Ready(Ok(()))
    }

    fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        if !self.closed {
            std::task::ready!(self.poll_flush(cx))?;
            self.closed = true;
            if let Out::Line(line) = &self.out {
                line.finish();
            }
        }
        Poll::Ready(Ok(()))
    }
}
