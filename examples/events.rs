// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events: nobody waits for an answer, and every handler of the pattern gets every event.
//!
//! ```text
//! $ cargo run --example events
//! 100 events: 100 mails, 100 lines of the journal, 100 failures that disturbed nobody
//! an event without a handler: tcp: There is no matching event handler defined in the remote service. Event pattern: "user.lost"
//! stopped: … requests and events done, 0 abandoned
//! ```

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet::ServiceEvent;
use martlet::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::Receiver;

#[derive(Serialize, Deserialize)]
struct User {
    id: u64,
}

#[derive(Default)]
struct Counts {
    mails: AtomicU64,
    journal: AtomicU64,
}

async fn send_mail(State(counts): State<Counts>, Data(user): Data<User>) -> Result<(), RpcError> {
    // Every event has a task of its own: a slow handler holds up neither the next event nor the other handlers.
    tokio::time::sleep(Duration::from_millis(user.id % 10)).await;
    counts.mails.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

async fn write_journal(State(counts): State<Counts>) -> Result<(), RpcError> {
    counts.journal.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// Its error has nobody to go to: the service reports it.
async fn call_the_newspaper() -> Result<(), Unexpected> {
    Err("the line is busy".into())
}

/// Waits for a report of the service.
async fn report(reports: &mut Receiver<ServiceEvent>, name: &str) -> Result<ServiceEvent, Box<dyn Error>> {
    loop {
        let report = reports.recv().await?;
        if report.name() == name {
            return Ok(report);
        }
    }
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let failures = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&failures);
    let service = Microservice::new()
        .state(Counts::default())
        .handlers(event("user.created", send_mail))
        .handlers(event("user.created", write_journal))
        .handlers(event("user.created", call_the_newspaper))
        .handlers(message("counts", async |counts: State<Counts>| {
            let counts = [&counts.mails, &counts.journal].map(|count| count.load(Ordering::Relaxed));
            Ok::<_, RpcError>(counts)
        }))
        .on(move |report| {
            if matches!(report, ServiceEvent::UnexpectedError { .. }) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        })
        .server(TcpServer::bind("127.0.0.1", 0))
        .start()
        .await?;
    let mut reports = service.events().subscribe();
    let client = Transport::from_url(&service.url())?.into_client()?;

    for id in 0..100 {
        // Ready when it is on its way; whether somebody handles it is not known here.
        client.emit("user.created", User { id }).await?;
    }
    let [mails, journal] = loop {
        let counts: [u64; 2] = client.send("counts", ()).await?;
        if counts == [100; 2] {
            break counts;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let failures = failures.load(Ordering::Relaxed);
    println!(
        "100 events: {mails} mails, {journal} lines of the journal, {failures} failures that disturbed nobody"
    );

    client.emit("user.lost", User { id: 1 }).await?;
    println!("an event without a handler: {}", report(&mut reports, "no_event_handler").await?);

    client.close().await;
    let report = service.stop(Duration::from_secs(5)).await;
    println!("stopped: {} requests and events done, {} abandoned", report.done(), report.abandoned().count());
    Ok(())
}
