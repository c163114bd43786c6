// SPDX-License-Identifier: MIT OR Apache-2.0
//! One TCP connection: bytes to packets and back.
//!
//! The halves share their socket without locks: one task drives both. Between Martlet peers a connection
//! carries two more packets, neither of which a NestJS peer ever sees:
//!
//! * a client marks its first request with the metadata key `martlet-peer`; a Martlet server answers with
//!   `{"isDisposed":true,"status":"martlet","id":"martlet"}`;
//! * a client that has seen it may send the event `martlet.cancel` with the id of a request.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use martlet_core::codec::{Codec, CodecError, Frame};
use martlet_core::packet::{
    IncomingPacket, OutgoingPacket, PatternText, Raw, ResponseBody, ResponsePacket, ShortReply,
};
use martlet_core::request::{PEER_KEY, TIMEOUT_KEY};
use martlet_core::transport::{
    ContextData, Delivery, Inbound, Outbound, OutboundMessage, PacketId, PatternKey, Response, Role, Session,
    SessionReader, SessionWriter, WriteError, poll_discard,
};
use martlet_core::{Metadata, Payload, Route, SessionError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsStream;

use crate::options::TcpProtocol;
use crate::wire::{FrameError, FrameLimits, FrameState, Framing, encode_with};

/// The pattern of the event that cancels a request.
const CANCEL: &str = "martlet.cancel";
/// The id and status of the packet by which a Martlet server shows itself.
const HELLO: &str = "martlet";

/// Cancellations that wait for the server to show itself; further ones are not sent.
const MAX_EARLY: usize = 1024;

/// The first read of a connection, and what an idle one keeps.
const SMALL_READ: usize = 4 * 1024;
/// The largest read.
const LARGE_READ: usize = 64 * 1024;
/// What a draining connection still takes in: a peer that sends without a pause does not keep it open.
const DRAIN_INTAKE: usize = 256 * 1024;

/// A handler's view of the connection that its request came by.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TcpContext {
    /// The peer's address.
    pub remote_addr: SocketAddr,
    /// The address it connected to.
    pub local_addr: SocketAddr,
    /// Whether the connection is encrypted.
    pub tls: bool,
}

/// A socket, encrypted or not.
pub(crate) enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Io {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            // A socket has no buffer of ours.
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}

/// Bounds of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TcpLimits {
    pub(crate) frame: FrameLimits,
    pub(crate) incomplete_message_timeout: Duration,
    pub(crate) max_send_buffer_size: usize,
    /// Whether a client looks for a Martlet peer.
    pub(crate) extensions: bool,
}

/// A live TCP connection.
pub struct TcpSession {
    io: Rc<RefCell<Io>>,
    role: Role,
    protocol: TcpProtocol,
    limits: TcpLimits,
    context: Arc<TcpContext>,
}

impl std::fmt::Debug for TcpSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpSession").field("context", &self.context).field("role", &self.role).finish()
    }
}

/// What the halves tell each other.
#[derive(Debug, Default)]
struct Extensions {
    /// Server: the peer speaks Martlet's extensions and has not been answered yet.
    greet: Cell<bool>,
    greeted: Cell<bool>,
    /// Client: the peer understands cancellation.
    peer_cancels: Cell<bool>,
    /// Client: the peer has answered something; a Martlet server shows itself before that.
    peer_answered: Cell<bool>,
}

impl TcpSession {
    pub(crate) fn new(
        io: Io,
        role: Role,
        protocol: TcpProtocol,
        limits: TcpLimits,
    ) -> Result<Self, SessionError> {
        let socket = io.socket();
        let context = TcpContext {
            remote_addr: socket.peer_addr()?,
            local_addr: socket.local_addr()?,
            tls: matches!(io, Io::Tls(_)),
        };
        Ok(Self { io: Rc::new(RefCell::new(io)), role, protocol, limits, context: Arc::new(context) })
    }
}

impl Session for TcpSession {
    type ReplyTo = ();
    type Reader = TcpReader;
    type Writer = TcpWriter;

    fn peer(&self) -> Arc<str> {
        Arc::from(self.context.remote_addr.to_string())
    }

    fn native(&self) -> Option<ContextData> {
        Some(Arc::clone(&self.context) as ContextData)
    }

    fn context(&self) -> Option<ContextData> {
        Some(Arc::clone(&self.context) as ContextData)
    }

