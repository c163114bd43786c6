// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subject: Martlet's TCP client, one proxy per connection, all on one thread.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Parser;
use martlet_bench::Result;
use martlet_bench::options::Measure;
use martlet_bench::report::Report;
use martlet_bench::window::Window;
use martlet_core::{ClientProxy, Pattern};
use martlet_tcp::TcpClient;
use tokio::task::JoinSet;

/// Call sums over TCP with Martlet.
#[derive(Parser)]
struct Options {
    /// The server.
    #[arg(long, value_name = "HOST:PORT")]
    addr: SocketAddr,
    /// Connections to open.
    #[arg(long, default_value_t = 10)]
    connections: usize,
    /// Requests in flight on each.
    #[arg(long, default_value_t = 32)]
    depth: usize,
    #[command(flatten)]
    measure: Measure,
}

fn main() -> Result<()> {
    let options = Options::parse();
    actix_rt::System::new().block_on(run(options))
}

async fn run(options: Options) -> Result<()> {
    let Options { addr, connections, depth, measure } = options;
    let window = Rc::new(measure.window());
    let pattern = Pattern::from_json(&serde_json::json!({ "cmd": "sum" }))?;
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let client = TcpClient::connect_to(addr.ip().to_string(), addr.port());
        client.connect().await?;
        let next = Rc::new(Cell::new(0i64));
        for _ in 0..depth {
            tasks.spawn_local(call(client.clone(), pattern.clone(), Rc::clone(&next), window.clone()));
        }
    }
    let report = window.measure_tasks(measure.warmup(), tasks).await?;
    measure.print(&Report { target: format!("tcp://{addr}"), connections, depth, ..report })
}

async fn call(client: ClientProxy, pattern: Pattern, next: Rc<Cell<i64>>, window: Rc<Window>) -> Result<()> {
    // The hand-written client looks at the clock once per read, for all the replies in it; this one for every sixteenth
    // call, which is about as often.
    let mut latency = Duration::ZERO;
    for turn in 0u64.. {
        if !window.is_sending() {
            break;
        }
        let begun = turn.is_multiple_of(16).then(Instant::now);
        let first = next.replace(next.get() + 1) % 90 + 10;
        let data = [first, 2, 3, 4, 5];
        let sum: i64 = client.send(pattern.clone(), data).await?;
        if sum != data.iter().sum::<i64>() {
            return Err("wrong sum".into());
        }
        latency = begun.map_or(latency, |begun| begun.elapsed());
        window.count(latency)?;
    }
    Ok(())
}
