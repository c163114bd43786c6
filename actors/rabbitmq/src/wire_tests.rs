// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use martlet_core::codec::JsonCodec;
use martlet_testkit::vectors::{Vectors, parsed, raw};

use super::*;
use martlet_core::Pattern;

const NEST_11: &str = include_str!("../tests/vectors/rabbitmq.json");
const NEST_12: [&str; 2] = [
    include_str!("../tests/vectors/nest12-rmq-event-metadata.json"),
    include_str!("../tests/vectors/nest12-rmq-request-metadata.json"),
];
const LIMITS: Limits = Limits { header_bytes: 1000, body_bytes: 1 << 20 };

fn vectors() -> Vectors {
    Vectors::new(NEST_11, &NEST_12)
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn requests_and_events_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("client->server");
    assert!(vectors.len() > 120, "{}", vectors.len());
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        let packet = decode_request(&JsonCodec, body.clone()).unwrap();
        let has_correlation = !vector["properties"]["correlationId"].is_null();
        assert_eq!(packet.is_event(), !has_correlation, "{name}");
        let id: Option<String> = packet.id.map(|id| serde_json::from_slice(&id).unwrap());
        let Some(data) = packet.data else { continue };
        let raw_pattern = packet.pattern.unwrap();
        let pattern = match parsed(text(&raw_pattern)) {
            Value::String(text) => Pattern::from(text),
            // The author's spelling is kept.
            _ => Pattern::parse(text(&raw_pattern)),
        };
        // RMQ-6: NestJS's key is the caller's spelling, which misses what servers bind.
        if !vector["exchange"].as_str().unwrap().is_empty() && vector["name"] != "wild_object_pattern/1" {
            assert_eq!(pattern.route().as_str(), vector["routing_key"].as_str().unwrap(), "{name}");
        }
        let message = OutboundMessage {
            id: id.map(|id| PacketId::from_text(id.as_bytes()).unwrap()),
            pattern,
            data,
            metadata: packet.metadata.map(|raw| raw.decode().unwrap()).unwrap_or_default(),
            headers: Headers::new(),
            timeout: None,
        };
        let written = encode_request(&JsonCodec, &message, LIMITS, &mut BytesMut::new()).unwrap();
        assert_eq!(text(&written), text(&body), "{name}");
    }
}

#[test]
fn replies_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("server->client");
    assert!(vectors.len() > 100, "{}", vectors.len());
    let mut without_handler = 0;
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        let id = vector["properties"]["correlationId"].as_str().unwrap();
        let packet = decode_response(&JsonCodec, id, &body);
        // Of an item without value, which is never sent (README section 4), nothing is left but `{}`.
        assert_eq!(packet.foreign, vector["kind"] == "other", "{name}");
        assert_eq!(packet.id.as_deref(), Some(format!("\"{id}\"").as_bytes()), "{name}");
        match vector["kind"].as_str() {
            Some("response-final" | "dispose") => {
                assert!(matches!(packet.body, ResponseBody::Last(_)), "{name}")
            }
            Some("response-partial") => assert!(matches!(packet.body, ResponseBody::Item(_)), "{name}"),
            Some("error") => {
                assert!(matches!(packet.body, ResponseBody::Error(_) | ResponseBody::NoHandler), "{name}");
            }
            _ => continue,
        }
        let id = packet.id.unwrap();
        let written = encode_response(&JsonCodec, &id, &packet.body, LIMITS, &mut BytesMut::new()).unwrap();
        if let ResponseBody::NoHandler = packet.body {
            // The same members in another order, which means nothing to NestJS.
            assert_eq!(parsed(text(&written)), parsed(text(&body)), "{name}");
            without_handler += 1;
        } else {
            assert_eq!(text(&written), text(&body), "{name}");
        }
    }
    assert!(without_handler >= 2);
}

#[test]
fn foreign_messages_are_what_they_are_to_a_nestjs_server() {
    let vectors = vectors().tried("setup_and_raw", "raw->nest-server");
    assert_eq!(vectors.len(), 14);
    for vector in vectors {
        let name = vector["name"].as_str().unwrap();
        let packet = decode_request(&JsonCodec, raw(&vector));
        match name {
            // Reported as what they are, rather than as an unknown event.
            "raw_plain_text" | "raw_empty" => {
                packet.unwrap_err();
            }
            "raw_external_object" | "raw_number" | "raw_null" => {
                let packet = packet.unwrap();
                assert!(packet.is_event() && packet.pattern.is_none(), "{name}");
            }
            "raw_no_id_with_reply_to" | "raw_event" => assert!(packet.unwrap().is_event(), "{name}"),
            _ => assert!(!packet.unwrap().is_event(), "{name}"),
        }
    }
}

