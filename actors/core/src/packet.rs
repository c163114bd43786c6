// SPDX-License-Identifier: MIT OR Apache-2.0

//! The packets that cross the wire, taken apart no further than routing needs.

use std::fmt;
use std::num::NonZeroUsize;

use bytes::Bytes;
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::json;
use crate::pattern::{Pattern, Route};
use crate::payload::{Format, Payload};
use crate::transport::PacketId;

/// The error text NestJS sends when no handler matches, verbatim.
pub const NO_HANDLER_TEXT: &str = "There is no matching message handler defined in the remote service.";

/// The error text NestJS sends for an exception that is not meant for the caller, verbatim.
pub const INTERNAL_ERROR_TEXT: &str = "Internal server error";

/// How long a value a [`Raw`] holds without sharing the frame it came in.
const RAW_INLINE: usize = 32;

/// The raw bytes of one value of a packet (an id, a pattern, a payload), to be looked up, echoed or decoded. Short
/// ones are copied, which costs less than counting references; long ones share the frame.
#[derive(Clone)]
pub struct Raw(RawBytes);

#[derive(Clone)]
enum RawBytes {
    Inline(Inline),
    Shared(Bytes),
}

/// Whole words, which are moved as such, and in the order in which they are: a processor moves two at a time, and waits
/// when it reads two together that were not written together.
#[derive(Clone, Copy)]
#[repr(C)]
struct Inline {
    bytes: [u8; RAW_INLINE],
    /// One more than there are: zero says that there are none here.
    len: NonZeroUsize,
}

impl Inline {
    const EMPTY: Self = Self { bytes: [0; RAW_INLINE], len: NonZeroUsize::MIN };

    /// The bytes at `span`, which are known to be few enough. What follows them may come along: copying a fixed number is
    /// cheaper.
    #[inline]
    fn cut(frame: &[u8], span: std::ops::Range<usize>) -> Self {
        let len = NonZeroUsize::MIN.saturating_add(span.len());
        if let Some(bytes) = frame[span.start..].first_chunk() {
            return Self { bytes: *bytes, len };
        }
        let mut bytes = [0; RAW_INLINE];
        bytes[..span.len()].copy_from_slice(&frame[span]);
        Self { bytes, len }
    }

    /// Becomes what [`cut`](Self::cut) gives, written where it is.
    #[inline]
    fn fill(&mut self, frame: &[u8], span: std::ops::Range<usize>) {
        let len = span.len();
        match frame[span.start..].first_chunk() {
            Some(bytes) => self.bytes = *bytes,
            None => self.bytes[..len].copy_from_slice(&frame[span]),
        }
        self.len = NonZeroUsize::MIN.saturating_add(len);
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len.get() - 1).unwrap_or_default()
    }
}

impl Raw {
    /// A text as a value of a format: an id, as it stands in a packet.
    pub fn text(format: Format, text: &str) -> Self {
        // A text always encodes.
        Payload::encode(format, text).map(Payload::into_raw).unwrap_or_default()
    }

    /// The value at `span` of a frame.
    ///
    /// # Panics
    ///
    /// If `span` is not inside the frame.
    pub fn slice(frame: &Bytes, span: std::ops::Range<usize>) -> Self {
        match span.len() {
            0..=RAW_INLINE => Raw(RawBytes::Inline(Inline::cut(frame, span))),
            _ => Raw(RawBytes::Shared(frame.slice(span))),
        }
    }

    /// The bytes at `span` of this one.
    ///
    /// # Panics
    ///
    /// If `span` is not inside it.
    pub(crate) fn part(&self, span: std::ops::Range<usize>) -> Self {
        match &self.0 {
            RawBytes::Inline(inline) => Raw(RawBytes::Inline(Inline::cut(inline.bytes(), span))),
            RawBytes::Shared(bytes) => Self::slice(bytes, span),
        }
    }

    /// Whether what is at `span` is short.
    #[inline]
    pub(crate) fn is_short(span: &std::ops::Range<usize>) -> bool {
        span.len() <= RAW_INLINE
    }

