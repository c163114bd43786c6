// SPDX-License-Identifier: MIT OR Apache-2.0
//! Brokers' addresses: URLs and NestJS's objects, pure.

use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};
use martlet_core::options::percent_decoded;
use serde::{Deserialize, Deserializer};

/// An address as an object, as amqplib's `Options.Connect`.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Parts {
    protocol: String,
    hostname: String,
    port: Option<u16>,
    username: String,
    password: String,
    vhost: String,
}

impl Default for Parts {
    fn default() -> Self {
        let text = str::to_owned;
        Self {
            protocol: text("amqp"),
            hostname: text("localhost"),
            port: None,
            username: text("guest"),
            password: text("guest"),
            vhost: text("/"),
        }
    }
}

impl Parts {
    fn url(&self) -> String {
        let [user, password, vhost] = [&self.username, &self.password, &self.vhost].map(|text| encoded(text));
        let port = self.port.map(|port| format!(":{port}")).unwrap_or_default();
        format!("{}://{user}:{password}@{}{port}/{vhost}", self.protocol, self.hostname)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Address {
    Text(String),
    Parts(Parts),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    Many(Vec<Address>),
    One(Address),
}

/// One address or several, each a text or an object: for `#[serde(deserialize_with)]`.
pub(crate) fn urls<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let one = |address: Address| match address {
        Address::Text(text) => text,
        Address::Parts(parts) => parts.url(),
    };
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(Address::Text(text)) => {
            text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
        }
        OneOrMany::One(address) => vec![one(address)],
        OneOrMany::Many(addresses) => addresses.into_iter().map(one).collect(),
    })
}

/// Percent-encodes what would end a part of a URL.
pub(crate) fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// A broker's address without user, password and query.
pub(crate) fn without_secrets(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("amqp", url));
    let rest = rest.split_once('?').map_or(rest, |(rest, _)| rest);
    // A password may have an unescaped slash, but no host an at sign.
    let place = rest.rsplit_once('@').map_or(rest, |(_, place)| place);
    format!("{scheme}://{}", place.trim_end_matches('/'))
}

/// Reads an address as amqplib does: what is missing is `guest`, `guest`, the scheme's port and the vhost `/`.
pub(crate) fn parse(url: &str) -> Result<AMQPUri, String> {
    let (scheme, rest) =
        url.split_once("://").ok_or("it has no scheme: write amqp://host or amqps://host")?;
    let scheme: AMQPScheme = match scheme {
        "amqp" => AMQPScheme::AMQP,
        "amqps" => AMQPScheme::AMQPS,
        other => return Err(format!("its scheme is {other:?}, not amqp or amqps")),
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (user, place) = rest.rsplit_once('@').map_or((None, rest), |(user, place)| (Some(user), place));
    let (place, vhost) = place.split_once('/').unwrap_or((place, ""));
    let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => (host, port.strip_prefix(':').filter(|port| !port.is_empty())),
        None => place.rsplit_once(':').map_or((place, None), |(host, port)| (host, Some(port))),
    };
    let port = match port {
        None => scheme.default_port(),
        Some(port) => port.parse().map_err(|_| format!("its port is {port:?}, not a number below 65536"))?,
    };
    if host.is_empty() {
        return Err("it has no host".to_owned());
    }
    let (username, password) = match user {
        None => ("guest".to_owned(), "guest".to_owned()),
        Some(user) => {
            let (user, password) = user.split_once(':').unwrap_or((user, ""));
            (percent_decoded(user), percent_decoded(password))
        }
    };
    let vhost = if vhost.is_empty() { "/".to_owned() } else { percent_decoded(vhost) };
    let authority =
        AMQPAuthority { userinfo: AMQPUserInfo { username, password }, host: host.to_owned(), port };
    Ok(AMQPUri { scheme, authority, vhost, query: parameters(query)? })
}

/// The parameters that amqplib reads from a URL; others are ignored, as there.
fn parameters(query: &str) -> Result<AMQPQueryString, String> {
    fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<Option<T>, String> {
        value
            .parse()
            .map(Some)
            .map_err(|_| format!("its parameter {name} is {value:?}, not a number in range"))
    }
    let mut parsed = AMQPQueryString::default();
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match name {
            "frameMax" | "frame_max" => parsed.frame_max = number(name, value)?,
            "channelMax" | "channel_max" => parsed.channel_max = number(name, value)?,
            "heartbeat" => parsed.heartbeat = number(name, value)?,
            "auth_mechanism" => {
                let mechanism: Result<SASLMechanism, _> = value.parse();
                parsed.auth_mechanism =
                    Some(mechanism.map_err(|_| format!("its parameter auth_mechanism is {value:?}"))?);
            }
            _ => {}
        }
    }
    Ok(parsed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, expected: (&str, u16, &str, &str, &str)) {
        let uri = parse(url).unwrap();
        let AMQPAuthority { userinfo, host, port } = &uri.authority;
        let found = (host.as_str(), *port, userinfo.username.as_str(), userinfo.password.as_str());
        assert_eq!((found.0, found.1, found.2, found.3, uri.vhost.as_str()), expected, "{url}");
    }

    #[test]
    fn addresses_are_read_as_amqplib_reads_them() {
        check("amqp://localhost", ("localhost", 5672, "guest", "guest", "/"));
        check("amqp://localhost/", ("localhost", 5672, "guest", "guest", "/"));
        check("amqps://h", ("h", 5671, "guest", "guest", "/"));
        check("amqp://me:p%40ss@10.0.0.1:99/%2Fa%2Fb", ("10.0.0.1", 99, "me", "p@ss", "/a/b"));
        check("amqp://[::1]:7/v?heartbeat=3", ("::1", 7, "guest", "guest", "v"));
        check("amqp://[::1]", ("::1", 5672, "guest", "guest", "/"));
        assert_eq!(parse("amqp://h?heartbeat=3&frameMax=8192").unwrap().query.heartbeat, Some(3));
        for bad in ["localhost", "http://h", "amqp://", "amqp://h:99999", "amqp://h?heartbeat=x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_and_parameters_are_not_shown() {
        assert_eq!(without_secrets("amqp://me:secret@host:1/v?queue=q"), "amqp://host:1/v");
        assert_eq!(without_secrets("amqp://me:s/e@host/"), "amqp://host");
    }

    #[test]
    fn an_object_becomes_a_url() {
        let json =
            serde_json::json!([{"hostname": "h", "port": 1, "username": "a b", "vhost": "x/y"}, "amqp://i"]);
        let read = urls(json).unwrap();
        assert_eq!(read, ["amqp://a%20b:guest@h:1/x%2Fy", "amqp://i"]);
        check(&read[0], ("h", 1, "a b", "guest", "x/y"));
        assert_eq!(urls(serde_json::json!("amqp://a, amqp://b")).unwrap(), ["amqp://a", "amqp://b"]);
    }
}
