// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets as NATS messages and back, pure: no connection, no clock.

use std::str::FromStr;
use std::time::Duration;

use async_nats::header::{HeaderName, HeaderValue};
use async_nats::{HeaderMap, Subject};
use bytes::{Bytes, BytesMut};
use martlet_core::Headers;
use martlet_core::codec::{Codec, CodecError};
use martlet_core::json;
use martlet_core::packet::{
    IncomingPacket, Metadata, OutgoingPacket, PatternText, Raw, ResponseBody, ResponsePacket,
};
use martlet_core::payload::{Format, Payload};
use martlet_core::request::{TIMEOUT_KEY, TRACEPARENT_KEY, TRACESTATE_KEY};
use martlet_core::transport::{OutboundMessage, PacketId};

/// NATS-20: metadata that also travels as headers, for services that read headers only.
pub(crate) const HEADER_METADATA: [&str; 3] = [TRACEPARENT_KEY, TRACESTATE_KEY, TIMEOUT_KEY];

/// What the subjects of cancellations begin with.
const CANCEL_PREFIX: &str = "_MARTLET.cancel.";

/// Why a message cannot be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The packet could not be written.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A header's name has characters that NATS does not allow.
    #[error("header name {name:?} has characters that NATS does not allow")]
    HeaderName {
        /// The name.
        name: String,
    },
    /// A header's value has a line break.
    #[error("the value of header {name:?} has a line break")]
    HeaderValue {
        /// The header's name.
        name: String,
    },
    /// The headers are larger than `maxHeaderBytes`.
    #[error("headers of {size} bytes exceed maxHeaderBytes, {limit}")]
    HeadersTooLarge {
        /// Their size.
        size: usize,
        /// The bound.
        limit: usize,
    },
    /// Headers and body are larger than the broker takes.
    #[error("a message of {size} bytes exceeds the broker's max_payload, {limit}")]
    TooLarge {
        /// The message's size.
        size: usize,
        /// The broker's bound.
        limit: usize,
    },
}

// === subjects ===

/// Checks that a route can be a subject (NATS-16).
pub(crate) fn check_subject(route: &str) -> Result<(), String> {
    // Checked for every call: most routes are plain.
    let (words, rest) = route.as_bytes().as_chunks::<8>();
    let mut last = [b'_'; 8];
    last[..rest.len()].copy_from_slice(rest);
    if !route.is_empty() && words.iter().chain([&last]).all(|word| is_plain(*word)) {
        return Ok(());
    }
    if route.is_empty() {
        return Err("a NATS subject cannot be empty".to_owned());
    }
    if let Some(found) = route.chars().find(|c| c.is_whitespace() || c.is_control()) {
        return Err(format!("a NATS subject cannot contain {found:?}: the protocol is split at white space"));
    }
    if route.split('.').any(str::is_empty) {
        return Err("a NATS subject cannot begin or end with a dot or have two in a row".to_owned());
    }
    Ok(())
}

/// Whether these are printable ASCII, without space and dot.
fn is_plain(word: [u8; 8]) -> bool {
    const ONES: u64 = u64::MAX / 0xff;
    const HIGHS: u64 = ONES << 7;
    let word = u64::from_ne_bytes(word);
    // The high bit of a byte is set where the byte is zero, and perhaps above such a one.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word;
    let below = word.wrapping_sub(ONES * u64::from(b'!')) & !word;
    let others = zeros(word ^ (ONES * u64::from(b'.'))) | zeros(word ^ (ONES * 0x7f));
    (word | below | others) & HIGHS == 0
}

/// Where cancellations of requests to a route go (NATS-21).
pub(crate) fn cancel_subject(route: &str) -> String {
    format!("{CANCEL_PREFIX}{route}")
}

pub(crate) fn is_cancel_subject(subject: &str) -> bool {
    subject.starts_with(CANCEL_PREFIX)
}

// === requests and events ===

/// How large a piece of memory is from which bodies are cut.
const CHUNK: usize = 16 * 1024;

/// Makes sure that a small body can be cut off without an allocation of its own.
fn refill(out: &mut BytesMut) {
    if out.capacity() < 256 {
        *out = BytesMut::with_capacity(CHUNK);
    }
}

