// SPDX-License-Identifier: MIT OR Apache-2.0
//! The seam to the driver: packets of both protocol versions as one set of types.
//!
//! What is read and written is the driver's (`rumqttc`, one crate for each version): its codec, its TLS and its
//! WebSocket streams. Its event loop is not used, see `docs/decisions/0014-mqtt-event-loop.md`.

mod v4;
mod v5;

use bytes::{BufMut, Bytes, BytesMut};
use rumqttc_v5::PublishProperties;

use crate::options::{Common, MqttQos, MqttSubscribeOptions};
use crate::record::PublishOptions;

/// A protocol version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V4,
    V5,
}

/// What a broker may send.
#[derive(Debug)]
pub(crate) enum Incoming {
    ConnAck(ConnAck),
    Publish(Publish),
    PubAck(Ack),
    PubRec(Ack),
    PubRel(u16),
    PubComp(u16),
    /// One filter is subscribed at a time.
    SubAck(Ack),
    UnsubAck(u16),
    Pong,
    /// The broker says goodbye.
    Disconnect(Goodbye),
}

/// Why a broker ends a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Goodbye {
    /// In words.
    pub(crate) reason: String,
    /// Whether it may be over what it was sent.
    pub(crate) over_us: bool,
}

/// An acknowledgement; with a reason if it is a refusal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ack {
    pub(crate) id: u16,
    pub(crate) refusal: Option<Refusal>,
}

/// Why a broker did not do as asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nobody subscribes to the topic; the message was taken.
    NoSubscribers,
    /// In words.
    Because(String),
}

/// The answer to CONNECT.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ConnAck {
    pub(crate) refusal: Option<ConnectRefusal>,
    pub(crate) session_present: bool,
    pub(crate) receive_maximum: Option<u16>,
    pub(crate) max_packet_size: Option<u32>,
    pub(crate) max_qos: Option<u8>,
    pub(crate) no_retain: bool,
    pub(crate) no_subscription_ids: bool,
    pub(crate) keepalive: Option<u16>,
    pub(crate) client_id: Option<String>,
}

/// Why a broker does not take a connection, as far as it tells which option is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectRefusal {
    Version,
    ClientId,
    Credentials,
    NotAuthorized,
    Will,
    Unavailable,
    Other(&'static str),
}

/// A message that arrived.
#[derive(Debug)]
pub(crate) struct Publish {
    pub(crate) topic: Bytes,
    pub(crate) payload: Bytes,
    /// 0 at quality of service 0.
    pub(crate) id: u16,
    pub(crate) qos: MqttQos,
    pub(crate) retain: bool,
    pub(crate) dup: bool,
    pub(crate) properties: Option<Box<PublishProperties>>,
}

/// What a message that waits costs beside its bytes, and each of its user properties.
const OVERHEAD: usize = 128;

impl Publish {
    /// What it is counted as while it waits.
    pub(crate) fn size(&self) -> usize {
        let properties = self.properties.as_deref().map_or(0, |properties| {
            let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
            let lines = properties.user_properties.iter();
            OVERHEAD
                + text(&properties.response_topic)
                + text(&properties.content_type)
                + properties.correlation_data.as_ref().map_or(0, Bytes::len)
                + lines.map(|(name, value)| name.len() + value.len() + OVERHEAD).sum::<usize>()
        });
        self.topic.len() + self.payload.len() + OVERHEAD + properties
    }

    /// Lets go of the buffer that it was read into, unless it fills most of that.
    pub(crate) fn detach(&mut self, buffer: usize) {
        let correlation = self.properties.as_deref_mut().and_then(|it| it.correlation_data.as_mut());
        if self.payload.len() + correlation.as_ref().map_or(0, |data| data.len()) >= buffer {
            return;
        }
        for part in [&mut self.topic, &mut self.payload].into_iter().chain(correlation) {
            *part = Bytes::copy_from_slice(part);
        }
    }
}

/// Why bytes are no packet.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// So many bytes more are needed, at least.
    Incomplete(usize),
    /// The packet has more bytes than allowed.
    TooLarge,
    /// The broker breaks the protocol.
    Malformed(String),
}

/// A subscription to be asked for.
#[derive(Debug)]
pub(crate) struct Filter<'a> {
    pub(crate) filter: &'a str,
    pub(crate) options: MqttSubscribeOptions,
    /// MQTT 5's subscription identifier.
    pub(crate) identifier: Option<usize>,
}

impl Version {
    pub(crate) fn is_v5(self) -> bool {
        self == Self::V5
    }

    /// Cuts the next packet off.
    pub(crate) fn read(self, input: &mut BytesMut, max_bytes: usize) -> Result<Incoming, ReadError> {
        match self {
            Self::V4 => v4::read(input, max_bytes),
            Self::V5 => v5::read(input, max_bytes),
        }
    }

