// SPDX-License-Identifier: MIT OR Apache-2.0

//! One value, still in its wire form.

use std::error::Error;
use std::fmt;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::packet::Raw;
use crate::{json, msgpack};

/// The encoding of a [`Payload`].
///
/// A whole word, so that payloads, and the many types around them that tell their variants by it, are moved by whole
/// words: moving them by bytes, as one byte followed by padding is, made the processor wait at every move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u64)]
#[non_exhaustive]
pub enum Format {
    /// UTF-8 JSON, the form NestJS speaks.
    Json,
    /// MessagePack, for peers that agreed on it.
    MessagePack,
}

impl Format {
    /// Decodes one value, by the rules of [`Payload::decode`].
    pub(crate) fn decode<T: DeserializeOwned>(self, bytes: &[u8]) -> Result<T, DecodeError> {
        match self {
            Format::Json => match serde_json::from_slice(bytes) {
                Ok(value) => Ok(value),
                Err(error) => decode_mended(bytes, error),
            },
            Format::MessagePack => {
                // Checking first names the byte of a malformed value, which the decoder does not.
                msgpack::members(bytes, &[])
                    .map_err(|error| DecodeError::at(Format::MessagePack, error.offset, error))?;
                T::deserialize(&mut msgpack::reader(bytes)).map_err(|source| DecodeError {
                    format: Format::MessagePack,
                    path: None,
                    offset: None,
                    source: source.into(),
                })
            }
        }
    }
}

#[cold]
fn decode_mended<T: DeserializeOwned>(bytes: &[u8], error: serde_json::Error) -> Result<T, DecodeError> {
    if error.is_data() || json::validate(bytes).is_err() {
        return Err(DecodeError::json(error, bytes));
    }
    match json::mend_surrogates(bytes) {
        Some(mended) => serde_json::from_slice(&mended).map_err(|error| DecodeError::json(error, &mended)),
        None => Err(DecodeError::json(error, bytes)),
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Json => "json",
            Format::MessagePack => "messagepack",
        })
    }
}

/// One value, still in its wire form. Cheap to clone: a short one (32 bytes) is copied, clones of a longer one share its
/// bytes.
///
/// The runtime hands payloads on without looking inside; they are decoded when a handler or a caller asks for a
/// type.
#[derive(Clone, PartialEq, Eq)]
// In this order: see `Raw`.
#[repr(C)]
pub struct Payload {
    bytes: Raw,
    format: Format,
}

impl Payload {
    /// Wraps bytes that are exactly one value in `format`, without white space around it.
    ///
    /// The bytes are trusted: they are written to the wire as they are. Reading a payload of broken bytes gives
    /// errors, never a panic.
    pub fn new(format: Format, bytes: impl Into<Raw>) -> Self {
        Payload { format, bytes: bytes.into() }
    }

    /// Its bytes, to be filled in place.
    pub(crate) fn raw_mut(&mut self, format: Format) -> &mut Raw {
        self.format = format;
        &mut self.bytes
    }

    /// Encodes a value. JSON is spelled as JavaScript would (see [`json::JsFormatter`]); structs become maps in
    /// MessagePack too.
    ///
    /// # Errors
    ///
    /// [`EncodeError`] if `value` cannot be expressed in the format.
    pub fn encode<T: Serialize + ?Sized>(format: Format, value: &T) -> Result<Self, EncodeError> {
        let mut payload = Payload::new(format, Raw::default());
        payload.fill(value)?;
        Ok(payload)
    }

