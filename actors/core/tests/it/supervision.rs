// SPDX-License-Identifier: MIT OR Apache-2.0
//! Supervision: actors rebuilt behind their address, within an intensity; the tree as a value.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use actix::prelude::{Actor, ActorContext, Addr, AsyncContext, Context, Handler, Message};
use actix::{ActorFutureExt, Supervised, WrapFuture};
use martlet_core::backoff::BackoffOptions;
use martlet_core::supervise::{Child, ChildSpec, ChildState, Escalation, RestartIntensity, RestartPolicy};
use martlet_core::{
    ActorGroup, CallError, ClientProxy, Data, EventBus, HandlerGroup, HandlerInfo, HandlerKind, Microservice,
    Outcome, Pattern, Reply, Request, RpcError, RunningService, StartError, message,
};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
use parking_lot::Mutex;
use serde_json::json;

use crate::support::{log, ms, ok, paused, real};

const PANIC: &str = "deliberate panic";

#[derive(serde::Deserialize, Message, Clone, Copy, PartialEq)]
#[rtype(result = "Result<u64, RpcError>")]
enum Do {
    Count,
    Panic,
    PanicInSpawn,
    PanicInTimer,
    Stop,
}

struct Counter(u64);

impl Actor for Counter {
    type Context = Context<Self>;
}

impl Supervised for Counter {
    fn restarting(&mut self, _: &mut Context<Self>) {
        if let Some(fresh) = martlet_core::supervise::rebuilt() {
            *self = fresh;
        }
    }
}

impl Handler<Do> for Counter {
    type Result = Result<u64, RpcError>;

    fn handle(&mut self, what: Do, ctx: &mut Context<Self>) -> Self::Result {
        match what {
            Do::Count => {}
            Do::Panic => panic!("{PANIC}"),
            Do::PanicInSpawn => {
                ctx.spawn(tokio::task::yield_now().into_actor(self).map(|(), _, _| panic!("{PANIC}")));
            }
            Do::PanicInTimer => {
                ctx.run_later(ms(1), |_, _| panic!("{PANIC}"));
            }
            Do::Stop => ctx.stop(),
        }
        self.0 += 1;
        Ok(self.0)
    }
}

struct Stage {
    actor: Addr<Counter>,
    child: Child,
    gave_up: Arc<Mutex<Option<String>>>,
}

fn start(change: impl FnOnce(ChildSpec<Counter>) -> ChildSpec<Counter>) -> Stage {
    let child = Child::root("counter", "actor");
    let gave_up = Arc::new(Mutex::new(None));
    let tell = Arc::clone(&gave_up);
    let spec = ChildSpec::new(|| Counter(100)).backoff(BackoffOptions::fixed(ms(100)));
    let actor =
        change(spec).start(child.clone(), EventBus::default(), move |cause| *tell.lock() = Some(cause));
    Stage { actor, child, gave_up }
}

#[test]
fn an_actor_that_panics_has_fresh_state_behind_the_same_address() {
    paused(async {
        let stage = start(|spec| spec);
        let ask = |what| stage.actor.send(what);
        assert_eq!(ask(Do::Count).await.unwrap().unwrap(), 101);
        assert_eq!(ask(Do::Count).await.unwrap().unwrap(), 102);
        let began = tokio::time::Instant::now();
        ask(Do::Panic).await.unwrap_err();
        assert_eq!(stage.child.state(), ChildState::Restarting);
        tokio::time::sleep(ms(99)).await;
        assert_eq!(stage.child.state(), ChildState::Restarting);
        // It waits in the mailbox.
        assert_eq!(ask(Do::Count).await.unwrap().unwrap(), 101);
        let waited = began.elapsed();
        assert!(waited >= ms(100) && waited <= ms(103), "{waited:?}");
        let report = stage.child.report();
        assert_eq!((report.restarts, report.state), (1, ChildState::Running));
        assert!(report.last_cause.unwrap().contains(PANIC));
    });
}

