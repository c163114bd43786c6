// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serving side.

use martlet_core::Server;

use crate::dial::RmqDial;
use crate::options::RmqServerOptions;

/// Makes the serving side of the RabbitMQ transporter.
///
/// It consumes one queue, through which the messages of every pattern come; the pattern in the body finds the
/// handler. With `wildcards` the queue is bound to a topic exchange by every pattern.
#[derive(Debug)]
pub struct RmqServer;

impl RmqServer {
    /// A server for [`Microservice::server`](martlet_core::Microservice::server).
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: RmqServerOptions) -> Server {
        let dial = RmqDial::server(&options);
        let url = dial.url();
        Server::dial(dial, url, options.runtime())
    }
}

impl From<RmqServerOptions> for Server {
    fn from(options: RmqServerOptions) -> Self {
        RmqServer::new(options)
    }
}
