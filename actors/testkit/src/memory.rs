// SPDX-License-Identifier: MIT OR Apache-2.0
//! An in-memory transporter: a real one on the public contract, without ports and processes.
//!
//! ```text
//! MemoryNetwork (one "wire", cloned into everyone who is on it)
//! ├─ peers mode:  MemoryListen → one session per client          (as TCP)
//! └─ broker mode: MemoryDial on both sides, a hub in the middle  (as NATS; settling: as RabbitMQ)
//! ```
//!
//! Packets cross it as bytes, made and read by a real [`Codec`], so payload paths are those of every other
//! transporter. The line can be cut, refused and restored; raw bytes can be put on it.
//!
//! # Examples
//!
//! ```
//! use martlet_core::{Data, Microservice, RpcError, message};
//! use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! actix_rt::System::new().block_on(async {
//!     let network = MemoryNetwork::new();
//!     let service = Microservice::new()
//!         .on_current_arbiter()
//!         .handlers(message("sum", |Data(numbers): Data<Vec<i64>>| async move {
//!             Ok::<_, RpcError>(numbers.iter().sum::<i64>())
//!         }))
//!         .server(MemoryServer::new(&network))
//!         .start()
//!         .await?;
//!     let client = MemoryClient::new(&network);
//!     let sum: i64 = client.send("sum", [1, 2, 3]).await?;
//!     assert_eq!(sum, 6);
//!     client.close().await;
//!     service.stop(std::time::Duration::from_secs(1)).await;
//!     Ok(())
//! })
//! # }
//! ```

mod hub;
mod line;
mod session;

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::settlement::Settles;
use martlet_core::transport::{Accept, Dial, Listen, Open, Role, SessionPlan};
use martlet_core::{
    ClientOptions, ClientProxy, Headers, Route, Server, ServerOptions, SessionError, TransportId,
    TransportInfo,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub use hub::Settlements;
use hub::{Hub, Post};
use line::{Frame, Line};
use session::Out;
pub use session::{MemoryContext, MemoryReader, MemoryReply, MemorySession, MemoryWriter};

/// Who is in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Nobody: the server accepts peers.
    #[default]
    Peers,
    /// A broker: both sides dial it, servers subscribe.
    Broker,
}

/// How a network behaves.
#[derive(Debug, Clone)]
pub struct MemoryOptions {
    /// Who is in the middle. Default: nobody.
    pub mode: Mode,
    /// What makes bytes of packets. Default: JSON, as NestJS.
    pub codec: Arc<dyn Codec>,
    /// The largest frame; larger ones are refused by the writer and reported by the reader. Default 16 MiB.
    pub max_frame_bytes: usize,
    /// Bytes that one direction of a connection holds before writing waits (peers mode). Default 64 KiB.
    pub line_bytes: usize,
    /// Whether the broker wants every delivery settled, and gives unsettled ones to others. Default false.
    pub settles: bool,
    /// Whether `*` and `>` in subscriptions match as in NATS. Default false.
    pub wildcards: bool,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            codec: Arc::new(JsonCodec),
            max_frame_bytes: 16 * 1024 * 1024,
            line_bytes: 64 * 1024,
            settles: false,
            wildcards: false,
        }
    }
}

impl MemoryOptions {
    /// A broker in the middle.
    pub fn broker() -> Self {
        Self { mode: Mode::Broker, ..Self::default() }
    }
}

/// One in-memory wire. Clones are the same wire; two made by [`new`](Self::new) have nothing in common.
#[derive(Clone)]
pub struct MemoryNetwork {
    net: Arc<Net>,
}

impl fmt::Debug for MemoryNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryNetwork").field("name", &self.net.name).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Net {
    name: Arc<str>,
    options: MemoryOptions,
    state: Mutex<State>,
    arrived: Notify,
    hub: Mutex<Hub>,
    peers: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    down: bool,
    listening: bool,
    /// Peers that were not accepted yet.
    backlog: VecDeque<MemoryPeer>,
    lines: Vec<Weak<Line>>,
}

impl Net {
    fn mode(&self) -> Mode {
        self.options.mode
    }

    fn line(&self) -> Arc<Line> {
        let line = Line::new(self.options.line_bytes);
        let mut state = self.state.lock();
        state.lines.retain(|line| line.strong_count() > 0);
        state.lines.push(Arc::downgrade(&line));
        line
    }

    fn post(&self, session: u64, post: Post) -> Result<(), SessionError> {
        if self.state.lock().down {
            return Err(SessionError::lost("the broker is down"));
        }
        self.hub.lock().post(session, post);
        Ok(())
    }

    fn peer_name(&self) -> Arc<str> {
        Arc::from(format!("memory-peer-{}", self.peers.fetch_add(1, Ordering::Relaxed)))
    }

