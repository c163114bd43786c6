// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subject of the responders over Redis, RabbitMQ and MQTT: a Martlet service with three handlers, on one thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Parser;
use martlet::{Data, Microservice, Pattern, RpcError, Transport, event, message};
use martlet_bench::service::{COUNTED, NOTED, SUM};
use martlet_bench::{Result, process};

/// Answer sums and count events with Martlet.
#[derive(Parser)]
struct Options {
    /// The broker: redis://…, amqp://…?queue=NAME or mqtt://….
    url: String,
}

fn main() -> Result<()> {
    let transport = Transport::from_url(&Options::parse().url)?;
    actix_rt::System::new().block_on(async {
        let name = transport.kind().name();
        let noted = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&noted);
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(message(Pattern::parse(SUM), async |Data(numbers): Data<Vec<i64>>| {
                Ok::<_, RpcError>(numbers.iter().sum::<i64>())
            }))
            .handlers(event(NOTED, move |Data(numbers): Data<Vec<i64>>| {
                std::hint::black_box(numbers.iter().sum::<i64>());
                noted.fetch_add(1, Ordering::Relaxed);
                async { Ok::<_, RpcError>(()) }
            }))
            .handlers(message(COUNTED, move || {
                let counted = counted.load(Ordering::Relaxed);
                async move { Ok::<_, RpcError>(counted) }
            }))
            .server(transport.into_server()?)
            .start()
            .await?;
        process::say_ready(name)?;
        process::terminated().await?;
        service.stop(Duration::from_secs(4)).await;
        Ok(())
    })
}
