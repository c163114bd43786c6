// SPDX-License-Identifier: MIT OR Apache-2.0
//! Headers, properties and bytes: what travels beside the packet, and what is no JSON of its own.

use martlet::Record;
use martlet::mqtt::{MqttProperties, MqttQos, MqttRecordBuilder};
use martlet::rabbitmq::{RmqRecordBuilder, RmqRecordOptions};
use serde_json::{Value, json};

use crate::pair::Pair;
use crate::peer::eventually;
use crate::wire::Transport;
use crate::{behaviours, everywhere, with_headers};

fn on_rmq(_: u32, transport: Transport) -> bool {
    transport.is_rmq()
}

fn on_mqtt(_: u32, transport: Transport) -> bool {
    transport.is_mqtt()
}

/// NestJS 10 and 11 end on what is not JSON on NATS.
fn on_other_brokers(_: u32, transport: Transport) -> bool {
    transport.wire().broker.is_some() && transport != Transport::Nats
}

behaviours! { TO_MARTLET:
    "headers of a record (MQTT 5: user properties)" [with_headers] headers_to_us,
    "headers of the client, overridden by the call" [with_headers] static_headers_to_us,
    "properties of a record: every one of AMQP" [on_rmq] properties_to_us,
    "properties of a record: QoS and content type" [on_mqtt] publish_options_to_us,
    "a Buffer" [everywhere] buffer_to_us,
    "messages of others: text, JSON and bytes without packet" [on_other_brokers] foreign_events,
}

behaviours! { TO_NEST:
    "headers of a record (MQTT 5: user properties)" [with_headers] headers_to_nest,
    "headers of the client, overridden by the call" [with_headers] static_headers_to_nest,
    "properties of a record: every one of AMQP" [on_rmq] properties_to_nest,
    "properties of a record: QoS and content type" [on_mqtt] publish_options_to_nest,
    "a Buffer" [everywhere] buffer_to_nest,
    "a member named options" [everywhere] member_named_options,
}

/// The option by which a client has headers for all its messages.
fn static_headers(pair: &Pair, headers: Value) -> Value {
    match pair.transport.is_mqtt() {
        true => json!({ "userProperties": headers }),
        false => json!({ "headers": headers }),
    }
}

// === a NestJS client calls our service ===

async fn headers_to_us(pair: &Pair) {
    pair.nest.send(json!("headers"), json!(1)).await.completes(json!([null]));
    let headers = json!({ "x-Version": ["1.0"], "many": ["1", "2"] });
    let more = json!({ "headers": headers });
    pair.nest.send_with(json!("headers"), json!(1), more.clone()).await.completes(json!([headers]));
    // The record is unwrapped: the handler sees its data alone.
    pair.nest.send_with(json!("echo"), json!({ "a": 1 }), more).await.completes(json!([{ "a": 1 }]));
}

async fn static_headers_to_us(pair: &Pair) {
    let options = static_headers(pair, json!({ "x-static": "s", "x-over": "client" }));
    let nest = pair.place.nest(pair.version, "client", &["--options", &options.to_string()]).await;
    let seen = json!([{ "x-static": ["s"], "x-over": ["client"] }]);
    nest.send(json!("headers"), json!(1)).await.completes(seen);
    let more = json!({ "headers": { "x-over": "call" } });
    let seen = json!([{ "x-static": ["s"], "x-over": ["call"] }]);
    nest.send_with(json!("headers"), json!(1), more).await.completes(seen);
    nest.expect_errors(0).await;
}

async fn properties_to_us(pair: &Pair) {
    let record = json!({
        "priority": 3, "expiration": 60_000, "contentType": "application/json", "contentEncoding": "utf-8",
        "messageId": "m1", "timestamp": 1234, "type": "t", "appId": "lab", "userId": "guest",
        "persistent": true,
    });
    let sent = pair.nest.send_with(json!("delivery"), json!(1), json!({ "record": record })).await;
    let seen = &sent.0["items"][0];
    let expected = [
        ("priority", json!(3)),
        ("expiration", json!("60000")),
        ("contentType", json!("application/json")),
        ("contentEncoding", json!("utf-8")),
        ("messageId", json!("m1")),
        ("timestamp", json!(1234)),
        ("type", json!("t")),
        ("appId", json!("lab")),
        ("userId", json!("guest")),
        ("deliveryMode", json!(2)),
        ("redelivered", json!(false)),
    ];
    for (name, value) in expected {
        assert_eq!(seen[name], value, "{name} of {seen}");
    }
    let plain = pair.nest.send(json!("delivery"), json!(1)).await;
    assert_eq!(plain.0["items"][0]["deliveryMode"], 1, "{plain:?}");
}