/// Writes the body of a request or event with this metadata; the bytes are cut off `out`.
pub(crate) fn encode_request(
    codec: &dyn Codec,
    message: &OutboundMessage,
    id: Option<PacketId>,
    metadata: Option<&Metadata>,
    out: &mut BytesMut,
) -> Result<Bytes, WireError> {
    refill(out);
    let packet = OutgoingPacket {
        pattern: PatternText::Given(&message.pattern),
        data: Some(&message.data),
        id: None,
        metadata,
    };
    let written = match id {
        Some(id) => codec.encode_call(&packet, id, out),
        None => codec.encode_request(&packet, out),
    };
    finish(written, out)
}

fn finish(result: Result<(), CodecError>, out: &mut BytesMut) -> Result<Bytes, WireError> {
    match result {
        Ok(()) => Ok(out.split().freeze()),
        Err(error) => {
            out.clear();
            Err(error.into())
        }
    }
}

/// NATS-2, NATS-6: reads a request or event. An empty body and one that is not JSON are errors (NATS-5): they end a NestJS service,
/// not this one.
pub(crate) fn read_request(
    codec: &dyn Codec,
    body: Bytes,
    headers: &Headers,
    packet: &mut IncomingPacket,
) -> Result<(), String> {
    if body.is_empty() {
        return Err("the body is empty".to_owned());
    }
    codec.read_request(body.into(), packet).map_err(|error| error.to_string())?;
    if packet.metadata.is_none() && !headers.is_empty() {
        packet.metadata = metadata_of(codec.format(), headers);
    }
    Ok(())
}

/// Metadata from headers, for callers that send no packet metadata.
fn metadata_of(format: Format, headers: &Headers) -> Option<Payload> {
    let metadata: Metadata =
        HEADER_METADATA.iter().filter_map(|key| Some((*key, headers.get(key)?))).collect();
    if metadata.is_empty() {
        return None;
    }
    Payload::encode(format, &metadata).ok()
}

// === replies ===

/// The subject that replies to a request go to: below the session's inbox, named by its id.
pub(crate) fn reply_subject(inbox: &str, id: PacketId, out: &mut BytesMut) -> Subject {
    refill(out);
    out.extend_from_slice(inbox.as_bytes());
    id.put(out);
    // Both are text.
    Subject::from_utf8(out.split().freeze()).unwrap_or_else(|_| Subject::from(&*id.text()))
}

/// NATS-4, NATS-8: writes the body of a reply; the bytes are cut off `out`.
pub(crate) fn encode_response(
    codec: &dyn Codec,
    id: &[u8],
    body: &ResponseBody,
    out: &mut BytesMut,
) -> Result<Bytes, WireError> {
    refill(out);
    finish(codec.encode_response(Some(id), body, None, out), out)
}

/// Whether a raw value is this id.
fn is_id(format: Format, raw: &[u8], id: &str) -> bool {
    match (format, raw) {
        (Format::Json, [b'"', quoted @ .., b'"']) => quoted == id.as_bytes(),
        (Format::Json, _) => false,
        _ => raw == &*Raw::text(format, id),
    }
}

/// What a message on a reply subject says.
#[derive(Debug)]
pub(crate) enum Answer {
    /// A reply to the request of this id.
    Reply(ResponsePacket),
    /// Nobody listens to the request's subject.
    Nobody,
    /// A reply to another request: NestJS ignores it.
    Foreign,
}

/// Reads a message on the reply subject of the request `id`.
///
/// NATS-9, NATS-10. A body without id is accepted; one that is not JSON becomes the reply as it is, so that the call ends
/// (with a decoding error) instead of waiting for its timeout.
pub(crate) fn decode_response(codec: &dyn Codec, id: &str, status: Option<u16>, body: &Bytes) -> Answer {
    if status == Some(503) || body.is_empty() {
        return Answer::Nobody;
    }
    let format = codec.format();
    let mut packet = codec.decode_response(body.into()).unwrap_or_else(|_| ResponsePacket {
        id: None,
        status: None,
        body: ResponseBody::Last(Some(Payload::new(format, body.clone()))),
        foreign: true,
    });
    match packet.id.as_deref() {
        Some(raw) if is_id(format, raw, id) => {}
        Some(other) if format != Format::Json || json::is_truthy(other) => return Answer::Foreign,
        _ => packet.id = Some(Raw::text(format, id)),
    }
    Answer::Reply(packet)
}

