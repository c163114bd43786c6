// SPDX-License-Identifier: MIT OR Apache-2.0
//! Actors that supervise actors: what gives up escalates to its parent, and from there on.

use std::time::Duration;

use actix::Supervised;
use actix::prelude::{Actor, Addr, AsyncContext, Context, Handler, Message, ResponseFuture};
use martlet_core::handler::ReplicaContext;
use martlet_core::supervise::{ChildSpec, ChildState, Escalation, TreeReport};
use martlet_core::{ActorGroup, Microservice, RpcError};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};

use crate::support::{ms, paused};

#[derive(serde::Deserialize, Message)]
#[rtype(result = "Result<u64, RpcError>")]
enum Do {
    Count,
    Panic,
}

#[derive(Message)]
#[rtype(result = "()")]
struct GaveUp(String);

struct Worker(u64);

impl Actor for Worker {
    type Context = Context<Self>;
}

impl Supervised for Worker {
    fn restarting(&mut self, _: &mut Context<Self>) {
        if let Some(fresh) = martlet_core::supervise::rebuilt() {
            *self = fresh;
        }
    }
}

impl Handler<Do> for Worker {
    type Result = Result<u64, RpcError>;

    fn handle(&mut self, what: Do, _: &mut Context<Self>) -> Self::Result {
        assert!(matches!(what, Do::Count), "deliberate panic");
        self.0 += 1;
        Ok(self.0)
    }
}

/// Has a worker; begins anew when that one gave up.
struct Parent {
    place: ReplicaContext,
    worker: Option<Addr<Worker>>,
}

impl Actor for Parent {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        let parent = ctx.address().downgrade();
        let place = self.place.child.child("worker", "actor");
        let spec = ChildSpec::new(|| Worker(0)).intensity(1, Duration::from_secs(60));
        self.worker = Some(spec.start(place, self.place.events.clone(), move |cause| {
            if let Some(parent) = parent.upgrade() {
                parent.try_send(GaveUp(cause)).unwrap();
            }
        }));
    }
}

impl Supervised for Parent {
    fn restarting(&mut self, _: &mut Context<Self>) {
        if let Some(fresh) = martlet_core::supervise::rebuilt() {
            *self = fresh;
        }
    }
}

impl Handler<Do> for Parent {
    type Result = ResponseFuture<Result<u64, RpcError>>;

    fn handle(&mut self, what: Do, _: &mut Context<Self>) -> Self::Result {
        let worker = self.worker.clone().unwrap();
        Box::pin(async move { worker.send(what).await.map_err(RpcError::unexpected)? })
    }
}

impl Handler<GaveUp> for Parent {
    type Result = ();

    fn handle(&mut self, GaveUp(cause): GaveUp, _: &mut Context<Self>) {
        panic!("the worker gave up: {cause}");
    }
}

#[test]
fn what_gives_up_escalates_level_by_level_up_to_the_service() {
    paused(async {
        let group = ActorGroup::supervising(|place| {
            let place = place.clone();
            let parent = move || Parent { place: place.clone(), worker: None };
            ChildSpec::new(parent).intensity(1, Duration::from_secs(60))
        });
        let group = group.message::<Do>("do").build().supervision(|supervision| {
            supervision.escalation = Escalation::StopService;
            supervision.poison_after = 0;
        });
        let network = MemoryNetwork::new();
        let service = Microservice::new().on_current_arbiter().handlers(group);
        let service = service.server(MemoryServer::new(&network)).start().await.unwrap();
        let client = MemoryClient::new(&network);
        let running = service.clone();
        let run = actix_rt::spawn(async move { running.run_until(std::future::pending::<String>()).await });
        let count = async || client.send::<u64>("do", "Count").await.unwrap();
        let panic = async || {
            client.send::<u64>("do", "Panic").await.unwrap_err();
            // Longer than any backoff.
            tokio::time::sleep(ms(1500)).await;
        };
        // The parent's place is below its group's, the worker's below the parent's.
        let tree = || service.tree();
        let restarts = |tree: &TreeReport| {
            let parent = &tree.find("Parent").unwrap().children[0];
            let workers = parent.children.iter().filter(|worker| worker.state == ChildState::Running);
            (parent.restarts, workers.map(|worker| worker.restarts).collect::<Vec<_>>())
        };
        assert_eq!((count().await, count().await), (1, 2));
        assert_eq!(restarts(&tree()), (0, vec![0]));
        // The worker alone begins anew.
        panic().await;
        assert_eq!((count().await, restarts(&tree())), (1, (0, vec![1])));
        // It gives up: its parent begins anew, with a fresh worker.
        panic().await;
        assert_eq!((count().await, restarts(&tree())), (1, (1, vec![0])));
        assert!(!run.is_finished());
        // Once more, and the parent gives up: the service stops.
        panic().await;
        panic().await;
        let report = run.await.unwrap().unwrap();
        assert!(!report.clean);
        assert!(report.cause.contains("the worker gave up: deliberate panic"), "{}", report.cause);
        client.close().await;
    });
}
