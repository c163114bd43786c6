// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command-line options that the contract of `run` gives to every program of a kind.

use std::time::Duration;

use clap::Args;

use crate::Result;
use crate::process;
use crate::report::Report;
use crate::window::{Length, Window};

/// How long to measure, what to watch and how to print it.
#[derive(Args, Clone, Debug)]
pub struct Measure {
    /// Seconds of load before measuring.
    #[arg(long, default_value_t = 0.5)]
    warmup: f64,
    /// Seconds to measure.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Measure this many replies instead of a time.
    #[arg(long)]
    requests: Option<u64>,
    /// Process id of the server: its CPU time over the measured part is reported.
    #[arg(long, value_name = "PID")]
    server_pid: Option<u32>,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

impl Measure {
    /// The warm-up.
    pub fn warmup(&self) -> Duration {
        Duration::from_secs_f64(self.warmup.clamp(0.0, 1e6))
    }

    /// The measured part, not yet open.
    pub fn window(&self) -> Window {
        let time = Duration::from_secs_f64(self.seconds.clamp(0.0, 1e6));
        Window::new(self.server_pid, self.requests.map_or(Length::Time(time), Length::Count))
    }

    /// Prints the report.
    pub fn print(&self, report: &Report) -> Result<()> {
        process::say(&if self.json { report.to_json() } else { report.to_string() })
    }
}
