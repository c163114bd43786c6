// SPDX-License-Identifier: MIT OR Apache-2.0
//! Topics, wildcards, shared subscriptions, records, context, and what is no packet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet_core::{CallError, Ctx, Data, HandlerGroup, Microservice, Record, RpcError, event, message};
use martlet_mqtt::{
    MqttClient, MqttConnection, MqttContext, MqttProperties, MqttQos, MqttRecordBuilder, MqttServer,
    MqttSubscribeOptions,
};
use parking_lot::Mutex;
use rumqttc_v5::mqttbytes::QoS;
use rumqttc_v5::mqttbytes::v5::{Publish, PublishProperties};
use serde_json::{Value, json};

use crate::raw::Raw;
use crate::world::{
    GRACE, broker, broker_with, client, client_options, counting, serve, server_options, sum, until,
};

/// A handler that says what its context says.
fn says_context(pattern: &str) -> HandlerGroup {
    message(pattern, async |Ctx(context): Ctx<MqttContext>, Data(data): Data<Value>| {
        let user = context.properties().user_properties;
        let user: Vec<_> = user.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Ok::<_, RpcError>(json!({
            "topic": context.topic(), "qos": context.qos().as_u8(), "retain": context.retain(), "dup": context.dup(),
            "contentType": context.properties().content_type, "user": user, "data": data,
        }))
    })
}

fn says(pattern: &str, text: &'static str) -> HandlerGroup {
    message(pattern, move || async move { Ok::<_, RpcError>(text) })
}

/// MQTT-4, MQTT-6.
#[actix::test]
async fn wildcards_match_and_replies_come_on_the_concrete_topic() {
    let broker = broker();
    for version in [4, 5] {
        let handlers =
            [says("a/exact", "exact"), says("a/+", "plus"), says("h/#", "hash"), says("a/+/c", "inner")];
        let (service, _) = serve(server_options(&broker).protocol_version(version), handlers).await;
        let client = client(&broker);
        let send = async |topic: &str| client.send::<String>(topic, 1).timeout(Duration::from_secs(1)).await;
        assert_eq!(send("a/exact").await.unwrap(), "exact");
        assert_eq!(send("a/other").await.unwrap(), "plus");
        assert_eq!(send("a/b/c").await.unwrap(), "inner");
        assert_eq!(send("h/x/y").await.unwrap(), "hash");
        assert_eq!(send("h").await.unwrap(), "hash");
        assert!(send("b/x").await.is_err());
        client.close().await;
        service.stop(GRACE).await;
    }
}

/// MQTT-4: of the services that share a group one gets each request, by the option or by the pattern.
#[actix::test]
async fn shared_subscriptions_are_answered_on_the_plain_topic() {
    let broker = broker();
    for version in [4, 5] {
        let options = || server_options(&broker).protocol_version(version);
        let (one, _) =
            serve(options().shared_group("workers"), [says("w/+", "one"), says("who", "one")]).await;
        let (two, _) =
            serve(options().shared_group("workers"), [says("w/+", "two"), says("who", "two")]).await;
        let (three, _) = serve(options(), [says("$share/workers/who", "three")]).await;
        let client = client(&broker);
        let mut who = std::collections::BTreeMap::new();
        for number in 0..60 {
            let all = client.send::<String>(format!("w/{number}"), 1).stream().collect_all().await.unwrap();
            assert_eq!(all.len(), 1);
            let answered = client.send::<String>("who", 1).await.unwrap();
            *who.entry(answered).or_insert(0) += 1;
        }
        assert_eq!(who.len(), 3, "{who:?}");
        client.close().await;
        for service in [one, two, three] {
            service.stop(GRACE).await;
        }
    }
}