    fn split(self) -> (TcpReader, TcpWriter) {
        let extensions = Rc::new(Extensions::default());
        let reader = TcpReader {
            io: Rc::clone(&self.io),
            role: self.role,
            codec: Arc::clone(&self.protocol.codec),
            framing: Arc::clone(&self.protocol.framing),
            limits: self.limits,
            context: self.context,
            extensions: Rc::clone(&extensions),
            buf: BytesMut::new(),
            frame: FrameState::default(),
            chunk: SMALL_READ,
            grown: false,
            drained: false,
            silence: None,
            ended: false,
            draining: None,
        };
        let writer = TcpWriter {
            io: self.io,
            codec: self.protocol.codec,
            framing: self.protocol.framing,
            max_send_buffer_size: self.limits.max_send_buffer_size,
            extensions,
            out: BytesMut::new(),
            usual_metadata: None,
            announced: self.role == Role::Server || !self.limits.extensions,
            early: Vec::new(),
        };
        (reader, writer)
    }
}

// === the half that reads ===

/// The reading half of a [`TcpSession`].
pub struct TcpReader {
    io: Rc<RefCell<Io>>,
    role: Role,
    codec: Arc<dyn Codec>,
    framing: Arc<dyn Framing>,
    limits: TcpLimits,
    context: Arc<TcpContext>,
    extensions: Rc<Extensions>,
    buf: BytesMut,
    frame: FrameState,
    /// How much the next read may take.
    chunk: usize,
    /// The buffer has become larger than an idle connection is to keep.
    grown: bool,
    /// The last read took all there was.
    drained: bool,
    /// Runs while a frame is incomplete.
    silence: Option<Pin<Box<Sleep>>>,
    ended: bool,
    /// While draining: how many bytes more are taken in.
    draining: Option<usize>,
}

/// What a frame holds.
enum Packet {
    Arrival(Inbound<()>),
    /// The other end is Martlet's: nothing for the runtime.
    Greeting,
}

impl std::fmt::Debug for TcpReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpReader").field("context", &self.context).finish_non_exhaustive()
    }
}

impl SessionReader<()> for TcpReader {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<()>, SessionError>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if !self.buf.is_empty() {
                match self.next_packet(packet) {
                    Ok(Some(Packet::Arrival(item))) => {
                        if self.extensions.greet.get() {
                            // A session writes before it reads, and the handler may be long in answering.
                            cx.waker().wake_by_ref();
                        }
                        return Poll::Ready(Some(Ok(item)));
                    }
                    Ok(Some(Packet::Greeting)) => {
                        // Cancellations may have waited for it.
                        cx.waker().wake_by_ref();
                        continue;
                    }
                    Ok(None) => {}
                    Err(reason) => return self.fault(reason),
                }
            }
            if self.draining == Some(0) {
                self.ended = true;
                continue;
            }
            match self.fill(cx) {
                Poll::Ready(Ok(true)) => {}
                // TCP-18: the peer closed. A part of a frame cannot be completed any more.
                Poll::Ready(Ok(false)) => self.ended = true,
                Poll::Ready(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(SessionError::from(error))));
                }
                // TCP-19.
                Poll::Pending if self.draining.is_some() => self.ended = true,
                Poll::Pending => return self.wait(cx),
            }
        }
    }

    fn take_replies(&mut self, _cx: &mut Context<'_>, replies: &mut Vec<ShortReply>, max: usize) {
        for _ in 0..max {
            let Some(body) = self.framing.peek(&self.buf, &self.frame, &self.limits.frame) else { return };
            // Read where it stays.
            replies.push(ShortReply::default());
            if !replies.last_mut().is_some_and(|reply| self.short_reply(&body, reply)) {
                replies.pop();
                return;
            }
        }
    }

    fn drain(&mut self) {
        self.draining.get_or_insert(DRAIN_INTAKE);
    }

    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        poll_discard(|read| self.io.borrow_mut().poll_read(cx, read))
    }
}

