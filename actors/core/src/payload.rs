// SPDX-License-Identifier: MIT OR Apache-2.0

//! One value, still in its wire form.

use std::error::Error;
use std::fmt;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{json, msgpack};

/// The encoding of a [`Payload`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// UTF-8 JSON, the form NestJS speaks.
    Json,
    /// MessagePack, for peers that agreed on it.
    MessagePack,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Json => "json",
            Format::MessagePack => "messagepack",
        })
    }
}

/// One value, still in its wire form. Cheap to clone: clones share the bytes.
///
/// The runtime hands payloads on without looking inside; they are decoded when a handler or a caller asks for a
/// type.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    format: Format,
    bytes: Bytes,
}

impl Payload {
    /// Wraps bytes that are exactly one value in `format`, without white space around it.
    ///
    /// The bytes are trusted: they are written to the wire as they are. Reading a payload of broken bytes gives
    /// errors, never a panic.
    pub fn new(format: Format, bytes: Bytes) -> Self {
        Payload { format, bytes }
    }

    /// Encodes a value. JSON is spelled as JavaScript would (see [`json::JsFormatter`]); structs become maps in
    /// MessagePack too.
    ///
    /// # Errors
    ///
    /// [`EncodeError`] if `value` cannot be expressed in the format.
    pub fn encode<T: Serialize + ?Sized>(format: Format, value: &T) -> Result<Self, EncodeError> {
        let bytes = match format {
            Format::Json => json::to_vec(value).map_err(|source| EncodeError::new(format, source))?,
            Format::MessagePack => {
                rmp_serde::to_vec_named(value).map_err(|source| EncodeError::new(format, source))?
            }
        };
        Ok(Payload { format, bytes: Bytes::from(bytes) })
    }

    /// The value null.
    pub fn null(format: Format) -> Self {
        let bytes = match format {
            Format::Json => Bytes::from_static(b"null"),
            Format::MessagePack => Bytes::from_static(&[msgpack::NIL]),
        };
        Payload { format, bytes }
    }

    /// Decodes the value into `T`.
    ///
    /// Where JSON from JavaScript and Rust types disagree, this holds:
    ///
    /// - a lone surrogate escape (`"\ud83d"`, legal in JavaScript) becomes U+FFFD in a Rust string;
    /// - a number beyond `f64` (`1e400`, infinity in JavaScript) is an error: no type can hold it, and NestJS
    ///   never sends one;
    /// - of duplicate members the last one wins in maps and `Value`, a derived struct refuses them;
    /// - nesting beyond 128 levels is an error in JSON, beyond 1024 in MessagePack; the payload itself can still
    ///   be passed on;
    /// - unknown members are ignored unless `T` denies them.
    ///
    /// # Errors
    ///
    /// [`DecodeError`], with the place in the text and the path to it where they are known.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        match self.format {
            Format::Json => match serde_json::from_slice(&self.bytes) {
                Ok(value) => Ok(value),
                Err(error) => self.decode_mended(error),
            },
            Format::MessagePack => {
                let mut reader = rmp_serde::Deserializer::new(&self.bytes[..]);
                let value = T::deserialize(&mut reader)
                    .map_err(|source| DecodeError::msgpack(source, &self.bytes))?;
                if !reader.get_ref().is_empty() {
                    let offset = self.bytes.len() - reader.get_ref().len();
                    return Err(DecodeError::at(
                        Format::MessagePack,
                        offset,
                        "trailing bytes after the value",
                    ));
                }
                Ok(value)
            }
        }
    }

    #[cold]
    fn decode_mended<T: DeserializeOwned>(&self, error: serde_json::Error) -> Result<T, DecodeError> {
        if error.is_data() || json::validate(&self.bytes).is_err() {
            return Err(DecodeError::json(error, &self.bytes));
        }
        match json::mend_surrogates(&self.bytes) {
            Some(mended) => {
                serde_json::from_slice(&mended).map_err(|error| DecodeError::json(error, &mended))
            }
            None => Err(DecodeError::json(error, &self.bytes)),
        }
    }

    /// The member `name` of a top-level object, sharing the bytes. `None` if the member is missing or the value
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
        Ok(span.map(|span| Payload { format: self.format, bytes: self.bytes.slice(span) }))
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
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The bytes, without the wrapper.
    pub fn into_bytes(self) -> Bytes {
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
    /// Byte strings, which only MessagePack has, become arrays of numbers in JSON.
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
        Ok(Payload { format: to, bytes: Bytes::from(bytes) })
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

    fn msgpack(source: rmp_serde::decode::Error, _bytes: &[u8]) -> Self {
        DecodeError { format: Format::MessagePack, path: None, offset: None, source: source.into() }
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
