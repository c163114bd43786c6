// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serving side.

use martlet_core::Server;

use crate::dial::RedisDial;
use crate::options::RedisServerOptions;

/// Makes the serving side of the Redis transporter.
///
/// Every route is a channel (with `wildcards`: a glob), subscribed in order of registration. A session counts as
/// connected when the broker has confirmed every subscription. All services that serve a channel receive every
/// message on it: pub/sub does not share the work out.
#[derive(Debug)]
pub struct RedisServer;

impl RedisServer {
    /// A server for [`Microservice::server`](martlet_core::Microservice::server).
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: RedisServerOptions) -> Server {
        let dial = RedisDial::server(&options);
        let url = dial.url();
        Server::dial(dial, url, options.runtime())
    }
}

impl From<RedisServerOptions> for Server {
    fn from(options: RedisServerOptions) -> Self {
        RedisServer::new(options)
    }
}
