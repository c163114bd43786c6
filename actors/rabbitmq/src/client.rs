// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calling side.

use martlet_core::ClientProxy;

use crate::dial::RmqDial;
use crate::options::RmqClientOptions;

/// Makes the calling side of the RabbitMQ transporter.
///
/// It publishes with confirmations, which are not waited for one by one, and takes its replies from the broker's
/// direct reply-to or from `replyQueue`.
#[derive(Debug)]
pub struct RmqClient;

impl RmqClient {
    /// A client; it connects at its first use.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: RmqClientOptions) -> ClientProxy {
        ClientProxy::new(RmqDial::client(&options), options.runtime())
    }
}

impl From<RmqClientOptions> for ClientProxy {
    fn from(options: RmqClientOptions) -> Self {
        RmqClient::new(options)
    }
}
