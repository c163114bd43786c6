// SPDX-License-Identifier: MIT OR Apache-2.0

//! Patterns, which people write, and routes, which the runtime looks up.
//!
//! A [`Pattern`] is a string, a number or a JSON object, kept as given because requests carry it so. Its
//! [`Route`] is the canonical text NestJS derives from it, with the keys of objects sorted.
//!
//! NestJS derives routes by two different rules: a registered pattern is taken as it is, an incoming one is first
//! parsed as JSON if it can be. A handler registered under `"1.0"` or `"true"` is therefore never found there.
//! Martlet has one rule for both sides, the incoming one, so every pattern is reachable:
//!
//! - text that is a JSON object, number or quoted string means that value: `"1.0"`, `"1"` and `1` are one route,
//!   so are `"{\"cmd\": 1}"` and `{"cmd":1}`;
//! - text that is a JSON literal (`"true"`, `"null"`) means the text. The bare literals, sent without quotes, have
//!   no route, as in NestJS;
//! - a quoted string is unquoted until nothing is left to unquote, so that a route is its own route.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;

use crate::json::{self, Scanner};
use crate::msgpack;
use crate::payload::{EncodeError, Format};

/// Objects nested deeper than this below the top are not told apart, as in NestJS.
pub const MAX_DEPTH: usize = 5;
/// Objects with more members than this are not told apart, as in NestJS.
pub const MAX_KEYS: usize = 20;

const TOO_DEEP: &str = "[MAX_DEPTH_REACHED]";
const TOO_MANY: &str = "[TOO_MANY_KEYS]";

// === Pattern ===

/// What a user writes to name a handler: a string, a number or a JSON object. Cheap to clone.
#[derive(Clone)]
pub struct Pattern {
    inner: Arc<Inner>,
}

struct Inner {
    /// JSON as given.
    text: Box<str>,
    /// The text itself, if the pattern is a string.
    string: Option<Box<str>>,
    route: Route,
}

impl Pattern {
    /// Makes a pattern of any value that serializes to a JSON string, number, object or array. The order of
    /// members is kept in [`Pattern::text`].
    ///
    /// # Errors
    ///
    /// [`PatternError::NoRoute`] for booleans and null, [`PatternError::Encode`] if the value does not serialize.
    pub fn from_json<T: Serialize + ?Sized>(value: &T) -> Result<Pattern, PatternError> {
        let text = json::to_vec(value).map_err(|source| EncodeError::new(Format::Json, source))?;
        let text = String::from_utf8(text).map_err(|source| EncodeError::new(Format::Json, source))?;
        Pattern::from_text(text)
    }

    /// Makes a pattern of a valid JSON text without white space around it.
    fn from_text(text: String) -> Result<Pattern, PatternError> {
        if let Some(raw) = quoted(&text) {
            return Ok(Pattern::from(json::unescape(raw.as_bytes())));
        }
        match route_of_value(&text, NonFinite::Null) {
            Some(route) => Ok(Pattern::assemble(text, None, Route::from(route))),
            None => Err(PatternError::NoRoute { text }),
        }
    }

    fn assemble(text: String, string: Option<Box<str>>, route: Route) -> Pattern {
        Pattern { inner: Arc::new(Inner { text: text.into(), string, route }) }
    }

    /// Reads a pattern as a person types it: a JSON object, array, number or quoted string is that, any other
    /// text is itself.
    pub fn parse(text: &str) -> Pattern {
        let trimmed = trim(text);
        if json::validate(trimmed.as_bytes()).is_ok()
            && let Ok(pattern) = Pattern::from_text(trimmed.to_owned())
        {
            return pattern;
        }
        Pattern::from(text)
    }

    /// Whether the other one is a clone of this one; equal ones may not be.
    pub(crate) fn is_same(&self, other: &Pattern) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The JSON text as given: strings are quoted.
    pub fn text(&self) -> &str {
        &self.inner.text
    }

    /// The canonical text handlers are looked up by.
    pub fn route(&self) -> &Route {
        &self.inner.route
    }

    /// The text itself, if the pattern is a string.
    pub fn as_str(&self) -> Option<&str> {
        self.inner.string.as_deref()
    }
}

/// Two patterns are equal if they name the same handler.
impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.route() == other.route()
    }
}

