// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use martlet_core::codec::{JsonCodec, MessagePackCodec};
use martlet_core::{Headers, Pattern};
use martlet_testkit::vectors::{Vectors, parsed, raw};
use serde_json::Value;

use super::*;

const NEST_11: &str = include_str!("../tests/vectors/mqtt.json");
const NEST_12: [&str; 3] = [
    include_str!("../tests/vectors/nest12-mqtt-event-metadata.json"),
    include_str!("../tests/vectors/nest12-mqtt-request-metadata.json"),
    include_str!("../tests/vectors/nest12-mqtt5-request-metadata.json"),
];

fn vectors() -> Vectors {
    Vectors::new(NEST_11, &NEST_12)
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// MQTT-1: topics and payloads.
#[test]
fn requests_and_events_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("client->server");
    assert!(vectors.len() > 110, "{}", vectors.len());
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        let packet = decode_request(&JsonCodec, &body).unwrap();
        let is_event = vector["kind"] == "event" || vector["name"] == "nest12-mqtt-event-metadata";
        assert_eq!(packet.is_event(), is_event, "{name}");
        let id: Option<String> = packet.id.map(|id| serde_json::from_slice(&id).unwrap());
        let Some(data) = packet.data else { continue };
        let pattern = match parsed(text(&packet.pattern.clone().unwrap())) {
            Value::String(text) => Pattern::from(text),
            // The author's spelling is kept.
            _ => Pattern::parse(text(&packet.pattern.unwrap())),
        };
        assert_eq!(pattern.route().as_str(), vector["topic"].as_str().unwrap(), "{name}");
        let message = OutboundMessage {
            id: id.map(|id| PacketId::from_text(id.as_bytes()).unwrap()),
            pattern,
            data,
            metadata: packet.metadata.map(|raw| raw.decode().unwrap()).unwrap_or_default(),
            headers: Headers::new(),
            timeout: None,
        };
        let mut written = BytesMut::new();
        encode_request(&JsonCodec, &message, &mut written).unwrap();
        assert_eq!(text(&written), text(&body), "{name}");
    }
}

/// MQTT-2.
#[test]
fn replies_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("server->client");
    assert!(vectors.len() > 100, "{}", vectors.len());
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        assert!(vector["topic"].as_str().unwrap().ends_with(crate::topics::REPLY), "{name}");
        let packet = JsonCodec.decode_response((&body).into()).unwrap();
        assert!(!packet.foreign && is_reply(&JsonCodec, &body), "{name}");
        match vector["kind"].as_str() {
            Some("response-final" | "dispose") => {
                assert!(matches!(packet.body, ResponseBody::Last(_)), "{name}")
            }
            Some("response-partial" | "other") => {
                assert!(matches!(packet.body, ResponseBody::Item(_)), "{name}")
            }
            Some("error") => assert!(matches!(packet.body, ResponseBody::Error(_)), "{name}"),
            _ => panic!("{name}"),
        }
        if vector["kind"] == "other" {
            // An item without value, which is never sent.
            continue;
        }
        let mut written = BytesMut::new();
        encode_response(&JsonCodec, packet.id.as_deref().unwrap(), &packet.body, &mut written).unwrap();
        assert_eq!(text(&written), text(&body), "{name}");
    }
}

/// MQTT-5.
#[test]
fn foreign_messages_are_what_they_are_to_a_nestjs_server() {
    let vectors = vectors().tried("raw", "raw->nest-server");
    assert_eq!(vectors.len(), 8);
    for vector in vectors {
        let name = vector["name"].as_str().unwrap();
        let packet = decode_request(&JsonCodec, &raw(&vector)).unwrap();
        let answered = !vector["replies"].as_array().unwrap().is_empty();
        assert_eq!(packet.is_event(), !answered, "{name}");
        if let Some(seen) = vector["server_events"].get(0) {
            assert_eq!(packet.data.unwrap().to_value().unwrap(), seen[1], "{name}");
        }
    }
    // Where text is no value of the codec's, it is no packet.
    assert!(decode_request(&MessagePackCodec, &Bytes::from_static(b"\xc1")).is_err());
}

/// MQTT-2: replies that are none of NestJS's are told from requests and events.
#[test]
fn only_replies_are_replies() {
    for reply in [
        r#"{"response":1,"isDisposed":true,"id":"a"}"#,
        r#"{"err":"e","isDisposed":true,"id":"a"}"#,
        r#"{"isDisposed":true,"id":"a"}"#,
        r#"{"id":"a","status":"error","err":"x"}"#,
    ] {
        assert!(is_reply(&JsonCodec, &Bytes::from_static(reply.as_bytes())), "{reply}");
    }
    for other in [
        r#"{"pattern":"a","data":1,"id":"a"}"#,
        r#"{"pattern":"a","data":1}"#,
        "5",
        "text",
        "{}",
        r#"{"response":1}"#,
    ] {
        assert!(!is_reply(&JsonCodec, &Bytes::from_static(other.as_bytes())), "{other}");
    }
}

#[test]
fn an_error_of_ours_ends_the_call_it_is_about() {
    let id = PacketId::from_text(b"0abcdef000000070fffff").unwrap();
    for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
        let packet = failed_call(codec.format(), &id, "refused");
        assert_eq!(packet_id(packet.id.as_ref().unwrap()), Some(id));
        assert!(matches!(packet.body, ResponseBody::Error(_)));
    }
}
