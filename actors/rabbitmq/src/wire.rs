// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets as AMQP messages and back, pure: no connection, no clock.

use bytes::{Bytes, BytesMut};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, ShortString};
use martlet_core::Headers;
use martlet_core::codec::{Codec, CodecError};
use martlet_core::packet::{IncomingPacket, OutgoingPacket, PatternText, Raw, ResponseBody, ResponsePacket};
use martlet_core::payload::{Format, Payload};
use martlet_core::transport::{OutboundMessage, PacketId};
use serde_json::{Map, Value};

use crate::options::DIRECT_REPLY_TO;
use crate::record::PROPERTY_PREFIX;

/// The largest short string of AMQP: routing keys, names, most properties.
pub(crate) const SHORT_STRING_LIMIT: usize = 255;

/// Why a message cannot be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The packet could not be written.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A name or property is longer than AMQP takes.
    #[error("{what} has {size} bytes, AMQP takes {SHORT_STRING_LIMIT}")]
    TooLong {
        /// What it is.
        what: String,
        /// Its length in bytes.
        size: usize,
    },
    /// A property has a value that it cannot have, or there is no such property.
    #[error("{name} cannot be {value:?}: {reason}")]
    Property {
        /// Its name, with its prefix.
        name: String,
        /// The value.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// Headers and properties are larger than `maxHeaderBytes`.
    #[error("headers and properties of {size} bytes exceed maxHeaderBytes, {limit}")]
    HeadersTooLarge {
        /// Their size.
        size: usize,
        /// The bound.
        limit: usize,
    },
    /// The body is larger than `maxBodyBytes`.
    #[error("a body of {size} bytes exceeds maxBodyBytes, {limit}")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The bound.
        limit: usize,
    },
}

/// The bounds of what is sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) header_bytes: usize,
    pub(crate) body_bytes: usize,
}

/// A short string; AMQP's are bounded.
pub(crate) fn short(what: &str, text: &str) -> Result<ShortString, WireError> {
    ShortString::try_new(text).map_err(|_| WireError::TooLong { what: what.to_owned(), size: text.len() })
}

// === bodies ===

/// How large a piece of memory is from which bodies are cut.
const CHUNK: usize = 16 * 1024;

/// Makes sure that a small body can be cut off without an allocation of its own.
fn refill(out: &mut BytesMut) {
    if out.capacity() < 256 {
        *out = BytesMut::with_capacity(CHUNK);
    }
}

fn finish(result: Result<(), CodecError>, limits: Limits, out: &mut BytesMut) -> Result<Bytes, WireError> {
    let size = out.len();
    match result {
        Ok(()) if size <= limits.body_bytes => Ok(out.split().freeze()),
        Ok(()) => {
            out.clear();
            Err(WireError::TooLarge { size, limit: limits.body_bytes })
        }
        Err(error) => {
            out.clear();
            Err(error.into())
        }
    }
}

/// RMQ-6: writes the body of a request or event; the bytes are cut off `out`.
pub(crate) fn encode_request(
    codec: &dyn Codec,
    message: &OutboundMessage,
    limits: Limits,
    out: &mut BytesMut,
) -> Result<Bytes, WireError> {
    refill(out);
    let id = message.id.map(PacketId::text);
    let packet = OutgoingPacket {
        pattern: PatternText::Given(&message.pattern),
        data: Some(&message.data),
        id: id.as_deref(),
        metadata: Some(&message.metadata).filter(|metadata| !metadata.is_empty()),
    };
    finish(codec.encode_request(&packet, out), limits, out)
}

/// RMQ-9: reads the body of a request or event.
pub(crate) fn decode_request(codec: &dyn Codec, body: Bytes) -> Result<IncomingPacket, String> {
    if body.is_empty() {
        return Err("the body is empty".to_owned());
    }
    codec.decode_request(body.into()).map_err(|error| error.to_string())
}

/// RMQ-8: writes the body of a reply; the bytes are cut off `out`. Only the reply of "no handler" has an id.
pub(crate) fn encode_response(
    codec: &dyn Codec,
    id: &[u8],
    body: &ResponseBody,
    limits: Limits,
    out: &mut BytesMut,
) -> Result<Bytes, WireError> {
    refill(out);
    let id = matches!(body, ResponseBody::NoHandler).then_some(id);
    finish(codec.encode_response(id, body, None, out), limits, out)
}