impl TcpReader {
    /// Reads once; `false` at the end of the stream.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        // Once the socket is drained, a look is all that is left, and needs no room; by the next read the frames of this
        // one have gone, mostly, and their room is free again.
        if !self.drained || self.buf.capacity() == self.buf.len() {
            self.buf.reserve(self.chunk);
        }
        let room = self.buf.capacity() - self.buf.len();
        let mut io = self.io.borrow_mut();
        let read = match &mut *io {
            // Straight into spare capacity, without clearing it first.
            Io::Plain(socket) => tokio_util_read(socket, cx, &mut self.buf),
            Io::Tls(stream) => tokio_util_read(stream.as_mut(), cx, &mut self.buf),
        };
        self.grown |= self.buf.capacity() > SMALL_READ;
        self.drained = matches!(&read, Poll::Ready(Ok(read)) if *read < room);
        let read = ready!(read)?;
        if read == 0 {
            return Poll::Ready(Ok(false));
        }
        if read >= self.chunk {
            self.chunk = (self.chunk * 2).min(LARGE_READ);
        }
        if let Some(left) = &mut self.draining {
            *left = left.saturating_sub(read);
        }
        if self.silence.is_some() {
            // TCP-8: NestJS's timer restarts with every read.
            self.silence = None;
        }
        Poll::Ready(Ok(true))
    }

    /// Nothing to read now: watches an incomplete frame, frees what an idle connection does not need.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Inbound<()>, SessionError>>> {
        if !self.framing.has_partial(&self.buf) {
            self.silence = None;
            if self.buf.is_empty() && self.grown {
                (self.chunk, self.grown) = (SMALL_READ, false);
                self.buf = BytesMut::new();
            }
            return Poll::Pending;
        }
        let limit = self.limits.incomplete_message_timeout;
        if limit.is_zero() {
            return Poll::Pending;
        }
        let silence =
            self.silence.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        ready!(silence.as_mut().poll(cx));
        self.ended = true;
        let reason = format!("incompleteMessageTimeout: the peer was silent for {limit:?} inside a frame");
        Poll::Ready(Some(Err(SessionError::protocol(reason))))
    }

    fn frame_fault(&self, error: &FrameError) -> String {
        match self.role {
            Role::Server => format!("{} ({error})", error.server_text()),
            Role::Client => format!("{} ({error})", error.client_text()),
        }
    }

    /// TCP-5: what cannot be read ends the intake. A server still answers what it owes; a client's connection is
    /// of no use any more.
    fn fault(&mut self, reason: String) -> Poll<Option<Result<Inbound<()>, SessionError>>> {
        self.ended = true;
        self.buf = BytesMut::new();
        Poll::Ready(Some(match self.role {
            Role::Server => Ok(Inbound::Bad { reason }),
            Role::Client => Err(SessionError::protocol(reason)),
        }))
    }

    /// Reads the packet that stands at `body`, if it is such a reply: nearly all that a client gets.
    fn short_reply(&mut self, body: &Range<usize>, reply: &mut ShortReply) -> bool {
        let is_short = self.codec.read_short_response(&self.buf[body.clone()], reply);
        if is_short {
            self.buf.advance(body.end);
            self.extensions.peer_answered.set(true);
        }
        is_short
    }

    /// Reads the next packet, if it has arrived whole.
    fn next_packet(&mut self, packet: &mut IncomingPacket) -> Result<Option<Packet>, String> {
        let limits = &self.limits.frame;
        let frame = match self.framing.peek(&self.buf, &self.frame, limits) {
            Some(body) => {
                if self.role == Role::Client {
                    let mut reply = ShortReply::default();
                    if self.short_reply(&body, &mut reply) {
                        return Ok(Some(Packet::Arrival(Inbound::Reply(reply))));
                    }
                }
                Frame::in_buffer(&mut self.buf, body).ascii()
            }
            None => match self.framing.decode(&mut self.buf, &mut self.frame, limits) {
                Ok(Some(frame)) => Frame::from(frame),
                Ok(None) => return Ok(None),
                Err(error) => return Err(self.frame_fault(&error)),
            },
        };
        Ok(Some(match self.role {
            Role::Server => match self.codec.read_request(frame, packet) {
                Ok(()) => Packet::Arrival(self.request(packet)),
                Err(error) => return Err(error.to_string()),
            },
            // TCP-17, TCP-27.
            Role::Client => match self.codec.decode_response(frame) {
                Ok(packet) => self.response(packet),
                Err(error) => return Err(error.to_string()),
            },
        }))
    }

    fn response(&self, packet: ResponsePacket) -> Packet {
        if packet.status.is_some() && packet.id.as_deref().is_some_and(|id| is_text(id, HELLO)) {
            self.extensions.peer_cancels.set(true);
            return Packet::Greeting;
        }
        self.extensions.peer_answered.set(true);
        Packet::Arrival(Inbound::Response(Box::new(packet)))
    }

    fn request(&self, packet: &mut IncomingPacket) -> Inbound<()> {
        if packet.id.is_none()
            && packet.pattern.as_deref().is_some_and(|pattern| is_text(pattern, CANCEL))
            && let Some(id) = packet.data.take()
        {
            // TCP-28.
            return Inbound::Cancel { id: id.into_raw() };
        }
        if let Some(metadata) = &packet.metadata
            && !self.extensions.greeted.get()
            && memchr::memmem::find(metadata.bytes(), PEER_KEY.as_bytes()).is_some()
        {
            self.extensions.greeted.set(true);
            self.extensions.greet.set(true);
        }
        // TCP-12, TCP-13; TCP-24, TCP-25: the metadata is read by the runtime.
        let delivery = Delivery { key: PatternKey::Packet, reply_to: (), context: None };
        // TCP-11.
        if packet.is_event() { Inbound::Event(delivery) } else { Inbound::Request(delivery) }
    }
}

