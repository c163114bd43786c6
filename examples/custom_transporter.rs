// SPDX-License-Identifier: MIT OR Apache-2.0
//! A transporter of one's own: Unix-domain sockets that carry one JSON packet per line, built on `martlet-core`
//! alone. The guide `docs/extending.md` walks through it, `tests/custom_transporter.rs` puts it through the
//! conformance suite.
//!
//! ```text
//! $ cargo run --example custom_transporter
//! serving on unix://…martlet-….sock
//! 1 + 2 + 3 = 6
//! the caller is this process: true
//! countdown: [3, 2, 1]
//! the handler of a call that was given up is dropped: true
//! stopped: 4 requests finished, 0 abandoned; the socket file is gone: true
//! ```
//!
//! On the wire, one line each:
//!
//! ```text
//! {"pattern":"sum","data":[1,2,3],"id":"…"}        a request; without an id: an event
//! {"response":6,"isDisposed":true,"id":"…"}        a reply
//! {"cancel":"…"}                                   the caller of the request with this id has gone
//! ```

use std::error::Error;
use std::future::{Future, pending};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::stream;
use martlet_core::codec::{Codec, CodecError, JsonCodec};
use martlet_core::packet::{IncomingPacket, OutgoingPacket, PatternText};
use martlet_core::transport::{
    Accept, ContextData, Delivery, Dial, Inbound, Listen, Open, Outbound, OutboundMessage, PatternKey,
    Response, Role, Session, SessionPlan, SessionReader, SessionWriter, WriteError,
};
use martlet_core::{
    ClientOptions, ClientProxy, Ctx, Data, Microservice, RpcError, Server, ServerOptions, SessionError,
    State, Streaming, TransportId, TransportInfo, message,
};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};

// === 1. name it ===

/// Ids of one's own begin at 1024.
pub const UNIX: TransportId = TransportId::custom(1024);

/// The longest line, in bytes. Whatever a peer can make grow has a bound.
const MAX_LINE: usize = 16 * 1024 * 1024;

/// JSON, no subscriptions, no acknowledgements: the defaults of `TransportInfo`.
fn info() -> TransportInfo {
    TransportInfo::new(UNIX, "unix")
}

/// What handlers may know of the connection: they take it as `Ctx<UnixContext>`.
#[derive(Debug, Clone)]
pub struct UnixContext {
    /// The process at the other end, as the kernel says.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
}

// === 2. get a session ===

/// The calling side: dials the path of a socket.
#[derive(Debug, Clone)]
pub struct UnixDial {
    path: PathBuf,
}

impl UnixDial {
    /// Dials this path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl Dial for UnixDial {
    type Session = UnixSession;

    fn info(&self) -> TransportInfo {
        info()
    }

    // Tries once. `From<io::Error>` says what follows: no such socket is `refused` (tried again as the client's
    // options allow), a missing permission is `fatal`.
    async fn dial(&self, plan: SessionPlan) -> Result<UnixSession, SessionError> {
        UnixSession::new(UnixStream::connect(&self.path).await?, plan.role)
    }
}

/// The serving side: binds a path, and accepts peers.
#[derive(Debug, Clone)]
pub struct UnixListen {
    path: PathBuf,
}

impl UnixListen {
    /// Listens on this path, which must not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl Listen for UnixListen {
    type Bound = UnixBound;

    fn info(&self) -> TransportInfo {
        info()
    }

    async fn bind(&self) -> Result<UnixBound, SessionError> {
        Ok(UnixBound { listener: UnixListener::bind(&self.path)?, path: self.path.clone() })
    }
}

