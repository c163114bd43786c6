// SPDX-License-Identifier: MIT OR Apache-2.0
//! A storm: many calls of every kind, pipelined over several clients, while the test breaks what is between
//! them and the service.
//!
//! Each call has a number, the handlers note how often they ran for it, and each outcome is held against that:
//! what ended as a value ran, what ended as certainly not run did not, and what was not declared idempotent ran
//! once at most.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use futures::stream::{self, FuturesUnordered};
use martlet_core::{
    CallError, ClientProxy, Data, HandlerGroup, Microservice, Pattern, RpcError, RunningService, Server,
    Streaming, event, message,
};
use parking_lot::Mutex;

use crate::world::{GRACE, until};

/// The outcomes of a storm by kind: `value`, `sent` (an event), or that of the error.
pub type Outcomes = BTreeMap<&'static str, u64>;

/// A storm of so many calls. Clones are the same storm.
#[derive(Clone)]
pub struct Storm {
    inner: Arc<Inner>,
}

struct Inner {
    calls: u64,
    events: bool,
    next: AtomicU64,
    ended: AtomicU64,
    values: AtomicU64,
    /// For each call, how often its handler ran.
    ran: Vec<AtomicU8>,
    /// For each call, what its outcome says of that.
    said: Vec<AtomicU8>,
    outcomes: Mutex<Outcomes>,
}

impl std::fmt::Debug for Storm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Storm")
            .field("calls", &self.calls)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

/// How long a caller waits after a call that failed, and after many of them.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(320);

const VALUES_BETWEEN_DISTURBANCES: u64 = 300;

/// Between two disturbances of a storm: [`Storm::calm`].
#[derive(Debug)]
pub struct Calm {
    inner: Arc<Inner>,
    values: u64,
    from: Instant,
    to: Instant,
}

impl Calm {
    /// Whether it is time for the next one.
    pub fn is_over(&self) -> bool {
        let now = Instant::now();
        let over = self.inner.ended.load(Ordering::Relaxed) == self.inner.calls;
        now >= self.from
            && (over || now >= self.to || self.inner.values.load(Ordering::Relaxed) >= self.values)
    }

    /// Holds up its thread until it is over.
    pub fn wait(self) {
        while !self.is_over() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

const RAN: u8 = 1;
const NOT_RUN: u8 = 2;
const UNKNOWN: u8 = 3;

impl Inner {
    /// Every tenth call takes a stream, three of ten are idempotent, the others are plain; where there are events,
    /// one of ten is one.
    fn kind(&self, number: u64) -> &'static str {
        match number % 10 {
            0 => "stream",
            1..=3 => "again",
            4 if self.events => "event",
            _ => "echo",
        }
    }
}

/// A few items, none for some.
fn items(number: u64) -> std::ops::Range<u64> {
    number..number + number / 10 % 4
}

impl Storm {
    /// A storm that is yet to begin, without events.
    pub fn new(calls: u64) -> Self {
        Self::of(calls, false)
    }

    /// A storm in which every tenth call is an event: it runs once at most, and not at all if its sender was told
    /// that it was not sent.
    pub fn with_events(calls: u64) -> Self {
        Self::of(calls, true)
    }

    fn of(calls: u64, events: bool) -> Self {
        let marks = || (0..calls).map(|_| AtomicU8::new(0)).collect();
        Self {
            inner: Arc::new(Inner {
                calls,
                events,
                next: AtomicU64::new(0),
                ended: AtomicU64::new(0),
                values: AtomicU64::new(0),
                ran: marks(),
                said: marks(),
                outcomes: Mutex::default(),
            }),
        }
    }

    /// The handlers it calls.
    pub fn handlers(&self) -> Vec<HandlerGroup> {
        let note = |storm: &Storm, number: u64| {
            // The last call on each route is none of the storm.
            if let Some(ran) = storm.inner.ran.get(number as usize) {
                ran.fetch_add(1, Ordering::Relaxed);
            }
        };
        let echo = |name: &str| {
            let storm = self.clone();
            message(Pattern::from(format!("storm.{name}")), move |Data(number): Data<u64>| {
                note(&storm, number);
                async move {
                    if number % 4 == 0 {
                        tokio::time::sleep(Duration::from_millis(number % 16)).await;
                    }
                    Ok::<_, RpcError>(number)
                }
            })
        };
        let storm = self.clone();
        let streams = message("storm.stream", move |Data(number): Data<u64>| {
            note(&storm, number);
            async move {
                let replies = stream::iter(items(number)).then(|item| async move {
                    tokio::task::yield_now().await;
                    item
                });
                Ok::<_, RpcError>(Streaming(replies))
            }
        });
        let mut groups = vec![echo("echo"), echo("again"), streams];
        if self.inner.events {
            let storm = self.clone();
            groups.push(event("storm.event", move |Data(number): Data<u64>| note(&storm, number)));
        }
        groups
    }

