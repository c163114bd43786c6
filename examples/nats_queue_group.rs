// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two services in one queue group of a NATS broker: each request is served once, by either; when one stops, the
//! other has all of them, and none is lost. Needs a broker at `NATS_URL`, or at nats://127.0.0.1:4222.
//!
//! ```text
//! $ cargo run --example nats_queue_group --features nats
//! 200 requests, 200 served: both had their share
//! ada stops: … requests answered, 0 abandoned
//! 100 requests more: {"grace": 100}
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use futures::future::try_join_all;
use martlet::RunningService;
use martlet::prelude::*;

const GRACE: Duration = Duration::from_secs(5);

/// Answers with its name.
async fn service(name: &'static str, url: &str) -> Result<RunningService, Box<dyn Error>> {
    // All subscriptions of this server; `message(…).extra("queue", "workers")` sets it for one handler.
    let server = Transport::from_url(url)?.with("queue", "workers").into_server()?;
    let service = Microservice::new()
        .name(name)
        .handlers(message("example.work", move || async move { Ok::<_, RpcError>(name) }))
        .server(server)
        .start()
        .await?;
    Ok(service)
}

/// How many requests each service has answered.
async fn work(client: &ClientProxy, requests: usize) -> Result<BTreeMap<String, u64>, CallError> {
    let mut shares = BTreeMap::new();
    for name in try_join_all((0..requests).map(|_| client.send::<String>("example.work", ()))).await? {
        *shares.entry(name).or_default() += 1;
    }
    Ok(shares)
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());
    let client = Transport::from_url(&url)?.into_client()?;
    let (ada, grace) = (service("ada", &url).await?, service("grace", &url).await?);

    let shares = work(&client, 200).await?;
    let (served, both) = (shares.values().sum::<u64>(), shares.len() == 2);
    println!("200 requests, {served} served: {}", if both { "both had their share" } else { "one had all" });

    // In order: it unsubscribes, answers what the broker has already given it, and closes.
    let report = ada.stop(GRACE).await;
    println!("ada stops: {} requests answered, {} abandoned", report.done(), report.abandoned().count());
    println!("100 requests more: {:?}", work(&client, 100).await?);

    client.close().await;
    grace.stop(GRACE).await;
    Ok(())
}
