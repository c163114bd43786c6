// SPDX-License-Identifier: MIT OR Apache-2.0

//! Packets against what NestJS sent and made of what it got.

use bytes::{Bytes, BytesMut};
use martlet_core::codec::{Codec, Frame, JsonCodec, MessagePackCodec, NO_HANDLER_TEXT};
use martlet_core::json;
use martlet_core::packet::{Metadata, OutgoingPacket, PatternText, Raw, ResponseBody, ShortReply};
use martlet_core::pattern::Pattern;
use martlet_core::payload::{Format, Payload};
use martlet_core::transport::PacketId;
use proptest::prelude::*;
use serde_json::{Value, json};

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn payload(text: &str) -> Payload {
    Payload::new(Format::Json, bytes(text))
}

/// A golden value; an undefined one is none.
fn defined(value: &Value) -> Option<&Value> {
    (value != "__undefined__").then_some(value)
}

// === Requests ===

/// Writes what was read and expects the same bytes, as the member order is fixed.
#[track_caller]
fn check_request_bytes(text: &str) {
    let packet = JsonCodec.decode_request((&bytes(text)).into()).unwrap();
    let pattern = packet.pattern.as_deref().map(|raw| std::str::from_utf8(raw).unwrap()).unwrap();
    let pattern =
        Pattern::from_json(&serde_json::from_str::<Box<serde_json::value::RawValue>>(pattern).unwrap());
    let id = packet.id.as_deref().map(|raw| serde_json::from_slice::<String>(raw).unwrap());
    let metadata = packet.metadata.as_ref().map(|metadata| metadata.decode::<Metadata>().unwrap());
    let mut out = BytesMut::from("kept");
    let again = OutgoingPacket {
        pattern: PatternText::Given(&pattern.unwrap()),
        data: packet.data.as_ref(),
        id: id.as_deref(),
        metadata: metadata.as_ref(),
    };
    JsonCodec.encode_request(&again, &mut out).unwrap();
    assert_eq!(out, format!("kept{text}"));
}

/// What the golden data says of a request, with and without a channel to fall back on.
#[track_caller]
fn check_request(value: &Value, with_channel: &Value) {
    for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
        let frame = Payload::encode(codec.format(), value).unwrap();
        let packet = codec.decode_request(frame.into_bytes().into()).unwrap();
        let read = |raw: &Raw| Payload::new(codec.format(), raw.clone()).to_value().unwrap();
        let foreign = with_channel["pattern"] == "CH";
        let member = |name: &str| if foreign && name != "data" { None } else { with_channel.get(name) };
        assert_eq!(packet.pattern.as_ref().map(read).as_ref(), member("pattern"), "{value}");
        assert_eq!(packet.data.map(|data| data.to_value().unwrap()).as_ref(), member("data"), "{value}");
        assert_eq!(packet.id.as_ref().map(read).as_ref(), member("id"), "{value}");
    }
}

#[test]
fn requests_are_classified_as_in_nest() {
    let golden: Value = serde_json::from_str(include_str!("../vectors/packets.json")).unwrap();
    let cases = golden["request_deserializer"].as_array().unwrap();
    assert_eq!(cases.len(), 18);
    for case in cases {
        check_request(&case["value"], &case["with_channel"]);
    }
}

#[test]
fn requests_are_written_byte_for_byte_as_nest_does() {
    for text in [
        r#"{"pattern":"sum","data":[1,2,3],"id":"bb82f15d6e5a2600f529d"}"#,
        r#"{"pattern":{"cmd":"sum"},"data":[1,2],"id":"b82f15d6e5a2600f529d4"}"#,
        r#"{"pattern":{"z":[1.5,"é"],"a":null},"data":"","id":""}"#,
        r#"{"pattern":"evt","data":{"a":1}}"#,
        r#"{"pattern":42,"id":"a\"b"}"#,
        r#"{"pattern":"sum","data":1,"metadata":{"b":"1","a":"\n"},"id":"x"}"#,
        r#"{"pattern":"sum","metadata":{}}"#,
    ] {
        check_request_bytes(text);
    }
    for file in [
        include_str!("../vectors/nest12-nats-event-metadata.json"),
        include_str!("../vectors/nest12-nats-request-metadata.json"),
        include_str!("../vectors/nest12-nats-request-metadata-and-headers.json"),
    ] {
        let golden: Value = serde_json::from_str(file).unwrap();
        check_request_bytes(golden["raw"].as_str().unwrap());
    }
}

