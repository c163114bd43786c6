// SPDX-License-Identifier: MIT OR Apache-2.0
//! A message that an actor panics over again and again is refused; those that only waited behind it are not.

use std::time::Duration;

use actix::prelude::{Actor, Context, Handler, Message};
use actix::{ResponseFuture, Supervised};
use martlet_core::handler::SupervisorGroup;
use martlet_core::supervise::{ChildSpec, Strategy, Supervisor};
use martlet_core::{ActorGroup, CallError, HandlerGroup, Microservice, RpcError, message_to};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
use serde_json::{Value, json};

use crate::support::{end, log, ms, paused};

#[derive(serde::Deserialize, Message)]
#[rtype(result = "Result<u64, RpcError>")]
struct Now(String);

#[derive(serde::Deserialize, Message)]
#[rtype(result = "Result<u64, RpcError>")]
struct Later(String);

/// Counts what it has answered since it was made.
#[derive(Default)]
struct Fragile(u64);

impl Actor for Fragile {
    type Context = Context<Self>;
}

impl Supervised for Fragile {
    fn restarting(&mut self, _: &mut Context<Self>) {
        if let Some(fresh) = martlet_core::supervise::rebuilt() {
            *self = fresh;
        }
    }
}

impl Handler<Now> for Fragile {
    type Result = Result<u64, RpcError>;

    fn handle(&mut self, Now(text): Now, _: &mut Context<Self>) -> Self::Result {
        assert!(text != "poison", "deliberate panic");
        self.0 += 1;
        Ok(self.0)
    }
}

impl Handler<Later> for Fragile {
    type Result = ResponseFuture<Result<u64, RpcError>>;

    fn handle(&mut self, Later(text): Later, _: &mut Context<Self>) -> Self::Result {
        Box::pin(async move {
            tokio::task::yield_now().await;
            assert!(text != "poison", "deliberate panic");
            Ok(0)
        })
    }
}

fn spec() -> ChildSpec<Fragile> {
    ChildSpec::new(Fragile::default).intensity(100, Duration::from_secs(60))
}

fn remote(result: Result<u64, CallError>) -> Value {
    match result {
        Err(CallError::Remote(error)) => error.payload().to_value().unwrap(),
        other => panic!("a remote error expected, got {other:?}"),
    }
}

/// Three deaths, then refusals; other messages are served all the while.
async fn kills(group: HandlerGroup) {
    let network = MemoryNetwork::new();
    let service = Microservice::new()
        .on_current_arbiter()
        .handlers(group)
        .server(MemoryServer::new(&network))
        .start()
        .await
        .unwrap();
    let client = MemoryClient::new(&network);
    let seen = log(service.events());
    for _ in 0..3 {
        // One that waits behind the poison is none.
        let (poison, behind) = futures::join!(async { client.send::<u64>("do", "poison").await }, async {
            client.send::<u64>("do", "behind").await
        },);
        let internal = json!({"status": "error", "message": "Internal server error"});
        assert_eq!(remote(poison), internal);
        behind.unwrap();
        tokio::time::sleep(ms(2000)).await;
    }
    for _ in 0..5 {
        assert_eq!(remote(client.send("do", "poison").await)["code"], "POISONED_MESSAGE");
        client.send::<u64>("do", "behind").await.unwrap();
    }
    let seen = seen.lock().clone();
    let count = |name: &str| seen.iter().filter(|text| text.starts_with(name)).count();
    assert_eq!((count("handler_panicked"), count("poison_refused")), (3, 5), "{seen:#?}");
    let report = &service.handler_reports().await.unwrap()[0];
    assert_eq!((report.panicked, report.failed, report.handled), (3, 3, 11));
    end(client, service).await;
}

#[test]
fn an_actor_is_not_killed_by_one_message_for_ever() {
    paused(kills(ActorGroup::from_spec(spec()).message::<Now>("do").build()));
}

#[test]
fn a_panic_in_the_future_that_an_actor_answers_with_counts_too() {
    paused(kills(ActorGroup::from_spec(spec()).message::<Later>("do").build()));
}

#[test]
fn a_child_of_a_family_is_not_killed_by_one_message_for_ever() {
    let family = Supervisor::new(Strategy::OneForAll).child("fragile", |_| spec());
    paused(kills(SupervisorGroup::new("family", family).message::<Fragile, Now>("fragile", "do").build()));
}

#[test]
fn an_actor_that_runs_already_is_not_killed_by_one_message_for_ever() {
    paused(async {
        let place = martlet_core::supervise::Child::root("fragile", "actor");
        let actor = spec().start(place, martlet_core::EventBus::default(), |_| {});
        kills(message_to::<Now>("do", actor.recipient())).await;
    });
}