async fn publish_options_to_us(pair: &Pair) {
    let record = json!({ "qos": 1, "properties": { "contentType": "json" } });
    let sent = pair.nest.send_with(json!("delivery"), json!(1), json!({ "record": record })).await;
    let content_type = if pair.transport == Transport::Mqtt5 { json!("json") } else { Value::Null };
    // The lower one of publisher and subscription.
    sent.completes(json!([
        { "qos": 0, "retain": false, "dup": false, "properties": { "contentType": content_type } }
    ]));
    // A handler's own quality of service.
    let subjects = &pair.ours().seen.subjects;
    subjects.lock().unwrap().clear();
    pair.nest.emit_with(json!("qosEvent"), json!(1), json!({ "record": { "qos": 2 } })).await;
    eventually("the event", || async { *subjects.lock().unwrap() == ["1"] }).await;
    subjects.lock().unwrap().clear();
}

async fn buffer_to_us(pair: &Pair) {
    let sent = pair.nest.send_with(json!("echo"), json!(1), json!({ "base64": "AP+A" })).await;
    sent.completes(json!([{ "type": "Buffer", "data": [0, 255, 128] }]));
    let seen = &pair.ours().seen;
    pair.nest.emit_with(json!("notification"), json!(1), json!({ "base64": "AP+A" })).await;
    let buffer = json!({ "type": "Buffer", "data": [0, 255, 128] });
    eventually("the event", || async {
        let last = seen.last.lock().unwrap().as_ref().map(|last| last.to_value().unwrap());
        last.as_ref() == Some(&buffer)
    })
    .await;
}

/// On Redis, NATS and MQTT whatever arrives at an event's address is its data. RabbitMQ has one address for all, so that
/// nobody knows which event it is.
async fn foreign_events(pair: &Pair) {
    let seen = &pair.ours().seen;
    let count = || seen.notifications.load(std::sync::atomic::Ordering::SeqCst);
    pair.ours().take_events();
    let publish = |field: &'static str, value: &'static str| async move {
        let before = count();
        let address = if pair.transport.is_rmq() && pair.transport != Transport::RmqWildcards {
            pair.place.queue.clone()
        } else {
            "notification".to_owned()
        };
        let mut command = json!({ "address": address });
        command[field] = json!(value);
        if pair.transport == Transport::RmqWildcards {
            command["exchange"] = json!(pair.place.queue);
        }
        pair.nest.raw(command).await;
        before
    };
    let foreign = [
        ("text", "plain text", json!("plain text")),
        ("text", "{\"a\":[1,2]}", json!({ "a": [1, 2] })),
        ("text", "42", json!(42)),
        ("text", "{\"id\":\"n\",\"foo\":1}", json!({ "id": "n", "foo": 1 })),
        ("text", "{\"data\":7}", json!(7)),
    ];
    if pair.transport.is_rmq() {
        for (field, value, _) in foreign {
            publish(field, value).await;
        }
        publish("base64", "/w==").await;
        pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
        let reported = pair.ours().take_events();
        assert_eq!(reported.len(), 6, "{reported:?}");
        assert!(reported.iter().all(|it| ["no_event_handler", "bad_input"].contains(it)), "{reported:?}");
        return;
    }
    for (field, value, data) in foreign {
        let before = publish(field, value).await;
        eventually("the event", || async { count() == before + 1 }).await;
        let last = seen.last.lock().unwrap().take().unwrap();
        assert_eq!(last.to_value().unwrap(), data, "{value}");
    }
    // Bytes that are no text at all.
    publish("base64", "/w==").await;
    pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    pair.ours().take_events();
}

// === our client calls a NestJS service ===

