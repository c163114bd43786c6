// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subject: Martlet's TCP server, on the one arbiter of its thread.

use clap::Parser;
use martlet_bench::service::filler;
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
}

fn sum(pattern: &str) -> Result<HandlerGroup> {
    let pattern = Pattern::from_json(&serde_json::json!({ "cmd": pattern }))?;
    Ok(message(pattern, |Data(numbers): Data<Vec<i64>>| async move {
        Ok::<_, RpcError>(numbers.iter().sum::<i64>())
    }))
}

fn main() -> Result<()> {
    let options = Options::parse();
    actix_rt::System::new().block_on(async {
        let mut service = Microservice::new().on_current_arbiter().handlers(sum("sum")?);
        for number in 1..options.routes {
            service = service.handlers(sum(&filler(number))?);
        }
        let service = service.server(TcpServer::bind("127.0.0.1", options.port)).start().await?;
        process::say_ready(service.url().rsplit(':').next().unwrap_or_default())?;
        service.run_until(martlet_core::microservice::shutdown_signal()).await?;
        Ok(())
    })
}
