// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a load run measured: a latency histogram and the report printed at its end.
//!
//! Shared by `martlet bench` and the load generators in `tests/bench`, which include this file; it uses the
//! standard library only.

use std::fmt;
use std::time::Duration;

/// Bits of a value kept below its leading bit: 64 buckets per power of two, 1.6 % wide at most.
const PRECISION: u32 = 6;
const SUB_BUCKETS: u64 = 1 << PRECISION;
/// Values are clamped here, 2^40 ns being 18 minutes.
const MAX_VALUE: u64 = (1 << 40) - 1;
const BUCKETS: usize = ((40 - PRECISION as usize) + 1) * SUB_BUCKETS as usize;

/// A histogram of durations with logarithmic buckets: constant size, 1.6 % relative error.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u128,
    min: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], count: 0, sum: 0, min: u64::MAX, max: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).min(MAX_VALUE);
        self.counts[index_of(nanos)] += 1;
        self.count += 1;
        self.sum += u128::from(nanos);
        self.min = self.min.min(nanos);
        self.max = self.max.max(nanos);
    }

    /// Adds everything another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// How many durations were recorded.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The smallest duration no shorter than `percent` of the recorded ones, within the bucket width.
    ///
    /// Zero when nothing was recorded.
    pub fn percentile(&self, percent: f64) -> Duration {
        if self.count == 0 {
            return Duration::ZERO;
        }
        let rank = ((percent / 100.0 * self.count as f64).ceil() as u64).clamp(1, self.count);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper_bound(index).clamp(self.min, self.max));
            }
        }
        Duration::from_nanos(self.max)
    }

    /// The percentiles a report shows.
    pub fn summary(&self) -> Latency {
        let mean = if self.count == 0 { 0 } else { (self.sum / u128::from(self.count)) as u64 };
        Latency {
            min: Duration::from_nanos(if self.count == 0 { 0 } else { self.min }),
            mean: Duration::from_nanos(mean),
            p50: self.percentile(50.0),
            p90: self.percentile(90.0),
            p99: self.percentile(99.0),
            p999: self.percentile(99.9),
            max: Duration::from_nanos(self.max),
        }
    }
}

fn index_of(nanos: u64) -> usize {
    if nanos < SUB_BUCKETS {
        return nanos as usize;
    }
    let shift = nanos.ilog2() - PRECISION;
    let sub = (nanos >> shift) - SUB_BUCKETS;
    ((u64::from(shift) + 1) * SUB_BUCKETS + sub) as usize
}

/// The largest value that falls into a bucket.
fn upper_bound(index: usize) -> u64 {
    let index = index as u64;
    if index < SUB_BUCKETS {
        return index;
    }
    let shift = index / SUB_BUCKETS - 1;
    ((index % SUB_BUCKETS + SUB_BUCKETS + 1) << shift) - 1
}

/// Latency percentiles of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// The fastest reply.
    pub min: Duration,
    /// The arithmetic mean.
    pub mean: Duration,
    /// The median.
    pub p50: Duration,
    /// 90 % were at least this fast.
    pub p90: Duration,
    /// 99 % were at least this fast.
    pub p99: Duration,
    /// 99.9 % were at least this fast.
    pub p999: Duration,
    /// The slowest reply.
    pub max: Duration,
}

impl Latency {
    fn named(&self) -> [(&'static str, Duration); 7] {
        [
            ("min", self.min),
            ("mean", self.mean),
            ("p50", self.p50),
            ("p90", self.p90),
            ("p99", self.p99),
            ("p999", self.p999),
            ("max", self.max),
        ]
    }
}

/// What one load run did, printed as a table ([`fmt::Display`]) or as JSON ([`Report::to_json`]).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Where the load went, as the user wrote it.
    pub target: String,
    /// Connections held open.
    pub connections: usize,
    /// Requests kept in flight on each connection.
    pub depth: usize,
    /// Requests answered correctly inside the measured time.
    pub requests: u64,
    /// Requests that ended otherwise, counted by outcome; empty after a clean run.
    pub failures: Vec<(String, u64)>,
    /// The measured time, warm-up excluded.
    pub elapsed: Duration,
    /// CPU time of the load generator itself within the measured time.
    pub client_cpu: Option<Duration>,
    /// CPU time of the serving process within the measured time, where its process id was known.
    pub server_cpu: Option<Duration>,
    /// Time from handing a request to the socket's buffer to having read its reply.
    pub latency: Latency,
}