#[test]
fn foreign_replies_are_what_they_are_to_a_nestjs_client() {
    let vectors = vectors().tried("setup_and_raw", "raw->nest-client");
    assert_eq!(vectors.len(), 9);
    let id = "0123456789abcdef01234";
    for vector in vectors {
        let name = vector["name"].as_str().unwrap();
        if ["reply_wrong_correlation", "reply_no_correlation"].contains(&name) {
            // Never read: the property says whose it is.
            continue;
        }
        let (mut next, mut complete, mut error) = (Vec::new(), false, Value::Null);
        for reply in vector["replies"].as_array().unwrap() {
            let body = Bytes::from(reply["body"].as_str().unwrap().to_owned());
            let packet = decode_response(&JsonCodec, id, &body);
            assert_eq!(packet.id.as_deref(), Some(format!("\"{id}\"").as_bytes()), "{name}");
            complete |= packet.body.is_final();
            match packet.body {
                ResponseBody::Item(value) | ResponseBody::Last(Some(value)) => {
                    next.push(value.to_value().unwrap());
                }
                ResponseBody::Error(value) => error = value.to_value().unwrap(),
                _ => {}
            }
        }
        let observed = &vector["client_observed"];
        assert_eq!(Value::from(next), observed["next"], "{name}");
        assert_eq!(complete && error.is_null(), observed["complete"] == true, "{name}");
        assert_eq!(error, observed.get("error").cloned().unwrap_or_default(), "{name}");
    }
}

