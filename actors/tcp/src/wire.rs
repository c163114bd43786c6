// SPDX-License-Identifier: MIT OR Apache-2.0

//! Frames: where one message ends and the next begins. Pure; knows no socket and no packet.
//!
//! [`NestFraming`] is what NestJS speaks, `<length>#<json>` with the length in UTF-16 code units.
//! [`LengthDelimited`] is for peers that agreed on binary messages.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use martlet_core::json::is_ascii;

/// The `maxBufferSize` of NestJS, in UTF-16 code units.
pub const DEFAULT_MAX_FRAME: usize = 134_217_728;

/// Bounds on what a peer may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrameLimits {
    /// The most a frame may take, prefix included: UTF-16 code units for [`NestFraming`], bytes for
    /// [`LengthDelimited`]. Default [`DEFAULT_MAX_FRAME`].
    pub max_frame: usize,
    /// The most digits in the length prefix of [`NestFraming`]. Default 20.
    pub max_prefix_digits: usize,
    /// The most bytes before the `#` of [`NestFraming`]. Default 64.
    pub max_prefix_bytes: usize,
}

impl Default for FrameLimits {
    fn default() -> Self {
        FrameLimits { max_frame: DEFAULT_MAX_FRAME, max_prefix_digits: 20, max_prefix_bytes: 64 }
    }
}

impl FrameLimits {
    /// The same limits with another largest frame.
    pub fn with_max_frame(mut self, max_frame: usize) -> Self {
        self.max_frame = max_frame;
        self
    }
}

/// How far the reading of the frame at the front of a buffer has come. One per connection and direction; it belongs
/// to that buffer, so the buffer may only grow at its end between two calls.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FrameState {
    /// Bytes looked at, from the front of the buffer.
    scanned: usize,
    /// The prefix was read: the bytes it took, and what it says.
    prefix: Option<(usize, usize)>,
    /// UTF-16 code units counted in the body so far.
    units: usize,
    /// The body has bytes that are not UTF-8.
    broken: bool,
}

impl FrameState {
    /// Bytes that a framing has looked at in vain, from the front of the buffer: 0 at first. For framings from elsewhere, which
    /// set it.
    pub fn scanned(&self) -> usize {
        self.scanned
    }

    /// Says how many bytes need not be looked at again; 0 when a frame has been taken off.
    pub fn set_scanned(&mut self, scanned: usize) {
        self.scanned = scanned;
    }
}

/// A place reserved by [`Framing::begin`], to be given to [`Framing::finish`].
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct FrameMark {
    start: usize,
    body: usize,
}

impl FrameMark {
    /// A frame that begins at `start` of the buffer, its body at `body`.
    pub fn new(start: usize, body: usize) -> Self {
        Self { start, body }
    }

    /// Where the frame begins.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Where its body begins.
    pub fn body(&self) -> usize {
        self.body
    }
}

/// Splits a byte stream into messages and joins messages to one. Replaceable, as NestJS's `socketClass` is.
pub trait Framing: Send + Sync + fmt::Debug + 'static {
    /// A short name for logs and options.
    fn name(&self) -> &'static str;

    /// Whether a message may be any bytes; if not, it must be UTF-8.
    fn binary_safe(&self) -> bool;

    /// Splits one whole frame off the front of `buf` and returns its body, or `None` if there is no whole frame
    /// yet. Work done on a part is remembered in `state`, so a frame costs the same however it is cut.
    ///
    /// # Errors
    ///
    /// [`FrameError`]; the connection cannot go on.
    fn decode(
        &self,
        buf: &mut BytesMut,
        state: &mut FrameState,
        limits: &FrameLimits,
    ) -> Result<Option<Bytes>, FrameError>;

    /// Where the body of the whole frame at the front of `buf` is, if that is plain to see and the body is ASCII; the frame
    /// ends with it. `None` wherever it is not, also where [`Framing::decode`] would find one.
    fn peek(&self, _buf: &[u8], _state: &FrameState, _limits: &FrameLimits) -> Option<Range<usize>> {
        None
    }

    /// Reserves room for a prefix at the end of `out`. Append the body next, then call [`Framing::finish`].
    /// `hint` is about how long the body will be; a good guess saves a copy, a bad one does no harm.
    fn begin(&self, out: &mut BytesMut, hint: usize) -> FrameMark;

    /// Puts the prefix before the body that was appended since [`Framing::begin`].
    ///
    /// # Errors
    ///
    /// [`FrameError`] if the framing cannot carry the body; `out` is then as it was before `begin`.
    fn finish(&self, out: &mut BytesMut, mark: FrameMark) -> Result<(), FrameError>;

    /// Appends a frame around `body`.
    ///
    /// # Errors
    ///
    /// As [`Framing::finish`].
    fn encode(&self, body: &[u8], out: &mut BytesMut) -> Result<(), FrameError> {
        let mark = self.begin(out, body.len());
        out.put_slice(body);
        self.finish(out, mark)
    }

    /// Whether the buffer holds the start of a frame, which a peer that fell silent will not complete. Any stray
    /// byte counts.
    fn has_partial(&self, buf: &BytesMut) -> bool {
        !buf.is_empty()
    }
}

