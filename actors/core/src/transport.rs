// SPDX-License-Identifier: MIT OR Apache-2.0
//! The extension contract: what a transporter must say, and nothing more.
//!
//! A transporter answers three questions: how do I get a session ([`Dial`] for brokers and for the
//! calling side, [`Listen`] for servers that accept peers), what arrived ([`SessionReader`]), how do I put
//! this on the wire ([`SessionWriter`]). Everything else (reconnecting, routing, correlation, bounds,
//! drain, status) is the runtime's, the same for all. The transporters of this repository use no
//! other door.
//!
//! Both halves are driven by one task on one arbiter, so they may share state without locks.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::io::ReadBuf;

use crate::error::SessionError;
use crate::headers::Headers;
use crate::packet::{IncomingPacket, Metadata, Raw, ResponseBody, ResponsePacket, ShortReply};
use crate::pattern::{Pattern, Route};
use crate::payload::{Format, Payload};
use crate::request::TIMEOUT_KEY;
use crate::route::HandlerKind;
use crate::settlement::Settles;

/// The transporter-specific context of a message, handed to extractors that know its type.
pub type ContextData = Arc<dyn Any + Send + Sync>;

/// NestJS's numbers for transports, so that a handler can be limited to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TransportId(pub u16);

impl TransportId {
    /// `Transport.TCP`.
    pub const TCP: Self = Self(0);
    /// `Transport.REDIS`.
    pub const REDIS: Self = Self(1);
    /// `Transport.NATS`.
    pub const NATS: Self = Self(2);
    /// `Transport.MQTT`.
    pub const MQTT: Self = Self(3);
    /// `Transport.GRPC`.
    pub const GRPC: Self = Self(4);
    /// `Transport.RMQ`.
    pub const RMQ: Self = Self(5);
    /// `Transport.KAFKA`.
    pub const KAFKA: Self = Self(6);
    /// The in-memory transporter of `martlet-testkit`.
    pub const MEMORY: Self = Self(1000);

    /// An id for a transporter of one's own; ids below 1024 are kept for Martlet.
    pub const fn custom(number: u16) -> Self {
        Self(number)
    }
}

/// What a transporter is called, what it wants from the runtime.
#[derive(Debug, Clone)]
pub struct TransportInfo {
    /// Its NestJS number, or one of its own.
    pub id: TransportId,
    /// Its name in reports: `tcp`, `nats`.
    pub name: Arc<str>,
    /// Whether it delivers by subscription (a broker), so that it must learn the routes.
    pub subscribes: bool,
    /// Whether the runtime must report how each delivery ended ([`Outbound::Settle`]), and what can be made of a
    /// failure.
    pub settles: Settles,
    /// Format of the payloads it carries.
    pub format: Format,
}

impl TransportInfo {
    /// A transporter that carries JSON, accepts peers and acknowledges nothing.
    pub fn new(id: TransportId, name: &str) -> Self {
        let settles = Settles::Never("this transporter has no acknowledgement");
        Self { id, name: Arc::from(name), subscribes: false, settles, format: Format::Json }
    }
}

/// Which end of the conversation a dialled session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It receives requests and events and sends responses.
    Server,
    /// It sends requests and events and receives responses.
    Client,
}

/// What a dialled session must serve.
#[derive(Debug, Clone)]
pub struct SessionPlan {
    /// Which end it is.
    pub role: Role,
    /// The routes to subscribe before the session counts as connected. Empty for clients.
    pub subscriptions: Vec<Subscription>,
}

/// A route that a broker transporter subscribes.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// The route.
    pub route: Route,
    /// The pattern as its handler wrote it.
    pub pattern: Pattern,
    /// What handles it.
    pub kind: HandlerKind,
    /// The handler's extras (NestJS's `extras`; NATS reads `queue`).
    pub extras: Arc<serde_json::Map<String, serde_json::Value>>,
}

/// How a delivery's handler is found.
#[derive(Debug, Clone)]
pub enum PatternKey {
    /// By the packet's pattern. Looked up as it is, normalised on a miss.
    Packet,
    /// The route of the subscription that matched.
    Route(Route),
}

/// What there is to say of a request or event beside its packet.
#[derive(Debug)]
pub struct Delivery<R> {
    /// How its handler is found.
    pub key: PatternKey,
    /// What the transporter needs to answer (and to settle).
    pub reply_to: R,
    /// The transporter's context of this message; `None` for that of the session.
    pub context: Option<ContextData>,
}

