// SPDX-License-Identifier: MIT OR Apache-2.0
//! The load on responders over Redis, RabbitMQ and MQTT: the raw driver, one connection, every reply checked.

use clap::Parser;
use martlet_bench::broker::{self, Plan};
use martlet_bench::options::Measure;
use martlet_bench::{Result, process};

/// Call sums, with events in front of each call if wanted.
#[derive(Parser)]
struct Options {
    /// The broker: redis://…, amqp://…?queue=NAME or mqtt://….
    url: String,
    /// Calls in flight.
    #[arg(long, default_value_t = 64)]
    depth: usize,
    /// Events in front of each call; then events are counted, not calls.
    #[arg(long, default_value_t = 0)]
    events: usize,
    #[command(flatten)]
    measure: Measure,
}

fn main() -> Result<()> {
    let Options { url, depth, events, measure } = Options::parse();
    process::on_one_thread(async {
        let window = measure.window();
        let report = broker::load(&url, Plan { depth, events }, measure.warmup(), &window).await?;
        measure.print(&report)
    })
}