/// MQTT-8: without it, a handler of `h/#` would run again for each of its own replies.
#[actix::test]
async fn a_wildcard_handler_does_not_run_for_replies() {
    let broker = broker();
    for version in [4, 5] {
        let count = Arc::<AtomicU64>::default();
        let runs = Arc::clone(&count);
        let all = message("h/#", move |Data(number): Data<u64>| {
            runs.fetch_add(1, Ordering::Relaxed);
            async move { Ok::<_, RpcError>(number) }
        });
        let (service, reports) = serve(server_options(&broker).protocol_version(version), [all]).await;
        let client = client(&broker);
        for number in 0..20 {
            assert_eq!(client.send::<u64>("h/x", number).await.unwrap(), number);
        }
        // A request and an event on a topic of that name are what they are.
        assert_eq!(client.send::<u64>("h/y/reply", 7).await.unwrap(), 7);
        client.emit("h/z/reply", 8).await.unwrap();
        until("the event has run", || count.load(Ordering::Relaxed) == 22).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(count.load(Ordering::Relaxed), 22, "{:?}", reports.all());
        client.close().await;
        let report = service.stop(GRACE).await;
        assert!(report.clean && report.done() == 22, "{report:?}");
    }
}

/// MQTT-7: mosquitto sends a copy for each subscription; with MQTT 5 they are told apart.
#[actix::test]
async fn a_message_for_several_subscriptions_runs_one_handler() {
    let broker = broker_with("allow_duplicate_messages true");
    let mut raw = Raw::connect(&broker).await;
    for (version, expected) in [(5, 100), (4, 300)] {
        let (exact, wild) = (Arc::default(), Arc::default());
        let groups = [counting("o/#", &wild), counting("o/a", &exact), counting("+/a", &wild)];
        let (service, _) = serve(server_options(&broker).protocol_version(version), groups).await;
        for _ in 0..100 {
            raw.publish("o/a", "1").await;
        }
        // With MQTT 3.1.1 each copy runs the handler, as in NestJS: documented, not wanted.
        tokio::time::sleep(Duration::from_millis(500)).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!((exact.load(Ordering::Relaxed), wild.load(Ordering::Relaxed)), (expected, 0));
        service.stop(GRACE).await;
    }
}

/// MQTT-10, MQTT-11, and the context of the other side.
#[actix::test]
async fn records_and_context_carry_the_packet() {
    let broker = broker();
    let subscribe = MqttSubscribeOptions::qos(MqttQos::ExactlyOnce);
    let options = server_options(&broker).protocol_version(5).subscribe_options(subscribe);
    let (service, _) = serve(options, [says_context("m/echo")]).await;
    let client = MqttClient::new(
        client_options(&broker)
            .protocol_version(5)
            .user_properties([("x-version", "1"), ("x-over", "client")]),
    );
    let plain: Value = client.send("m/echo", json!({"a": 1, "options": {"b": 2}})).await.unwrap();
    assert_eq!(
        plain,
        json!({"topic": "m/echo", "qos": 0, "retain": false, "dup": false, "contentType": null,
               "user": ["x-version=1", "x-over=client"], "data": {"a": 1, "options": {"b": 2}}})
    );
    let properties =
        MqttProperties::new().content_type("json").user_property("x-over", "req").user_property("n", "1");
    for (qos, number) in [(MqttQos::AtMostOnce, 0), (MqttQos::AtLeastOnce, 1), (MqttQos::ExactlyOnce, 2)] {
        let record = MqttRecordBuilder::new("d").set_properties(properties.clone()).set_qos(qos).build();
        let seen: Value = client.send("m/echo", record).await.unwrap();
        assert_eq!(seen["qos"], number);
        assert_eq!(seen["contentType"], "json");
        assert_eq!(seen["user"], json!(["x-version=1", "x-over=req", "n=1"]));
    }
    // With 3.1.1 the quality of service travels, properties do not.
    let old = MqttClient::new(client_options(&broker).user_properties([("x-version", "1")]));
    let record = MqttRecordBuilder::new("d").set_qos(MqttQos::ExactlyOnce).set_properties(properties).build();
    let seen: Value = old.send("m/echo", record).await.unwrap();
    assert_eq!((&seen["qos"], &seen["user"]), (&json!(2), &json!([])));
    client.close().await;
    old.close().await;
    assert!(service.stop(GRACE).await.clean);
}

