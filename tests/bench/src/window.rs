// SPDX-License-Identifier: MIT OR Apache-2.0
//! The measured part of a load run, shared by every generator here.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::report::{Histogram, Report};
use crate::{Result, process};

/// How long replies may be owed after the last request was sent.
const DRAIN: Duration = Duration::from_secs(10);

/// When a run ends.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// After this time.
    Time(Duration),
    /// After this many replies.
    Count(u64),
}

/// The measured part of a run: what lies before and after it is answered and checked, not counted.
#[derive(Debug)]
pub struct Window {
    server_pid: Option<u32>,
    length: Length,
    phase: Cell<Phase>,
    done: Cell<u64>,
    latency: RefCell<Histogram>,
    closed: Notify,
    opened_at: Cell<Option<Sample>>,
    closed_at: Cell<Option<Sample>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Before,
    Open,
    After,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    own: Duration,
    server: Option<Duration>,
}

impl Window {
    /// A window that has not opened yet.
    pub fn new(server_pid: Option<u32>, length: Length) -> Self {
        Self {
            server_pid,
            length,
            phase: Cell::new(Phase::Before),
            done: Cell::new(0),
            latency: RefCell::default(),
            closed: Notify::new(),
            opened_at: Cell::new(None),
            closed_at: Cell::new(None),
        }
    }

    fn sample(&self) -> Result<Sample> {
        Ok(Sample {
            server: self.server_pid.map(process::cpu_time).transpose()?,
            own: process::cpu_time(std::process::id())?,
            at: Instant::now(),
        })
    }

    fn open(&self) -> Result<()> {
        self.opened_at.set(Some(self.sample()?));
        self.phase.set(Phase::Open);
        Ok(())
    }

    /// Stops counting; connections finish what they have in flight.
    fn close(&self) -> Result<()> {
        if self.phase.replace(Phase::After) != Phase::After {
            self.closed_at.set(Some(self.sample()?));
            self.closed.notify_one();
        }
        Ok(())
    }

    /// Runs a load, which ends by itself once [`is_sending`](Self::is_sending) says no and it has
    /// every reply, and reports what was measured; the caller fills in what it was measured on.
    pub async fn measure(&self, warmup: Duration, load: impl Future<Output = Result<()>>) -> Result<Report> {
        tokio::select! {
            missing = self.drive(warmup) => missing?,
            ended = load => ended?,
        }
        self.report()
    }

    /// [`measure`](Self::measure)s a load that is these tasks.
    pub async fn measure_tasks(&self, warmup: Duration, mut tasks: JoinSet<Result<()>>) -> Result<Report> {
        let load = async {
            while let Some(ended) = tasks.join_next().await {
                ended??;
            }
            Ok(())
        };
        self.measure(warmup, load).await
    }

    async fn drive(&self, warmup: Duration) -> Result<()> {
        tokio::time::sleep(warmup).await;
        self.open()?;
        match self.length {
            Length::Time(time) => {
                tokio::time::sleep(time).await;
                self.close()?;
            }
            Length::Count(_) => self.closed.notified().await,
        }
        tokio::time::sleep(DRAIN).await;
        Err("replies are missing".into())
    }

    /// Whether requests are still to be sent.
    pub fn is_sending(&self) -> bool {
        self.phase.get() != Phase::After
    }

    /// Counts one correct reply, and closes the window when that was the last one asked for.
    pub fn count(&self, latency: Duration) -> Result<()> {
        self.count_many(1, latency)
    }

    /// Counts one correct reply that stands for `many` messages.
    pub fn count_many(&self, many: u64, latency: Duration) -> Result<()> {
        if self.phase.get() != Phase::Open {
            return Ok(());
        }
        self.latency.borrow_mut().record(latency);
        self.done.set(self.done.get() + many);
        match self.length {
            Length::Count(count) if self.done.get() >= count => self.close(),
            _ => Ok(()),
        }
    }

    fn report(&self) -> Result<Report> {
        let (Some(open), Some(close)) = (self.opened_at.get(), self.closed_at.get()) else {
            return Err("the connections ended before the measurement did".into());
        };
        Ok(Report {
            requests: self.done.get(),
            elapsed: close.at - open.at,
            client_cpu: Some(close.own.saturating_sub(open.own)),
            server_cpu: close.server.zip(open.server).map(|(close, open)| close.saturating_sub(open)),
            latency: self.latency.borrow().summary(),
            ..Report::default()
        })
    }
}