    pub(crate) fn connect(
        self,
        options: &Common,
        login: &Login<'_>,
        out: &mut BytesMut,
    ) -> Result<(), String> {
        match self {
            Self::V4 => v4::connect(options, login, out),
            Self::V5 => v5::connect(options, login, out),
        }
    }

    pub(crate) fn subscribe(self, id: u16, filter: &Filter<'_>, out: &mut BytesMut) -> Result<(), String> {
        match self {
            Self::V4 => v4::subscribe(id, filter, out),
            Self::V5 => v5::subscribe(id, filter, out),
        }
    }

    pub(crate) fn unsubscribe(self, id: u16, filters: Vec<String>, out: &mut BytesMut) -> Result<(), String> {
        match self {
            Self::V4 => v4::unsubscribe(id, filters, out),
            Self::V5 => v5::unsubscribe(id, filters, out),
        }
    }

    /// Writes an acknowledgement; `failed` tells an MQTT 5 broker that the message was not dealt with.
    pub(crate) fn ack(self, kind: AckKind, id: u16, failed: bool, out: &mut BytesMut) {
        let head = match kind {
            AckKind::Taken => 0x40,
            AckKind::Received => 0x50,
            AckKind::Release => 0x62,
            AckKind::Complete => 0x70,
        };
        let reason = failed && self.is_v5();
        out.put_slice(&[head, if reason { 3 } else { 2 }]);
        out.put_u16(id);
        if reason {
            // Unspecified error.
            out.put_u8(0x80);
        }
    }

    /// Writes a message; the topic is given in two parts.
    pub(crate) fn publish(
        self,
        [topic, suffix]: [&[u8]; 2],
        payload: &[u8],
        id: u16,
        options: &PublishOptions,
        out: &mut BytesMut,
    ) -> Result<(), String> {
        let acked = options.qos != MqttQos::AtMostOnce;
        let dup = options.dup && acked;
        let topic_len = topic.len() + suffix.len();
        let fixed = 2 + topic_len + if acked { 2 } else { 0 };
        let head = 0x30 | u8::from(options.retain) | options.qos.as_u8() << 1 | u8::from(dup) << 3;
        let properties = options.properties.as_deref().filter(|_| self.is_v5());
        let mut block = BytesMut::new();
        if let Some(properties) = properties {
            properties.write(&mut block).map_err(|error| error.to_string())?;
        }
        let block_len = match (self, properties) {
            (Self::V4, _) => 0,
            (Self::V5, None) => 1,
            (Self::V5, Some(_)) => block.len(),
        };
        let remaining = fixed + block_len + payload.len();
        out.reserve(5 + remaining);
        out.put_u8(head);
        put_length(out, remaining)?;
        out.put_u16(u16::try_from(topic_len).map_err(|_| "a topic has at most 65,535 bytes")?);
        out.put_slice(topic);
        out.put_slice(suffix);
        if acked {
            out.put_u16(id);
        }
        match (self, properties) {
            (Self::V4, _) => {}
            (Self::V5, None) => out.put_u8(0),
            (Self::V5, Some(_)) => out.put_slice(&block),
        }
        out.put_slice(payload);
        Ok(())
    }

    pub(crate) fn ping(self, out: &mut BytesMut) {
        out.put_slice(&[0xc0, 0]);
    }

    pub(crate) fn disconnect(self, out: &mut BytesMut) {
        out.put_slice(&[0xe0, 0]);
    }
}

/// Acknowledgements of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AckKind {
    /// PUBACK.
    Taken,
    /// PUBREC.
    Received,
    /// PUBREL.
    Release,
    /// PUBCOMP.
    Complete,
}

/// What CONNECT says beside the options.
#[derive(Debug)]
pub(crate) struct Login<'a> {
    pub(crate) client_id: &'a str,
    pub(crate) username: Option<&'a str>,
    pub(crate) password: Option<&'a str>,
}

/// The largest length that a packet can tell.
pub(crate) const MAX_REMAINING: usize = 268_435_455;

fn put_length(out: &mut BytesMut, mut length: usize) -> Result<(), String> {
    if length > MAX_REMAINING {
        return Err(format!("a message of {length} bytes exceeds what MQTT can carry, {MAX_REMAINING}"));
    }
    loop {
        let byte = (length & 0x7f) as u8;
        length >>= 7;
        out.put_u8(byte | if length > 0 { 0x80 } else { 0 });
        if length == 0 {
            return Ok(());
        }
    }
}

/// The head of the packet at the begin of `input`: its first byte, and where its body begins and ends. `None` when
/// not enough of it is there.
pub(crate) fn frame(input: &[u8]) -> Option<(u8, std::ops::Range<usize>)> {
    let (&first, rest) = input.split_first()?;
    let mut length = 0usize;
    for (index, byte) in rest.iter().take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            let start = index + 2;
            return Some((first, start..start + length));
        }
    }
    None
}

pub(crate) fn qos_of(number: u8) -> MqttQos {
    MqttQos::try_from(number).unwrap_or_default()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