/// Appends a frame whose body `write` appends, without copying the body twice. After an error `out` is as it was
/// before. `hint` is as in [`Framing::begin`].
///
/// # Errors
///
/// What `write` returns, and what [`Framing::finish`] does.
pub fn encode_with<F, E>(
    framing: &F,
    out: &mut BytesMut,
    hint: usize,
    write: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<(), E>
where
    F: Framing + ?Sized,
    E: From<FrameError>,
{
    let mark = framing.begin(out, hint);
    if let Err(error) = write(out) {
        out.truncate(mark.start);
        return Err(error);
    }
    Ok(framing.finish(out, mark)?)
}

/// Why a byte stream cannot be split further, or a body cannot be framed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The prefix is not a number, or too long to be one.
    #[error("the length prefix {prefix:?} is not a number")]
    CorruptLength {
        /// The start of what stood before the `#`.
        prefix: String,
    },
    /// The length is zero or negative.
    #[error("the frame length {prefix:?} is not positive")]
    NotPositive {
        /// What stood before the `#`.
        prefix: String,
    },
    /// The frame is longer than the limit.
    #[error("the frame length {length} exceeds the limit of {limit}")]
    TooLong {
        /// The length, prefix included.
        length: usize,
        /// The limit it exceeds.
        limit: usize,
    },
    /// The length ends between the two code units of one character.
    #[error("the frame length ends inside a character")]
    SplitCharacter,
    /// The body to be sent is not UTF-8, and the framing carries text only.
    #[error("the body to be framed is not utf-8")]
    NotText,
    /// The body to be sent is empty; NestJS takes such a frame as a fault.
    #[error("the body to be framed is empty")]
    Empty,
    /// Anything that a framing from elsewhere finds wrong.
    #[error("malformed frame: {reason}")]
    Other {
        /// What is wrong.
        reason: String,
    },
}

impl FrameError {
    /// What a NestJS server logs for this fault, verbatim.
    pub fn server_text(&self) -> &'static str {
        match self {
            FrameError::CorruptLength { .. } => {
                "Corrupted length value of the received data supplied in a packet"
            }
            _ => "The invalid received message from tcp server",
        }
    }

    /// What a NestJS client logs for this fault, verbatim where it has a text of its own.
    pub fn client_text(&self) -> Cow<'static, str> {
        match self {
            FrameError::CorruptLength { prefix } => {
                Cow::Owned(format!("Corrupted length value \"{prefix}\" supplied in a packet"))
            }
            FrameError::TooLong { length, .. } => {
                Cow::Owned(format!("The packet length ({length}) exceeds the maximum allowed length"))
            }
            other => Cow::Borrowed(other.server_text()),
        }
    }
}

// === NestFraming ===

/// `<length>#<json>`: decimal digits that count the UTF-16 code units of the text, a `#`, the text in UTF-8.
///
/// Reading accepts the prefixes NestJS accepts (JavaScript's `parseInt`): white space before, a sign, leading zeros,
/// and anything after the digits, so `39`, `\r\n 39`, `+39`, `00039`, `39abc` and `39.9` are one length. Bytes
/// of a body that are not UTF-8 become U+FFFD and count as that, as in NestJS; the returned body is always UTF-8.
///
/// It differs from NestJS where that only means failing sooner or failing less: a frame beyond the limit is refused
/// when its length is known rather than when it has been buffered; frames that arrive together do not count
/// together; a prefix beyond [`FrameLimits::max_prefix_digits`] or [`FrameLimits::max_prefix_bytes`] is corrupt.
#[derive(Debug, Clone, Copy, Default)]
pub struct NestFraming;

/// What stands before the `#` when all is well.
fn plain_length(prefix: &[u8], limits: &FrameLimits) -> Option<usize> {
    // 18 digits fit whatever they are.
    if prefix.is_empty() || prefix.len() > limits.max_prefix_digits.min(18) {
        return None;
    }
    prefix
        .iter()
        .try_fold(0, |value, &digit| digit.is_ascii_digit().then(|| value * 10 + usize::from(digit - b'0')))
}

