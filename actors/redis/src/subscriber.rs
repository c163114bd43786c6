// SPDX-License-Identifier: MIT OR Apache-2.0
//! The subscribing half of a session: a connection of our own, driven by the session's task, so that it is read
//! even while the session takes no new work, and what waits has a bound (pub/sub cannot be slowed down: a broker
//! whose subscriber does not read cuts it off).

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use hashbrown::HashMap;
use martlet_core::error::SessionError;
use martlet_core::pattern::Route;
use martlet_core::transport::ContextData;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::options::{Address, Common};
use crate::resp::{self, Confirmed, Frame, NotRedis, Parsed};
use crate::tls::{self, Tls};

/// How much is read at once.
const READ_BYTES: usize = 64 * 1024;

/// Reads in a row before others have their turn.
const READS: usize = 4;

/// What a waiting message costs besides its body, about.
const ARRIVAL_BYTES: usize = 96;

enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Socket {
    fn poll_read(&mut self, cx: &mut Context<'_>, into: &mut BytesMut) -> Poll<io::Result<usize>> {
        fn read<S: AsyncRead + Unpin>(
            socket: &mut S,
            cx: &mut Context<'_>,
            into: &mut BytesMut,
        ) -> Poll<io::Result<usize>> {
            pin!(socket.read_buf(into)).poll(cx)
        }
        match self {
            Self::Plain(socket) => read(socket, cx, into),
            Self::Tls(socket) => read(socket, cx, into),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(socket) => Pin::new(socket).poll_flush(cx),
        }
    }
}

/// A route that is served, with what all its messages share.
pub(crate) struct Served {
    pub(crate) route: Route,
    /// REDIS-3: where replies go, where the channel is the route.
    pub(crate) reply: Bytes,
    /// The context, where the channel is the route.
    pub(crate) context: ContextData,
    /// The route as the context's pattern, where it is a glob.
    pub(crate) pattern: Arc<str>,
}

/// What messages on a subscription are.
#[derive(Clone)]
pub(crate) enum Target {
    Serve(Rc<Served>),
    Cancel,
    Reply,
}

/// A subscription.
struct Entry {
    target: Target,
    /// Whether it is to last.
    wanted: bool,
    /// Commands to end it that the broker has not yet answered. Until then messages come, and their callers are to
    /// hear that nobody handles them.
    leaving: u32,
}

/// A message that waits.
pub(crate) struct Arrival {
    pub(crate) target: Target,
    /// Kept for globs only.
    pub(crate) channel: Option<Bytes>,
    pub(crate) body: Bytes,
}

/// What a command was for, in the order of the answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    Auth,
    Select,
    Name,
    /// Older brokers do not know it.
    Library,
    ClientId,
    Subscribe {
        channel: Bytes,
        glob: bool,
    },
    Unsubscribe {
        channel: Bytes,
        glob: bool,
    },
    Ping,
    /// Everything sent before it has been done.
    Probe,
}

/// A handle on the subscribing connection, for NestJS's `unwrap()`.
#[derive(Debug, Clone)]
pub struct RedisSubscriber {
    seen: Arc<Seen>,
}

#[derive(Debug)]
struct Seen {
    id: AtomicU64,
    local: SocketAddr,
    peer: SocketAddr,
    dropped: AtomicU64,
    waiting: AtomicU64,
}

impl RedisSubscriber {
    /// Its number in the broker's `CLIENT LIST`; 0 for brokers before Redis 5.
    pub fn client_id(&self) -> u64 {
        self.seen.id.load(Ordering::Relaxed)
    }

    /// Our end of it.
    pub fn local_addr(&self) -> SocketAddr {
        self.seen.local
    }

    /// The broker's end of it.
    pub fn peer_addr(&self) -> SocketAddr {
        self.seen.peer
    }

    /// Messages that were dropped at a bound (`subscriptionCapacity`, `subscriptionBytes`) since it was made.
    pub fn dropped(&self) -> u64 {
        self.seen.dropped.load(Ordering::Relaxed)
    }

    /// Messages that waited at the end of the last turn.
    pub fn waiting(&self) -> u64 {
        self.seen.waiting.load(Ordering::Relaxed)
    }
}

