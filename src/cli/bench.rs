// SPDX-License-Identifier: MIT OR Apache-2.0
//! `martlet bench`: keeps requests in flight through Martlet's own client and checks every reply.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use martlet::arbiters::Arbiters;
use martlet::{CallError, ClientProxy, Format, Pattern, Payload, Transport};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::watch;

use super::output::Output;
use super::report::{Histogram, Report};
use super::{Failure, REMOTE, input, plain_client};

const EXAMPLES: &str = "\
Examples:
  martlet bench tcp://localhost:3000                          {\"cmd\":\"sum\"}, 10 connections × 32 in flight
  martlet bench tcp://localhost:3000 --connections 1 --depth 1 --duration 10s
  martlet bench nats://localhost:4222 --pattern echo --data '{\"a\":1}' --expect '{\"a\":1}' --json

Without --pattern, {\"cmd\":\"sum\"} is called with [n,2,3,4,5], and each reply must be the sum. With --pattern
and without --expect, a reply is right whatever it is.

Exit codes: 0 every call replied as expected, 1 calls failed or replies were wrong, 2 usage, 3 no handler,
4 no reply to a first call, 5 no connection.";

/// Measure throughput and latency; every reply is checked.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct BenchArgs {
    /// The service: tcp://HOST:PORT, nats://HOST, redis://HOST, amqp://HOST?queue=NAME, mqtt://HOST ….
    url: String,
    /// Connections to open.
    #[arg(long, short = 'c', default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// Requests to keep in flight on each connection.
    #[arg(long, short = 'd', default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    depth: u32,
    /// How long to measure.
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = input::duration)]
    duration: Duration,
    /// How long to load before measuring.
    #[arg(long, default_value = "500ms", value_name = "TIME", value_parser = input::duration)]
    warmup: Duration,
    /// How long to wait for each reply.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = input::duration)]
    timeout: Duration,
    /// Threads to load with. Default: one per core, at most one per connection.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// What to call. Default: {"cmd":"sum"}.
    #[arg(long)]
    pattern: Option<String>,
    /// The data to send: JSON, `-` for stdin, `@FILE` for a file. Default: null; [n,2,3,4,5] for sums.
    #[arg(long)]
    data: Option<String>,
    /// The right reply: JSON, or `@FILE`.
    #[arg(long, value_name = "JSON")]
    expect: Option<String>,
    /// Print the report as one line of JSON.
    #[arg(long)]
    json: bool,
}

/// The plan of a run, the same for all connections.
struct Plan {
    transport: Transport,
    pattern: Pattern,
    timeout: Duration,
    depth: u32,
    work: Work,
}

enum Work {
    /// `[n,2,3,4,5]`, different in each slot.
    Sums,
    Fixed {
        data: Payload,
        expected: Option<Expected>,
    },
}

/// What a reply must be.
#[derive(Clone)]
struct Expected {
    text: String,
    value: Value,
}

impl Expected {
    fn of(payload: &Payload) -> Result<Self, Failure> {
        let value = payload.to_value().map_err(|error| Failure::usage(error.to_string()))?;
        Ok(Self { text: String::from_utf8_lossy(payload.bytes()).into_owned(), value })
    }

    fn is(&self, reply: &RawValue) -> bool {
        reply.get() == self.text
            || serde_json::from_str::<Value>(reply.get()).is_ok_and(|reply| same(&reply, &self.value))
    }
}

/// Whether two values are the same to JavaScript, which tells 6 and 6.0 not apart.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one == other || one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| same(one, other)))
        }
        (one, other) => one == other,
    }
}

