// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TCP load: prebuilt `{"cmd":"sum"}` frames, every reply checked.

use std::net::SocketAddr;

use clap::Parser;
use martlet_bench::options::Measure;
use martlet_bench::{Result, load, process};

/// Load a TCP server with sums and check every reply.
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
    /// Call filler routes picked at random out of so many, instead of the one route.
    #[arg(long, value_name = "ROUTES")]
    spread: Option<u32>,
    #[command(flatten)]
    measure: Measure,
}

fn main() -> Result<()> {
    let Options { addr, connections, depth, spread, measure } = Options::parse();
    let plan = load::Plan { address: addr, connections, depth, spread };
    process::on_one_thread(async {
        let report = load::run(plan, measure.warmup(), measure.window()).await?;
        measure.print(&report)
    })
}