impl Eq for Pattern {}

impl std::hash::Hash for Pattern {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.route().hash(state);
    }
}

/// How many patterns made of text a thread keeps for when the same text is made a pattern again, and how long their
/// texts may be: clients name the same few patterns over and over.
const KEPT: usize = 8;
const KEPT_BYTES: usize = 128;

thread_local! {
    static LAST: RefCell<VecDeque<Pattern>> = const { RefCell::new(VecDeque::new()) };
}

impl From<&str> for Pattern {
    fn from(text: &str) -> Self {
        LAST.with_borrow_mut(|last| {
            let is_it = |pattern: &&Pattern| pattern.as_str() == Some(text);
            if let Some(known) = last.iter().find(is_it) {
                return known.clone();
            }
            let mut quoted = bytes::BytesMut::new();
            json::write_string(&mut quoted, text);
            let quoted = String::from_utf8_lossy(&quoted).into_owned();
            let pattern = Pattern::assemble(quoted, Some(text.into()), Route::from(route_of_text(text)));
            if text.len() <= KEPT_BYTES {
                last.truncate(KEPT - 1);
                last.push_front(pattern.clone());
            }
            pattern
        })
    }
}

impl From<String> for Pattern {
    fn from(text: String) -> Self {
        Pattern::from(text.as_str())
    }
}

impl From<&String> for Pattern {
    fn from(text: &String) -> Self {
        Pattern::from(text.as_str())
    }
}

impl From<i64> for Pattern {
    fn from(number: i64) -> Self {
        let text = number.to_string();
        let route = Route::from(js_number(&text));
        Pattern::assemble(text, None, route)
    }
}

impl From<&Pattern> for Pattern {
    fn from(pattern: &Pattern) -> Self {
        pattern.clone()
    }
}

impl From<Route> for Pattern {
    fn from(route: Route) -> Self {
        Pattern::from(route.as_ref())
    }
}

impl TryFrom<serde_json::Value> for Pattern {
    type Error = PatternError;

    fn try_from(value: serde_json::Value) -> Result<Self, PatternError> {
        Pattern::from_json(&value)
    }
}

impl FromStr for Pattern {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Pattern::parse(text))
    }
}

/// Shows a string bare and anything else as its JSON.
impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str().unwrap_or_else(|| self.text()))
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({})", self.text())
    }
}

/// Why a value is no pattern.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// Booleans and null never match anything.
    #[error("a pattern is a string, a number or an object, not {text}")]
    NoRoute {
        /// The JSON text of the value.
        text: String,
    },
    /// The value does not serialize.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

// === Route ===

/// The canonical text of a pattern; what handlers are looked up by, and the address on brokers. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route(Arc<str>);

impl Route {
    /// Whether both are clones of one; two of the same text need not be.
    pub(crate) fn is_the_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The raw JSON spellings of `pattern` that a NestJS client is likely to send for this route: bare for objects
    /// and numbers, and as a string. Each of them leads back here by [`route_of_incoming`]. For a map from raw
    /// bytes to handlers, to be filled before the first packet.
    pub fn raw_spellings(&self) -> Vec<Vec<u8>> {
        let mut quoted = bytes::BytesMut::new();
        json::write_string(&mut quoted, self);
        [self.as_bytes(), &quoted]
            .into_iter()
            .filter(|raw| route_of_incoming(Format::Json, raw).as_ref() == Some(self))
            .map(<[u8]>::to_vec)
            .collect()
    }
}

impl From<String> for Route {
    /// Takes text that is a route already. To make one of a pattern, use [`Pattern::route`].
    fn from(text: String) -> Self {
        Route(text.into())
    }
}

