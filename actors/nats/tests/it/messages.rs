// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events, queues, wildcards, headers, metadata, and what is no packet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::HeaderMap;
use futures::StreamExt;
use martlet_core::request::{TIMEOUT_KEY, TRACEPARENT_KEY, TRACESTATE_KEY};
use martlet_core::trace::TraceContext;
use martlet_core::{
    CallError, Ctx, Data, Deadline, HandlerGroup, Metadata, Record, RpcError, event, message,
};
use martlet_nats::{NatsClient, NatsClientOptions, NatsContext, NatsRecordBuilder};

use crate::broker::Broker;
use crate::world::{GRACE, client, client_options, serve, server_options, sum, until};

fn counting(pattern: &str, count: &Arc<AtomicU64>) -> HandlerGroup {
    let count = Arc::clone(count);
    event(pattern, move |Data(add): Data<u64>| {
        let count = Arc::clone(&count);
        async move {
            count.fetch_add(add, Ordering::Relaxed);
            Ok::<_, RpcError>(())
        }
    })
}

/// Answers with the name of the instance, and counts.
fn named(pattern: &str, name: &'static str, count: &Arc<AtomicU64>) -> HandlerGroup {
    let count = Arc::clone(count);
    message(pattern, move || {
        count.fetch_add(1, Ordering::Relaxed);
        async move { Ok::<_, RpcError>(name) }
    })
}

fn subject_of(pattern: &str) -> HandlerGroup {
    message(pattern, async |Ctx(context): Ctx<NatsContext>| Ok::<_, RpcError>(context.subject().to_owned()))
}

/// Answers with the headers it saw.
fn headers_seen(pattern: &str) -> HandlerGroup {
    message(pattern, async |Ctx(context): Ctx<NatsContext>| {
        let lines: Vec<_> = context.headers().iter().map(|(name, value)| format!("{name}={value}")).collect();
        Ok::<_, RpcError>(lines)
    })
}

