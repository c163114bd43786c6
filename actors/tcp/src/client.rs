// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calling side: connects, makes a session.

use std::sync::Arc;

use martlet_core::transport::{Dial, Role, SessionPlan};
use martlet_core::{ClientProxy, SessionError, TransportId, TransportInfo};
use martlet_tls::handshake_error;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

use crate::options::TcpClientOptions;
use crate::session::{Io, TcpLimits, TcpSession};
use crate::wire::FrameLimits;

/// A TCP client.
#[derive(Debug, Clone)]
pub struct TcpClient {
    options: Arc<TcpClientOptions>,
}

impl TcpClient {
    /// A client with these options. Nothing is connected until its first use.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(options: TcpClientOptions) -> ClientProxy {
        let client = options.client();
        ClientProxy::new(Self { options: Arc::new(options) }, client)
    }

    /// A client with the default options for this address.
    pub fn connect_to(host: impl Into<String>, port: u16) -> ClientProxy {
        Self::new(TcpClientOptions::new().address(host, port))
    }
}

impl From<TcpClientOptions> for ClientProxy {
    fn from(options: TcpClientOptions) -> Self {
        TcpClient::new(options)
    }
}

impl Dial for TcpClient {
    type Session = TcpSession;

    fn info(&self) -> TransportInfo {
        let mut info = TransportInfo::new(TransportId::TCP, "tcp");
        info.format = self.options.protocol.codec.format();
        info
    }

    async fn dial(&self, _plan: SessionPlan) -> Result<TcpSession, SessionError> {
        let options = &*self.options;
        if let Some(reason) = options.protocol.mismatch() {
            return Err(SessionError::fatal(reason));
        }
        let tls = options
            .tls_options
            .as_ref()
            .map(|tls| Ok::<_, SessionError>((tls.config()?, tls)))
            .transpose()?;
        let place = format!("{}:{}", options.host, options.port);
        let socket = TcpStream::connect((options.host.as_str(), options.port)).await.map_err(|error| {
            let lookup = error.kind() == std::io::ErrorKind::Other || error.raw_os_error().is_none();
            if error.kind() == std::io::ErrorKind::ConnectionRefused {
                SessionError::refused(format!(
                    "connection refused: {place} (ECONNREFUSED): is the service running?"
                ))
            } else if lookup {
                SessionError::refused(format!("cannot connect to {place}: {error}"))
            } else {
                SessionError::from(error)
            }
        })?;
        // TCP-20.
        socket.set_nodelay(true)?;
        let io = match tls {
            None => Io::Plain(socket),
            // TCP-22.
            Some((config, tls)) => {
                let name = tls.server_name(&options.host)?;
                let stream = TlsConnector::from(config)
                    .connect(name, socket)
                    .await
                    .map_err(|error| handshake_error("tls handshake failed", &error))?;
                Io::Tls(Box::new(TlsStream::Client(stream)))
            }
        };
        let limits = TcpLimits {
            frame: FrameLimits::default().with_max_frame(options.max_buffer_size),
            incomplete_message_timeout: options.incomplete_message_timeout,
            max_send_buffer_size: options.max_send_buffer_size,
            extensions: options.cancellation,
        };
        TcpSession::new(io, Role::Client, options.protocol.clone(), limits)
    }
}
