// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calling side.

use martlet_core::ClientProxy;

use crate::dial::MqttDial;
use crate::options::MqttClientOptions;

/// Makes the calling side of the MQTT transporter.
///
/// Replies to a topic come back on `<topic>/reply`, which is subscribed before the first request is published and
/// shared by all calls of the topic.
#[derive(Debug)]
pub struct MqttClient;

impl MqttClient {
    /// A client; it connects at its first use.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: MqttClientOptions) -> ClientProxy {
        ClientProxy::new(MqttDial::client(&options), options.runtime())
    }
}

impl From<MqttClientOptions> for ClientProxy {
    fn from(options: MqttClientOptions) -> Self {
        MqttClient::new(options)
    }
}
