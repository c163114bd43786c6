// SPDX-License-Identifier: MIT OR Apache-2.0
//! Baseline of the TCP client: one thread, one task per connection, pipelined, correlated by a slab.
//!
//! Unlike the load it does the work of a client: every request is serialised from typed data, every
//! reply parsed, correlated by its id and decoded into a number.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use clap::Parser;
use martlet_bench::options::Measure;
use martlet_bench::report::Report;
use martlet_bench::service::{self, Calls, Reply};
use martlet_bench::window::Window;
use martlet_bench::{Result, frame, process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};

/// Call sums over TCP with a hand-written pipelining client.
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
    process::on_one_thread(async { LocalSet::new().run_until(run(options)).await })
}

async fn run(options: Options) -> Result<()> {
    let Options { addr, connections, depth, measure } = options;
    let window = Rc::new(measure.window());
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        tasks.spawn_local(call(stream, depth, window.clone()));
    }
    let report = window.measure_tasks(measure.warmup(), tasks).await?;
    measure.print(&Report { target: format!("tcp://{addr}"), connections, depth, ..report })
}

async fn call(mut stream: TcpStream, depth: usize, window: Rc<Window>) -> Result<()> {
    let mut calls = Calls::new()?;
    let mut input = Vec::with_capacity(64 * 1024);
    let mut output = Vec::new();
    let now = Instant::now();
    for _ in 0..depth {
        frame::push(&mut output, calls.begin(now)?.packet);
    }
    while !calls.is_empty() {
        if !output.is_empty() {
            // Both ends write whole rounds before they read: right for depths whose frames fit the
            // socket buffers, and the least code.
            stream.write_all(&output).await?;
            output.clear();
        }
        if stream.read_buf(&mut input).await? == 0 {
            return Err("the server closed the connection".into());
        }
        let now = Instant::now();
        let mut rest = input.as_slice();
        while let Some(body) = frame::next(&mut rest)? {
            let reply: Reply<'_> = service::parse(body)?;
            window.count(now - calls.end(&reply)?)?;
            if window.is_sending() {
                frame::push(&mut output, calls.begin(now)?.packet);
            }
        }
        let used = input.len() - rest.len();
        input.drain(..used);
    }
    Ok(())
}
