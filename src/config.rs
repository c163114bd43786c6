// SPDX-License-Identifier: MIT OR Apache-2.0
//! Transports described as data: a URL, a configuration file, the environment.
//!
//! Options have NestJS's names everywhere: in the query of a URL (`?maxBufferSize=1000`, groups with a dot:
//! `?tlsOptions.ca=ca.pem`), in data as NestJS writes it
//! (`{"transport":"TCP","options":{"port":3000}}`), and in the environment
//! (`MARTLET_ORDERS_OPTIONS__MAX_BUFFER_SIZE=1000`).

mod kind;
mod loose;
mod place;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use martlet_core::{ClientProxy, Server};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

pub use self::kind::TransportKind;
use self::kind::Transports;
pub(crate) use self::kind::scheme_list;
use self::loose::{Fault, Loose, LooseError};
use crate::url::{self, TransportUrl};

/// Why a description of a transport cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no option of this name.
    #[error("unknown option {option} for {owner}{} (options are: {})", Hint(.nearest), .known.join(", "))]
    UnknownOption {
        /// The name given; within a group, with the group's name before it.
        option: String,
        /// What the options are of: `tcp servers`.
        owner: String,
        /// The nearest right name.
        nearest: Option<String>,
        /// Every right name.
        known: Vec<String>,
    },
    /// An option that the other side has.
    #[error("option {option} is for {for_side}, not for {owner}")]
    OtherSide {
        /// The option.
        option: String,
        /// What it is for.
        for_side: String,
        /// What it was given to.
        owner: String,
    },
    /// An option has a value that cannot be used.
    #[error("option {option} for {owner}: {reason}")]
    Option {
        /// The option.
        option: String,
        /// What the options are of.
        owner: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A URL cannot be read. User and password are left out of the text.
    #[error("bad url {url:?}: {reason}")]
    Url {
        /// The URL.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such transport here.
    #[error("unknown transport {transport}: known are {Transports}")]
    UnknownTransport {
        /// What was given.
        transport: String,
    },
    /// This build does not have the transport.
    #[error("transport {transport} is not in this build: enable the cargo feature `{feature}` of martlet")]
    FeatureOff {
        /// The transport.
        transport: &'static str,
        /// The feature.
        feature: &'static str,
    },
    /// Data is not what a configuration looks like.
    #[error("bad configuration: {reason}")]
    Data {
        /// What is wrong with it.
        reason: String,
    },
    /// A file cannot be read.
    #[error("cannot read file {}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// A variable that is needed is not set.
    #[error("environment variable {variable} is not set: it holds a transport's url, such as {example}")]
    Environment {
        /// The variable.
        variable: String,
        /// A value it could have.
        example: &'static str,
    },
    /// Something is wrong in the configuration of a named client.
    #[error("client {name}: {source}")]
    Client {
        /// The client's name.
        name: String,
        /// What.
        source: Box<ConfigError>,
    },
}

struct Hint<'a>(&'a Option<String>);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |nearest| write!(f, ": did you mean {nearest}?"))
    }
}

impl ConfigError {
    fn unknown<'a>(option: &str, prefix: &str, owner: &str, known: impl Iterator<Item = &'a str>) -> Self {
        let full = |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        let known: Vec<&str> = known.filter(|name| !name.is_empty()).collect();
        Self::UnknownOption {
            option: full(option),
            owner: owner.to_owned(),
            nearest: nearest(option, known.iter().copied()).map(full),
            known: known.into_iter().map(full).collect(),
        }
    }
}

/// The name that is most like the given one, if any is like it at all.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['_', '-'], "");
    let wanted = plain(name);
    let distance = |known: &str| strsim::osa_distance(&wanted, known);
    let is_like = |known: &str| strsim::jaro_winkler(&wanted, known) > 0.75 || distance(known) <= 1;
    known
        .map(|known| (plain(known), known))
        .filter(|(plain, _)| is_like(plain))
        .min_by_key(|(plain, _)| distance(plain))
        .map(|(_, known)| known)
}

