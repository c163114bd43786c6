// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serving side.

use martlet_core::Server;

use crate::dial::NatsDial;
use crate::options::NatsServerOptions;

/// Makes the serving side of the NATS transporter.
///
/// Every route is a subject, subscribed in order of registration; routes may have NATS's wildcards. A
/// session counts as connected when the broker has done every subscription.
#[derive(Debug)]
pub struct NatsServer;

impl NatsServer {
    /// A server for [`Microservice::server`](martlet_core::Microservice::server).
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: NatsServerOptions) -> Server {
        let dial = NatsDial::server(&options);
        let url = dial.url();
        Server::dial(dial, url, options.runtime())
    }
}

impl From<NatsServerOptions> for Server {
    fn from(options: NatsServerOptions) -> Self {
        NatsServer::new(options)
    }
}