// === headers ===

/// The headers of an arrival, ordered by name.
pub(crate) fn headers_of(map: &HeaderMap) -> Headers {
    let mut lines: Vec<(&str, &Vec<HeaderValue>)> =
        map.iter().map(|(name, values)| (name.as_ref(), values)).collect();
    lines.sort_unstable_by_key(|(name, _)| *name);
    lines
        .into_iter()
        .flat_map(|(name, values)| values.iter().map(move |value| (name, value.as_str())))
        .collect()
}

/// The size of a header block on the wire.
pub(crate) fn header_bytes(map: &HeaderMap) -> usize {
    let lines = map.iter().flat_map(|(name, values)| {
        let name: &str = name.as_ref();
        values.iter().map(move |value| name.len() + value.as_str().len() + 4)
    });
    "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>()
}

/// NATS-11, NATS-12: the headers of a message: its own, then those of the options that it does not have, then the metadata
/// that also travels as headers; a deadline only with others, unless `deadline` says otherwise. `None` when there are none.
pub(crate) fn headers_for(
    own: &Headers,
    fixed: &Headers,
    metadata: &Metadata,
    limit: usize,
    deadline: bool,
) -> Result<Option<HeaderMap>, WireError> {
    let propagated = HEADER_METADATA.iter().filter_map(|key| Some((*key, metadata.get(key)?)));
    let mut map = HeaderMap::new();
    for (name, value) in own.iter() {
        append(&mut map, name, value)?;
    }
    for (name, value) in fixed.iter().filter(|(name, _)| !own.contains(name)) {
        append(&mut map, name, value)?;
    }
    for (name, value) in propagated.filter(|(name, _)| !own.contains(name) && !fixed.contains(name)) {
        // The deadline comes last.
        if deadline || name != TIMEOUT_KEY || !map.is_empty() {
            append_value(&mut map, HeaderName::from_static(name), value)?;
        }
    }
    if map.is_empty() {
        return Ok(None);
    }
    let size = header_bytes(&map);
    // NATS-13.
    if size > limit {
        return Err(WireError::HeadersTooLarge { size, limit });
    }
    Ok(Some(map))
}

fn append(map: &mut HeaderMap, name: &str, value: &str) -> Result<(), WireError> {
    let bad_name = |_| WireError::HeaderName { name: name.to_owned() };
    let name = HeaderName::from_str(name).map_err(bad_name)?;
    append_value(map, name, value)
}

fn append_value(map: &mut HeaderMap, name: HeaderName, value: &str) -> Result<(), WireError> {
    let value = HeaderValue::from_str(value)
        .map_err(|_| WireError::HeaderValue { name: AsRef::<str>::as_ref(&name).to_owned() })?;
    map.append(name, value);
    Ok(())
}

/// What a call tells that has a deadline and nothing else: most calls of a client have the same one.
#[derive(Debug)]
pub(crate) struct UsualCall {
    pub(crate) timeout: Duration,
    pub(crate) metadata: Metadata,
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) header_bytes: usize,
}

impl UsualCall {
    pub(crate) fn new(timeout: Duration, limit: usize, deadline: bool) -> Result<Self, WireError> {
        let mut metadata = Metadata::from_iter([(TIMEOUT_KEY, timeout.as_millis().to_string())]);
        metadata.keep_json();
        let headers = headers_for(&Headers::new(), &Headers::new(), &metadata, limit, deadline)?;
        let header_bytes = headers.as_ref().map_or(0, header_bytes);
        Ok(Self { timeout, metadata, headers, header_bytes })
    }
}

/// Checks a message, headers and body, against the broker's bound.
pub(crate) fn check_size(size: usize, limit: usize) -> Result<(), WireError> {
    if size > limit { Err(WireError::TooLarge { size, limit }) } else { Ok(()) }
}

/// The last token of a subject.
pub(crate) fn last_token(subject: &Subject) -> &str {
    subject.rsplit_once('.').map_or(subject, |(_, token)| token)
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