    /// A copy of the value at `span` of a frame, which is known to be short.
    #[inline]
    pub(crate) fn cut(frame: &[u8], span: std::ops::Range<usize>) -> Self {
        Raw(RawBytes::Inline(Inline::cut(frame, span)))
    }

    /// Becomes a copy of the value at `span` of a frame, which is known to be short. It is written where it is: read back so
    /// soon to be moved, it would have to be waited for.
    #[inline]
    pub(crate) fn fill(&mut self, frame: &[u8], span: std::ops::Range<usize>) {
        match &mut self.0 {
            RawBytes::Inline(inline) => inline.fill(frame, span),
            RawBytes::Shared(_) => *self = Self::cut(frame, span),
        }
    }

    /// A copy of the value at `span` of a frame, if it is short.
    pub(crate) fn inline_in(frame: &[u8], span: std::ops::Range<usize>) -> Option<Self> {
        Self::is_short(&span).then(|| Self::cut(frame, span))
    }

    /// A copy of the value, if it is short.
    pub(crate) fn inline(bytes: &[u8]) -> Option<Self> {
        Self::inline_in(bytes, 0..bytes.len())
    }
}

impl std::ops::Deref for Raw {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            RawBytes::Inline(inline) => inline.bytes(),
            RawBytes::Shared(bytes) => bytes,
        }
    }
}

impl Default for Raw {
    fn default() -> Self {
        Raw(RawBytes::Inline(Inline::EMPTY))
    }
}

impl From<Bytes> for Raw {
    fn from(bytes: Bytes) -> Self {
        Self::inline(&bytes).unwrap_or(Raw(RawBytes::Shared(bytes)))
    }
}

impl From<Vec<u8>> for Raw {
    fn from(bytes: Vec<u8>) -> Self {
        Self::inline(&bytes).unwrap_or_else(|| Raw(RawBytes::Shared(Bytes::from(bytes))))
    }
}

impl From<Raw> for Bytes {
    fn from(raw: Raw) -> Self {
        match raw.0 {
            RawBytes::Inline(inline) => Bytes::copy_from_slice(inline.bytes()),
            RawBytes::Shared(bytes) => bytes,
        }
    }
}

impl PartialEq for Raw {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Raw {}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.escape_ascii())
    }
}

/// A request or an event as it arrived. It is an event exactly if there is no `id`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IncomingPacket {
    /// The raw value of `pattern`, in the format of the codec. `None` if the key is missing, and for foreign
    /// values.
    pub pattern: Option<Raw>,
    /// The value of `data`, or all of a foreign value.
    pub data: Option<Payload>,
    /// The raw value of `id`, to be echoed as it is.
    pub id: Option<Raw>,
    /// The value of `metadata`, see [`Metadata`].
    pub metadata: Option<Payload>,
}

impl IncomingPacket {
    /// True if nobody waits for an answer.
    pub fn is_event(&self) -> bool {
        self.id.is_none()
    }
}

/// What goes into the `pattern` member of an outgoing packet.
#[derive(Debug, Clone, Copy)]
pub enum PatternText<'a> {
    /// The pattern as its author gave it.
    Given(&'a Pattern),
    /// The route as a string, as NestJS sends events over TCP.
    Route(&'a Route),
}

/// A request or an event to be sent. It is an event exactly if there is no `id`.
#[derive(Debug, Clone, Copy)]
pub struct OutgoingPacket<'a> {
    /// The `pattern` member.
    pub pattern: PatternText<'a>,
    /// The `data` member; the key is left out if `None`.
    pub data: Option<&'a Payload>,
    /// The `id` member; the key is left out if `None`.
    pub id: Option<&'a str>,
    /// The `metadata` member; the key is left out if `None`.
    pub metadata: Option<&'a Metadata>,
}

/// What a reply says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResponseBody {
    /// A value; more may follow.
    Item(Payload),
    /// The end, with or without a last value.
    Last(Option<Payload>),
    /// The end, with an error.
    Error(Payload),
    /// The end: no handler matches.
    NoHandler,
}

