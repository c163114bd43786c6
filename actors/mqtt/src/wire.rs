// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets as MQTT payloads and back, pure: no connection, no clock.

use bytes::{Bytes, BytesMut};
use martlet_core::RpcError;
use martlet_core::codec::Codec;
use martlet_core::packet::{IncomingPacket, OutgoingPacket, PatternText, Raw, ResponseBody, ResponsePacket};
use martlet_core::payload::{Format, Payload};
use martlet_core::transport::{OutboundMessage, PacketId};

/// Why a message cannot be sent.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WireError(pub(crate) String);

/// MQTT-1: writes the payload of a request or event.
pub(crate) fn encode_request(
    codec: &dyn Codec,
    message: &OutboundMessage,
    out: &mut BytesMut,
) -> Result<(), String> {
    out.clear();
    let id = message.id.map(PacketId::text);
    let packet = OutgoingPacket {
        pattern: PatternText::Given(&message.pattern),
        data: Some(&message.data),
        id: id.as_deref(),
        metadata: Some(&message.metadata).filter(|metadata| !metadata.is_empty()),
    };
    codec.encode_request(&packet, out).map_err(|error| error.to_string())
}

/// MQTT-5: reads a request or event. Text that is not JSON is the data of an event, as in NestJS.
pub(crate) fn decode_request(codec: &dyn Codec, payload: &Bytes) -> Result<IncomingPacket, String> {
    match codec.decode_request(payload.into()) {
        Ok(packet) => Ok(packet),
        Err(_) if codec.format() == Format::Json => {
            let text = String::from_utf8_lossy(payload);
            let data = Payload::encode(Format::Json, &*text).map_err(|error| error.to_string())?;
            Ok(IncomingPacket { pattern: None, data: Some(data), id: None, metadata: None })
        }
        Err(error) => Err(error.to_string()),
    }
}

/// MQTT-2: writes the payload of a reply.
pub(crate) fn encode_response(
    codec: &dyn Codec,
    id: &[u8],
    body: &ResponseBody,
    out: &mut BytesMut,
) -> Result<(), String> {
    out.clear();
    codec.encode_response(Some(id), body, None, out).map_err(|error| error.to_string())
}

/// MQTT-8: whether a payload is a reply of NestJS's form, to whomever.
pub(crate) fn is_reply(codec: &dyn Codec, payload: &Bytes) -> bool {
    codec.decode_response(payload.into()).is_ok_and(|packet| !packet.foreign && packet.id.is_some())
}

/// The id of a reply, if it may be one of ours.
pub(crate) fn packet_id(raw: &Raw) -> Option<PacketId> {
    let text = match &**raw {
        [b'"', text @ .., b'"'] => text,
        // A MessagePack text of 21 bytes.
        [0xb5, text @ ..] => text,
        _ => return None,
    };
    PacketId::from_text(text)
}

/// The reply that ends a call with an error of ours.
pub(crate) fn failed_call(format: Format, id: &PacketId, reason: &str) -> ResponsePacket {
    let id = Raw::text(format, &id.text());
    let error = RpcError::message(reason).to_payload(format);
    ResponsePacket { id: Some(id), status: None, body: ResponseBody::Error(error), foreign: false }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
