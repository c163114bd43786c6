// SPDX-License-Identifier: MIT OR Apache-2.0
//! Baseline of the NATS caller: raw async-nats, one inbox subscription for all calls, one loop.

use std::time::Instant;

use async_nats::Subject;
use bytes::Bytes;
use clap::Parser;
use futures::StreamExt;
use martlet_bench::options::Measure;
use martlet_bench::report::Report;
use martlet_bench::service::{self, Calls, Reply, SUM};
use martlet_bench::window::Window;
use martlet_bench::{Result, process};

/// Call sums over NATS with raw async-nats.
#[derive(Parser)]
struct Options {
    /// The broker.
    #[arg(long, value_name = "URL", default_value = "nats://127.0.0.1:4222")]
    nats: String,
    /// Requests in flight.
    #[arg(long, default_value_t = 64)]
    depth: usize,
    #[command(flatten)]
    measure: Measure,
}

fn main() -> Result<()> {
    let Options { nats, depth, measure } = Options::parse();
    process::on_one_thread(async {
        let window = measure.window();
        let report = window.measure(measure.warmup(), call(&nats, depth, &window)).await?;
        measure.print(&Report { target: nats, connections: 1, depth, ..report })
    })
}

async fn call(url: &str, depth: usize, window: &Window) -> Result<()> {
    let client = async_nats::connect(url).await?;
    let inbox = client.new_inbox();
    let mut replies = client.subscribe(format!("{inbox}.*")).await?;
    let subject = Subject::from_static(SUM);
    let mut calls = Calls::new()?;
    // With at most `depth` calls in flight the slab hands out the keys below it, so the reply
    // subjects are made once; the id within the packet tells one use of a key from the next.
    let reply_to: Vec<Subject> = (0..depth).map(|key| format!("{inbox}.{key}").into()).collect();
    for _ in 0..depth {
        let call = calls.begin(Instant::now())?;
        let packet = Bytes::copy_from_slice(call.packet);
        client.publish_with_reply(subject.clone(), reply_to[call.key].clone(), packet).await?;
    }
    while !calls.is_empty() {
        let message = replies.next().await.ok_or("the subscription ended")?;
        let reply: Reply<'_> = service::parse(&message.payload)?;
        let key = message.subject.rsplit('.').next().unwrap_or_default();
        if reply.id.split('.').next() != Some(key) {
            return Err(format!("a reply to {key} has id {}", reply.id).into());
        }
        let now = Instant::now();
        window.count(now - calls.end(&reply)?)?;
        if window.is_sending() {
            let call = calls.begin(now)?;
            let packet = Bytes::copy_from_slice(call.packet);
            client.publish_with_reply(subject.clone(), reply_to[call.key].clone(), packet).await?;
        }
    }
    Ok(())
}