impl ResponseBody {
    /// True if nothing may follow this packet.
    pub fn is_final(&self) -> bool {
        !matches!(self, ResponseBody::Item(_))
    }
}

/// A reply as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponsePacket {
    /// The raw value of `id`, in the format of the codec.
    pub id: Option<Raw>,
    /// The raw value of `status`. NestJS never reads it.
    pub status: Option<Raw>,
    /// What the reply says.
    pub body: ResponseBody,
    /// True if the value was no reply of NestJS's form and is delivered whole as the only value.
    pub foreign: bool,
}

/// A reply of one short value, the last one, to a request of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShortReply {
    /// The request.
    pub id: PacketId,
    /// The value.
    pub value: Payload,
}

impl Default for ShortReply {
    /// A place to read one into.
    fn default() -> Self {
        Self { id: PacketId::from_parts(0, 0, 0), value: Payload::new(Format::Json, Raw::default()) }
    }
}

// === Metadata ===

/// String members sent beside the data of a packet, in the order they were inserted.
///
/// NestJS 12 clients may send it and 12 servers read it; NestJS 11 ignores it. Values of other types than string
/// are tolerated on receipt and kept as their JSON text.
#[derive(Clone, Default)]
pub struct Metadata {
    /// Most packets have none.
    kept: Option<Box<Kept>>,
}

#[derive(Clone, Default)]
struct Kept {
    entries: Vec<(Box<str>, Box<str>)>,
    /// See [`Metadata::keep_json`].
    json: Option<Box<str>>,
}

impl Metadata {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.iter().find(|(known, _)| *known == key).map(|(_, value)| value)
    }

    /// Sets a key and returns what it had before. A key already there keeps its place.
    pub fn insert(&mut self, key: impl Into<Box<str>>, value: impl Into<Box<str>>) -> Option<Box<str>> {
        let (key, value) = (key.into(), value.into());
        let Kept { entries, json } = &mut **self.kept.get_or_insert_default();
        *json = None;
        match entries.iter_mut().find(|(known, _)| *known == key) {
            Some((_, known)) => Some(std::mem::replace(known, value)),
            None => {
                entries.push((key, value));
                None
            }
        }
    }

    /// Takes a key out and returns what it had.
    pub fn remove(&mut self, key: &str) -> Option<Box<str>> {
        let Kept { entries, json } = &mut **self.kept.as_mut()?;
        let index = entries.iter().position(|(known, _)| &**known == key)?;
        *json = None;
        Some(entries.remove(index).1)
    }

    /// Puts it in JSON once, for metadata that many packets carry. A change forgets it.
    pub fn keep_json(&mut self) {
        let text = json::to_vec(self).ok().and_then(|text| String::from_utf8(text).ok());
        if let Some(kept) = &mut self.kept {
            kept.json = text.map(String::into_boxed_str);
        }
    }

    /// Its JSON, if it was kept.
    pub fn json_text(&self) -> Option<&str> {
        self.kept.as_ref()?.json.as_deref()
    }

    /// Keys and values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        let entries = self.kept.as_ref().map_or(&[][..], |kept| &kept.entries);
        entries.iter().map(|(key, value)| (&**key, &**value))
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.iter().len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of all keys and values together, to hold against a bound.
    pub fn size_bytes(&self) -> usize {
        self.iter().map(|(key, value)| key.len() + value.len()).sum()
    }

    /// Whether there are at most `max_entries` keys and their bytes and values' together at most `max_bytes`.
    pub fn fits(&self, max_entries: usize, max_bytes: usize) -> bool {
        self.len() <= max_entries && self.size_bytes() <= max_bytes
    }
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Metadata {}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Into<Box<str>>, V: Into<Box<str>>> FromIterator<(K, V)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut metadata = Metadata::new();
        metadata.extend(entries);
        metadata
    }
}

