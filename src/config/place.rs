// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the part of a URL before the `?` means to each transport, and how its options are shown as a URL again.

use std::fmt;

use serde_json::{Map, Value};

use super::TransportKind;
use crate::url::{self, TransportUrl};

/// The options that say where a transport is, which a URL does before its `?`.
pub(super) fn names(kind: TransportKind) -> &'static [&'static str] {
    match kind {
        TransportKind::Tcp => &["host", "port"],
        TransportKind::Redis => &["host", "port", "url"],
        TransportKind::Nats => &["servers"],
        TransportKind::Mqtt => &["url"],
        TransportKind::Rmq => &["urls"],
    }
}

/// The options that the place in a URL gives.
///
/// # Errors
///
/// What the transport does not have.
pub(super) fn options(kind: TransportKind, url: &TransportUrl) -> Result<Map<String, Value>, String> {
    let name = kind.name();
    let mut options = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            options.insert(name.to_owned(), value);
        }
    };
    let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty()).map(Value::String);
    let has_path = match kind {
        TransportKind::Tcp | TransportKind::Nats => false,
        TransportKind::Mqtt => url.scheme.starts_with("ws"),
        TransportKind::Redis | TransportKind::Rmq => true,
    };
    if url.path.is_some() && !has_path {
        return Err(format!("it has a path, which {}:// does not have", url.scheme));
    }
    let one_host = || match url.hosts.as_slice() {
        [host] => url::host_and_port(host),
        _ => Err(format!("{name} has one host")),
    };
    match kind {
        TransportKind::Tcp => {
            if url.user.is_some() {
                return Err(format!("{name} has no users"));
            }
            let (host, port) = one_host()?;
            set("host", host.map(Value::String));
            set("port", port.map(Value::from));
        }
        TransportKind::Redis => {
            let (host, port) = one_host()?;
            set("host", host.map(Value::String));
            set("port", port.map(Value::from));
            set("username", text(&url.user));
            set("password", text(&url.password));
            if let Some(path) = &url.path {
                let wrong = || format!("its path /{path} is not a number, that of a database");
                set("db", Some(Value::from(path.parse::<u32>().map_err(|_| wrong())?)));
            }
        }
        TransportKind::Nats => {
            let servers = places(url)?;
            let servers: Vec<_> =
                servers.map(|place| Value::String(format!("{}://{place}", url.scheme))).collect();
            set("servers", (!servers.is_empty()).then_some(Value::Array(servers)));
            set(if url.password.is_some() { "user" } else { "token" }, text(&url.user));
            set("pass", text(&url.password));
        }
        TransportKind::Mqtt => {
            let (host, port) = one_host()?;
            if host.is_some() || port.is_some() || url.scheme != "mqtt" {
                let host = if host.is_some() { "" } else { "localhost" };
                let path = url.path.as_ref().map(|path| format!("/{path}")).unwrap_or_default();
                set("url", Some(Value::String(format!("{}://{host}{}{path}", url.scheme, url.hosts[0]))));
            }
            set("username", text(&url.user));
            set("password", text(&url.password));
        }
        TransportKind::Rmq => {
            let user = url.login.as_ref().map(|login| format!("{login}@")).unwrap_or_default();
            let vhost = url.path.as_ref().map(|path| format!("/{path}")).unwrap_or_default();
            if url.path.as_ref().is_some_and(|path| path.contains('/')) {
                return Err(format!("its path {vhost} has another /: write %2F for one in a vhost's name"));
            }
            let mut urls: Vec<_> = places(url)?.collect();
            if urls.is_empty() && (!user.is_empty() || !vhost.is_empty() || url.scheme != "amqp") {
                urls.push("localhost");
            }
            let urls: Vec<_> = urls
                .into_iter()
                .map(|place| Value::String(format!("{}://{user}{place}{vhost}", url.scheme)))
                .collect();
            set("urls", (!urls.is_empty()).then_some(Value::Array(urls)));
        }
    }
    Ok(options)
}

