// SPDX-License-Identifier: MIT OR Apache-2.0

//! Packets to bytes and back.

use std::fmt;
use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::json::{self, Members, Span};
use crate::msgpack;
pub use crate::packet::{INTERNAL_ERROR_TEXT, NO_HANDLER_TEXT};
use crate::packet::{
    IncomingPacket, OutgoingPacket, PatternText, Raw, ResponseBody, ResponsePacket, ShortReply,
};
use crate::payload::{EncodeError, Format, Payload};
use crate::transport::PacketId;

/// Turns packets into bytes and back. The bytes are one message; framing is the transporter's business.
///
/// Encoding appends to `out`. After an error `out` may end in a part of a packet: cut it back.
pub trait Codec: Send + Sync + fmt::Debug + 'static {
    /// A short name for logs and options.
    fn name(&self) -> &'static str;

    /// The format of the payloads this codec produces and copies verbatim.
    fn format(&self) -> Format;

    /// Whether every packet is UTF-8 text.
    fn is_text(&self) -> bool;

    /// Reads a request or an event into a packet, all of it: nothing stays of what was there. Unknown members are ignored.
    ///
    /// A value with neither `pattern` nor `data` is foreign: it becomes an event whose data is the whole value
    /// and which has no pattern. An `id` inside it is not looked at, as in NestJS.
    ///
    /// # Errors
    ///
    /// [`CodecError::Json`] or [`CodecError::MessagePack`] if the frame is not one value; see
    /// [`CodecError::is_malformed`]. The packet is then of no use.
    fn read_request(&self, frame: Frame<'_>, packet: &mut IncomingPacket) -> Result<(), CodecError>;

    /// As [`Codec::read_request`], into a new packet.
    ///
    /// # Errors
    ///
    /// As [`Codec::read_request`].
    fn decode_request(&self, frame: Frame<'_>) -> Result<IncomingPacket, CodecError> {
        let mut packet = IncomingPacket::default();
        self.read_request(frame, &mut packet)?;
        Ok(packet)
    }

    /// Writes a request or an event, members in the order `pattern`, `data`, `metadata`, `id`.
    ///
    /// # Errors
    ///
    /// [`CodecError::Encode`] if a payload of another format cannot be rewritten in this one.
    fn encode_request(&self, packet: &OutgoingPacket<'_>, out: &mut BytesMut) -> Result<(), CodecError>;

    /// As [`Codec::encode_request`], with an id of ours instead of that of the packet.
    ///
    /// # Errors
    ///
    /// As [`Codec::encode_request`].
    fn encode_call(
        &self,
        packet: &OutgoingPacket<'_>,
        id: PacketId,
        out: &mut BytesMut,
    ) -> Result<(), CodecError> {
        self.encode_request(&OutgoingPacket { id: Some(&id.text()), ..*packet }, out)
    }

    /// Reads a reply, by the rules of NestJS 12, which also read what NestJS 11 servers send:
    ///
    /// 1. what is not an object, or is an empty one, is foreign: delivered whole as the only value;
    /// 2. an object with a member other than `id`, `err`, `response`, `isDisposed`, `status` is foreign too, but
    ///    keeps its `id`;
    /// 3. else `err` decides if it is truthy, then `isDisposed` if it is truthy; else it is an item, null if
    ///    `response` is missing.
    ///
    /// # Errors
    ///
    /// [`CodecError::Json`] or [`CodecError::MessagePack`] if the frame is not one value; see
    /// [`CodecError::is_malformed`].
    fn decode_response(&self, frame: Frame<'_>) -> Result<ResponsePacket, CodecError>;

    /// Reads a reply that is one short value, the last one, to a request of ours into `reply`: such replies need no
    /// memory of their own. False for any other, and wherever it is not certain: [`Codec::decode_response`] is asked
    /// then, and what is in `reply` is of no use.
    fn read_short_response(&self, _frame: &[u8], _reply: &mut ShortReply) -> bool {
        false
    }

    /// Writes a reply. `id` is a raw value in the codec's format and copied as it is.
    ///
    /// The order of members is NestJS's: `response`, `isDisposed`, `id` for values, `err`, `isDisposed`, `id` for
    /// errors, and `id`, `status`, `err` if there is no handler. `status`, where given, stands before `id`; for
    /// [`ResponseBody::NoHandler`] it replaces the usual `"error"`.
    ///
    /// An error NestJS would count as false (`null`, `""`, `0`, `false`) would be read as success; it is sent as
    /// `{"status":"error","message":<value>}`, which is what `new RpcException(value)` becomes.
    ///
    /// # Errors
    ///
    /// [`CodecError::Encode`] if a payload of another format cannot be rewritten in this one.
    fn encode_response(
        &self,
        id: Option<&[u8]>,
        body: &ResponseBody,
        status: Option<&str>,
        out: &mut BytesMut,
    ) -> Result<(), CodecError>;
}

/// Why a packet could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The frame is not one JSON text.
    #[error("malformed packet: {0}")]
    Json(#[source] json::SyntaxError),
    /// The frame is not one MessagePack value.
    #[error("malformed packet: {0}")]
    MessagePack(#[source] msgpack::FormError),
    /// A value could not be written.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Anything a codec from elsewhere reports.
    #[error("malformed packet: {0}")]
    Other(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl CodecError {
    /// True if the frame could not be read, false if something could not be written.
    pub fn is_malformed(&self) -> bool {
        !matches!(self, CodecError::Encode(_))
    }
}

const REQUEST: [&str; 4] = ["pattern", "data", "id", "metadata"];
const RESPONSE: [&str; 5] = ["id", "err", "response", "isDisposed", "status"];

// === What is read ===

/// The bytes of one message, to be taken apart: what is short is copied out of them, what is long shares them.
///
/// They may still stand at the front of a transporter's buffer. Only when something shares them are they split off
/// it; in any case they have left it when the frame is dropped.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Where it still stands, and the bytes of it there.
    buffered: Option<(&'a mut BytesMut, Range<usize>)>,
    own: Bytes,
    is_ascii: bool,
}

impl<'a> Frame<'a> {
    /// The message at `body` of a buffer; what stands before it leaves the buffer, too.
    ///
    /// # Panics
    ///
    /// If `body` is not inside the buffer.
    pub fn in_buffer(buf: &'a mut BytesMut, body: Range<usize>) -> Self {
        assert!(body.start <= body.end && body.end <= buf.len(), "the message is not in the buffer");
        Self { buffered: Some((buf, body)), own: Bytes::new(), is_ascii: false }
    }

    /// Says that whoever found the message has seen that it is ASCII: it need not be looked at again.
    #[must_use]
    pub fn ascii(mut self) -> Self {
        self.is_ascii = true;
        self
    }

    /// The bytes at `span`.
    ///
    /// # Panics
    ///
    /// If `span` is not inside the message.
    #[inline]
    pub fn raw(&mut self, span: Range<usize>) -> Raw {
        assert!(span.start <= span.end && span.end <= self.len(), "the value is not in the message");
        let mut raw = Raw::default();
        self.put(&span, &mut raw);
        raw
    }

    /// Puts the bytes at `span` where they stay.
    #[inline]
    fn put(&mut self, span: &Span, place: &mut Raw) {
        if Raw::is_short(span) {
            let (bytes, at) = match &self.buffered {
                Some((buf, body)) => (&buf[..], body.start),
                None => (&self.own[..], 0),
            };
            place.fill(bytes, at + span.start..at + span.end);
        } else {
            *place = Raw::from(self.share().slice(span.clone()));
        }
    }

    /// The bytes at `span`, when nothing else is wanted.
    #[inline]
    fn into_raw(mut self, span: Range<usize>) -> Raw {
        if Raw::is_short(&span) {
            return self.raw(span);
        }
        // It takes the whole over: one reference is all that it needs.
        let mut bytes = std::mem::take(self.share());
        bytes.truncate(span.end);
        bytes.advance(span.start);
        Raw::from(bytes)
    }

    fn share(&mut self) -> &mut Bytes {
        if let Some((buf, body)) = self.buffered.take() {
            buf.advance(body.start);
            self.own = buf.split_to(body.len()).freeze();
        }
        &mut self.own
    }
}

impl std::ops::Deref for Frame<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.buffered {
            Some((buf, body)) => &buf[body.clone()],
            None => &self.own,
        }
    }
}

impl Drop for Frame<'_> {
    fn drop(&mut self) {
        if let Some((buf, body)) = &mut self.buffered {
            buf.advance(body.end);
        }
    }
}

impl From<Bytes> for Frame<'_> {
    fn from(bytes: Bytes) -> Self {
        Self { buffered: None, own: bytes, is_ascii: false }
    }
}

impl From<&Bytes> for Frame<'_> {
    fn from(bytes: &Bytes) -> Self {
        Self::from(bytes.clone())
    }
}