impl Report {
    /// Requests answered per second of the measured time.
    pub fn rps(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.requests as f64 / seconds } else { 0.0 }
    }

    /// The report as one line of JSON; times are in the unit their name ends in.
    pub fn to_json(&self) -> String {
        let mut out = String::from("{\"target\":");
        quote(&mut out, &self.target);
        out.push_str(&format!(
            ",\"connections\":{},\"depth\":{},\"requests\":{},\"failures\":{{",
            self.connections, self.depth, self.requests
        ));
        for (position, (outcome, count)) in self.failures.iter().enumerate() {
            if position > 0 {
                out.push(',');
            }
            quote(&mut out, outcome);
            out.push_str(&format!(":{count}"));
        }
        out.push_str(&format!(
            "}},\"seconds\":{:.6},\"rps\":{:.1},\"client_cpu_seconds\":{},\"server_cpu_seconds\":{},\"latency_us\":{{",
            self.elapsed.as_secs_f64(),
            self.rps(),
            optional_seconds(self.client_cpu),
            optional_seconds(self.server_cpu),
        ));
        for (position, (name, value)) in self.latency.named().into_iter().enumerate() {
            let comma = if position > 0 { "," } else { "" };
            out.push_str(&format!("{comma}\"{name}\":{:.3}", value.as_secs_f64() * 1e6));
        }
        out.push_str("}}");
        out
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed.as_secs_f64();
        writeln!(f, "{}: {} × {} in flight, {seconds:.2} s", self.target, self.connections, self.depth)?;
        writeln!(f, "  requests    {:>12}   {:.0}/s", self.requests, self.rps())?;
        for (outcome, count) in &self.failures {
            writeln!(f, "  {outcome:<11} {count:>12}")?;
        }
        for (name, cpu) in [("client cpu", self.client_cpu), ("server cpu", self.server_cpu)] {
            if let Some(cpu) = cpu {
                let each = cpu.as_secs_f64() * 1e9 / self.requests.max(1) as f64;
                writeln!(f, "  {name}  {:>10.2} s   {each:.0} ns per request", cpu.as_secs_f64())?;
            }
        }
        write!(f, "  latency µs ")?;
        for (name, value) in self.latency.named() {
            write!(f, "  {name} {:.1}", value.as_secs_f64() * 1e6)?;
        }
        Ok(())
    }
}

fn optional_seconds(value: Option<Duration>) -> String {
    value.map_or_else(|| "null".to_owned(), |value| format!("{:.6}", value.as_secs_f64()))
}

/// Appends a JSON string.
fn quote(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            control if u32::from(control) < 0x20 => {
                out.push_str(&format!("\\u{:04x}", u32::from(control)));
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_a_bucket_no_wider_than_its_precision() {
        let mut previous = None;
        for bits in 0..40 {
            for offset in [0, 1, 7] {
                let value = ((1_u64 << bits) + offset).min(MAX_VALUE);
                let bound = upper_bound(index_of(value));
                assert!(bound >= value, "{value} is above its bucket's bound {bound}");
                assert!((bound - value) as f64 <= value as f64 / SUB_BUCKETS as f64, "{value}: {bound}");
            }
        }
        for index in 0..BUCKETS {
            let bound = upper_bound(index);
            assert_eq!(index_of(bound), index);
            assert!(previous < Some(bound));
            previous = Some(bound);
        }
        assert_eq!(previous, Some(MAX_VALUE));
    }

    #[test]
    fn percentiles_come_from_the_rank_and_never_leave_the_recorded_range() {
        let mut low = Histogram::default();
        let mut high = Histogram::default();
        assert_eq!(low.summary(), Latency::default());
        for micros in 1..=500 {
            low.record(Duration::from_micros(micros));
            high.record(Duration::from_micros(500 + micros));
        }
        low.merge(&high);
        let latency = low.summary();
        assert_eq!(low.count(), 1000);
        assert_eq!((latency.min, latency.max), (Duration::from_micros(1), Duration::from_micros(1000)));
        for (percentile, exact) in [(latency.p50, 500.0), (latency.p90, 900.0), (latency.p99, 990.0)] {
            let found = percentile.as_secs_f64() * 1e6;
            assert!((exact..exact * 1.017).contains(&found), "{found} is not about {exact}");
        }
        assert_eq!(low.percentile(100.0), Duration::from_micros(1000));
    }

    #[test]
    fn the_json_form_is_json_whatever_the_names_contain() {
        let report = Report {
            target: "tcp://a\"\\\n".to_owned(),
            requests: 10,
            failures: vec![("timed out".to_owned(), 2), ("closed".to_owned(), 1)],
            elapsed: Duration::from_secs(2),
            client_cpu: Some(Duration::from_millis(1500)),
            ..Report::default()
        };
        let value: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(value["target"], "tcp://a\"\\\n");
        assert_eq!(value["rps"], 5.0);
        assert_eq!(value["failures"]["timed out"], 2);
        assert_eq!(value["client_cpu_seconds"], 1.5);
        assert_eq!(value["server_cpu_seconds"], serde_json::Value::Null);
    }
}
