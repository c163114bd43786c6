// SPDX-License-Identifier: MIT OR Apache-2.0

//! The MessagePack counterpart of [`crate::json`]: finds the members of an envelope without parsing them, and
//! writes the few types an envelope is made of.
//!
//! The scanner checks that every value is whole and of a known type; like its JSON sibling it neither recurses
//! nor allocates, whatever the nesting. It does not check that strings are UTF-8: that is found when a value is
//! decoded.

use std::cell::RefCell;
use std::error::Error;
use std::fmt;
use std::ops::Range;

use bytes::{BufMut, BytesMut};
use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::ser::{self, SerializeMap, SerializeSeq};
use serde::{Deserializer, Serialize, Serializer};

use crate::json::{JsFormatter, Members, Span};

/// The byte for nil.
pub const NIL: u8 = 0xc0;
/// The byte for false.
pub const FALSE: u8 = 0xc2;
/// The byte for true.
pub const TRUE: u8 = 0xc3;

/// Why bytes are not one MessagePack value, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at byte {offset}")]
pub struct FormError {
    /// What was wrong.
    pub kind: FormErrorKind,
    /// The byte where it was noticed.
    pub offset: usize,
}

/// What is wrong with bytes that are not one MessagePack value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormErrorKind {
    /// The bytes stop inside a value.
    #[error("unexpected end of messagepack")]
    End,
    /// The byte 0xc1, which no value starts with.
    #[error("reserved byte in messagepack")]
    Reserved,
    /// Something follows the value.
    #[error("trailing bytes after messagepack value")]
    Trailing,
}

// === Scanning ===

/// What the first bytes of a value say about the rest of it.
struct Head {
    /// Where the body starts.
    body: usize,
    /// Bytes of body that belong to this value itself.
    length: usize,
    /// Values that follow as its elements.
    children: u64,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Other,
    String,
    Map,
}

fn end(bytes: &[u8]) -> FormError {
    FormError { kind: FormErrorKind::End, offset: bytes.len() }
}

/// The big-endian number of `N` bytes at `at`.
#[inline]
fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<usize, FormError> {
    let digits = bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).ok_or_else(|| end(bytes))?;
    Ok(digits.iter().fold(0, |value, &digit| value << 8 | usize::from(digit)))
}

#[inline]
fn head(bytes: &[u8], at: usize) -> Result<Head, FormError> {
    let marker = *bytes.get(at).ok_or_else(|| end(bytes))?;
    let flat =
        |extra: usize, length: usize| Head { body: at + 1 + extra, length, children: 0, kind: Kind::Other };
    let text =
        |extra: usize, length: usize| Head { body: at + 1 + extra, length, children: 0, kind: Kind::String };
    let array = |extra: usize, count: usize| Head {
        body: at + 1 + extra,
        length: 0,
        children: count as u64,
        kind: Kind::Other,
    };
    let map = |extra: usize, count: usize| Head {
        body: at + 1 + extra,
        length: 0,
        children: 2 * count as u64,
        kind: Kind::Map,
    };
    let next = at + 1;
    Ok(match marker {
        0x00..=0x7f | 0xc0 | 0xc2 | 0xc3 | 0xe0..=0xff => flat(0, 0),
        0x80..=0x8f => map(0, usize::from(marker & 0x0f)),
        0x90..=0x9f => array(0, usize::from(marker & 0x0f)),
        0xa0..=0xbf => text(0, usize::from(marker & 0x1f)),
        0xc1 => return Err(FormError { kind: FormErrorKind::Reserved, offset: at }),
        0xc4 => flat(1, number::<1>(bytes, next)?),
        0xc5 => flat(2, number::<2>(bytes, next)?),
        0xc6 => flat(4, number::<4>(bytes, next)?),
        // Extensions carry one byte of type before the body.
        0xc7 => flat(1, 1 + number::<1>(bytes, next)?),
        0xc8 => flat(2, 1 + number::<2>(bytes, next)?),
        0xc9 => flat(4, 1 + number::<4>(bytes, next)?),
        0xca | 0xce | 0xd2 => flat(0, 4),
        0xcb | 0xcf | 0xd3 => flat(0, 8),
        0xcc | 0xd0 => flat(0, 1),
        0xcd | 0xd1 => flat(0, 2),
        0xd4..=0xd8 => flat(0, 1 + (1 << (marker - 0xd4))),
        0xd9 => text(1, number::<1>(bytes, next)?),
        0xda => text(2, number::<2>(bytes, next)?),
        0xdb => text(4, number::<4>(bytes, next)?),
        0xdc => array(2, number::<2>(bytes, next)?),
        0xdd => array(4, number::<4>(bytes, next)?),
        0xde => map(2, number::<2>(bytes, next)?),
        0xdf => map(4, number::<4>(bytes, next)?),
    })
}

