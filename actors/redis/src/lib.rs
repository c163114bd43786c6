// SPDX-License-Identifier: MIT OR Apache-2.0
//! Redis for Martlet: requests, events and replies as NestJS's Redis transport puts them on the wire, over
//! Redis's pub/sub.
//!
//! # Goals
//!
//! A NestJS peer cannot tell this end from its own. What pub/sub can keep is not lost: no reply because a
//! subscription came late, no subscription because a connection was lost.
//!
//! # Non-goals
//!
//! Persistence, acknowledgement and sharing the work out (streams, lists), which pub/sub has not; slowing a
//! publisher down, which it cannot. Sentinel and cluster: give the address of the primary.
//!
//! # Connections
//!
//! A session has two, as NestJS's. One subscribes; it is read by the session itself, with bounds on what waits. One
//! publishes; it is taken from a [`deadpool_redis::Pool`] once per session and not per message (which would cost
//! two more commands each), and carries one pipeline of PUBLISH commands per turn of the session. The pool is the
//! application's, too: `unwrap` gives it.
//!
//! # Examples
//!
//! ```no_run
//! use martlet_core::{Data, Microservice, RpcError, message};
//! use martlet_redis::{RedisClient, RedisClientOptions, RedisServer, RedisServerOptions, RedisUnwrapped};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let sum = message("sum", async |Data(numbers): Data<Vec<i64>>| {
//!     Ok::<_, RpcError>(numbers.iter().sum::<i64>())
//! });
//! let service = Microservice::new()
//!     .handlers(sum)
//!     .server(RedisServer::new(RedisServerOptions::new().url("redis://127.0.0.1:6379")))
//!     .start()
//!     .await?;
//! let client = RedisClient::new(RedisClientOptions::new());
//! let sum: i64 = client.send("sum", [1, 2, 3]).await?;
//! let connections = client.unwrap::<RedisUnwrapped>().ok_or("not connected")?;
//! let (publisher, subscriber) = &*connections;
//! # Ok(()) }
//! ```
#![warn(clippy::print_stdout)]

mod client;
mod context;
mod dial;
mod link;
pub mod options;
mod publisher;
mod replies;
mod resp;
mod server;
mod session;
mod subscriber;
mod tls;
mod wire;

pub use client::RedisClient;
pub use context::RedisContext;
pub use dial::RedisDial;
pub use options::{RedisClientOptions, RedisServerOptions, RedisTlsOptions};
pub use server::RedisServer;
pub use session::{RedisReader, RedisReplyTo, RedisSession, RedisWriter};
pub use subscriber::RedisSubscriber;
pub use wire::WireError;

pub use deadpool_redis;

/// What `unwrap` of a server's handle or of a client gives while it is connected: the publishing pool and the
/// subscribing connection.
pub type RedisUnwrapped = (deadpool_redis::Pool, RedisSubscriber);