/// Everything that can arrive on a session.
#[derive(Debug)]
#[non_exhaustive]
pub enum Inbound<R> {
    /// A message that wants a response: its packet has an id.
    Request(Delivery<R>),
    /// A message that wants none.
    Event(Delivery<R>),
    /// A response to a request of ours.
    Response(Box<ResponsePacket>),
    /// A response to a request of ours that is one short value, the last one.
    Reply(ShortReply),
    /// A request of ours reached nobody (a broker without subscribers said so).
    Unreachable {
        /// The id of the request.
        id: PacketId,
    },
    /// A caller has lost interest in its request.
    Cancel {
        /// The raw packet id of the request.
        id: Raw,
    },
    /// What the broker said to an event for which the writer answered [`Taken::Confirming`] or [`Taken::Carried`]:
    /// at the latter, perhaps the writer of an earlier session.
    Confirmed {
        /// As given with the event.
        receipt: PacketId,
        /// Why the broker did not take it; `None` if it did.
        refused: Option<String>,
    },
    /// Something that cannot be read arrived. It is reported; the session goes on.
    Bad {
        /// What is wrong with it.
        reason: String,
    },
}

/// Everything else than responses that can leave on a session.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outbound<R> {
    /// A request.
    Request(OutboundMessage),
    /// An event.
    Event(OutboundMessage),
    /// How a delivery ended; only for transporters that settle.
    Settle {
        /// As received with the delivery.
        delivery: R,
        /// How it ended.
        settlement: Settlement,
    },
    /// Serve one more route.
    Subscribe(Subscription),
    /// Serve a route no more.
    Unsubscribe(Route),
    /// The caller of a request has lost interest. A transporter must put it on the wire only where a NestJS
    /// peer is not disturbed by it, and may drop it.
    Cancel {
        /// The id of the request.
        id: PacketId,
        /// The route it was sent to.
        route: Route,
    },
}

/// One packet of the response to a delivery.
#[derive(Debug)]
pub struct Response<R> {
    /// As received with the delivery.
    pub reply_to: R,
    /// The raw packet id, as received.
    pub id: Raw,
    /// What to say.
    pub body: ResponseBody,
    /// Headers for this packet, where the protocol has them.
    pub headers: Option<Headers>,
}

/// A request or event to be sent.
#[derive(Debug, Clone)]
pub struct OutboundMessage {
    /// The packet id; `None` for events.
    pub id: Option<PacketId>,
    /// The pattern.
    pub pattern: Pattern,
    /// The payload.
    pub data: Payload,
    /// Packet metadata; empty means that none is sent.
    pub metadata: Metadata,
    /// How long the caller waits, if the peer may know: see [`put_timeout`](Self::put_timeout).
    pub timeout: Option<Duration>,
    /// Headers, where the protocol has them.
    pub headers: Headers,
}

impl OutboundMessage {
    /// Puts the caller's timeout into the metadata. A transporter calls it where the peer is, or may be, a
    /// Martlet service; NestJS 10, 11 and 12 ignore it.
    pub fn put_timeout(&mut self) {
        if let Some(timeout) = self.timeout.take()
            && self.metadata.get(TIMEOUT_KEY).is_none()
        {
            self.metadata.insert(TIMEOUT_KEY, timeout.as_millis().to_string());
        }
    }
}

/// How a delivery ended, for transporters that acknowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settlement {
    /// Every handler finished without an error, and there is a [`FailurePolicy`](crate::settlement::FailurePolicy); or it
    /// is a request that nobody waits for any more and that has not failed (its caller has cancelled it, or an item of its
    /// stream could not be written), whatever the policy.
    Done,
    /// Every handler finished without an error, and there is no policy: what NestJS does.
    Finished,
    /// A handler failed, and there is no [`FailurePolicy`](crate::settlement::FailurePolicy): what NestJS does.
    Failed,
    /// A handler failed: another delivery, to whomever.
    Requeue,
    /// A handler failed: to the dead-letter exchange.
    DeadLetter,
    /// A handler failed: gone, as if it had not.
    Discard,
    /// Nobody handles it.
    Unhandled,
    /// It was abandoned (drain, restart): another consumer may take it.
    HandedBack,
}

