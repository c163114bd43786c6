// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests, events, records, exchanges, wildcards, and what is no packet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lapin::BasicProperties;
use martlet_core::{CallError, Ctx, Data, HandlerGroup, Pattern, RpcError, event, message};
use martlet_rabbitmq::{
    RmqClient, RmqContext, RmqExchangeType, RmqQueueOptions, RmqRecordBuilder, RmqRecordOptions,
};
use parking_lot::Mutex;
use serde_json::json;

use crate::raw::Raw;
use crate::world::{
    GRACE, client, client_options, failing, serve, server_options, shared_broker, slow, streaming, sum,
    sum_object, unique, until,
};

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

/// Answers with what the context knows.
fn seen(pattern: &str) -> HandlerGroup {
    message(pattern, async |Ctx(context): Ctx<RmqContext>| {
        let properties = context.properties();
        Ok::<_, RpcError>(json!({
            "pattern": context.pattern(), "exchange": context.exchange(), "key": context.routing_key(),
            "headers": properties.headers, "priority": properties.priority, "type": properties.kind,
            "mode": properties.delivery_mode, "expiration": properties.expiration,
            "message": properties.message_id, "redelivered": context.redelivered(),
            "content": String::from_utf8_lossy(context.content()),
        }))
    })
}

#[actix::test]
async fn calls_events_streams_and_errors_cross() {
    let broker = shared_broker();
    let queue = unique("all");
    let count = Arc::default();
    let groups = [sum(), sum_object(), streaming(), failing(), slow(), counting("evt", &count)];
    let (service, _) = serve(server_options(&broker, &queue), groups).await;
    let client = client(&broker, &queue);
    assert_eq!(client.send::<i64>("sum", [1, 2, 3]).await.unwrap(), 6);
    let object = Pattern::parse(r#"{ "cmd": "sum" }"#);
    assert_eq!(client.send::<i64>(object, [1, 2]).await.unwrap(), 3);
    assert_eq!(client.send::<i64>("stream", [1, 2, 3]).stream().collect_all().await.unwrap(), [1, 2, 3]);
    let error = client.send::<i64>("fail", "message").await.unwrap_err();
    assert_eq!(error.remote().unwrap().message().as_deref(), Some("boom"));
    let error = client.send::<i64>("nobody", 1).await.unwrap_err();
    assert!(matches!(error, CallError::NoHandler { .. }), "{error}");
    let large = "x".repeat(3 << 20);
    let error = client.send::<i64>("sum", &large).await.unwrap_err();
    assert!(error.remote().is_some(), "{error}");
    for _ in 0..100 {
        client.emit("evt", 2).await.unwrap();
    }
    until("all events have run", || count.load(Ordering::Relaxed) == 200).await;
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_record_has_headers_and_properties() {
    let broker = shared_broker();
    let queue = unique("record");
    let (service, _) = serve(server_options(&broker, &queue), [seen("seen")]).await;
    let client =
        RmqClient::new(client_options(&broker, &queue).headers([("x-v", "1"), ("x-over", "client")]));
    let plain: serde_json::Value = client.send("seen", 1).await.unwrap();
    assert_eq!(plain["headers"], json!({"x-v": "1", "x-over": "client"}));
    assert_eq!(
        (&plain["mode"], &plain["key"], &plain["pattern"]),
        (&json!(1), &json!(queue), &json!("seen"))
    );
    let body: serde_json::Value = serde_json::from_str(plain["content"].as_str().unwrap()).unwrap();
    assert_eq!((&body["pattern"], &body["data"]), (&json!("seen"), &json!(1)));
    let mut options = RmqRecordOptions::new();
    options.headers.insert("x-over".to_owned(), json!("record"));
    options.headers.insert("n".to_owned(), json!(5));
    (options.priority, options.kind, options.expiration) = (Some(3), Some("ty".to_owned()), Some(60_000));
    (options.message_id, options.persistent) = (Some("mid".to_owned()), Some(true));
    let record = RmqRecordBuilder::new(1).set_options(options).build();
    let full: serde_json::Value = client.send("seen", record).await.unwrap();
    assert_eq!(full["headers"], json!({"x-v": "1", "x-over": "record", "n": 5}));
    assert_eq!((&full["priority"], &full["type"], &full["mode"]), (&json!(3), &json!("ty"), &json!(2)));
    assert_eq!((&full["expiration"], &full["message"]), (&json!("60000"), &json!("mid")));
    let refused = client.send::<i64>("seen", 1).header("amqp.priority", "many").await.unwrap_err();
    assert!(matches!(refused, CallError::Encode(_)), "{refused}");
    let large = client.send::<i64>("seen", 1).header("x", "y".repeat(20_000)).await.unwrap_err();
    assert!(matches!(large, CallError::Encode(_)), "{large}");
    client.send::<serde_json::Value>("seen", 1).await.unwrap();
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_fanout_exchange_reaches_every_queue() {
    let broker = shared_broker();
    let exchange = unique("fan");
    let (first, second) = (Arc::default(), Arc::default());
    let options = |queue: &str| {
        let queue_options = RmqQueueOptions::new().auto_delete(true);
        let options = server_options(&broker, queue).queue_options(queue_options).exchange(&exchange);
        options.exchange_type(RmqExchangeType::Fanout)
    };
    let (one, _) = serve(options(&unique("fan-a")), [counting("evt", &first), sum()]).await;
    // A queue that the broker names.
    let (two, _) = serve(options(""), [counting("evt", &second)]).await;
    let client = RmqClient::new(
        client_options(&broker, "").exchange(&exchange).exchange_type(RmqExchangeType::Fanout),
    );
    for _ in 0..20 {
        client.emit("evt", 1).await.unwrap();
    }
    until("both have all", || first.load(Ordering::Relaxed) + second.load(Ordering::Relaxed) == 40).await;
    assert_eq!(first.load(Ordering::Relaxed), 20);
    client.close().await;
    one.stop(GRACE).await;
    two.stop(GRACE).await;
}

#[actix::test]
async fn direct_and_headers_exchanges_are_bound_by_their_options() {
    let broker = shared_broker();
    for kind in [RmqExchangeType::Direct, RmqExchangeType::Headers, RmqExchangeType::Topic] {
        let (queue, exchange) = (unique("bound"), unique("exchange"));
        let server =
            server_options(&broker, &queue).exchange(&exchange).exchange_type(kind).routing_key("a.key");
        let (service, _) = serve(server, [seen("seen")]).await;
        // As NestJS, the client sends to the queue.
        let client = RmqClient::new(
            client_options(&broker, &queue).exchange(&exchange).exchange_type(kind).routing_key("a.key"),
        );
        let there: serde_json::Value = client.send("seen", 1).await.unwrap();
        assert_eq!((&there["exchange"], &there["key"]), (&json!(""), &json!(queue)));
        if kind != RmqExchangeType::Headers {
            let raw = Raw::connect(&broker).await;
            let replies = raw.replies().await;
            let body = r#"{"pattern":"seen","data":1,"id":"1"}"#;
            raw.publish_to(&exchange, "a.key", body, raw.asking("c1")).await;
            let reply = replies.next().await;
            let reply: serde_json::Value = serde_json::from_slice(&reply.data).unwrap();
            assert_eq!(
                (&reply["response"]["exchange"], &reply["response"]["key"]),
                (&json!(exchange), &json!("a.key"))
            );
        }
        client.close().await;
        service.stop(GRACE).await;
    }
}

#[actix::test]
async fn wildcards_are_the_brokers() {
    let broker = shared_broker();
    let queue = unique("wild");
    let count = Arc::default();
    let named = |pattern: &'static str| {
        message(pattern, move |Ctx(context): Ctx<RmqContext>| async move {
            Ok::<_, RpcError>(format!("{pattern} {}", context.pattern()))
        })
    };
    let groups = [
        named("time.*"),
        named("time.#.utc"),
        named("#.end"),
        named("exact.a"),
        named("exact.*"),
        counting("log.#", &count),
    ];
    let (service, _) = serve(server_options(&broker, &queue).wildcards(true), groups).await;
    let wild = RmqClient::new(client_options(&broker, &queue).wildcards(true));
    for (sent, expected) in [
        ("time.us", "time.*"),
        ("time.utc", "time.*"),
        ("time.us.east.utc", "time.#.utc"),
        ("a.b.end", "#.end"),
        ("end", "#.end"),
        ("exact.a", "exact.a"),
        ("exact.b", "exact.*"),
    ] {
        assert_eq!(wild.send::<String>(sent, 1).await.unwrap(), format!("{expected} {sent}"));
    }
    for pattern in ["log", "log.a", "log.a.b"] {
        wild.emit(pattern, 1).await.unwrap();
    }
    until("every log has arrived", || count.load(Ordering::Relaxed) == 3).await;
    // RMQ-11: nobody is bound for it, and the caller hears of it at once.
    let nobody = wild.send::<String>("no.body", 1).await;
    assert!(matches!(nobody, Err(CallError::NoHandler { .. })), "{nobody:?}");
    wild.emit("no.body", 1).await.unwrap();
    // A client without wildcards sends to the queue itself, as NestJS 10 does.
    let plain = client(&broker, &queue);
    assert_eq!(plain.send::<String>("time.de", 1).await.unwrap(), "time.* time.de");
    let nobody = plain.send::<String>("no.body", 1).await;
    assert!(matches!(nobody, Err(CallError::NoHandler { .. })), "{nobody:?}");
    let long = wild.send::<String>("x".repeat(256), 1).await;
    assert!(matches!(long, Err(CallError::Encode(_))), "{long:?}");
    wild.close().await;
    plain.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn an_object_pattern_is_a_routing_key_in_whatever_order_its_author_wrote_it() {
    let broker = shared_broker();
    let queue = unique("wild-object");
    let handler = message(Pattern::parse(r#"{"cmd":"obj","a":1}"#), async || Ok::<_, RpcError>("found"));
    let (service, _) = serve(server_options(&broker, &queue).wildcards(true), [handler]).await;
    let client = RmqClient::new(client_options(&broker, &queue).wildcards(true));
    for spelling in [r#"{"cmd":"obj","a":1}"#, r#"{"a":1,"cmd":"obj"}"#] {
        assert_eq!(client.send::<String>(Pattern::parse(spelling), 1).await.unwrap(), "found");
    }
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn replies_may_come_by_a_queue_of_the_clients_own() {
    let broker = shared_broker();
    let (queue, replies) = (unique("asked"), unique("replies"));
    let (service, _) = serve(server_options(&broker, &queue), [sum(), streaming()]).await;
    let missing = RmqClient::new(client_options(&broker, &queue).reply_queue(&replies));
    let error = missing.send::<i64>("sum", [1]).await.unwrap_err().to_string();
    assert!(error.contains("replyQueue") && error.contains(&replies), "{error}");
    let raw = Raw::connect(&broker).await;
    raw.declare(&replies).await;
    let client = RmqClient::new(client_options(&broker, &queue).reply_queue(&replies).persistent(true));
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    assert_eq!(client.send::<i64>("stream", [1, 2]).stream().collect_all().await.unwrap(), [1, 2]);
    missing.close().await;
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn what_is_no_packet_is_reported_and_disturbs_nobody() {
    let broker = shared_broker();
    let queue = unique("bad");
    let (service, reports) = serve(server_options(&broker, &queue), [sum(), slow()]).await;
    let client = client(&broker, &queue);
    let slow = client.send::<u64>("slow", 300);
    let raw = Raw::connect(&broker).await;
    let others = async {
        let plain = BasicProperties::default();
        for body in ["hello", "", "{\"pattern\":", "[1,2", "\u{0}\u{1}"] {
            raw.publish(&queue, body, plain.clone()).await;
        }
        for body in
            ["{\"a\":1}", "5", "null", "[]", "{\"pattern\":\"nobody\"}", "{\"pattern\":\"sum\",\"id\":\"1\"}"]
        {
            raw.publish(&queue, body, plain.clone()).await;
        }
        let odd =
            plain.with_content_type("application/x-unknown".into()).with_content_encoding("gzip".into());
        raw.publish(&queue, "\u{1f}\u{8b}", odd).await;
        let deep = format!(
            "{{\"pattern\":\"sum\",\"data\":{}1{},\"id\":\"1\"}}",
            "[".repeat(5000),
            "]".repeat(5000)
        );
        let replies = raw.replies().await;
        raw.publish(&queue, &deep, raw.asking("deep")).await;
        assert!(String::from_utf8_lossy(&replies.next().await.data).contains("err"));
        let huge = format!("{{\"pattern\":\"sum\",\"data\":\"{}\"}}", "x".repeat(8 << 20));
        raw.publish(&queue, &huge, BasicProperties::default()).await;
        // RMQ-8: a request without an address.
        raw.publish(&queue, r#"{"pattern":"sum","data":[1],"id":"1"}"#, BasicProperties::default()).await;
    };
    let (slow, ()) = futures::join!(slow, others);
    assert_eq!(slow.unwrap(), 300);
    until("every text is reported", || {
        reports.all().iter().filter(|line| line.contains("routing key")).count() >= 6
    })
    .await;
    until("the unknown ones are, too", || reports.contain("nobody") && reports.contain("undefined")).await;
    until("the missing address is", || reports.contain("for sum was dropped: it named no replyTo")).await;
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_reply_address_that_costs_its_channel_costs_no_other_reply() {
    let broker = shared_broker();
    let queue = unique("garbage");
    let (service, reports) = serve(server_options(&broker, &queue), [sum(), slow()]).await;
    let client = client(&broker, &queue);
    let raw = Raw::connect(&broker).await;
    let replies = raw.replies().await;
    let body = r#"{"pattern":"sum","data":[1],"id":"1"}"#;
    let garbage = [
        "amq.rabbitmq.reply-to.garbage",
        "amq.rabbitmq.reply-to.",
        "amq.rabbitmq.reply-to.AAAA.BBBB",
        "amq.rabbitmq.reply-to.g1h2AA1yZXBseUA5NTAyNjUzAAAJwwAAAABrAt2GAAAA.AAAA",
        "no-such-queue",
    ];
    let calls: Vec<_> = (0..40).map(|number| client.send::<u64>("slow", 20 + number)).collect();
    let calls = futures::future::join_all(calls);
    let poison = async {
        for address in garbage.iter().cycle().take(12) {
            let properties = BasicProperties::default().with_reply_to((*address).into());
            raw.publish(&queue, body, properties).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (calls, ()) = futures::join!(calls, poison);
    for (number, reply) in calls.into_iter().enumerate() {
        assert_eq!(reply.unwrap(), 20 + number as u64);
    }
    until("the garbage is reported", || reports.contain("no such address")).await;
    assert!(!reports.contain("lost"), "{:?}", reports.all());
    // Correlation as it came, none if there was none, and the id in the body is not looked at.
    raw.publish(&queue, r#"{"pattern":"sum","data":[1,2],"id":"zzz"}"#, raw.asking("c2")).await;
    let reply = replies.next().await;
    assert_eq!(reply.properties.correlation_id().as_ref().unwrap().as_str(), "c2");
    assert_eq!(reply.data, br#"{"response":3,"isDisposed":true}"#);
    assert!(reply.properties.delivery_mode().is_none() && reply.properties.headers().is_some());
    let unrelated = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to".into());
    raw.publish(&queue, r#"{"pattern":"sum","data":[4],"id":null}"#, unrelated).await;
    let reply = replies.next().await;
    assert!(reply.properties.correlation_id().is_none());
    assert_eq!(reply.data, br#"{"response":4,"isDisposed":true}"#);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_plausible_reply_address_may_cost_the_channel_which_is_opened_anew() {
    let broker = shared_broker();
    let queue = unique("plausible");
    let (service, _) = serve(server_options(&broker, &queue), [sum()]).await;
    let client = client(&broker, &queue);
    let raw = Raw::connect(&broker).await;
    for _ in 0..5 {
        let address = "amq.rabbitmq.reply-to.g1h2AA1yZXBseUA5NTAyNjUzAAAJwwAAAABrAt2G.AAAA";
        let properties = BasicProperties::default().with_reply_to(address.into());
        raw.publish(&queue, r#"{"pattern":"sum","data":[1],"id":"1"}"#, properties).await;
        let mut left = 20;
        while let Err(error) = client.send::<i64>("sum", [1, 2]).timeout(Duration::from_millis(500)).await {
            assert!(left > 0, "{error}");
            left -= 1;
        }
    }
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn replies_that_are_no_replies_end_their_call() {
    let broker = shared_broker();
    let queue = unique("strange");
    let raw = Raw::connect(&broker).await;
    raw.declare(&queue).await;
    let requests = raw.consume(&queue).await;
    let client = client(&broker, &queue);
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&told);
    client.events().on(move |event| sink.lock().push(event.to_string()));
    for (reply, expected) in [("plain", json!("plain")), ("", json!("")), (r#"{"x":1}"#, json!({"x": 1}))] {
        let call = client.send::<serde_json::Value>("anything", 1);
        let answer = async {
            let request = requests.next().await;
            let id = request.properties.correlation_id().clone().unwrap();
            let address = request.properties.reply_to().clone().unwrap();
            for (wrong, text) in [("nope", "wrong"), ("0123456789abcdef01234", "late")] {
                let properties = BasicProperties::default().with_correlation_id(wrong.into());
                raw.publish(address.as_str(), text, properties).await;
            }
            raw.publish(address.as_str(), "no correlation", BasicProperties::default()).await;
            raw.publish(address.as_str(), reply, BasicProperties::default().with_correlation_id(id)).await;
        };
        assert_eq!(futures::join!(call, answer).0.unwrap(), expected);
    }
    assert_eq!(client.occupied(), 0);
    // RMQ-10.
    for words in ["a reply has no correlationId", "the correlationId \"nope\", which no call has"] {
        assert!(told.lock().iter().any(|event| event.contains(words)), "{words}: {told:?}");
    }
    client.close().await;
}

#[actix::test]
async fn what_the_broker_refuses_ends_its_call_or_event_with_an_error() {
    let broker = shared_broker();
    let queue = unique("full");
    let full = RmqQueueOptions::new().max_length(2).argument("x-overflow", "reject-publish");
    // Nobody consumes it.
    let client = RmqClient::new(client_options(&broker, &queue).queue_options(full));
    let mut results = Vec::new();
    for number in 0..6 {
        results.push(client.emit("evt", number).await);
    }
    assert!(results[0].is_ok() && results[1].is_ok(), "{results:?}");
    let error = results[5].as_ref().unwrap_err();
    assert!(error.is_not_sent() && error.to_string().contains("refused"), "{error}");
    let error = client.send::<i64>("sum", 1).await.unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
}

#[actix::test]
async fn ten_thousand_events_are_confirmed_without_waiting_for_each() {
    let broker = shared_broker();
    let queue = unique("many");
    let count = Arc::default();
    let (service, _) = serve(server_options(&broker, &queue), [counting("evt", &count)]).await;
    let client = client(&broker, &queue);
    client.connect().await.unwrap();
    let events: Vec<_> = (0..10_000).map(|_| client.emit("evt", 1)).collect();
    for event in futures::future::join_all(events).await {
        event.unwrap();
    }
    until("all have run", || count.load(Ordering::Relaxed) == 10_000).await;
    client.close().await;
    service.stop(GRACE).await;
}
