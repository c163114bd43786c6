// SPDX-License-Identifier: MIT OR Apache-2.0
//! One service on two transporters: the same handlers and state behind both, but the guard of the service holds only
//! for the public one (NestJS's `inheritAppConfig: false` for the other).
//!
//! ```text
//! $ cargo run --example two_transports
//! serving on tcp://127.0.0.1:… and memory://network-0
//! tcp, without a token: Forbidden resource
//! tcp, with a token: visit 1, by tcp
//! memory, without a token: visit 2, by memory
//! done by tcp: 2, by memory: 1
//! ```

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet::interceptor::guard;
use martlet::prelude::*;
use martlet::{Request, Server};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};

#[derive(Default)]
struct Visits(AtomicU64);

async fn visit(State(visits): State<Visits>, request: Request) -> Result<String, RpcError> {
    let number = visits.0.fetch_add(1, Ordering::Relaxed) + 1;
    Ok(format!("visit {number}, by {}", request.transport().name))
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let network = MemoryNetwork::new();
    // Inside of the process nobody needs a token.
    let inside: Server = MemoryServer::new(&network).inherit_app_config(false);
    let service = Microservice::new()
        .state(Visits::default())
        .interceptor(guard(async |request: Request| Ok(request.metadata().get("token") == Some("secret"))))
        .handlers(message("visit", visit))
        .server(TcpServer::bind("127.0.0.1", 0))
        .server(inside)
        .start()
        .await?;
    let urls: Vec<_> = service.servers().iter().map(|server| server.url()).collect();
    println!("serving on {}", urls.join(" and "));

    let tcp = Transport::from_url(&service.url())?.into_client()?;
    let memory = MemoryClient::new(&network);
    match tcp.send::<String>("visit", ()).await {
        Err(CallError::Remote(error)) => {
            println!("tcp, without a token: {}", error.message().unwrap_or_default());
        }
        other => return Err(format!("a refusal expected, got {other:?}").into()),
    }
    let answer: String = tcp.send("visit", ()).metadata("token", "secret").await?;
    println!("tcp, with a token: {answer}");
    println!("memory, without a token: {}", memory.send::<String>("visit", ()).await?);

    tcp.close().await;
    memory.close().await;
    // Both stop at once, within one grace period.
    let report = service.stop(Duration::from_secs(5)).await;
    let done: Vec<_> =
        report.servers.iter().map(|server| format!("by {}: {}", server.transport, server.done)).collect();
    println!("done {}", done.join(", "));
    Ok(())
}