/// Fills a packet in place: it is large, and where it stands it stays.
fn request(mut frame: Frame<'_>, format: Format, members: &Members<4>, packet: &mut IncomingPacket) {
    let [pattern, data, id, metadata] = &members.spans;
    if pattern.is_none() && data.is_none() {
        let data = Some(Payload::new(format, frame.into_raw(members.value.clone())));
        *packet = IncomingPacket { data, ..IncomingPacket::default() };
        return;
    }
    for (span, place) in [(pattern, &mut packet.pattern), (id, &mut packet.id)] {
        match span {
            Some(span) => frame.put(span, place.get_or_insert_default()),
            None => *place = None,
        }
    }
    let empty = || Payload::new(format, Raw::default());
    match metadata {
        Some(span) => frame.put(span, packet.metadata.get_or_insert_with(empty).raw_mut(format)),
        None => packet.metadata = None,
    }
    match data {
        Some(span) if Raw::is_short(span) => {
            frame.put(span, packet.data.get_or_insert_with(empty).raw_mut(format));
        }
        // The frame itself becomes the data: one reference is all a request needs.
        Some(span) => packet.data = Some(Payload::new(format, frame.into_raw(span.clone()))),
        None => packet.data = None,
    }
}

fn response(mut frame: Frame<'_>, format: Format, members: Members<5>, rules: &ValueRules) -> ResponsePacket {
    let payload = |frame: Frame<'_>, span| Payload::new(format, frame.into_raw(span));
    let foreign = !members.is_object || members.has_others || members.is_empty_object();
    let [id, err, value, disposed, status] = members.spans;
    let id = id.map(|span| frame.raw(span));
    if foreign {
        let body = ResponseBody::Last(Some(payload(frame, members.value)));
        return ResponsePacket { id, status: None, body, foreign: true };
    }
    let status = status.map(|span| frame.raw(span));
    let truthy = |span: &Span| (rules.truthy)(&frame[span.clone()]);
    let body = match (err.filter(truthy), disposed.filter(truthy)) {
        (Some(err), _) if (rules.is_no_handler)(&frame[err.clone()]) => ResponseBody::NoHandler,
        (Some(err), _) => ResponseBody::Error(payload(frame, err)),
        (None, Some(_)) => ResponseBody::Last(value.map(|value| payload(frame, value))),
        (None, None) => {
            ResponseBody::Item(value.map_or_else(|| Payload::null(format), |value| payload(frame, value)))
        }
    };
    ResponsePacket { id, status, body, foreign: false }
}

