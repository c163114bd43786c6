// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serving side.

use martlet_core::Server;

use crate::dial::MqttDial;
use crate::options::MqttServerOptions;

/// Makes the serving side of the MQTT transporter.
///
/// Every route is a topic filter, subscribed in order of registration; routes may have MQTT's wildcards. A
/// session counts as connected when the broker has confirmed every subscription.
#[derive(Debug)]
pub struct MqttServer;

impl MqttServer {
    /// A server for [`Microservice::server`](martlet_core::Microservice::server).
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: MqttServerOptions) -> Server {
        let dial = MqttDial::server(&options);
        let url = dial.url();
        Server::dial(dial, url, options.runtime())
    }
}

impl From<MqttServerOptions> for Server {
    fn from(options: MqttServerOptions) -> Self {
        MqttServer::new(options)
    }
}
