// SPDX-License-Identifier: MIT OR Apache-2.0
//! Supervisors: which children begin again with which, in which order, and what giving up does, level by level.

use std::sync::Arc;
use std::time::Duration;

use actix::Supervised;
use actix::prelude::{Actor, ActorContext, Addr, AsyncContext, Context, Handler, Message, Running};
use martlet_core::backoff::BackoffOptions;
use martlet_core::handler::SupervisorGroup;
use martlet_core::supervise::{
    Child, ChildSpec, ChildState, Escalation, Family, RestartPolicy, Strategy, Supervisor, TreeReport,
};
use martlet_core::{CallError, EventBus, Microservice, RpcError, StartError};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
use parking_lot::Mutex;

use crate::support::{log, ms, paused, real};

/// What happened, in order.
type Diary = Arc<Mutex<Vec<String>>>;

#[derive(serde::Deserialize, Message, Clone, Copy, PartialEq)]
#[rtype(result = "Result<u64, RpcError>")]
enum Do {
    Count,
    Panic,
    Stop,
}

/// Counts; and writes down when it starts and stops.
struct Worker {
    name: &'static str,
    count: u64,
    diary: Diary,
    /// Refuses to stop for this long.
    lingers: Option<Duration>,
}

impl Worker {
    fn note(&self, what: &str) {
        self.diary.lock().push(format!("{what} {}", self.name));
    }
}

impl Actor for Worker {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Context<Self>) {
        self.note("start");
    }

    fn stopping(&mut self, ctx: &mut Context<Self>) -> Running {
        match self.lingers.take() {
            Some(time) => {
                self.note("asked");
                ctx.run_later(time, |_, ctx| ctx.stop());
                Running::Continue
            }
            None => Running::Stop,
        }
    }

    fn stopped(&mut self, _: &mut Context<Self>) {
        self.note("stop");
    }
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

    fn handle(&mut self, what: Do, ctx: &mut Context<Self>) -> Self::Result {
        match what {
            Do::Count => {}
            Do::Panic => panic!("deliberate panic"),
            Do::Stop => ctx.stop(),
        }
        self.count += 1;
        Ok(self.count)
    }
}

fn worker(name: &'static str, diary: &Diary) -> ChildSpec<Worker> {
    let diary = Arc::clone(diary);
    ChildSpec::new(move || Worker { name, count: 0, diary: Arc::clone(&diary), lingers: None })
        .backoff(BackoffOptions::fixed(ms(100)))
}

/// A supervisor of workers a, b and c.
fn three(strategy: Strategy, diary: &Diary, policy: RestartPolicy) -> Supervisor {
    ["a", "b", "c"].into_iter().fold(Supervisor::new(strategy), |supervisor, name| {
        let diary = Arc::clone(diary);
        supervisor.child(name, move |_| worker(name, &diary).policy(policy))
    })
}

struct Stage {
    family: Family,
    place: Child,
    diary: Diary,
    log: Arc<Mutex<Vec<String>>>,
    gave_up: Arc<Mutex<Option<String>>>,
}

impl Stage {
    fn start(supervisor: &Supervisor, diary: Diary) -> Self {
        let (place, events) = (Child::root("family", "supervisor"), EventBus::default());
        let log = log(&events);
        let gave_up = Arc::new(Mutex::new(None));
        let tell = Arc::clone(&gave_up);
        let family = supervisor.start(place.clone(), events, move |cause| *tell.lock() = Some(cause));
        Self { family, place, diary, log, gave_up }
    }

    fn three(strategy: Strategy) -> Self {
        let diary = Diary::default();
        Self::start(&three(strategy, &diary, RestartPolicy::Permanent), diary)
    }

    async fn ask(&self, child: &str, what: Do) -> Option<u64> {
        let child: Addr<Worker> = self.family.address(child)?;
        child.send(what).await.ok()?.ok()
    }

