// SPDX-License-Identifier: MIT OR Apache-2.0
//! NATS for Martlet: requests, events and replies as NestJS's NATS transport puts them on the wire, over
//! core NATS (no JetStream).
//!
//! # Goals
//!
//! A NestJS peer cannot tell this end from its own. Nothing is lost by a reconnect or a shutdown that core
//! NATS could have kept.
//!
//! # Non-goals
//!
//! Persistence and acknowledgement (JetStream), and slowing a publisher down, which core NATS cannot.
//!
//! # Examples
//!
//! ```no_run
//! use martlet_core::{Data, Microservice, RpcError, message};
//! use martlet_nats::{NatsClient, NatsClientOptions, NatsServer, NatsServerOptions};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let sum = message("sum", async |Data(numbers): Data<Vec<i64>>| {
//!     Ok::<_, RpcError>(numbers.iter().sum::<i64>())
//! });
//! let service = Microservice::new()
//!     .handlers(sum)
//!     .server(NatsServer::new(NatsServerOptions::new().queue("workers")))
//!     .start()
//!     .await?;
//! let client = NatsClient::new(NatsClientOptions::new());
//! let sum: i64 = client.send("sum", [1, 2, 3]).await?;
//! # Ok(()) }
//! ```
#![warn(clippy::print_stdout)]

mod client;
mod context;
mod dial;
mod link;
mod login;
mod merge;
pub mod options;
mod record;
mod server;
mod service;
mod session;
mod wire;

pub use client::NatsClient;
pub use context::NatsContext;
pub use dial::NatsDial;
pub use options::{NatsClientOptions, NatsServerOptions, NatsTlsOptions, ServicesDiscovery};
pub use record::{NatsRecord, NatsRecordBuilder};
pub use server::NatsServer;
pub use session::{NatsReader, NatsReplyTo, NatsSession, NatsWriter};
pub use wire::WireError;
