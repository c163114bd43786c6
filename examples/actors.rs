// SPDX-License-Identifier: MIT OR Apache-2.0
//! actix actors as handlers: routed at start, routed by another actor at run time, restarted after a panic behind
//! the same address, unrouted again.
//!
//! ```text
//! $ cargo run --example actors
//! till: 10, then 15
//! till, asked for the impossible: Internal server error
//! till: 1 after the restart, 3 by the address from before it
//! tree: till/Till is running, 1 restart, last cause: no such coin
//! the manager opens a second one: kiosk
//! kiosk: 7
//! tree: kiosk/Till is running, 0 restarts
//! the manager closes it: true
//! kiosk: no handler
//! tree: kiosk is not there
//! ```

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix::WeakAddr;
use actix::prelude::*;
use martlet::prelude::*;
use martlet::supervise::{ChildSpec, TreeReport};
use martlet::{ActorGroup, RegistrationId, Registry, RunningService, StartError, message_to};
use serde::Deserialize;

// === an actor like any other ===

/// Puts a coin into the till and answers what is in it. `Deserialize` makes it a payload, `Message` makes it a
/// message; so the actor can be asked over the wire and by its address.
#[derive(Message, Deserialize)]
#[rtype(result = "Result<u64, RpcError>")]
struct Coin(u64);

/// `Supervised` takes a fresh value from the factory at a restart.
#[derive(Default, Supervised)]
struct Till {
    total: u64,
    found_at: FoundAt,
}

/// Where this example finds the actor that the service has started. (An actor that held its own address could never
/// end, so it is a weak one.)
type FoundAt = Arc<Mutex<Option<WeakAddr<Till>>>>;

impl Actor for Till {
    type Context = Context<Self>;

    /// Runs at the start and after each restart. Only the first address is kept: it stays good.
    fn started(&mut self, ctx: &mut Self::Context) {
        let mut found_at = self.found_at.lock().unwrap_or_else(PoisonError::into_inner);
        found_at.get_or_insert_with(|| ctx.address().downgrade());
    }
}

impl Handler<Coin> for Till {
    type Result = Result<u64, RpcError>;

    fn handle(&mut self, Coin(value): Coin, _ctx: &mut Self::Context) -> Self::Result {
        assert!(value != 13, "no such coin");
        self.total += value;
        Ok(self.total)
    }
}

// === an actor that routes others ===

#[derive(Message, Deserialize)]
#[rtype(result = "Result<String, Unexpected>")]
struct Open {
    name: String,
}

#[derive(Message, Deserialize)]
#[rtype(result = "Result<bool, Unexpected>")]
struct Close;

/// Holds the service's registry, by which handlers come and go while traffic flows.
struct Manager {
    registry: Registry,
    open: Option<RegistrationId>,
}

impl Actor for Manager {
    type Context = Context<Self>;
}

impl Handler<Open> for Manager {
    type Result = ResponseActFuture<Self, Result<String, Unexpected>>;

    fn handle(&mut self, Open { name }: Open, _ctx: &mut Self::Context) -> Self::Result {
        let till = ActorGroup::new(Till::default).message::<Coin>(name.as_str()).build();
        let registry = self.registry.clone();
        let group = till.singleton().name(name.as_str());
        let register = async move { registry.register(vec![group]).await };
        Box::pin(register.into_actor(self).map(move |registered, manager, _ctx| {
            manager.open = Some(registered?);
            Ok(name)
        }))
    }
}

impl Handler<Close> for Manager {
    type Result = ResponseFuture<Result<bool, Unexpected>>;

    fn handle(&mut self, _: Close, _ctx: &mut Self::Context) -> Self::Result {
        let (registry, open) = (self.registry.clone(), self.open.take());
        Box::pin(async move {
            match open {
                Some(id) => Ok(registry.unregister(id).await?),
                None => Ok(false),
            }
        })
    }
}

// === the service ===

async fn start(found_at: FoundAt) -> Result<RunningService, StartError> {
    let spec = ChildSpec::new(move || Till { found_at: Arc::clone(&found_at), ..Till::default() })
        // One restart more in a minute and its supervisor gives up: the route answers errors.
        .intensity(3, Duration::from_secs(60));
    // A single one: by default each arbiter has its own, and its own total.
    let till = ActorGroup::from_spec(spec).message::<Coin>("till").build().singleton().name("till");
    let service = Microservice::new().handlers(till).server(TcpServer::bind("127.0.0.1", 0)).start().await?;

    // An actor that runs already is routed by its recipient. This one needs the registry, so it comes second.
    let manager = Manager { registry: service.registry().clone(), open: None }.start();
    let routes = vec![
        message_to::<Open>("open", manager.clone().recipient()),
        message_to::<Close>("close", manager.recipient()),
    ];
    service.registry().register(routes).await?;
    Ok(service)
}

/// The actor below a name, as the supervision tree has it. (The whole tree serialises to JSON.)
fn tell(tree: &TreeReport, name: &str) {
    let Some(till) = tree.find(name).and_then(|group| group.find("Till")) else {
        return println!("tree: {name} is not there");
    };
    let state = format!("{:?}", till.state).to_lowercase();
    let (restarts, s) = (till.restarts, if till.restarts == 1 { "" } else { "s" });
    let cause = till.last_cause.as_ref().map(|cause| format!(", last cause: {cause}")).unwrap_or_default();
    println!("tree: {name}/{} is {state}, {restarts} restart{s}{cause}", till.name);
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let found_at = FoundAt::default();
    let service = start(Arc::clone(&found_at)).await?;
    let client = Transport::from_url(&service.url())?.into_client()?;
    let till = |coin: u64| client.send::<u64>("till", coin);
    let found = found_at.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let address = found.and_then(|found| found.upgrade()).ok_or("the till has not started")?;

    println!("till: {}, then {}", till(10).await?, till(5).await?);
    match till(13).await {
        Err(CallError::Remote(error)) => {
            println!("till, asked for the impossible: {}", error.message().unwrap_or_default());
        }
        other => return Err(format!("an error expected, got {other:?}").into()),
    }
    // What is sent during the pause before a restart waits in the mailbox.
    let (by_route, by_address) = (till(1).await?, address.send(Coin(2)).await??);
    println!("till: {by_route} after the restart, {by_address} by the address from before it");
    tell(&service.tree(), "till");

    let kiosk: String = client.send("open", serde_json::json!({ "name": "kiosk" })).await?;
    println!("the manager opens a second one: {kiosk}");
    println!("kiosk: {}", client.send::<u64>(kiosk.as_str(), 7).await?);
    tell(&service.tree(), "kiosk");
    println!("the manager closes it: {}", client.send::<bool>("close", ()).await?);
    match client.send::<u64>(kiosk.as_str(), 7).await {
        Err(CallError::NoHandler { .. }) => println!("kiosk: no handler"),
        other => return Err(format!("no handler expected, got {other:?}").into()),
    }
    tell(&service.tree(), "kiosk");

    client.close().await;
    service.stop(Duration::from_secs(5)).await;
    Ok(())
}