/// The connection, what is subscribed on it, and what has arrived.
pub(crate) struct Subscriber {
    socket: Socket,
    input: BytesMut,
    /// How many bytes the next frame takes at least.
    need: usize,
    /// Bytes of a message that is not taken.
    skip: usize,
    output: BytesMut,
    unflushed: bool,
    asked: VecDeque<Asked>,
    /// Answers to what was asked, not yet looked at.
    pub(crate) answers: VecDeque<(Asked, Result<i64, String>)>,
    channels: HashMap<Bytes, Entry>,
    globs: HashMap<Bytes, Entry>,
    queue: VecDeque<Arrival>,
    queue_bytes: usize,
    /// What is to be reported before the next message.
    pub(crate) reports: VecDeque<String>,
    dropped: u64,
    dropped_reported: u64,
    /// Something arrived since it was last looked.
    pub(crate) heard: bool,
    /// Something has ever arrived.
    spoken: bool,
    capacity: usize,
    capacity_bytes: usize,
    max_payload: usize,
    seen: Arc<Seen>,
    shown: String,
}

impl Subscriber {
    /// Connects; nothing has been said yet.
    pub(crate) async fn connect(
        address: &Address,
        tls: Option<&Tls>,
        common: &Common,
    ) -> Result<Self, SessionError> {
        let shown = address.url();
        let unreachable = |error: io::Error| {
            SessionError::refused(format!(
                "the broker cannot be reached ({shown}, options url, host and port): {error}"
            ))
        };
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let (local, peer) =
            (stream.local_addr().map_err(unreachable)?, stream.peer_addr().map_err(unreachable)?);
        let socket = match tls {
            None => Socket::Plain(stream),
            Some(tls) => {
                let name = ServerName::try_from(address.host.clone()).map_err(|error| {
                    SessionError::fatal(format!("host {:?} has no certificate: {error}", address.host))
                })?;
                let stream = TlsConnector::from(Arc::clone(&tls.config))
                    .connect(name, stream)
                    .await
                    .map_err(|error| tls::handshake_error(&shown, &error))?;
                Socket::Tls(Box::new(stream))
            }
        };
        let seen = Arc::new(Seen {
            id: AtomicU64::new(0),
            local,
            peer,
            dropped: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
        });
        Ok(Self {
            socket,
            input: BytesMut::new(),
            need: 0,
            skip: 0,
            output: BytesMut::new(),
            unflushed: false,
            asked: VecDeque::new(),
            answers: VecDeque::new(),
            channels: HashMap::new(),
            globs: HashMap::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            reports: VecDeque::new(),
            dropped: 0,
            dropped_reported: 0,
            heard: false,
            spoken: false,
            capacity: common.subscription_capacity.max(1),
            capacity_bytes: common.subscription_bytes.max(1),
            max_payload: common.max_payload_bytes,
            seen,
            shown,
        })
    }

    pub(crate) fn handle(&self) -> RedisSubscriber {
        RedisSubscriber { seen: Arc::clone(&self.seen) }
    }

    /// Sends a command.
    pub(crate) fn ask(&mut self, what: Asked, command: &[&[u8]]) {
        resp::command(&mut self.output, command);
        self.asked.push_back(what);
    }

    /// Subscribes a channel, or a glob.
    pub(crate) fn subscribe(&mut self, channel: Bytes, glob: bool, target: Target) {
        let map = if glob { &mut self.globs } else { &mut self.channels };
        let leaving = map.get(&channel).map_or(0, |entry| entry.leaving);
        map.insert(channel.clone(), Entry { target, wanted: true, leaving });
        let verb: &[u8] = if glob { b"PSUBSCRIBE" } else { b"SUBSCRIBE" };
        resp::command(&mut self.output, &[verb, &channel]);
        self.asked.push_back(Asked::Subscribe { channel, glob });
    }

    /// Ends a subscription; what comes until the broker has done so is still read.
    pub(crate) fn unsubscribe(&mut self, channel: &[u8], glob: bool) {
        let map = if glob { &mut self.globs } else { &mut self.channels };
        let Some(entry) = map.get_mut(channel).filter(|entry| entry.wanted) else { return };
        entry.wanted = false;
        entry.leaving += 1;
        let verb: &[u8] = if glob { b"PUNSUBSCRIBE" } else { b"UNSUBSCRIBE" };
        let asked = Asked::Unsubscribe { channel: Bytes::copy_from_slice(channel), glob };
        self.ask(asked, &[verb, channel]);
    }

    /// The broker has ended a subscription.
    fn unsubscribed(&mut self, channel: &[u8], glob: bool) {
        let map = if glob { &mut self.globs } else { &mut self.channels };
        let Some(entry) = map.get_mut(channel) else { return };
        entry.leaving = entry.leaving.saturating_sub(1);
        if entry.leaving == 0 && !entry.wanted {
            map.remove(channel);
        }
    }

    /// Forgets a subscription that the broker refused.
    pub(crate) fn forget(&mut self, channel: &[u8], glob: bool) {
        if glob {
            self.globs.remove(channel)
        } else {
            self.channels.remove(channel)
        };
    }