/// One server or client, described as data.
///
/// What the options are called and whether their values make sense is checked when it becomes a server
/// ([`into_server`](Self::into_server)) or a client ([`into_client`](Self::into_client)), because the two
/// have different ones.
///
/// | URL | is |
/// |---|---|
/// | `tcp://127.0.0.1:3000?maxBufferSize=1000` | TCP; host and port default to `localhost` and 3000 |
/// | `tcps://example.com?ca=ca.pem` | TCP with TLS; `ca`, `key`, `cert`, … are those of `tlsOptions` |
/// | `nats://user:pass@a:4222,b:4222?queue=workers` | NATS with two brokers; a user without password is a token |
/// | `tls://a:4222?caFile=ca.pem` | NATS with TLS; `caFile`, `certFile`, … are those of `tls` |
/// | `redis://user:pass@a:6379/2?wildcards=true` | Redis, database 2; `rediss://` with TLS |
/// | `amqp://user:pass@a:5672/vhost?queue=orders` | RabbitMQ; several hosts are tried in order; `amqps://` with TLS |
/// | `mqtt://user:pass@a:1883?protocolVersion=5` | MQTT; `mqtts://` with TLS, `ws://` and `wss://` with a path |
///
/// # Examples
///
/// ```
/// use martlet::Transport;
///
/// let transport = Transport::from_url("tcp://127.0.0.1:4000?maxBufferSize=1000")?;
/// # #[cfg(feature = "tcp")] {
/// assert_eq!(transport.tcp_server_options()?.max_buffer_size, 1000);
/// # }
///
/// let transport = Transport::from_json(r#"{"transport":"TCP","options":{"port":4000}}"#)?;
/// assert_eq!(transport.to_string(), "tcp://localhost:4000");
/// # Ok::<(), martlet::ConfigError>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Transport {
    kind: TransportKind,
    options: Map<String, Value>,
}

/// Which options a description is read as.
#[derive(Clone, Copy)]
enum Side {
    Server,
    Client,
}

impl Side {
    fn of(self, kind: TransportKind) -> String {
        let side = match self {
            Self::Server => "servers",
            Self::Client => "clients",
        };
        format!("{} {side}", kind.name())
    }

    fn other(self) -> Self {
        match self {
            Self::Server => Self::Client,
            Self::Client => Self::Server,
        }
    }
}

// Which of its variants are used depends on the features.
#[allow(dead_code)]
impl Transport {
    /// A transport with options as data.
    ///
    /// # Errors
    ///
    /// [`ConfigError::FeatureOff`] when this build does not have it.
    pub fn new(kind: TransportKind, options: Map<String, Value>) -> Result<Self, ConfigError> {
        Ok(Self { kind: kind.enabled()?, options })
    }

