// SPDX-License-Identifier: MIT OR Apache-2.0
//! The names that most applications import: `use martlet::prelude::*;`.
//!
//! None of them clashes with those of `actix::prelude`.

pub use martlet_core::{
    CallError, Client, ClientName, ClientProxy, Ctx, Data, HandlerGroup, Metadata, Microservice, Pattern,
    RpcError, State, Streaming, TryStreaming, Unexpected, event, message,
};

pub use crate::clients::Clients;
pub use crate::config::Transport;
pub use crate::pattern;

#[cfg(feature = "macros")]
pub use crate::macros::*;

#[cfg(feature = "tcp")]
pub use martlet_tcp::{TcpClient, TcpContext, TcpServer};

#[cfg(feature = "nats")]
pub use martlet_nats::{NatsClient, NatsContext, NatsServer};

#[cfg(feature = "redis")]
pub use martlet_redis::{RedisClient, RedisContext, RedisServer};

#[cfg(feature = "rabbitmq")]
pub use martlet_rabbitmq::{RmqClient, RmqContext, RmqServer};

#[cfg(feature = "mqtt")]
pub use martlet_mqtt::{MqttClient, MqttContext, MqttServer};