    /// Connects a peer; the line towards the server, and the one back.
    fn connect(self: &Arc<Self>) -> Result<(Arc<Line>, Arc<Line>), SessionError> {
        let (there, back) = (self.line(), self.line());
        let mut state = self.state.lock();
        if state.down || !state.listening {
            return Err(SessionError::refused(format!("nobody listens on memory://{}", self.name)));
        }
        state.backlog.push_back(MemoryPeer {
            net: Arc::clone(self),
            name: self.peer_name(),
            lines: Some((Arc::clone(&there), Arc::clone(&back))),
        });
        drop(state);
        self.arrived.notify_one();
        Ok((there, back))
    }

    fn info(&self) -> TransportInfo {
        let mut info = TransportInfo::new(TransportId::MEMORY, "memory");
        info.format = self.options.codec.format();
        info.subscribes = self.mode() == Mode::Broker;
        if self.mode() == Mode::Broker && self.options.settles {
            info.settles = Settles::Results { requeue: true, dead_letter: true };
        }
        info
    }
}

impl Default for MemoryNetwork {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryNetwork {
    /// A wire between peers, with NestJS's JSON on it.
    pub fn new() -> Self {
        Self::with(MemoryOptions::default())
    }

    /// A wire with a broker in the middle.
    pub fn broker() -> Self {
        Self::with(MemoryOptions::broker())
    }

    /// A wire with options of one's own.
    pub fn with(options: MemoryOptions) -> Self {
        static NAMES: AtomicU64 = AtomicU64::new(0);
        let name = Arc::from(format!("network-{}", NAMES.fetch_add(1, Ordering::Relaxed)));
        let hub = Mutex::new(Hub::new(options.settles, options.wildcards));
        Self {
            net: Arc::new(Net {
                name,
                options,
                state: Mutex::default(),
                arrived: Notify::new(),
                hub,
                peers: AtomicU64::new(0),
            }),
        }
    }

    /// Its URL: `memory://network-0`.
    pub fn url(&self) -> String {
        format!("memory://{}", self.net.name)
    }

    /// Cuts every connection. What was not read is lost; new connections are possible.
    pub fn cut(&self) {
        let lines: Vec<_> = self.net.state.lock().lines.iter().filter_map(Weak::upgrade).collect();
        let error = SessionError::lost("the line was cut");
        lines.iter().for_each(|line| line.cut(&error));
    }

    /// Takes the network down: every connection is cut, new ones are refused until [`restore`](Self::restore).
    pub fn take_down(&self) {
        self.net.state.lock().down = true;
        self.cut();
    }

    /// Undoes [`take_down`](Self::take_down).
    pub fn restore(&self) {
        self.net.state.lock().down = false;
    }

    /// How deliveries ended so far (a broker that settles).
    pub fn settlements(&self) -> Settlements {
        self.net.hub.lock().settlements()
    }

    /// Deliveries that nobody has settled (a broker that settles).
    pub fn unsettled(&self) -> usize {
        self.net.hub.lock().unsettled()
    }

    /// What is subscribed now (broker mode), over all sessions.
    pub fn subscribed(&self) -> Vec<Route> {
        self.net.hub.lock().subscribed()
    }

    /// Connects as a peer that speaks in raw bytes (peers mode).
    ///
    /// # Errors
    ///
    /// When nobody listens.
    pub fn connect_raw(&self) -> Result<MemoryRawPeer, SessionError> {
        let (there, back) = self.net.connect()?;
        Ok(MemoryRawPeer { outgoing: there, incoming: back })
    }
}

/// A peer that puts bytes of its own on the wire, one frame each, and reads the frames that come back.
#[derive(Debug)]
pub struct MemoryRawPeer {
    outgoing: Arc<Line>,
    incoming: Arc<Line>,
}

impl MemoryRawPeer {
    /// Sends one frame.
    pub fn send(&self, frame: impl Into<Bytes>) {
        self.outgoing.force(Frame::Packet { bytes: frame.into(), headers: Headers::new() });
    }

    /// The next frame from the server; `None` when it has closed or the line was cut.
    ///
    /// Cancel safe.
    pub async fn recv(&self) -> Option<Bytes> {
        match std::future::poll_fn(|cx| self.incoming.poll_frame(cx)).await? {
            Ok(Frame::Packet { bytes, .. }) => Some(bytes),
            _ => None,
        }
    }

    /// Closes its side; what the server still has to say can be read.
    pub fn finish(&self) {
        self.outgoing.finish();
    }
}

impl Drop for MemoryRawPeer {
    fn drop(&mut self) {
        self.outgoing.finish();
        self.incoming.close_reader();
    }
}

/// The serving side.
#[derive(Debug)]
pub enum MemoryServer {}

impl MemoryServer {
    /// A server on a network, with default options.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(network: &MemoryNetwork) -> Server {
        Self::with(network, ServerOptions::default())
    }

