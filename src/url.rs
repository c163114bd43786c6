// SPDX-License-Identifier: MIT OR Apache-2.0
//! The URLs of transports: `scheme://[user[:password]@]host[:port][,host[:port]…][/path][?option=value&…]`.
//!
//! Not a general URL: NATS's lists of brokers are none either. `%20` is decoded, `+` stays a plus sign.

use serde_json::{Map, Value};

use crate::config::scheme_list;

/// A URL in its parts.
#[derive(Debug, PartialEq)]
pub(crate) struct TransportUrl {
    pub(crate) scheme: String,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
    /// User and password as written.
    pub(crate) login: Option<String>,
    /// Every `host[:port]`, as written; at least one, which may be empty.
    pub(crate) hosts: Vec<String>,
    /// What is behind the first `/`, as written; never empty.
    pub(crate) path: Option<String>,
    pub(crate) options: Map<String, Value>,
}

impl TransportUrl {
    /// Takes a URL apart.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| format!("it does not begin with {}", scheme_list()))?;
        let (place, query) = match rest.split_once('?') {
            Some((place, query)) => (place, query),
            None => (rest, ""),
        };
        if place.contains('#') || query.contains('#') {
            return Err("it has a # (write %23 if it belongs to a value)".to_owned());
        }
        let (place, path) = place.split_once('/').unwrap_or((place, ""));
        if path.contains('@') {
            return Err("it has an @ behind a / (write %2F or %40 if it belongs to a name)".to_owned());
        }
        let (login, hosts) = match place.rsplit_once('@') {
            Some((login, hosts)) => (Some(login), hosts),
            None => (None, place),
        };
        let (user, password) = match login.map(|user| user.split_once(':').unwrap_or((user, ""))) {
            Some((user, "")) => (Some(decode(user)?), None),
            Some((user, password)) => (Some(decode(user)?), Some(decode(password)?)),
            None => (None, None),
        };
        let hosts = hosts.split(',').map(|host| host.trim().to_owned()).collect();
        let mut options = Map::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            if name.is_empty() {
                return Err(format!("the query has a value {value:?} without a name"));
            }
            let path: Vec<&str> = name.split('.').collect();
            insert(&mut options, &path, Value::String(value), true)?;
        }
        Ok(Self {
            scheme: scheme.to_ascii_lowercase(),
            user,
            password,
            login: login.map(str::to_owned),
            hosts,
            path: (!path.is_empty()).then(|| path.to_owned()),
            options,
        })
    }
}

/// Puts a value at a path of names; a repeated one becomes a list if `repeat`, else it is replaced.
///
/// # Errors
///
/// When a name on the path already has a value of its own.
pub(crate) fn insert(
    options: &mut Map<String, Value>,
    path: &[&str],
    value: Value,
    repeat: bool,
) -> Result<(), String> {
    match path {
        [] => Ok(()),
        [name] => {
            match options.get_mut(*name) {
                None => {
                    options.insert((*name).to_owned(), value);
                }
                Some(Value::Object(_)) => {
                    return Err(format!("option {name} is a group of options and has no value of its own"));
                }
                Some(Value::Array(items)) if repeat => items.push(value),
                Some(first) if repeat => *first = Value::Array(vec![first.take(), value]),
                Some(other) => *other = value,
            }
            Ok(())
        }
        [name, rest @ ..] => match options.entry(*name).or_insert_with(|| Value::Object(Map::new())) {
            Value::Object(group) => insert(group, rest, value, repeat),
            _ => Err(format!("option {name} has a value and is a group of options too")),
        },
    }
}

/// Splits `host:port`, `[::1]:port`, `host`, `:port` or nothing.
pub(crate) fn host_and_port(text: &str) -> Result<(Option<String>, Option<u16>), String> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("the [ of its address is not closed")?;
        match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            None => return Err(format!("{rest:?} after the ] is no port")),
        }
    } else {
        match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("an IPv6 address needs brackets: [::1]:3000".to_owned());
            }
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let port = match port {
        None | Some("") => None,
        Some(port) => {
            Some(port.parse().map_err(|_| format!("port {port:?} is not a number from 0 to 65535"))?)
        }
    };
    let host = decode(host)?;
    Ok(((!host.is_empty()).then_some(host), port))
}

fn decode(text: &str) -> Result<String, String> {
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let wrong =
        || format!("{text:?} has a % that is not followed by two hexadecimal digits (write %25 for it)");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
            let (Some(high), Some(low)) = (digit(), digit()) else { return Err(wrong()) };
            bytes.push((high * 16 + low) as u8);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| format!("{text:?} is not UTF-8 once decoded"))
}

/// Percent-encodes what would end or split a value.
pub(crate) fn encode(text: &str) -> String {
    encode_except(text, b"-_.~/:*>,")
}

/// Percent-encodes what would end or split a part of a path.
pub(crate) fn encode_all(text: &str) -> String {
    encode_except(text, b"-_.~")
}

fn encode_except(text: &str, kept: &[u8]) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || kept.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_url_is_taken_apart() {
        let url = TransportUrl::parse("NATS://us%40er:pa:ss@a:1,[::1]:2?x=1&g.k=v+w%20&x=2&flag").unwrap();
        assert_eq!(url.scheme, "nats");
        assert_eq!((url.user.as_deref(), url.password.as_deref()), (Some("us@er"), Some("pa:ss")));
        assert_eq!((url.login.as_deref(), url.path), (Some("us%40er:pa:ss"), None));
        assert_eq!(url.hosts, ["a:1", "[::1]:2"]);
        let path = |text| TransportUrl::parse(text).unwrap().path;
        assert_eq!(path("amqp://a/"), None);
        assert_eq!(path("amqp://a/%2Fv/w?queue=a/b").as_deref(), Some("%2Fv/w"));
        assert_eq!(Value::Object(url.options), json!({"x":["1","2"],"g":{"k":"v+w "},"flag":""}));
    }

    #[test]
    fn hosts_and_ports_are_told_apart() {
        let check = |text| host_and_port(text).unwrap();
        assert_eq!(check("a:1"), (Some("a".to_owned()), Some(1)));
        assert_eq!(check("[::1]:3"), (Some("::1".to_owned()), Some(3)));
        assert_eq!(check("[::1]"), (Some("::1".to_owned()), None));
        assert_eq!(check(":3"), (None, Some(3)));
        assert_eq!(check(""), (None, None));
        for wrong in ["a:70000", "a:b", "::1", "[::1", "[::1]x"] {
            host_and_port(wrong).unwrap_err();
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused_and_never_panics() {
        for wrong in [
            "",
            "tcp",
            "tcp:/a",
            "tcp://a/b@c",
            "tcp://a?x=%4",
            "tcp://a?x=%GG",
            "tcp://a#b",
            "tcp://a?=1",
            "tcp://a?x=1&x.y=2",
            "tcp://a?x.y=1&x=2",
            "tcp://a?x=%ff",
        ] {
            TransportUrl::parse(wrong).expect_err(wrong);
        }
    }

    #[test]
    fn an_encoded_value_decodes_to_itself() {
        for text in ["", "a b", "ü&=?#%+", "time.us.*", "a,b/c:d"] {
            assert_eq!(decode(&encode(text)).unwrap(), text);
        }
    }
}
