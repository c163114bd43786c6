// SPDX-License-Identifier: MIT OR Apache-2.0
//! Baseline of the publishers over Redis, RabbitMQ and MQTT: the raw driver, many events at a time.

use clap::Parser;
use martlet_bench::options::Measure;
use martlet_bench::{Result, broker, process};

/// Publish events with a raw driver.
#[derive(Parser)]
struct Options {
    /// The broker: redis://…, amqp://…?queue=NAME or mqtt://….
    url: String,
    /// Events in flight.
    #[arg(long, default_value_t = 64)]
    depth: usize,
    #[command(flatten)]
    measure: Measure,
}

fn main() -> Result<()> {
    let Options { url, depth, measure } = Options::parse();
    process::on_one_thread(async {
        let window = measure.window();
        let report = broker::publish(&url, depth, measure.warmup(), &window).await?;
        measure.print(&report)
    })
}
