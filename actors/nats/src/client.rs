// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calling side.

use martlet_core::ClientProxy;

use crate::dial::NatsDial;
use crate::options::NatsClientOptions;

/// Makes the calling side of the NATS transporter.
///
/// Replies come back on one subscription per session; each request has a reply subject of its own below it,
/// so that a reply without an id finds its call.
#[derive(Debug)]
pub struct NatsClient;

impl NatsClient {
    /// A client; it connects at its first use.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: NatsClientOptions) -> ClientProxy {
        ClientProxy::new(NatsDial::client(&options), options.runtime())
    }
}

impl From<NatsClientOptions> for ClientProxy {
    fn from(options: NatsClientOptions) -> Self {
        NatsClient::new(options)
    }
}
