// SPDX-License-Identifier: MIT OR Apache-2.0

//! JSON as JavaScript writes it, and a scanner that finds the members of an envelope without parsing them.
//!
//! Two halves, both pure:
//!
//! - writing: [`to_vec`], [`write_string`] and [`JsFormatter`] give the bytes `JSON.stringify` would give
//!   (`3` rather than `3.0`, `1.5e+300`, `null` for what is not finite);
//! - reading: [`Scanner`] walks a text once, checks all of its syntax and hands out byte spans. It neither
//!   allocates (up to 128 levels of nesting) nor recurses (at any level): one bit of memory is kept per
//!   level, so the only bound on nesting is the size of the frame.
//!
//! The accepted grammar is RFC 8259, as `JSON.parse` has it. Lone surrogate escapes (`"\ud83d"`) and numbers
//! no float can hold (`1e400`) are syntax, so they pass here; what becomes of them is decided where a value is
//! made of them (see [`Payload::decode`](crate::payload::Payload::decode)).

use std::io;
use std::ops::Range;

use std::cell::RefCell;

use bytes::{BufMut, BytesMut};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};

use crate::packet::Raw;

// === Writing ===

/// Formats like `JSON.stringify`: compact, with JavaScript's spelling of numbers.
///
/// An `f64` prints the shortest digits that read back as the same value, in JavaScript's notation; `-0` prints
/// `0`. An `f32` prints the shortest digits that read back as the same `f32` (`0.1`, not
/// `0.10000000149011612`): JavaScript has no such type to imitate, and a reader gets the number the author
/// meant. NaN and the infinities print `null`. Integers print in full, also above 2^53, where a JavaScript
/// reader rounds them.
#[derive(Debug, Clone, Copy, Default)]
pub struct JsFormatter;

impl Formatter for JsFormatter {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(ryu_js::Buffer::new().format_finite(value).as_bytes())
    }

    fn write_f32<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        writer.write_all(ryu_js::Buffer::new().format_finite(value).as_bytes())
    }
}

/// Serializes `value` to a new vector, spelled as JavaScript would.
///
/// # Errors
///
/// What `value`'s own `Serialize` reports, and map keys JSON cannot express.
pub fn to_vec<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = Vec::with_capacity(128);
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, JsFormatter))?;
    Ok(out)
}

/// How much [`put_raw`] allocates at once for the small values that follow each other.
const SCRATCH_BYTES: usize = 4096;

/// Where a value is written, and what the bytes of small ones are cut from.
struct Scratch {
    out: Vec<u8>,
    pool: Option<BytesMut>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { out: Vec::new(), pool: None }) };
}

/// Serializes `value` to where it stays, spelled as JavaScript would. Small values of one thread share allocations of 4 KiB, if they need
/// any.
///
/// # Errors
///
/// As [`to_vec`].
pub(crate) fn put_raw<T: Serialize + ?Sized>(value: &T, place: &mut Raw) -> Result<(), serde_json::Error> {
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => scratch.put(value, place),
        // Serializing runs foreign code, which may come back here.
        Err(_) => {
            *place = to_vec(value).map(Raw::from)?;
            Ok(())
        }
    })
}

impl Scratch {
    fn put<T: Serialize + ?Sized>(&mut self, value: &T, place: &mut Raw) -> Result<(), serde_json::Error> {
        // The last value may have failed, or panicked, half-way.
        self.out.clear();
        self.out.shrink_to(SCRATCH_BYTES);
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut self.out, JsFormatter))?;
        let len = self.out.len();
        if Raw::is_short(&(0..len)) {
            place.fill(&self.out, 0..len);
            return Ok(());
        }
        *place = self.long();
        Ok(())
    }

    /// What was written, which is not short.
    fn long(&mut self) -> Raw {
        let len = self.out.len();
        if len > SCRATCH_BYTES {
            return Raw::from(std::mem::take(&mut self.out));
        }
        if len > SCRATCH_BYTES / 16 {
            return Raw::from(self.out.clone());
        }
        let pool = match &mut self.pool {
            Some(pool) if pool.capacity() >= len => pool,
            pool => pool.insert(BytesMut::with_capacity(SCRATCH_BYTES)),
        };
        pool.put_slice(&self.out);
        Raw::from(pool.split().freeze())
    }
}

/// Appends `value` to `out`, spelled as JavaScript would.
///
/// # Errors
///
/// As [`to_vec`]; `out` then ends in a part of the text.
pub fn write<T: Serialize + ?Sized>(out: &mut BytesMut, value: &T) -> Result<(), serde_json::Error> {
    value.serialize(&mut serde_json::Serializer::with_formatter(out.writer(), JsFormatter))
}

/// Appends `text` as a JSON string with the escapes of `JSON.stringify`.
pub fn write_string(out: &mut BytesMut, text: &str) {
    let bytes = text.as_bytes();
    out.reserve(bytes.len() + 2);
    out.put_u8(b'"');
    let mut copied = 0;
    let mut at = 0;
    loop {
        at = plain_end(bytes, at);
        let Some(&byte) = bytes.get(at) else { break };
        out.put_slice(&bytes[copied..at]);
        // The compact formatter has no state, and writing to a buffer in memory cannot fail.
        let _ = CompactFormatter.write_char_escape(&mut out.writer(), escape_of(byte));
        at += 1;
        copied = at;
    }
    out.put_slice(&bytes[copied..]);
    out.put_u8(b'"');
}

fn escape_of(byte: u8) -> serde_json::ser::CharEscape {
    use serde_json::ser::CharEscape;
    match byte {
        b'"' => CharEscape::Quote,
        b'\\' => CharEscape::ReverseSolidus,
        0x08 => CharEscape::Backspace,
        0x0c => CharEscape::FormFeed,
        b'\n' => CharEscape::LineFeed,
        b'\r' => CharEscape::CarriageReturn,
        b'\t' => CharEscape::Tab,
        other => CharEscape::AsciiControl(other),
    }
}