/// The id of a request of ours: on the wire 21 characters of lower-case hex, the shape NestJS uses.
// The numbers that it is made of, in two words as which it is moved, too; it becomes text where it is written.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C, packed(4))]
pub struct PacketId {
    /// The client's prefix, of 28 bits, and the call's generation.
    high: u64,
    /// The call's slot, of 24 bits.
    slot: u32,
}

impl PacketId {
    /// Its length in characters.
    pub const LEN: usize = 21;

    pub(crate) fn from_parts(prefix: u32, generation: u32, slot: u32) -> Self {
        Self { high: u64::from(prefix) << 32 | u64::from(generation), slot }
    }

    /// What it was made of.
    #[inline]
    pub(crate) fn parts(self) -> (u32, u32, u32) {
        ((self.high >> 32) as u32, self.high as u32, self.slot)
    }

    /// The id of a request, from the text that a peer or broker gave back.
    #[inline]
    pub fn from_text(text: &[u8]) -> Option<Self> {
        const ZEROS: u64 = u64::MAX / 0xff * b'0' as u64;
        let text: &[u8; Self::LEN] = text.try_into().ok()?;
        let word = |at: usize| text[at..].first_chunk().map_or(0, |word| u64::from_be_bytes(*word));
        // 7, 8 and 6 digits, filled up with zeros.
        let digits = [word(0) >> 8 | ZEROS << 56, word(7), word(13) << 16 >> 16 | ZEROS << 48];
        let [prefix, generation, slot] = digits.map(unhex);
        // Only digits come out as they went in.
        let same = [prefix, generation, slot].map(hex) == digits;
        same.then_some(Self::from_parts(prefix, generation, slot))
    }

    /// Its text.
    #[inline]
    pub fn text(self) -> PacketIdText {
        let (prefix, generation, slot) = self.parts();
        let (prefix, generation, slot) = (hex(prefix), hex(generation), hex(slot));
        let mut text = [0; Self::LEN];
        text[0..8].copy_from_slice(&(prefix << 8 | generation >> 56).to_be_bytes());
        text[8..16].copy_from_slice(&(generation << 8 | slot >> 40 & 0xff).to_be_bytes());
        text[16..20].copy_from_slice(&((slot >> 8) as u32).to_be_bytes());
        text[20] = slot as u8;
        PacketIdText(text)
    }

    /// Appends its text.
    #[inline]
    pub fn put(self, out: &mut BytesMut) {
        let PacketIdText(text) = self.text();
        // In the pieces in which it was made: a processor waits when it reads what it has just written otherwise.
        let (words, rest) = text.as_chunks::<8>();
        words.iter().for_each(|word| out.put_slice(word));
        let (words, rest) = rest.as_chunks::<4>();
        words.iter().for_each(|word| out.put_slice(word));
        out.put_slice(rest);
    }
}

/// The text of a [`PacketId`].
#[derive(Clone, Copy)]
pub struct PacketIdText([u8; PacketId::LEN]);

impl Deref for PacketIdText {
    type Target = str;

    fn deref(&self) -> &str {
        // Only hex digits are ever put in.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// Eight lower-case hex digits, the highest first when written big-endian.
#[inline]
fn hex(value: u32) -> u64 {
    const ONES: u64 = u64::MAX / 0xff;
    let mut nibbles = u64::from(value);
    nibbles = (nibbles | nibbles << 16) & 0x0000_ffff_0000_ffff;
    nibbles = (nibbles | nibbles << 8) & 0x00ff_00ff_00ff_00ff;
    nibbles = (nibbles | nibbles << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    let letters = ((nibbles + ONES * 6) >> 4) & ONES;
    nibbles + ONES * u64::from(b'0') + letters * u64::from(b'a' - b'0' - 10)
}

/// The reverse of [`hex`], where that gave `digits`; else any number.
#[inline]
fn unhex(digits: u64) -> u32 {
    const ONES: u64 = u64::MAX / 0xff;
    let letters = (digits >> 6) & ONES;
    let nibbles = ((digits & (ONES * 0xf)) + letters * 9) & (ONES * 0xf);
    let pairs = (nibbles | nibbles >> 4) & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs | pairs >> 8) & 0x0000_ffff_0000_ffff;
    (fours | fours >> 16) as u32
}

impl fmt::Debug for PacketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl fmt::Display for PacketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text())
    }
}

