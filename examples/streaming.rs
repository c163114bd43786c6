// SPDX-License-Identifier: MIT OR Apache-2.0
//! Streams of replies: read to the end, failing in the middle, given up by the caller.
//!
//! ```text
//! $ cargo run --example streaming
//! a countdown: 3 2 1 end
//! its first reply: 3
//! a stream that fails: 1 2 "out of paper"
//! an endless one, given up after 5: 0 1 2 3 4
//! the endless stream was dropped by its service
//! ```

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use martlet::prelude::*;

async fn countdown(Data(from): Data<u32>) -> Result<Streaming<impl Stream<Item = u32>>, RpcError> {
    Ok(Streaming(stream::iter((1..=from).rev())))
}

/// An error ends the stream; what was yielded before it arrives.
async fn print() -> Result<TryStreaming<impl Stream<Item = Result<u32, RpcError>>>, RpcError> {
    let pages = [Ok(1), Ok(2), Err(RpcError::message("out of paper"))];
    Ok(TryStreaming(stream::iter(pages)))
}

#[derive(Default)]
struct Endless {
    dropped: AtomicBool,
}

/// Lives as long as the stream that owns it.
struct Ticker {
    next: u64,
    endless: Arc<Endless>,
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.endless.dropped.store(true, Ordering::Release);
    }
}

/// It is polled only as fast as its replies leave: a slow reader slows it down.
async fn ticks(State(endless): State<Endless>) -> Result<Streaming<impl Stream<Item = u64>>, RpcError> {
    let ticks = stream::unfold(Ticker { next: 0, endless }, async |mut ticker| {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let number = ticker.next;
        ticker.next += 1;
        Some((number, ticker))
    });
    Ok(Streaming(ticks))
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let service = Microservice::new()
        .state(Endless::default())
        .handlers(message("countdown", countdown))
        .handlers(message("print", print))
        .handlers(message("ticks", ticks))
        .handlers(message("dropped", async |endless: State<Endless>| {
            Ok::<_, RpcError>(endless.dropped.load(Ordering::Acquire))
        }))
        .server(TcpServer::bind("127.0.0.1", 0))
        .start()
        .await?;
    let client = Transport::from_url(&service.url())?.into_client()?;

    print!("a countdown:");
    let mut replies = client.send::<u32>("countdown", 3).stream();
    while let Some(reply) = replies.next().await {
        print!(" {}", reply?);
    }
    println!(" end");

    println!("its first reply: {}", client.send::<u32>("countdown", 3).await?);

    print!("a stream that fails:");
    let mut replies = client.send::<u32>("print", ()).stream();
    while let Some(reply) = replies.next().await {
        match reply {
            Ok(page) => print!(" {page}"),
            Err(CallError::Remote(error)) => println!(" {:?}", error.message().unwrap_or_default()),
            Err(other) => return Err(other.into()),
        }
    }

    print!("an endless one, given up after 5:");
    let mut replies = client.send::<u64>("ticks", ()).stream().take(5);
    while let Some(reply) = replies.next().await {
        print!(" {}", reply?);
    }
    println!();
    // Dropping it cancels the call; a Martlet service is told so and drops what it was working on.
    drop(replies);
    while !client.send::<bool>("dropped", ()).await? {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("the endless stream was dropped by its service");

    client.close().await;
    service.stop(Duration::from_secs(5)).await;
    Ok(())
}