    /// What has happened since the last look.
    fn happened(&self) -> String {
        std::mem::take(&mut *self.diary.lock()).join(", ")
    }

    /// State and restarts of each child.
    fn children(&self) -> Vec<(ChildState, u64)> {
        self.place.report().children.iter().map(|child| (child.state, child.restarts)).collect()
    }
}

/// Longer than any pause, shorter than any period.
async fn settle() {
    tokio::time::sleep(ms(1500)).await;
}

#[test]
fn children_start_in_order_and_stop_in_reverse() {
    paused(async {
        let stage = Stage::three(Strategy::OneForOne);
        settle().await;
        assert_eq!(stage.happened(), "start a, start b, start c");
        assert_eq!(stage.family.children(), ["a", "b", "c"]);
        let address: Addr<Worker> = stage.family.address("b").unwrap();
        stage.family.stop().await;
        assert_eq!(stage.happened(), "stop c, stop b, stop a");
        assert!(!address.connected());
        assert_eq!(stage.children(), [(ChildState::Stopped, 0); 3]);
        assert_eq!(stage.place.state(), ChildState::Stopped);
        assert!(stage.family.address::<Worker>("b").is_none(), "it is over");
        assert_eq!(*stage.gave_up.lock(), None);
        // Again does nothing.
        stage.family.stop().await;
    });
}

#[test]
fn a_dropped_family_stops_in_reverse_order_though_others_hold_its_addresses() {
    paused(async {
        let Stage { family, diary, place, .. } = Stage::three(Strategy::OneForAll);
        let address: Addr<Worker> = family.address("a").unwrap();
        let clone = family.clone();
        drop(family);
        settle().await;
        assert_eq!(address.send(Do::Count).await.unwrap().unwrap(), 1);
        drop(clone);
        settle().await;
        assert_eq!(diary.lock().join(", "), "start a, start b, start c, stop c, stop b, stop a");
        assert!(!address.connected());
        assert_eq!(place.state(), ChildState::Stopped);
    });
}

#[test]
fn the_strategy_says_which_children_begin_again_with_a_child_that_ended() {
    // Who begins again with b; what is heard of it.
    let expected = [
        (Strategy::OneForOne, "start b", [0, 1, 0], [3, 1, 3]),
        (Strategy::OneForAll, "stop c, stop a, start a, start b, start c", [1, 1, 1], [1, 1, 1]),
        (Strategy::RestForOne, "stop c, start b, start c", [0, 1, 1], [3, 1, 1]),
    ];
    for (strategy, heard, restarts, counts) in expected {
        for (how, prefix) in [(Do::Panic, ""), (Do::Stop, "stop b, ")] {
            paused(async move {
                let stage = Stage::three(strategy);
                let addresses = ["a", "b", "c"].map(|name| stage.family.address::<Worker>(name).unwrap());
                for address in &addresses {
                    assert_eq!(address.send(Do::Count).await.unwrap().unwrap(), 1);
                    assert_eq!(address.send(Do::Count).await.unwrap().unwrap(), 2);
                }
                stage.happened();
                let _ = stage.ask("b", how).await;
                tokio::time::sleep(ms(99)).await;
                let states = stage.children().into_iter().map(|(state, _)| state == ChildState::Restarting);
                assert_eq!(states.collect::<Vec<_>>(), restarts.map(|n| n == 1), "{strategy:?}");
                settle().await;
                assert_eq!(stage.happened(), format!("{prefix}{heard}"), "{strategy:?} {}", how as u8);
                let running = restarts.map(|restarts| (ChildState::Running, restarts));
                assert_eq!(stage.children(), running, "{strategy:?}");
                // By the addresses from before.
                for (address, count) in addresses.iter().zip(counts) {
                    assert_eq!(address.send(Do::Count).await.unwrap().unwrap(), count, "{strategy:?}");
                }
                let told = stage.log.lock().iter().filter(|text| text.starts_with("restarted")).count();
                assert_eq!(told as u64, restarts.iter().sum::<u64>(), "{:?}", stage.log.lock());
                stage.family.stop().await;
            });
        }
    }
}