    /// How many events have run.
    pub fn events_run(&self) -> u64 {
        let numbered = self.inner.ran.iter().enumerate();
        let events = numbered.filter(|(number, _)| self.inner.kind(*number as u64) == "event");
        events.map(|(_, ran)| u64::from(ran.load(Ordering::Relaxed))).sum()
    }

    /// How many calls have ended.
    pub fn ended(&self) -> u64 {
        self.inner.ended.load(Ordering::Relaxed)
    }

    /// Whether all have.
    pub fn is_over(&self) -> bool {
        self.ended() == self.inner.calls
    }

    /// The time until the next disturbance: it lasts so long at least, and until a few hundred calls have got their value
    /// meanwhile (but no longer than 2 s). So a storm has about as many disturbances on a slow machine as on a fast one.
    pub fn calm(&self, at_least: Duration) -> Calm {
        let values = self.inner.values.load(Ordering::Relaxed) + VALUES_BETWEEN_DISTURBANCES;
        let now = Instant::now();
        Calm {
            inner: Arc::clone(&self.inner),
            values,
            from: now + at_least,
            to: now + Duration::from_secs(2),
        }
    }

    /// Waits until this many calls have ended, or all.
    pub async fn reaches(&self, ended: u64) {
        while self.ended() < ended.min(self.inner.calls) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Makes the calls, with `depth` of them in flight on each client.
    ///
    /// # Panics
    ///
    /// When a reply is wrong, or an outcome has no place in a storm (an error of the handler, a bound).
    pub async fn run(&self, clients: &[ClientProxy], depth: usize) -> Outcomes {
        let workers: FuturesUnordered<_> =
            clients.iter().flat_map(|client| (0..depth).map(move |_| self.work(client))).collect();
        workers.collect::<()>().await;
        let outcomes = self.inner.outcomes.lock().clone();
        assert_eq!(outcomes.values().sum::<u64>(), self.inner.calls, "{outcomes:?}");
        outcomes
    }

    async fn work(&self, client: &ClientProxy) {
        let mut pause = FIRST_PAUSE;
        loop {
            let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.inner.calls {
                return;
            }
            let of = self.inner.kind(number);
            let result = call(client, of, number).await;
            let (kind, said) = match &result {
                // Nobody says what became of it.
                Ok(()) if of == "event" => ("sent", UNKNOWN),
                Ok(()) => ("value", RAN),
                Err(error) if error.is_not_sent() => (error.kind(), NOT_RUN),
                Err(error @ (CallError::Lost { .. } | CallError::Timeout { .. })) => (error.kind(), UNKNOWN),
                Err(other) => panic!("call {number} ended as {other:?}"),
            };
            let before = self.inner.said[number as usize].swap(said, Ordering::Relaxed);
            assert_eq!(before, 0, "call {number} has ended before");
            *self.inner.outcomes.lock().entry(kind).or_insert(0) += 1;
            self.inner.ended.fetch_add(1, Ordering::Relaxed);
            if said == RAN {
                self.inner.values.fetch_add(1, Ordering::Relaxed);
            }
            if result.is_ok() {
                pause = FIRST_PAUSE;
            } else {
                // Calls that fail at once do not use up the storm while nothing is there.
                tokio::time::sleep(pause).await;
                pause = LAST_PAUSE.min(pause * 2);
            }
        }
    }

    /// Holds the outcomes against what the handlers did, once the service has stopped.
    ///
    /// # Panics
    ///
    /// When they do not agree.
    pub fn check_runs(&self) {
        for (number, (ran, said)) in self.inner.ran.iter().zip(&self.inner.said).enumerate() {
            let (ran, said) = (ran.load(Ordering::Relaxed), said.load(Ordering::Relaxed));
            let kind = self.inner.kind(number as u64);
            assert!(said != RAN || ran >= 1, "{kind} {number} has a value and never ran");
            // A call that is sent again may have run before.
            assert!(
                kind == "again" || said != NOT_RUN || ran == 0,
                "{kind} {number} ended as not run and ran"
            );
            assert!(kind == "again" || ran <= 1, "{kind} {number} ran {ran} times");
        }
    }
}

async fn call(client: &ClientProxy, kind: &str, number: u64) -> Result<(), CallError> {
    if kind == "event" {
        return client.emit("storm.event", number).await;
    }
    let call = client.send::<u64>(Pattern::from(format!("storm.{kind}")), number);
    match kind {
        "stream" => {
            let mut replies = call.stream();
            let mut expected = items(number);
            while let Some(reply) = replies.next().await {
                match reply {
                    Ok(item) => assert_eq!(Some(item), expected.next(), "call {number}"),
                    Err(error) => {
                        assert!(replies.next().await.is_none(), "call {number} has a second end");
                        return Err(error);
                    }
                }
            }
            assert_eq!(expected.next(), None, "call {number} ended early and well");
        }
        "again" => assert_eq!(call.idempotent().await?, number),
        _ => assert_eq!(call.await?, number),
    }
    Ok(())
}

/// No number of a storm; its stream has items.
const LAST: u64 = 4_000_000_010;

/// Calls each route of the storm once more, in vain for at most 10 s: the registrations are back.
///
/// # Panics
///
/// When a route is not answered.
pub async fn every_route_answers(client: &ClientProxy) {
    for kind in ["stream", "again", "echo"] {
        let mut last = None;
        for _ in 0..500 {
            let call = client.send::<u64>(Pattern::from(format!("storm.{kind}")), LAST);
            let result = call.timeout(Duration::from_secs(5)).stream().collect_all().await;
            match result {
                Ok(_) => {
                    last = None;
                    break;
                }
                Err(error) => last = Some(error),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(last.is_none(), "storm.{kind} is not answered: {last:?}");
    }
}

/// A service is stopped, five times anew, while 128 callers call it without a pause over four clients: what it handled
/// reaches its callers, and what reached them it handled. `gone` says which outcome tells a caller that there is no
/// service any more.
///
/// # Panics
///
/// When a reply is lost, a call ends otherwise, or a client has something left.
pub async fn stop_under_load(
    server: impl Fn() -> Server,
    client: impl Fn(&RunningService) -> ClientProxy,
    gone: impl Fn(&CallError) -> bool,
) {
    for round in 0..5u64 {
        let handled = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&handled);
        let work = message("work", move |Data(number): Data<u64>| {
            let count = Arc::clone(&count);
            async move {
                if number % 8 == 0 {
                    tokio::time::sleep(Duration::from_millis(number % 40)).await;
                }
                count.fetch_add(1, Ordering::Relaxed);
                Ok::<_, RpcError>(number)
            }
        });
        let service = Microservice::new().arbiters(2).handlers(work).server(server()).start().await.unwrap();
        let clients: Vec<_> = (0..4).map(|_| client(&service)).collect();
        join_all(clients.iter().map(ClientProxy::connect)).await.into_iter().for_each(Result::unwrap);
        let callers = join_all((0..128).map(|caller: u64| {
            let (client, gone) = (clients[caller as usize % clients.len()].clone(), &gone);
            async move {
                let mut served = 0u64;
                for number in 0.. {
                    let sent = number * 128 + caller;
                    match client.send::<u64>("work", sent).await {
                        Ok(back) => assert_eq!(back, sent),
                        Err(error) if gone(&error) => return served,
                        Err(error) => panic!("{error}"),
                    }
                    served += 1;
                }
                served
            }
        }));
        let stopping = async {
            tokio::time::sleep(Duration::from_millis(100 + 13 * round)).await;
            until("it is under load", || handled.load(Ordering::Relaxed) > 200).await;
            service.stop(GRACE).await
        };
        let (served, report) = futures::join!(callers, stopping);
        let served: u64 = served.into_iter().sum();
        assert!(report.clean, "{report:?}");
        assert!(served > 100, "{served}");
        assert_eq!((served, report.done()), (handled.load(Ordering::Relaxed), served));
        for client in clients {
            assert_eq!((client.pending(), client.occupied()), (0, 0));
            client.close().await;
        }
    }
}
