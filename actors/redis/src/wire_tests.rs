// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use martlet_core::Pattern;
use martlet_core::codec::{JsonCodec, MessagePackCodec};
use martlet_core::packet::Raw;
use martlet_testkit::vectors::{Vectors, parsed, raw};
use serde_json::Value;

use super::*;

const NEST_11: &str = include_str!("../tests/vectors/redis.json");
const NEST_12: [&str; 4] = [
    include_str!("../tests/vectors/nest12-redis-event-metadata.json"),
    include_str!("../tests/vectors/nest12-redis-request-metadata.json"),
    include_str!("../tests/vectors/nest12-redis-wildcard-reply.json"),
    include_str!("../tests/vectors/nest12-redis-wildcard-reply-loopback.json"),
];
const LIMIT: usize = 1 << 20;

fn vectors() -> Vectors {
    Vectors::new(NEST_11, &NEST_12)
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn requests_and_events_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("client->server");
    assert!(vectors.len() > 100, "{}", vectors.len());
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        let packet = decode_request(&JsonCodec, body.clone()).unwrap();
        let is_event = vector["kind"] == "event" || *name == "nest12-redis-event-metadata";
        assert_eq!(packet.is_event(), is_event, "{name}");
        let id: Option<String> = packet.id.map(|id| serde_json::from_slice(&id).unwrap());
        let Some(data) = packet.data else { continue };
        let pattern = parsed(text(&packet.pattern.clone().unwrap()));
        let pattern = match pattern {
            Value::String(text) => Pattern::from(text),
            // The author's spelling is kept.
            _ => Pattern::parse(text(&packet.pattern.unwrap())),
        };
        assert_eq!(pattern.route().as_str(), vector["channel"].as_str().unwrap(), "{name}");
        let message = OutboundMessage {
            id: id.map(|id| PacketId::from_text(id.as_bytes()).unwrap()),
            pattern,
            data,
            metadata: packet.metadata.map(|raw| raw.decode().unwrap()).unwrap_or_default(),
            headers: martlet_core::Headers::new(),
            timeout: None,
        };
        let mut out = BytesMut::new();
        encode_request(&JsonCodec, &message, message.id, LIMIT, &mut out).unwrap();
        assert_eq!(text(&out), text(&body), "{name}");
    }
}

#[test]
fn replies_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("server->client");
    assert!(vectors.len() > 100, "{}", vectors.len());
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        let packet = JsonCodec.decode_response((&body).into()).unwrap();
        assert!(!packet.foreign && is_reply(&JsonCodec, &body), "{name}");
        match vector["kind"].as_str() {
            Some("response-final" | "dispose") => {
                assert!(matches!(packet.body, ResponseBody::Last(_)), "{name}");
            }
            Some("response-partial" | "other") => {
                assert!(matches!(packet.body, ResponseBody::Item(_)), "{name}");
            }
            Some("error") => assert!(matches!(packet.body, ResponseBody::Error(_)), "{name}"),
            _ => {}
        }
        let channel = vector["channel"].as_str().unwrap();
        assert!(is_reply_channel(channel.as_bytes()), "{name}");
        if vector["kind"] == "other" {
            // An item without value, which is never sent (README section 4).
            continue;
        }
        let mut out = BytesMut::new();
        encode_response(&JsonCodec, packet.id.as_deref().unwrap(), &packet.body, LIMIT, &mut out).unwrap();
        assert_eq!(text(&out), text(&body), "{name}");
    }
}

#[test]
fn replies_go_where_nestjs_sends_them() {
    let vectors: Vec<_> = parsed(NEST_11)["vectors"].as_array().unwrap().clone();
    let channel_of = |vector: &Value| vector["channel"].as_str().unwrap().to_owned();
    let mut request = String::new();
    let mut replies = 0;
    for vector in &vectors {
        match vector["direction"].as_str().unwrap() {
            "client->server" => request = channel_of(vector),
            _ => {
                assert_eq!(reply_channel(request.as_bytes()), channel_of(vector), "{}", vector["name"]);
                replies += 1;
            }
        }
    }
    assert!(replies > 100, "{replies}");
}

#[test]
fn foreign_messages_are_what_they_are_to_a_nestjs_server() {
    let vectors = vectors().tried("special", "raw->nest-server");
    assert!(vectors.len() > 10, "{}", vectors.len());
    for vector in vectors {
        let name = vector["name"].as_str().unwrap();
        let packet = decode_request(&JsonCodec, raw(&vector)).unwrap();
        let answered = !vector["published_after"].as_array().unwrap().is_empty();
        // On that channel nobody listens: it is not spelled as a route.
        if name != "raw_channel_json_spacing" {
            assert_eq!(!packet.is_event(), answered, "{name}");
        }
        if let Some(event) = vector["server_events"].as_array().unwrap().first() {
            let data = packet.data.map_or(Value::Null, |data| data.to_value().unwrap());
            assert_eq!(data, event[1], "{name}");
        }
    }
}

#[test]
fn a_body_that_is_no_text_is_refused() {
    let error = decode_request(&JsonCodec, Bytes::from_static(b"\xff\xfe{}")).unwrap_err();
    assert_eq!(error, "the body is neither JSON nor text");
    let error = decode_request(&MessagePackCodec, Bytes::from_static(b"\xc1")).unwrap_err();
    assert!(error.contains("malformed packet"), "{error}");
}

#[test]
fn only_replies_are_taken_for_replies() {
    let reply = |body: &'static str| is_reply(&JsonCodec, &Bytes::from_static(body.as_bytes()));
    assert!(reply(r#"{"response":1,"isDisposed":true,"id":"x"}"#));
    assert!(reply(r#"{"err":"boom","isDisposed":true,"id":"x"}"#));
    assert!(reply(r#"{"id":"x","status":"error","err":"no"}"#));
    assert!(reply(r#"{"id":"x"}"#), "NestJS's item without a value");
    assert!(!reply(r#"{"pattern":"a.reply","data":1}"#));
    assert!(!reply(r#"{"response":1,"data":2}"#));
    assert!(!reply("5") && !reply("{}") && !reply("text"));
}

#[test]
fn messages_beyond_the_limit_are_refused() {
    let data = Payload::encode(Format::Json, &"x".repeat(100)).unwrap();
    let mut out = BytesMut::new();
    let error = encode_response(&JsonCodec, b"\"1\"", &ResponseBody::Item(data), 100, &mut out).unwrap_err();
    assert!(matches!(error, WireError::TooLarge { size: 124, limit: 100 }), "{error}");
}

#[test]
fn ids_are_compared_as_texts() {
    assert_eq!(id_text(Format::Json, b"\"abc\""), Some(&b"abc"[..]));
    assert_eq!(id_text(Format::Json, b"7"), None);
    let packed = Raw::text(Format::MessagePack, "abc");
    assert_eq!(id_text(Format::MessagePack, &packed), Some(&b"abc"[..]));
}

#[test]
fn channels_have_a_limit() {
    assert_eq!(check_channel(r#"{"cmd":"sum"}"#), Ok(()));
    assert_eq!(check_channel(&"c".repeat(MAX_CHANNEL)), Ok(()));
    assert!(check_channel(&"c".repeat(MAX_CHANNEL + 1)).is_err());
}
