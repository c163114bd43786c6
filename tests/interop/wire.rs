// SPDX-License-Identifier: MIT OR Apache-2.0
//! The transports of the lab, one row each: what the tests are told of them, and how a server and a client of ours are
//! made. Everything else is the same for all.

use std::fmt;

use martlet::mqtt::{MqttClient, MqttServer};
use martlet::nats::{NatsClient, NatsServer};
use martlet::rabbitmq::{RmqClient, RmqServer};
use martlet::redis::{RedisClient, RedisServer};
use martlet::tcp::{TcpClient, TcpServer};
use martlet::{ClientProxy, Server, TransportId};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::brokers::Kind;

/// A transport, or one of its modes where NestJS behaves differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Nats,
    Redis,
    RedisWildcards,
    Rmq,
    RmqAcks,
    RmqWildcards,
    Mqtt,
    Mqtt5,
}

/// What becomes of a request that nobody handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nobody {
    /// A service says that it has no handler.
    Answered,
    /// The broker says that nobody subscribes.
    Refused,
    /// Nothing happens.
    Silence,
}

/// How wildcards are written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wildcards {
    pub(crate) separator: &'static str,
    /// Any one word.
    pub(crate) one: &'static str,
    /// All further words.
    pub(crate) rest: &'static str,
}

/// A row of the table.
pub(crate) struct Wire {
    pub(crate) transport: Transport,
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// NestJS's transport: `--transport` of the peers.
    pub(crate) nest: &'static str,
    pub(crate) id: TransportId,
    pub(crate) broker: Option<Kind>,
    /// Options of every end, NestJS's and ours: the names are the same. They come back soon after a lost connection.
    both: &'static str,
    /// Further options of servers, NestJS's and ours.
    server: &'static str,
    /// Further options of our servers.
    ours: &'static str,
    /// The first NestJS version that has it.
    pub(crate) since: u32,
    /// What a NestJS client, and one of ours, observes of a request that nobody handles.
    pub(crate) nobody: [Nobody; 2],
    /// Whether a server gets, and reports, events that it has no handler for.
    pub(crate) unknown_events: bool,
    /// Whether the pattern's text is the address, in whatever spelling the caller has.
    pub(crate) text_is_address: bool,
    /// Whether a NestJS 12 handler is shown the metadata.
    pub(crate) nest_shows_metadata: bool,
    pub(crate) headers: bool,
    pub(crate) wildcards: Option<Wildcards>,
    /// The first NestJS version whose client works again after `close()`.
    pub(crate) client_reused_since: u32,
    /// The size of a large text.
    pub(crate) big: usize,
}

impl Wire {
    const TCP: Self = Self {
        transport: Transport::Tcp,
        name: "tcp",
        title: "TCP",
        nest: "tcp",
        id: TransportId::TCP,
        broker: None,
        both: "{}",
        server: "{}",
        ours: "{}",
        since: 10,
        nobody: [Nobody::Answered; 2],
        unknown_events: true,
        text_is_address: false,
        nest_shows_metadata: true,
        headers: false,
        wildcards: None,
        client_reused_since: 10,
        big: 10_000_000,
    };
}

const TABLE: [Wire; 9] = [
    Wire::TCP,
    Wire {
        transport: Transport::Nats,
        name: "nats",
        title: "NATS",
        nest: "nats",
        id: TransportId::NATS,
        broker: Some(Kind::Nats),
        both: r#"{"reconnectTimeWait":50,"maxReconnectAttempts":-1}"#,
        nobody: [Nobody::Refused; 2],
        unknown_events: false,
        text_is_address: true,
        nest_shows_metadata: false,
        headers: true,
        wildcards: Some(Wildcards { separator: ".", one: "*", rest: ">" }),
        // Below the broker's limit.
        big: 900_000,
        ..Wire::TCP
    },
    Wire {
        transport: Transport::Redis,
        name: "redis",
        title: "Redis",
        wildcards: None,
        server: "{}",
        ..REDIS
    },
    REDIS,
    RMQ,
    Wire {
        transport: Transport::RmqAcks,
        name: "rmq_acks",
        title: "RabbitMQ with acknowledgements (noAck: false)",
        server: r#"{"noAck":false}"#,
        ours: r#"{"onFailure":"discard"}"#,
        ..RMQ
    },
    Wire {
        transport: Transport::RmqWildcards,
        name: "rmq_wildcards",
        title: "RabbitMQ with wildcards",
        both: r#"{"socketOptions":{"reconnectTimeInSeconds":0.1},"wildcards":true}"#,
        since: 11,
        nobody: [Nobody::Silence, Nobody::Refused],
        unknown_events: false,
        text_is_address: true,
        wildcards: Some(Wildcards { separator: ".", one: "*", rest: "#" }),
        ..RMQ
    },
    MQTT,
    Wire {
        transport: Transport::Mqtt5,
        name: "mqtt5",
        title: "MQTT 5",
        nest: "mqtt5",
        both: r#"{"reconnectPeriod":50,"protocolVersion":5}"#,
        headers: true,
        ..MQTT
    },
];

