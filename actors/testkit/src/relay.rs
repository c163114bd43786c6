// SPDX-License-Identifier: MIT OR Apache-2.0
//! A TCP relay that is cut and closed as told: real sockets between a peer (or a broker) and its clients.
//!
//! It works on a thread of its own, so that a command holds when it returns: after [`Relay::cut`] no socket of
//! the relay is open, after [`Relay::close`] connecting is refused. The port stays the relay's until it is
//! dropped.
//!
//! # Examples
//!
//! ```
//! use martlet_testkit::relay::Relay;
//!
//! let broker = std::net::TcpListener::bind("127.0.0.1:0")?;
//! let relay = Relay::start(broker.local_addr()?.port());
//! std::net::TcpStream::connect(("127.0.0.1", relay.port()))?;
//! relay.close();
//! assert!(std::net::TcpStream::connect(("127.0.0.1", relay.port())).is_err());
//! # Ok::<(), std::io::Error>(())
//! ```

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task;

#[derive(Debug)]
enum Command {
    Cut,
    CutOne(usize),
    Close,
    Open,
}

/// A relay on 127.0.0.1, to a port there. Dropping it ends every connection.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    commands: Option<UnboundedSender<(Command, SyncSender<()>)>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicU64,
    cut: AtomicU64,
}

fn bind(port: u16) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
    socket
}

impl Relay {
    /// A relay to this port, on a free one.
    ///
    /// # Panics
    ///
    /// When there is no free port or thread.
    pub fn start(target: u16) -> Self {
        let (commands, inbox) = unbounded_channel();
        let (sender, started) = sync_channel(1);
        let shared = Arc::new(Counts::default());
        let counts = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                // Bound and never listening: it keeps the port while the relay is closed.
                let keeper = bind(0);
                let port = keeper.local_addr().unwrap().port();
                let listener = bind(port).listen(1024).unwrap();
                sender.send(port).unwrap();
                relay(listener, port, target, inbox, &counts).await;
            });
        });
        let thread = thread.unwrap();
        let port = started.recv().expect("the relay listens");
        Self { port, commands: Some(commands), thread: Some(thread), shared }
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Resets every connection. (A mere close is no cut to a peer that serves half-closed connections.)
    pub fn cut(&self) {
        self.tell(Command::Cut);
    }

    /// Ends one connection, the `index`-th of those open, counted round: every other one is reset, the others are
    /// closed.
    pub fn cut_one(&self, index: usize) {
        self.tell(Command::CutOne(index));
    }

    /// Ends every connection and refuses new ones.
    pub fn close(&self) {
        self.tell(Command::Close);
    }

    /// Takes connections again.
    pub fn open(&self) {
        self.tell(Command::Open);
    }

    /// Connections taken so far.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Connections ended by command so far.
    pub fn cuts(&self) -> u64 {
        self.shared.cut.load(Ordering::Relaxed)
    }

    fn tell(&self, command: Command) {
        let (sender, done) = sync_channel(1);
        let commands = self.commands.as_ref().expect("there until dropped");
        commands.send((command, sender)).expect("the relay lives");
        done.recv().expect("the relay obeys");
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A relay that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Told whether to reset.
type Line = (oneshot::Sender<bool>, task::JoinHandle<()>);

async fn relay(
    listener: TcpListener,
    port: u16,
    target: u16,
    mut inbox: UnboundedReceiver<(Command, SyncSender<()>)>,
    counts: &Counts,
) {
    let mut listener = Some(listener);
    let mut lines: Vec<Line> = Vec::new();
    loop {
        let accept = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        let (command, done) = tokio::select! {
            biased;
            command = inbox.recv() => match command {
                Some(command) => command,
                None => break,
            },
            accepted = accept => {
                lines.retain(|(_, line)| !line.is_finished());
                lines.extend(accepted.ok().map(|(socket, _)| begin(socket, target, counts)));
                continue;
            }
        };
        // Who has connected before the command is there, though not yet accepted.
        while let Some(waiting) = &listener
            && let Ok(Ok((socket, _))) =
                tokio::time::timeout(Duration::from_millis(2), waiting.accept()).await
        {
            lines.push(begin(socket, target, counts));
        }
        lines.retain(|(_, line)| !line.is_finished());
        let mut resets = true;
        let ended = match command {
            Command::Cut => std::mem::take(&mut lines),
            Command::CutOne(_) if lines.is_empty() => Vec::new(),
            Command::CutOne(index) => {
                resets = index % 2 == 1;
                vec![lines.swap_remove(index % lines.len())]
            }
            Command::Close => {
                listener = None;
                std::mem::take(&mut lines)
            }
            Command::Open => {
                listener.get_or_insert_with(|| bind(port).listen(1024).unwrap());
                Vec::new()
            }
        };
        for (end, line) in ended {
            // One that ended by itself meanwhile is joined all the same.
            let _ = end.send(resets);
            let _ = line.await;
            counts.cut.fetch_add(1, Ordering::Relaxed);
        }
        // Whoever asked may have gone.
        let _ = done.send(());
    }
}

fn begin(socket: TcpStream, target: u16, counts: &Counts) -> Line {
    counts.accepted.fetch_add(1, Ordering::Relaxed);
    let (end, told) = oneshot::channel();
    (end, task::spawn(carry(socket, target, told)))
}

/// Carries bytes both ways until an end closes, or until told to end.
async fn carry(mut near: TcpStream, target: u16, told: oneshot::Receiver<bool>) {
    let Ok(mut far) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    for socket in [&near, &far] {
        // A socket whose other end has gone refuses options.
        let _ = socket.set_nodelay(true);
    }
    let resets = tokio::select! {
        // An error on one side ends both.
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => false,
        resets = told => resets.unwrap_or(false),
    };
    if resets {
        for socket in [&near, &far] {
            let _ = socket.set_zero_linger();
        }
    }
}
