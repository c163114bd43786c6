// SPDX-License-Identifier: MIT OR Apache-2.0
//! MQTT for Martlet: requests, events and replies as NestJS's MQTT transport puts them on the wire, over MQTT 3.1.1
//! and MQTT 5.
//!
//! # Goals
//!
//! A NestJS peer cannot tell this end from its own. What MQTT can keep through a lost connection is kept: unfinished
//! messages of quality of service 1 and 2, in both directions.
//!
//! # Non-goals
//!
//! Keeping anything on disk: what this process has not finished dies with it. Requeuing and dead-lettering, which
//! MQTT does not have.
//!
//! # Examples
//!
//! ```no_run
//! use martlet_core::{Data, Microservice, RpcError, message};
//! use martlet_mqtt::{MqttClient, MqttClientOptions, MqttServer, MqttServerOptions};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let sum = message("sum", async |Data(numbers): Data<Vec<i64>>| {
//!     Ok::<_, RpcError>(numbers.iter().sum::<i64>())
//! });
//! let service = Microservice::new()
//!     .handlers(sum)
//!     .server(MqttServer::new(MqttServerOptions::new().shared_group("workers")))
//!     .start()
//!     .await?;
//! let client = MqttClient::new(MqttClientOptions::new());
//! let sum: i64 = client.send("sum", [1, 2, 3]).await?;
//! # Ok(()) }
//! ```
#![warn(clippy::print_stdout)]

mod cancel;
mod client;
mod context;
mod dial;
mod driver;
mod flow;
mod link;
mod net;
pub mod options;
mod properties;
mod record;
mod replies;
mod server;
mod session;
mod topics;
mod wire;

pub use client::MqttClient;
pub use context::MqttContext;
pub use dial::MqttDial;
pub use options::{
    MqttClientOptions, MqttConnectProperties, MqttQos, MqttServerOptions, MqttSubscribeOptions,
    MqttTlsOptions, MqttWill,
};
pub use properties::MqttProperties;
pub use record::{MqttRecord, MqttRecordBuilder};
pub use server::MqttServer;
pub use session::{MqttConnection, MqttReader, MqttReplyTo, MqttSession, MqttWriter};