/// A bound socket. Dropped by the runtime when the service stops: then the file goes.
#[derive(Debug)]
pub struct UnixBound {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for UnixBound {
    fn drop(&mut self) {
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Accept for UnixBound {
    type Peer = UnixPeer;

    fn local_url(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    // An error returned here would end the server, so a passing one (out of descriptors) is waited out.
    async fn accept(&mut self) -> Result<UnixPeer, SessionError> {
        loop {
            match self.listener.accept().await.and_then(|(socket, _)| socket.into_std()) {
                Ok(socket) => return Ok(UnixPeer { socket }),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

/// An accepted peer on its way to the arbiter that will own it, where its socket meets another event loop.
#[derive(Debug)]
pub struct UnixPeer {
    socket: std::os::unix::net::UnixStream,
}

impl Open for UnixPeer {
    type Session = UnixSession;

    // The place for handshakes: a slow peer delays nobody else.
    async fn open(self) -> Result<UnixSession, SessionError> {
        UnixSession::new(UnixStream::from_std(self.socket)?, Role::Server)
    }
}

/// A live connection, for both ends.
#[derive(Debug)]
pub struct UnixSession {
    socket: UnixStream,
    role: Role,
    context: Arc<UnixContext>,
}

impl UnixSession {
    fn new(socket: UnixStream, role: Role) -> Result<Self, SessionError> {
        let credentials = socket.peer_cred()?;
        let context = Arc::new(UnixContext { pid: credentials.pid(), uid: credentials.uid() });
        Ok(Self { socket, role, context })
    }
}

impl Session for UnixSession {
    // A reply goes back on the connection by which its request came. With a broker, this would be a subject or a
    // delivery tag.
    type ReplyTo = ();
    type Reader = UnixReader;
    type Writer = UnixWriter;

    fn peer(&self) -> Arc<str> {
        match self.context.pid {
            Some(pid) => Arc::from(format!("process {pid}")),
            None => Arc::from(format!("user {}", self.context.uid)),
        }
    }

    fn context(&self) -> Option<ContextData> {
        Some(Arc::clone(&self.context) as ContextData)
    }

    fn split(self) -> (UnixReader, UnixWriter) {
        let (read, write) = self.socket.into_split();
        let reader = UnixReader {
            socket: read,
            role: self.role,
            buf: BytesMut::new(),
            searched: 0,
            draining: false,
            ended: false,
        };
        (reader, UnixWriter { socket: write, out: BytesMut::new() })
    }
}

// === 3. read ===

/// The half that reads.
#[derive(Debug)]
pub struct UnixReader {
    socket: OwnedReadHalf,
    role: Role,
    buf: BytesMut,
    /// So many bytes of `buf` hold no line break.
    searched: usize,
    draining: bool,
    ended: bool,
}

impl SessionReader<()> for UnixReader {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<()>, SessionError>>> {
        loop {
            if let Some(line) = self.line() {
                return Poll::Ready(Some(Ok(self.read(line, packet))));
            }
            if self.ended {
                // The other end has closed, or everything received before a drain was yielded.
                return Poll::Ready(None);
            }
            if self.buf.len() > MAX_LINE {
                let reason = format!("a line is longer than {MAX_LINE} bytes");
                return Poll::Ready(Some(Err(SessionError::protocol(reason))));
            }
            match self.fill(cx) {
                Poll::Ready(Ok(0)) => self.ended = true,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(SessionError::from(error)))),
                Poll::Pending if self.draining => self.ended = true,
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn drain(&mut self) {
        self.draining = true;
    }

    // A socket closed with unread bytes resets the connection, and takes our last replies with it.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.buf.clear();
            if !matches!(ready!(self.fill(cx)), Ok(1..)) {
                return Poll::Ready(());
            }
        }
    }
}

impl UnixReader {
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<usize>> {
        self.buf.reserve(16 * 1024);
        pin!(self.socket.read_buf(&mut self.buf)).poll(cx)
    }

    /// Takes the next complete line out of the buffer.
    fn line(&mut self) -> Option<Bytes> {
        let unsearched = self.buf.get(self.searched..).unwrap_or_default();
        let Some(at) = unsearched.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.buf.len();
            return None;
        };
        let mut line = self.buf.split_to(self.searched + at + 1).freeze();
        line.truncate(line.len() - 1);
        self.searched = 0;
        Some(line)
    }

    /// The codec takes a packet apart no further than routing needs: payload, metadata and id stay raw.
    fn read(&self, line: Bytes, packet: &mut IncomingPacket) -> Inbound<()> {
        let read = match self.role {
            Role::Client => {
                JsonCodec.decode_response(line.into()).map(|packet| Inbound::Response(Box::new(packet)))
            }
            Role::Server => request(line, packet),
        };
        // One line that makes no sense does not spoil the next: it is reported, the session goes on.
        read.unwrap_or_else(|error| Inbound::Bad { reason: error.to_string() })
    }
}

fn request(line: Bytes, packet: &mut IncomingPacket) -> Result<Inbound<()>, CodecError> {
    let cancelled = line.strip_prefix(b"{\"cancel\":").and_then(|rest| rest.strip_suffix(b"}"));
    if let Some(id) = cancelled {
        return Ok(Inbound::Cancel { id: Bytes::copy_from_slice(id).into() });
    }
    // Straight to where the runtime wants it.
    JsonCodec.read_request(line.into(), packet)?;
    // The runtime finds the handler. A broker would say which subscription matched: `PatternKey::Route`.
    let delivery = Delivery { key: PatternKey::Packet, reply_to: (), context: None };
    Ok(if packet.is_event() { Inbound::Event(delivery) } else { Inbound::Request(delivery) })
}

// === 4. write ===

/// The half that writes.
#[derive(Debug)]
pub struct UnixWriter {
    socket: OwnedWriteHalf,
    out: BytesMut,
}

impl SessionWriter<()> for UnixWriter {
    fn write(&mut self, item: Outbound<()>) -> Result<(), WriteError> {
        match item {
            Outbound::Request(message) | Outbound::Event(message) => self.message(message),
            // The other end is always ours. A transporter that NestJS peers may use has to drop this.
            Outbound::Cancel { id, .. } => self.line(|out| {
                out.put_slice(format!("{{\"cancel\":\"{id}\"}}").as_bytes());
                Ok(())
            }),
            // Subscriptions and settlements are asked of brokers only.
            _ => Ok(()),
        }
    }

    fn write_response(&mut self, response: &mut Response<()>) -> Result<(), WriteError> {
        let Response { id, body, .. } = response;
        self.line(|out| JsonCodec.encode_response(Some(id), body, None, out))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        while !self.out.is_empty() {
            let written = ready!(Pin::new(&mut self.socket).poll_write(cx, &self.out))?;
            if written == 0 {
                return Poll::Ready(Err(SessionError::lost("the socket takes no more bytes")));
            }
            self.out.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn pending_bytes(&self) -> usize {
        self.out.len()
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        ready!(self.poll_flush(cx))?;
        Pin::new(&mut self.socket).poll_shutdown(cx).map_err(SessionError::from)
    }
}

impl UnixWriter {
    fn message(&mut self, mut message: OutboundMessage) -> Result<(), WriteError> {
        // The peer is a Martlet service, which honours the caller's timeout.
        message.put_timeout();
        let id = message.id.map(|id| id.text());
        self.line(|out| {
            let packet = OutgoingPacket {
                pattern: PatternText::Given(&message.pattern),
                data: Some(&message.data),
                id: id.as_deref(),
                metadata: Some(&message.metadata).filter(|metadata| !metadata.is_empty()),
            };
            JsonCodec.encode_request(&packet, out)
        })
    }

    /// Appends one line, or nothing: what cannot be written is refused alone, and its caller gets the error.
    fn line(
        &mut self,
        encode: impl FnOnce(&mut BytesMut) -> Result<(), CodecError>,
    ) -> Result<(), WriteError> {
        let start = self.out.len();
        let encoded = encode(&mut self.out);
        let len = self.out.len() - start;
        let refused: Box<dyn Error + Send + Sync> = match encoded {
            Ok(()) if len <= MAX_LINE => {
                // Payloads and ids are copied as they came. In JSON, a line break can only be white space.
                self.out.iter_mut().skip(start).filter(|byte| **byte == b'\n').for_each(|byte| *byte = b' ');
                self.out.put_u8(b'\n');
                return Ok(());
            }
            Ok(()) => format!("a line of {len} bytes is longer than {MAX_LINE}").into(),
            Err(error) => error.into(),
        };
        self.out.truncate(start);
        Err(WriteError::Item(Arc::from(refused)))
    }
}

// === 5. hand it out ===

/// A server at a path, to be put into a service.
#[derive(Debug)]
pub struct UnixServer {
    listen: UnixListen,
    options: ServerOptions,
}

impl UnixServer {
    /// A server with the default options at this path.
    pub fn bind(path: impl Into<PathBuf>) -> Self {
        Self { listen: UnixListen::new(path), options: ServerOptions::default() }
    }
}

impl From<UnixServer> for Server {
    fn from(server: UnixServer) -> Self {
        Server::listen(server.listen, server.options)
    }
}

/// A client of the service at this path.
pub fn unix_client(path: impl Into<PathBuf>) -> ClientProxy {
    ClientProxy::new(UnixDial::new(path), ClientOptions::default())
}

// === and use it like any other ===

/// Sets a flag when it is dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

async fn forever(State(gone): State<Arc<AtomicBool>>) -> Result<(), RpcError> {
    let _dropped = Dropped(Arc::clone(&gone));
    pending().await
}

async fn serve_and_call(path: &Path) -> Result<(), Box<dyn Error>> {
    let gone = Arc::new(AtomicBool::new(false));
    let service = Microservice::new()
        .state(Arc::clone(&gone))
        .handlers(message("sum", async |Data(numbers): Data<Vec<i64>>| {
            Ok::<_, RpcError>(numbers.iter().sum::<i64>())
        }))
        .handlers(message("caller", async |caller: Ctx<UnixContext>| Ok::<_, RpcError>(caller.pid)))
        .handlers(message("countdown", async |Data(from): Data<u32>| {
            Ok::<_, RpcError>(Streaming(stream::iter((1..=from).rev())))
        }))
        .handlers(message("forever", forever))
        .server(UnixServer::bind(path))
        .start()
        .await?;
    println!("serving on {}", service.url());

    let client = unix_client(path);
    println!("1 + 2 + 3 = {}", client.send::<i64>("sum", [1, 2, 3]).await?);
    let pid: Option<u32> = client.send("caller", ()).await?;
    println!("the caller is this process: {}", pid == Some(std::process::id()));
    println!("countdown: {:?}", client.send::<u32>("countdown", 3).stream().collect_all().await?);

    let given_up = client.send::<()>("forever", ()).timeout(Duration::from_millis(200)).await.is_err();
    while given_up && !gone.load(Ordering::Acquire) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("the handler of a call that was given up is dropped: {given_up}");

    client.close().await;
    let report = service.stop(Duration::from_secs(5)).await;
    let (done, abandoned, file_gone) = (report.done(), report.abandoned().count(), !path.exists());
    println!(
        "stopped: {done} requests finished, {abandoned} abandoned; the socket file is gone: {file_gone}"
    );
    Ok(())
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    serve_and_call(&std::env::temp_dir().join(format!("martlet-{}.sock", std::process::id()))).await
}