#[test]
fn policies_hold_within_a_family() {
    use ChildState::{Failed, Running, Stopped};
    // What became of the child, how, and whether its sibling began again with it.
    let expected = [
        (RestartPolicy::Permanent, Do::Stop, Running, 1),
        (RestartPolicy::Permanent, Do::Panic, Running, 1),
        (RestartPolicy::Transient, Do::Stop, Stopped, 0),
        (RestartPolicy::Transient, Do::Panic, Running, 1),
        (RestartPolicy::Temporary, Do::Stop, Stopped, 0),
        (RestartPolicy::Temporary, Do::Panic, Failed, 0),
    ];
    for (policy, how, state, restarts) in expected {
        paused(async move {
            let diary = Diary::default();
            let (one, two) = (Arc::clone(&diary), Arc::clone(&diary));
            let family = Supervisor::new(Strategy::OneForAll)
                .child("sibling", move |_| worker("sibling", &one))
                .child("it", move |_| worker("it", &two).policy(policy));
            let stage = Stage::start(&family, diary);
            let it: Addr<Worker> = stage.family.address("it").unwrap();
            let _ = it.send(how).await;
            settle().await;
            assert_eq!(stage.children(), [(Running, restarts), (state, restarts)], "{policy:?}");
            assert_eq!(it.connected(), state == Running, "what is over is closed: {policy:?}");
            // A sibling's restart does not bring back what is over.
            assert_eq!(stage.ask("sibling", Do::Panic).await, None);
            settle().await;
            let own = if state == Running && policy != RestartPolicy::Temporary { restarts + 1 } else { 0 };
            assert_eq!(stage.children(), [(Running, restarts + 1), (state, own)], "{policy:?}");
            stage.family.stop().await;
        });
    }
}

#[test]
fn a_temporary_child_that_is_stopped_for_a_sibling_is_over() {
    paused(async {
        let diary = Diary::default();
        let stage = Stage::start(&three(Strategy::OneForAll, &diary, RestartPolicy::Temporary), diary);
        let (one, two) = (Diary::default(), Diary::default());
        drop(stage);
        let family = Supervisor::new(Strategy::OneForAll)
            .child("permanent", move |_| worker("permanent", &one))
            .child("temporary", move |_| worker("temporary", &two).policy(RestartPolicy::Temporary));
        let stage = Stage::start(&family, Diary::default());
        assert_eq!(stage.ask("permanent", Do::Panic).await, None);
        settle().await;
        assert_eq!(stage.children(), [(ChildState::Running, 1), (ChildState::Stopped, 0)]);
        assert_eq!(stage.ask("temporary", Do::Count).await, None);
        let cause = stage.place.report().children[1].last_cause.clone().unwrap();
        assert!(cause.contains("permanent ended: ") && cause.contains("deliberate panic"), "{cause}");
    });
}

#[test]
fn one_end_too_many_of_any_child_gives_up() {
    for strategy in [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne] {
        paused(async move {
            let diary = Diary::default();
            let family =
                three(strategy, &diary, RestartPolicy::Permanent).intensity(2, Duration::from_secs(60));
            let stage = Stage::start(&family, diary);
            // Different children count together; several that begin again count once.
            for child in ["a", "b"] {
                assert_eq!(stage.ask(child, Do::Panic).await, None);
                settle().await;
                assert!(stage.children().iter().all(|(state, _)| *state == ChildState::Running));
            }
            let address: Addr<Worker> = stage.family.address("a").unwrap();
            stage.happened();
            assert_eq!(stage.ask("c", Do::Panic).await, None);
            settle().await;
            // The others are stopped in reverse order; actix tells the one that panicked when it is dropped.
            assert_eq!(stage.happened(), "stop b, stop a, stop c");
            let states = stage.children().into_iter().map(|(state, _)| state);
            assert_eq!(
                states.collect::<Vec<_>>(),
                [ChildState::Stopped, ChildState::Stopped, ChildState::Failed]
            );
            assert!(!address.connected());
            let cause = stage.gave_up.lock().clone().unwrap();
            assert!(
                cause.starts_with("c ended too often: ") && cause.contains("deliberate panic"),
                "{cause}"
            );
            let report = stage.place.report();
            assert_eq!((report.state, report.last_cause), (ChildState::Failed, Some(cause)));
            assert_eq!(stage.log.lock().iter().filter(|text| text.starts_with("gave_up: family")).count(), 1);
            stage.family.stop().await;
        });
    }
}