    /// Reads a URL.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn from_url(url: &str) -> Result<Self, ConfigError> {
        let bad = |reason: String| ConfigError::Url { url: without_secrets(url), reason };
        let parts = TransportUrl::parse(url.trim()).map_err(bad)?;
        let (kind, tls) = TransportKind::of_scheme(&parts.scheme).map_err(bad)?;
        let kind = kind.enabled()?;
        let place = place::options(kind, &parts).map_err(bad)?;
        let mut options = parts.options;
        let twice = |name: &str| bad(format!("{name} is given twice: before and after the ?"));
        if !parts.hosts.iter().all(String::is_empty)
            && let Some(given) = place::names(kind).iter().find(|name| options.contains_key(**name))
        {
            return Err(twice(given));
        }
        if tls {
            let (group, short) = kind.entry().tls;
            let short: Vec<_> = short.iter().filter_map(|name| options.remove_entry(*name)).collect();
            options.entry(group).or_insert_with(|| Value::Object(Map::new()));
            for (name, value) in short {
                url::insert(&mut options, &[group, &name], value, false).map_err(bad)?;
            }
        }
        for (name, value) in place {
            if options.insert(name.clone(), value).is_some() {
                return Err(twice(&name));
            }
        }
        Ok(Self { kind, options })
    }

    /// Reads NestJS's form, `{"transport":"tcp","options":{…}}`, where the transport is a name in any case or
    /// NestJS's number and is TCP if it is missing; or `{"url":"…","options":{…}}`, where `options` are laid
    /// over those of the URL; or a text, which is a URL.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn from_value(value: Value) -> Result<Self, ConfigError> {
        const KNOWN: [&str; 3] = ["transport", "options", "url"];
        let mut members = match value {
            Value::String(url) => return Self::from_url(&url),
            Value::Object(members) => members,
            other => {
                let reason = format!("a transport is an object or a url, not {other}");
                return Err(ConfigError::Data { reason });
            }
        };
        if let Some(unknown) = members.keys().find(|name| !KNOWN.contains(&name.as_str())) {
            return Err(ConfigError::unknown(unknown, "", "transports", KNOWN.into_iter()));
        }
        let data = |reason: &str| ConfigError::Data { reason: reason.to_owned() };
        let options = match members.remove("options") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(options)) => options,
            Some(_) => return Err(data("the options of a transport are an object")),
        };
        match (members.remove("url"), members.remove("transport")) {
            (Some(_), Some(_)) => Err(data("a transport has either a url or a transport, not both")),
            (Some(Value::String(url)), None) => {
                let mut transport = Self::from_url(&url)?;
                lay_over(&mut transport.options, options);
                Ok(transport)
            }
            (Some(_), None) => Err(data("the url of a transport is a text")),
            (None, None | Some(Value::Null)) => Self::new(TransportKind::Tcp, options),
            (None, Some(kind)) => Self::new(TransportKind::from_value(&kind)?, options),
        }
    }

    /// Reads [that form](Self::from_value) from JSON text.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        Self::from_value(json(text)?)
    }

    /// Reads [that form](Self::from_value) from a JSON file.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        Self::from_json(&file(path.as_ref())?)
    }

    /// Reads the environment: `MARTLET_<NAME>_URL`, and over it every `MARTLET_<NAME>_OPTIONS__<OPTION>`,
    /// where words are separated by `_` and groups by `__`:
    ///
    /// ```text
    /// MARTLET_ORDERS_URL=tcp://orders:3000
    /// MARTLET_ORDERS_OPTIONS__MAX_BUFFER_SIZE=1000
    /// MARTLET_ORDERS_OPTIONS__TLS_OPTIONS__CA=/etc/orders/ca.pem
    /// ```
    ///
    /// The name is taken in capitals, with `_` for what is no letter or digit.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Environment`] when the URL is not set, or what is wrong with it.
    pub fn from_env(name: &str) -> Result<Self, ConfigError> {
        // Variables that are not UTF-8 are none of ours.
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::from_env_vars(name, variables)
    }

    /// As [`from_env`](Self::from_env), from given variables.
    ///
    /// # Errors
    ///
    /// As [`from_env`](Self::from_env).
    pub fn from_env_vars(
        name: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let name: String = name
            .chars()
            .map(|letter| if letter.is_ascii_alphanumeric() { letter.to_ascii_uppercase() } else { '_' })
            .collect();
        let variable = format!("MARTLET_{name}_URL");
        let prefix = format!("MARTLET_{name}_OPTIONS__");
        let (mut url, mut over) = (None, Map::new());
        let mut variables: Vec<_> = variables.into_iter().collect();
        variables.sort();
        for (name, value) in variables {
            if name == variable {
                url = Some(value);
            } else if let Some(path) = name.strip_prefix(&prefix) {
                let path: Vec<String> = path.split("__").map(camel_case).collect();
                let path: Vec<&str> = path.iter().map(String::as_str).collect();
                url::insert(&mut over, &path, Value::String(value), false)
                    .map_err(|reason| ConfigError::Data { reason: format!("{name}: {reason}") })?;
            }
        }
        let url = url.ok_or(ConfigError::Environment { variable, example: "tcp://127.0.0.1:3000" })?;
        let mut transport = Self::from_url(&url)?;
        lay_over(&mut transport.options, over);
        Ok(transport)
    }

    /// The protocol.
    pub fn kind(&self) -> TransportKind {
        self.kind
    }

    /// The options, as data. They may hold secrets.
    pub fn options(&self) -> &Map<String, Value> {
        &self.options
    }

    /// Sets an option by its name, replacing what it had.
    #[must_use]
    pub fn with(mut self, option: impl Into<String>, value: impl Into<Value>) -> Self {
        self.options.insert(option.into(), value.into());
        self
    }

    /// The same transport without the options that only servers have: a client's, from the description of a
    /// server.
    #[must_use]
    pub fn for_clients(self) -> Self {
        self.without_those_of(Side::Server)
    }

    /// The same transport without the options that only clients have.
    #[must_use]
    pub fn for_servers(self) -> Self {
        self.without_those_of(Side::Client)
    }

    fn without_those_of(mut self, side: Side) -> Self {
        let (theirs, ours) = (option_keys(self.kind, side), option_keys(self.kind, side.other()));
        self.options.retain(|name, _| ours.contains(&name.as_str()) || !theirs.contains(&name.as_str()));
        self
    }

    /// A server of it, for [`Microservice::server`](crate::Microservice::server).
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used.
    pub fn into_server(self) -> Result<Server, ConfigError> {
        match self.kind {
            #[cfg(feature = "tcp")]
            TransportKind::Tcp => Ok(self.tcp_server_options()?.into()),
            #[cfg(feature = "redis")]
            TransportKind::Redis => Ok(self.redis_server_options()?.into()),
            #[cfg(feature = "nats")]
            TransportKind::Nats => Ok(martlet_nats::NatsServer::new(self.nats_server_options()?)),
            #[cfg(feature = "mqtt")]
            TransportKind::Mqtt => Ok(self.mqtt_server_options()?.into()),
            #[cfg(feature = "rabbitmq")]
            TransportKind::Rmq => Ok(self.rmq_server_options()?.into()),
            #[allow(unreachable_patterns)]
            other => Err(other.feature_off()),
        }
    }

    /// A client of it. Nothing is connected until its first use.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used.
    pub fn into_client(self) -> Result<ClientProxy, ConfigError> {
        match self.kind {
            #[cfg(feature = "tcp")]
            TransportKind::Tcp => Ok(self.tcp_client_options()?.into()),
            #[cfg(feature = "redis")]
            TransportKind::Redis => Ok(self.redis_client_options()?.into()),
            #[cfg(feature = "nats")]
            TransportKind::Nats => Ok(martlet_nats::NatsClient::new(self.nats_client_options()?)),
            #[cfg(feature = "mqtt")]
            TransportKind::Mqtt => Ok(self.mqtt_client_options()?.into()),
            #[cfg(feature = "rabbitmq")]
            TransportKind::Rmq => Ok(self.rmq_client_options()?.into()),
            #[allow(unreachable_patterns)]
            other => Err(other.feature_off()),
        }
    }

    /// The options of a TCP server, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no TCP transport.
    #[cfg(feature = "tcp")]
    pub fn tcp_server_options(&self) -> Result<martlet_tcp::TcpServerOptions, ConfigError> {
        self.read(TransportKind::Tcp, Side::Server)
    }

    /// The options of a TCP client, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no TCP transport.
    #[cfg(feature = "tcp")]
    pub fn tcp_client_options(&self) -> Result<martlet_tcp::TcpClientOptions, ConfigError> {
        self.read(TransportKind::Tcp, Side::Client)
    }

    /// The options of a NATS server, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no NATS transport.
    #[cfg(feature = "nats")]
    pub fn nats_server_options(&self) -> Result<martlet_nats::NatsServerOptions, ConfigError> {
        self.read(TransportKind::Nats, Side::Server)
    }

    /// The options of a NATS client, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no NATS transport.
    #[cfg(feature = "nats")]
    pub fn nats_client_options(&self) -> Result<martlet_nats::NatsClientOptions, ConfigError> {
        self.read(TransportKind::Nats, Side::Client)
    }

    /// The options of a Redis server, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no Redis transport.
    #[cfg(feature = "redis")]
    pub fn redis_server_options(&self) -> Result<martlet_redis::RedisServerOptions, ConfigError> {
        self.read(TransportKind::Redis, Side::Server)
    }

    /// The options of a Redis client, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no Redis transport.
    #[cfg(feature = "redis")]
    pub fn redis_client_options(&self) -> Result<martlet_redis::RedisClientOptions, ConfigError> {
        self.read(TransportKind::Redis, Side::Client)
    }

    /// The options of an MQTT server, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no MQTT transport.
    #[cfg(feature = "mqtt")]
    pub fn mqtt_server_options(&self) -> Result<martlet_mqtt::MqttServerOptions, ConfigError> {
        self.read(TransportKind::Mqtt, Side::Server)
    }

    /// The options of an MQTT client, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no MQTT transport.
    #[cfg(feature = "mqtt")]
    pub fn mqtt_client_options(&self) -> Result<martlet_mqtt::MqttClientOptions, ConfigError> {
        self.read(TransportKind::Mqtt, Side::Client)
    }

    /// The options of a RabbitMQ server, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no RabbitMQ transport.
    #[cfg(feature = "rabbitmq")]
    pub fn rmq_server_options(&self) -> Result<martlet_rabbitmq::RmqServerOptions, ConfigError> {
        self.read(TransportKind::Rmq, Side::Server)
    }

    /// The options of a RabbitMQ client, to be changed from code.
    ///
    /// # Errors
    ///
    /// The option that is unknown or cannot be used, or that it is no RabbitMQ transport.
    #[cfg(feature = "rabbitmq")]
    pub fn rmq_client_options(&self) -> Result<martlet_rabbitmq::RmqClientOptions, ConfigError> {
        self.read(TransportKind::Rmq, Side::Client)
    }

    fn read<T: DeserializeOwned>(&self, kind: TransportKind, side: Side) -> Result<T, ConfigError> {
        if kind != self.kind {
            let reason = format!("{self} is no {} transport", kind.name());
            return Err(ConfigError::Data { reason });
        }
        let owner = side.of(kind);
        T::deserialize(Loose(Value::Object(self.options.clone()))).map_err(|error| {
            let LooseError { path, fault } = error;
            let path = path.join(".");
            match fault {
                Fault::Unknown { option, .. }
                    if path.is_empty() && option_keys(kind, side.other()).contains(&option.as_str()) =>
                {
                    ConfigError::OtherSide { option, for_side: side.other().of(kind), owner }
                }
                Fault::Unknown { option, known } => {
                    ConfigError::unknown(&option, &path, &owner, known.iter().copied())
                }
                Fault::Invalid(reason) => ConfigError::Option { option: path, owner, reason },
            }
        })
    }
}