/// Steps over the value that starts at `at` and returns its end.
///
/// # Errors
///
/// [`FormError`] if the value is cut off or contains the reserved byte.
pub fn skip(bytes: &[u8], mut at: usize) -> Result<usize, FormError> {
    let mut pending = 1_u64;
    while pending > 0 {
        let Head { body, length, children, .. } = head(bytes, at)?;
        at = body.checked_add(length).filter(|&after| after <= bytes.len()).ok_or_else(|| end(bytes))?;
        pending = pending - 1 + children;
        // Every pending value takes a byte, so a count nobody can keep is refused before it is walked.
        if pending > (bytes.len() - at) as u64 {
            return Err(end(bytes));
        }
    }
    Ok(at)
}

/// The range of the text of the string that starts at `at`; `None` if the value there is no string.
fn string_at(bytes: &[u8], at: usize) -> Result<Option<Range<usize>>, FormError> {
    let Head { body, length, kind, .. } = head(bytes, at)?;
    Ok((kind == Kind::String).then_some(body..body + length))
}

/// Checks that `bytes` are exactly one value, and finds the members of a top-level map whose names are in
/// `names`. Keys that are not strings count as others.
///
/// # Errors
///
/// [`FormError`] if the bytes are anything but one value.
pub fn members<const N: usize>(bytes: &[u8], names: &[&str; N]) -> Result<Members<N>, FormError> {
    let top = head(bytes, 0)?;
    let mut found = Members { is_object: false, has_others: false, spans: [const { None }; N], value: 0..0 };
    let mut at;
    if top.kind == Kind::Map {
        found.is_object = true;
        at = top.body;
        for _ in 0..top.children / 2 {
            let value = skip(bytes, at)?;
            let key = string_at(bytes, at)?.and_then(|span| bytes.get(span));
            at = skip(bytes, value)?;
            match names.iter().position(|name| key == Some(name.as_bytes())) {
                Some(index) => found.spans[index] = Some(value..at),
                None => found.has_others = true,
            }
        }
    } else {
        at = skip(bytes, 0)?;
    }
    if at != bytes.len() {
        return Err(FormError { kind: FormErrorKind::Trailing, offset: at });
    }
    found.value = 0..at;
    Ok(found)
}

/// Finds one member of a top-level map; `None` if there is none or the value is no map.
///
/// # Errors
///
/// As [`members`].
pub fn member(bytes: &[u8], name: &str) -> Result<Option<Span>, FormError> {
    let [span] = members(bytes, &[name])?.spans;
    Ok(span)
}

/// The text of a value that is a string in UTF-8 and nothing else.
pub fn as_str(bytes: &[u8]) -> Option<&str> {
    let span = string_at(bytes, 0).ok()??;
    if span.end != bytes.len() {
        return None;
    }
    std::str::from_utf8(bytes.get(span)?).ok()
}