/// The spans of the value and the id of a reply that is written as NestJS and Martlet write nearly all of theirs:
/// one value, the last one, and an id of ours. What this does not know is read member by member.
fn usual_response(frame: &[u8]) -> Option<(Span, PacketId)> {
    const HEAD: &[u8] = b"{\"response\":";
    const MIDDLE: &[u8] = b",\"isDisposed\":true,\"id\":";
    let id = frame.len().checked_sub(PacketId::LEN + 3)?;
    let [b'"', text @ .., b'"', b'}'] = frame.get(id..)? else { return None };
    let value = HEAD.len()..id.checked_sub(MIDDLE.len())?;
    let usual =
        frame.starts_with(HEAD) && frame.get(value.end..id)? == MIDDLE && json::is_value(frame, &value);
    let id = PacketId::from_text(text).filter(|_| usual)?;
    Some((value, id))
}

/// How one format tells what matters to replies.
struct ValueRules {
    truthy: fn(&[u8]) -> bool,
    is_no_handler: fn(&[u8]) -> bool,
}

// === JSON ===

/// Packets as NestJS writes them: one JSON object per message.
#[derive(Debug, Clone, Copy, Default)]
pub struct JsonCodec;

const JSON_RULES: ValueRules = ValueRules {
    truthy: json::is_truthy,
    is_no_handler: |raw| {
        raw.strip_prefix(b"\"").and_then(|raw| raw.strip_suffix(b"\"")) == Some(NO_HANDLER_TEXT.as_bytes())
    },
};

