// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets as Redis messages and back, pure: no connection, no clock.

use bytes::{Bytes, BytesMut};
use martlet_core::codec::{Codec, CodecError};
use martlet_core::msgpack;
use martlet_core::packet::{IncomingPacket, OutgoingPacket, PatternText, ResponseBody};
use martlet_core::payload::{Format, Payload};
use martlet_core::transport::{OutboundMessage, PacketId};

/// What reply channels end in (REDIS-3).
const REPLY_SUFFIX: &str = ".reply";

/// What the channels of cancellations begin with (REDIS-16).
const CANCEL_PREFIX: &str = "_MARTLET.cancel.";

/// REDIS-11: the channels that replies of NestJS servers before 12.1.1 with `wildcards` go to: they have a glob's
/// characters in their name, which the channels of other replies have not.
pub(crate) const GLOB_REPLIES: &[u8] = b"*[*?[\\\\]*.reply";

/// The longest channel.
const MAX_CHANNEL: usize = 64 * 1024;

/// Why a message cannot be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The packet could not be written.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The packet is larger than `maxPayloadBytes`.
    #[error("a message of {size} bytes exceeds maxPayloadBytes, {limit}")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The bound.
        limit: usize,
    },
    /// A route cannot be a channel.
    #[error("{reason}")]
    Channel {
        /// Why.
        reason: String,
    },
}

// === channels ===

/// REDIS-1: any route can be a channel, within reason.
pub(crate) fn check_channel(route: &str) -> Result<(), String> {
    match route.len() {
        length if length > MAX_CHANNEL => {
            Err(format!("a channel of {length} bytes exceeds the limit of {MAX_CHANNEL}"))
        }
        _ => Ok(()),
    }
}

/// Where replies to messages on a channel go.
pub(crate) fn reply_channel(channel: &[u8]) -> Bytes {
    [channel, REPLY_SUFFIX.as_bytes()].concat().into()
}

pub(crate) fn is_reply_channel(channel: &[u8]) -> bool {
    channel.ends_with(REPLY_SUFFIX.as_bytes())
}

/// Where cancellations of requests to a route go.
pub(crate) fn cancel_channel(route: &str) -> Bytes {
    [CANCEL_PREFIX, route].concat().into()
}

pub(crate) fn is_cancel_channel(channel: &[u8]) -> bool {
    channel.starts_with(CANCEL_PREFIX.as_bytes())
}

// === packets ===

/// REDIS-2: writes the body of a request or event into `out`, which is empty.
pub(crate) fn encode_request(
    codec: &dyn Codec,
    message: &OutboundMessage,
    id: Option<PacketId>,
    limit: usize,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    let packet = OutgoingPacket {
        pattern: PatternText::Given(&message.pattern),
        data: Some(&message.data),
        id: None,
        metadata: Some(&message.metadata).filter(|metadata| !metadata.is_empty()),
    };
    match id {
        Some(id) => codec.encode_call(&packet, id, out)?,
        None => codec.encode_request(&packet, out)?,
    }
    check_size(out.len(), limit)
}

/// REDIS-4: writes the body of a reply into `out`, which is empty.
pub(crate) fn encode_response(
    codec: &dyn Codec,
    id: &[u8],
    body: &ResponseBody,
    limit: usize,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    codec.encode_response(Some(id), body, None, out)?;
    check_size(out.len(), limit)
}

fn check_size(size: usize, limit: usize) -> Result<(), WireError> {
    if size > limit { Err(WireError::TooLarge { size, limit }) } else { Ok(()) }
}

/// REDIS-5, REDIS-6: reads a request or event. A body that is not JSON is an event whose data is the text, as for
/// NestJS; one that is no text either is an error.
pub(crate) fn decode_request(codec: &dyn Codec, body: Bytes) -> Result<IncomingPacket, String> {
    let error = match codec.decode_request((&body).into()) {
        Ok(packet) => return Ok(packet),
        Err(error) => error,
    };
    if codec.format() != Format::Json {
        return Err(error.to_string());
    }
    let text = std::str::from_utf8(&body).map_err(|_| "the body is neither JSON nor text".to_owned())?;
    let data = Payload::encode(Format::Json, text).map_err(|error| error.to_string())?;
    Ok(IncomingPacket { pattern: None, data: Some(data), id: None, metadata: None })
}

/// REDIS-10: whether a body is a reply: it has no member but a reply's.
pub(crate) fn is_reply(codec: &dyn Codec, body: &Bytes) -> bool {
    codec.decode_response(body.into()).is_ok_and(|packet| !packet.foreign)
}

/// The text of an id, as a peer sent it.
pub(crate) fn id_text(format: Format, raw: &[u8]) -> Option<&[u8]> {
    match (format, raw) {
        (Format::Json, [b'"', quoted @ .., b'"']) => Some(quoted),
        (Format::Json, _) => None,
        _ => msgpack::as_str(raw).map(str::as_bytes),
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