impl<K: Into<Box<str>>, V: Into<Box<str>>> Extend<(K, V)> for Metadata {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.len()))?;
        for (key, value) in self.iter() {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of metadata")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Metadata, A::Error> {
                let mut metadata = Metadata::new();
                while let Some((key, value)) = members.next_entry::<String, serde_json::Value>()? {
                    let value = match value {
                        serde_json::Value::String(text) => text,
                        other => other.to_string(),
                    };
                    metadata.insert(key, value);
                }
                Ok(metadata)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_metadata(json: &str, expected: &[(&str, &str)]) {
        let payload = Payload::new(Format::Json, Bytes::copy_from_slice(json.as_bytes()));
        let packed = payload.transcode(Format::MessagePack).unwrap();
        for payload in [payload, packed] {
            let metadata: Metadata = payload.decode().unwrap();
            assert_eq!(metadata.iter().collect::<Vec<_>>(), expected, "{json}");
        }
    }

    #[test]
    fn raw_values_are_what_they_were_cut_from_short_or_long() {
        let frame = Bytes::from((0..100).collect::<Vec<u8>>());
        for start in [0, 1, 60, 67, 68, 69, 90, 100] {
            for len in (0..=100 - start).filter(|len| *len < 40 || *len == 100) {
                let raw = Raw::slice(&frame, start..start + len);
                assert_eq!(&*raw, &frame[start..start + len]);
                assert_eq!(raw, Raw::from(frame.slice(start..start + len)));
                assert_eq!(Bytes::from(raw.clone()), frame.slice(start..start + len));
                let inline = Raw::inline(&frame[start..start + len]);
                assert_eq!(inline.is_some(), len <= RAW_INLINE);
                assert!(inline.is_none_or(|inline| inline == raw));
                if len <= RAW_INLINE {
                    for mut other in [Raw::default(), Raw::from(frame.clone()), Raw::slice(&frame, 0..32)] {
                        other.fill(&frame, start..start + len);
                        assert_eq!(other, raw);
                    }
                }
            }
        }
        assert!(Raw::default().is_empty());
        assert_eq!(&*Raw::text(Format::Json, "a\"b"), br#""a\"b""#);
        assert_eq!(&*Raw::text(Format::MessagePack, "abc"), b"\xa3abc");
        assert_eq!(size_of::<Raw>(), RAW_INLINE + size_of::<usize>());
    }

    #[test]
    fn metadata_keeps_its_order_and_tolerates_other_types() {
        check_metadata(r#"{"b":"1","a":"2"}"#, &[("b", "1"), ("a", "2")]);
        check_metadata(
            r#"{"n":1,"o":{"x":[true]},"z":null}"#,
            &[("n", "1"), ("o", r#"{"x":[true]}"#), ("z", "null")],
        );
        check_metadata(r#"{"a":"1","b":"2","a":"3"}"#, &[("a", "3"), ("b", "2")]);
        check_metadata("{}", &[]);
        assert!(Payload::new(Format::Json, Bytes::from_static(b"5")).decode::<Metadata>().is_err());
    }

    #[test]
    fn metadata_is_a_small_map() {
        let mut metadata: Metadata = [("a", "1"), ("b", "2")].into_iter().collect();
        assert_eq!(metadata.insert("a", "3").as_deref(), Some("1"));
        assert_eq!((metadata.get("a"), metadata.get("x"), metadata.len()), (Some("3"), None, 2));
        assert_eq!(Payload::encode(Format::Json, &metadata).unwrap().bytes(), br#"{"a":"3","b":"2"}"#);
        assert_eq!(metadata.size_bytes(), 4);
        assert!(metadata.fits(2, 4) && !metadata.fits(1, 4) && !metadata.fits(2, 3));
        assert_eq!(metadata.remove("a").as_deref(), Some("3"));
        assert_eq!(metadata.remove("a"), None);
        metadata.keep_json();
        assert_eq!(metadata.json_text(), Some(r#"{"b":"2"}"#));
        metadata.insert("b", "4");
        assert_eq!(metadata.json_text(), None);
        assert!(!metadata.is_empty());
    }
}