/// Properties by NestJS's names.
fn shown(properties: &BasicProperties) -> Value {
    let text = |value: &Option<ShortString>| value.as_ref().map(|text| Value::from(text.as_str()));
    let number = |value: Option<u64>| value.map(Value::from);
    let table = properties.headers().as_ref().map(|table| json_value(&AMQPValue::FieldTable(table.clone())));
    let all = [
        ("contentType", text(properties.content_type())),
        ("contentEncoding", text(properties.content_encoding())),
        ("headers", table),
        ("deliveryMode", number(properties.delivery_mode().map(u64::from))),
        ("priority", number(properties.priority().map(u64::from))),
        ("replyTo", text(properties.reply_to())),
        ("expiration", text(properties.expiration())),
        ("messageId", text(properties.message_id())),
        ("timestamp", number(*properties.timestamp())),
        ("type", text(properties.kind())),
        ("userId", text(properties.user_id())),
        ("appId", text(properties.app_id())),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

#[test]
fn a_full_record_has_the_properties_that_nestjs_sends() {
    let vectors = vectors().captured("client->server");
    let vector = vectors.iter().find(|vector| vector["name"] == "record_builder_full/1").unwrap();
    let mut expected = vector["properties"].clone();
    expected.as_object_mut().unwrap().remove("correlationId");
    let options: crate::RmqRecordOptions = serde_json::from_value(serde_json::json!({
        "headers": {"x-over": "req", "n": 5, "b": true, "o": {"k": "v"}}, "priority": 3, "expiration": 5000,
        "contentType": "application/json", "contentEncoding": "utf-8", "messageId": "mid", "timestamp": 123,
        "type": "ty", "appId": "app", "userId": "guest", "persistent": false, "replyTo": "x",
    }))
    .unwrap();
    let record = crate::RmqRecordBuilder::new(1).set_options(options).build();
    let fixed: Headers = [("x-v", "1"), ("x-over", "client")].into_iter().collect();
    let base = base_properties(&table_of(&fixed).unwrap(), Some(true));
    assert_eq!(shown(&with_own(base, &record.headers, LIMITS).unwrap()), expected);
}

#[test]
fn a_message_without_headers_has_an_empty_table() {
    let properties = with_own(base_properties(&FieldTable::default(), Some(false)), &Headers::new(), LIMITS);
    assert_eq!(shown(&properties.unwrap()), serde_json::json!({"headers": {}, "deliveryMode": 1}));
    assert_eq!(shown(&base_properties(&FieldTable::default(), None)), serde_json::json!({"headers": {}}));
}

#[test]
fn properties_that_the_broker_would_close_the_channel_for_are_refused() {
    let check = |name: &str, value: &str| {
        let own: Headers = [(name, value)].into_iter().collect();
        with_own(BasicProperties::default(), &own, LIMITS)
    };
    for (name, value) in [
        ("amqp.priority", "256"),
        ("amqp.expiration", "soon"),
        ("amqp.expiration", "-1"),
        ("amqp.timestamp", "x"),
        ("amqp.persistent", "yes"),
        ("amqp.nothing", "1"),
        ("amqp.headers.x", "{"),
    ] {
        assert!(matches!(check(name, value), Err(WireError::Property { .. })), "{name}");
    }
    let long = "x".repeat(256);
    assert!(matches!(check("amqp.messageId", &long), Err(WireError::TooLong { size: 256, .. })));
    assert!(matches!(check(&long, "v"), Err(WireError::TooLong { .. })));
    check("amqp.messageId", &long[1..]).unwrap();
}

#[test]
fn bounds_hold_from_both_sides() {
    let own: Headers = [("k", "v")].into_iter().collect();
    let check = |header_bytes| {
        with_own(BasicProperties::default(), &own, Limits { header_bytes, ..LIMITS }).map(|_| ())
    };
    check(8).unwrap();
    assert!(matches!(check(7), Err(WireError::HeadersTooLarge { size: 8, limit: 7 })));
    let body = ResponseBody::Last(None);
    let size = br#"{"isDisposed":true}"#.len();
    let mut out = BytesMut::new();
    let mut check = |body_bytes| {
        encode_response(&JsonCodec, b"1", &body, Limits { body_bytes, ..LIMITS }, &mut out)
            .map(|bytes| bytes.len())
    };
    assert_eq!(check(size).unwrap(), size);
    assert!(matches!(check(size - 1), Err(WireError::TooLarge { .. })));
    assert_eq!(check(size).unwrap(), size);
}

#[test]
fn json_becomes_amqp_and_back() {
    let value =
        serde_json::json!({"n": 1, "d": 1.5, "t": "x", "b": true, "z": null, "a": [1, "y"], "o": {"k": "v"}});
    assert_eq!(json_value(&amqp_value(&value)), value);
}

#[test]
fn every_reply_address_that_was_captured_is_sound() {
    let direct: Vec<String> = vectors()
        .captured("server->client")
        .iter()
        .map(|vector| vector["routing_key"].as_str().unwrap().to_owned())
        .filter(|key| key.starts_with(DIRECT_REPLY_TO))
        .collect();
    assert!(direct.len() > 80, "{}", direct.len());
    direct.iter().for_each(|address| assert!(is_sound_reply_address(address), "{address}"));
}

#[test]
fn reply_addresses_that_only_look_like_the_brokers_are_told_apart() {
    let sound = "amq.rabbitmq.reply-to.g1h2AA1yZXBseUA5NTAyNjUzAAAJwwAAAABrAt2G.Umgw4wX0UaeklbfAkJWspA==";
    for good in [sound, "my.replies", "", "amq.gen-abc"] {
        assert!(is_sound_reply_address(good), "{good}");
    }
    for bad in [
        "amq.rabbitmq.reply-to",
        "amq.rabbitmq.reply-to.",
        "amq.rabbitmq.reply-to.garbage",
        "amq.rabbitmq.reply-to.a.b",
        "amq.rabbitmq.reply-to.AAAA.BBBB",
        "amq.rabbitmq.reply-to.g1h2.{}==",
        "amq.rabbitmq.reply-to.g1h2.AAAA.AAAA",
        "amq.rabbitmq.reply-to.g1h2AA1yZXBseUA5NTAyNjUzAAAJwwAAAABrAt2G",
        "amq.rabbitmq.reply-to.g1h2AA1yZXBseUA5NTAyNjUzAAAJwwAAAABrAt2G.",
        "amq.rabbitmq.reply-to.g1h2AA1yZXBseUA5NTAyNjUzAAAJwwAAAABrAt2GAAAA.AAAA",
        "amq.rabbitmq.reply-to.g1h2AAFyZXBseUA5NTAyNjUzAAAJwwAAAABrAt2G.AAAA",
    ] {
        assert!(!is_sound_reply_address(bad), "{bad}");
    }
}