#[test]
fn events_may_carry_the_route() {
    let pattern = Pattern::from_json(&json!({"v": 1, "type": "created"})).unwrap();
    let data = payload("\"x\"");
    let packet = OutgoingPacket {
        pattern: PatternText::Route(pattern.route()),
        data: Some(&data),
        id: None,
        metadata: None,
    };
    let mut out = BytesMut::new();
    JsonCodec.encode_request(&packet, &mut out).unwrap();
    assert_eq!(out, r#"{"pattern":"{\"type\":\"created\",\"v\":1}","data":"x"}"#);
}

#[test]
fn frames_that_are_not_one_value_are_malformed() {
    for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
        for frame in ["", "{bad}", "{} {}", "\u{1}\u{1}"] {
            assert!(codec.decode_request((&bytes(frame)).into()).unwrap_err().is_malformed(), "{frame}");
            assert!(codec.decode_response((&bytes(frame)).into()).unwrap_err().is_malformed(), "{frame}");
        }
    }
}

// === Replies ===

fn observed(body: &ResponseBody) -> Vec<Value> {
    let value = |payload: &Payload| payload.to_value().unwrap();
    match body {
        ResponseBody::Item(item) => vec![json!({"next": value(item)})],
        ResponseBody::Last(Some(item)) => vec![json!({"next": value(item)}), json!("complete")],
        ResponseBody::Last(None) => vec![json!("complete")],
        ResponseBody::Error(error) => vec![json!({"error": value(error)})],
        ResponseBody::NoHandler => vec![json!({"error": NO_HANDLER_TEXT})],
        other => panic!("unexpected body {other:?}"),
    }
}

/// What a caller sees of replies, in either format.
#[track_caller]
fn check_replies(name: &str, packets: &[Value], expected: &[Value]) {
    for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
        let mut seen = Vec::new();
        for packet in packets {
            let frame = Payload::encode(codec.format(), packet).unwrap();
            let reply = codec.decode_response(frame.into_bytes().into()).unwrap();
            let id = reply.id.map(|id| Payload::new(codec.format(), id).to_value().unwrap());
            assert_eq!(id.as_ref(), packet.get("id"), "{name}");
            seen.extend(observed(&reply.body));
            if reply.body.is_final() {
                break;
            }
        }
        assert_eq!(seen, expected, "{name} as {}", codec.name());
    }
}

#[test]
fn replies_are_classified_as_in_nest_12() {
    let golden: Value =
        serde_json::from_str(include_str!("../vectors/nest12-reply-classification.json")).unwrap();
    let cases = golden.as_array().unwrap();
    assert_eq!(cases.len(), 16);
    for case in cases {
        let mut outcome = case["outcome_12_1"].as_array().unwrap().clone();
        outcome.retain(|seen| seen != "(never terminates)");
        for seen in &mut outcome {
            // An undefined item is null here.
            seen.as_object_mut().map(|seen| seen.remove("undefined"));
        }
        check_replies(case["name"].as_str().unwrap(), case["packets"].as_array().unwrap(), &outcome);
    }
}

#[test]
fn replies_of_nest_11_are_read_alike_where_both_versions_agree() {
    let golden: Value = serde_json::from_str(include_str!("../vectors/packets.json")).unwrap();
    let cases = golden["response_deserializer"].as_array().unwrap();
    assert_eq!(cases.len(), 17);
    for case in cases {
        let (value, result) = (&case["value"], &case["result"]);
        let keys: Vec<&str> = value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
        if keys == ["id"] || keys == ["id", "status"] {
            // Version 12 reads these as an item without value.
            check_replies("id only", std::slice::from_ref(value), &[json!({"next": null})]);
            continue;
        }
        let expected = match (defined(&result["err"]), result.get("response"), result.get("isDisposed")) {
            (Some(err), ..) if json::is_truthy(err.to_string().as_bytes()) => vec![json!({"error": err})],
            (_, Some(value), Some(Value::Bool(true))) => vec![json!({"next": value}), json!("complete")],
            (_, None, Some(Value::Bool(true))) => vec![json!("complete")],
            (_, value, _) => vec![json!({"next": value})],
        };
        check_replies("11.x", std::slice::from_ref(value), &expected);
    }
}

#[test]
fn any_truthy_disposal_ends_and_errors_win() {
    let check = |packet: Value, expected: &[Value]| check_replies("edge", &[packet], expected);
    check(json!({"id": "a", "response": 1, "isDisposed": "false"}), &[json!({"next": 1}), json!("complete")]);
    check(json!({"id": "a", "response": 1, "isDisposed": 0}), &[json!({"next": 1})]);
    check(json!({"id": "a", "err": "e", "response": 5, "isDisposed": true}), &[json!({"error": "e"})]);
    check(json!({"id": "a", "err": ""}), &[json!({"next": null})]);
    check(json!({"err": NO_HANDLER_TEXT, "status": "error"}), &[json!({"error": NO_HANDLER_TEXT})]);
}

