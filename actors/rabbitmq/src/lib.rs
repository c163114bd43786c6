// SPDX-License-Identifier: MIT OR Apache-2.0
//! RabbitMQ for Martlet: requests, events and replies as NestJS's RMQ transport puts them on the wire, over
//! AMQP 0-9-1.
//!
//! # Goals
//!
//! A NestJS peer cannot tell this end from its own. What the broker can promise (acknowledged delivery, confirmed
//! publishing, a window that holds a fast producer back) reaches the application as a value.
//!
//! # Non-goals
//!
//! Declaring what belongs to others (dead-letter exchanges, other queues), streams, AMQP 1.0.
//!
//! # Examples
//!
//! ```no_run
//! use martlet_core::{Data, Microservice, RpcError, message};
//! use martlet_rabbitmq::{RmqClient, RmqClientOptions, RmqServer, RmqServerOptions};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let sum = message("sum", async |Data(numbers): Data<Vec<i64>>| {
//!     Ok::<_, RpcError>(numbers.iter().sum::<i64>())
//! });
//! let service = Microservice::new()
//!     .handlers(sum)
//!     .server(RmqServer::new(RmqServerOptions::new().queue("math")))
//!     .start()
//!     .await?;
//! let client = RmqClient::new(RmqClientOptions::new().queue("math"));
//! let sum: i64 = client.send("sum", [1, 2, 3]).await?;
//! # Ok(()) }
//! ```
#![warn(clippy::print_stdout)]

mod address;
mod bell;
mod cancel;
mod client;
mod context;
mod dial;
mod gate;
mod intake;
mod link;
pub mod options;
mod publish;
mod record;
mod routes;
mod server;
mod session;
mod settle;
mod wire;

pub use client::RmqClient;
pub use context::{RmqContext, RmqProperties, SettleError};
pub use dial::RmqDial;
pub use options::{
    RmqClientOptions, RmqExchangeType, RmqQueueOptions, RmqServerOptions, RmqSocketOptions, RmqTlsOptions,
};
pub use record::{PROPERTY_PREFIX, RmqRecord, RmqRecordBuilder, RmqRecordOptions};
pub use server::RmqServer;
pub use session::{RmqReader, RmqReplyTo, RmqSession, RmqWriter};
pub use wire::WireError;