/// What JavaScript's `parseInt(prefix, 10)` gives, without what it would refuse later.
#[cold]
fn sloppy_length(prefix: &[u8], limits: &FrameLimits) -> Result<usize, FrameError> {
    let text = String::from_utf8_lossy(&prefix[..prefix.len().min(limits.max_prefix_bytes)]);
    let corrupt = || FrameError::CorruptLength { prefix: text.chars().take(64).collect() };
    // TCP-7.
    if prefix.len() > limits.max_prefix_bytes {
        return Err(corrupt());
    }
    let trimmed = text.trim_start_matches(is_js_space);
    let (negative, digits) = match trimmed.strip_prefix(['+', '-']) {
        Some(digits) => (trimmed.starts_with('-'), digits),
        None => (false, trimmed),
    };
    let count = digits.bytes().take_while(u8::is_ascii_digit).count();
    if count == 0 || count > limits.max_prefix_digits {
        return Err(corrupt());
    }
    let length = digits[..count].parse::<u128>().map_err(|_| corrupt())?;
    if negative || length == 0 {
        return Err(FrameError::NotPositive { prefix: text.into_owned() });
    }
    // Beyond the address space is beyond every limit.
    Ok(usize::try_from(length).unwrap_or(usize::MAX))
}

/// White space and line ends of ECMAScript, which include the byte order mark.
fn is_js_space(character: char) -> bool {
    (character.is_whitespace() && character != '\u{85}') || character == '\u{feff}'
}

// TCP-1, TCP-2, TCP-3.
impl Framing for NestFraming {
    fn name(&self) -> &'static str {
        "nest"
    }

    fn binary_safe(&self) -> bool {
        false
    }

    fn decode(
        &self,
        buf: &mut BytesMut,
        state: &mut FrameState,
        limits: &FrameLimits,
    ) -> Result<Option<Bytes>, FrameError> {
        let (prefix, length) = match state.prefix {
            Some(known) => known,
            None => {
                let Some(found) = memchr::memchr(b'#', &buf[state.scanned..]) else {
                    state.scanned = buf.len();
                    return match buf.len() > limits.max_prefix_bytes {
                        true => sloppy_length(buf, limits).map(|_| None),
                        false => Ok(None),
                    };
                };
                let end = state.scanned + found;
                let length = match plain_length(&buf[..end], limits) {
                    Some(length) if length > 0 => length,
                    _ => sloppy_length(&buf[..end], limits)?,
                };
                // The prefix counts in characters, too; where it is not ASCII, bytes are on the safe side.
                let whole = length.saturating_add(end + 1);
                // TCP-6.
                if whole > limits.max_frame {
                    return Err(FrameError::TooLong { length: whole, limit: limits.max_frame });
                }
                state.scanned = end + 1;
                state.prefix = Some((end + 1, length));
                (end + 1, length)
            }
        };

        // A unit takes a byte at least.
        let least = state.scanned + (length - state.units);
        if buf.len() < least {
            return Ok(None);
        }
        if state.units > 0 || !is_ascii(&buf[state.scanned..least]) {
            if !count_units(buf, state, length)? {
                return Ok(None);
            }
        } else {
            state.scanned = least;
        }
        let FrameState { scanned: end, broken, .. } = std::mem::take(state);
        buf.advance(prefix);
        let body = buf.split_to(end - prefix).freeze();
        Ok(Some(if broken { Bytes::from(String::from_utf8_lossy(&body).into_owned()) } else { body }))
    }

    fn peek(&self, buf: &[u8], state: &FrameState, limits: &FrameLimits) -> Option<Range<usize>> {
        if state.scanned > 0 || state.prefix.is_some() {
            return None;
        }
        let digits = buf.iter().take(8).position(|byte| *byte == b'#')?;
        let length = plain_length(&buf[..digits], limits).filter(|length| *length > 0)?;
        let body = digits + 1..digits + 1 + length;
        (body.end <= limits.max_frame && is_ascii(buf.get(body.clone())?)).then_some(body)
    }

    fn begin(&self, out: &mut BytesMut, hint: usize) -> FrameMark {
        let start = out.len();
        let room = decimal_digits(hint.max(1)) + 1;
        out.reserve(room + hint);
        out.put_slice(&[b'#'; 24][..room]);
        FrameMark { start, body: start + room }
    }

    fn finish(&self, out: &mut BytesMut, mark: FrameMark) -> Result<(), FrameError> {
        let body = &out[mark.body..];
        let units =
            if is_ascii(body) { Some(body.len()) } else { std::str::from_utf8(body).ok().map(utf16_len) };
        let refused = match units {
            None => Some(FrameError::NotText),
            Some(0) => Some(FrameError::Empty),
            Some(_) => None,
        };
        if let Some(error) = refused {
            out.truncate(mark.start);
            return Err(error);
        }
        let mut number = units.unwrap_or_default();
        let digits = decimal_digits(number);
        let (end, wanted) = (out.len(), mark.start + digits + 1);
        if wanted < mark.body {
            out.copy_within(mark.body..end, wanted);
            out.truncate(end - (mark.body - wanted));
        } else if wanted > mark.body {
            out.put_bytes(0, wanted - mark.body);
            out.copy_within(mark.body..end, wanted);
        }
        for place in out[mark.start..mark.start + digits].iter_mut().rev() {
            *place = b'0' + (number % 10) as u8;
            number /= 10;
        }
        out[mark.start + digits] = b'#';
        Ok(())
    }
}

