// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use martlet_core::codec::JsonCodec;
use martlet_testkit::vectors::{Vectors, parsed, raw};

use super::*;
use martlet_core::Pattern;
use serde_json::Value;

const NEST_11: &str = include_str!("../tests/vectors/nats.json");
const NEST_12: [&str; 4] = [
    include_str!("../tests/vectors/nest12-nats-event-metadata.json"),
    include_str!("../tests/vectors/nest12-nats-reply.json"),
    include_str!("../tests/vectors/nest12-nats-request-metadata-and-headers.json"),
    include_str!("../tests/vectors/nest12-nats-request-metadata.json"),
];

fn vectors() -> Vectors {
    Vectors::new(NEST_11, &NEST_12)
}

fn decode_request(codec: &dyn Codec, body: &Bytes, headers: &Headers) -> Result<IncomingPacket, String> {
    let mut packet = IncomingPacket::default();
    read_request(codec, body.clone(), headers, &mut packet).map(|()| packet)
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn requests_and_events_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("client->server");
    assert!(vectors.len() > 110, "{}", vectors.len());
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        let packet = decode_request(&JsonCodec, &body, &Headers::new()).unwrap();
        let is_event = vector["kind"] == "event" || vector["name"] == "nest12-nats-event-metadata";
        assert_eq!(packet.is_event(), is_event, "{name}");
        let id: Option<String> = packet.id.map(|id| serde_json::from_slice(&id).unwrap());
        let Some(data) = packet.data else { continue };
        let pattern = parsed(text(&packet.pattern.clone().unwrap()));
        let pattern = match pattern {
            Value::String(text) => Pattern::from(text),
            // The author's spelling is kept.
            _ => Pattern::parse(text(&packet.pattern.unwrap())),
        };
        if let Some(subject) = vector["subject"].as_str() {
            assert_eq!(pattern.route().as_str(), subject, "{name}");
        }
        let message = OutboundMessage {
            id: id.map(|id| PacketId::from_text(id.as_bytes()).unwrap()),
            pattern,
            data,
            metadata: packet.metadata.map(|raw| raw.decode().unwrap()).unwrap_or_default(),
            headers: Headers::new(),
            timeout: None,
        };
        let metadata = Some(&message.metadata).filter(|metadata| !metadata.is_empty());
        let written =
            encode_request(&JsonCodec, &message, message.id, metadata, &mut BytesMut::new()).unwrap();
        assert_eq!(text(&written), text(&body), "{name}");
    }
}

#[test]
fn replies_of_nestjs_are_read_and_written_byte_for_byte() {
    let vectors = vectors().captured("server->client");
    assert!(vectors.len() > 100, "{}", vectors.len());
    for vector in vectors {
        let (name, body) = (&vector["name"], raw(&vector));
        let value = parsed(text(&body));
        let id = value["id"].as_str().unwrap().to_owned();
        let Answer::Reply(packet) = decode_response(&JsonCodec, &id, None, &body) else { panic!("{name}") };
        assert!(!packet.foreign, "{name}");
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
        if vector["kind"] == "other" {
            // An item without value, which is never sent (README section 4).
            continue;
        }
        let written =
            encode_response(&JsonCodec, packet.id.as_deref().unwrap(), &packet.body, &mut BytesMut::new());
        assert_eq!(text(&written.unwrap()), text(&body), "{name}");
    }
}

#[test]
fn foreign_messages_are_what_they_are_to_a_nestjs_server() {
    let vectors = vectors().tried("raw", "raw->nest-server");
    assert_eq!(vectors.len(), 11);
    for vector in vectors {
        let name = vector["name"].as_str().unwrap();
        let packet = decode_request(&JsonCodec, &raw(&vector), &Headers::new());
        match name {
            "raw_bad_json" | "raw_empty_payload" => {
                packet.unwrap_err();
            }
            "raw_json_external"
            | "raw_json_number"
            | "raw_json_null"
            | "raw_request_without_id_with_reply" => {
                let packet = packet.unwrap();
                assert!(packet.is_event(), "{name}");
                assert!(packet.data.is_some(), "{name}");
            }
            _ => assert!(!packet.unwrap().is_event(), "{name}"),
        }
    }
}