#[test]
fn panics_in_spawned_futures_and_timers_are_caught_too() {
    paused(async {
        let stage = start(|spec| spec);
        for (restarts, what) in [(1, Do::PanicInSpawn), (2, Do::PanicInTimer), (3, Do::PanicInSpawn)] {
            assert_eq!(stage.actor.send(what).await.unwrap().unwrap(), 101);
            tokio::time::sleep(ms(200)).await;
            let report = stage.child.report();
            assert_eq!((report.restarts, report.state), (restarts, ChildState::Running));
        }
        assert_eq!(stage.actor.send(Do::Count).await.unwrap().unwrap(), 101);
    });
}

#[test]
fn one_restart_too_many_gives_up_and_closes_the_mailbox() {
    paused(async {
        let stage = start(|spec| spec.intensity(3, Duration::from_secs(10)));
        for _ in 0..3 {
            stage.actor.send(Do::Panic).await.unwrap_err();
            tokio::time::sleep(ms(200)).await;
            assert_eq!(stage.child.state(), ChildState::Running);
        }
        assert!(stage.actor.connected());
        stage.actor.send(Do::Panic).await.unwrap_err();
        tokio::time::sleep(ms(200)).await;
        assert_eq!(stage.child.state(), ChildState::Failed);
        assert!(!stage.actor.connected());
        assert!(stage.gave_up.lock().as_deref().unwrap().contains(PANIC));

        let spaced = start(|spec| spec.intensity(3, Duration::from_secs(10)));
        for _ in 0..20 {
            spaced.actor.send(Do::Panic).await.unwrap_err();
            tokio::time::sleep(ms(3400)).await;
        }
        assert_eq!(spaced.child.state(), ChildState::Running, "old restarts are forgotten");
    });
}

#[test]
fn policies_decide_what_follows_an_end() {
    paused(async {
        for (policy, after_stop, after_panic) in [
            (RestartPolicy::Permanent, ChildState::Running, ChildState::Running),
            (RestartPolicy::Transient, ChildState::Stopped, ChildState::Running),
            (RestartPolicy::Temporary, ChildState::Stopped, ChildState::Failed),
        ] {
            for (what, expected) in [(Do::Stop, after_stop), (Do::Panic, after_panic)] {
                let stage = start(|spec| spec.policy(policy));
                let _ = stage.actor.send(what).await;
                tokio::time::sleep(ms(300)).await;
                assert_eq!(stage.child.state(), expected, "{policy:?}");
                assert_eq!(stage.actor.connected(), expected == ChildState::Running, "{policy:?}");
            }
        }
    });
}

#[test]
fn a_factory_that_panics_is_tried_again_within_the_intensity() {
    paused(async {
        let built = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&built);
        let spec = ChildSpec::new(move || {
            let number = count.fetch_add(1, Ordering::SeqCst);
            assert!(number == 0 || number >= 3, "deliberate panic of the factory");
            Counter(number as u64 * 1000)
        });
        let child = Child::root("counter", "actor");
        let actor =
            spec.backoff(BackoffOptions::fixed(ms(100))).start(child.clone(), EventBus::default(), |_| {});
        actor.send(Do::Panic).await.unwrap_err();
        assert_eq!(actor.send(Do::Count).await.unwrap().unwrap(), 3001);
        assert_eq!(built.load(Ordering::SeqCst), 4);
    });
}

// === in a service ===

async fn serve(groups: Vec<HandlerGroup>) -> (RunningService, ClientProxy) {
    let network = MemoryNetwork::new();
    let service = groups
        .into_iter()
        .fold(Microservice::new().name("shop").on_current_arbiter(), Microservice::handlers)
        .handlers(message("alive", || async { ok(true) }))
        .server(MemoryServer::new(&network))
        .start()
        .await
        .unwrap();
    (service, MemoryClient::new(&network))
}

fn counter_group(spec: ChildSpec<Counter>) -> HandlerGroup {
    ActorGroup::from_spec(spec).message::<Do>("do").build()
}

fn text(result: Result<u64, CallError>) -> String {
    match result {
        Err(CallError::Remote(error)) => error.message().unwrap(),
        other => panic!("a remote error expected, got {other:?}"),
    }
}

