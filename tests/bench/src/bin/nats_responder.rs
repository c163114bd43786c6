// SPDX-License-Identifier: MIT OR Apache-2.0
//! Baseline of the NATS responder: one subscription of async-nats, one loop, one thread.

use clap::Parser;
use futures::StreamExt;
use martlet_bench::service::{SUM, Service};
use martlet_bench::{Result, process};

/// Answer sums over NATS with raw async-nats.
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
    process::on_one_thread(async {
        tokio::select! {
            ended = answer(options) => ended,
            ended = process::terminated() => ended,
        }
    })
}

async fn answer(options: Options) -> Result<()> {
    let client = async_nats::connect(&options.nats).await?;
    let mut requests = match options.queue {
        Some(queue) => client.queue_subscribe(SUM, queue).await?,
        None => client.subscribe(SUM).await?,
    };
    client.flush().await?;
    process::say_ready("nats")?;
    let service = Service::new(1);
    while let Some(request) = requests.next().await {
        let mut reply = Vec::new();
        service.answer(&request.payload, &mut reply)?;
        if let Some(to) = request.reply {
            client.publish(to, reply.into()).await?;
        }
    }
    Ok(())
}