fn option_keys(kind: TransportKind, side: Side) -> &'static [&'static str] {
    match (kind, side) {
        #[cfg(feature = "tcp")]
        (TransportKind::Tcp, Side::Server) => martlet_tcp::TcpServerOptions::OPTION_KEYS,
        #[cfg(feature = "tcp")]
        (TransportKind::Tcp, Side::Client) => martlet_tcp::TcpClientOptions::OPTION_KEYS,
        #[cfg(feature = "redis")]
        (TransportKind::Redis, Side::Server) => martlet_redis::RedisServerOptions::OPTION_KEYS,
        #[cfg(feature = "redis")]
        (TransportKind::Redis, Side::Client) => martlet_redis::RedisClientOptions::OPTION_KEYS,
        #[cfg(feature = "nats")]
        (TransportKind::Nats, Side::Server) => martlet_nats::NatsServerOptions::OPTION_KEYS,
        #[cfg(feature = "nats")]
        (TransportKind::Nats, Side::Client) => martlet_nats::NatsClientOptions::OPTION_KEYS,
        #[cfg(feature = "mqtt")]
        (TransportKind::Mqtt, Side::Server) => martlet_mqtt::MqttServerOptions::OPTION_KEYS,
        #[cfg(feature = "mqtt")]
        (TransportKind::Mqtt, Side::Client) => martlet_mqtt::MqttClientOptions::OPTION_KEYS,
        #[cfg(feature = "rabbitmq")]
        (TransportKind::Rmq, Side::Server) => martlet_rabbitmq::RmqServerOptions::OPTION_KEYS,
        #[cfg(feature = "rabbitmq")]
        (TransportKind::Rmq, Side::Client) => martlet_rabbitmq::RmqClientOptions::OPTION_KEYS,
        #[allow(unreachable_patterns)]
        _ => &[],
    }
}