impl fmt::Debug for PacketIdText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

/// One live conversation: a half that reads, a half that writes.
pub trait Session: 'static {
    /// What the transporter needs to answer a delivery: nothing on a connection of its own, a reply
    /// subject, a delivery tag. Cloned for every packet of a response but the last.
    type ReplyTo: Clone + Send + 'static;
    /// The half that reads.
    type Reader: SessionReader<Self::ReplyTo>;
    /// The half that writes.
    type Writer: SessionWriter<Self::ReplyTo>;

    /// Who is at the other end, for reports.
    fn peer(&self) -> Arc<str>;

    /// The driver's own handle (a NATS client, a socket's address), for NestJS's `unwrap()`.
    fn native(&self) -> Option<ContextData> {
        None
    }

    /// The transporter's context of every message that brings none of its own.
    fn context(&self) -> Option<ContextData> {
        None
    }

    /// Parts the halves.
    fn split(self) -> (Self::Reader, Self::Writer);
}

/// The half of a session that reads.
pub trait SessionReader<R>: 'static {
    /// The next arrival; `None` when the other end has closed or a drain is complete. Not polled again
    /// after `None` or an error.
    ///
    /// A request or event has its packet put into `packet`, all of it: something of an earlier one may still be there.
    /// With any other arrival nobody looks at what is in it.
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<R>, SessionError>>>;

    /// Takes replies that have arrived already and would be the next arrivals, one [`Inbound::Reply`] each: at most
    /// `max` of them, in their order, appended to `replies`. Asked for after such an arrival, because replies come many
    /// at a time. Default: none, they are polled for.
    fn take_replies(&mut self, _cx: &mut Context<'_>, _replies: &mut Vec<ShortReply>, _max: usize) {}

    /// Stop intake: what has been received by now is still yielded, then `None`.
    fn drain(&mut self);

    /// After everything has been written and closed: reads and discards until the other end has closed,
    /// so that nothing written is lost by a reset. Ready at once where the protocol has no such trouble.
    fn poll_linger(&mut self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

/// The half of a session that writes.
pub trait SessionWriter<R>: 'static {
    /// Takes one item, without waiting. An item that cannot be put in wire form is refused alone; the
    /// session goes on.
    ///
    /// # Errors
    ///
    /// [`WriteError::Item`] refuses this item, [`WriteError::Session`] ends the session.
    fn write(&mut self, item: Outbound<R>) -> Result<(), WriteError>;

    /// Takes one packet of a response, as [`write`](Self::write) does. It may take out of it whatever it keeps, once it
    /// does not refuse it: for a refused one the runtime says, with the same id to the same `reply_to`, that it could
    /// not be written.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    fn write_response(&mut self, response: &mut Response<R>) -> Result<(), WriteError>;

    /// Takes a request of ours, as [`write`](Self::write) does; the message has no id yet. The runtime calls this one,
    /// because a message of a call that is moved less often is written in less time. Default: `write`.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    fn write_request(&mut self, mut message: OutboundMessage, id: PacketId) -> Result<(), WriteError> {
        message.id = Some(id);
        self.write(Outbound::Request(message))
    }

    /// Takes an event, as [`write`](Self::write) does. A transporter whose broker confirms says
    /// [`Taken::Confirming`] or [`Taken::Carried`], and later [`Inbound::Confirmed`] with the same receipt: `emit`
    /// resolves then.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    fn write_event(&mut self, message: OutboundMessage, receipt: PacketId) -> Result<Taken, WriteError> {
        let _ = receipt;
        self.write(Outbound::Event(message)).map(|()| Taken::Written)
    }

    /// Moves what was taken towards the wire; ready when nothing is left. Polled in each turn of the session before the
    /// reader is, and once more after it for a lone answer.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>>;

    /// How many bytes were taken and are not yet on the wire. Above the session's high-water mark the
    /// runtime stops reading new work until they are.
    fn pending_bytes(&self) -> usize;

    /// Flushes and closes this half; ready when done.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>>;
}

/// How far an event is when the writer has taken it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is as good as sent: nobody will say more.
    Written,
    /// The reader of this session will say what the broker made of it. If the session ends before, the event ends as
    /// `Lost`.
    Confirming,
    /// As [`Confirming`](Self::Confirming), and the transporter keeps it when the session ends, sends it again in the
    /// next one, and says there what the broker made of it. Until then it is pending: its timeout and the close of
    /// the client end it, and it ends as `Lost` where the connection is not made anew at once, or cannot be.
    Carried,
}