async fn headers_to_nest(pair: &Pair) {
    let mut record = Record::new(json!({ "a": 1 })).header("x-Version", "1.0");
    let mut expected = json!({ "x-Version": ["1.0"] });
    // AMQP's headers are a table: one value for each name.
    if !pair.transport.is_rmq() {
        record = record.header("many", "1").header("many", "2");
        expected["many"] = json!(["1", "2"]);
    }
    let mut seen: Value = pair.client().send("headers", record.clone()).await.unwrap();
    // The deadline travels beside, on NATS.
    seen.as_object_mut().unwrap().retain(|name, _| !name.starts_with("martlet-"));
    assert_eq!(seen, expected);
    assert_eq!(pair.client().send::<Value>("echo", record).await.unwrap(), json!({ "a": 1 }));
    let seen: Value = match pair.transport {
        Transport::Nats => {
            let built = martlet::nats::NatsRecordBuilder::new(1).set_header("x-built", "yes").build();
            pair.client().send("headers", built).await.unwrap()
        }
        Transport::Mqtt5 => {
            let properties = MqttProperties::new().user_property("x-built", "yes");
            let built = MqttRecordBuilder::new(1).set_properties(properties).build();
            pair.client().send("headers", built).await.unwrap()
        }
        _ => {
            let built = RmqRecordBuilder::new(1).set_header("x-built", "yes").build();
            pair.client().send("headers", built).await.unwrap()
        }
    };
    assert_eq!(seen["x-built"], json!(["yes"]), "{seen}");
}

async fn static_headers_to_nest(pair: &Pair) {
    let client = pair.place.client_with(static_headers(pair, json!({ "x-static": "s", "x-over": "client" })));
    let seen: Value = client.send("headers", 1).await.unwrap();
    assert_eq!((&seen["x-static"], &seen["x-over"]), (&json!(["s"]), &json!(["client"])), "{seen}");
    let seen: Value = client.send("headers", Record::new(1).header("x-over", "call")).await.unwrap();
    assert_eq!((&seen["x-static"], &seen["x-over"]), (&json!(["s"]), &json!(["call"])), "{seen}");
    client.close().await;
}

async fn properties_to_nest(pair: &Pair) {
    let mut options = RmqRecordOptions::new();
    options.priority = Some(3);
    options.expiration = Some(60_000);
    options.content_type = Some("application/json".to_owned());
    options.content_encoding = Some("utf-8".to_owned());
    options.message_id = Some("m1".to_owned());
    options.timestamp = Some(1234);
    options.kind = Some("t".to_owned());
    options.app_id = Some("lab".to_owned());
    options.user_id = Some("guest".to_owned());
    options.persistent = Some(true);
    let record = RmqRecordBuilder::new(1).set_options(options).build();
    let seen: Value = pair.client().send("delivery", record).await.unwrap();
    let expected = [
        ("priority", json!(3)),
        ("expiration", json!("60000")),
        ("contentType", json!("application/json")),
        ("contentEncoding", json!("utf-8")),
        ("messageId", json!("m1")),
        ("timestamp", json!(1234)),
        ("type", json!("t")),
        ("appId", json!("lab")),
        ("userId", json!("guest")),
        ("deliveryMode", json!(2)),
    ];
    for (name, value) in expected {
        assert_eq!(seen[name], value, "{name} of {seen}");
    }
    let plain: Value = pair.client().send("delivery", 1).await.unwrap();
    assert_eq!(plain["deliveryMode"], 1, "{plain}");
}

async fn publish_options_to_nest(pair: &Pair) {
    let properties = MqttProperties::new().content_type("json");
    let record = MqttRecordBuilder::new(1).set_qos(MqttQos::AtLeastOnce).set_properties(properties).build();
    let seen: Value = pair.client().send("delivery", record).await.unwrap();
    assert_eq!((&seen["qos"], &seen["retain"]), (&json!(0), &json!(false)), "{seen}");
    if pair.transport == Transport::Mqtt5 {
        assert_eq!(seen["properties"]["contentType"], "json", "{seen}");
    }
    if pair.version >= 11 {
        let record = MqttRecordBuilder::new(1).set_qos(MqttQos::ExactlyOnce).build();
        pair.client().emit("qosEvent", record).await.unwrap();
        eventually("the event", || async {
            let subjects: Vec<Value> = pair.client().send("subjects", 1).await.unwrap();
            subjects.contains(&json!(1))
        })
        .await;
    }
}

async fn buffer_to_nest(pair: &Pair) {
    let buffer = json!({ "type": "Buffer", "data": [0, 255, 128] });
    assert_eq!(pair.client().send::<Value>("buffer", "AP+A").await.unwrap(), buffer);
    assert_eq!(pair.client().send::<Value>("echo", &buffer).await.unwrap(), buffer);
}

/// NestJS's own clients of 11 and 12 take it out of MQTT payloads.
async fn member_named_options(pair: &Pair) {
    let value = json!({ "a": 1, "options": { "b": 2 } });
    assert_eq!(pair.client().send::<Value>("echo", &value).await.unwrap(), value);
}