#[test]
fn an_actor_that_gave_up_answers_errors_and_the_rest_goes_on() {
    paused(async {
        let spec = ChildSpec::new(|| Counter(0)).intensity(2, Duration::from_secs(60));
        let (service, client) = serve(vec![counter_group(spec)]).await;
        let running = service.clone();
        let run = actix_rt::spawn(async move { running.run_until(std::future::pending::<String>()).await });
        let ask = |what: &'static str| client.send::<u64>("do", what);
        assert_eq!(ask("Count").await.unwrap(), 1);
        for _ in 0..3 {
            assert_eq!(text(ask("Panic").await), "Internal server error");
            tokio::time::sleep(ms(1500)).await;
        }
        for _ in 0..3 {
            assert_eq!(text(ask("Count").await), "Internal server error");
        }
        assert!(client.send::<bool>("alive", 1).await.unwrap());
        assert!(!run.is_finished(), "the service goes on");
        let tree = service.tree();
        assert_eq!(tree.find("Counter").unwrap().children[0].state, ChildState::Failed);
        client.close().await;
        assert!(service.stop(ms(1000)).await.clean);
        run.await.unwrap().unwrap();
    });
}

#[test]
fn an_escalation_stops_the_service_with_a_report() {
    for actor in [true, false] {
        paused(async {
            let group = if actor {
                counter_group(ChildSpec::new(|| Counter(0)).intensity(2, Duration::from_secs(60)))
            } else {
                message("do", |Data(what): Data<Do>| async move {
                    assert!(what != Do::Panic, "{PANIC}");
                    ok(1)
                })
            };
            let group = group.supervision(|supervision| {
                supervision.escalation = Escalation::StopService;
                supervision.poison_after = 0;
                let within = Duration::from_secs(60);
                supervision.intensity = Some(RestartIntensity { max_restarts: 2, within });
            });
            let (service, client) = serve(vec![group]).await;
            let running = service.clone();
            let run =
                actix_rt::spawn(async move { running.run_until(std::future::pending::<String>()).await });
            for _ in 0..3 {
                assert!(!run.is_finished());
                assert_eq!(text(client.send::<u64>("do", "Panic").await), "Internal server error");
                tokio::time::sleep(ms(1500)).await;
            }
            let report = run.await.unwrap().unwrap();
            assert!(!report.clean);
            assert!(report.cause.contains(PANIC), "{}", report.cause);
            client.close().await;
        });
    }
}

#[test]
fn a_handler_that_gave_up_answers_errors() {
    paused(async {
        let group = message("do", |Data(number): Data<u64>| async move {
            assert!(number < 10, "{PANIC}");
            ok(number)
        });
        let group = group.supervision(|supervision| {
            supervision.intensity =
                Some(RestartIntensity { max_restarts: 2, within: Duration::from_secs(60) });
        });
        let (service, client) = serve(vec![group]).await;
        let log = log(service.events());
        for number in [1, 10, 2, 11, 3, 12] {
            assert_eq!(client.send::<u64>("do", number).await.is_ok(), number < 10);
        }
        assert_eq!(text(client.send::<u64>("do", 1).await), "Internal server error");
        assert_eq!(log.lock().iter().filter(|text| text.starts_with("gave_up")).count(), 1);
        assert!(client.send::<bool>("alive", 1).await.unwrap());
        client.close().await;
        service.stop(ms(1000)).await;
    });
}

#[test]
fn requests_that_wait_for_a_place_are_answered_when_their_handler_gives_up() {
    paused(async {
        let group = message("do", |Data(number): Data<u64>| async move {
            tokio::time::sleep(ms(10)).await;
            assert!(number < 10, "{PANIC}");
            ok(number)
        });
        let group = group.concurrency(1).supervision(|supervision| {
            supervision.intensity =
                Some(RestartIntensity { max_restarts: 0, within: Duration::from_secs(60) });
        });
        let (service, client) = serve(vec![group]).await;
        let calls = [10, 1, 2, 3].map(|number| client.send::<u64>("do", number).timeout(ms(1000)));
        for outcome in futures::future::join_all(calls).await {
            assert_eq!(text(outcome), "Internal server error");
        }
        assert_eq!(service.stop(ms(1000)).await.abandoned().count(), 0);
        client.close().await;
    });
}