/// Whether JavaScript would count the value as true: everything but nil, false, zero, NaN and the empty string.
pub fn is_truthy(bytes: &[u8]) -> bool {
    match bytes {
        [] | [0x00 | NIL | FALSE | 0xa0] => false,
        [0xd9, 0] | [0xda, 0, 0] | [0xdb, 0, 0, 0, 0] => false,
        [0xcc..=0xd3, digits @ ..] => digits.iter().any(|&digit| digit != 0),
        [0xca, a, b, c, d] => {
            let value = f32::from_be_bytes([*a, *b, *c, *d]);
            value != 0.0 && !value.is_nan()
        }
        [0xcb, digits @ ..] if digits.len() == 8 => {
            let value = digits.iter().fold(0_u64, |value, &digit| value << 8 | u64::from(digit));
            let value = f64::from_bits(value);
            value != 0.0 && !value.is_nan()
        }
        _ => true,
    }
}

// === Writing ===

/// Appends the head of a map with `count` members.
pub fn write_map_head(out: &mut BytesMut, count: u8) {
    if count < 16 {
        out.put_u8(0x80 | count);
    } else {
        out.put_slice(&[0xde, 0, count]);
    }
}

/// Appends a string.
///
/// # Panics
///
/// If the text is longer than the format can say, 4 GiB.
pub fn write_string(out: &mut BytesMut, text: &str) {
    match text.len() {
        length @ 0..=31 => out.put_u8(0xa0 | length as u8),
        length @ 32..=0xff => out.put_slice(&[0xd9, length as u8]),
        length @ 0x100..=0xffff => {
            out.put_u8(0xda);
            out.put_u16(length as u16);
        }
        length => {
            out.put_u8(0xdb);
            out.put_u32(u32::try_from(length).expect("a string in memory is shorter than 4 GiB"));
        }
    }
    out.put_slice(text.as_bytes());
}

/// Appends a boolean.
pub fn write_bool(out: &mut BytesMut, value: bool) {
    out.put_u8(if value { TRUE } else { FALSE });
}

// === Between the formats ===

type Source = Box<dyn Error + Send + Sync>;

/// A deserializer that stops at 128 levels, like the one for JSON: its own limit of 1024 does not fit on the stack of
/// a thread in every build.
pub(crate) fn reader(bytes: &[u8]) -> rmp_serde::Deserializer<rmp_serde::decode::ReadRefReader<'_, [u8]>> {
    let mut reader = rmp_serde::Deserializer::from_read_ref(bytes);
    reader.set_max_depth(128);
    reader
}

/// Rewrites one JSON text as MessagePack, keeping the order of members.
///
/// # Errors
///
/// If the text is not JSON, or nested deeper than 128 levels.
pub fn from_json(text: &[u8]) -> Result<Vec<u8>, Source> {
    let mut reader = serde_json::Deserializer::from_slice(text);
    let mut out = Vec::with_capacity(text.len());
    Relay::new(&mut reader).serialize(&mut rmp_serde::Serializer::new(&mut out))?;
    reader.end()?;
    Ok(out)
}

/// Rewrites one MessagePack value as JSON, keeping the order of members.
///
/// # Errors
///
/// If the bytes are not one value, or the value has extension types or keys JSON cannot have.
pub fn to_json(bytes: &[u8]) -> Result<Vec<u8>, Source> {
    members(bytes, &[])?;
    let mut reader = reader(bytes);
    let mut out = Vec::with_capacity(bytes.len() * 2);
    Relay::new(&mut reader).serialize(&mut serde_json::Serializer::with_formatter(&mut out, JsFormatter))?;
    Ok(out)
}

/// Serializes whatever a deserializer yields, without a tree in between.
struct Relay<D>(RefCell<Option<D>>);

impl<D> Relay<D> {
    fn new(reader: D) -> Self {
        Relay(RefCell::new(Some(reader)))
    }
}

impl<'de, D: Deserializer<'de>> Serialize for Relay<D> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(reader) = self.0.borrow_mut().take() else {
            return Err(ser::Error::custom("a value can be relayed only once"));
        };
        reader.deserialize_any(RelayVisitor(serializer)).map_err(ser::Error::custom)
    }
}

struct RelayVisitor<S>(S);

macro_rules! relay {
    ($($visit:ident $serialize:ident $type:ty),* $(,)?) => {
        $(fn $visit<E: de::Error>(self, value: $type) -> Result<S::Ok, E> {
            self.0.$serialize(value).map_err(E::custom)
        })*
    };
}

