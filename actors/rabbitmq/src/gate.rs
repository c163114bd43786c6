// SPDX-License-Identifier: MIT OR Apache-2.0
//! The socket of one connection, with a gate before its reading side.
//!
//! The driver's own thread reads whatever the broker sends and queues it without a bound. The gate gives that
//! thread a credit of bytes, which grows as messages are taken: with no credit left nothing is read, the socket
//! fills up, and the broker keeps the rest in its queue (RMQ-18). How long it may stay so is the intake's business. The
//! gate also ends the driver's thread when its session is over, whatever state the connection is in.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_rs::Tokio;
use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use futures::io::{AsyncRead, AsyncWrite};
use futures::stream::Stream;
use futures::task::AtomicWaker;

use crate::bell::Bell;

/// How many bytes the driver reads before it looks at them: messages of one round wait for each other.
const ROUND_BYTES: usize = 32 * 1024;

/// The runtime that the driver is given: tokio, with gated sockets.
pub(crate) type GatedRuntime = RuntimeParts<Tokio, GatedReactor>;

/// What the reading session and the driver's thread share.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Bytes that may wait in the driver; no bound if it is not positive.
    limit: i64,
    credit: AtomicI64,
    closed: AtomicBool,
    /// How often it was opened.
    openings: AtomicU64,
    aborted: AtomicBool,
    /// The driver's thread, when it may not read.
    socket: AtomicWaker,
    writer: AtomicWaker,
    /// What wakes the session, when it waits for messages.
    bell: Arc<Bell>,
}

impl Gate {
    /// A gate that lets so many bytes wait; zero for any number.
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        Arc::new(Self {
            limit,
            credit: AtomicI64::new(limit),
            closed: AtomicBool::new(false),
            openings: AtomicU64::new(0),
            aborted: AtomicBool::new(false),
            socket: AtomicWaker::new(),
            writer: AtomicWaker::new(),
            bell: Arc::default(),
        })
    }

    /// What is rung for messages, and heard by the session.
    pub(crate) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// A message of so many bytes was taken.
    pub(crate) fn taken(&self, bytes: usize) {
        if self.limit <= 0 {
            return;
        }
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let credit = self.credit.fetch_add(bytes, Ordering::AcqRel).saturating_add(bytes);
        if credit > self.limit {
            self.credit.store(self.limit, Ordering::Release);
        }
        if credit >= self.limit / 2 {
            self.open();
        }
    }

    /// Nothing waits: the whole credit is there again. When it is used up without a message, the bell rings.
    pub(crate) fn empty(&self) {
        if self.limit <= 0 {
            return;
        }
        self.credit.store(self.limit, Ordering::Release);
        self.open();
    }

    /// So many bytes may be read, whatever was taken. What was not read of the last ones does not add up.
    pub(crate) fn grant(&self, bytes: usize) {
        if self.limit <= 0 {
            return;
        }
        self.credit.fetch_max(i64::try_from(bytes).unwrap_or(i64::MAX), Ordering::AcqRel);
        self.open();
    }

    /// The number of its closing, if reading has stopped for want of credit; `cx` is woken when it stops.
    pub(crate) fn closing(&self, cx: &mut Context<'_>) -> Option<u64> {
        if self.limit <= 0 {
            return None;
        }
        self.bell.register(cx);
        self.closed.load(Ordering::Acquire).then(|| self.openings.load(Ordering::Acquire))
    }

    fn open(&self) {
        if self.closed.swap(false, Ordering::AcqRel) {
            self.openings.fetch_add(1, Ordering::AcqRel);
            self.socket.wake();
        }
    }

    /// Ends the connection at its next read or write.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.socket.wake();
        self.writer.wake();
    }

    fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    /// How many bytes may be read now; `None` when the gate is closed.
    fn allowance(&self, waker: &std::task::Waker) -> Option<usize> {
        if self.limit <= 0 {
            return Some(usize::MAX);
        }
        let credit = || self.credit.load(Ordering::Acquire);
        if !self.closed.load(Ordering::Acquire) {
            if let Ok(left @ 1..) = usize::try_from(credit()) {
                return Some(left);
            }
            self.closed.store(true, Ordering::Release);
        }
        self.socket.register(waker);
        // The session may wait for the rest of a message that is larger than the credit.
        self.bell.wake();
        // It may have been opened meanwhile.
        if self.closed.load(Ordering::Acquire) {
            if credit() < self.limit / 2 {
                return None;
            }
            self.open();
        }
        usize::try_from(credit()).ok().filter(|left| *left > 0)
    }

    fn read(&self, bytes: usize) {
        if self.limit > 0 {
            self.credit.fetch_sub(i64::try_from(bytes).unwrap_or(i64::MAX), Ordering::AcqRel);
        }
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the session has ended")
}