impl std::ops::Deref for Route {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Route {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Route {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Route({})", &self.0)
    }
}

/// The route of the raw value of an incoming packet's `pattern`: what it is made text, then parsed again if it can
/// be. `None` if it has no route (booleans and null) or is not a value of the format.
pub fn route_of_incoming(format: Format, raw_pattern: &[u8]) -> Option<Route> {
    let route = match format {
        Format::Json => {
            let text = trim(std::str::from_utf8(raw_pattern).ok()?);
            json::validate(text.as_bytes()).ok()?;
            match quoted(text) {
                Some(raw) if raw.contains('\\') => route_of_text(&json::unescape(raw.as_bytes())),
                Some(raw) => route_of_text(raw),
                None => route_of_value(text, NonFinite::Null)?,
            }
        }
        Format::MessagePack => match msgpack::as_str(raw_pattern) {
            Some(text) => route_of_text(text),
            None => {
                let text = msgpack::to_json(raw_pattern).ok()?;
                let text = std::str::from_utf8(&text).ok()?;
                match quoted(text) {
                    Some(_) => return None,
                    None => route_of_value(text, NonFinite::Null)?,
                }
            }
        },
    };
    Some(Route::from(route))
}

// === Normalising ===

/// What becomes of a number beyond `f64`: stringifying it gives null, parsing it alone gives infinity.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NonFinite {
    Null,
    Infinity,
}

fn trim(text: &str) -> &str {
    text.trim_matches([' ', '\t', '\n', '\r'])
}

/// The inside of a JSON string. `text` must be valid JSON without white space around it.
fn quoted(text: &str) -> Option<&str> {
    text.strip_prefix('"')?.strip_suffix('"')
}

/// The route of a text: of the value it spells, or else the text itself.
fn route_of_text(text: &str) -> String {
    // JSON starts with one of these; most patterns do not.
    let may_be_json = matches!(
        trim(text).bytes().next(),
        Some(b'"' | b'{' | b'[' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n')
    );
    if !may_be_json || json::validate(text.as_bytes()).is_err() {
        return text.to_owned();
    }
    let mut text = trim(text).to_owned();
    while let Some(raw) = quoted(&text) {
        let inner = json::unescape(raw.as_bytes());
        if json::validate(inner.as_bytes()).is_err() {
            return inner;
        }
        text = trim(&inner).to_owned();
    }
    route_of_value(&text, NonFinite::Infinity).unwrap_or(text)
}

/// The route of a valid JSON text that is no string; `None` for literals.
fn route_of_value(text: &str, non_finite: NonFinite) -> Option<String> {
    match text.bytes().next()? {
        b'{' | b'[' => {
            let mut out = String::with_capacity(text.len());
            write_value(text, 0, non_finite, &mut out);
            Some(out)
        }
        b't' | b'f' | b'n' => None,
        _ => {
            let number = js_number(text);
            (non_finite == NonFinite::Infinity || !number.ends_with('y')).then_some(number)
        }
    }
}

/// JavaScript's spelling of a JSON number.
fn js_number(text: &str) -> String {
    let value = text.parse::<f64>().unwrap_or(f64::NAN);
    ryu_js::Buffer::new().format(value).to_owned()
}

/// Writes the route of a member's value. `text` must be valid JSON without white space around it; recursion ends at
/// [`MAX_DEPTH`].
fn write_value(text: &str, depth: usize, non_finite: NonFinite, out: &mut String) {
    match text.bytes().next() {
        Some(b'"') => {
            let inner = quoted(text).unwrap_or_default();
            out.push('"');
            write_escaped(&json::unescape(inner.as_bytes()), out);
            out.push('"');
        }
        Some(b'{' | b'[') if depth > MAX_DEPTH => out.push_str(TOO_DEEP),
        Some(b'{' | b'[') => match members_of(text) {
            None => out.push_str(TOO_MANY),
            Some(mut members) => {
                collate::sort(&mut members);
                out.push('{');
                for (index, (key, value)) in members.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    out.push('"');
                    write_escaped(key, out);
                    out.push_str("\":");
                    write_value(value, depth + 1, non_finite, out);
                }
                out.push('}');
            }
        },
        Some(b'-' | b'0'..=b'9') => match js_number(text) {
            number if number.ends_with('y') && non_finite == NonFinite::Null => out.push_str("null"),
            number => out.push_str(&number),
        },
        _ => out.push_str(text),
    }
}

/// Escapes no more than NestJS does: quotes and backslashes.
fn write_escaped(text: &str, out: &mut String) {
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            out.push('\\');
        }
        out.push(character);
    }
}

