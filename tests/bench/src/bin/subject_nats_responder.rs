// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subject of the NATS responder: a Martlet service with one handler, on one thread.

use std::time::Duration;

use clap::Parser;
use martlet_bench::service::SUM;
use martlet_bench::{Result, process};
use martlet_core::{Data, Microservice, Pattern, RpcError, message};
use martlet_nats::{NatsServer, NatsServerOptions};

/// Answer sums over NATS with Martlet.
#[derive(Parser)]
struct Options {
    /// The broker.
    #[arg(long, value_name = "URL", default_value = "nats://127.0.0.1:4222")]
    nats: String,
    /// Subscribe in this queue group.
    #[arg(long)]
    queue: Option<String>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    actix_rt::System::new().block_on(async {
        let mut nats = NatsServerOptions::new().servers([options.nats]);
        nats.queue = options.queue;
        let sum = message(Pattern::parse(SUM), async |Data(numbers): Data<Vec<i64>>| {
            Ok::<_, RpcError>(numbers.iter().sum::<i64>())
        });
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(sum)
            .server(NatsServer::new(nats))
            .start()
            .await?;
        process::say_ready("nats")?;
        process::terminated().await?;
        service.stop(Duration::from_secs(5)).await;
        Ok(())
    })
}