#[actix::test]
async fn every_handler_of_an_event_runs() {
    let broker = Broker::start();
    let (first, second) = (Arc::default(), Arc::default());
    let (service, _) =
        serve(server_options(&broker), [counting("evt", &first), counting("evt", &second)]).await;
    let client = client(&broker);
    for _ in 0..100 {
        client.emit("evt", 2).await.unwrap();
    }
    until("all have run", || first.load(Ordering::Relaxed) + second.load(Ordering::Relaxed) == 400).await;
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn of_the_services_in_a_queue_group_one_gets_each_message() {
    let broker = Broker::start();
    let (a, b, c): (Arc<AtomicU64>, Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
    let options = || server_options(&broker).queue("workers");
    // The handler's own queue wins over the service's.
    let own = |name, count| named("own", name, count).extra("queue", "others");
    let (first, _) = serve(options(), [named("job", "a", &a), own("a", &c)]).await;
    let (second, _) = serve(options(), [named("job", "b", &b), own("b", &c)]).await;
    let (third, _) = serve(server_options(&broker).queue("more"), [own("c", &c)]).await;
    let client = client(&broker);
    for _ in 0..200 {
        client.send::<String>("job", 0).await.unwrap();
        client.send::<String>("own", 0).await.unwrap();
    }
    let (a, b) = (a.load(Ordering::Relaxed), b.load(Ordering::Relaxed));
    assert_eq!(a + b, 200);
    assert!(a > 20 && b > 20, "{a} and {b}");
    assert_eq!(c.load(Ordering::Relaxed), 200);
    client.close().await;
    for service in [first, second, third] {
        service.stop(GRACE).await;
    }
}

#[actix::test]
async fn without_a_queue_every_service_gets_every_message() {
    let broker = Broker::start();
    let count = Arc::default();
    let (first, _) = serve(server_options(&broker), [counting("evt", &count)]).await;
    let (second, _) = serve(server_options(&broker), [counting("evt", &count)]).await;
    let client = client(&broker);
    for _ in 0..50 {
        client.emit("evt", 1).await.unwrap();
    }
    until("both have counted", || count.load(Ordering::Relaxed) == 100).await;
    client.close().await;
    first.stop(GRACE).await;
    second.stop(GRACE).await;
}

#[actix::test]
async fn wildcards_match_and_the_context_has_the_concrete_subject() {
    let broker = Broker::start();
    let (service, _) = serve(server_options(&broker), [subject_of("time.us.*"), subject_of("ng.>")]).await;
    let client = client(&broker);
    assert_eq!(client.send::<String>("time.us.east", 1).await.unwrap(), "time.us.east");
    assert_eq!(client.send::<String>("ng.a.b.c", 1).await.unwrap(), "ng.a.b.c");
    let beyond = client.send::<String>("time.us.east.now", 1).await;
    assert!(matches!(beyond, Err(CallError::NoHandler { .. })), "{beyond:?}");
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn overlapping_patterns_are_each_served() {
    let broker = Broker::start();
    let count = Arc::default();
    let groups = [counting("a.b", &count), counting("a.*", &count), counting(">", &count)];
    let (service, reports) = serve(server_options(&broker), groups).await;
    let client = client(&broker);
    client.emit("a.b", 1).await.unwrap();
    until("all have counted", || count.load(Ordering::Relaxed) == 3).await;
    assert_eq!(reports.all(), [] as [&str; 0]);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn headers_reach_the_handler_and_the_caller() {
    let broker = Broker::start();
    let answer = message("answer", async || {
        Ok::<_, RpcError>(NatsRecordBuilder::new(5).set_header("x-answer", "yes").build())
    });
    let (service, _) = serve(server_options(&broker), [headers_seen("h"), answer]).await;
    let mut options = client_options(&broker).headers([("x-version", "1.0"), ("x-over", "client")]);
    options.client.propagate = false;
    let client = martlet_nats::NatsClient::new(options);
    let seen: Vec<String> = client.send("h", 1).await.unwrap();
    assert_eq!(seen, ["x-over=client", "x-version=1.0"]);
    let record = Record::new(1).header("x-over", "req").header("x-m", "1").header("x-m", "2");
    let seen: Vec<String> = client.send("h", record).header("x-z", "z").await.unwrap();
    assert_eq!(seen, ["x-m=1", "x-m=2", "x-over=req", "x-version=1.0", "x-z=z"]);
    // A Martlet caller gets the value alone; whoever reads headers finds them.
    assert_eq!(client.send::<u32>("answer", 1).await.unwrap(), 5);
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let reply = raw.request("answer", r#"{"data":1,"id":"q"}"#.into()).await.unwrap();
    assert_eq!(reply.headers.unwrap().get("x-answer").unwrap().as_str(), "yes");
    assert_eq!(reply.payload, r#"{"response":5,"isDisposed":true,"id":"q"}"#);
    let reply = raw.request("h", r#"{"data":1,"id":"q"}"#.into()).await.unwrap();
    assert!(reply.headers.is_none());
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn headers_beyond_the_bound_refuse_their_message_alone() {
    let broker = Broker::start();
    let options = server_options(&broker).max_header_bytes(200);
    let (service, reports) = serve(options, [headers_seen("h"), sum()]).await;
    let client = client(&broker);
    let large = Record::new(1).header("x", "y".repeat(300));
    let call = client.send::<Vec<String>>("h", large).timeout(Duration::from_millis(300)).await;
    assert!(matches!(call, Err(CallError::Timeout { .. })), "{call:?}");
    assert!(reports.contain("maxHeaderBytes"), "{:?}", reports.all());
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let own = martlet_nats::NatsClient::new(client_options(&broker).max_header_bytes(200));
    let large = Record::new(1).header("x", "y".repeat(300));
    let call = own.send::<Vec<String>>("h", large).await;
    assert!(
        matches!(&call, Err(CallError::Encode(e)) if e.to_string().contains("maxHeaderBytes")),
        "{call:?}"
    );
    let broken = Record::new(1).header("x", "a\r\nb: c");
    assert!(matches!(own.send::<i64>("h", broken).await, Err(CallError::Encode(_))));
    own.close().await;
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_message_beyond_the_brokers_bound_is_refused_alone() {
    let broker = Broker::configured("max_payload: 4096\n", &[]);
    let echo = message("repeat", async |Data(times): Data<usize>| Ok::<_, RpcError>("x".repeat(times)));
    let alive = Arc::new(());
    let held = Arc::clone(&alive);
    let endless = message("endless", move || {
        let held = Arc::clone(&held);
        let items = futures::stream::iter([1, 5000]).chain(futures::stream::repeat(2));
        items.then(move |times| {
            let _held = &held;
            futures::future::ready("x".repeat(times))
        })
    });
    let (service, reports) = serve(server_options(&broker), [echo, endless]).await;
    let client = client(&broker);
    let call = client.send::<String>("repeat", "x".repeat(5000)).await;
    assert!(matches!(&call, Err(CallError::Encode(e)) if e.to_string().contains("max_payload")), "{call:?}");
    // A reply that does not fit becomes an error.
    let call = client.send::<String>("repeat", 5000).await;
    assert!(matches!(call, Err(CallError::Remote(_))), "{call:?}");
    assert!(reports.contain("max_payload"), "{:?}", reports.all());
    assert_eq!(client.send::<String>("repeat", 3000).await.unwrap().len(), 3000);
    // So does an item of a stream, which ends with it: nothing more is made, nor sent.
    let idle = Arc::strong_count(&alive);
    let mut replies = client.send::<String>("endless", ()).stream();
    assert_eq!(replies.next().await.unwrap().unwrap(), "x");
    let refused = replies.next().await.unwrap();
    assert!(matches!(refused, Err(CallError::Remote(_))), "{refused:?}");
    assert!(replies.next().await.is_none());
    until("the stream is gone", || Arc::strong_count(&alive) == idle).await;
    assert_eq!(client.late_replies(), 0);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn deadline_and_trace_travel_as_metadata_and_as_headers() {
    let broker = Broker::start();
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let mut requests = raw.subscribe("seen").await.unwrap();
    raw.flush().await.unwrap();
    let client = client(&broker);
    let trace = TraceContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some("a=b"));
    let call = client.send::<u32>("seen", 1).trace(&trace.unwrap()).metadata("own", "1");
    let answer = async {
        let request = requests.next().await.unwrap();
        raw.publish(request.reply.clone().unwrap(), r#"{"response":1,"isDisposed":true}"#.into())
            .await
            .unwrap();
        request
    };
    let (reply, request) = futures::join!(call, answer);
    assert_eq!(reply.unwrap(), 1);
    let headers = request.headers.unwrap();
    let header = |name: &str| headers.get(name).map(|value| value.as_str().to_owned());
    let body: serde_json::Value = serde_json::from_slice(&request.payload).unwrap();
    let metadata = |name: &str| body["metadata"][name].as_str().map(str::to_owned);
    let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    assert_eq!(metadata(TRACEPARENT_KEY).as_deref(), Some(sent));
    for key in [TRACEPARENT_KEY, TRACESTATE_KEY, TIMEOUT_KEY] {
        assert_eq!(header(key), metadata(key), "{key}");
        assert!(header(key).is_some(), "{key}");
    }
    assert_eq!((header("own"), metadata("own").as_deref()), (None, Some("1")));
    client.close().await;
}

/// The headers and the packet of a call that has a deadline and nothing else.
async fn plain_call(
    options: impl FnOnce(NatsClientOptions) -> NatsClientOptions,
) -> (bool, serde_json::Value) {
    let broker = Broker::start();
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let mut requests = raw.subscribe("seen").await.unwrap();
    raw.flush().await.unwrap();
    let client = NatsClient::new(options(client_options(&broker)));
    let call = client.send::<u32>("seen", 1).timeout(Duration::from_secs(7));
    let answer = async {
        let request = requests.next().await.unwrap();
        let reply = request.reply.clone().unwrap();
        raw.publish(reply, r#"{"response":1,"isDisposed":true}"#.into()).await.unwrap();
        let header = request.headers.as_ref().and_then(|headers| headers.get(TIMEOUT_KEY));
        assert!(header.is_none_or(|value| value.as_str() == "7000"));
        (header.is_some(), serde_json::from_slice(&request.payload).unwrap())
    };
    let (reply, seen) = futures::join!(call, answer);
    assert_eq!(reply.unwrap(), 1);
    client.close().await;
    seen
}

#[actix::test]
async fn a_deadline_alone_makes_a_header_only_where_it_is_wanted() {
    let (plain, wanted) =
        (plain_call(|options| options).await, plain_call(|options| options.deadline_header(true)).await);
    assert_eq!((plain.0, wanted.0), (false, true));
    for packet in [plain.1, wanted.1] {
        assert_eq!(packet["metadata"][TIMEOUT_KEY], "7000");
    }
}

#[actix::test]
async fn headers_stand_in_for_metadata_that_a_caller_does_not_send() {
    let broker = Broker::start();
    let left = message("left", async |deadline: Deadline, metadata: Metadata| {
        let left = deadline.remaining().map(|left| left.as_millis() as u64);
        Ok::<_, RpcError>((left, metadata.get(TRACEPARENT_KEY).map(str::to_owned)))
    });
    let (service, _) = serve(server_options(&broker), [left]).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let mut headers = HeaderMap::new();
    headers.insert(TIMEOUT_KEY, "5000");
    headers.insert(TRACEPARENT_KEY, "t");
    let reply = raw.request_with_headers("left", headers, r#"{"data":1,"id":"q"}"#.into()).await.unwrap();
    let body: serde_json::Value = serde_json::from_slice(&reply.payload).unwrap();
    let left = body["response"][0].as_u64().unwrap();
    assert!((4000..=5000).contains(&left), "{left}");
    assert_eq!(body["response"][1], "t");
    service.stop(GRACE).await;
}

#[actix::test]
async fn what_is_no_packet_leaves_the_service_alive() {
    let broker = Broker::start();
    let count = Arc::default();
    let (service, reports) = serve(server_options(&broker), [sum(), counting("evt", &count)]).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    for body in ["", "not json", "{\"pattern\":\"sum\",", "[1,2", "\u{0}"] {
        raw.publish_with_reply("sum", "nowhere", body.into()).await.unwrap();
        raw.publish("evt", body.into()).await.unwrap();
    }
    // With a reply subject but without an id it is an event; its handler runs, nobody is answered.
    let mut nowhere = raw.subscribe("nowhere").await.unwrap();
    raw.publish_with_reply("sum", "nowhere", r#"{"pattern":"sum","data":[1]}"#.into()).await.unwrap();
    // An id without a reply subject: the handler runs.
    raw.publish("sum", r#"{"pattern":"sum","data":[1],"id":"x"}"#.into()).await.unwrap();
    // Any JSON is the data of an event.
    raw.publish("evt", "3".into()).await.unwrap();
    raw.publish("evt", r#"{"pattern":"other","data":4}"#.into()).await.unwrap();
    let reply = raw.request("sum", r#"{"pattern":"zzz","data":[1,2],"id":5}"#.into()).await.unwrap();
    assert_eq!(reply.payload, r#"{"response":3,"isDisposed":true,"id":5}"#);
    until("events have run", || count.load(Ordering::Relaxed) == 7).await;
    let bad = reports.all().iter().filter(|report| report.contains("bad input")).count();
    assert_eq!(bad, 10, "{:?}", reports.all());
    assert!(reports.contain("the body is empty"));
    let silence = tokio::time::timeout(Duration::from_millis(100), nowhere.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    service.stop(GRACE).await;
}

#[actix::test]
async fn replies_of_any_shape_end_their_call() {
    let broker = Broker::start();
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let mut requests = raw.subscribe("fake").await.unwrap();
    raw.flush().await.unwrap();
    let client = client(&broker);
    let mut ask = async |replies: &[&str]| {
        let call = client.send::<serde_json::Value>("fake", 1).timeout(Duration::from_millis(500));
        let answer = async {
            let request = requests.next().await.unwrap();
            let body: serde_json::Value = serde_json::from_slice(&request.payload).unwrap();
            for reply in replies {
                let reply = reply.replace("<id>", body["id"].as_str().unwrap());
                raw.publish(request.reply.clone().unwrap(), reply.into()).await.unwrap();
            }
        };
        futures::join!(call.stream().collect_all(), answer).0
    };
    let value = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
    assert_eq!(ask(&["42"]).await.unwrap(), [value("42")]);
    assert_eq!(ask(&[r#"{"x":1}"#]).await.unwrap(), [value(r#"{"x":1}"#)]);
    assert_eq!(ask(&[r#"{"response":1,"isDisposed":true}"#]).await.unwrap(), [value("1")]);
    let wrong = r#"{"id":"nope","response":1,"isDisposed":true}"#;
    assert_eq!(ask(&[wrong, r#"{"id":"<id>","response":2,"isDisposed":true}"#]).await.unwrap(), [value("2")]);
    assert!(matches!(ask(&["oops"]).await, Err(CallError::Decode(_))));
    assert!(matches!(ask(&[""]).await, Err(CallError::NoHandler { .. })));
    assert!(matches!(ask(&[r#"{"id":"<id>","err":{"a":1}}"#]).await, Err(CallError::Remote(_))));
    assert_eq!(client.occupied(), 0);
    client.close().await;
}

#[actix::test]
async fn patterns_that_nats_cannot_carry_are_refused_with_a_reason() {
    let broker = Broker::start();
    let client = client(&broker);
    for pattern in ["", "a b", "a..b"] {
        let call = client.send::<i64>(pattern, 1).await;
        assert!(matches!(&call, Err(CallError::Encode(e)) if e.to_string().contains("subject")), "{call:?}");
    }
    client.close().await;
    let started = martlet_core::Microservice::new()
        .on_current_arbiter()
        .handlers(subject_of(r"with space"))
        .server(martlet_nats::NatsServer::new(server_options(&broker)))
        .start()
        .await;
    let error = started.unwrap_err().to_string();
    assert!(error.contains("white space"), "{error}");
}
