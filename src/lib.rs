// SPDX-License-Identifier: MIT OR Apache-2.0
//! Martlet: a microservice runtime on actix that speaks NestJS's wire protocols.

pub use martlet_core::*;

pub mod clients;
pub mod config;
pub mod prelude;
mod url;

pub use clients::Clients;
pub use config::{ConfigError, Transport, TransportKind};

#[cfg(feature = "macros")]
pub use martlet_macros::*;

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