/// Makes gated sockets.
#[derive(Clone)]
pub(crate) struct GatedReactor {
    tokio: Tokio,
    gate: Arc<Gate>,
}

impl fmt::Debug for GatedReactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GatedReactor")
    }
}

/// The runtime for one connection.
pub(crate) fn runtime(gate: &Arc<Gate>) -> async_rs::Runtime<GatedRuntime> {
    let tokio = Tokio::current();
    let reactor = GatedReactor { tokio: tokio.clone(), gate: Arc::clone(gate) };
    async_rs::Runtime::new(RuntimeParts::new(tokio, reactor))
}

impl Reactor for GatedReactor {
    type TcpStream = Gated;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Gated, _>(io::Error::from(io::ErrorKind::Unsupported))
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.tokio.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.tokio.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Gated>> + Send + 'static {
        let (gate, tokio) = (Arc::clone(&self.gate), self.tokio.clone());
        async move {
            let socket = tokio.tcp_connect_addr(address).await?;
            if gate.is_aborted() {
                return Err(ended());
            }
            Ok(Gated { socket, gate, round: 0, called: false })
        }
    }
}

/// A socket behind a gate.
pub(crate) struct Gated {
    socket: <Tokio as Reactor>::TcpStream,
    gate: Arc<Gate>,
    /// Bytes that were read since the driver was last told that there are no more.
    round: usize,
    /// Whether the driver has been called back since something was read.
    called: bool,
}

impl Gated {
    /// The driver flushes and writes before it reads, and never between reading and looking at it.
    fn end_round(&mut self) {
        self.gate.bell.done();
    }
}

impl Drop for Gated {
    fn drop(&mut self) {
        self.end_round();
    }
}