/// The hosts of a URL that has several, checked.
fn places(url: &TransportUrl) -> Result<impl Iterator<Item = &str>, String> {
    for place in &url.hosts {
        url::host_and_port(place)?;
    }
    Ok(url.hosts.iter().map(String::as_str).filter(|place| !place.is_empty()))
}

/// Writes the URL that the options amount to, without secrets.
pub(super) fn show(
    kind: TransportKind,
    options: &Map<String, Value>,
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    let text = |name: &str| options.get(name).and_then(Value::as_str);
    match kind {
        TransportKind::Tcp => host_and_port(options, ["tcp", "tcps"], "tlsOptions", 3000, f),
        TransportKind::Redis => match text("url") {
            Some(url) => f.write_str(&bare(url)),
            None => {
                host_and_port(options, ["redis", "rediss"], "tls", 6379, f)?;
                match options.get("db").map(plain) {
                    Some(db) if db != "0" => write!(f, "/{db}"),
                    _ => Ok(()),
                }
            }
        },
        TransportKind::Nats => several(options.get("servers"), "nats://localhost:4222", f),
        TransportKind::Mqtt => f.write_str(&bare(text("url").unwrap_or("mqtt://localhost:1883"))),
        TransportKind::Rmq => several(options.get("urls"), "amqp://localhost", f),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn host_and_port(
    options: &Map<String, Value>,
    [scheme, with_tls]: [&str; 2],
    tls: &str,
    port: u16,
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    let scheme = if options.get(tls).is_some_and(|tls| !tls.is_null()) { with_tls } else { scheme };
    let host = options.get("host").and_then(Value::as_str).unwrap_or("localhost");
    let host = if host.contains(':') { format!("[{host}]") } else { url::encode(host) };
    let port = options.get("port").map_or_else(|| port.to_string(), plain);
    write!(f, "{scheme}://{host}:{port}")
}

/// A list of brokers: the scheme and the path of the first, the places of all.
fn several(brokers: Option<&Value>, default: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let brokers: Vec<_> = match brokers {
        Some(Value::Array(brokers)) => brokers.iter().map(broker).collect(),
        Some(Value::String(brokers)) => brokers.split(',').map(|broker| bare(broker.trim())).collect(),
        Some(one @ Value::Object(_)) => vec![broker(one)],
        _ => vec![default.to_owned()],
    };
    let first = brokers.first().map_or(default, String::as_str);
    let scheme = default.split("://").next().unwrap_or_default();
    let (scheme, rest) = first.split_once("://").unwrap_or((scheme, first));
    let path = rest.find('/').map_or("", |at| &rest[at..]);
    let places = brokers.iter().map(|broker| {
        let place = broker.split_once("://").map_or(broker.as_str(), |(_, place)| place);
        place.split('/').next().unwrap_or_default()
    });
    write!(f, "{scheme}://{}{path}", places.collect::<Vec<_>>().join(","))
}

/// A broker as NestJS writes it: a URL, or for RabbitMQ an object.
fn broker(broker: &Value) -> String {
    let Value::Object(members) = broker else { return bare(broker.as_str().unwrap_or_default()) };
    let text = |name: &str, default: &str| members.get(name).map_or_else(|| default.to_owned(), plain);
    let port = members.get("port").map(|port| format!(":{}", plain(port))).unwrap_or_default();
    let vhost = members.get("vhost").map(plain).filter(|vhost| vhost != "/");
    let vhost = vhost.map(|vhost| format!("/{}", url::encode_all(&vhost))).unwrap_or_default();
    format!("{}://{}{port}{vhost}", text("protocol", "amqp"), text("hostname", "localhost"))
}

/// A URL without login and query.
fn bare(url: &str) -> String {
    let url = url.split('?').next().unwrap_or(url);
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let rest = rest.rsplit_once('@').map_or(rest, |(_, place)| place).trim_end_matches('/');
    if scheme.is_empty() { rest.to_owned() } else { format!("{scheme}://{rest}") }
}