    /// Encodes a value in this payload's format to where it stays. After an error nothing good is there.
    pub(crate) fn fill<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), EncodeError> {
        match self.format {
            Format::Json => {
                json::put_raw(value, &mut self.bytes).map_err(|source| EncodeError::new(Format::Json, source))
            }
            Format::MessagePack => {
                let packed = rmp_serde::to_vec_named(value)
                    .map_err(|source| EncodeError::new(Format::MessagePack, source))?;
                self.bytes = packed.into();
                Ok(())
            }
        }
    }

    /// The value null.
    pub fn null(format: Format) -> Self {
        let bytes: &'static [u8] = match format {
            Format::Json => b"null",
            Format::MessagePack => &[msgpack::NIL],
        };
        Payload::new(format, Bytes::from_static(bytes))
    }

    /// Decodes the value into `T`.
    ///
    /// Where JSON from JavaScript and Rust types disagree, this holds:
    ///
    /// - a lone surrogate escape (`"\ud83d"`, legal in JavaScript) becomes U+FFFD in a Rust string;
    /// - a number beyond `f64` (`1e400`, infinity in JavaScript) is an error: no type can hold it, and NestJS
    ///   never sends one;
    /// - of duplicate members the last one wins in maps and `Value`, a derived struct refuses them;
    /// - nesting beyond 128 levels is an error, in both formats; the payload itself can still be passed on;
    /// - unknown members are ignored unless `T` denies them.
    ///
    /// # Errors
    ///
    /// [`DecodeError`], with the place in the text and the path to it where they are known.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        self.format.decode(&self.bytes)
    }

    /// The member `name` of a top-level object; a long one shares the bytes. `None` if the member is missing or the value
    /// is not an object; the last of duplicates wins.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] if the bytes are not one well-formed value.
    pub fn property(&self, name: &str) -> Result<Option<Payload>, DecodeError> {
        let span = match self.format {
            Format::Json => json::member(&self.bytes, name)
                .map_err(|error| DecodeError::at(self.format, error.offset, error))?,
            Format::MessagePack => msgpack::member(&self.bytes, name)
                .map_err(|error| DecodeError::at(self.format, error.offset, error))?,
        };
        Ok(span.map(|span| Payload { format: self.format, bytes: self.bytes.part(span) }))
    }

    /// Whether this is the value null.
    pub fn is_null(&self) -> bool {
        match self.format {
            Format::Json => &self.bytes[..] == b"null",
            Format::MessagePack => self.bytes[..] == [msgpack::NIL],
        }
    }

    /// The encoding of the bytes.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, without the wrapper. Those of a short value are copied.
    pub fn into_bytes(self) -> Bytes {
        self.bytes.into()
    }

    /// The bytes as a value of a packet.
    pub fn into_raw(self) -> Raw {
        self.bytes
    }

    /// Decodes into a generic JSON value. Members come out in the order of their names.
    ///
    /// # Errors
    ///
    /// As [`Payload::decode`].
    pub fn to_value(&self) -> Result<serde_json::Value, DecodeError> {
        self.decode()
    }

    /// The same value in another format; keeps the order of members. Costs nothing if the format is the same.
    ///
    /// Byte strings, which only MessagePack has, become arrays of numbers in JSON; so do its strings that are not
    /// UTF-8.
    ///
    /// # Errors
    ///
    /// [`EncodeError`] if the bytes are broken or the other format cannot express the value.
    pub fn transcode(&self, to: Format) -> Result<Payload, EncodeError> {
        if self.format == to {
            return Ok(self.clone());
        }
        let bytes = match to {
            Format::MessagePack => match msgpack::from_json(&self.bytes) {
                Err(error) => match json::mend_surrogates(&self.bytes) {
                    Some(mended) => msgpack::from_json(&mended),
                    None => Err(error),
                },
                done => done,
            }
            .map_err(|source| EncodeError { format: to, source })?,
            Format::Json => {
                msgpack::to_json(&self.bytes).map_err(|source| EncodeError { format: to, source })?
            }
        };
        Ok(Payload::new(to, bytes))
    }
}

/// Shows text for JSON and hexadecimal digits for MessagePack, at most 256 bytes of it.
impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 256;
        let shown = &self.bytes[..self.bytes.len().min(SHOWN)];
        f.write_str("Payload(")?;
        match self.format {
            Format::Json => f.write_str(&String::from_utf8_lossy(shown))?,
            Format::MessagePack => {
                f.write_str("0x")?;
                shown.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
            }
        }
        if self.bytes.len() > SHOWN {
            write!(f, "… {} bytes", self.bytes.len())?;
        }
        f.write_str(")")
    }
}

// === Errors ===

/// A value could not be put into a format.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode the value as {format}: {source}")]
pub struct EncodeError {
    format: Format,
    source: Box<dyn Error + Send + Sync>,
}

impl EncodeError {
    pub(crate) fn new(format: Format, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        EncodeError { format, source: source.into() }
    }

    /// The format that was wanted.
    pub fn format(&self) -> Format {
        self.format
    }
}

/// Bytes could not be read as a value of the wanted type.
#[derive(Debug, thiserror::Error)]
#[error("cannot decode {format}{}: {source}", Place(.path.as_deref(), *.offset))]
pub struct DecodeError {
    format: Format,
    path: Option<String>,
    offset: Option<usize>,
    source: Box<dyn Error + Send + Sync>,
}