/// RMQ-10: reads a reply to the request `id`, which the property says; an id in the body is not looked at. What is
/// no reply of NestJS's form is the call's only value, as text if it is not JSON.
pub(crate) fn decode_response(codec: &dyn Codec, id: &str, body: &Bytes) -> ResponsePacket {
    let format = codec.format();
    let mut packet = match codec.decode_response(body.into()) {
        Ok(packet) if !body.is_empty() => packet,
        _ => ResponsePacket {
            id: None,
            status: None,
            body: ResponseBody::Last(Some(match format {
                Format::Json => as_text(body),
                _ => Payload::new(format, body.clone()),
            })),
            foreign: true,
        },
    };
    packet.id = Some(Raw::text(format, id));
    packet
}

fn as_text(body: &Bytes) -> Payload {
    // A text always encodes.
    let text = String::from_utf8_lossy(body);
    Payload::encode(Format::Json, &text).unwrap_or_else(|_| Payload::null(Format::Json))
}

// === properties ===

/// What a message is sent with, before its own headers are looked at.
pub(crate) fn base_properties(fixed: &FieldTable, persistent: Option<bool>) -> BasicProperties {
    let properties = BasicProperties::default().with_headers(fixed.clone());
    match persistent {
        Some(persistent) => properties.with_delivery_mode(if persistent { 2 } else { 1 }),
        None => properties,
    }
}

/// Headers as an AMQP table: a name that repeats keeps its last value.
pub(crate) fn table_of(headers: &Headers) -> Result<FieldTable, WireError> {
    let mut table = FieldTable::default();
    for (name, value) in headers.iter() {
        table.insert(short(&format!("header name {name:?}"), name)?, AMQPValue::LongString(value.into()));
    }
    Ok(table)
}

/// RMQ-7: puts a message's own headers and properties over those of the options.
pub(crate) fn with_own(
    mut properties: BasicProperties,
    own: &Headers,
    limits: Limits,
) -> Result<BasicProperties, WireError> {
    if own.is_empty() {
        return Ok(properties);
    }
    let mut table = properties.headers().clone().unwrap_or_default();
    for (name, value) in own.iter() {
        let property = name.strip_prefix(PROPERTY_PREFIX);
        let header = property.map_or(Some(name), |property| property.strip_prefix("headers."));
        match (property, header) {
            (_, Some(header)) => {
                let bad = |_| WireError::Property {
                    name: name.to_owned(),
                    value: value.to_owned(),
                    reason: "it is not JSON",
                };
                let value = match property {
                    Some(_) => amqp_value(&serde_json::from_str(value).map_err(bad)?),
                    None => AMQPValue::LongString(value.into()),
                };
                table.insert(short(&format!("header name {header:?}"), header)?, value);
            }
            (Some(property), None) => properties = set_property(properties, name, property, value)?,
            (None, None) => {}
        }
    }
    let size = own.iter().map(|(name, value)| name.len() + value.len() + 6).sum::<usize>();
    if size > limits.header_bytes {
        return Err(WireError::HeadersTooLarge { size, limit: limits.header_bytes });
    }
    Ok(properties.with_headers(table))
}

fn set_property(
    properties: BasicProperties,
    name: &str,
    property: &str,
    value: &str,
) -> Result<BasicProperties, WireError> {
    let bad = |reason| WireError::Property { name: name.to_owned(), value: value.to_owned(), reason };
    let text = || short(name, value);
    Ok(match property {
        "priority" => properties.with_priority(value.parse().map_err(|_| bad("it is a number below 256"))?),
        "expiration" => {
            // The broker closes the channel over anything else.
            let millis: u32 = value.parse().map_err(|_| bad("it is a number of milliseconds below 2^32"))?;
            properties.with_expiration(short(name, &millis.to_string())?)
        }
        "timestamp" => {
            properties.with_timestamp(value.parse().map_err(|_| bad("it is a number of seconds"))?)
        }
        "persistent" => match value {
            "true" => properties.with_delivery_mode(2),
            "false" => properties.with_delivery_mode(1),
            _ => return Err(bad("it is true or false")),
        },
        "contentType" => properties.with_content_type(text()?),
        "contentEncoding" => properties.with_content_encoding(text()?),
        "messageId" => properties.with_message_id(text()?),
        "type" => properties.with_type(text()?),
        "appId" => properties.with_app_id(text()?),
        "userId" => properties.with_user_id(text()?),
        "replyTo" => properties.with_reply_to(text()?),
        _ => return Err(bad("there is no such property")),
    })
}