    /// A server with options of one's own.
    pub fn with(network: &MemoryNetwork, options: ServerOptions) -> Server {
        match network.net.mode() {
            Mode::Peers => Server::listen(MemoryListen::new(network), options),
            Mode::Broker => Server::dial(MemoryDial::new(network), network.url(), options),
        }
    }
}

/// The calling side.
#[derive(Debug)]
pub enum MemoryClient {}

impl MemoryClient {
    /// A client on a network, with default options.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(network: &MemoryNetwork) -> ClientProxy {
        Self::with(network, ClientOptions::default())
    }

    /// A client with options of one's own.
    pub fn with(network: &MemoryNetwork, options: ClientOptions) -> ClientProxy {
        ClientProxy::new(MemoryDial::new(network), options)
    }
}

// === the contract ===

/// Dials a network: as a client, or as a server of a broker.
#[derive(Debug, Clone)]
pub struct MemoryDial {
    net: Arc<Net>,
}

impl MemoryDial {
    /// Dials this network.
    pub fn new(network: &MemoryNetwork) -> Self {
        Self { net: Arc::clone(&network.net) }
    }
}

impl Dial for MemoryDial {
    type Session = MemorySession;

    fn info(&self) -> TransportInfo {
        self.net.info()
    }

    async fn dial(&self, plan: SessionPlan) -> Result<MemorySession, SessionError> {
        let net = &self.net;
        let server: Arc<str> = Arc::from(format!("memory://{}", net.name));
        match net.mode() {
            Mode::Peers => {
                let (there, back) = net.connect()?;
                Ok(MemorySession::new(net, plan.role, server, back, Out::Line(there)))
            }
            Mode::Broker => {
                if net.state.lock().down {
                    return Err(SessionError::refused("the broker is down"));
                }
                let line = net.line();
                let session = net.hub.lock().join(Arc::clone(&line), &plan.subscriptions);
                Ok(MemorySession::new(net, plan.role, server, line, Out::Hub(session)))
            }
        }
    }
}

/// Accepts the peers of a network.
#[derive(Debug, Clone)]
pub struct MemoryListen {
    net: Arc<Net>,
}

impl MemoryListen {
    /// Listens on this network.
    pub fn new(network: &MemoryNetwork) -> Self {
        Self { net: Arc::clone(&network.net) }
    }
}

impl Listen for MemoryListen {
    type Bound = MemoryBound;

    fn info(&self) -> TransportInfo {
        self.net.info()
    }

    async fn bind(&self) -> Result<MemoryBound, SessionError> {
        let mut state = self.net.state.lock();
        if std::mem::replace(&mut state.listening, true) {
            return Err(SessionError::fatal(format!(
                "somebody listens on memory://{} already",
                self.net.name
            )));
        }
        Ok(MemoryBound { net: Arc::clone(&self.net) })
    }
}

/// A network's listener.
#[derive(Debug)]
pub struct MemoryBound {
    net: Arc<Net>,
}

impl Drop for MemoryBound {
    fn drop(&mut self) {
        let mut state = self.net.state.lock();
        state.listening = false;
        // Dropping those who were not accepted cuts their lines.
        let unaccepted = std::mem::take(&mut state.backlog);
        drop(state);
        drop(unaccepted);
    }
}

impl Accept for MemoryBound {
    type Peer = MemoryPeer;

    fn local_url(&self) -> String {
        format!("memory://{}", self.net.name)
    }

    async fn accept(&mut self) -> Result<MemoryPeer, SessionError> {
        loop {
            let arrived = self.net.arrived.notified();
            if let Some(peer) = self.net.state.lock().backlog.pop_front() {
                return Ok(peer);
            }
            arrived.await;
        }
    }
}

/// An accepted peer.
#[derive(Debug)]
pub struct MemoryPeer {
    net: Arc<Net>,
    name: Arc<str>,
    /// Towards the server, and back; taken when it is opened.
    lines: Option<(Arc<Line>, Arc<Line>)>,
}

impl Drop for MemoryPeer {
    fn drop(&mut self) {
        if let Some((there, back)) = self.lines.take() {
            let error = SessionError::lost("the connection was closed before it was served");
            there.cut(&error);
            back.cut(&error);
        }
    }
}

impl Open for MemoryPeer {
    type Session = MemorySession;

    async fn open(mut self) -> Result<MemorySession, SessionError> {
        let Some((there, back)) = self.lines.take() else {
            return Err(SessionError::lost("the peer was opened already"));
        };
        Ok(MemorySession::new(&self.net, Role::Server, Arc::clone(&self.name), there, Out::Line(back)))
    }
}