impl Plan {
    fn of(args: &BenchArgs) -> Result<Self, Failure> {
        let transport = Transport::from_url(&args.url)?.for_clients();
        let sum = Pattern::parse(r#"{"cmd":"sum"}"#);
        let pattern = args.pattern.as_deref().map(input::pattern).transpose()?.unwrap_or_else(|| sum.clone());
        let expected = args.expect.as_deref().map(|text| input::data(Some(text), false)).transpose()?;
        let expected = expected.as_ref().map(Expected::of).transpose()?;
        let work = match (&args.data, expected) {
            (None, None) if pattern == sum => Work::Sums,
            (data, expected) => {
                let data = input::data(data.as_deref(), false)?;
                let expected = match expected {
                    None if pattern == sum => sum_of(&data)?,
                    expected => expected,
                };
                Work::Fixed { data, expected }
            }
        };
        let timeout = if args.timeout.is_zero() { Duration::from_secs(3600) } else { args.timeout };
        Ok(Self { transport, pattern, timeout, depth: args.depth, work })
    }

    fn slot(&self, number: u32) -> (Payload, Option<Expected>) {
        match &self.work {
            Work::Sums => {
                let first = u64::from(number % 90 + 10);
                let data = Payload::new(Format::Json, format!("[{first},2,3,4,5]").into_bytes());
                let sum = first + 14;
                (data, Some(Expected { text: sum.to_string(), value: Value::from(sum) }))
            }
            Work::Fixed { data, expected } => (data.clone(), expected.clone()),
        }
    }
}

/// The sum of a list of whole numbers, if that is what it is.
fn sum_of(data: &Payload) -> Result<Option<Expected>, Failure> {
    let Ok(numbers) = data.decode::<Vec<i64>>() else { return Ok(None) };
    let sum = numbers.iter().try_fold(0_i64, |sum, number| sum.checked_add(*number));
    sum.map(|sum| Payload::encode(Format::Json, &sum).map_err(|error| Failure::usage(error.to_string())))
        .transpose()?
        .as_ref()
        .map(Expected::of)
        .transpose()
}

/// When to count.
#[derive(Clone, Copy)]
struct Window {
    opens: Instant,
    closes: Instant,
}

#[derive(Default)]
struct Tally {
    latency: Histogram,
    failures: BTreeMap<String, u64>,
    /// The first wrong reply, to be shown.
    wrong: Option<String>,
}

impl Tally {
    fn merge(&mut self, other: Self) {
        self.latency.merge(&other.latency);
        for (outcome, count) in other.failures {
            *self.failures.entry(outcome).or_default() += count;
        }
        self.wrong = self.wrong.take().or(other.wrong);
    }

    /// Counts one outcome; the latency is there if it falls into the window. A failure is a failure
    /// whenever it happens.
    fn take(
        &mut self,
        reply: Result<Box<RawValue>, CallError>,
        expected: Option<&Expected>,
        latency: Option<Duration>,
    ) {
        match reply {
            Ok(reply) if expected.is_none_or(|expected| expected.is(&reply)) => {
                if let Some(latency) = latency {
                    self.latency.record(latency);
                }
            }
            Ok(reply) => {
                self.fail("wrong_reply");
                self.wrong.get_or_insert_with(|| reply.get().chars().take(200).collect());
            }
            Err(error) => self.fail(error.kind()),
        }
    }