fn decimal_digits(number: usize) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// The UTF-16 code units of a text: one per character, two above U+FFFF.
fn utf16_len(text: &str) -> usize {
    // Every byte but a continuation starts a character; those from 0xf0 start one of two units.
    text.bytes().map(|byte| usize::from(byte as i8 >= -0x40) + usize::from(byte >= 0xf0)).sum()
}

/// Counts on from where `state` is until there are `length` units (true) or no more whole characters (false).
fn count_units(buf: &[u8], state: &mut FrameState, length: usize) -> Result<bool, FrameError> {
    while state.units < length {
        let rest = &buf[state.scanned..];
        let (bytes, units) = match rest {
            [] => return Ok(false),
            [0x00..=0x7f, ..] => {
                let run = &rest[..rest.len().min(length - state.units)];
                let ascii = run.iter().take_while(|byte| byte.is_ascii()).count();
                (ascii, ascii)
            }
            _ => match character(rest) {
                Character::Valid(bytes) => (bytes, if bytes == 4 { 2 } else { 1 }),
                // TCP-4.
                Character::Invalid(bytes) => {
                    state.broken = true;
                    (bytes, 1)
                }
                Character::Partial => return Ok(false),
            },
        };
        state.units += units;
        state.scanned += bytes;
    }
    if state.units > length {
        return Err(FrameError::SplitCharacter);
    }
    Ok(true)
}

enum Character {
    /// That many bytes are a character.
    Valid(usize),
    /// That many bytes are the longest start of a character that cannot be completed; they become one U+FFFD.
    Invalid(usize),
    /// More bytes decide.
    Partial,
}

/// What the non-empty `bytes` start with.
fn character(bytes: &[u8]) -> Character {
    // The second byte is where overlong forms, surrogates and numbers beyond Unicode show.
    let (length, second) = match bytes[0] {
        0x00..=0x7f => return Character::Valid(1),
        0xc2..=0xdf => (2, 0x80..=0xbf),
        0xe0 => (3, 0xa0..=0xbf),
        0xe1..=0xec | 0xee | 0xef => (3, 0x80..=0xbf),
        0xed => (3, 0x80..=0x9f),
        0xf0 => (4, 0x90..=0xbf),
        0xf1..=0xf3 => (4, 0x80..=0xbf),
        0xf4 => (4, 0x80..=0x8f),
        _ => return Character::Invalid(1),
    };
    for at in 1..length {
        match bytes.get(at) {
            None => return Character::Partial,
            Some(byte) if at == 1 && second.contains(byte) => {}
            Some(0x80..=0xbf) if at > 1 => {}
            Some(_) => return Character::Invalid(at),
        }
    }
    Character::Valid(length)
}

// === LengthDelimited ===

/// The number of bytes as four bytes, most significant first, then the bytes. Carries anything, also nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct LengthDelimited;

// TCP-29.
impl Framing for LengthDelimited {
    fn name(&self) -> &'static str {
        "length-delimited"
    }

    fn binary_safe(&self) -> bool {
        true
    }

    fn decode(
        &self,
        buf: &mut BytesMut,
        state: &mut FrameState,
        limits: &FrameLimits,
    ) -> Result<Option<Bytes>, FrameError> {
        let Some(head) = buf.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*head) as usize;
        let whole = length.saturating_add(4);
        if whole > limits.max_frame {
            return Err(FrameError::TooLong { length: whole, limit: limits.max_frame });
        }
        if buf.len() < whole {
            return Ok(None);
        }
        *state = FrameState::default();
        buf.advance(4);
        Ok(Some(buf.split_to(length).freeze()))
    }

    fn begin(&self, out: &mut BytesMut, hint: usize) -> FrameMark {
        let start = out.len();
        out.reserve(4 + hint);
        out.put_u32(0);
        FrameMark { start, body: start + 4 }
    }

    fn finish(&self, out: &mut BytesMut, mark: FrameMark) -> Result<(), FrameError> {
        let length = out.len() - mark.body;
        let Ok(prefix) = u32::try_from(length) else {
            out.truncate(mark.start);
            return Err(FrameError::TooLong { length, limit: u32::MAX as usize });
        };
        out[mark.start..mark.body].copy_from_slice(&prefix.to_be_bytes());
        Ok(())
    }
}