/// Reads into a buffer's spare capacity.
fn tokio_util_read(
    io: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    buf: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    let future = tokio::io::AsyncReadExt::read_buf(io, buf);
    tokio::pin!(future);
    future.poll(cx)
}

/// Whether a raw value (JSON or MessagePack) is this short text.
fn is_text(raw: &[u8], text: &str) -> bool {
    match raw {
        [b'"', inner @ .., b'"'] => inner == text.as_bytes(),
        [first, inner @ ..] => usize::from(first ^ 0xa0) == text.len() && inner == text.as_bytes(),
        [] => false,
    }
}

// === the half that writes ===

/// The writing half of a [`TcpSession`].
pub struct TcpWriter {
    io: Rc<RefCell<Io>>,
    codec: Arc<dyn Codec>,
    framing: Arc<dyn Framing>,
    max_send_buffer_size: usize,
    extensions: Rc<Extensions>,
    out: BytesMut,
    /// Client: the metadata of a call with this timeout and nothing else.
    usual_metadata: Option<(Duration, Metadata)>,
    /// Client: whether the server has been told that it may show itself.
    announced: bool,
    /// Client: requests cancelled before the server has shown whether it understands that.
    early: Vec<Box<str>>,
}

impl std::fmt::Debug for TcpWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpWriter").field("pending_bytes", &self.out.len()).finish_non_exhaustive()
    }
}

/// Either half of what can go wrong with one packet.
#[derive(Debug, thiserror::Error)]
enum EncodePacketError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

fn put_frame(
    codec: &dyn Codec,
    framing: &dyn Framing,
    out: &mut BytesMut,
    hint: usize,
    write: impl FnOnce(&dyn Codec, &mut BytesMut) -> Result<(), CodecError>,
) -> Result<(), WriteError> {
    encode_with(framing, out, hint, |out| write(codec, out).map_err(EncodePacketError::from))
        .map_err(|error| WriteError::Item(Arc::new(error)))
}

impl TcpWriter {
    fn frame(
        &mut self,
        hint: usize,
        write: impl FnOnce(&dyn Codec, &mut BytesMut) -> Result<(), CodecError>,
    ) -> Result<(), WriteError> {
        put_frame(&*self.codec, &*self.framing, &mut self.out, hint, write)
    }

    fn message(&mut self, message: &mut OutboundMessage, id: Option<PacketId>) -> Result<(), WriteError> {
        // TCP-26: looks for a Martlet peer, once.
        let announce = id.is_some() && !std::mem::replace(&mut self.announced, true);
        if announce {
            message.metadata.insert(PEER_KEY, "1");
        }
        let metadata = match message.timeout.filter(|_| message.metadata.is_empty()) {
            None => {
                message.put_timeout();
                Some(&message.metadata).filter(|metadata| !metadata.is_empty())
            }
            // Most calls carry the client's own timeout and nothing else: it is put in words once.
            Some(timeout) => match &mut self.usual_metadata {
                Some((usual, metadata)) if *usual == timeout => Some(&*metadata),
                other => {
                    let mut metadata = Metadata::from_iter([(TIMEOUT_KEY, timeout.as_millis().to_string())]);
                    metadata.keep_json();
                    Some(&other.insert((timeout, metadata)).1)
                }
            },
        };
        // What the members' names and the id take in JSON.
        let mut hint = message.data.bytes().len() + message.pattern.text().len() + 49;
        if let Some(metadata) = metadata {
            hint += metadata.json_text().map_or(40, str::len) + 12;
        }
        let packet = OutgoingPacket {
            // TCP-10: events carry the route, requests the pattern as given.
            pattern: match id {
                Some(_) => PatternText::Given(&message.pattern),
                None => PatternText::Route(message.pattern.route()),
            },
            data: Some(&message.data),
            id: None,
            metadata,
        };
        put_frame(&*self.codec, &*self.framing, &mut self.out, hint, |codec, out| match id {
            Some(id) => codec.encode_call(&packet, id, out),
            None => codec.encode_request(&packet, out),
        })
    }