// === values ===

/// A JSON value as an AMQP value: whole numbers become 64-bit ones.
pub(crate) fn amqp_value(value: &Value) -> AMQPValue {
    match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(value) => AMQPValue::Boolean(*value),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => AMQPValue::LongLongInt(whole),
            None => AMQPValue::Double(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => AMQPValue::LongString(text.as_str().into()),
        Value::Array(items) => {
            AMQPValue::FieldArray(FieldArray::from(items.iter().map(amqp_value).collect::<Vec<_>>()))
        }
        Value::Object(members) => AMQPValue::FieldTable(amqp_table(members).unwrap_or_default()),
    }
}

/// Arguments as an AMQP table; an error names the argument that is too long.
pub(crate) fn amqp_table(members: &Map<String, Value>) -> Result<FieldTable, WireError> {
    let mut table = FieldTable::default();
    for (name, value) in members {
        table.insert(short(&format!("argument name {name:?}"), name)?, amqp_value(value));
    }
    Ok(table)
}

/// An AMQP value as JSON: texts and bytes become texts.
pub(crate) fn json_value(value: &AMQPValue) -> Value {
    let text = |bytes: &[u8]| Value::from(String::from_utf8_lossy(bytes).into_owned());
    match value {
        AMQPValue::Boolean(value) => Value::from(*value),
        AMQPValue::ShortShortInt(value) => Value::from(*value),
        AMQPValue::ShortShortUInt(value) => Value::from(*value),
        AMQPValue::ShortInt(value) => Value::from(*value),
        AMQPValue::ShortUInt(value) => Value::from(*value),
        AMQPValue::LongInt(value) => Value::from(*value),
        AMQPValue::LongUInt(value) => Value::from(*value),
        AMQPValue::LongLongInt(value) => Value::from(*value),
        AMQPValue::Timestamp(value) => Value::from(*value),
        AMQPValue::Float(value) => Value::from(*value),
        AMQPValue::Double(value) => Value::from(*value),
        AMQPValue::DecimalValue(value) => {
            Value::from(f64::from(value.value) / 10f64.powi(i32::from(value.scale)))
        }
        AMQPValue::ShortString(value) => Value::from(value.as_str()),
        AMQPValue::LongString(value) => text(value.as_bytes()),
        AMQPValue::ByteArray(value) => text(value.as_slice()),
        AMQPValue::FieldArray(items) => items.as_slice().iter().map(json_value).collect(),
        AMQPValue::FieldTable(table) => {
            table.into_iter().map(|(name, value)| (name.to_string(), json_value(value))).collect()
        }
        AMQPValue::Void => Value::Null,
    }
}

// === reply addresses ===

/// RMQ-12: whether a reply address is an ordinary queue or one that the broker can have given out: a process and a
/// key, each in base64. RabbitMQ closes the whole connection that publishes to one that it cannot take apart.
pub(crate) fn is_sound_reply_address(address: &str) -> bool {
    let Some(token) = address.strip_prefix(DIRECT_REPLY_TO) else { return true };
    let Some((process, key)) = token.strip_prefix('.').and_then(|token| token.split_once('.')) else {
        return false;
    };
    base64(process).is_some_and(|process| is_process(&process)) && base64(key).is_some()
}

/// Reads base64 in the usual alphabet, padded.
fn base64(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.strip_suffix("==").or_else(|| text.strip_suffix('=')).unwrap_or(text);
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for byte in digits.bytes() {
        let digit = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(digit);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// Whether bytes are a process in Erlang's external term format.
fn is_process(bytes: &[u8]) -> bool {
    // Version 131; a process with a creation of four bytes, or of one.
    let (rest, tail) = match bytes {
        [131, 88, rest @ ..] => (rest, 12),
        [131, 103, rest @ ..] => (rest, 9),
        _ => return false,
    };
    // The node's name, an atom: with a length of two bytes, or of one.
    let (name, rest) = match rest {
        [118 | 100, high, low, rest @ ..] => (usize::from(*high) << 8 | usize::from(*low), rest),
        [119 | 115, length, rest @ ..] => (usize::from(*length), rest),
        _ => return false,
    };
    name > 0 && rest.len() == name + tail && std::str::from_utf8(&rest[..name]).is_ok()
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