    /// Ends the intake of a server: what the broker sent until then still arrives, and the answer to the probe
    /// after it.
    pub(crate) fn end_intake(&mut self) {
        for glob in [false, true] {
            let map = if glob { &self.globs } else { &self.channels };
            let verb: &[u8] = if glob { b"PUNSUBSCRIBE" } else { b"UNSUBSCRIBE" };
            for channel in map.keys() {
                resp::command(&mut self.output, &[verb, channel]);
                self.asked.push_back(Asked::Unsubscribe { channel: channel.clone(), glob });
            }
        }
        self.ask(Asked::Probe, &[b"PING"]);
    }

    /// Whether a channel is subscribed by its name.
    pub(crate) fn has_channel(&self, channel: &[u8]) -> bool {
        self.channels.get(channel).is_some_and(|entry| entry.wanted)
    }

    /// The next message.
    pub(crate) fn pop(&mut self) -> Option<Arrival> {
        let arrival = self.queue.pop_front()?;
        self.queue_bytes -= arrival.body.len() + ARRIVAL_BYTES;
        Some(arrival)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes of commands that are not on the wire.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.output.len()
    }

    pub(crate) fn has_asked(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Messages dropped since the last report of it.
    pub(crate) fn take_dropped(&mut self) -> Option<String> {
        let fresh = self.dropped - self.dropped_reported;
        if fresh == 0 {
            return None;
        }
        self.dropped_reported = self.dropped;
        Some(format!(
            "{fresh} messages ({} in this session) were dropped: so many were waiting that the limit of \
             subscriptionCapacity, {}, or subscriptionBytes, {}, was reached",
            self.dropped, self.capacity, self.capacity_bytes
        ))
    }

    /// Writes what is to be written.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        let lost = |error: io::Error| SessionError::lost(format!("the connection was lost: {error}"));
        while !self.output.is_empty() {
            let written = std::task::ready!(self.socket.poll_write(cx, &self.output)).map_err(lost)?;
            if written == 0 {
                return Poll::Ready(Err(SessionError::lost("the connection was closed")));
            }
            self.output.advance(written);
            self.unflushed = true;
        }
        if self.unflushed {
            std::task::ready!(self.socket.poll_flush(cx)).map_err(lost)?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Whether what waits must not keep what it was read with: where most of that is dropped, a few messages would hold
    /// many times their size.
    fn is_pressed(&self) -> bool {
        self.queue.len() >= self.capacity / 2 || self.queue_bytes >= self.capacity_bytes / 2
    }

    /// Takes in what has arrived, within the bounds; whatever it returns, the task is woken when there is more.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        for _ in 0..READS {
            let room = self.input.capacity() - self.input.len();
            let wanted = self.need.saturating_sub(self.input.len());
            if room < wanted.max(READ_BYTES / 4) {
                self.input.reserve(wanted.max(READ_BYTES));
            }
            match self.socket.poll_read(cx, &mut self.input) {
                Poll::Pending => {
                    self.seen.waiting.store(self.queue.len() as u64, Ordering::Relaxed);
                    return Ok(());
                }
                Poll::Ready(Ok(0)) => {
                    return Err(SessionError::lost(format!(
                        "the broker closed the connection ({})",
                        self.shown
                    )));
                }
                Poll::Ready(Ok(_)) => {
                    self.heard = true;
                    self.spoken = true;
                    self.need = self.take_in()?;
                }
                // TLS 1.3: the broker refuses our certificate after the handshake.
                Poll::Ready(Err(error)) if !self.spoken && tls::is_alert(&error) => {
                    return Err(tls::handshake_error(&self.shown, &error));
                }
                Poll::Ready(Err(error)) => {
                    return Err(SessionError::lost(format!(
                        "the connection was lost ({}): {error}",
                        self.shown
                    )));
                }
            }
        }
        self.seen.waiting.store(self.queue.len() as u64, Ordering::Relaxed);
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// Reads whole frames; how many bytes the next one takes at least.
    fn take_in(&mut self) -> Result<usize, SessionError> {
        let protocol = |NotRedis(bytes): NotRedis| {
            SessionError::protocol(format!("the broker does not speak Redis's protocol: it sent {bytes}"))
        };
        loop {
            if self.skip > 0 {
                let skipped = self.skip.min(self.input.len());
                self.input.advance(skipped);
                self.skip -= skipped;
                if self.skip > 0 {
                    return Ok(0);
                }
            }
            match resp::parse(&self.input, self.max_payload).map_err(protocol)? {
                Parsed::Incomplete(least) => return Ok(least),
                Parsed::Frame(frame, length) => self.take(frame, length)?,
            }
        }
    }

    fn take(&mut self, frame: Frame, length: usize) -> Result<(), SessionError> {
        let result = match frame {
            Frame::Message { pattern, channel, body } => {
                let found = match &pattern {
                    None => self.channels.get(&self.input[channel.clone()]),
                    Some(pattern) => self.globs.get(&self.input[pattern.clone()]),
                };
                // One whose subscription the broker refused, or that nobody asked for.
                let Some(target) = found.map(|entry| entry.target.clone()) else {
                    self.input.advance(length);
                    return Ok(());
                };
                let cost = body.len() + ARRIVAL_BYTES;
                if self.queue.len() >= self.capacity || self.queue_bytes + cost > self.capacity_bytes {
                    // REDIS-18.
                    self.dropped += 1;
                    self.seen.dropped.fetch_add(1, Ordering::Relaxed);
                    self.input.advance(length);
                    return Ok(());
                }
                let mut bytes = match self.is_pressed() {
                    false => self.input.split_to(length).freeze(),
                    true => {
                        let copy = Bytes::copy_from_slice(&self.input[..length]);
                        self.input.advance(length);
                        copy
                    }
                };
                let channel = pattern.is_some().then(|| bytes.slice(channel));
                bytes.truncate(body.end);
                bytes.advance(body.start);
                self.queue_bytes += cost;
                self.queue.push_back(Arrival { target, channel, body: bytes });
                return Ok(());
            }
            Frame::TooLarge { channel, size, skip } => {
                self.reports.push_back(format!(
                    "message on {}: a body of {size} bytes exceeds maxPayloadBytes, {}",
                    String::from_utf8_lossy(&self.input[channel]),
                    self.max_payload
                ));
                self.input.advance(length);
                self.skip = skip;
                return Ok(());
            }
            Frame::Error(text) => Err(String::from_utf8_lossy(&self.input[text]).into_owned()),
            Frame::Integer(number) => Ok(number),
            Frame::Confirmed(what) => {
                let subscribed = matches!(what, Confirmed::Subscribe | Confirmed::Psubscribe);
                let expected = match self.asked.front() {
                    Some(Asked::Subscribe { .. }) => subscribed,
                    Some(Asked::Unsubscribe { .. }) => !subscribed,
                    _ => false,
                };
                if !expected {
                    return Err(SessionError::protocol("the broker confirmed what was not asked for"));
                }
                Ok(0)
            }
            Frame::Simple | Frame::Text | Frame::Pong => Ok(0),
        };
        self.input.advance(length);
        match (self.asked.pop_front(), result) {
            (Some(Asked::ClientId), Ok(id)) => {
                self.seen.id.store(u64::try_from(id).unwrap_or(0), Ordering::Relaxed);
            }
            (Some(Asked::Unsubscribe { channel, glob }), _) => self.unsubscribed(&channel, glob),
            // They may be unknown to an older broker; a ping's answer was heard.
            (Some(Asked::Library | Asked::Ping), _) => {}
            (Some(asked), result) => self.answers.push_back((asked, result)),
            // What a broker says before it hangs up.
            (None, Err(text)) => return Err(broker_error(&self.shown, None, &text)),
            (None, Ok(_)) => {
                return Err(SessionError::protocol("the broker answered what was not asked for"));
            }
        }
        Ok(())
    }
}

/// What follows from an error of the broker.
pub(crate) fn broker_error(shown: &str, asked: Option<&Asked>, text: &str) -> SessionError {
    let code = text.split_whitespace().next().unwrap_or_default();
    let passing = ["LOADING", "BUSY", "MASTERDOWN", "TRYAGAIN"].contains(&code)
        || text.contains("max number of clients");
    match asked {
        _ if passing => SessionError::refused(format!("the broker is not ready ({shown}): {text}")),
        _ if asked == Some(&Asked::Auth) || ["NOAUTH", "WRONGPASS"].contains(&code) => SessionError::fatal(
            format!("the broker refused the credentials ({shown}, options username and password): {text}"),
        ),
        Some(Asked::Select) => {
            SessionError::fatal(format!("the broker refused the database ({shown}, option db): {text}"))
        }
        Some(Asked::Name) => {
            SessionError::fatal(format!("the broker refused option connectionName ({shown}): {text}"))
        }
        Some(Asked::Subscribe { channel, .. }) => SessionError::fatal(format!(
            "the broker refused the subscription of {} ({shown}): {text}",
            String::from_utf8_lossy(channel)
        )),
        _ => SessionError::fatal(format!("the broker refused us ({shown}): {text}")),
    }
}
