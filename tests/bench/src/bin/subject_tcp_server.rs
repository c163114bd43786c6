// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subject: Martlet's TCP server, on the one arbiter of its thread.

use clap::Parser;
use martlet::controller;
use martlet_bench::service::{SUM, filler};
use martlet_bench::{Result, process};
use martlet_core::{Data, HandlerGroup, Microservice, Pattern, RpcError, message};
use martlet_tcp::TcpServer;

/// Serve sums over TCP with Martlet.
#[derive(Parser)]
struct Options {
    /// Port to listen on, 0 for any.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Routes to register.
    #[arg(long, default_value_t = 10)]
    routes: u32,
    /// Arbiters to serve on; 0 is the main thread alone.
    #[arg(long, default_value_t = 0)]
    arbiters: usize,
    /// One replica of the handler for all arbiters, so that requests on the others hop threads.
    #[arg(long)]
    singleton: bool,
    /// Serve the sum from a controller, not from a function.
    #[arg(long, conflicts_with = "singleton")]
    controller: bool,
}

struct Sums;

#[controller]
impl Sums {
    #[message_pattern({ "cmd": "sum" })]
    async fn sum(&self, #[payload] numbers: Vec<i64>) -> i64 {
        numbers.iter().sum()
    }
}

fn sum(pattern: &str) -> HandlerGroup {
    message(Pattern::parse(pattern), |Data(numbers): Data<Vec<i64>>| async move {
        Ok::<_, RpcError>(numbers.iter().sum::<i64>())
    })
}

fn main() -> Result<()> {
    let options = Options::parse();
    actix_rt::System::new().block_on(async {
        let mut service = match options.arbiters {
            0 => Microservice::new().on_current_arbiter(),
            count => Microservice::new().arbiters(count),
        };
        service = match options.controller {
            true => service.controller(|| Sums),
            false if options.singleton => service.handlers(sum(SUM).singleton()),
            false => service.handlers(sum(SUM)),
        };
        for number in 1..options.routes {
            service = service.handlers(sum(&filler(number)));
        }
        let service = service.server(TcpServer::bind("127.0.0.1", options.port)).start().await?;
        process::say_ready(service.url().rsplit(':').next().unwrap_or_default())?;
        service.run_until(martlet_core::microservice::shutdown_signal()).await?;
        Ok(())
    })
}