#[test]
fn foreign_replies_are_marked() {
    let check = |text: &str, foreign: bool| {
        assert_eq!(JsonCodec.decode_response((&bytes(text)).into()).unwrap().foreign, foreign, "{text}");
    };
    check("42", true);
    check("null", true);
    check("[]", true);
    check("{}", true);
    check(r#"{"x":1}"#, true);
    check(r#"{"id":"a"}"#, false);
    check(r#"{"response":1}"#, false);
}

#[track_caller]
fn check_reply_bytes(body: ResponseBody, status: Option<&str>, text: &str) {
    let mut out = BytesMut::from("kept");
    JsonCodec.encode_response(Some(b"\"i\""), &body, status, &mut out).unwrap();
    assert_eq!(out, format!("kept{text}"));
    let with_id = JsonCodec.decode_response((&bytes(text)).into()).unwrap();
    assert_eq!(with_id.id.as_deref(), Some(&b"\"i\""[..]));
    assert!(!with_id.foreign);

    // RabbitMQ's replies have no id.
    let mut out = BytesMut::new();
    JsonCodec.encode_response(None, &body, status, &mut out).unwrap();
    let without = text.replace(r#","id":"i""#, "").replace(r#""id":"i","#, "");
    assert_eq!(out, without);
}

#[test]
fn replies_are_written_byte_for_byte_as_nest_does() {
    check_reply_bytes(ResponseBody::Item(payload("1")), None, r#"{"response":1,"id":"i"}"#);
    check_reply_bytes(
        ResponseBody::Last(Some(payload("6"))),
        None,
        r#"{"response":6,"isDisposed":true,"id":"i"}"#,
    );
    check_reply_bytes(ResponseBody::Last(None), None, r#"{"isDisposed":true,"id":"i"}"#);
    check_reply_bytes(
        ResponseBody::Error(payload(r#"{"status":"error","message":"boom"}"#)),
        None,
        r#"{"err":{"status":"error","message":"boom"},"isDisposed":true,"id":"i"}"#,
    );
    check_reply_bytes(
        ResponseBody::NoHandler,
        None,
        r#"{"id":"i","status":"error","err":"There is no matching message handler defined in the remote service."}"#,
    );
    check_reply_bytes(ResponseBody::Last(None), Some("ok"), r#"{"isDisposed":true,"status":"ok","id":"i"}"#);
}

#[test]
fn errors_that_would_read_as_success_are_wrapped() {
    for error in ["null", "0", "false", "\"\""] {
        check_reply_bytes(
            ResponseBody::Error(payload(error)),
            None,
            &format!(r#"{{"err":{{"status":"error","message":{error}}},"isDisposed":true,"id":"i"}}"#),
        );
    }
    let mut out = BytesMut::new();
    MessagePackCodec.encode_response(None, &ResponseBody::Error(payload("0")), None, &mut out).unwrap();
    let reply = MessagePackCodec.decode_response((&out.freeze()).into()).unwrap();
    assert_eq!(observed(&reply.body), [json!({"error": {"status": "error", "message": 0}})]);
}

#[test]
fn a_payload_of_another_format_is_rewritten() {
    let packed = Payload::encode(Format::MessagePack, &json!({"b": 1})).unwrap();
    let mut out = BytesMut::new();
    JsonCodec.encode_response(None, &ResponseBody::Item(packed), None, &mut out).unwrap();
    assert_eq!(out, r#"{"response":{"b":1}}"#);
    let broken = Payload::new(Format::MessagePack, Bytes::from_static(&[0xc1]));
    let error = JsonCodec.encode_response(None, &ResponseBody::Item(broken), None, &mut out).unwrap_err();
    assert!(!error.is_malformed());
}

// === NATS bodies as captured ===

#[test]
fn every_captured_nats_body_is_read_and_written_again() {
    // Some of the captured data are lone surrogates, which only our own decoder takes.
    let golden = payload(include_str!("../vectors/nats.json")).to_value().unwrap();
    let (mut requests, mut replies) = (0, 0);
    for vector in golden["vectors"].as_array().unwrap() {
        let (Some(raw), Some(kind)) = (vector["raw"].as_str(), vector["kind"].as_str()) else { continue };
        match kind {
            "request" | "event" => {
                check_request_bytes(raw);
                requests += 1;
            }
            "response-final" | "response-partial" | "error" | "dispose" => {
                let reply = JsonCodec.decode_response((&bytes(raw)).into()).unwrap();
                let mut out = BytesMut::new();
                JsonCodec.encode_response(reply.id.as_deref(), &reply.body, None, &mut out).unwrap();
                assert_eq!(out, raw, "{}", vector["name"]);
                replies += 1;
            }
            _ => {}
        }
    }
    assert!(requests > 20 && replies > 20, "{requests} requests and {replies} replies");
    let reply: Value = serde_json::from_str(include_str!("../vectors/nest12-nats-reply.json")).unwrap();
    check_replies(
        "12.x",
        &[serde_json::from_str(reply["raw"].as_str().unwrap()).unwrap()],
        &[json!({"next": 2}), json!("complete")],
    );
}

// === Round trips ===

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        // Other floats may come back as integers.
        any::<i32>().prop_map(|it| Value::from(f64::from(it) + 0.5)),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..5)
                .prop_map(|it| Value::Object(it.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn requests_round_trip(
        pattern in any::<String>(),
        data in prop::option::of(value()),
        id in prop::option::of(any::<String>()),
        metadata in prop::option::of(prop::collection::vec((any::<String>(), any::<String>()), 0..4)),
    ) {
        let pattern = Pattern::from(pattern);
        let metadata: Option<Metadata> = metadata.map(|it| it.into_iter().collect());
        for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
            for format in [Format::Json, Format::MessagePack] {
                let data = data.as_ref().map(|data| Payload::encode(format, data).unwrap());
                let sent = OutgoingPacket {
                    pattern: PatternText::Given(&pattern),
                    data: data.as_ref(),
                    id: id.as_deref(),
                    metadata: metadata.as_ref(),
                };
                // Between what belongs to others, as it arrives.
                let mut buf = BytesMut::from(&b"4#"[..]);
                codec.encode_request(&sent, &mut buf).unwrap();
                let body = 2..buf.len();
                buf.extend_from_slice(b"next");
                let whole = Bytes::copy_from_slice(&buf[body.clone()]);
                let read = codec.decode_request(Frame::in_buffer(&mut buf, body)).unwrap();
                prop_assert_eq!(&buf[..], b"next");
                prop_assert_eq!(&read, &codec.decode_request(whole.into()).unwrap());
                let text = |raw: Raw| Payload::new(codec.format(), raw).decode::<String>().unwrap();
                prop_assert_eq!(read.pattern.map(text), pattern.as_str().map(str::to_owned));
                prop_assert_eq!(read.id.map(text), id.clone());
                prop_assert_eq!(
                    read.data.map(|it| it.to_value().unwrap()),
                    data.map(|it| it.to_value().unwrap())
                );
                prop_assert_eq!(read.metadata.map(|it| it.decode::<Metadata>().unwrap()), metadata.clone());
            }
        }
    }

    #[test]
    fn replies_round_trip(value in value(), id in any::<String>(), shape in 0..4) {
        for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
            let payload = Payload::encode(codec.format(), &value).unwrap();
            let body = match shape {
                0 => ResponseBody::Item(payload),
                1 => ResponseBody::Last(Some(payload)),
                2 => ResponseBody::Last(None),
                _ => ResponseBody::NoHandler,
            };
            let id = Payload::encode(codec.format(), &id).unwrap().into_bytes();
            let mut out = BytesMut::new();
            codec.encode_response(Some(&id), &body, None, &mut out).unwrap();
            let read = codec.decode_response((&out.freeze()).into()).unwrap();
            prop_assert_eq!(read.id, Some(Raw::from(id)));
            prop_assert_eq!(read.body, body);
            prop_assert!(!read.foreign);
        }
    }

    #[test]
    fn errors_stay_errors(value in value()) {
        for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
            let body = ResponseBody::Error(Payload::encode(codec.format(), &value).unwrap());
            let mut out = BytesMut::new();
            codec.encode_response(None, &body, None, &mut out).unwrap();
            let is_error = matches!(codec.decode_response((&out.freeze()).into()).unwrap().body, ResponseBody::Error(_));
            prop_assert!(is_error);
        }
    }
}

#[test]
fn a_short_reply_is_what_the_whole_reading_says() {
    let id = "0123456789abcdef01234";
    let usual = |value: &str| format!(r#"{{"response":{value},"isDisposed":true,"id":"{id}"}}"#);
    let read_short = |frame: &[u8]| {
        // Nothing stays of what was there.
        let id = PacketId::from_text(&[b'f'; PacketId::LEN]).unwrap();
        let value = Payload::new(Format::MessagePack, vec![0xff; 40]);
        let mut reply = ShortReply { id, value };
        JsonCodec.read_short_response(frame, &mut reply).then_some(reply)
    };
    for value in ["15", "-1.5e3", "null", r#""a\"b""#, r#"{"a":[1,{}]}"#, r#""é""#, "[]"] {
        let text = usual(value);
        let short = read_short(text.as_bytes()).expect(value);
        let whole = JsonCodec.decode_response((&bytes(&text)).into()).unwrap();
        assert_eq!(whole.id.as_deref(), Some(format!("\"{id}\"").as_bytes()), "{value}");
        assert_eq!(
            (&*short.id.text(), short.value),
            (id, Payload::new(Format::Json, value.as_bytes().to_vec()))
        );
        let payload = Payload::new(Format::Json, value.as_bytes().to_vec());
        assert_eq!(whole.body, ResponseBody::Last(Some(payload)), "{value}");
    }
    let others = [
        usual(""),
        usual(" 1"),
        usual("1 "),
        usual("1,"),
        usual("01"),
        usual(r#"1,"err":2"#),
        usual(r#"1,"isDisposed":false"#),
        usual(r#""unfinished"#),
        usual(&format!("{:?}", "x".repeat(31))),
        usual("1").replace("01234\"}", "0123G\"}"),
        usual("1").replace("true", "false"),
        usual("1").replace("}", "} "),
        usual("1").replace(",\"id\"", ", \"id\""),
        format!(r#"{{"id":"{id}","response":1,"isDisposed":true}}"#),
        format!(r#"{{"isDisposed":true,"id":"{id}"}}"#),
        r#"{"response":1,"isDisposed":true,"id":"short"}"#.to_owned(),
        String::new(),
    ];
    for text in &others {
        assert_eq!(read_short(text.as_bytes()), None, "{text}");
    }
    let mut broken = usual("\"x\"").into_bytes();
    broken[13] = 0xff;
    assert_eq!(read_short(&broken), None);
    let long = usual(&format!("{:?}", "x".repeat(31)));
    let whole = JsonCodec.decode_response((&bytes(&long)).into()).unwrap();
    let payload = Payload::new(Format::Json, format!("{:?}", "x".repeat(31)).into_bytes());
    assert_eq!(whole.body, ResponseBody::Last(Some(payload)));
}

#[test]
fn a_call_is_written_as_a_request_with_its_id() {
    let id = PacketId::from_text(b"0123456789abcdef01234").unwrap();
    let mut metadata = Metadata::from_iter([("k", "v\"w")]);
    let data = Payload::new(Format::Json, b"[1]".to_vec());
    let pattern = Pattern::from("p");
    for keep in [false, true] {
        if keep {
            metadata.keep_json();
        }
        for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
            let packet = OutgoingPacket {
                pattern: PatternText::Given(&pattern),
                data: Some(&data),
                id: None,
                metadata: Some(&metadata),
            };
            let (mut call, mut request) = (BytesMut::new(), BytesMut::new());
            codec.encode_call(&packet, id, &mut call).unwrap();
            codec.encode_request(&OutgoingPacket { id: Some(&id.text()), ..packet }, &mut request).unwrap();
            assert_eq!(call, request, "{}", codec.name());
        }
    }
}

#[test]
fn a_frame_leaves_the_buffer_whatever_comes_of_it() {
    let long = format!(r#"{{"pattern":"a","data":"{}"}}"#, "x".repeat(100));
    for (text, is_packet) in [("{", false), ("[1]", true), (&*long, true)] {
        for codec in [&JsonCodec as &dyn Codec, &MessagePackCodec] {
            let mut buf = BytesMut::from(format!("head{text}tail").as_bytes());
            let read = codec.decode_request(Frame::in_buffer(&mut buf, 4..4 + text.len()));
            assert!(read.is_ok() == is_packet || codec.format() == Format::MessagePack, "{text}");
            assert_eq!(buf, "tail");
        }
    }
    // What is read first does not depend on what is shared later.
    let mut buf = BytesMut::from(&*long);
    let mut frame = Frame::in_buffer(&mut buf, 0..long.len());
    assert_eq!(&*frame.raw(11..14), br#""a""#);
    assert_eq!(frame.raw(22..124).len(), 102);
    assert_eq!(&*frame.raw(11..14), br#""a""#);
    assert_eq!(&frame[..10], br#"{"pattern""#);
}