// === Errors ===

/// Why a text is not JSON, and at which byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at byte {offset}")]
pub struct SyntaxError {
    /// What was wrong.
    pub kind: SyntaxErrorKind,
    /// The byte where it was noticed.
    pub offset: usize,
}

/// What is wrong with a text that is not JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SyntaxErrorKind {
    /// The text stops inside a value.
    #[error("unexpected end of json")]
    End,
    /// A byte that cannot stand here.
    #[error("unexpected byte in json")]
    Byte,
    /// A backslash followed by what is no escape.
    #[error("invalid escape in json string")]
    Escape,
    /// An unescaped control character in a string.
    #[error("control character in json string")]
    Control,
    /// A number with a part missing, or a leading zero.
    #[error("invalid json number")]
    Number,
    /// Something follows the value.
    #[error("trailing bytes after json value")]
    Trailing,
    /// The bytes are not UTF-8.
    #[error("invalid utf-8 in json")]
    Utf8,
}

// === Scanning ===

/// The place of a value inside a frame.
pub type Span = Range<usize>;

/// Spans of wanted top-level members of one JSON text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members<const N: usize> {
    /// Whether the text is an object at all; if not, `spans` are all empty.
    pub is_object: bool,
    /// Whether the object has a member that was not asked for.
    pub has_others: bool,
    /// One entry per wanted name, in the order of the names. The last of duplicate members wins.
    pub spans: [Option<Span>; N],
    /// The whole value, without the white space around it.
    pub value: Span,
}

impl<const N: usize> Members<N> {
    /// True for an object without any member.
    pub fn is_empty_object(&self) -> bool {
        self.is_object && !self.has_others && self.spans.iter().all(Option::is_none)
    }
}

/// Scans one JSON text: checks that it is UTF-8 and one whole JSON value, and finds the members of a top-level
/// object whose names are in `names`.
///
/// Names are compared after unescaping, so `"\u0069d"` is `id`.
///
/// # Errors
///
/// [`SyntaxError`] if the text is anything but one JSON value surrounded by white space.
#[inline]
pub fn members<const N: usize>(text: &[u8], names: &[&str; N]) -> Result<Members<N>, SyntaxError> {
    check_utf8(text)?;
    let scanner = Scanner { text };
    let mut found = Members { is_object: false, has_others: false, spans: [const { None }; N], value: 0..0 };
    let start = scanner.space(0);
    let end;
    if scanner.at(start) == b'{' {
        found.is_object = true;
        end = scanner.object(start, |key, span| match names.iter().position(|name| key.is(name)) {
            Some(index) => found.spans[index] = Some(span),
            None => found.has_others = true,
        })?;
    } else {
        end = scanner.value(start)?;
    }
    found.value = start..end;
    scanner.finish(end)?;
    Ok(found)
}

/// Whether all of it is ASCII; without the branches per byte that the standard library takes for short texts.
#[inline]
pub fn is_ascii(text: &[u8]) -> bool {
    const HIGH: u64 = u64::MAX / 0xff * 0x80;
    if text.len() > 512 {
        return text.is_ascii();
    }
    let Some(last) = text.last_chunk::<8>() else { return text.iter().all(u8::is_ascii) };
    let (words, _) = text.as_chunks::<8>();
    let seen = words.iter().fold(u64::from_ne_bytes(*last), |seen, word| seen | u64::from_ne_bytes(*word));
    seen & HIGH == 0
}

#[inline]
fn check_utf8(text: &[u8]) -> Result<(), SyntaxError> {
    if !is_ascii(text)
        && let Err(error) = std::str::from_utf8(text)
    {
        return Err(SyntaxError { kind: SyntaxErrorKind::Utf8, offset: error.valid_up_to() });
    }
    Ok(())
}

/// Whether the bytes of `text` at `span` are exactly one value, without white space around it.
#[inline]
pub(crate) fn is_value(text: &[u8], span: &Span) -> bool {
    text.get(span.clone()).is_some_and(|value| check_utf8(value).is_ok())
        && Scanner { text }.value(span.start) == Ok(span.end)
}

/// The bytes of the last object that stood as a packet's pattern on this thread: services are called by few patterns,
/// and an object that was checked once need not be walked again.
type LastObject = ([u8; LAST_OBJECT_BYTES], u8);

const LAST_OBJECT_BYTES: usize = 62;

thread_local! {
    static LAST_OBJECT: RefCell<LastObject> = const { RefCell::new(([0; LAST_OBJECT_BYTES], 0)) };
}

/// The members `pattern`, `data`, `id`, `metadata` of a packet that is laid out as NestJS lays it out:
/// `{"pattern":…,"data":…,"id":…}`, with `"metadata":…` before the id or none, without the id for events, and no white
/// space in between. `None` for anything else, well formed or not: [`members`] decides about that.
/// (`is_ascii`: that is known.)
pub(crate) fn nest_request(text: &[u8], is_ascii: bool) -> Option<Members<4>> {
    if !is_ascii {
        check_utf8(text).ok()?;
    }
    let scanner = Scanner { text };
    let follows = |at: usize, word: &[u8]| text.get(at..)?.starts_with(word).then_some(at + word.len());
    let value = |at: usize| scanner.value(at).ok();
    let start = follows(0, b"{\"pattern\":")?;
    let end = if scanner.at(start) == b'{' { pattern_object(&scanner, start)? } else { value(start)? };
    let pattern = start..end;
    let start = follows(end, b",\"data\":")?;
    let mut end = value(start)?;
    let data = start..end;
    let mut metadata = None;
    if let Some(start) = follows(end, b",\"metadata\":") {
        end = value(start)?;
        metadata = Some(start..end);
    }
    let mut id = None;
    if let Some(start) = follows(end, b",\"id\":") {
        end = value(start)?;
        id = Some(start..end);
    }
    (text.get(end..) == Some(b"}")).then_some(Members {
        is_object: true,
        has_others: false,
        spans: [Some(pattern), Some(data), id, metadata],
        value: 0..text.len(),
    })
}

