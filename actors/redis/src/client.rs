// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calling side.

use martlet_core::ClientProxy;

use crate::dial::RedisDial;
use crate::options::RedisClientOptions;

/// Makes the calling side of the Redis transporter.
///
/// Replies to all calls of one pattern, from all clients, come on one channel; each client keeps what answers its
/// own calls. A call is published when the broker has confirmed the subscription of that channel, which is then
/// kept.
#[derive(Debug)]
pub struct RedisClient;

impl RedisClient {
    /// A client; it connects at its first use.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: RedisClientOptions) -> ClientProxy {
        ClientProxy::new(RedisDial::client(&options), options.runtime())
    }
}

impl From<RedisClientOptions> for ClientProxy {
    fn from(options: RedisClientOptions) -> Self {
        RedisClient::new(options)
    }
}
