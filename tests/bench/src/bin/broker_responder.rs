// SPDX-License-Identifier: MIT OR Apache-2.0
//! Baseline of the responders over Redis, RabbitMQ and MQTT: the raw driver and one loop.

use clap::Parser;
use martlet_bench::{Result, broker, process};

/// Answer sums and count events with a raw driver.
#[derive(Parser)]
struct Options {
    /// The broker: redis://…, amqp://…?queue=NAME or mqtt://….
    url: String,
}

fn main() -> Result<()> {
    let Options { url } = Options::parse();
    process::on_one_thread(async {
        tokio::select! {
            ended = broker::respond(&url) => ended,
            ended = process::terminated() => ended,
        }
    })
}
