// SPDX-License-Identifier: MIT OR Apache-2.0
//! Globs as patterns on Redis: one handler for many channels, which learns the one that was meant; events from
//! publishers who know nothing of packets; a call that nobody receives. Needs a broker at `REDIS_URL`, or at
//! redis://127.0.0.1:6379.
//!
//! ```text
//! $ cargo run --example redis_wildcards --features redis
//! example.user.ada.greet: hello ada
//! example.user.grace.greet: hello grace
//! nobody greets at example.team.ada.greet: no handler for pattern example.team.ada.greet
//! example.log.db says "disk full", which 1 connection received
//! ```

use std::error::Error;
use std::time::Duration;

use martlet::prelude::*;
use martlet::redis::deadpool_redis::redis::cmd;
use martlet::redis::{
    RedisClient, RedisClientOptions, RedisContext, RedisServer, RedisServerOptions, RedisUnwrapped,
};
use tokio::sync::mpsc;

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("REDIS_URL").unwrap_or_else(|_| "redis://127.0.0.1:6379".to_owned());

    // The reply goes to the concrete channel, with `.reply` after it, where any NestJS client listens.
    let greet = message("example.user.*.greet", async |Ctx(context): Ctx<RedisContext>| {
        let name = context.channel().split('.').nth(2).unwrap_or("stranger");
        Ok::<_, RpcError>(format!("hello {name}"))
    });
    let (logged, mut log) = mpsc::channel(16);
    let listen = event("example.log.*", move |Ctx(context): Ctx<RedisContext>, Data(text): Data<String>| {
        let logged = logged.clone();
        async move {
            // The receiver lives as long as the example.
            let _ = logged.send(format!("{} says {text:?}", context.channel())).await;
            Ok::<_, RpcError>(())
        }
    });
    let service = Microservice::new()
        .handlers(greet)
        .handlers(listen)
        .server(RedisServer::new(RedisServerOptions::new().url(&url).wildcards(true)))
        .start()
        .await?;

    let client = RedisClient::new(RedisClientOptions::new().url(&url));
    for name in ["ada", "grace"] {
        let pattern = format!("example.user.{name}.greet");
        println!("{pattern}: {}", client.send::<String>(pattern.clone(), ()).await?);
    }
    // The broker says that nobody received it; NestJS's client would wait for ever.
    if let Err(error) = client.send::<String>("example.team.ada.greet", ()).await {
        println!("nobody greets at example.team.ada.greet: {error}");
    }

    // NestJS's `unwrap()`: the publishing pool is the application's, too. A bare text is an event.
    let connections = client.unwrap::<RedisUnwrapped>().ok_or("not connected")?;
    let (publisher, _subscriber) = &*connections;
    let mut connection = publisher.get().await?;
    let receivers: u64 =
        cmd("PUBLISH").arg("example.log.db").arg("disk full").query_async(&mut connection).await?;
    println!("{}, which {receivers} connection received", log.recv().await.unwrap_or_default());

    client.close().await;
    service.stop(Duration::from_secs(5)).await;
    Ok(())
}
