// SPDX-License-Identifier: MIT OR Apache-2.0
//! Faults: a transporter around any transporter that cuts, delays, drops, doubles and panics as told.
//!
//! A fault is another implementation of the contract, so nothing in the runtime knows of it. Wrap a
//! [`Dial`] as [`FaultyDial`] or a [`Listen`] as [`FaultyListen`], keep the [`Faults`] and change them while
//! traffic flows.
//!
//! # Examples
//!
//! ```
//! use martlet_core::{ClientOptions, ClientProxy};
//! use martlet_testkit::fault::{FaultyDial, Faults};
//! use martlet_testkit::memory::{MemoryDial, MemoryNetwork};
//!
//! let network = MemoryNetwork::new();
//! let faults = Faults::new();
//! let dial = FaultyDial::new(MemoryDial::new(&network), &faults);
//! let client = ClientProxy::new(dial, ClientOptions::default());
//! faults.change(|plan| plan.cut_after_read = Some(10));
//! ```

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::task::AtomicWaker;
use martlet_core::packet::IncomingPacket;
use martlet_core::transport::{
    Accept, ContextData, Delivery, Dial, Inbound, Listen, Open, Outbound, Response, Session, SessionPlan,
    SessionReader, SessionWriter, WriteError,
};
use martlet_core::{Pattern, SessionError, TransportInfo};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Sleep;

/// What goes wrong. Counts begin anew with each session.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct FaultPlan {
    /// Dials are refused, accepted peers are not opened.
    pub refuse: bool,
    /// A dial, or opening a peer, takes this much longer.
    pub open_delay: Duration,
    /// Dialling, or opening a peer, panics.
    pub panic_in_open: bool,
    /// The line is cut after so many arrivals.
    pub cut_after_read: Option<u64>,
    /// The line is cut after so many items written.
    pub cut_after_written: Option<u64>,
    /// The line is cut after so many bytes taken for writing.
    pub cut_after_bytes: Option<u64>,
    /// At each arrival and each item written the line is cut with this probability.
    pub cut_probability: f64,
    /// Each arrival is held for this long, one after the other.
    pub read_delay: Duration,
    /// Every n-th arrival vanishes.
    pub drop_every: Option<u64>,
    /// Every n-th arrival comes twice.
    pub duplicate_every: Option<u64>,
    /// The reader panics after so many arrivals.
    pub panic_after_read: Option<u64>,
    /// The writer panics after so many items.
    pub panic_after_written: Option<u64>,
}

/// The plan of a wrapped transporter, changed at any time. Clones are the same plan.
#[derive(Clone)]
pub struct Faults {
    inner: Arc<Inner>,
}

struct Inner {
    plan: Mutex<FaultPlan>,
    random: Mutex<StdRng>,
    lines: Mutex<Vec<Weak<LineState>>>,
    sessions: AtomicU64,
    cuts: AtomicU64,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("plan", &*self.inner.plan.lock()).finish_non_exhaustive()
    }
}

impl Default for Faults {
    fn default() -> Self {
        Self::new()
    }
}

impl Faults {
    /// Nothing goes wrong, yet.
    pub fn new() -> Self {
        Self::seeded(0)
    }

    /// The same, with a seed for what is random.
    pub fn seeded(seed: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                plan: Mutex::default(),
                random: Mutex::new(StdRng::seed_from_u64(seed)),
                lines: Mutex::default(),
                sessions: AtomicU64::new(0),
                cuts: AtomicU64::new(0),
            }),
        }
    }

    /// Changes the plan.
    pub fn change(&self, change: impl FnOnce(&mut FaultPlan)) {
        change(&mut self.inner.plan.lock());
    }

    /// Cuts every line now.
    pub fn cut(&self) {
        let lines: Vec<_> = self.inner.lines.lock().iter().filter_map(Weak::upgrade).collect();
        lines.iter().for_each(|line| line.cut(&self.inner));
    }

    /// Sessions made so far.
    pub fn sessions(&self) -> u64 {
        self.inner.sessions.load(Ordering::Relaxed)
    }

    /// Lines cut so far.
    pub fn cuts(&self) -> u64 {
        self.inner.cuts.load(Ordering::Relaxed)
    }

    fn plan(&self) -> FaultPlan {
        self.inner.plan.lock().clone()
    }

    async fn open(&self) -> Result<(), SessionError> {
        let plan = self.plan();
        if !plan.open_delay.is_zero() {
            tokio::time::sleep(plan.open_delay).await;
        }
        assert!(!plan.panic_in_open, "deliberate panic while opening a session");
        if self.plan().refuse {
            return Err(SessionError::refused("refused by a fault"));
        }
        Ok(())
    }

    fn wrap<S: Session>(&self, inner: S) -> FaultySession<S> {
        self.inner.sessions.fetch_add(1, Ordering::Relaxed);
        let line = Arc::new(LineState::default());
        let mut lines = self.inner.lines.lock();
        lines.retain(|line| line.strong_count() > 0);
        lines.push(Arc::downgrade(&line));
        FaultySession { inner, line, faults: self.clone() }
    }

    fn dice(&self, probability: f64) -> bool {
        probability > 0.0 && self.inner.random.lock().random_bool(probability.min(1.0))
    }
}