/// The members of an object, or the elements of an array under their indices, the last of duplicates in the place
/// of the first. `None` if there are more than [`MAX_KEYS`].
fn members_of(text: &str) -> Option<Vec<(String, &str)>> {
    let mut members: Vec<(String, &str)> = Vec::new();
    let mut too_many = false;
    let scanner = Scanner::new(text.as_bytes());
    let walked = scanner.each(0, |key, span| {
        let key = match key {
            json::Step::Key(key) => key.to_text(),
            json::Step::Index(index) => index.to_string(),
        };
        match members.iter().position(|(known, _)| *known == key) {
            Some(known) => members[known].1 = &text[span],
            None if members.len() < MAX_KEYS => members.push((key, &text[span])),
            None => too_many = true,
        }
        !too_many
    });
    debug_assert!(walked.is_ok(), "the text was checked before");
    (!too_many).then_some(members)
}

mod collate {
    //! The order of `localeCompare`, that is of ICU's root collation.

    use std::cmp::Ordering;

    use icu_collator::options::CollatorOptions;
    use icu_collator::{CollatorBorrowed, CollatorPreferences};

    /// Printable ASCII in order; lower case stands for both cases.
    const ORDER: &[u8] = b" _-,;:!?.'\"()[]{}@*/\\&#%`^+<=>|~$0123456789abcdefghijklmnopqrstuvwxyz";

    /// Primary weights of ASCII; 0 is ignored.
    const PRIMARY: [u8; 128] = {
        let mut table = [0; 128];
        // The white space among the control characters comes first, the others do not count.
        let mut control = 0x09;
        while control <= 0x0d {
            table[control] = (control - 8) as u8;
            control += 1;
        }
        let mut index = 0;
        while index < ORDER.len() {
            table[ORDER[index] as usize] = index as u8 + 6;
            table[ORDER[index].to_ascii_uppercase() as usize] = index as u8 + 6;
            index += 1;
        }
        table
    };

    /// Sorts keys; equal ones, which differ in control characters only, keep their order.
    pub(super) fn sort<T>(members: &mut [(String, T)]) {
        if members.iter().all(|(key, _)| key.is_ascii()) {
            members.sort_by(|(a, _), (b, _)| compare_ascii(a, b));
        } else {
            let root = root();
            members.sort_by(|(a, _), (b, _)| root.compare(a, b));
        }
    }

    fn root() -> CollatorBorrowed<'static> {
        CollatorBorrowed::try_new(CollatorPreferences::default(), CollatorOptions::default())
            .expect("the data of the root collation is compiled in")
    }

    /// Compares ignoring case, then lower case before upper at the first difference. Agrees with the collator
    ///.
    fn compare_ascii(a: &str, b: &str) -> Ordering {
        let primary = |byte: u8| PRIMARY.get(usize::from(byte)).copied().unwrap_or(0);
        let weights = |byte: u8| (primary(byte) != 0).then(|| (primary(byte), byte.is_ascii_uppercase()));
        let a = || a.bytes().filter_map(weights);
        let b = || b.bytes().filter_map(weights);
        a().map(|it| it.0).cmp(b().map(|it| it.0)).then_with(|| a().map(|it| it.1).cmp(b().map(|it| it.1)))
    }

    #[cfg(test)]
    mod tests {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #[test]
            fn the_ascii_order_is_the_collators(a in "[\\x00-\\x7f]{0,6}", b in "[\\x00-\\x7f]{0,6}") {
                prop_assert_eq!(compare_ascii(&a, &b), root().compare(&a, &b));
            }

            #[test]
            fn similar_words_too(a in "[aAbB_1-]{0,4}", b in "[aAbB_1-]{0,4}") {
                prop_assert_eq!(compare_ascii(&a, &b), root().compare(&a, &b));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_was_a_pattern_of_late_is_the_same_one() {
        let first = Pattern::from("kept 0");
        assert!(Pattern::from("kept 0".to_owned()).is_same(&first));
        assert_eq!(Pattern::from("kept").as_str(), Some("kept"));
        for number in 1..KEPT {
            drop(Pattern::from(format!("kept {number}")));
        }
        let again = Pattern::from("kept 0");
        assert!(!again.is_same(&first) && again == first, "only so many are kept");
        let (longest, longer) = ("x".repeat(KEPT_BYTES), "x".repeat(KEPT_BYTES + 1));
        assert!(Pattern::from(&longest).is_same(&Pattern::from(&longest)));
        assert!(!Pattern::from(&longer).is_same(&Pattern::from(&longer)));
        LAST.with_borrow(|last| assert_eq!(last.len(), KEPT));
    }
}