#[test]
fn old_restarts_are_forgotten() {
    paused(async {
        let diary = Diary::default();
        let family = three(Strategy::OneForAll, &diary, RestartPolicy::Permanent);
        let stage = Stage::start(&family.intensity(2, Duration::from_secs(10)), diary);
        for _ in 0..10 {
            assert_eq!(stage.ask("b", Do::Panic).await, None);
            tokio::time::sleep(ms(5100)).await;
        }
        assert_eq!(stage.children(), [(ChildState::Running, 10); 3]);
    });
}

#[test]
fn ends_at_one_moment_are_one_restart_where_children_go_together() {
    for (strategy, restarts) in
        [(Strategy::OneForOne, [1, 1, 1]), (Strategy::OneForAll, [1; 3]), (Strategy::RestForOne, [1; 3])]
    {
        paused(async move {
            let stage = Stage::three(strategy);
            settle().await;
            for child in ["c", "a", "b"] {
                let child: Addr<Worker> = stage.family.address(child).unwrap();
                child.try_send(Do::Panic).unwrap();
                // Waits, and is handled by the fresh state.
                child.try_send(Do::Count).unwrap();
            }
            settle().await;
            assert_eq!(stage.children(), restarts.map(|n| (ChildState::Running, n)), "{strategy:?}");
            for child in ["a", "b", "c"] {
                assert_eq!(stage.ask(child, Do::Count).await, Some(2), "{strategy:?}");
            }
        });
    }
}

#[test]
fn a_child_has_its_shutdown_time() {
    paused(async {
        for (lingers, shutdown, took, heard) in [
            (ms(300), ms(400), ms(300), "asked slow, stop slow, stop first"),
            // Dropped, which actix tells it, too.
            (ms(300), ms(200), ms(200), "asked slow, stop first, stop slow"),
        ] {
            let diary = Diary::default();
            let (one, two) = (Arc::clone(&diary), Arc::clone(&diary));
            let family = Supervisor::new(Strategy::OneForOne).child("first", move |_| worker("first", &one));
            let family = family.child("slow", move |_| {
                let diary = Arc::clone(&two);
                let slow = move || Worker {
                    name: "slow",
                    count: 0,
                    diary: Arc::clone(&diary),
                    lingers: Some(lingers),
                };
                ChildSpec::new(slow).shutdown(shutdown)
            });
            let stage = Stage::start(&family, diary);
            settle().await;
            stage.happened();
            let began = tokio::time::Instant::now();
            stage.family.stop().await;
            let elapsed = began.elapsed();
            assert!(elapsed >= took && elapsed <= took + ms(3), "{elapsed:?}");
            assert_eq!(stage.happened(), heard);
        }
    });
}

