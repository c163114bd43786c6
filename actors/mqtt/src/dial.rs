// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session with a broker is made, for both roles.

use std::sync::Arc;

use martlet_core::error::SessionError;
use martlet_core::transport::{Dial, SessionPlan, TransportId, TransportInfo};

use crate::options::{Common, MqttClientOptions, MqttServerOptions, without_secrets};
use crate::session::MqttSession;

/// Opens sessions with an MQTT broker: the transporter itself, for either role.
///
/// [`MqttServer`](crate::MqttServer) and [`MqttClient`](crate::MqttClient) put it into the runtime.
#[derive(Debug, Clone)]
pub struct MqttDial {
    common: Arc<Common>,
}

impl MqttDial {
    /// For the serving side.
    pub fn server(options: &MqttServerOptions) -> Self {
        Self { common: Arc::new(options.common()) }
    }

    /// For the calling side.
    pub fn client(options: &MqttClientOptions) -> Self {
        Self { common: Arc::new(options.common()) }
    }

    /// The broker's address, without secrets.
    pub fn url(&self) -> String {
        without_secrets(&self.common.url)
    }
}

impl Dial for MqttDial {
    type Session = MqttSession;

    fn info(&self) -> TransportInfo {
        TransportInfo { subscribes: true, ..TransportInfo::new(TransportId::MQTT, "mqtt") }
    }

    async fn dial(&self, _plan: SessionPlan) -> Result<MqttSession, SessionError> {
        Err(SessionError::fatal("the MQTT transporter cannot connect yet"))
    }
}