const REDIS: Wire = Wire {
    transport: Transport::RedisWildcards,
    name: "redis_wildcards",
    title: "Redis with wildcards",
    nest: "redis",
    id: TransportId::REDIS,
    broker: Some(Kind::Redis),
    both: r#"{"retryAttempts":100000,"retryDelay":50}"#,
    server: r#"{"wildcards":true}"#,
    // The broker says how many received a request, which NestJS does not look at.
    nobody: [Nobody::Silence, Nobody::Refused],
    unknown_events: false,
    text_is_address: true,
    wildcards: Some(Wildcards { separator: ".", one: "*", rest: "*" }),
    client_reused_since: 12,
    ..Wire::TCP
};

const RMQ: Wire = Wire {
    transport: Transport::Rmq,
    name: "rmq",
    title: "RabbitMQ",
    nest: "rmq",
    id: TransportId::RMQ,
    broker: Some(Kind::Rabbitmq),
    both: r#"{"socketOptions":{"reconnectTimeInSeconds":0.1}}"#,
    nest_shows_metadata: false,
    headers: true,
    ..Wire::TCP
};

const MQTT: Wire = Wire {
    transport: Transport::Mqtt,
    name: "mqtt",
    title: "MQTT 3.1.1",
    nest: "mqtt",
    id: TransportId::MQTT,
    broker: Some(Kind::Mosquitto),
    both: r#"{"reconnectPeriod":50}"#,
    nobody: [Nobody::Silence; 2],
    unknown_events: false,
    text_is_address: true,
    nest_shows_metadata: false,
    wildcards: Some(Wildcards { separator: "/", one: "+", rest: "#" }),
    client_reused_since: 12,
    ..Wire::TCP
};

impl Transport {
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|wire| wire.transport)
    }

    pub(crate) fn wire(self) -> &'static Wire {
        TABLE.iter().find(|wire| wire.transport == self).expect("each has a row")
    }

    pub(crate) fn is_rmq(self) -> bool {
        self.wire().nest == "rmq"
    }

    pub(crate) fn is_redis(self) -> bool {
        self.wire().nest == "redis"
    }

    pub(crate) fn is_mqtt(self) -> bool {
        self.wire().nest.starts_with("mqtt")
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.wire().name)
    }
}

impl Wildcards {
    /// `["time", "us", "east"]` as an address.
    pub(crate) fn join(&self, words: &[&str]) -> String {
        words.join(self.separator)
    }
}

/// Which end gets options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    NestServer,
    NestClient,
    OurServer,
    OurClient,
}

impl Wire {
    /// The options of an end, without the address.
    pub(crate) fn options(&self, end: End) -> Value {
        let texts: &[&str] = match end {
            End::NestServer => &[self.both, self.server],
            End::OurServer => &[self.both, self.server, self.ours],
            End::NestClient | End::OurClient => &[self.both],
        };
        let mut options = json!({});
        for text in texts {
            lay_over(&mut options, serde_json::from_str(text).unwrap());
        }
        options
    }

    /// How our ends are told where the broker is; NestJS's get a URL.
    fn address(&self, url: &str, queue: &str) -> Value {
        match self.nest {
            "nats" => json!({ "servers": [url] }),
            "rmq" if queue.is_empty() => json!({ "urls": [url] }),
            "rmq" => json!({ "urls": [url], "queue": queue }),
            "tcp" => json!({ "host": "127.0.0.1", "port": port(url) }),
            _ => json!({ "url": url }),
        }
    }

    /// A server of ours. `more` is laid over its options.
    pub(crate) fn server(&self, url: &str, queue: &str, more: Value) -> Server {
        let options = self.whole(url, queue, End::OurServer, more);
        match self.nest {
            "tcp" => TcpServer::new(read(options)).into(),
            "nats" => NatsServer::new(read(options)),
            "redis" => RedisServer::new(read(options)),
            "rmq" => RmqServer::new(read(options)),
            _ => MqttServer::new(read(options)),
        }
    }

    /// A client of ours. `more` is laid over its options.
    pub(crate) fn client(&self, url: &str, queue: &str, more: Value) -> ClientProxy {
        let options = self.whole(url, queue, End::OurClient, more);
        match self.nest {
            "tcp" => TcpClient::new(read(options)),
            "nats" => NatsClient::new(read(options)),
            "redis" => RedisClient::new(read(options)),
            "rmq" => RmqClient::new(read(options)),
            _ => MqttClient::new(read(options)),
        }
    }

    fn whole(&self, url: &str, queue: &str, end: End, more: Value) -> Value {
        let mut options = self.address(url, queue);
        lay_over(&mut options, self.options(end));
        lay_over(&mut options, more);
        options
    }
}

/// Options as data, with NestJS's names.
fn read<T: DeserializeOwned>(options: Value) -> T {
    serde_json::from_value(options).unwrap()
}

pub(crate) fn lay_over(options: &mut Value, more: Value) {
    let (Value::Object(options), Value::Object(more)) = (options, more) else {
        panic!("options are objects")
    };
    let more: Map<String, Value> = more;
    options.extend(more);
}

/// The port of a URL.
pub(crate) fn port(url: &str) -> u16 {
    url.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap()
}