#[test]
fn a_factory_that_panics_at_a_restart_is_one_more_end() {
    paused(async {
        let built = Arc::new(Mutex::new(0));
        let diary = Diary::default();
        let (one, two, count) = (Arc::clone(&diary), Arc::clone(&diary), Arc::clone(&built));
        let family = Supervisor::new(Strategy::RestForOne).child("breaks", move |_| {
            let (diary, count) = (Arc::clone(&one), Arc::clone(&count));
            let breaks = move || {
                let mut count = count.lock();
                *count += 1;
                assert!(*count == 1 || *count > 3, "deliberate panic of the factory");
                Worker { name: "breaks", count: 0, diary: Arc::clone(&diary), lingers: None }
            };
            ChildSpec::new(breaks).backoff(BackoffOptions::fixed(ms(100)))
        });
        let family = family.child("after", move |_| worker("after", &two));
        let stage = Stage::start(&family, diary);
        settle().await;
        stage.happened();
        assert_eq!(stage.ask("breaks", Do::Panic).await, None);
        settle().await;
        assert_eq!(stage.happened(), "stop after, start breaks, start after");
        assert_eq!(stage.children(), [(ChildState::Running, 1); 2]);
        assert_eq!(*built.lock(), 4);
    });
}

// === who knows whom ===

/// Asks its sibling.
struct Asks(Addr<Worker>);

impl Actor for Asks {
    type Context = Context<Self>;
}

impl Supervised for Asks {}

impl Handler<Do> for Asks {
    type Result = actix::ResponseFuture<Result<u64, RpcError>>;

    fn handle(&mut self, what: Do, _: &mut Context<Self>) -> Self::Result {
        let asked = self.0.send(what);
        Box::pin(async move { asked.await.map_err(RpcError::unexpected)? })
    }
}

#[test]
fn siblings_find_each_other_and_those_above_by_name() {
    paused(async {
        let diary = Diary::default();
        let (one, two) = (Arc::clone(&diary), Arc::clone(&diary));
        let asks = |of: &'static str| {
            move |siblings: &martlet_core::supervise::Siblings<'_>| {
                let address = siblings.address::<Worker>(of);
                ChildSpec::new(move || Asks(address.clone()))
            }
        };
        let below = Supervisor::new(Strategy::OneForOne)
            .child("b", move |_| worker("inner b", &two))
            .child("asks a", asks("a"))
            .child("asks b", asks("b"));
        let family = Supervisor::new(Strategy::OneForAll)
            .child("a", {
                let diary = Arc::clone(&one);
                move |_| worker("a", &diary)
            })
            .child("b", move |_| worker("outer b", &one))
            .supervisor("below", below)
            .child("last", asks("below/b"));
        let stage = Stage::start(&family, diary);
        assert_eq!(stage.family.children(), ["a", "b", "below/asks a", "below/asks b", "below/b", "last"]);
        let ask = async |path: &str| {
            let child: Addr<Asks> = stage.family.address(path).unwrap();
            child.send(Do::Count).await.unwrap().unwrap()
        };
        // The nearest of the name.
        assert_eq!((ask("below/asks a").await, ask("below/asks b").await, ask("last").await), (1, 1, 2));
        assert_eq!(stage.ask("b", Do::Count).await, Some(1));
        assert!(stage.family.address::<Asks>("a").is_none(), "another type");
        assert!(stage.family.address::<Worker>("c").is_none());
        // The addresses stay good over a restart of everything.
        assert_eq!(stage.ask("a", Do::Panic).await, None);
        settle().await;
        assert_eq!((ask("below/asks a").await, ask("below/asks b").await, ask("last").await), (1, 1, 2));
    });
}

#[test]
fn a_sibling_that_was_not_started_before_is_a_mistake_that_shows_at_the_start() {
    for (name, told) in [("later", "no child `later` was started before; there are: a"), ("a", "is not a")] {
        paused(async move {
            let diary = Diary::default();
            let (one, kept) = (Arc::clone(&diary), Arc::clone(&diary));
            let family = Supervisor::new(Strategy::OneForOne)
                .child("a", move |_| worker("a", &one))
                .child("asks", move |siblings| {
                    // Of another type in the second round.
                    let address = siblings.address::<Asks>(name);
                    ChildSpec::new(move || Other(address.clone()))
                })
                .child("later", |_| ChildSpec::new(|| -> Asks { unreachable!("not built") }));
            let group = SupervisorGroup::new("family", family).message::<Asks, Do>("later", "do").build();
            let started = Microservice::new().on_current_arbiter().handlers(group).start().await;
            match started {
                Err(StartError::Panicked { cause, .. }) => assert!(cause.contains(told), "{cause}"),
                other => panic!("{other:?}"),
            }
            settle().await;
            assert!(
                !kept.lock().contains(&"start a".to_owned()) || kept.lock().contains(&"stop a".to_owned())
            );
        });
    }
}