/// The end of an object that starts at `start`; one that is the same as the last one is not walked.
fn pattern_object(scanner: &Scanner<'_>, start: usize) -> Option<usize> {
    // Compared where it is: a copy would have to be waited for.
    let known = LAST_OBJECT.with_borrow(|(last, len)| {
        let len = usize::from(*len);
        (len > 0 && scanner.text.get(start..start + len) == last.get(..len)).then_some(start + len)
    });
    if known.is_some() {
        // An object ends with its brace, whatever follows.
        return known;
    }
    let end = scanner.value(start).ok()?;
    let mut last = [0; LAST_OBJECT_BYTES];
    if let Some(place) = last.get_mut(..end - start) {
        place.copy_from_slice(&scanner.text[start..end]);
        LAST_OBJECT.set((last, (end - start) as u8));
    }
    Some(end)
}

/// Finds one member of a top-level object; `None` if there is none or the value is no object.
///
/// # Errors
///
/// As [`members`].
pub fn member(text: &[u8], name: &str) -> Result<Option<Span>, SyntaxError> {
    let [span] = members(text, &[name])?.spans;
    Ok(span)
}

/// Checks that `text` is exactly one JSON value in UTF-8.
///
/// # Errors
///
/// As [`members`].
pub fn validate(text: &[u8]) -> Result<(), SyntaxError> {
    members(text, &[]).map(|_| ())
}

/// A key of an object, as it stands in the text (without its quotes).
#[derive(Debug, Clone, Copy)]
pub struct Key<'a> {
    raw: &'a [u8],
    escaped: bool,
}

impl Key<'_> {
    /// The key, unescaped.
    pub fn to_text(&self) -> String {
        unescape(self.raw)
    }

    /// Whether the key, unescaped, is `name`.
    #[inline]
    pub fn is(&self, name: &str) -> bool {
        if self.escaped { unescape_is(self.raw, name) } else { self.raw == name.as_bytes() }
    }
}

#[cold]
fn unescape_is(raw: &[u8], name: &str) -> bool {
    unescape(raw) == name
}

/// What leads from a value to one inside it.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    /// The key of a member.
    Key(Key<'a>),
    /// The index of an element.
    Index(usize),
}

/// The text of a string whose quotes were removed and whose syntax was checked. A surrogate escape without its
/// partner becomes U+FFFD.
pub fn unescape(raw: &[u8]) -> String {
    let mut out = Vec::with_capacity(raw.len());
    let mut at = 0;
    while let Some(&byte) = raw.get(at) {
        if byte != b'\\' {
            out.push(byte);
            at += 1;
            continue;
        }
        let escape = raw.get(at + 1).copied().unwrap_or(b'\\');
        at += 2;
        out.push(match escape {
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                let unit = hex4(raw, at);
                at += 4;
                let mut code = unit;
                if (0xd800..0xdc00).contains(&unit) && raw.get(at..at + 2) == Some(b"\\u") {
                    let low = hex4(raw, at + 2);
                    if (0xdc00..0xe000).contains(&low) {
                        code = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
                        at += 6;
                    }
                }
                let character = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
                out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                continue;
            }
            other => other,
        });
    }
    match String::from_utf8(out) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    }
}

fn hex4(raw: &[u8], at: usize) -> u32 {
    let digits = raw.get(at..at + 4).unwrap_or_default();
    digits.iter().fold(0, |value, &digit| value * 16 + char::from(digit).to_digit(16).unwrap_or(0))
}

/// Replaces surrogate escapes without a partner by `\ufffd`, in place of the six characters. `None` if there are
/// none. The text must be valid JSON.
pub(crate) fn mend_surrogates(text: &[u8]) -> Option<Vec<u8>> {
    let mut mended: Option<Vec<u8>> = None;
    let mut at = 0;
    while let Some(found) = memchr::memchr(b'\\', text.get(at..)?) {
        let escape = at + found;
        at = escape + 2;
        if text.get(escape + 1) != Some(&b'u') {
            continue;
        }
        at = escape + 6;
        let unit = hex4(text, escape + 2);
        let lone = match unit {
            0xd800..0xdc00 => {
                let paired =
                    text.get(at..at + 2) == Some(b"\\u") && (0xdc00..0xe000).contains(&hex4(text, at + 2));
                if paired {
                    at += 6;
                }
                !paired
            }
            0xdc00..0xe000 => true,
            _ => false,
        };
        if lone {
            mended.get_or_insert_with(|| text.to_vec())[escape + 2..escape + 6].copy_from_slice(b"fffd");
        }
    }
    mended
}

/// Whether JavaScript counts the value as true: everything but `false`, `null`, `""` and zero. `raw` must be one
/// valid JSON value without white space around it.
pub fn is_truthy(raw: &[u8]) -> bool {
    match raw {
        b"false" | b"null" | b"\"\"" | b"0" | b"" => false,
        [b'-' | b'0'..=b'9', ..] => {
            // Also `-0`, `0.0`, `0e5`, and what underflows.
            std::str::from_utf8(raw).ok().and_then(|text| text.parse::<f64>().ok()).is_none_or(|it| it != 0.0)
        }
        _ => true,
    }
}