struct Place<'a>(Option<&'a str>, Option<usize>);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place(Some(path), _) => write!(f, " at `{path}`"),
            Place(None, Some(offset)) => write!(f, " at byte {offset}"),
            Place(None, None) => Ok(()),
        }
    }
}

impl DecodeError {
    fn at(format: Format, offset: usize, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        DecodeError { format, path: None, offset: Some(offset), source: source.into() }
    }

    fn json(source: serde_json::Error, bytes: &[u8]) -> Self {
        let offset = json::offset_of(bytes, source.line(), source.column());
        let path = offset.and_then(|offset| json::path_at(bytes, offset));
        DecodeError { format: Format::Json, path, offset, source: source.into() }
    }

    /// The format of the bytes.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The path to the value that did not fit, as `user.tags[2]`, if it is known and not the whole value.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The byte at which reading stopped, if it is known.
    pub fn offset(&self) -> Option<usize> {
        self.offset
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    fn text(json: &str) -> Payload {
        Payload::new(Format::Json, Bytes::copy_from_slice(json.as_bytes()))
    }

    #[track_caller]
    fn check_decode<T: DeserializeOwned + PartialEq + fmt::Debug>(json: &str, expected: T) {
        assert_eq!(text(json).decode::<T>().unwrap(), expected, "{json}");
    }

    #[track_caller]
    fn check_refused<T: DeserializeOwned + fmt::Debug>(
        payload: &Payload,
        place: (Option<&str>, Option<usize>),
    ) {
        let error = payload.decode::<T>().unwrap_err();
        assert_eq!((error.path(), error.offset()), place, "{error}");
    }

    #[test]
    fn lone_surrogates_become_replacement_characters() {
        check_decode(r#""a\ud83d""#, "a\u{fffd}".to_owned());
        check_decode(r#"{"\ude00":["\ud83d\ude00","\ud83dx"]}"#, json!({"\u{fffd}": ["😀", "\u{fffd}x"]}));
        check_decode(r#""\\ud83d""#, r"\ud83d".to_owned());
    }

    #[test]
    fn numbers_no_float_holds_are_refused() {
        check_refused::<f64>(&text("1e400"), (None, Some(4)));
        check_decode("1e-400", 0.0);
        assert_eq!(text(r#"{"a":1e400,"b":2}"#).property("a").unwrap().unwrap().bytes(), b"1e400");
    }

    #[test]
    fn floats_are_read_to_the_last_bit() {
        for bits in [0x5b5b_5b5b_5b5b_5b5b_u64, 0x0000_0000_0000_0001, 0x7fef_ffff_ffff_ffff] {
            let value = f64::from_bits(bits);
            let payload = Payload::encode(Format::Json, &value).unwrap();
            assert_eq!(payload.decode::<f64>().unwrap().to_bits(), bits, "{payload:?}");
            assert_eq!(payload.transcode(Format::MessagePack).unwrap().decode::<f64>().unwrap(), value);
        }
    }

    #[test]
    fn of_duplicate_members_maps_take_the_last_and_structs_refuse() {
        #[derive(Debug, Deserialize)]
        #[allow(dead_code)]
        struct One {
            a: u8,
        }
        check_decode(r#"{"a":1,"a":2}"#, BTreeMap::from([("a".to_owned(), 2)]));
        assert!(text(r#"{"a":1,"a":2}"#).decode::<One>().is_err());
    }

    #[test]
    fn errors_name_the_place() {
        #[derive(Debug, Deserialize)]
        #[allow(dead_code)]
        struct User {
            tags: Vec<u8>,
        }
        check_refused::<User>(&text(r#"{"tags":[1,"x"]}"#), (Some("tags[1]"), Some(13)));
        check_refused::<User>(&text(r#"{"tags":[1,2"#), (None, Some(11)));
        check_refused::<User>(&text("{\n\"tags\":\n{}}"), (Some("tags"), Some(10)));
        check_refused::<u8>(&text("\"x\""), (None, Some(2)));
        let packed = Payload::encode(Format::MessagePack, &json!({"tags": [1, "x"]})).unwrap();
        assert!(packed.decode::<User>().is_err());
        let mut trailing = Payload::encode(Format::MessagePack, &1).unwrap().into_bytes().to_vec();
        trailing.push(1);
        check_refused::<u8>(&Payload::new(Format::MessagePack, trailing), (None, Some(1)));
    }

    #[test]
    fn nesting_beyond_the_decoder_is_an_error() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        assert!(text(&deep).to_value().is_err());
        assert_eq!(text(&deep).property("x").unwrap(), None);
        assert!(text(&deep).transcode(Format::MessagePack).is_err());
        let packed = [vec![0x91; 100_000], vec![0xc0]].concat();
        let packed = Payload::new(Format::MessagePack, packed);
        assert!(packed.decode::<serde::de::IgnoredAny>().is_err());
        assert!(packed.transcode(Format::Json).is_err());
    }

    #[test]
    fn long_properties_share_the_bytes_and_short_ones_are_copied() {
        for format in [Format::Json, Format::MessagePack] {
            let long = json!({"b": [1, "x"], "d": "y".repeat(32)});
            let whole = Payload::encode(format, &json!({"a": long, "c": null})).unwrap();
            let a = whole.property("a").unwrap().unwrap();
            assert_eq!(a.to_value().unwrap(), long);
            let b = a.property("b").unwrap().unwrap();
            assert_eq!(b.to_value().unwrap(), json!([1, "x"]));
            assert_eq!(b.property("x").unwrap(), None);
            let place = |payload: &Payload| payload.bytes().as_ptr() as usize;
            assert!((place(&whole)..place(&whole) + whole.bytes().len()).contains(&place(&a)));
            assert!(whole.property("c").unwrap().unwrap().is_null());
            assert_eq!(whole.property("d").unwrap(), None);
            assert_eq!(a.property("b").unwrap().unwrap().property("0").unwrap(), None);
        }
        assert_eq!(text(r#"{"a":1,"a":2}"#).property("a").unwrap(), Some(text("2")));
        assert_eq!(text("{\"a\":1,x}").property("a").unwrap_err().offset(), Some(7));
    }

    #[test]
    fn null_is_null_in_every_format() {
        for format in [Format::Json, Format::MessagePack] {
            assert!(Payload::null(format).is_null());
            assert_eq!(Payload::null(format), Payload::encode(format, &()).unwrap());
            assert_eq!(Payload::null(format).decode::<Option<u8>>().unwrap(), None);
        }
    }

    #[test]
    fn transcoding_keeps_values_and_the_order_of_members() {
        let json = text(r#"{"z":1,"a":[1.5,-7,"é",null,true,18446744073709551615],"m":{}}"#);
        let packed = json.transcode(Format::MessagePack).unwrap();
        assert_eq!(packed.to_value().unwrap(), json.to_value().unwrap());
        assert_eq!(packed.transcode(Format::Json).unwrap(), json);
        assert_eq!(
            text(r#""\ud83d""#).transcode(Format::MessagePack).unwrap().decode::<String>().unwrap(),
            "\u{fffd}"
        );
    }

    #[test]
    fn what_only_messagepack_has_is_rewritten_or_refused() {
        let transcode = |bytes: &[u8]| {
            let payload = Payload::new(Format::MessagePack, Bytes::copy_from_slice(bytes));
            payload.transcode(Format::Json).map(|it| String::from_utf8(it.into_bytes().to_vec()).unwrap())
        };
        assert_eq!(transcode(&[0xc4, 2, 1, 255]).unwrap(), "[1,255]");
        assert_eq!(transcode(&[0x81, 5, 0xc0]).unwrap(), r#"{"5":null}"#);
        assert_eq!(transcode(&[0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 0]).unwrap(), "null");
        assert_eq!(transcode(&[0xca, 0x3d, 0xcc, 0xcc, 0xcd]).unwrap(), "0.10000000149011612");
        assert!(transcode(&[0xd4, 1, 2]).is_err(), "an extension");
        assert!(transcode(&[0x81, 0x90, 0xc0]).is_err(), "an array as key");
        assert_eq!(transcode(&[0xa2, 0xff, 0xff]).unwrap(), "[255,255]", "a string that is not utf-8");
        assert!(transcode(&[0xc0, 0xc0]).is_err(), "two values");
    }

    #[test]
    fn debug_shows_the_start() {
        assert_eq!(format!("{:?}", text("[1]")), "Payload([1])");
        assert_eq!(format!("{:?}", Payload::null(Format::MessagePack)), "Payload(0xc0)");
        let long = format!("{:?}", text(&"7".repeat(1000)));
        assert!(long.len() < 300 && long.ends_with("… 1000 bytes)"), "{long}");
    }
}
