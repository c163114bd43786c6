// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subject of the publishers over Redis, RabbitMQ and MQTT: a Martlet client, a task for each event in flight, on one
//! thread.

use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Parser;
use martlet::{ClientProxy, Transport};
use martlet_bench::Result;
use martlet_bench::options::Measure;
use martlet_bench::report::Report;
use martlet_bench::service::NOTED;
use martlet_bench::window::Window;
use serde_json::json;
use tokio::task::JoinSet;

/// Publish events with Martlet.
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
    let mut transport = Transport::from_url(&url)?;
    if url.starts_with("amqp") {
        // As the baseline declares it.
        transport = transport.with("queueOptions", json!({ "maxLength": 10_000 }));
    }
    actix_rt::System::new().block_on(async {
        let client = transport.into_client()?;
        client.connect().await?;
        let window = Rc::new(measure.window());
        let mut tasks = JoinSet::new();
        for number in 0..depth {
            tasks.spawn_local(publish(client.clone(), number, Rc::clone(&window)));
        }
        let report = window.measure_tasks(measure.warmup(), tasks).await?;
        client.close().await;
        measure.print(&Report { target: url, connections: 1, depth, ..report })
    })
}

async fn publish(client: ClientProxy, number: usize, window: Rc<Window>) -> Result<()> {
    // The raw programs look at the clock once per round of events; this one for every sixteenth event.
    let mut latency = Duration::ZERO;
    for turn in number + 1.. {
        if !window.is_sending() {
            break;
        }
        let sent = turn.is_multiple_of(16).then(Instant::now);
        client.emit(NOTED, [(turn % 90 + 10) as i64, 2, 3, 4, 5]).await?;
        latency = sent.map_or(latency, |sent| sent.elapsed());
        window.count(latency)?;
    }
    Ok(())
}