impl<'de, S: Serializer> Visitor<'de> for RelayVisitor<S> {
    type Value = S::Ok;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    relay! {
        visit_bool serialize_bool bool,
        visit_i64 serialize_i64 i64,
        visit_u64 serialize_u64 u64,
        visit_f64 serialize_f64 f64,
        visit_str serialize_str &str,
        visit_bytes serialize_bytes &[u8],
    }

    fn visit_f32<E: de::Error>(self, value: f32) -> Result<S::Ok, E> {
        // Its exact value, which is what a reader without `f32` makes of it.
        self.visit_f64(f64::from(value))
    }

    fn visit_unit<E: de::Error>(self) -> Result<S::Ok, E> {
        self.0.serialize_unit().map_err(E::custom)
    }

    fn visit_none<E: de::Error>(self) -> Result<S::Ok, E> {
        self.0.serialize_unit().map_err(E::custom)
    }

    fn visit_some<D: Deserializer<'de>>(self, reader: D) -> Result<S::Ok, D::Error> {
        reader.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<S::Ok, A::Error> {
        let mut out = self.0.serialize_seq(items.size_hint()).map_err(de::Error::custom)?;
        while items.next_element_seed(Element(&mut out))?.is_some() {}
        out.end().map_err(de::Error::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<S::Ok, A::Error> {
        let mut out = self.0.serialize_map(members.size_hint()).map_err(de::Error::custom)?;
        while members.next_key_seed(MemberKey(&mut out))?.is_some() {
            members.next_value_seed(MemberValue(&mut out))?;
        }
        out.end().map_err(de::Error::custom)
    }
}

struct Element<'a, S>(&'a mut S);

impl<'de, S: SerializeSeq> DeserializeSeed<'de> for Element<'_, S> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        self.0.serialize_element(&Relay::new(reader)).map_err(de::Error::custom)
    }
}

struct MemberKey<'a, S>(&'a mut S);

impl<'de, S: SerializeMap> DeserializeSeed<'de> for MemberKey<'_, S> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        self.0.serialize_key(&Relay::new(reader)).map_err(de::Error::custom)
    }
}

struct MemberValue<'a, S>(&'a mut S);