/// Why an item could not be written.
#[derive(Debug)]
pub enum WriteError {
    /// Only this item: too large, not expressible. For a request, its caller gets the error.
    Item(crate::error::SharedError),
    /// The session is over.
    Session(SessionError),
}

impl From<SessionError> for WriteError {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

/// Reads and discards until the other end has closed: for [`SessionReader::poll_linger`]. `read` reads once.
pub fn poll_discard(mut read: impl FnMut(&mut ReadBuf<'_>) -> Poll<io::Result<()>>) -> Poll<()> {
    let mut discard = [0; 4096];
    loop {
        let mut buffer = ReadBuf::new(&mut discard);
        match std::task::ready!(read(&mut buffer)) {
            Ok(()) if !buffer.filled().is_empty() => {}
            _ => return Poll::Ready(()),
        }
    }
}

/// Opens one session with a broker or a peer. `&self`, so that the runtime can run the dial as a watched
/// task that shares the transporter.
///
/// A dial must not retry by itself: reconnection has exactly one owner, the runtime.
pub trait Dial: 'static {
    /// What it opens.
    type Session: Session;

    /// What it is called and wants.
    fn info(&self) -> TransportInfo;

    /// Opens a session. Dropped when the runtime stops waiting for it.
    fn dial(&self, plan: SessionPlan) -> impl Future<Output = Result<Self::Session, SessionError>>;

    /// Checks a pattern before anything is sent to or subscribed for it.
    ///
    /// # Errors
    ///
    /// The reason why this protocol cannot carry the pattern.
    fn check_pattern(&self, _pattern: &Pattern) -> Result<(), String> {
        Ok(())
    }
}

/// Accepts peers: a server with no broker.
pub trait Listen: 'static {
    /// The bound listener.
    type Bound: Accept;

    /// What it is called and wants.
    fn info(&self) -> TransportInfo;

    /// Binds the address.
    fn bind(&self) -> impl Future<Output = Result<Self::Bound, SessionError>>;
}

/// A bound listener.
pub trait Accept: 'static {
    /// What it accepts.
    type Peer: Open;

    /// Where it listens, as a URL without options: `tcp://127.0.0.1:3000`.
    fn local_url(&self) -> String;

    /// The driver's own handle, for NestJS's `unwrap()`.
    fn native(&self) -> Option<ContextData> {
        None
    }

    /// Waits for the next peer.
    ///
    /// An error ends the listener; per-peer troubles are the peer's.
    fn accept(&mut self) -> impl Future<Output = Result<Self::Peer, SessionError>>;
}

/// An accepted peer. It may change threads; `open` makes it a session on the arbiter that will own it,
/// handshakes included.
pub trait Open: Send + 'static {
    /// What it becomes.
    type Session: Session;

    /// Makes it a session.
    fn open(self) -> impl Future<Output = Result<Self::Session, SessionError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_ids_are_21_hex_characters_and_read_back() {
        let id = PacketId::from_parts(0x0ab_cdef, 7, 0xfffff);
        assert_eq!(&*id.text(), "0abcdef000000070fffff");
        assert_eq!(
            PacketId::from_text(id.text().as_bytes()).map(PacketId::parts),
            Some((0x0ab_cdef, 7, 0xfffff))
        );
        assert_eq!(PacketId::from_text(b"0abcdef00000007fffff"), None);
        assert_eq!(PacketId::from_text(b"0abcdef000000070ffffG"), None);
        for bits in 0..32 {
            let number = 0x9a3c_71f5_u32.rotate_left(bits);
            assert_eq!(hex(number).to_be_bytes(), *format!("{number:08x}").as_bytes());
            assert_eq!(unhex(hex(number)), number);
        }
        let id = PacketId::from_parts(0x0ab_cdef, 0x1234_5678, 0x9f_00ff);
        for place in 0..PacketId::LEN {
            for byte in 0..=u8::MAX {
                let PacketIdText(mut text) = id.text();
                text[place] = byte;
                let digit = byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
                assert_eq!(PacketId::from_text(&text).is_some(), digit, "{}", text.escape_ascii());
            }
        }
    }
}