#[derive(Debug, Default)]
struct LineState {
    cut: AtomicBool,
    reader: AtomicWaker,
    read: AtomicU64,
    written: AtomicU64,
    bytes: AtomicU64,
}

impl LineState {
    fn cut(&self, faults: &Inner) {
        if !self.cut.swap(true, Ordering::AcqRel) {
            faults.cuts.fetch_add(1, Ordering::Relaxed);
        }
        self.reader.wake();
    }

    fn check(&self) -> Result<(), SessionError> {
        if self.cut.load(Ordering::Acquire) { Err(SessionError::lost("cut by a fault")) } else { Ok(()) }
    }
}

/// A session with faults.
#[derive(Debug)]
pub struct FaultySession<S> {
    inner: S,
    line: Arc<LineState>,
    faults: Faults,
}

impl<S: Session> Session for FaultySession<S> {
    type ReplyTo = S::ReplyTo;
    type Reader = FaultyReader<S::Reader, S::ReplyTo>;
    type Writer = FaultyWriter<S::Writer>;

    fn peer(&self) -> Arc<str> {
        self.inner.peer()
    }

    fn native(&self) -> Option<ContextData> {
        self.inner.native()
    }

    fn split(self) -> (Self::Reader, Self::Writer) {
        let (reader, writer) = self.inner.split();
        let (line, faults) = (Arc::clone(&self.line), self.faults.clone());
        let reader = FaultyReader { inner: reader, line, faults, held: None, again: None };
        (reader, FaultyWriter { inner: writer, line: self.line, faults: self.faults })
    }
}

/// The half that reads, with faults.
pub struct FaultyReader<S, R> {
    inner: S,
    line: Arc<LineState>,
    faults: Faults,
    held: Option<(Pin<Box<Sleep>>, Arrival<R>)>,
    again: Option<Arrival<R>>,
}

/// What arrived, and its packet if it has one.
type Arrival<R> = (Inbound<R>, IncomingPacket);

impl<S, R> fmt::Debug for FaultyReader<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyReader").field("line", &self.line).finish_non_exhaustive()
    }
}

fn twice<R: Clone>(item: &Inbound<R>) -> Option<Inbound<R>> {
    let again = |delivery: &Delivery<R>| Delivery {
        key: delivery.key.clone(),
        reply_to: delivery.reply_to.clone(),
        context: delivery.context.clone(),
    };
    match item {
        Inbound::Request(delivery) => Some(Inbound::Request(again(delivery))),
        Inbound::Event(delivery) => Some(Inbound::Event(again(delivery))),
        Inbound::Response(packet) => Some(Inbound::Response(packet.clone())),
        Inbound::Unreachable { id } => Some(Inbound::Unreachable { id: *id }),
        Inbound::Cancel { id } => Some(Inbound::Cancel { id: id.clone() }),
        _ => None,
    }
}

impl<S, R> SessionReader<R> for FaultyReader<S, R>
where
    S: SessionReader<R>,
    R: Clone + 'static,
{
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        packet: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<R>, SessionError>>> {
        self.line.reader.register(cx.waker());
        loop {
            if let Err(error) = self.line.check() {
                return Poll::Ready(Some(Err(error)));
            }
            if let Some((pause, _)) = &mut self.held {
                std::task::ready!(pause.as_mut().poll(cx));
                return Poll::Ready(self.held.take().map(|(_, (item, of_it))| {
                    *packet = of_it;
                    Ok(item)
                }));
            }
            if let Some((item, of_it)) = self.again.take() {
                *packet = of_it;
                return Poll::Ready(Some(Ok(item)));
            }
            let item = match std::task::ready!(self.inner.poll_next(cx, packet)) {
                Some(Ok(item)) => item,
                end => return Poll::Ready(end),
            };
            let plan = self.faults.plan();
            let number = self.line.read.fetch_add(1, Ordering::Relaxed) + 1;
            let due = |after: Option<u64>| after.is_some_and(|after| number > after);
            assert!(!due(plan.panic_after_read), "deliberate panic in a session's reader");
            if due(plan.cut_after_read) || self.faults.dice(plan.cut_probability) {
                self.line.cut(&self.faults.inner);
                continue;
            }
            let every = |n: Option<u64>| n.is_some_and(|n| number.is_multiple_of(n.max(1)));
            if every(plan.drop_every) {
                continue;
            }
            if every(plan.duplicate_every) {
                self.again = twice(&item).map(|item| (item, packet.clone()));
            }
            if plan.read_delay.is_zero() {
                return Poll::Ready(Some(Ok(item)));
            }
            let pause = Box::pin(tokio::time::sleep(plan.read_delay));
            self.held = Some((pause, (item, std::mem::take(packet))));
        }
    }

    fn drain(&mut self) {
        self.inner.drain();
    }

    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.line.check().is_err() {
            return Poll::Ready(());
        }
        self.inner.poll_linger(cx)
    }
}