impl fmt::Debug for Gated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gated")
    }
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.gate.socket.register(cx.waker());
        if self.gate.is_aborted() {
            return Poll::Ready(Err(ended()));
        }
        let left = ROUND_BYTES.saturating_sub(self.round);
        let allowed = if left > 0 { self.gate.allowance(cx.waker()) } else { None };
        let read = match allowed {
            Some(allowed) => {
                let size = allowed.min(left).min(buffer.len());
                Pin::new(&mut self.socket).poll_read(cx, &mut buffer[..size])?
            }
            None => Poll::Pending,
        };
        match read {
            Poll::Ready(read) => {
                self.gate.read(read);
                self.round += read;
                self.called = false;
                self.gate.bell.begin();
                Poll::Ready(Ok(read))
            }
            Poll::Pending => {
                self.round = 0;
                // So that the driver comes by once more when it has looked at what it has read; and nobody else would
                // call it back when it was stopped here.
                if left == 0 || (self.gate.bell.is_busy() && !self.called) {
                    self.called = true;
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for Gated {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.end_round();
        self.gate.writer.register(cx.waker());
        if self.gate.is_aborted() {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.end_round();
        self.gate.writer.register(cx.waker());
        if self.gate.is_aborted() {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.socket).poll_write_vectored(cx, parts)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_round();
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_round();
        Pin::new(&mut self.socket).poll_close(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn a_gate_closes_without_credit_and_opens_at_half_of_it() {
        let gate = Gate::new(100);
        let waker = Waker::noop();
        assert_eq!(gate.allowance(waker), Some(100));
        gate.read(100);
        assert_eq!(gate.allowance(waker), None);
        let cx = &mut Context::from_waker(waker);
        let first = gate.closing(cx);
        assert!(first.is_some());
        gate.taken(49);
        assert_eq!((gate.allowance(waker), gate.closing(cx)), (None, first));
        gate.taken(1);
        assert_eq!(gate.closing(cx), None);
        assert_eq!(gate.allowance(waker), Some(50));
        gate.read(50);
        assert_eq!(gate.allowance(waker), None);
        assert!(gate.closing(cx).is_some_and(|second| Some(second) != first));
        gate.empty();
        assert_eq!(gate.allowance(waker), Some(100));
    }

    #[test]
    fn what_is_granted_opens_the_gate_and_does_not_add_up() {
        let gate = Gate::new(1000);
        let waker = Waker::noop();
        gate.read(1000);
        assert_eq!(gate.allowance(waker), None);
        for _ in 0..3 {
            gate.grant(10);
        }
        assert_eq!(gate.allowance(waker), Some(10));
        gate.read(10);
        assert_eq!(gate.allowance(waker), None);
        gate.empty();
        gate.grant(10);
        assert_eq!(gate.allowance(waker), Some(1000));
    }

    #[test]
    fn what_was_taken_never_makes_more_credit_than_the_limit() {
        let gate = Gate::new(100);
        gate.taken(1000);
        assert_eq!(gate.allowance(Waker::noop()), Some(100));
    }

    #[derive(Default)]
    struct Counted(std::sync::atomic::AtomicUsize);

    impl std::task::Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Counted {
        fn take(&self) -> usize {
            self.0.swap(0, Ordering::SeqCst)
        }
    }

    /// A socket of a driver, and its other end.
    async fn connected(gate: &Arc<Gate>) -> (Gated, tokio::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let reactor = GatedReactor { tokio: Tokio::current(), gate: Arc::clone(gate) };
        let driver = reactor.tcp_connect_addr(listener.local_addr().unwrap()).await.unwrap();
        (driver, listener.accept().await.unwrap().0)
    }

    /// What a driver has read before it looks at it.
    async fn read(driver: &mut Gated, at_least: usize) -> usize {
        let (mut buffer, mut bytes) = (vec![0; 1 << 20], 0);
        while bytes < at_least {
            bytes += futures::AsyncReadExt::read(driver, &mut buffer).await.unwrap();
        }
        bytes
    }

    #[actix::test]
    async fn a_session_is_woken_when_the_driver_comes_by_after_what_it_has_read() {
        let gate = Gate::new(0);
        let (mut driver, mut broker) = connected(&gate).await;
        let (thread, session) = (Arc::<Counted>::default(), Arc::<Counted>::default());
        let (thread_waker, session_waker) =
            (Waker::from(Arc::clone(&thread)), Waker::from(Arc::clone(&session)));
        let cx = &mut Context::from_waker(&thread_waker);
        let ringing = Waker::from(Arc::clone(gate.bell()));
        gate.bell().listen(&mut Context::from_waker(&session_waker));
        tokio::io::AsyncWriteExt::write_all(&mut broker, b"message").await.unwrap();
        assert_eq!(read(&mut driver, 7).await, 7);
        ringing.wake_by_ref();
        assert_eq!(session.take(), 0);
        // It is called back, once, or it would wait for more before it comes by.
        for expected in [1, 0] {
            assert!(Pin::new(&mut driver).poll_read(cx, &mut [0; 8]).is_pending());
            assert_eq!((thread.take(), session.take()), (expected, 0));
        }
        assert!(Pin::new(&mut driver).poll_flush(cx).is_ready());
        assert_eq!(session.take(), 1);
        assert!(Pin::new(&mut driver).poll_read(cx, &mut [0; 8]).is_pending());
        assert_eq!(thread.take(), 0);
    }

    #[actix::test]
    async fn a_session_is_woken_when_the_driver_ends_in_the_middle() {
        let gate = Gate::new(0);
        let (mut driver, mut broker) = connected(&gate).await;
        let session = Arc::<Counted>::default();
        let session_waker = Waker::from(Arc::clone(&session));
        gate.bell().listen(&mut Context::from_waker(&session_waker));
        tokio::io::AsyncWriteExt::write_all(&mut broker, b"message").await.unwrap();
        read(&mut driver, 7).await;
        Waker::from(Arc::clone(gate.bell())).wake();
        assert_eq!(session.take(), 0);
        drop(driver);
        assert_eq!(session.take(), 1);
    }

    #[actix::test]
    async fn a_driver_looks_at_what_it_has_read_before_it_is_too_much() {
        for flushes in [false, true] {
            let gate = Gate::new(0);
            let (mut driver, mut broker) = connected(&gate).await;
            let thread = Arc::<Counted>::default();
            let waker = Waker::from(Arc::clone(&thread));
            tokio::io::AsyncWriteExt::write_all(&mut broker, &vec![0; ROUND_BYTES + 1]).await.unwrap();
            assert_eq!(read(&mut driver, ROUND_BYTES).await, ROUND_BYTES);
            let cx = &mut Context::from_waker(&waker);
            if flushes {
                assert!(Pin::new(&mut driver).poll_flush(cx).is_ready());
            }
            assert!(Pin::new(&mut driver).poll_read(cx, &mut [0; 8]).is_pending());
            assert_eq!(thread.take(), 1);
            assert_eq!(read(&mut driver, 1).await, 1);
        }
    }

    #[test]
    fn a_gate_without_a_limit_is_always_open() {
        let gate = Gate::new(0);
        gate.read(1 << 40);
        assert_eq!(gate.allowance(Waker::noop()), Some(usize::MAX));
    }
}