/// MQTT-10: retained messages reach whoever subscribes later, and say so.
#[actix::test]
async fn a_retained_event_is_kept_for_later_subscribers() {
    let broker = broker();
    let client = client(&broker);
    let record = MqttRecordBuilder::new(5).set_retain(true).set_qos(MqttQos::AtLeastOnce).build();
    client.emit("kept", record).await.unwrap();
    client.close().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let group = event("kept", move |Ctx(context): Ctx<MqttContext>, Data(number): Data<u64>| {
        sink.lock().push((context.retain(), number));
        async { Ok::<_, RpcError>(()) }
    });
    let (service, _) = serve(server_options(&broker), [group]).await;
    until("it has come", || !seen.lock().is_empty()).await;
    assert_eq!(*seen.lock(), [(true, 5)]);
    service.stop(GRACE).await;
}

/// MQTT-12.
#[actix::test]
async fn a_record_as_a_result_is_published_as_it_says() {
    let broker = broker();
    let group = message("record", async || {
        let properties = MqttProperties::new().user_property("a", "b");
        Ok::<_, RpcError>(
            MqttRecordBuilder::new(7).set_qos(MqttQos::AtLeastOnce).set_properties(properties).build(),
        )
    });
    let (service, _) = serve(server_options(&broker).protocol_version(5), [group]).await;
    let mut raw = Raw::connect(&broker).await;
    raw.subscribe("record/reply").await;
    raw.publish("record", r#"{"pattern":"record","data":1,"id":"x"}"#).await;
    let reply = raw.message().await;
    assert_eq!(
        (&reply.payload[..], reply.qos),
        (&br#"{"response":7,"isDisposed":true,"id":"x"}"#[..], QoS::AtLeastOnce)
    );
    assert_eq!(reply.properties.unwrap().user_properties, [("a".to_owned(), "b".to_owned())]);
    let client = client(&broker);
    assert_eq!(client.send::<i64>("record", 1).await.unwrap(), 7);
    client.close().await;
    service.stop(GRACE).await;
}

/// MQTT-5.
#[actix::test]
async fn what_is_no_packet_is_an_event_and_disturbs_nobody() {
    let broker = broker();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let group = event("evt", move |Data(data): Data<Value>| {
        sink.lock().push(data);
        async { Ok::<_, RpcError>(()) }
    });
    let (service, reports) = serve(server_options(&broker), [sum(), group]).await;
    let mut raw = Raw::connect(&broker).await;
    raw.subscribe("sum/reply").await;
    let texts =
        ["", "not json", "{\"pattern\":\"evt\",", "3", r#"{"pattern":"other","data":4}"#, r#"{"a":1}"#];
    for text in texts {
        raw.publish("evt", text).await;
    }
    raw.publish("evt", &b"\xff\xfe"[..]).await;
    until("they have come", || seen.lock().len() == 7).await;
    assert_eq!(
        *seen.lock(),
        [
            json!(""),
            json!("not json"),
            json!("{\"pattern\":\"evt\","),
            json!(3),
            json!(4),
            json!({"a": 1}),
            json!("\u{fffd}\u{fffd}")
        ]
    );
    // To a message handler they are events, too: it fails and nobody is answered.
    for text in ["", "not json", "[1,2"] {
        raw.publish("sum", text).await;
    }
    // Ids of any kind are echoed, the packet's pattern is not read.
    raw.publish("sum", r#"{"pattern":"zzz","data":[1,2],"id":5}"#).await;
    assert_eq!(
        raw.text().await,
        ("sum/reply".to_owned(), r#"{"response":3,"isDisposed":true,"id":5}"#.to_owned())
    );
    raw.publish("sum", r#"{"pattern":"sum","data":[1,2],"id":null}"#).await;
    assert_eq!(raw.text().await.1, r#"{"response":3,"isDisposed":true,"id":null}"#);
    raw.publish("sum", r#"{"data":"x","id":"y"}"#).await;
    let (_, answer) = raw.text().await;
    assert!(answer.starts_with(r#"{"err":"#) && answer.ends_with(r#""id":"y"}"#), "{answer}");
    assert!(raw.is_silent().await, "{:?}", reports.all());
    service.stop(GRACE).await;
}

/// MQTT-2: what comes on a reply topic.
#[actix::test]
async fn replies_of_any_shape_end_their_call_or_nothing() {
    let broker = broker();
    let client = client(&broker);
    let mut raw = Raw::connect(&broker).await;
    raw.subscribe("fake").await;
    let mut ask = async |replies: &[&str]| {
        let call = client.send::<Value>("fake", 1).timeout(Duration::from_millis(400));
        let answer = async {
            let (_, request) = raw.text().await;
            let request: Value = serde_json::from_str(&request).unwrap();
            for reply in replies {
                let reply = reply.replace("<id>", request["id"].as_str().unwrap());
                raw.publish("fake/reply", reply).await;
            }
        };
        futures::join!(call.stream().collect_all(), answer).0
    };
    let wrong = r#"{"id":"zz","response":1,"isDisposed":true}"#;
    let right = r#"{"id":"<id>","response":2,"isDisposed":true}"#;
    assert_eq!(ask(&[wrong, "oops", "", "5", "null", "[1]", right]).await.unwrap(), [json!(2)]);
    // A foreign object with the call's id is its value.
    assert_eq!(ask(&[r#"{"id":"<id>","x":1}"#]).await.unwrap()[0]["x"], 1);
    assert!(matches!(ask(&[r#"{"id":"<id>","err":"e"}"#]).await, Err(CallError::Remote(_))));
    assert!(matches!(ask(&["oops"]).await, Err(CallError::Timeout { .. })));
    assert_eq!(client.occupied(), 0);
    client.close().await;
}

/// MQTT-14.
#[actix::test]
async fn a_message_that_is_too_large_is_skipped_alone() {
    let broker = broker();
    // MQTT 3.1.1: the broker cannot be told.
    let count = Arc::default();
    let subscribe = MqttSubscribeOptions::qos(MqttQos::ExactlyOnce);
    let options = server_options(&broker).max_packet_bytes(10_000).subscribe_options(subscribe);
    let (service, reports) = serve(options, [sum(), counting("evt", &count)]).await;
    let mut raw = Raw::connect(&broker).await;
    for qos in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce] {
        let payload = format!("\"{}\"", "x".repeat(200_000));
        raw.put(Publish::new("evt", qos, payload, None)).await;
        raw.put(Publish::new("evt", qos, "1", None)).await;
    }
    until("the small ones have come", || count.load(Ordering::Relaxed) == 3).await;
    let skipped = reports.all().iter().filter(|report| report.contains("maxPacketBytes")).count();
    assert_eq!(skipped, 3, "{:?}", reports.all());
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

/// MQTT-14: a broker's own bound, which MQTT 5 tells.
#[actix::test]
async fn a_message_beyond_the_brokers_bound_is_refused_alone() {
    let broker = broker_with("max_packet_size 4096");
    let echo = message("repeat", async |Data(times): Data<usize>| Ok::<_, RpcError>("x".repeat(times)));
    let (service, reports) = serve(server_options(&broker).protocol_version(5), [echo]).await;
    let client = MqttClient::new(client_options(&broker).protocol_version(5));
    let call = client.send::<String>("repeat", "x".repeat(5000)).await;
    assert!(matches!(&call, Err(CallError::Encode(e)) if e.to_string().contains("4096")), "{call:?}");
    // A reply that does not fit becomes an error.
    let call = client.send::<String>("repeat", 5000).await;
    assert!(matches!(call, Err(CallError::Remote(_))), "{call:?}");
    assert!(reports.contain("4096"), "{:?}", reports.all());
    assert_eq!(client.send::<String>("repeat", 3000).await.unwrap().len(), 3000);
    client.close().await;
    service.stop(GRACE).await;
}

/// MQTT-3.
#[actix::test]
async fn patterns_that_mqtt_cannot_carry_are_refused_with_a_reason() {
    let broker = broker();
    let client = client(&broker);
    for pattern in ["", "a/+", "a/#", r#"{"cmd":"a+b"}"#] {
        let call = client.send::<i64>(martlet_core::Pattern::parse(pattern), 1).await;
        assert!(matches!(&call, Err(CallError::Encode(e)) if e.to_string().contains("MQTT")), "{call:?}");
    }
    client.close().await;
    for pattern in ["a/b#", r#"{"cmd":"a+b"}"#, "$share/g"] {
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(says(pattern, ""))
            .server(MqttServer::new(server_options(&broker)));
        let error = service.start().await.unwrap_err().to_string();
        assert!(error.contains("wildcard") || error.contains("shared"), "{error}");
    }
    // An extra that is none.
    let service = Microservice::new()
        .on_current_arbiter()
        .handlers(says("a", "").extra("qos", 3))
        .server(MqttServer::new(server_options(&broker)));
    let error = service.start().await.unwrap_err().to_string();
    assert!(error.contains("extra qos"), "{error}");
}

/// MQTT-4: a handler's extra `qos` wins over the option.
#[actix::test]
async fn a_handler_has_a_quality_of_service_of_its_own() {
    let broker = broker();
    let (service, _) =
        serve(server_options(&broker), [says_context("one").extra("qos", 1), says_context("zero")]).await;
    let client = client(&broker);
    let record = || MqttRecordBuilder::new(1).set_qos(MqttQos::ExactlyOnce).build();
    assert_eq!(client.send::<Value>("one", record()).await.unwrap()["qos"], 1);
    assert_eq!(client.send::<Value>("zero", record()).await.unwrap()["qos"], 0);
    client.close().await;
    service.stop(GRACE).await;
}

/// MQTT-1: metadata travels in the packet, a plain record's headers as user properties.
#[actix::test]
async fn metadata_is_in_the_packet_and_headers_are_user_properties() {
    let broker = broker();
    let mut raw = Raw::connect(&broker).await;
    raw.subscribe("seen").await;
    let client = MqttClient::new(client_options(&broker).protocol_version(5));
    client.emit("seen", Record::new(1).header("x", "y")).await.unwrap();
    let event = raw.message().await;
    assert_eq!(&event.payload[..], br#"{"pattern":"seen","data":1}"#);
    let expected =
        PublishProperties { user_properties: vec![("x".to_owned(), "y".to_owned())], ..Default::default() };
    assert_eq!(event.properties, Some(expected));
    let call = client.send::<u64>("seen", 1).metadata("own", "1").timeout(Duration::from_millis(300));
    let (_, (topic, request)) = futures::join!(call, raw.text());
    let request: Value = serde_json::from_str(&request).unwrap();
    assert_eq!((topic.as_str(), &request["metadata"]["own"]), ("seen", &json!("1")));
    client.close().await;
}

#[actix::test]
async fn unwrap_tells_of_the_connection() {
    let broker = broker();
    let options = server_options(&broker).client_id("known").protocol_version(5);
    let (service, _) = serve(options, [sum()]).await;
    let about = service.servers()[0].unwrap::<MqttConnection>().unwrap();
    assert_eq!(
        (about.client_id.as_str(), about.protocol_version, about.session_present),
        ("known", 5, false)
    );
    service.stop(GRACE).await;
}