/// Copies a payload, rewriting it if it is in another format.
fn put_json(out: &mut BytesMut, payload: &Payload) -> Result<(), CodecError> {
    match payload.format() {
        Format::Json => out.put_slice(payload.bytes()),
        _ => out.put_slice(payload.transcode(Format::Json)?.bytes()),
    }
    Ok(())
}

/// All of a request but its id and its end.
#[inline]
fn put_request(packet: &OutgoingPacket<'_>, out: &mut BytesMut) -> Result<(), CodecError> {
    out.reserve(128 + packet.data.map_or(0, |data| data.bytes().len()));
    out.put_slice(b"{\"pattern\":");
    match packet.pattern {
        PatternText::Given(pattern) => out.put_slice(pattern.text().as_bytes()),
        PatternText::Route(route) => json::write_string(out, route.as_ref()),
    }
    if let Some(data) = packet.data {
        out.put_slice(b",\"data\":");
        put_json(out, data)?;
    }
    if let Some(metadata) = packet.metadata {
        out.put_slice(b",\"metadata\":");
        match metadata.json_text() {
            Some(text) => out.put_slice(text.as_bytes()),
            None => {
                json::write(out, metadata).map_err(|source| EncodeError::new(Format::Json, source))?;
            }
        }
    }
    Ok(())
}