/// Has an address, and does nothing with it.
struct Other(#[expect(dead_code, reason = "its type is what matters")] Addr<Asks>);

impl Actor for Other {
    type Context = Context<Self>;
}

impl Supervised for Other {}

#[test]
#[should_panic(expected = "there is a child `a` already")]
fn two_children_of_one_name_are_refused() {
    let diary = Diary::default();
    let _ = three(Strategy::OneForOne, &diary, RestartPolicy::Permanent)
        .child("a", move |_| worker("a", &Diary::default()));
}

// === levels ===

/// `outer` before, then `below` with a, b and c, then `after`.
fn two_levels(diary: &Diary, below: Strategy, above: Strategy) -> Supervisor {
    let (one, two) = (Arc::clone(diary), Arc::clone(diary));
    Supervisor::new(above)
        .intensity(1, Duration::from_secs(600))
        .child("before", move |_| worker("before", &one))
        .supervisor(
            "below",
            three(below, diary, RestartPolicy::Permanent)
                .intensity(1, Duration::from_secs(600))
                .backoff(BackoffOptions::fixed(ms(100))),
        )
        .child("after", move |_| worker("after", &two))
}

#[test]
fn a_supervisor_that_gave_up_is_begun_again_by_the_one_above() {
    let expected = [
        (Strategy::OneForOne, "start a, start b, start c", [0, 1, 0]),
        (Strategy::RestForOne, "stop after, start a, start b, start c, start after", [0, 1, 1]),
        (
            Strategy::OneForAll,
            "stop after, stop before, start before, start a, start b, start c, start after",
            [1, 1, 1],
        ),
    ];
    for (above, heard, restarts) in expected {
        paused(async move {
            let diary = Diary::default();
            let stage = Stage::start(&two_levels(&diary, Strategy::OneForOne, above), diary);
            assert_eq!(stage.ask("below/b", Do::Panic).await, None);
            settle().await;
            stage.happened();
            let address: Addr<Worker> = stage.family.address("below/b").unwrap();
            // One too many for the lower one: it stops what it has; the upper one begins it again.
            assert_eq!(stage.ask("below/b", Do::Panic).await, None);
            settle().await;
            assert_eq!(stage.happened(), format!("stop c, stop a, {heard}"), "{above:?}");
            assert_eq!(stage.children(), restarts.map(|n| (ChildState::Running, n)), "{above:?}");
            assert_eq!(address.send(Do::Count).await.unwrap().unwrap(), 1, "by the address from before");
            // It counts from zero: one more end is within its intensity.
            assert_eq!(stage.ask("below/c", Do::Panic).await, None);
            settle().await;
            assert_eq!(*stage.gave_up.lock(), None);
            // But then it gives up again, and with it the upper one.
            assert_eq!(stage.ask("below/a", Do::Panic).await, None);
            settle().await;
            let cause = stage.gave_up.lock().clone().unwrap();
            assert!(cause.starts_with("below ended too often: a ended too often: "), "{cause}");
            assert!(!address.connected());
            assert_eq!(stage.place.state(), ChildState::Failed);
            let below = &stage.place.report().children[1];
            assert_eq!(below.state, ChildState::Failed);
            stage.family.stop().await;
        });
    }
}

#[test]
fn levels_stop_in_reverse_order() {
    paused(async {
        let diary = Diary::default();
        let stage = Stage::start(&two_levels(&diary, Strategy::OneForOne, Strategy::OneForOne), diary);
        settle().await;
        assert_eq!(stage.happened(), "start before, start a, start b, start c, start after");
        let report = stage.place.report();
        assert_eq!(report.children[1].kind, "supervisor");
        assert_eq!(report.children[1].children.len(), 3);
        stage.family.stop().await;
        assert_eq!(stage.happened(), "stop after, stop c, stop b, stop a, stop before");
        assert_eq!(stage.place.report().children[1].children[0].state, ChildState::Stopped);
    });
}

#[test]
fn a_restart_from_above_takes_along_what_waits_for_one_below() {
    paused(async {
        let diary = Diary::default();
        let stage = Stage::start(&two_levels(&diary, Strategy::OneForOne, Strategy::OneForAll), diary);
        settle().await;
        stage.happened();
        // b waits out its pause when `before` ends, and takes everything along.
        assert_eq!(stage.ask("below/b", Do::Panic).await, None);
        tokio::time::sleep(ms(50)).await;
        assert_eq!(stage.ask("before", Do::Panic).await, None);
        settle().await;
        assert_eq!(
            stage.happened(),
            "stop after, stop c, stop a, start before, start a, start b, start c, start after"
        );
        assert_eq!(stage.ask("below/b", Do::Count).await, Some(1));
    });
}

// === in a service ===

#[test]
fn a_family_is_routed_and_seen_in_the_tree_and_escalates() {
    for escalation in [Escalation::Isolate, Escalation::StopService] {
        paused(async move {
            let diary = Diary::default();
            let family = two_levels(&diary, Strategy::OneForAll, Strategy::RestForOne);
            let group = SupervisorGroup::new("shop", family)
                .message::<Worker, Do>("before", "before")
                .message::<Worker, Do>("below/b", "b")
                .event::<Worker, Do>("after", "after")
                .build()
                .supervision(|supervision| {
                    supervision.escalation = escalation;
                    supervision.poison_after = 0;
                });
            let network = MemoryNetwork::new();
            let service = Microservice::new().on_current_arbiter().handlers(group);
            let service = service.server(MemoryServer::new(&network)).start().await.unwrap();
            let client = MemoryClient::new(&network);
            let running = service.clone();
            let run =
                actix_rt::spawn(async move { running.run_until(std::future::pending::<String>()).await });
            assert_eq!(client.send::<u64>("before", "Count").await.unwrap(), 1);
            assert_eq!(client.send::<u64>("b", "Count").await.unwrap(), 1);
            client.emit("after", "Count").await.unwrap();
            let find = |tree: &TreeReport, name: &str| {
                let found = tree.find("shop").unwrap().find(name).unwrap().clone();
                (found.kind, found.state, found.restarts)
            };
            let tree = service.tree();
            assert_eq!(find(&tree, "below"), ("supervisor", ChildState::Running, 0));
            assert_eq!(find(&tree, "b"), ("actor", ChildState::Running, 0));
            for _ in 0..4 {
                assert!(!run.is_finished());
                client.send::<u64>("b", "Panic").await.unwrap_err();
                settle().await;
            }
            match escalation {
                Escalation::Isolate => {
                    assert!(matches!(
                        client.send::<u64>("before", "Count").await,
                        Err(CallError::Remote(error)) if error.message().as_deref() == Some("Internal server error")
                    ));
                    assert_eq!(find(&service.tree(), "below").1, ChildState::Failed);
                    assert!(!run.is_finished());
                    service.stop(ms(1000)).await;
                }
                Escalation::StopService => {
                    let report = run.await.unwrap().unwrap();
                    assert!(!report.clean);
                    assert!(report.cause.starts_with("below ended too often: "), "{}", report.cause);
                }
            }
            client.close().await;
        });
    }
}

#[test]
fn a_stopping_service_stops_its_families_in_reverse_order() {
    real(async {
        for arbiters in [1, 2] {
            let diary = Diary::default();
            let family = two_levels(&diary, Strategy::OneForOne, Strategy::OneForOne);
            let group = SupervisorGroup::new("shop", family).message::<Worker, Do>("before", "do").build();
            let network = MemoryNetwork::new();
            let service = Microservice::new().arbiters(arbiters).handlers(group.singleton());
            let service = service.server(MemoryServer::new(&network)).start().await.unwrap();
            let client = MemoryClient::new(&network);
            assert_eq!(client.send::<u64>("do", "Count").await.unwrap(), 1);
            diary.lock().clear();
            client.close().await;
            assert!(service.stop(ms(5000)).await.clean);
            assert_eq!(diary.lock().join(", "), "stop after, stop c, stop b, stop a, stop before");
        }
    });
}

#[test]
fn an_unrouted_family_stops() {
    paused(async {
        let diary = Diary::default();
        let service = Microservice::new().on_current_arbiter().start().await.unwrap();
        let family = three(Strategy::OneForOne, &diary, RestartPolicy::Permanent);
        let group = SupervisorGroup::new("shop", family).message::<Worker, Do>("a", "do").build();
        let id = service.registry().register(vec![group]).await.unwrap();
        settle().await;
        assert!(service.tree().find("c").is_some());
        service.registry().unregister(id).await.unwrap();
        settle().await;
        assert_eq!(diary.lock().join(", "), "start a, start b, start c, stop c, stop b, stop a");
        assert!(service.tree().find("shop").is_none(), "it has left the tree");
        service.stop(ms(100)).await;
    });
}

#[test]
fn in_a_storm_of_ends_every_request_has_its_answer_and_all_are_back_at_its_end() {
    for strategy in [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne] {
        paused(async move {
            let diary = Diary::default();
            let below =
                three(strategy, &diary, RestartPolicy::Permanent).intensity(20, Duration::from_secs(1));
            let one = Arc::clone(&diary);
            let family = Supervisor::new(strategy)
                .intensity(1_000_000, Duration::from_secs(1))
                .child("a", move |_| worker("top", &one))
                .supervisor("below", below.backoff(BackoffOptions::fixed(ms(50))));
            let children = ["a", "below/a", "below/b", "below/c"];
            let group = children.into_iter().fold(SupervisorGroup::new("shop", family), |group, child| {
                group.message::<Worker, Do>(child, child)
            });
            let group = group.build().supervision(|supervision| supervision.poison_after = 0);
            let network = MemoryNetwork::new();
            let service = Microservice::new().on_current_arbiter().handlers(group);
            let service = service.server(MemoryServer::new(&network)).start().await.unwrap();
            let client = MemoryClient::new(&network);
            let calls = (0..2000_u64).map(|number| {
                let client = client.clone();
                async move {
                    tokio::time::sleep(ms(number * 7 % 3000)).await;
                    let what = ["Count", "Count", "Panic", "Count", "Stop", "Count"][number as usize % 6];
                    client.send::<u64>(children[(number / 6) as usize % 4], what).no_timeout().await.is_ok()
                }
            });
            let answers = futures::future::join_all(calls).await;
            let answered = answers.iter().filter(|ok| **ok).count();
            assert!(answered > 500 && answered < 2000, "{strategy:?}: {answered}");
            tokio::time::sleep(ms(10_000)).await;
            let tree = service.tree();
            for child in ["top", "below", "b", "c"] {
                let name = if child == "top" { "a" } else { child };
                let found = tree.find("shop").unwrap().find(name).unwrap();
                assert_eq!(found.state, ChildState::Running, "{strategy:?}: {found:?}");
                assert!(found.restarts > 0, "{strategy:?}: {found:?}");
            }
            for child in children {
                assert!(client.send::<u64>(child, "Count").await.is_ok(), "{strategy:?}: {child}");
            }
            assert_eq!(client.occupied(), 0);
            client.close().await;
            assert!(service.stop(ms(1000)).await.clean);
        });
    }
}