/// The half that writes, with faults.
#[derive(Debug)]
pub struct FaultyWriter<S> {
    inner: S,
    line: Arc<LineState>,
    faults: Faults,
}

impl<S> FaultyWriter<S> {
    fn wrote<R>(&mut self, write: impl FnOnce(&mut S) -> Result<(), WriteError>) -> Result<(), WriteError>
    where
        S: SessionWriter<R>,
    {
        self.line.check()?;
        let plan = self.faults.plan();
        let number = self.line.written.fetch_add(1, Ordering::Relaxed) + 1;
        let due = |after: Option<u64>| after.is_some_and(|after| number > after);
        assert!(!due(plan.panic_after_written), "deliberate panic in a session's writer");
        let before = self.inner.pending_bytes();
        let result = write(&mut self.inner);
        let added = self.inner.pending_bytes().saturating_sub(before) as u64;
        let bytes = self.line.bytes.fetch_add(added, Ordering::Relaxed) + added;
        if due(plan.cut_after_written)
            || plan.cut_after_bytes.is_some_and(|after| bytes > after)
            || self.faults.dice(plan.cut_probability)
        {
            self.line.cut(&self.faults.inner);
            self.line.check()?;
        }
        result
    }
}

impl<S: SessionWriter<R>, R> SessionWriter<R> for FaultyWriter<S> {
    fn write(&mut self, item: Outbound<R>) -> Result<(), WriteError> {
        self.wrote(|inner| inner.write(item))
    }

    fn write_response(&mut self, response: &mut Response<R>) -> Result<(), WriteError> {
        self.wrote(|inner| inner.write_response(response))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        self.line.check()?;
        self.inner.poll_flush(cx)
    }

    fn pending_bytes(&self) -> usize {
        self.inner.pending_bytes()
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        self.line.check()?;
        self.inner.poll_close(cx)
    }
}

/// A [`Dial`] with faults.
#[derive(Debug, Clone)]
pub struct FaultyDial<D> {
    inner: D,
    faults: Faults,
}

impl<D> FaultyDial<D> {
    /// Wraps `inner`; its sessions follow `faults`.
    pub fn new(inner: D, faults: &Faults) -> Self {
        Self { inner, faults: faults.clone() }
    }
}

impl<D: Dial> Dial for FaultyDial<D> {
    type Session = FaultySession<D::Session>;

    fn info(&self) -> TransportInfo {
        self.inner.info()
    }

    async fn dial(&self, plan: SessionPlan) -> Result<Self::Session, SessionError> {
        self.faults.open().await?;
        Ok(self.faults.wrap(self.inner.dial(plan).await?))
    }

    fn check_pattern(&self, pattern: &Pattern) -> Result<(), String> {
        self.inner.check_pattern(pattern)
    }
}

/// A [`Listen`] with faults.
#[derive(Debug, Clone)]
pub struct FaultyListen<L> {
    inner: L,
    faults: Faults,
}

impl<L> FaultyListen<L> {
    /// Wraps `inner`; the sessions of its peers follow `faults`.
    pub fn new(inner: L, faults: &Faults) -> Self {
        Self { inner, faults: faults.clone() }
    }
}

impl<L: Listen> Listen for FaultyListen<L> {
    type Bound = FaultyBound<L::Bound>;

    fn info(&self) -> TransportInfo {
        self.inner.info()
    }

    async fn bind(&self) -> Result<Self::Bound, SessionError> {
        Ok(FaultyBound { inner: self.inner.bind().await?, faults: self.faults.clone() })
    }
}

/// A bound listener with faults.
#[derive(Debug)]
pub struct FaultyBound<A> {
    inner: A,
    faults: Faults,
}

impl<A: Accept> Accept for FaultyBound<A> {
    type Peer = FaultyPeer<A::Peer>;

    fn local_url(&self) -> String {
        self.inner.local_url()
    }

    fn native(&self) -> Option<ContextData> {
        self.inner.native()
    }

    async fn accept(&mut self) -> Result<Self::Peer, SessionError> {
        Ok(FaultyPeer { inner: self.inner.accept().await?, faults: self.faults.clone() })
    }
}

/// An accepted peer with faults.
#[derive(Debug)]
pub struct FaultyPeer<P> {
    inner: P,
    faults: Faults,
}

impl<P: Open> Open for FaultyPeer<P> {
    type Session = FaultySession<P::Session>;

    async fn open(self) -> Result<Self::Session, SessionError> {
        self.faults.open().await?;
        Ok(self.faults.wrap(self.inner.open().await?))
    }
}
