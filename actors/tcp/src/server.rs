// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serving side: listens, accepts, makes sessions.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::task::Poll;

use martlet_core::transport::{Accept, ContextData, Listen, Open, Role};
use martlet_core::{Server, SessionError, TransportId, TransportInfo};
use martlet_tls::handshake_error;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsStream};

use crate::options::TcpServerOptions;
use crate::session::{Io, TcpLimits, TcpSession};
use crate::wire::FrameLimits;

/// A TCP server, to be put into a service.
#[derive(Debug, Clone)]
pub struct TcpServer {
    options: TcpServerOptions,
}

impl TcpServer {
    /// A server with these options.
    pub fn new(options: TcpServerOptions) -> Self {
        Self { options }
    }

    /// A server with the default options on this address; port 0 takes a free one.
    pub fn bind(host: impl Into<String>, port: u16) -> Self {
        Self::new(TcpServerOptions::new().address(host, port))
    }
}

impl From<TcpServer> for Server {
    fn from(server: TcpServer) -> Self {
        let options = server.options.server();
        Server::listen(server, options)
    }
}

impl From<TcpServerOptions> for Server {
    fn from(options: TcpServerOptions) -> Self {
        TcpServer::new(options).into()
    }
}

impl Listen for TcpServer {
    type Bound = BoundTcp;

    fn info(&self) -> TransportInfo {
        let mut info = TransportInfo::new(TransportId::TCP, "tcp");
        info.format = self.options.protocol.codec.format();
        info
    }

    async fn bind(&self) -> Result<BoundTcp, SessionError> {
        let options = &self.options;
        if let Some(reason) = options.protocol.mismatch() {
            return Err(SessionError::fatal(reason));
        }
        let tls = options.tls_options.as_ref().map(|tls| tls.config()).transpose()?;
        let place = format!("{}:{}", options.host, options.port);
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host((options.host.as_str(), options.port))
            .await
            .map_err(|error| {
                SessionError::fatal(format!("host {:?} cannot be resolved: {error}", options.host))
            })?
            .collect();
        let mut listeners: Vec<Arc<TcpListener>> = Vec::new();
        let mut failed = None;
        for mut address in addresses {
            if let Some(first) = listeners.first() {
                // TCP-21: every address of a name on one port.
                address.set_port(first.local_addr()?.port());
            }
            match listen_on(address, options.backlog) {
                Ok(listener) => listeners.push(Arc::new(listener)),
                Err(error) => failed = failed.or(Some((address, error))),
            }
        }
        if listeners.is_empty() {
            let reason = match failed {
                Some((_, error)) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    format!(
                        "address in use: {place} (EADDRINUSE): another program listens there; take another port"
                    )
                }
                Some((_, error)) => format!("cannot listen on {place}: {error}"),
                None => format!("host {:?} has no address", options.host),
            };
            return Err(SessionError::fatal(reason));
        }
        let limits = TcpLimits {
            frame: FrameLimits::default().with_max_frame(options.max_buffer_size),
            incomplete_message_timeout: options.incomplete_message_timeout,
            max_send_buffer_size: options.max_send_buffer_size,
            extensions: true,
        };
        let first = listeners.first().map(|listener| listener.local_addr()).transpose()?;
        let host = match options.host.parse::<std::net::IpAddr>() {
            Ok(std::net::IpAddr::V6(address)) => format!("[{address}]"),
            _ => options.host.clone(),
        };
        let scheme = if tls.is_some() { "tcps" } else { "tcp" };
        let url = format!("{scheme}://{host}:{}", first.map_or(options.port, |address| address.port()));
        Ok(BoundTcp { listeners, tls, limits, options: Arc::new(options.clone()), url })
    }
}

fn listen_on(address: SocketAddr, backlog: u32) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false).or_else(|_| socket.set_only_v6(true))?;
    }
    socket.bind(&address.into())?;
    socket.listen(backlog.try_into().unwrap_or(i32::MAX))?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket.into())
}