#[test]
fn a_factory_that_panics_refuses_the_start() {
    paused(async {
        let factory = |_: &_| panic!("deliberate panic of the factory");
        let info = HandlerInfo::new("broken", HandlerKind::Message, Pattern::from("broken"));
        let group = HandlerGroup::from_parts("broken", vec![info], factory);
        let started = Microservice::new().on_current_arbiter().handlers(group.clone()).start().await;
        assert!(matches!(started, Err(StartError::Panicked { .. })), "{started:?}");

        let (service, client) = serve(Vec::new()).await;
        let registered = service.registry().register(vec![message("late", || async { ok(1) }), group]).await;
        assert!(matches!(registered, Err(StartError::Panicked { .. })), "{registered:?}");
        let late = client.send::<u64>("late", 1).await;
        assert!(matches!(late, Err(CallError::NoHandler { .. })), "all of them or none: {late:?}");
        client.close().await;
        service.stop(ms(1000)).await;
    });
}

#[test]
fn a_state_whose_factory_panics_later_gives_up() {
    paused(async {
        let built = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&built);
        let info = HandlerInfo::new("once", HandlerKind::Message, Pattern::from("once"));
        let group = HandlerGroup::from_parts("once", vec![info], move |_| {
            assert!(count.fetch_add(1, Ordering::SeqCst) == 0, "deliberate panic of the factory");
            vec![Box::new(|request: Request| {
                assert!(!request.data::<bool>().unwrap(), "{PANIC}");
                Outcome::Ready(Ok(Reply::Value(request.payload())))
            })]
        });
        let (service, client) = serve(vec![group]).await;
        assert!(!client.send::<bool>("once", false).await.unwrap());
        assert!(client.send::<bool>("once", true).await.is_err());
        assert!(client.send::<bool>("once", false).await.is_err());
        assert_eq!(service.tree().find("once").unwrap().state, ChildState::Failed);
        assert!(client.send::<bool>("alive", 1).await.unwrap());
        client.close().await;
        service.stop(ms(1000)).await;
    });
}

#[test]
fn the_tree_is_a_value_and_json() {
    paused(async {
        let (service, client) = serve(vec![counter_group(ChildSpec::new(|| Counter(0))).singleton()]).await;
        let _ = client.send::<u64>("do", "Panic").await;
        assert_eq!(client.send::<u64>("do", "Count").await.unwrap(), 1);
        let tree = serde_json::to_value(service.tree()).unwrap();
        assert_eq!(tree["name"], "shop");
        assert_eq!(tree["kind"], "service");
        assert_eq!(tree["state"], "running");
        let children = tree["children"].as_array().unwrap();
        let kinds: Vec<_> = children.iter().map(|child| child["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["registry", "listener"]);
        let handlers = children[0]["children"].as_array().unwrap();
        let names: Vec<_> = handlers.iter().map(|child| child["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["Counter", "alive"]);
        let actor = &handlers[0]["children"][0];
        assert_eq!(actor["kind"], "actor");
        assert_eq!(actor["restarts"], 1);
        assert_eq!(actor["state"], "running");
        assert!(actor["lastCause"].as_str().unwrap().contains(PANIC));
        assert_eq!(actor["inFlight"], json!(0));
        client.close().await;
        service.stop(ms(1000)).await;
        assert_eq!(serde_json::to_value(service.tree()).unwrap()["state"], "stopped");
    });
}

#[test]
fn unrouted_actors_end() {
    real(async {
        struct Ends(Arc<AtomicUsize>);
        impl Drop for Ends {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let ended = Arc::new(AtomicUsize::new(0));
        let service = Microservice::new().arbiters(2).start().await.unwrap();
        let group = |ended: &Arc<AtomicUsize>| {
            let ended = Arc::clone(ended);
            let info = HandlerInfo::new("ends", HandlerKind::Message, Pattern::from("ends"));
            HandlerGroup::from_parts("ends", vec![info], move |_| {
                let ends = Ends(Arc::clone(&ended));
                vec![Box::new(move |request: Request| {
                    let _ = &ends;
                    Outcome::Ready(Ok(Reply::Value(request.payload())))
                })]
            })
        };
        for round in 1..=20 {
            let id = service.registry().register(vec![group(&ended)]).await.unwrap();
            service.registry().unregister(id).await.unwrap();
            crate::support::eventually("both replicas are gone", || {
                ended.load(Ordering::SeqCst) == 2 * round
            })
            .await;
        }
        assert!(service.tree().find("ends#0").is_none(), "it has left the tree");
        service.stop(ms(100)).await;
    });
}