#[test]
fn foreign_replies_are_what_they_are_to_a_nestjs_client() {
    let vectors = vectors().tried("raw", "raw->nest-client");
    assert_eq!(vectors.len(), 10);
    let id = "0123456789abcdef01234";
    for vector in vectors {
        let name = vector["name"].as_str().unwrap();
        let (mut next, mut complete, mut error) = (Vec::new(), false, Value::Null);
        for reply in vector["replies"].as_array().unwrap() {
            let body = Bytes::from(reply.as_str().unwrap().replace("<id>", id));
            match decode_response(&JsonCodec, id, None, &body) {
                Answer::Foreign => assert_eq!(name, "reply_with_wrong_id"),
                Answer::Nobody => assert_eq!(name, "reply_empty_payload"),
                Answer::Reply(packet) => {
                    assert_eq!(packet.id.as_deref(), Some(format!("\"{id}\"").as_bytes()), "{name}");
                    complete |= packet.body.is_final();
                    match packet.body {
                        ResponseBody::Item(value) | ResponseBody::Last(Some(value)) => next.push(value),
                        ResponseBody::Error(value) => error = value.to_value().unwrap(),
                        _ => {}
                    }
                }
            }
        }
        let observed = &vector["client_observed"];
        if name == "reply_bad_json" {
            // NestJS's call never ends; this one ends with what cannot be decoded.
            assert!(complete && next.len() == 1, "{name}");
            next[0].to_value().unwrap_err();
            continue;
        }
        let next: Vec<Value> = next.iter().map(|value| value.to_value().unwrap()).collect();
        assert_eq!(Value::from(next), observed["next"], "{name}");
        assert_eq!(complete && error.is_null(), observed["complete"] == true, "{name}");
        if name == "reply_err" {
            assert_eq!(error, observed["error"]);
        }
    }
}