/// Walks one JSON text. Reading past the end gives NUL, which no rule of the grammar accepts outside of a string.
#[derive(Debug, Clone, Copy)]
pub struct Scanner<'a> {
    text: &'a [u8],
}

impl<'a> Scanner<'a> {
    /// Makes a scanner. The text must be UTF-8; this is not checked here.
    pub fn new(text: &'a [u8]) -> Self {
        Scanner { text }
    }

    #[inline(always)]
    fn at(&self, at: usize) -> u8 {
        match self.text.get(at) {
            Some(&byte) => byte,
            None => 0,
        }
    }

    /// The first byte at or after `at` that is not white space.
    #[inline(always)]
    pub fn space(&self, mut at: usize) -> usize {
        while matches!(self.at(at), b' ' | b'\n' | b'\r' | b'\t') {
            at += 1;
        }
        at
    }

    #[cold]
    #[inline(never)]
    fn error<T>(&self, kind: SyntaxErrorKind, at: usize) -> Result<T, SyntaxError> {
        let kind = if at >= self.text.len() { SyntaxErrorKind::End } else { kind };
        Err(SyntaxError { kind, offset: at.min(self.text.len()) })
    }

    /// Checks that only white space follows.
    ///
    /// # Errors
    ///
    /// [`SyntaxErrorKind::Trailing`] with the place of the first other byte.
    #[inline]
    pub fn finish(&self, at: usize) -> Result<(), SyntaxError> {
        let at = self.space(at);
        if at == self.text.len() { Ok(()) } else { self.error(SyntaxErrorKind::Trailing, at) }
    }

