// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers: how they are found, how many there are, what they are given.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use actix::prelude::{Actor, Context, Message};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use martlet_core::{
    ActorGroup, CallError, Client, ClientName, Data, FromRequest, HandlerGroup, Microservice, Outcome,
    Pattern, Request, RpcError, StartError, State, TransportId, message,
};
use martlet_core::{HandlerInfo, HandlerKind};
use parking_lot::Mutex;
use serde_json::json;

use super::{Harness, Names, Stage, is_nobody, ok, patience, small};

/// Strings, numbers and objects; the order of an object's keys does not matter.
pub async fn patterns_are_strings_numbers_and_objects_in_any_key_order<H: Harness>(harness: H) {
    let names = Names::new();
    let own = names.number();
    let object =
        Pattern::from_json(&json!({"cmd": "sum", "own": own, "deep": {"b": 1, "a": [true, "x"]}})).unwrap();
    let number = Pattern::from(own as i64);
    // A broker's subjects may know no white space.
    let odd = if harness.features().subscribes { "\"quotes\"andü" } else { "with \"quotes\" and ü" };
    let service = small()
        .handlers(message(object, || async { ok("object") }))
        .handlers(message(number, || async { ok("number") }))
        .handlers(message(names.of(odd), || async { ok("string") }));
    let stage = Stage::new(harness, service).await;
    let send = |pattern: Pattern| stage.client.send::<String>(pattern, 1);
    // serde_json sorts keys; a pattern parsed from text keeps the order it was written in.
    for text in [
        format!(r#"{{"cmd":"sum","own":{own},"deep":{{"b":1,"a":[true,"x"]}}}}"#),
        format!(r#"{{"deep":{{"a":[true,"x"],"b":1}},"own":{own},"cmd":"sum"}}"#),
    ] {
        assert_eq!(send(Pattern::parse(&text)).await.unwrap(), "object", "{text}");
    }
    assert_eq!(send(Pattern::from(own as i64)).await.unwrap(), "number");
    assert_eq!(send(Pattern::from(own.to_string())).await.unwrap(), "number");
    assert_eq!(send(names.of(odd)).await.unwrap(), "string");
    let other = Pattern::from_json(&json!({"cmd": "sum", "own": own})).unwrap();
    let features = stage.harness.features();
    assert!(is_nobody(&features, &send(other).timeout(patience(&features)).await));
    stage.end().await;
}

/// A singleton's state is one, over all arbiters and connections.
pub async fn singleton_state_is_one<H: Harness>(harness: H) {
    let names = Names::new();
    let built = Arc::new(AtomicUsize::new(0));
    let group = counter(names.of("count"), &built).singleton();
    let mut stage = Stage::new(harness, Microservice::new().arbiters(3).handlers(group)).await;
    let options = stage.harness.client_options();
    let other = stage.harness.client(&stage.service.url(), options);
    let mut all = HashSet::new();
    for _ in 0..50 {
        all.insert(stage.client.send::<u64>(names.of("count"), 1).await.unwrap());
        all.insert(other.send::<u64>(names.of("count"), 1).await.unwrap());
    }
    assert_eq!(all, (1..=100).collect());
    assert_eq!(built.load(Ordering::Relaxed), 1);
    other.close().await;
    stage.end().await;
}

/// A handler that counts its calls in state of its own, which is not `Sync`.
fn counter(pattern: Pattern, built: &Arc<AtomicUsize>) -> HandlerGroup {
    let built = Arc::clone(built);
    let info = HandlerInfo::new("counter", HandlerKind::Message, pattern);
    HandlerGroup::from_parts("counter", vec![info], move |_| {
        built.fetch_add(1, Ordering::Relaxed);
        let calls = std::cell::Cell::new(0u64);
        vec![Box::new(move |request: Request| {
            calls.set(calls.get() + 1);
            let payload = martlet_core::Payload::encode(request.format(), &calls.get());
            Outcome::Ready(payload.map(martlet_core::Reply::Value).map_err(RpcError::from))
        })]
    })
}

/// By default every arbiter has its own replica, built there once.
pub async fn each_arbiter_has_a_replica_of_its_own<H: Harness>(harness: H) {
    let names = Names::new();
    let built = Arc::new(AtomicUsize::new(0));
    let group = counter(names.of("count"), &built);
    let stage = Stage::new(harness, Microservice::new().arbiters(3).handlers(group)).await;
    assert_eq!(built.load(Ordering::Relaxed), 3);
    // One connection stays on one arbiter, so it sees one replica.
    for expected in 1..=10 {
        assert_eq!(stage.client.send::<u64>(names.of("count"), 1).await.unwrap(), expected);
    }
    stage.end().await;
}

/// `concurrency(1)`: never two at once, in the order they came.
pub async fn concurrency_one_serialises<H: Harness>(harness: H) {
    let names = Names::new();
    let busy = Arc::new(AtomicBool::new(false));
    let order = Arc::new(Mutex::new(Vec::new()));
    let (flag, list) = (Arc::clone(&busy), Arc::clone(&order));
    let serial = message(names.of("serial"), move |Data(number): Data<u64>| {
        let (flag, list) = (Arc::clone(&flag), Arc::clone(&list));
        async move {
            assert!(!flag.swap(true, Ordering::SeqCst), "two at once");
            list.lock().push(number);
            if number % 5 != 0 {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            flag.store(false, Ordering::SeqCst);
            ok(number)
        }
    });
    let stage = Stage::new(harness, small().handlers(serial.concurrency(1))).await;
    let calls = (0..200u64).map(|number| stage.client.send::<u64>(names.of("serial"), number));
    futures::future::try_join_all(calls).await.unwrap();
    assert_eq!(*order.lock(), (0..200).collect::<Vec<_>>());
    stage.end().await;
}

/// Routes appear and go at run time; no call in between hangs, other routes are not disturbed.
pub async fn handlers_come_and_go_while_traffic_flows<H: Harness>(harness: H) {
    let names = Names::new();
    let steady = message(names.of("steady"), |Data(number): Data<u64>| async move { ok(number) });
    let stage = Stage::new(harness, Microservice::new().arbiters(2).handlers(steady)).await;
    let stop = Arc::new(AtomicBool::new(false));
    let traffic = {
        let (client, stop) = (stage.client.clone(), Arc::clone(&stop));
        actix_rt::spawn(async move {
            let mut sent = 0u64;
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(client.send::<u64>(names.of("steady"), sent).await.unwrap(), sent);
                sent += 1;
            }
            sent
        })
    };
    let features = stage.harness.features();
    let guest = || stage.client.send::<u64>(names.of("guest"), 1).timeout(patience(&features));
    for round in 0..10u64 {
        let group = message(names.of("guest"), move || async move { ok(round) });
        let id = stage.service.registry().register(vec![group]).await.unwrap();
        let mut answered = Err(CallError::Closed);
        // A broker may need a moment for the subscription.
        for _ in 0..500 {
            answered = guest().await;
            if answered.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(answered.as_ref().unwrap(), &round);
        assert!(stage.service.registry().unregister(id).await.unwrap());
        assert!(!stage.service.registry().unregister(id).await.unwrap());
        for _ in 0..500 {
            answered = guest().await;
            if is_nobody(&features, &answered) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(is_nobody(&features, &answered), "{answered:?}");
    }
    stop.store(true, Ordering::Relaxed);
    assert!(traffic.await.unwrap() > 0);
    stage.end().await;
}

/// Two message handlers for one pattern are a mistake, found at start and at registration.
pub async fn a_second_message_handler_is_refused_with_both_places<H: Harness>(mut harness: H) {
    let names = Names::new();
    let one = || message(names.of("sum"), || async { ok(1) });
    let twice = small().handlers(one()).handlers(one()).server(harness.server(Default::default()));
    match twice.start().await {
        Err(StartError::DuplicateHandler { pattern, first, second, .. }) => {
            assert_eq!(pattern, names.of("sum").route().as_str());
            for place in [&first, &second] {
                assert!(place.contains("conformance/handlers.rs:"), "{place} names the place");
            }
        }
        other => panic!("a duplicate expected, got {other:?}"),
    }
    let stage = Stage::new(harness, small().handlers(one())).await;
    let again = stage.service.registry().register(vec![one()]).await;
    assert!(matches!(again, Err(StartError::DuplicateHandler { .. })), "{again:?}");
    assert_eq!(stage.client.send::<u64>(names.of("sum"), 1).await.unwrap(), 1);
    stage.end().await;
}

/// A handler for another transporter is not there on this one, and clashes with nobody.
pub async fn a_handler_limited_to_another_transport_is_not_reached<H: Harness>(harness: H) {
    let names = Names::new();
    let elsewhere = TransportId::custom(4242);
    let service = small()
        .handlers(message(names.of("both"), || async { ok("elsewhere") }).transport(elsewhere))
        .handlers(message(names.of("only"), || async { ok("elsewhere") }).transport(elsewhere));
    let stage = Stage::new(harness, service).await;
    let here = message(names.of("both"), || async { ok("here") }).transport(stage.client.transport().id);
    stage.service.registry().register(vec![here]).await.unwrap();
    let features = stage.harness.features();
    let send = |name: &str| stage.client.send::<String>(names.of(name), 1).timeout(patience(&features));
    let mut reply = send("both").await;
    while is_nobody(&features, &reply) {
        tokio::time::sleep(Duration::from_millis(2)).await;
        reply = send("both").await;
    }
    assert_eq!(reply.unwrap(), "here");
    assert!(is_nobody(&features, &send("only").await));
    stage.end().await;
}

struct Visit {
    number: usize,
    route: String,
}

impl FromRequest for Visit {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        // It may wait.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let visits = request.state::<AtomicUsize>().ok_or("no visits")?;
        if request.property::<bool>("refuse").unwrap_or(false) {
            return Err(RpcError::message("refused by the extractor"));
        }
        Ok(Self { number: visits.fetch_add(1, Ordering::Relaxed), route: request.route().to_string() })
    }
}

/// State is shared; an extractor builds its value for each request.
pub async fn shared_state_and_request_scoped_values_reach_the_handler<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small()
        .state(AtomicUsize::new(10))
        .handlers(message(names.of("visit"), |visit: Visit, State(visits): State<AtomicUsize>| async move {
            ok((visit.number, visit.route, visits.load(Ordering::Relaxed)))
        }))
        .handlers(message(names.of("missing"), |_: State<String>| async { ok(1) }));
    let stage = Stage::new(harness, service).await;
    let route = names.of("visit").route().to_string();
    for number in 10..13 {
        let reply = stage.client.send::<(usize, String, usize)>(names.of("visit"), json!({})).await.unwrap();
        assert_eq!(reply, (number, route.clone(), number + 1));
    }
    let refused = stage.client.send::<u64>(names.of("visit"), json!({"refuse": true})).await.unwrap_err();
    assert_eq!(refused.remote().unwrap().message().as_deref(), Some("refused by the extractor"));
    let missing = stage.client.send::<u64>(names.of("missing"), 1).await.unwrap_err();
    assert_eq!(missing.remote().unwrap().message().as_deref(), Some("Internal server error"));
    stage.end().await;
}

struct Downstream;

impl ClientName for Downstream {
    const NAME: &'static str = "downstream";
}

/// A handler calls another service by a client declared under a name; it is closed with the service.
pub async fn a_handler_calls_a_named_client<H: Harness>(mut harness: H) {
    let names = Names::new();
    let inner = small()
        .handlers(message(names.of("double"), |Data(number): Data<i64>| async move { ok(number * 2) }))
        .server(harness.server(Default::default()))
        .start()
        .await
        .unwrap();
    let options = harness.client_options();
    let downstream = harness.client(&inner.url(), options);
    let pattern = names.of("double");
    let outer = Microservice::new().arbiters(2).client("downstream", downstream.clone()).handlers(message(
        names.of("outer"),
        move |client: Client<Downstream>, Data(number): Data<i64>| {
            let pattern = pattern.clone();
            async move { Ok::<i64, CallError>(client.send::<i64>(pattern, number).await? + 1) }
        },
    ));
    let stage = Stage::new(harness, outer).await;
    assert_eq!(stage.client.send::<i64>(names.of("outer"), 20).await.unwrap(), 41);
    stage.end().await;
    assert!(matches!(downstream.send::<i64>(names.of("double"), 1).await, Err(CallError::Closed)));
    inner.stop(Duration::from_secs(5)).await;
}

#[derive(serde::Deserialize, Message)]
#[rtype(result = "Result<u64, RpcError>")]
struct Add(u64);

struct Total(u64);

impl Actor for Total {
    type Context = Context<Self>;
}

impl actix::Supervised for Total {
    fn restarting(&mut self, _: &mut Context<Self>) {
        if let Some(fresh) = martlet_core::supervise::rebuilt() {
            *self = fresh;
        }
    }
}

impl actix::Handler<Add> for Total {
    type Result = Result<u64, RpcError>;

    fn handle(&mut self, Add(number): Add, _: &mut Context<Self>) -> Self::Result {
        if number == 13 {
            panic!("{}", super::DELIBERATE);
        }
        self.0 += number;
        Ok(self.0)
    }
}

/// An actor's messages are routed; a panic in it is answered, its state is fresh, its route stays.
pub async fn an_actor_handles_messages<H: Harness>(harness: H) {
    let names = Names::new();
    let group = ActorGroup::new(|| Total(100)).message::<Add>(names.of("add")).build().singleton();
    let stage = Stage::new(harness, Microservice::new().arbiters(2).handlers(group)).await;
    let add = |number: u64| stage.client.send::<u64>(names.of("add"), number);
    assert_eq!(add(1).await.unwrap(), 101);
    assert_eq!(add(2).await.unwrap(), 103);
    let error = add(13).await.unwrap_err();
    assert_eq!(error.remote().unwrap().message().as_deref(), Some("Internal server error"));
    // Waits in the mailbox until the actor is back.
    assert_eq!(add(5).await.unwrap(), 105);
    let calls: FuturesUnordered<_> = (0..100).map(|_| add(1)).collect();
    assert_eq!(calls.filter(|reply| std::future::ready(reply.is_ok())).count().await, 100);
    assert_eq!(add(0).await.unwrap(), 205);
    stage.end().await;
}
