// SPDX-License-Identifier: MIT OR Apache-2.0
//! Martlet: a microservice runtime on actix that speaks NestJS's wire protocols.
#![warn(clippy::print_stdout)]

#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;
#[cfg(feature = "macros")]
mod macros;

pub mod clients;
pub mod config;
pub mod prelude;
mod url;

pub use clients::Clients;
pub use config::{ConfigError, Transport, TransportKind};

#[cfg(feature = "macros")]
pub use macros::*;
pub use martlet_core::*;

/// NestJS's TCP transporter.
#[cfg(feature = "tcp")]
pub mod tcp {
    pub use martlet_tcp::*;
}

/// NestJS's NATS transporter.
#[cfg(feature = "nats")]
pub mod nats {
    pub use martlet_nats::*;
}

/// NestJS's Redis transporter.
#[cfg(feature = "redis")]
pub mod redis {
    pub use martlet_redis::*;
}

/// NestJS's RabbitMQ transporter, RMQ.
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq {
    pub use martlet_rabbitmq::*;
}

/// NestJS's MQTT transporter.
#[cfg(feature = "mqtt")]
pub mod mqtt {
    pub use martlet_mqtt::*;
}

/// The code in the documentation, compiled and run as doctests.
#[cfg(all(doctest, feature = "macros", feature = "tcp"))]
mod documents {
    #[doc = include_str!("../docs/migrating.md")]
    mod migrating {}
}

/// A [`Pattern`] from a JSON object, or from anything that is `Into<Pattern>`.
///
/// It cannot fail: an object is always a pattern, and what is none (an array, `true`, `null`) does not compile.
/// For a value that is only known at run time there is [`Pattern::from_json`].
///
/// # Panics
///
/// As `serde_json::json!` does: when an expression inside the object cannot be serialised.
///
/// # Examples
///
/// ```
/// use martlet::pattern;
///
/// let version = 2;
/// assert_eq!(pattern!({ "v": version, "cmd": "sum" }).route().as_str(), r#"{"cmd":"sum","v":2}"#);
/// assert_eq!(pattern!("sum").route().as_str(), "sum");
/// assert_eq!(pattern!(7).route().as_str(), "7");
/// ```
#[macro_export]
macro_rules! pattern {
    ({ $($object:tt)* }) => {
        $crate::__private::object_pattern(&$crate::__private::json!({ $($object)* }))
    };
    ([ $($array:tt)* ]) => {
        ::core::compile_error!("an array is several patterns in NestJS: write one pattern for each of them")
    };
    (null) => {
        ::core::compile_error!("a pattern is a string, a whole number or a JSON object")
    };
    ($value:expr) => {
        <$crate::Pattern as ::core::convert::From<_>>::from($value)
    };
}
