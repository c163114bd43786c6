// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subject of the NATS caller: a Martlet client, a task for each call in flight, on one thread.

use std::rc::Rc;
use std::time::Instant;

use clap::Parser;
use martlet_bench::Result;
use martlet_bench::options::Measure;
use martlet_bench::report::Report;
use martlet_bench::service::SUM;
use martlet_bench::window::Window;
use martlet_core::{ClientProxy, Pattern};
use martlet_nats::{NatsClient, NatsClientOptions};
use tokio::task::JoinSet;

/// Call sums over NATS with Martlet.
#[derive(Parser)]
struct Options {
    /// The broker.
    #[arg(long, value_name = "URL", default_value = "nats://127.0.0.1:4222")]
    nats: String,
    /// Requests in flight.
    #[arg(long, default_value_t = 64)]
    depth: usize,
    /// Send no deadline with the calls, as the baseline does.
    #[arg(long)]
    no_deadline: bool,
    /// Send the deadline as a header too, not in the packet alone.
    #[arg(long)]
    deadline_header: bool,
    #[command(flatten)]
    measure: Measure,
}

fn main() -> Result<()> {
    let Options { nats, depth, no_deadline, deadline_header, measure } = Options::parse();
    actix_rt::System::new().block_on(async {
        let mut options = NatsClientOptions::new().servers([nats.clone()]).deadline_header(deadline_header);
        options.client.propagate = !no_deadline;
        let client = NatsClient::new(options);
        client.connect().await?;
        let window = Rc::new(measure.window());
        let mut tasks = JoinSet::new();
        for number in 0..depth {
            tasks.spawn_local(call(client.clone(), number, Rc::clone(&window)));
        }
        let report = window.measure_tasks(measure.warmup(), tasks).await?;
        client.close().await;
        measure.print(&Report { target: nats, connections: 1, depth, ..report })
    })
}

async fn call(client: ClientProxy, number: usize, window: Rc<Window>) -> Result<()> {
    let pattern = Pattern::parse(SUM);
    let mut turn = number;
    // As the baseline: one look at the clock ends a call and begins the next.
    let mut sent = Instant::now();
    while window.is_sending() {
        turn += 1;
        let data = [(turn % 90 + 10) as i64, 2, 3, 4, 5];
        let sum: i64 = client.send(&pattern, data).await?;
        if sum != data.iter().sum::<i64>() {
            return Err(format!("a wrong reply: {sum}").into());
        }
        let now = Instant::now();
        window.count(now - sent)?;
        sent = now;
    }
    Ok(())
}