/// Lays options over others, group by group.
fn lay_over(under: &mut Map<String, Value>, over: Map<String, Value>) {
    for (name, value) in over {
        match (under.get_mut(&name), value) {
            (Some(Value::Object(under)), Value::Object(over)) => lay_over(under, over),
            (_, value) => {
                under.insert(name, value);
            }
        }
    }
}

/// `MAX_BUFFER_SIZE` as NestJS writes it: `maxBufferSize`.
fn camel_case(name: &str) -> String {
    let mut out = String::new();
    for (position, word) in name.split('_').filter(|word| !word.is_empty()).enumerate() {
        let mut letters = word.chars();
        if let Some(first) = letters.next() {
            out.push(if position == 0 { first.to_ascii_lowercase() } else { first.to_ascii_uppercase() });
        }
        out.extend(letters.map(|letter| letter.to_ascii_lowercase()));
    }
    out
}

/// A URL without its user and password, for messages.
fn without_secrets(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (place, query) = rest.split_at(rest.find('?').unwrap_or(rest.len()));
    let place = place.rsplit_once('@').map_or(place, |(_, place)| place);
    let query: Vec<_> = query.split('&').map(|pair| if secret(pair) { "…" } else { pair }).collect();
    format!("{scheme}://{place}{}", query.join("&"))
}

fn secret(pair: &str) -> bool {
    ["pass=", "password=", "token=", "nkey=", "credentials=", "key="].iter().any(|name| pair.contains(name))
}

pub(crate) fn json(text: &str) -> Result<Value, ConfigError> {
    serde_json::from_str(text).map_err(|error| ConfigError::Data { reason: error.to_string() })
}

pub(crate) fn file(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path)
        .map_err(|source| ConfigError::File { path: path.to_owned(), source: Arc::new(source) })
}

impl fmt::Display for Transport {
    /// The URL without options and secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        place::show(self.kind, &self.options, f)
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets.
        let options: Vec<_> = self.options.keys().collect();
        f.debug_struct("Transport").field("url", &self.to_string()).field("options", &options).finish()
    }
}

impl std::str::FromStr for Transport {
    type Err = ConfigError;

    fn from_str(url: &str) -> Result<Self, ConfigError> {
        Self::from_url(url)
    }
}

impl<'de> Deserialize<'de> for Transport {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_value(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
