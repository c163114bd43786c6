// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which transports there are: NestJS's names and numbers, ours, the schemes of URLs, the Cargo features. One
//! table, from which every message about them is made.

use std::fmt;

use serde_json::Value;

use super::{ConfigError, nearest};

/// The protocol of a [`Transport`](super::Transport).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TransportKind {
    /// NestJS's `Transport.TCP`, 0.
    Tcp,
    /// NestJS's `Transport.REDIS`, 1.
    Redis,
    /// NestJS's `Transport.NATS`, 2.
    Nats,
    /// NestJS's `Transport.MQTT`, 3.
    Mqtt,
    /// NestJS's `Transport.RMQ`, 5: RabbitMQ.
    Rmq,
}

/// A transport that NestJS has; its position is NestJS's number.
struct Known {
    /// NestJS's name.
    nest: &'static str,
    ours: Option<Ours>,
}

/// What Martlet has of it.
pub(super) struct Ours {
    kind: TransportKind,
    /// The name, as NestJS's in small letters.
    name: &'static str,
    /// The Cargo feature that brings it.
    feature: &'static str,
    /// Whether this build has it.
    is_enabled: bool,
    /// The schemes of its URLs, and whether they mean TLS.
    schemes: &'static [(&'static str, bool)],
    /// The group of its TLS options, and those of its options that a URL with TLS has without the group.
    pub(super) tls: (&'static str, &'static [&'static str]),
}

const FILES: &[&str] = &["caFile", "certFile", "keyFile"];

const NEST_TRANSPORTS: [Known; 7] = [
    Known {
        nest: "TCP",
        ours: Some(Ours {
            kind: TransportKind::Tcp,
            name: "tcp",
            feature: "tcp",
            is_enabled: cfg!(feature = "tcp"),
            schemes: &[("tcp", false), ("tcps", true)],
            tls: ("tlsOptions", &["ca", "key", "cert", "servername", "requestCert", "rejectUnauthorized"]),
        }),
    },
    Known {
        nest: "REDIS",
        ours: Some(Ours {
            kind: TransportKind::Redis,
            name: "redis",
            feature: "redis",
            is_enabled: cfg!(feature = "redis"),
            schemes: &[("redis", false), ("rediss", true)],
            tls: ("tls", FILES),
        }),
    },
    Known {
        nest: "NATS",
        ours: Some(Ours {
            kind: TransportKind::Nats,
            name: "nats",
            feature: "nats",
            is_enabled: cfg!(feature = "nats"),
            schemes: &[("nats", false), ("tls", true)],
            tls: ("tls", &["caFile", "certFile", "keyFile", "handshakeFirst"]),
        }),
    },
    Known {
        nest: "MQTT",
        ours: Some(Ours {
            kind: TransportKind::Mqtt,
            name: "mqtt",
            feature: "mqtt",
            is_enabled: cfg!(feature = "mqtt"),
            schemes: &[("mqtt", false), ("mqtts", true), ("ws", false), ("wss", true)],
            tls: ("tls", FILES),
        }),
    },
    Known { nest: "GRPC", ours: None },
    Known {
        nest: "RMQ",
        ours: Some(Ours {
            kind: TransportKind::Rmq,
            name: "rmq",
            feature: "rabbitmq",
            is_enabled: cfg!(feature = "rabbitmq"),
            schemes: &[("amqp", false), ("amqps", true)],
            tls: ("tls", FILES),
        }),
    },
    Known { nest: "KAFKA", ours: None },
];

fn ours() -> impl Iterator<Item = (usize, &'static Ours)> {
    NEST_TRANSPORTS.iter().enumerate().filter_map(|(number, known)| Some((number, known.ours.as_ref()?)))
}

fn schemes() -> impl Iterator<Item = &'static str> {
    ours().flat_map(|(_, ours)| ours.schemes).map(|(scheme, _)| *scheme)
}