/// A listening socket, or one for each address of a name.
#[derive(Debug)]
pub struct BoundTcp {
    listeners: Vec<Arc<TcpListener>>,
    tls: Option<Arc<rustls::ServerConfig>>,
    limits: TcpLimits,
    options: Arc<TcpServerOptions>,
    url: String,
}

/// What a server listens on: what `unwrap::<TcpListening>()` gives.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TcpListening {
    /// Every address, with the real port.
    pub addresses: Vec<SocketAddr>,
    listeners: Vec<Weak<TcpListener>>,
}

impl TcpListening {
    /// The sockets themselves, in the order of the addresses; none once the server has stopped listening. Whoever keeps one
    /// keeps its port open, without anybody who accepts.
    pub fn listeners(&self) -> Vec<Arc<TcpListener>> {
        self.listeners.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Accept for BoundTcp {
    type Peer = TcpPeer;

    fn local_url(&self) -> String {
        self.url.clone()
    }

    fn native(&self) -> Option<ContextData> {
        let addresses = self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();
        Some(Arc::new(TcpListening {
            addresses,
            listeners: self.listeners.iter().map(Arc::downgrade).collect(),
        }))
    }

    async fn accept(&mut self) -> Result<TcpPeer, SessionError> {
        let listeners = &self.listeners;
        loop {
            match accepted_or_transient(accepted_once(listeners).await) {
                Accepted::Peer(socket) => {
                    // Back to blocking hands: a socket is registered with the event loop of its own arbiter.
                    let socket = socket.into_std()?;
                    return Ok(TcpPeer {
                        socket,
                        tls: self.tls.clone(),
                        limits: self.limits,
                        options: Arc::clone(&self.options),
                    });
                }
                Accepted::Again => {}
                Accepted::Wait(error) => {
                    tracing::warn!(target: "martlet", %error, "cannot accept connections for now");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                Accepted::Failed(error) => return Err(SessionError::from(error)),
            }
        }
    }
}

async fn accepted_once(listeners: &[Arc<TcpListener>]) -> std::io::Result<TcpStream> {
    std::future::poll_fn(|cx| {
        for listener in listeners {
            if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                return Poll::Ready(accepted.map(|(socket, _)| socket));
            }
        }
        Poll::Pending
    })
    .await
}

enum Accepted {
    Peer(TcpStream),
    /// The peer was gone before it was accepted.
    Again,
    /// The process is out of descriptors or memory.
    Wait(std::io::Error),
    Failed(std::io::Error),
}

fn accepted_or_transient(accepted: std::io::Result<TcpStream>) -> Accepted {
    use std::io::ErrorKind;
    match accepted {
        Ok(socket) => Accepted::Peer(socket),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted => {
                Accepted::Again
            }
            ErrorKind::InvalidInput | ErrorKind::NotConnected => Accepted::Failed(error),
            _ => Accepted::Wait(error),
        },
    }
}

/// An accepted connection on its way to its arbiter.
#[derive(Debug)]
pub struct TcpPeer {
    socket: std::net::TcpStream,
    tls: Option<Arc<rustls::ServerConfig>>,
    limits: TcpLimits,
    options: Arc<TcpServerOptions>,
}

impl Open for TcpPeer {
    type Session = TcpSession;

    async fn open(self) -> Result<TcpSession, SessionError> {
        let socket = TcpStream::from_std(self.socket)?;
        // TCP-20.
        socket.set_nodelay(true)?;
        let io = match self.tls {
            None => Io::Plain(socket),
            // TCP-22.
            Some(tls) => {
                let stream = TlsAcceptor::from(tls)
                    .accept(socket)
                    .await
                    .map_err(|error| handshake_error("tls handshake failed", &error))?;
                Io::Tls(Box::new(TlsStream::Server(stream)))
            }
        };
        TcpSession::new(io, Role::Server, self.options.protocol.clone(), self.limits)
    }
}