#[test]
fn a_reply_is_taken_by_its_id_or_by_its_subject() {
    let id = "0123456789abcdef01234";
    let check =
        |body: &str| match decode_response(&JsonCodec, id, None, &Bytes::copy_from_slice(body.as_bytes())) {
            Answer::Reply(packet) => text(&packet.id.unwrap()).to_owned(),
            other => format!("{other:?}"),
        };
    let own = format!("\"{id}\"");
    assert_eq!(check(r#"{"response":1,"isDisposed":true,"id":"0123456789abcdef01234"}"#), own);
    // NestJS tests for an id that is truthy and different.
    for falsy in ["null", "\"\"", "0", "false"] {
        assert_eq!(check(&format!(r#"{{"response":1,"id":{falsy}}}"#)), own);
    }
    assert_eq!(check(r#"{"response":1,"id":7}"#), "Foreign");
    let nobody = decode_response(&JsonCodec, id, Some(503), &Bytes::from_static(b"x"));
    assert!(matches!(nobody, Answer::Nobody));
}

#[test]
fn own_headers_win_over_those_of_the_options() {
    let own: Headers = [("x-over", "req"), ("x-m", "1"), ("x-m", "2")].into_iter().collect();
    let fixed: Headers = [("x-version", "1.0"), ("x-over", "client")].into_iter().collect();
    let metadata: Metadata = [(TRACEPARENT_KEY, "t"), ("other", "o")].into_iter().collect();
    let map = headers_for(&own, &fixed, &metadata, 1000, true).unwrap().unwrap();
    let lines = headers_of(&map);
    let lines: Vec<_> = lines.iter().collect();
    let expected =
        [("traceparent", "t"), ("x-m", "1"), ("x-m", "2"), ("x-over", "req"), ("x-version", "1.0")];
    assert_eq!(lines, expected);
    assert!(headers_for(&Headers::new(), &Headers::new(), &Metadata::new(), 0, true).unwrap().is_none());
}

#[test]
fn a_deadline_makes_no_headers_where_it_must_not() {
    let metadata = Metadata::from_iter([(TIMEOUT_KEY, "5")]);
    let names = |own: &Headers, deadline| {
        let map = headers_for(own, &Headers::new(), &metadata, 1000, deadline).unwrap();
        map.map_or(Vec::new(), |map| headers_of(&map).iter().map(|(name, _)| name.to_owned()).collect())
    };
    let own: Headers = [("k", "v")].into_iter().collect();
    assert_eq!(names(&Headers::new(), true), [TIMEOUT_KEY]);
    assert_eq!(names(&Headers::new(), false), Vec::<String>::new());
    assert_eq!(names(&own, false), ["k", TIMEOUT_KEY]);
    let usual = |deadline| UsualCall::new(Duration::from_millis(5), 1000, deadline).unwrap();
    assert_eq!(usual(true).metadata, metadata);
    assert_eq!(usual(true).header_bytes, header_bytes(&usual(true).headers.unwrap()));
    assert_eq!((usual(false).metadata, usual(false).headers, usual(false).header_bytes), (metadata, None, 0));
}

#[test]
fn header_bounds_hold_from_both_sides() {
    let own: Headers = [("k", "v")].into_iter().collect();
    // NATS/1.0, line break, k: v, line break, line break.
    let size = 10 + 6 + 2;
    let check = |limit| headers_for(&own, &Headers::new(), &Metadata::new(), limit, true);
    assert_eq!(header_bytes(&check(size).unwrap().unwrap()), size);
    assert!(matches!(check(size - 1), Err(WireError::HeadersTooLarge { .. })));
    check_size(size + 10, size + 10).unwrap();
    check_size(size + 11, size + 10).unwrap_err();
}

#[test]
fn headers_that_would_break_the_protocol_are_refused() {
    let check = |name: &str, value: &str| {
        let own: Headers = [(name, value)].into_iter().collect();
        headers_for(&own, &Headers::new(), &Metadata::new(), 1000, true)
    };
    check("K", "V é").unwrap();
    assert!(matches!(check("a:b", "v"), Err(WireError::HeaderName { .. })));
    assert!(matches!(check("a", "v\r\nx: y"), Err(WireError::HeaderValue { .. })));
}

#[test]
fn metadata_comes_from_headers_only_where_the_packet_has_none() {
    let headers: Headers = [(TIMEOUT_KEY, "5"), ("x", "y")].into_iter().collect();
    let read = |body: &'static str| {
        let packet = decode_request(&JsonCodec, &Bytes::from_static(body.as_bytes()), &headers).unwrap();
        text(packet.metadata.unwrap().bytes()).to_owned()
    };
    assert_eq!(read(r#"{"data":1,"id":"a"}"#), r#"{"martlet-timeout-ms":"5"}"#);
    assert_eq!(read(r#"{"data":1,"metadata":{"a":"b"},"id":"a"}"#), r#"{"a":"b"}"#);
}

#[test]
fn subjects_that_nats_cannot_carry_are_refused() {
    for good in ["sum", r#"{"cmd":"sum"}"#, "a.b.*", ">", "time.us.>", "42", "ä"] {
        check_subject(good).unwrap();
    }
    for bad in ["", " ", "a b", "a\tb", "a\nb", r#"{"cmd":"with space"}"#, ".a", "a.", "a..b"] {
        check_subject(bad).unwrap_err();
    }
}

#[test]
fn a_plain_subject_is_told_by_each_of_its_bytes() {
    for (byte, place) in (0..=u8::MAX).flat_map(|byte| (0..8).map(move |place| (byte, place))) {
        for around in [b'!', b'/', b'~'] {
            let mut word = [around; 8];
            word[place] = byte;
            assert_eq!(is_plain(word), byte.is_ascii_graphic() && byte != b'.', "{byte} at {place}");
        }
    }
}

#[test]
fn cancellations_go_where_only_martlet_listens() {
    assert_eq!(cancel_subject("time.us.east"), "_MARTLET.cancel.time.us.east");
    assert!(is_cancel_subject("_MARTLET.cancel.x") && !is_cancel_subject("sum"));
}