    fn fail(&mut self, outcome: &str) {
        match self.failures.get_mut(outcome) {
            Some(count) => *count += 1,
            None => {
                self.failures.insert(outcome.to_owned(), 1);
            }
        }
    }
}

pub(super) async fn bench(args: BenchArgs, out: &mut Output) -> Result<(), Failure> {
    let plan = Arc::new(Plan::of(&args)?);
    probe(&plan).await?;

    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = args.threads.map_or(cores, |threads| threads as usize).min(args.connections as usize);
    let arbiters = Arbiters::pool(threads)?;
    let start = watch::Sender::new(None::<Window>);
    let (ready, mut connected) = tokio::sync::mpsc::channel(args.connections as usize);
    let running: Vec<_> = (0..args.connections)
        .map(|number| {
            let (plan, start, ready) = (Arc::clone(&plan), start.subscribe(), ready.clone());
            arbiters.run_on(number as usize % threads, move || connection(plan, number, start, ready))
        })
        .collect();
    drop(ready);
    for _ in 0..args.connections {
        if let Some(Err(failure)) = connected.recv().await {
            return Err(failure);
        }
    }
    let opens = Instant::now() + args.warmup;
    start.send_replace(Some(Window { opens, closes: opens + args.duration }));
    let mut tally = Tally::default();
    for running in running {
        match running.await {
            Ok(part) => tally.merge(part),
            Err(_) => tally.fail("load thread ended"),
        }
    }
    arbiters.stop().await;

    let report = Report {
        target: plan.transport.to_string(),
        connections: args.connections as usize,
        depth: args.depth as usize,
        requests: tally.latency.count(),
        failures: tally.failures.into_iter().collect(),
        elapsed: args.duration,
        latency: tally.latency.summary(),
        ..Report::default()
    };
    out.line(&if args.json { report.to_json() } else { report.to_string() });
    let failed: u64 = report.failures.iter().map(|(_, count)| count).sum();
    match (failed, tally.wrong) {
        (0, _) if report.requests > 0 => Ok(()),
        (0, _) => Err(Failure::new(super::TIMEOUT, "no reply came in the measured time")),
        (_, Some(wrong)) => {
            Err(Failure::new(REMOTE, format!("{failed} calls failed; a wrong reply: {wrong}")))
        }
        (_, None) => Err(Failure::new(REMOTE, format!("{failed} calls failed"))),
    }
}

/// Makes one call, so that a mistake shows as what it is.
async fn probe(plan: &Plan) -> Result<(), Failure> {
    let client = plain_client(&plan.transport)?;
    let (data, expected) = plan.slot(0);
    let reply = client.send::<Box<RawValue>>(&plan.pattern, data).timeout(plan.timeout).await;
    client.close().await;
    let reply = reply.map_err(|error| Failure::of_call(&error, &plan.transport, plan.pattern.text()))?;
    match expected {
        Some(expected) if !expected.is(&reply) => Err(Failure::new(
            REMOTE,
            format!("the service replies {} where {} is right", reply.get(), expected.text),
        )),
        _ => Ok(()),
    }
}

/// Opens one connection, waits for the start, loads it until the window closes.
async fn connection(
    plan: Arc<Plan>,
    number: u32,
    mut start: watch::Receiver<Option<Window>>,
    ready: tokio::sync::mpsc::Sender<Result<(), Failure>>,
) -> Tally {
    let connected = async {
        let client = plain_client(&plan.transport)?;
        client.connect().await.map_err(|error| Failure::of_call(&error, &plan.transport, ""))?;
        Ok(client)
    };
    let client = match connected.await {
        Ok(client) => client,
        Err(failure) => {
            // The run may have ended for another reason.
            let _ = ready.send(Err(failure)).await;
            return Tally::default();
        }
    };
    let started = ready.send(Ok(())).await.is_ok();
    drop(ready);
    let window = match start.wait_for(Option::is_some).await {
        Ok(window) if started => *window,
        _ => None,
    };
    let Some(window) = window else { return Tally::default() };
    let tally = Rc::new(RefCell::new(Tally::default()));
    let slots: Vec<_> = (0..plan.depth)
        .map(|slot| {
            let number = number.wrapping_mul(plan.depth).wrapping_add(slot);
            actix_rt::spawn(load(client.clone(), Arc::clone(&plan), number, window, Rc::clone(&tally)))
        })
        .collect();
    for slot in slots {
        if slot.await.is_err() {
            tally.borrow_mut().fail("load task ended");
        }
    }
    client.close().await;
    tally.take()
}

/// One request in flight, over and over.
async fn load(client: ClientProxy, plan: Arc<Plan>, number: u32, window: Window, tally: Rc<RefCell<Tally>>) {
    let (data, expected) = plan.slot(number);
    let mut sent = Instant::now();
    while sent < window.closes {
        let call = client.send::<Box<RawValue>>(&plan.pattern, data.clone()).timeout(plan.timeout);
        let reply = call.await;
        let now = Instant::now();
        let counts = now >= window.opens && now < window.closes;
        let failed = reply.is_err();
        tally.borrow_mut().take(reply, expected.as_ref(), counts.then(|| now - sent));
        if failed {
            // What fails at once must not spin.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        sent = Instant::now();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_compared_as_a_value() {
        let expected = Expected::of(&input::json(r#"{"a":[6,"x"],"b":null}"#).unwrap()).unwrap();
        let check = |text: &str| expected.is(&RawValue::from_string(text.to_owned()).unwrap());
        assert!(check(r#"{"b": null, "a": [6.0, "x"]}"#));
        for wrong in [r#"{"a":[6,"x"]}"#, r#"{"a":[7,"x"],"b":null}"#, r#"{"a":[6,"x"],"b":null,"c":1}"#, "6"]
        {
            assert!(!check(wrong), "{wrong}");
        }
    }

    #[test]
    fn sums_are_known_without_being_told() {
        let check = |text: &str| sum_of(&input::json(text).unwrap()).unwrap().map(|sum| sum.text);
        assert_eq!(check("[1,2,3]").as_deref(), Some("6"));
        assert_eq!(check("{}"), None);
        assert_eq!(check("[9223372036854775807,1]"), None);
    }
}