impl TransportKind {
    /// Every transport that Martlet has, in the order of NestJS's numbers, in this build or not.
    pub fn all() -> impl Iterator<Item = Self> {
        ours().map(|(_, ours)| ours.kind)
    }

    pub(super) fn entry(self) -> &'static Ours {
        // The table has every kind: a test says so.
        ours().map(|(_, ours)| ours).find(|ours| ours.kind == self).unwrap_or_else(|| unreachable!())
    }

    /// NestJS's name in small letters: `tcp`, `redis`, `nats`, `mqtt`, `rmq`.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// The Cargo feature of `martlet` that brings it: `rabbitmq` for [`Rmq`](Self::Rmq), else its name.
    pub fn feature(self) -> &'static str {
        self.entry().feature
    }

    /// Whether this build has it.
    pub fn is_enabled(self) -> bool {
        self.entry().is_enabled
    }

    pub(super) fn enabled(self) -> Result<Self, ConfigError> {
        if self.is_enabled() { Ok(self) } else { Err(self.feature_off()) }
    }

    pub(super) fn feature_off(self) -> ConfigError {
        ConfigError::FeatureOff { transport: self.name(), feature: self.feature() }
    }

    /// The transport whose URLs have this scheme, and whether it means TLS.
    pub(super) fn of_scheme(scheme: &str) -> Result<(Self, bool), String> {
        for (_, ours) in ours() {
            if let Some((_, tls)) = ours.schemes.iter().find(|(known, _)| *known == scheme) {
                return Ok((ours.kind, *tls));
            }
        }
        let known: Vec<_> = schemes().collect();
        let nearest = nearest(scheme, schemes()).map(|nearest| format!(": did you mean {nearest}?"));
        Err(format!(
            "unknown scheme {scheme}{} (schemes are: {})",
            nearest.unwrap_or_default(),
            known.join(", ")
        ))
    }

    /// The transport of NestJS's name, in any case, or of NestJS's number.
    pub(super) fn from_value(value: &Value) -> Result<Self, ConfigError> {
        let unknown = |transport: String| ConfigError::UnknownTransport { transport };
        let known = match value {
            Value::String(name) => NEST_TRANSPORTS.iter().find(|known| known.nest.eq_ignore_ascii_case(name)),
            Value::Number(number) => {
                number.as_u64().and_then(|number| NEST_TRANSPORTS.get(usize::try_from(number).ok()?))
            }
            _ => None,
        };
        let known =
            known.ok_or_else(|| unknown(value.as_str().map_or_else(|| value.to_string(), str::to_owned)))?;
        known.ours.as_ref().map(|ours| ours.kind).ok_or_else(|| unknown(known.nest.to_owned()))
    }
}

/// `tcp (or 0), … and rmq (or 5)`.
pub(super) struct Transports;

impl fmt::Display for Transports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<_> = ours().map(|(number, ours)| format!("{} (or {number})", ours.name)).collect();
        let last = names.pop().unwrap_or_default();
        write!(f, "{} and {last}", names.join(", "))
    }
}

/// `tcp://, … or amqps://`.
pub(crate) fn scheme_list() -> String {
    let mut schemes: Vec<_> = schemes().map(|scheme| format!("{scheme}://")).collect();
    let last = schemes.pop().unwrap_or_default();
    format!("{} or {last}", schemes.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_kind_once() {
        use TransportKind::{Mqtt, Nats, Redis, Rmq, Tcp};
        assert_eq!(TransportKind::all().collect::<Vec<_>>(), [Tcp, Redis, Nats, Mqtt, Rmq]);
        for kind in TransportKind::all() {
            // Whoever adds a kind is led here by the compiler.
            match kind {
                Tcp | Redis | Nats | Mqtt | Rmq => assert_eq!(kind.entry().kind, kind),
            }
        }
        let mut all: Vec<_> = schemes().collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), schemes().count(), "a scheme means one transport");
    }
}