impl Codec for JsonCodec {
    fn name(&self) -> &'static str {
        "json"
    }

    fn format(&self) -> Format {
        Format::Json
    }

    fn is_text(&self) -> bool {
        true
    }

    fn read_request(&self, frame: Frame<'_>, packet: &mut IncomingPacket) -> Result<(), CodecError> {
        let (usual, other);
        usual = json::nest_request(&frame, frame.is_ascii);
        let members = match &usual {
            Some(members) => members,
            None => {
                other = json::members(&frame, &REQUEST).map_err(CodecError::Json)?;
                &other
            }
        };
        request(frame, Format::Json, members, packet);
        Ok(())
    }

    fn encode_request(&self, packet: &OutgoingPacket<'_>, out: &mut BytesMut) -> Result<(), CodecError> {
        put_request(packet, out)?;
        if let Some(id) = packet.id {
            out.put_slice(b",\"id\":");
            json::write_string(out, id);
        }
        out.put_u8(b'}');
        Ok(())
    }

    fn encode_call(
        &self,
        packet: &OutgoingPacket<'_>,
        id: PacketId,
        out: &mut BytesMut,
    ) -> Result<(), CodecError> {
        put_request(packet, out)?;
        out.put_slice(b",\"id\":\"");
        // Nothing in it needs an escape.
        id.put(out);
        out.put_slice(b"\"}");
        Ok(())
    }

    fn read_short_response(&self, frame: &[u8], reply: &mut ShortReply) -> bool {
        let Some((value, id)) = usual_response(frame).filter(|(value, _)| Raw::is_short(value)) else {
            return false;
        };
        reply.id = id;
        reply.value.raw_mut(Format::Json).fill(frame, value);
        true
    }

    fn decode_response(&self, mut frame: Frame<'_>) -> Result<ResponsePacket, CodecError> {
        if let Some((value, _)) = usual_response(&frame) {
            let end = frame.len() - 1;
            let id = frame.raw(end - PacketId::LEN - 2..end);
            let body = ResponseBody::Last(Some(Payload::new(Format::Json, frame.into_raw(value))));
            return Ok(ResponsePacket { id: Some(id), status: None, body, foreign: false });
        }
        let members = json::members(&frame, &RESPONSE).map_err(CodecError::Json)?;
        Ok(response(frame, Format::Json, members, &JSON_RULES))
    }

    fn encode_response(
        &self,
        id: Option<&[u8]>,
        body: &ResponseBody,
        status: Option<&str>,
        out: &mut BytesMut,
    ) -> Result<(), CodecError> {
        match body {
            ResponseBody::NoHandler => {
                out.put_u8(b'{');
                if let Some(id) = id {
                    out.put_slice(b"\"id\":");
                    out.put_slice(id);
                    out.put_u8(b',');
                }
                out.put_slice(b"\"status\":");
                json::write_string(out, status.unwrap_or("error"));
                out.put_slice(b",\"err\":");
                json::write_string(out, NO_HANDLER_TEXT);
                out.put_u8(b'}');
                return Ok(());
            }
            ResponseBody::Item(value) => {
                out.put_slice(b"{\"response\":");
                put_json(out, value)?;
            }
            ResponseBody::Last(Some(value)) => {
                out.put_slice(b"{\"response\":");
                put_json(out, value)?;
                out.put_slice(b",\"isDisposed\":true");
            }
            ResponseBody::Last(None) => out.put_slice(b"{\"isDisposed\":true"),
            ResponseBody::Error(error) => {
                out.put_slice(b"{\"err\":");
                let start = out.len();
                put_json(out, error)?;
                if !json::is_truthy(&out[start..]) {
                    let value = out.split_off(start);
                    out.put_slice(b"{\"status\":\"error\",\"message\":");
                    out.put_slice(&value);
                    out.put_u8(b'}');
                }
                out.put_slice(b",\"isDisposed\":true");
            }
        }
        if let Some(status) = status {
            out.put_slice(b",\"status\":");
            json::write_string(out, status);
        }
        if let Some(id) = id {
            out.put_slice(b",\"id\":");
            out.put_slice(id);
        }
        out.put_u8(b'}');
        Ok(())
    }
}

// === MessagePack ===

/// The same packets as MessagePack maps, for peers that agreed on it; NestJS does not speak it by itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct MessagePackCodec;

const MESSAGE_PACK_RULES: ValueRules = ValueRules {
    truthy: msgpack::is_truthy,
    is_no_handler: |raw| msgpack::as_str(raw) == Some(NO_HANDLER_TEXT),
};

fn put_msgpack(out: &mut BytesMut, payload: &Payload) -> Result<(), CodecError> {
    match payload.format() {
        Format::MessagePack => out.put_slice(payload.bytes()),
        _ => out.put_slice(payload.transcode(Format::MessagePack)?.bytes()),
    }
    Ok(())
}

