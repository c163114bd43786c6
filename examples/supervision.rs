// SPDX-License-Identifier: MIT OR Apache-2.0
//! Actors that depend on each other, under one supervisor: what begins again with what, and what giving up means.
//!
//! ```text
//! $ cargo run --example supervision
//! shop: 2 sold, 2 in the ledger
//! the till ends; after it the printer begins again, the ledger goes on
//! shop: 1 sold, 3 in the ledger
//! tree: ledger 0 restarts, till 1 restart, printer 1 restart
//! the ledger ends; all begin again
//! shop: 1 sold, 1 in the ledger
//! tree: ledger 1 restart, till 2 restarts, printer 2 restarts
//! once more within a minute is too much: printer is stopped, till is stopped, ledger has failed
//! the service stops: ledger ended too often: no such price
//! ```

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use martlet::prelude::*;
use martlet::supervise::{ChildSpec, Escalation, Strategy, Supervisor, TreeReport};
use martlet::{ServiceEvent, SupervisorGroup};
use serde::Deserialize;
use tokio::sync::Notify;

/// Something sold. A price of 0 is what the ledger stumbles over, 13 the till.
#[derive(Clone, Copy, Message, Deserialize)]
#[rtype(result = "Result<(u64, u64), RpcError>")]
struct Sale(u64);

#[derive(Message)]
#[rtype(result = "Result<u64, RpcError>")]
struct Book(u64);

// === the actors: each needs the one before ===

#[derive(Default, Supervised)]
struct Ledger {
    entries: u64,
}

impl Actor for Ledger {
    type Context = Context<Self>;
}

impl Handler<Book> for Ledger {
    type Result = Result<u64, RpcError>;

    fn handle(&mut self, Book(price): Book, _ctx: &mut Self::Context) -> Self::Result {
        assert!(price != 0, "no such price");
        self.entries += 1;
        Ok(self.entries)
    }
}

#[derive(Supervised)]
struct Till {
    ledger: Addr<Ledger>,
    sold: u64,
}

impl Actor for Till {
    type Context = Context<Self>;
}

impl Handler<Sale> for Till {
    type Result = ResponseFuture<Result<(u64, u64), RpcError>>;

    fn handle(&mut self, Sale(price): Sale, _ctx: &mut Self::Context) -> Self::Result {
        assert!(price != 13, "no such coin");
        self.sold += 1;
        let (sold, booked) = (self.sold, self.ledger.send(Book(price)));
        Box::pin(async move { Ok((sold, booked.await.map_err(RpcError::unexpected)??)) })
    }
}

#[derive(Supervised)]
struct Printer {
    // Good for as long as the family lives, over every restart of the till.
    _till: Addr<Till>,
}

impl Actor for Printer {
    type Context = Context<Self>;
}

/// Started in this order, stopped in reverse; one that ends takes those after it along.
fn shop() -> SupervisorGroup {
    let shop = Supervisor::new(Strategy::RestForOne)
        .intensity(2, Duration::from_secs(60))
        .child("ledger", |_| ChildSpec::new(Ledger::default))
        .child("till", |siblings| {
            let ledger = siblings.address::<Ledger>("ledger");
            ChildSpec::new(move || Till { ledger: ledger.clone(), sold: 0 })
        })
        .child("printer", |siblings| {
            let till = siblings.address::<Till>("till");
            ChildSpec::new(move || Printer { _till: till.clone() })
        });
    SupervisorGroup::new("shop", shop).message::<Till, Sale>("till", "sell")
}

// === the service ===

fn tell(tree: &TreeReport) {
    let restarts = ["ledger", "till", "printer"].map(|name| {
        let restarts = tree.find(name).map_or(0, |child| child.restarts);
        format!("{name} {restarts} restart{}", if restarts == 1 { "" } else { "s" })
    });
    println!("tree: {}", restarts.join(", "));
}

fn states(tree: &TreeReport) -> String {
    let states = ["printer", "till", "ledger"].map(|name| {
        let state = tree.find(name).map(|child| format!("{:?}", child.state).to_lowercase());
        let state = state.unwrap_or_default();
        if state == "failed" { format!("{name} has failed") } else { format!("{name} is {state}") }
    });
    states.join(", ")
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let group = shop().build().singleton().supervision(|supervision| {
        // A service without its shop is useless.
        supervision.escalation = Escalation::StopService;
    });
    let service = Microservice::new().handlers(group).server(TcpServer::bind("127.0.0.1", 0)).start().await?;
    // Done when the last child of a restart, the printer, is there again.
    let again = Arc::new(Notify::new());
    let notify = Arc::clone(&again);
    service.events().on(move |event| match event {
        ServiceEvent::Restarted { child, .. } if &**child == "printer" => notify.notify_one(),
        ServiceEvent::GaveUp { .. } => notify.notify_one(),
        _ => {}
    });
    let client = Transport::from_url(&service.url())?.into_client()?;
    let sell = |price: u64| client.send::<(u64, u64)>("sell", price);
    let count = async |price| {
        let (sold, entries) = sell(price).await?;
        println!("shop: {sold} sold, {entries} in the ledger");
        Ok::<_, CallError>(())
    };

    sell(5).await?;
    count(7).await?;

    println!("the till ends; after it the printer begins again, the ledger goes on");
    sell(13).await.expect_err("no such coin");
    again.notified().await;
    count(5).await?;
    tell(&service.tree());

    println!("the ledger ends; all begin again");
    sell(0).await.expect_err("no such price");
    again.notified().await;
    count(5).await?;
    tell(&service.tree());

    sell(0).await.expect_err("no such price");
    again.notified().await;
    println!("once more within a minute is too much: {}", states(&service.tree()));
    let report = service.run_until(std::future::pending::<String>()).await?;
    println!("the service stops: {}", report.cause);
    client.close().await;
    Ok(())
}