    /// TCP-9.
    fn check_buffer(&self) -> Result<(), WriteError> {
        if self.max_send_buffer_size > 0 && self.out.len() > self.max_send_buffer_size {
            return Err(WriteError::Session(SessionError::protocol(format!(
                "maxSendBufferSize: {} bytes wait for a peer that does not read, the limit is {}",
                self.out.len(),
                self.max_send_buffer_size
            ))));
        }
        Ok(())
    }

    fn cancel(&mut self, id: &str) -> Result<(), WriteError> {
        let data = Payload::new(self.codec.format(), Raw::text(self.codec.format(), id));
        let route = Route::from(CANCEL.to_owned());
        self.frame(64, |codec, out| {
            let pattern = PatternText::Route(&route);
            codec
                .encode_request(&OutgoingPacket { pattern, data: Some(&data), id: None, metadata: None }, out)
        })
    }

    fn greet(&mut self) -> Result<(), WriteError> {
        let id = Raw::text(self.codec.format(), HELLO);
        self.frame(64, |codec, out| {
            codec.encode_response(Some(&id), &ResponseBody::Last(None), Some(HELLO), out)
        })
    }
}

impl SessionWriter<()> for TcpWriter {
    fn write(&mut self, item: Outbound<()>) -> Result<(), WriteError> {
        match item {
            Outbound::Request(mut message) | Outbound::Event(mut message) => {
                let id = message.id;
                self.message(&mut message, id)?;
            }
            Outbound::Cancel { id, .. } if self.extensions.peer_cancels.get() => self.cancel(&id.text())?,
            Outbound::Cancel { id, .. }
                if self.announced && !self.extensions.peer_answered.get() && self.early.len() < MAX_EARLY =>
            {
                self.early.push((*id.text()).into());
            }
            // TCP-23: a connection needs no subscriptions; a NestJS peer is told nothing it does not know.
            _ => {}
        }
        self.check_buffer()
    }

    fn write_response(&mut self, response: &mut Response<()>) -> Result<(), WriteError> {
        // TCP-14, TCP-15, TCP-16.
        let Response { id, body, .. } = response;
        let hint = match &*body {
            ResponseBody::Item(payload)
            | ResponseBody::Error(payload)
            | ResponseBody::Last(Some(payload)) => payload.bytes().len() + id.len() + 48,
            _ => id.len() + 128,
        };
        self.frame(hint, |codec, out| codec.encode_response(Some(id), body, None, out))?;
        self.check_buffer()
    }

    fn write_request(&mut self, mut message: OutboundMessage, id: PacketId) -> Result<(), WriteError> {
        self.message(&mut message, Some(id))?;
        self.check_buffer()
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        if self.extensions.greet.replace(false)
            && let Err(WriteError::Session(error)) = self.greet()
        {
            return Poll::Ready(Err(error));
        }
        if !self.early.is_empty() && self.extensions.peer_cancels.get() {
            for id in std::mem::take(&mut self.early) {
                if let Err(WriteError::Session(error)) = self.cancel(&id) {
                    return Poll::Ready(Err(error));
                }
            }
        }
        let mut io = self.io.borrow_mut();
        while !self.out.is_empty() {
            let written = ready!(io.poll_write(cx, &self.out))?;
            if written == 0 {
                return Poll::Ready(Err(SessionError::lost("the connection takes no more bytes")));
            }
            self.out.advance(written);
        }
        if self.out.capacity() > LARGE_READ {
            self.out = BytesMut::new();
        }
        // Even with nothing left here: TLS may have taken what the socket has not.
        io.poll_flush(cx).map_err(SessionError::from)
    }

    fn pending_bytes(&self) -> usize {
        self.out.len()
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        ready!(self.poll_flush(cx))?;
        self.io.borrow_mut().poll_shutdown(cx).map_err(SessionError::from)
    }
}