impl Codec for MessagePackCodec {
    fn name(&self) -> &'static str {
        "messagepack"
    }

    fn format(&self) -> Format {
        Format::MessagePack
    }

    fn is_text(&self) -> bool {
        false
    }

    fn read_request(&self, frame: Frame<'_>, packet: &mut IncomingPacket) -> Result<(), CodecError> {
        let members = msgpack::members(&frame, &REQUEST).map_err(CodecError::MessagePack)?;
        request(frame, Format::MessagePack, &members, packet);
        Ok(())
    }

    fn encode_request(&self, packet: &OutgoingPacket<'_>, out: &mut BytesMut) -> Result<(), CodecError> {
        let members = 1
            + u8::from(packet.data.is_some())
            + u8::from(packet.metadata.is_some())
            + u8::from(packet.id.is_some());
        msgpack::write_map_head(out, members);
        msgpack::write_string(out, "pattern");
        match packet.pattern {
            PatternText::Route(route) => msgpack::write_string(out, route.as_ref()),
            PatternText::Given(pattern) => match pattern.as_str() {
                Some(text) => msgpack::write_string(out, text),
                None => {
                    let text = msgpack::from_json(pattern.text().as_bytes())
                        .map_err(|source| EncodeError::new(Format::MessagePack, source))?;
                    out.put_slice(&text);
                }
            },
        }
        if let Some(data) = packet.data {
            msgpack::write_string(out, "data");
            put_msgpack(out, data)?;
        }
        if let Some(metadata) = packet.metadata {
            msgpack::write_string(out, "metadata");
            out.put_slice(Payload::encode(Format::MessagePack, metadata)?.bytes());
        }
        if let Some(id) = packet.id {
            msgpack::write_string(out, "id");
            msgpack::write_string(out, id);
        }
        Ok(())
    }

    fn decode_response(&self, frame: Frame<'_>) -> Result<ResponsePacket, CodecError> {
        let members = msgpack::members(&frame, &RESPONSE).map_err(CodecError::MessagePack)?;
        Ok(response(frame, Format::MessagePack, members, &MESSAGE_PACK_RULES))
    }

    fn encode_response(
        &self,
        id: Option<&[u8]>,
        body: &ResponseBody,
        status: Option<&str>,
        out: &mut BytesMut,
    ) -> Result<(), CodecError> {
        let has_id = u8::from(id.is_some());
        let has_status = u8::from(status.is_some());
        let put_id = |out: &mut BytesMut| {
            if let Some(id) = id {
                msgpack::write_string(out, "id");
                out.put_slice(id);
            }
        };
        let own = match body {
            ResponseBody::NoHandler => {
                msgpack::write_map_head(out, 2 + has_id);
                put_id(out);
                msgpack::write_string(out, "status");
                msgpack::write_string(out, status.unwrap_or("error"));
                msgpack::write_string(out, "err");
                msgpack::write_string(out, NO_HANDLER_TEXT);
                return Ok(());
            }
            ResponseBody::Item(_) | ResponseBody::Last(None) => 1,
            ResponseBody::Last(Some(_)) | ResponseBody::Error(_) => 2,
        };
        msgpack::write_map_head(out, own + has_id + has_status);
        match body {
            ResponseBody::Item(value) | ResponseBody::Last(Some(value)) => {
                msgpack::write_string(out, "response");
                put_msgpack(out, value)?;
            }
            ResponseBody::Error(error) => {
                msgpack::write_string(out, "err");
                let start = out.len();
                put_msgpack(out, error)?;
                if !msgpack::is_truthy(&out[start..]) {
                    let value = out.split_off(start);
                    msgpack::write_map_head(out, 2);
                    msgpack::write_string(out, "status");
                    msgpack::write_string(out, "error");
                    msgpack::write_string(out, "message");
                    out.put_slice(&value);
                }
            }
            ResponseBody::Last(None) | ResponseBody::NoHandler => {}
        }
        if body.is_final() {
            msgpack::write_string(out, "isDisposed");
            msgpack::write_bool(out, true);
        }
        if let Some(status) = status {
            msgpack::write_string(out, "status");
            msgpack::write_string(out, status);
        }
        put_id(out);
        Ok(())
    }
}
