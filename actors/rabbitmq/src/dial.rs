// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session with a broker is made, for both roles.

use std::sync::Arc;

use martlet_core::error::SessionError;
use martlet_core::transport::{Dial, SessionPlan, TransportId, TransportInfo};

use crate::address::without_secrets;
use crate::options::{RmqClientOptions, RmqServerOptions};

/// Opens sessions with a RabbitMQ broker: the transporter itself, for either role.
#[derive(Debug, Clone)]
pub struct RmqDial {
    url: Arc<str>,
}

impl RmqDial {
    /// For the serving side.
    pub fn server(options: &RmqServerOptions) -> Self {
        Self { url: options.urls.first().map(|url| without_secrets(url)).unwrap_or_default().into() }
    }

    /// For the calling side.
    pub fn client(options: &RmqClientOptions) -> Self {
        Self { url: options.urls.first().map(|url| without_secrets(url)).unwrap_or_default().into() }
    }

    /// The address of the first broker, without secrets.
    pub fn url(&self) -> String {
        self.url.to_string()
    }
}

impl Dial for RmqDial {
    type Session = crate::stub::Stub;

    fn info(&self) -> TransportInfo {
        TransportInfo { subscribes: true, ..TransportInfo::new(TransportId::RMQ, "rmq") }
    }

    async fn dial(&self, _plan: SessionPlan) -> Result<crate::stub::Stub, SessionError> {
        Err(SessionError::fatal("the session is not there yet"))
    }
}