impl<'de, S: SerializeMap> DeserializeSeed<'de> for MemberValue<'_, S> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        self.0.serialize_value(&Relay::new(reader)).map_err(de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[track_caller]
    fn check_whole(bytes: &[u8]) {
        assert_eq!(skip(bytes, 0), Ok(bytes.len()), "{bytes:02x?}");
        for cut in 0..bytes.len() {
            let error = skip(&bytes[..cut], 0).unwrap_err();
            assert_eq!(
                error,
                FormError { kind: FormErrorKind::End, offset: cut },
                "{bytes:02x?} cut at {cut}"
            );
        }
    }

    #[test]
    fn every_type_is_stepped_over() {
        for head in 0..=0xff_u8 {
            let body: &[u8] = match head {
                0x80 | 0x90 | 0xa0 => &[],
                0x81 => &[1, 2],
                0x92 | 0xa2 => &[1, 2],
                0x82..=0x8f | 0x91 | 0x93..=0x9f | 0xa1 | 0xa3..=0xbf | 0xc1 => continue,
                0xc4 | 0xd9 => &[2, 0xff, 0xff],
                0xc5 | 0xda => &[0, 2, 0xff, 0xff],
                0xc6 | 0xdb => &[0, 0, 0, 2, 0xff, 0xff],
                0xc7 => &[1, 9, 0xff],
                0xc8 => &[0, 1, 9, 0xff],
                0xc9 => &[0, 0, 0, 1, 9, 0xff],
                0xca | 0xce | 0xd2 => &[0xc1; 4],
                0xcb | 0xcf | 0xd3 => &[0xc1; 8],
                0xcc | 0xd0 => &[0xc1],
                0xcd | 0xd1 => &[0xc1; 2],
                0xd4 => &[0xc1; 2],
                0xd5 => &[0xc1; 3],
                0xd6 => &[0xc1; 5],
                0xd7 => &[0xc1; 9],
                0xd8 => &[0xc1; 17],
                0xdc => &[0, 2, 1, 2],
                0xdd => &[0, 0, 0, 2, 1, 2],
                0xde => &[0, 1, 1, 2],
                0xdf => &[0, 0, 0, 1, 1, 2],
                _ => &[],
            };
            let whole = [&[head], body].concat();
            assert_eq!(skip(&whole, 0), Ok(whole.len()), "{whole:02x?}");
        }
    }

    #[test]
    fn cut_values_and_reserved_bytes_are_refused() {
        check_whole(
            &rmp_serde::to_vec_named(&json!({"a": [1, -500, 1.5, "text"], "b": {"c": null}})).unwrap(),
        );
        let error = skip(&[0x92, 0x01, 0xc1], 0).unwrap_err();
        assert_eq!(error, FormError { kind: FormErrorKind::Reserved, offset: 2 });
        let error = members(&[0xc0, 0xc0], &[]).unwrap_err();
        assert_eq!(error, FormError { kind: FormErrorKind::Trailing, offset: 1 });
    }

    #[test]
    fn counts_nobody_can_keep_are_refused_at_once() {
        for bytes in [
            &[0xdd, 0xff, 0xff, 0xff, 0xff][..],
            &[0xdf, 0xff, 0xff, 0xff, 0xff],
            &[0xdb, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(skip(bytes, 0).unwrap_err().kind, FormErrorKind::End);
            assert_eq!(members(bytes, &["a"]).unwrap_err().kind, FormErrorKind::End);
        }
        let deep = [vec![0x91; 1_000_000], vec![0xc0]].concat();
        assert_eq!(skip(&deep, 0), Ok(deep.len()));
    }

    #[test]
    fn members_are_found_and_the_last_wins() {
        let bytes = [&[0x84, 0xa1, b'a', 1, 5, 2, 0xd9, 1, b'a', 3, 0xa1, b'b', 0x90][..]].concat();
        let found = members(&bytes, &["a", "b", "c"]).unwrap();
        assert_eq!(found.spans, [Some(9..10), Some(12..13), None]);
        assert!(found.is_object && found.has_others);
        assert!(members(&[0x80], &["a"]).unwrap().is_empty_object());
        assert!(!members(&[0x90], &["a"]).unwrap().is_object);
    }

    #[test]
    fn truth_is_javascripts() {
        let value = |value: Value| rmp_serde::to_vec_named(&value).unwrap();
        for falsy in [json!(null), json!(false), json!(0), json!(0.0), json!(-0.0), json!("")] {
            assert!(!is_truthy(&value(falsy.clone())), "{falsy}");
        }
        assert!(!is_truthy(&[0xd9, 0]) && !is_truthy(&[0xcd, 0, 0]) && !is_truthy(&[0xca, 0x7f, 0xc0, 0, 0]));
        for truthy in
            [json!(true), json!(1), json!(-1), json!(300), json!(0.5), json!("0"), json!([]), json!({})]
        {
            assert!(is_truthy(&value(truthy.clone())), "{truthy}");
        }
    }

    proptest! {
        #[test]
        fn written_strings_read_back(text in prop_oneof![".{0,40}", "a{200,300}", "é{40000}"]) {
            let mut out = BytesMut::new();
            write_string(&mut out, &text);
            prop_assert_eq!(as_str(&out), Some(text.as_str()));
            prop_assert_eq!(&out[..], &rmp_serde::to_vec(&text).unwrap()[..]);
        }

        #[test]
        fn any_bytes_are_stepped_over_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let ours = members(&bytes, &["a"]);
            let mut reader = rmp_serde::Deserializer::new(&bytes[..]);
            let theirs = <serde::de::IgnoredAny as serde::Deserialize>::deserialize(&mut reader).is_ok();
            // What the decoder reads to the end, the scanner reads too; the decoder also wants UTF-8 in places.
            if theirs && reader.get_ref().is_empty() {
                prop_assert!(ours.is_ok(), "{:02x?}", bytes);
            }
        }
    }
}