    /// Walks the object that starts at `at`, calls `each` with every key and the span of its value, and returns
    /// the end of the object.
    ///
    /// # Errors
    ///
    /// [`SyntaxError`] at the first byte that is not JSON.
    #[inline]
    pub fn object(&self, at: usize, mut each: impl FnMut(Key<'a>, Span)) -> Result<usize, SyntaxError> {
        if self.at(at) != b'{' {
            return self.error(SyntaxErrorKind::Byte, at);
        }
        let mut at = self.space(at + 1);
        if self.at(at) == b'}' {
            return Ok(at + 1);
        }
        loop {
            if self.at(at) != b'"' {
                return self.error(SyntaxErrorKind::Byte, at);
            }
            let (end, escaped) = self.string(at + 1)?;
            let key = Key { raw: &self.text[at + 1..end - 1], escaped };
            at = self.colon(end)?;
            let end = self.value(at)?;
            each(key, at..end);
            at = self.space(end);
            match self.at(at) {
                b',' => at = self.space(at + 1),
                b'}' => return Ok(at + 1),
                _ => return self.error(SyntaxErrorKind::Byte, at),
            }
        }
    }

    /// Walks the members of an object or the elements of an array for as long as `each` returns true. Any other
    /// value has none.
    ///
    /// # Errors
    ///
    /// [`SyntaxError`] at the first byte walked over that is not JSON.
    pub fn each(&self, at: usize, mut each: impl FnMut(Step<'a>, Span) -> bool) -> Result<(), SyntaxError> {
        let close = match self.at(at) {
            b'{' => b'}',
            b'[' => b']',
            _ => return Ok(()),
        };
        let mut at = self.space(at + 1);
        if self.at(at) == close {
            return Ok(());
        }
        for index in 0.. {
            let mut step = Step::Index(index);
            if close == b'}' {
                if self.at(at) != b'"' {
                    return self.error(SyntaxErrorKind::Byte, at);
                }
                let (end, escaped) = self.string(at + 1)?;
                step = Step::Key(Key { raw: &self.text[at + 1..end - 1], escaped });
                at = self.colon(end)?;
            }
            let end = self.value(at)?;
            if !each(step, at..end) {
                return Ok(());
            }
            at = self.space(end);
            match self.at(at) {
                b',' => at = self.space(at + 1),
                byte if byte == close => break,
                _ => return self.error(SyntaxErrorKind::Byte, at),
            }
        }
        Ok(())
    }

    /// Steps over a colon and the white space around it.
    #[inline(always)]
    fn colon(&self, at: usize) -> Result<usize, SyntaxError> {
        let at = self.space(at);
        if self.at(at) != b':' {
            return self.error(SyntaxErrorKind::Byte, at);
        }
        Ok(self.space(at + 1))
    }

    /// Steps over a key and its colon.
    #[inline(always)]
    fn key(&self, at: usize) -> Result<usize, SyntaxError> {
        if self.at(at) != b'"' {
            return self.error(SyntaxErrorKind::Byte, at);
        }
        let (end, _) = self.string(at + 1)?;
        self.colon(end)
    }

    /// Steps over one value that starts at `at` and returns its end.
    ///
    /// # Errors
    ///
    /// [`SyntaxError`] at the first byte that is not JSON.
    #[inline]
    pub fn value(&self, at: usize) -> Result<usize, SyntaxError> {
        match self.at(at) {
            b'"' => Ok(self.string(at + 1)?.0),
            b'{' | b'[' => self.nested(at),
            _ => self.scalar(at),
        }
    }

    /// A number or a literal.
    #[inline(always)]
    fn scalar(&self, at: usize) -> Result<usize, SyntaxError> {
        match self.at(at) {
            b'-' | b'0'..=b'9' => self.number(at),
            b't' => self.literal(at, b"true"),
            b'f' => self.literal(at, b"false"),
            b'n' => self.literal(at, b"null"),
            _ => self.error(SyntaxErrorKind::Byte, at),
        }
    }

    #[inline(always)]
    fn literal(&self, at: usize, word: &[u8]) -> Result<usize, SyntaxError> {
        let end = at + word.len();
        if self.text.get(at..end) == Some(word) {
            return Ok(end);
        }
        let wrong = word.iter().enumerate().find(|&(index, &byte)| self.at(at + index) != byte);
        self.error(SyntaxErrorKind::Byte, at + wrong.map_or(0, |(index, _)| index))
    }

    /// Steps over an array or an object without recursion.
    fn nested(&self, start: usize) -> Result<usize, SyntaxError> {
        let mut open = Nesting::default();
        let mut at = start;
        loop {
            // A value starts here.
            match self.at(at) {
                b'"' => at = self.string(at + 1)?.0,
                b'{' => {
                    at = self.space(at + 1);
                    if self.at(at) == b'}' {
                        at += 1;
                    } else {
                        at = self.key(at)?;
                        open.push(true);
                        continue;
                    }
                }
                b'[' => {
                    at = self.space(at + 1);
                    if self.at(at) == b']' {
                        at += 1;
                    } else {
                        open.push(false);
                        at = self.space(self.counts(at));
                        continue;
                    }
                }
                _ => at = self.scalar(at)?,
            }
            // A value ended here; so may what holds it.
            loop {
                if open.depth == 0 {
                    return Ok(at);
                }
                at = self.space(at);
                match (self.at(at), open.in_object()) {
                    (b',', true) => {
                        at = self.space(at + 1);
                        at = self.key(at)?;
                        break;
                    }
                    (b',', false) => {
                        at = self.space(at + 1);
                        break;
                    }
                    (b'}', true) | (b']', false) => {
                        at += 1;
                        open.depth -= 1;
                    }
                    _ => return self.error(SyntaxErrorKind::Byte, at),
                }
            }
        }
    }

    /// Steps over the elements of an array, from the first of which `at` is the start, for as long as they are plain
    /// whole numbers with a comma behind; returns the start of the first that is not.
    #[inline(always)]
    fn counts(&self, mut at: usize) -> usize {
        while let [b'1'..=b'9', rest @ ..] = self.text.get(at..).unwrap_or_default() {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            if rest.get(digits) != Some(&b',') {
                break;
            }
            at += digits + 2;
        }
        at
    }

    /// Steps over a string whose opening quote is just before `at`; also says whether it has escapes.
    #[inline(always)]
    fn string(&self, at: usize) -> Result<(usize, bool), SyntaxError> {
        let at = plain_end(self.text, at);
        if self.at(at) == b'"' {
            return Ok((at + 1, false));
        }
        self.string_slow(at)
    }

    #[inline(never)]
    fn string_slow(&self, mut at: usize) -> Result<(usize, bool), SyntaxError> {
        loop {
            at = plain_end(self.text, at);
            match self.at(at) {
                b'"' => return Ok((at + 1, true)),
                b'\\' => match self.at(at + 1) {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => at += 2,
                    b'u' => {
                        for digit in at + 2..at + 6 {
                            if !self.at(digit).is_ascii_hexdigit() {
                                return self.error(SyntaxErrorKind::Escape, digit);
                            }
                        }
                        at += 6;
                    }
                    _ => return self.error(SyntaxErrorKind::Escape, at + 1),
                },
                _ => return self.error(SyntaxErrorKind::Control, at),
            }
        }
    }

    #[inline]
    fn digits(&self, mut at: usize) -> usize {
        while self.at(at).is_ascii_digit() {
            at += 1;
        }
        at
    }

    #[inline]
    fn number(&self, mut at: usize) -> Result<usize, SyntaxError> {
        if self.at(at) == b'-' {
            at += 1;
        }
        match self.at(at) {
            b'0' => {
                at += 1;
                if self.at(at).is_ascii_digit() {
                    return self.error(SyntaxErrorKind::Number, at);
                }
            }
            b'1'..=b'9' => at = self.digits(at + 1),
            _ => return self.error(SyntaxErrorKind::Number, at),
        }
        if self.at(at) == b'.' {
            if !self.at(at + 1).is_ascii_digit() {
                return self.error(SyntaxErrorKind::Number, at + 1);
            }
            at = self.digits(at + 2);
        }
        if matches!(self.at(at), b'e' | b'E') {
            at += 1;
            if matches!(self.at(at), b'+' | b'-') {
                at += 1;
            }
            if !self.at(at).is_ascii_digit() {
                return self.error(SyntaxErrorKind::Number, at);
            }
            at = self.digits(at + 1);
        }
        Ok(at)
    }
}

/// The first byte at or after `at` that ends a plain run inside a string: a quote, a backslash, a control
/// character, or the end of the text. Eight bytes at a time.
#[inline(always)]
fn plain_end(text: &[u8], mut at: usize) -> usize {
    while let Some(chunk) = text.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let stop = stops(u64::from_le_bytes(*chunk));
        if stop != 0 {
            return at + (stop.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    if let Some(last) = text.last_chunk::<8>()
        && at < text.len()
    {
        // The rest is the end of the last eight bytes; the zeros shifted in behind it stop.
        let before = 8 - (text.len() - at);
        return at + (stops(u64::from_le_bytes(*last) >> (8 * before)).trailing_zeros() / 8) as usize;
    }
    while let Some(&byte) = text.get(at) {
        if byte < 0x20 || byte == b'"' || byte == b'\\' {
            break;
        }
        at += 1;
    }
    at
}

/// Flags the bytes that end a plain run; only the lowest flag is exact.
#[inline(always)]
fn stops(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 0xff;
    const HIGH: u64 = ONES << 7;
    let quote = word ^ (ONES * b'"' as u64);
    let slash = word ^ (ONES * b'\\' as u64);
    // Borrows may flag bytes above a true hit, never below one, so the lowest flag is exact.
    ((quote.wrapping_sub(ONES) & !quote)
        | (slash.wrapping_sub(ONES) & !slash)
        | (word.wrapping_sub(ONES * 0x20) & !word))
        & HIGH
}

/// One bit per open bracket: set for an object. 128 levels without allocation, an eighth of the frame at most.
#[derive(Default)]
struct Nesting {
    depth: usize,
    near: [u64; 2],
    far: Vec<u64>,
}

impl Nesting {
    #[inline]
    fn push(&mut self, object: bool) {
        let (word, bit) = (self.depth / 64, 1 << (self.depth % 64));
        if word >= 2 && self.far.len() <= word - 2 {
            self.far.push(0);
        }
        let slot = if word < 2 { &mut self.near[word] } else { &mut self.far[word - 2] };
        if object {
            *slot |= bit;
        } else {
            *slot &= !bit;
        }
        self.depth += 1;
    }

    /// Whether the innermost open bracket is an object's. There must be one.
    #[inline]
    fn in_object(&self) -> bool {
        let (word, bit) = ((self.depth - 1) / 64, 1 << ((self.depth - 1) % 64));
        let slot = if word < 2 { self.near[word] } else { self.far[word - 2] };
        slot & bit != 0
    }
}

// === Places of errors ===

/// The byte offset of a line and a column as `serde_json` counts them (both from 1, the column in bytes).
pub(crate) fn offset_of(text: &[u8], line: usize, column: usize) -> Option<usize> {
    let start = match line.checked_sub(1)? {
        0 => 0,
        before => memchr::memchr_iter(b'\n', text).nth(before - 1)? + 1,
    };
    Some((start + column.saturating_sub(1)).min(text.len()))
}

/// The path to the innermost value that covers the byte at `offset`, at most 16 steps of it; `None` for the whole.
pub(crate) fn path_at(text: &[u8], offset: usize) -> Option<String> {
    use std::fmt::Write as _;
    let scanner = Scanner { text };
    let mut path = String::new();
    let mut at = scanner.space(0);
    for _ in 0..16 {
        let mut found = None;
        // Broken syntax behind the place we look for does not matter.
        let _ = scanner.each(at, |step, span| {
            if span.contains(&offset) {
                found = Some((step, span.start));
            }
            span.end <= offset
        });
        let Some((step, start)) = found else { break };
        let _ = match step {
            Step::Key(key) if path.is_empty() => write!(path, "{}", key.to_text()),
            Step::Key(key) => write!(path, ".{}", key.to_text()),
            Step::Index(index) => write!(path, "[{index}]"),
        };
        at = start;
    }
    (!path.is_empty()).then_some(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What `serde_json` takes for one value; it does not look at UTF-8 in values it ignores.
    fn is_json(text: &[u8]) -> bool {
        std::str::from_utf8(text).is_ok() && serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
    }

    #[track_caller]
    fn check_validity(text: &[u8]) {
        assert_eq!(validate(text).is_ok(), is_json(text), "{}", String::from_utf8_lossy(text));
    }

    #[track_caller]
    fn check_error(text: &[u8], kind: SyntaxErrorKind, offset: usize) {
        assert_eq!(validate(text), Err(SyntaxError { kind, offset }), "{}", String::from_utf8_lossy(text));
    }

    #[track_caller]
    fn check_members(text: &str, expected: [Option<&str>; 2]) {
        let found = members(text.as_bytes(), &["id", "data"]).unwrap();
        assert_eq!(found.spans.map(|span| span.map(|span| &text[span])), expected, "{text}");
    }

    #[track_caller]
    fn check_written(value: impl Serialize, text: &str) {
        assert_eq!(String::from_utf8(to_vec(&value).unwrap()).unwrap(), text);
    }

    const NAMES: [&str; 4] = ["pattern", "data", "id", "metadata"];

    fn to_raw<T: Serialize + ?Sized>(value: &T) -> Result<Raw, serde_json::Error> {
        let mut raw = Raw::default();
        put_raw(value, &mut raw).map(|()| raw)
    }

    #[test]
    fn bytes_are_written_where_others_are_and_after_one_that_failed() {
        use serde::ser::Error;
        struct Inside(bool);
        impl Serialize for Inside {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                // Runs in the middle of the array around it.
                let inner = to_raw(&[1, 2]).map_err(S::Error::custom)?;
                if self.0 { inner.len().serialize(serializer) } else { Err(S::Error::custom("no")) }
            }
        }
        assert_eq!(&*to_raw(&[Inside(true), Inside(true)]).unwrap(), b"[5,5]");
        assert!(to_raw(&[Inside(true), Inside(false)]).is_err());
        assert_eq!(&*to_raw("a").unwrap(), b"\"a\"");
        for len in [32, 33, SCRATCH_BYTES / 16, SCRATCH_BYTES / 16 + 1, SCRATCH_BYTES, SCRATCH_BYTES + 1] {
            let text = "x".repeat(len - 2);
            let bytes = to_raw(&text).unwrap();
            assert_eq!(*bytes, to_vec(&text).unwrap());
            assert_eq!(bytes.len(), len);
        }
    }

    #[test]
    fn arrays_of_numbers_are_judged_as_serde_json_does() {
        for text in [
            "[1,2]",
            "[1, 2]",
            "[1 ,2]",
            "[10,20,-3]",
            "[1,02]",
            "[1,2,]",
            "[1,,2]",
            "[1,2",
            "[1,",
            "[1",
            "[12.5,1]",
            "[1,2e3,4]",
            "[0,1]",
            "[1,[2,3],4]",
            "[1,\n\t[2, 3 ]\r]",
            "[1,x]",
            "[1,\"2\"]",
            "[[1,2],[3,4]",
            "[1,2}}",
        ] {
            check_validity(text.as_bytes());
        }
    }

    #[test]
    fn what_nestjs_writes_needs_no_second_look() {
        for text in [
            r#"{"pattern":{"cmd":"sum"},"data":[1,2],"id":"486f96269bd5729ca8f4d"}"#,
            r#"{"pattern":{"cmd":"sum"},"data":[1,2],"metadata":{"a":"b"},"id":"x"}"#,
            r#"{"pattern":"evt","data":{"a":"ü"}}"#,
            r#"{"pattern":7,"data":null,"metadata":{}}"#,
        ] {
            assert_eq!(nest_request(text.as_bytes(), false), members(text.as_bytes(), &NAMES).ok(), "{text}");
            assert!(nest_request(text.as_bytes(), false).is_some(), "{text}");
        }
        for text in [
            r#"{"data":1,"pattern":"a"}"#,
            r#"{"pattern":"a" ,"data":1}"#,
            "{}",
            "7",
            r#"{"pattern":"a","data":1}}"#,
        ] {
            assert_eq!(nest_request(text.as_bytes(), false), None, "{text}");
        }
    }

    proptest! {
        /// Whatever the short way says, the long way says; each text twice, since objects are remembered.
        #[test]
        fn the_short_way_never_contradicts_the_long_one(
            pattern in r#"(\{"(cmd|c)":"[a-c]{0,3}"\}|"[a-c]*"|[0-9]{1,2})"#,
            data in r#"(\[1,2\]|\{"x":"y"\}|null|"\\u0061")"#,
            cut in proptest::option::of(0..60usize),
            put in proptest::option::of((0..60usize, r#"[{}\[\],:" a1]"#)),
        ) {
            let mut text = format!(r#"{{"pattern":{pattern},"data":{data},"id":"486f9"}}"#);
            if let Some(at) = cut.filter(|at| *at < text.len()) {
                text.remove(at);
            }
            if let Some((at, byte)) = put && at < text.len() {
                text.insert_str(at, &byte);
            }
            for _ in 0..2 {
                if let Some(found) = nest_request(text.as_bytes(), false) {
                    prop_assert_eq!(Ok(found), members(text.as_bytes(), &NAMES));
                }
            }
        }
    }

    #[test]
    fn members_are_found_in_any_order_and_the_last_wins() {
        check_members(r#"{"id":1,"data":{"id":2}}"#, [Some("1"), Some(r#"{"id":2}"#)]);
        check_members(" { \"data\" : [ 1 ] ,\n\"id\" : \"}\" } ", [Some("\"}\""), Some("[ 1 ]")]);
        check_members(r#"{"id":1,"id":2}"#, [Some("2"), None]);
        check_members("{}", [None, None]);
        check_members(r#"["id",1]"#, [None, None]);
    }

    #[test]
    fn escaped_keys_are_the_keys_they_spell() {
        check_members(r#"{"\u0069d":1,"dat\u0061":2}"#, [Some("1"), Some("2")]);
        check_members(r#"{"\\id":1,"i\"d":2,"data\u0000":3}"#, [None, None]);
    }

    #[test]
    fn other_members_and_empty_objects_are_told() {
        let found = |text: &str| {
            let found = members(text.as_bytes(), &["id"]).unwrap();
            (found.is_object, found.has_others, found.is_empty_object())
        };
        assert_eq!(found("{}"), (true, false, true));
        assert_eq!(found(r#"{"id":1}"#), (true, false, false));
        assert_eq!(found(r#"{"id":1,"x":1}"#), (true, true, false));
        assert_eq!(found("[]"), (false, false, false));
    }

    #[test]
    fn errors_name_the_byte() {
        use SyntaxErrorKind::*;
        check_error(b"", End, 0);
        check_error(b"  ", End, 2);
        check_error(b"{bad}", Byte, 1);
        check_error(b"[1,]", Byte, 3);
        check_error(b"[1 2]", Byte, 3);
        check_error(b"{\"a\":1,}", Byte, 7);
        check_error(b"{\"a\" 1}", Byte, 5);
        check_error(b"[1}", Byte, 2);
        check_error(b"{\"a\":[}", Byte, 6);
        check_error(b"{\"a\":", End, 5);
        check_error(b"1 1", Trailing, 2);
        check_error(b"truE", Byte, 3);
        check_error(b"tru", End, 3);
        check_error(b"01", Number, 1);
        check_error(b"1.", End, 2);
        check_error(b"1.e1", Number, 2);
        check_error(b"1e+", End, 3);
        check_error(b"-", End, 1);
        check_error(b"-a", Number, 1);
        check_error(b"\"abc", End, 4);
        check_error(b"\"a\nb\"", Control, 2);
        check_error(b"\"\\x\"", Escape, 2);
        check_error(b"\"\\u12g4\"", Escape, 5);
        check_error(b"\"\xff\"", Utf8, 1);
    }

    #[test]
    fn nesting_is_bounded_by_the_text_only() {
        for depth in [1, 63, 64, 65, 127, 128, 129, 192, 193, 100_000] {
            let deep = [b"[".repeat(depth), b"]".repeat(depth)].concat();
            assert_eq!(validate(&deep), Ok(()), "{depth}");
            let objects = ["{\"a\":".repeat(depth), "1".to_owned(), "}".repeat(depth)].concat();
            assert_eq!(validate(objects.as_bytes()), Ok(()), "{depth}");
            let mixed = ["[{\"a\":".repeat(depth), "1".to_owned(), "}]".repeat(depth)].concat();
            assert_eq!(validate(mixed.as_bytes()), Ok(()), "{depth}");
            let mut crossed = mixed.into_bytes();
            let last = crossed.len() - 1;
            crossed[last] = b'}';
            assert_eq!(validate(&crossed).unwrap_err().offset, last, "{depth}");
        }
    }

    #[test]
    fn lone_surrogates_and_huge_numbers_are_syntax() {
        for text in [r#""\ud83d""#, r#""\ude00\ud83d""#, "1e400", "-1e-400", "123456789012345678901234567890"]
        {
            check_validity(text.as_bytes());
            assert_eq!(validate(text.as_bytes()), Ok(()), "{text}");
        }
    }

    #[test]
    fn numbers_are_spelled_as_in_javascript() {
        check_written(3.0, "3");
        check_written(-0.0, "0");
        check_written(1.5e300, "1.5e+300");
        check_written(1e21, "1e+21");
        check_written(1e20, "100000000000000000000");
        check_written(1e-7, "1e-7");
        check_written(0.000001, "0.000001");
        check_written(5e-324, "5e-324");
        check_written(f64::NAN, "null");
        check_written([f64::INFINITY, f64::NEG_INFINITY], "[null,null]");
        check_written(0.1_f32, "0.1");
        check_written(f32::MAX, "3.4028235e+38");
        check_written(f32::NAN, "null");
        check_written(u64::MAX, "18446744073709551615");
        check_written(serde_json::json!({"a": 2.0}), r#"{"a":2}"#);
    }

    #[test]
    fn strings_are_escaped_as_in_javascript() {
        let text = "a\"\\/\u{8}\u{c}\n\r\t\u{0}\u{1f}\u{7f}é😀\u{2028}";
        let expected = "\"a\\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\u{7f}é😀\u{2028}\"";
        check_written(text, expected);
        let mut out = BytesMut::from("x");
        write_string(&mut out, text);
        assert_eq!(out, format!("x{expected}"));
    }

    #[test]
    fn surrogates_without_a_partner_are_mended() {
        let mend = |text: &str| mend_surrogates(text.as_bytes()).map(|it| String::from_utf8(it).unwrap());
        assert_eq!(mend(r#""\ud83d\ude00""#), None);
        assert_eq!(mend(r#""\\ud83d""#), None);
        assert_eq!(mend(r#""\ud83d""#).as_deref(), Some(r#""\ufffd""#));
        assert_eq!(mend(r#""\ud83d\ud83d\ude00""#).as_deref(), Some(r#""\ufffd\ud83d\ude00""#));
        assert_eq!(mend(r#""\ude00x\\\ud83d\n""#).as_deref(), Some(r#""\ufffdx\\\ufffd\n""#));
        assert_eq!(unescape(br"\ud83d\ude00\ud83dx\ude00"), "😀\u{fffd}x\u{fffd}");
    }

    #[test]
    fn truth_is_javascripts() {
        for raw in ["false", "null", "\"\"", "0", "-0", "0.0", "0e5", "1e-400"] {
            assert!(!is_truthy(raw.as_bytes()), "{raw}");
        }
        for raw in ["true", "1", "-1", "1e400", "\"0\"", "\"false\"", "[]", "{}", "0.1"] {
            assert!(is_truthy(raw.as_bytes()), "{raw}");
        }
    }

    #[test]
    fn places_of_errors_have_paths() {
        let text = br#"{"user":{"tags":["a", 5 ]},"x":1}"#;
        let offset = text.iter().position(|&it| it == b'5').unwrap();
        assert_eq!(path_at(text, offset).as_deref(), Some("user.tags[1]"));
        assert_eq!(path_at(text, 0), None);
        assert_eq!(offset_of(b"a\nbc\nd", 2, 2), Some(3));
    }

    fn text() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null".to_owned()),
            any::<f64>().prop_map(|it| serde_json::to_string(&it).unwrap()),
            any::<i64>().prop_map(|it| it.to_string()),
            any::<String>().prop_map(|it| serde_json::to_string(&it).unwrap()),
            "\"(\\\\[\"\\\\/bfnrt]|\\\\u[0-9a-fA-F]{4}|[a-zé😀]){0,12}\"",
        ];
        leaf.prop_recursive(5, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(|it| format!("[{}]", it.join(" , "))),
                prop::collection::vec((any::<String>(), inner), 0..6).prop_map(|it| {
                    let members = it
                        .iter()
                        .map(|(key, value)| format!("{}:{value}", serde_json::to_string(key).unwrap()));
                    format!("{{{}}}", members.collect::<Vec<_>>().join(","))
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn valid_text_is_valid(text in text()) {
            prop_assert_eq!(validate(text.as_bytes()), Ok(()));
        }

        #[test]
        fn mutated_text_is_judged_as_serde_json_does(
            text in text(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..3), 1..4),
        ) {
            let bytes = b"{}[]\",:\\ \t\n0123456789.-+eEtruefalsn\x00\x1f\x80\xc3\xff";
            let mut text = text.into_bytes();
            for (place, byte, kind) in edits {
                if text.is_empty() {
                    break;
                }
                let (place, byte) = (place.index(text.len()), bytes[byte.index(bytes.len())]);
                match kind {
                    0 => text[place] = byte,
                    1 => text.insert(place, byte),
                    _ => drop(text.remove(place)),
                }
            }
            check_validity(&text);
        }

        #[test]
        fn any_bytes_are_judged_as_serde_json_does(text in prop::collection::vec(any::<u8>(), 0..24)) {
            check_validity(&text);
        }

        #[test]
        fn written_strings_read_back(text in any::<String>()) {
            let mut out = BytesMut::new();
            write_string(&mut out, &text);
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text.clone());
            prop_assert_eq!(&out[..], &serde_json::to_vec(&text).unwrap()[..]);
            prop_assert_eq!(unescape(&out[1..out.len() - 1]), text);
        }
    }
}
