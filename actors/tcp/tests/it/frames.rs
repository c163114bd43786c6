// SPDX-License-Identifier: MIT OR Apache-2.0

//! Frames against what NestJS sent and made of what it got.

use bytes::{Bytes, BytesMut};
use martlet_core::codec::{Codec, JsonCodec};
use martlet_core::packet::{IncomingPacket, Metadata, OutgoingPacket, PatternText, ResponseBody};
use martlet_core::pattern::Pattern;
use martlet_core::payload::{Format, Payload};
use martlet_tcp::wire::{
    FrameError, FrameLimits, FrameState, Framing, LengthDelimited, NestFraming, encode_with,
};
use proptest::prelude::*;
use serde_json::Value;

/// Golden files hold lone surrogates, which only our own decoder takes.
fn golden(text: &'static str) -> Value {
    Payload::new(Format::Json, Bytes::from_static(text.as_bytes())).to_value().unwrap()
}

fn tcp() -> Value {
    golden(include_str!("../vectors/tcp.json"))
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut out = Vec::new();
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = group.iter().fold(0_u32, |bits, &byte| bits << 6 | u32::from(digit(byte)));
        let bits = bits << (6 * (4 - group.len()));
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    out
}

/// The bytes of a golden message, from text or base 64.
fn raw(message: &Value) -> Vec<u8> {
    match message["raw"].as_str() {
        Some(text) => text.as_bytes().to_vec(),
        None => base64(message["raw_base64"].as_str().unwrap()),
    }
}

/// Feeds `pieces` one after another; returns the bodies, what is left in the buffer, and the fault that ended it.
fn feed<'a>(
    framing: &dyn Framing,
    limits: &FrameLimits,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Bytes>, usize, Option<FrameError>) {
    let (mut buf, mut state, mut bodies) = (BytesMut::new(), FrameState::default(), Vec::new());
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            match framing.decode(&mut buf, &mut state, limits) {
                Ok(Some(body)) => bodies.push(body),
                Ok(None) => break,
                Err(error) => return (bodies, 0, Some(error)),
            }
        }
    }
    assert_eq!(framing.has_partial(&buf), !buf.is_empty());
    (bodies, buf.len(), None)
}

fn frames(text: &[u8]) -> Vec<Bytes> {
    let (bodies, left, error) = feed(&NestFraming, &FrameLimits::default(), [text]);
    assert_eq!((left, error), (0, None), "{}", String::from_utf8_lossy(text));
    bodies
}

#[track_caller]
fn check_frames(text: &str, bodies: &[&str], left: usize) {
    let found = feed(&NestFraming, &FrameLimits::default(), [text.as_bytes()]);
    let bodies: Vec<Bytes> = bodies.iter().map(|body| Bytes::copy_from_slice(body.as_bytes())).collect();
    assert_eq!(found, (bodies, left, None), "{text:?}");
}

#[track_caller]
fn check_fault(text: &[u8], limits: &FrameLimits, is_expected: impl Fn(&FrameError) -> bool) {
    let whole = feed(&NestFraming, limits, [text]);
    let error = whole.2.clone().unwrap();
    assert!(is_expected(&error), "{}: {error:?}", String::from_utf8_lossy(text));
    let (bodies, _, by_byte) = feed(&NestFraming, limits, text.chunks(1));
    assert_eq!((bodies, by_byte.is_some()), (whole.0, true), "{}", String::from_utf8_lossy(text));
}

/// Writes a packet that was read and expects the same frame.
fn request_frame(packet: &IncomingPacket) -> BytesMut {
    let pattern = Payload::new(Format::Json, packet.pattern.clone().unwrap());
    let text: Box<serde_json::value::RawValue> = serde_json::from_slice(pattern.bytes()).unwrap();
    let pattern = Pattern::from_json(&text).unwrap();
    let id = packet.id.as_deref().map(|raw| serde_json::from_slice::<String>(raw).unwrap());
    let metadata = packet.metadata.as_ref().map(|it| it.decode::<Metadata>().unwrap());
    let again = OutgoingPacket {
        // Events carry the route, which for these is what came in.
        pattern: if id.is_some() {
            PatternText::Given(&pattern)
        } else {
            PatternText::Route(pattern.route())
        },
        data: packet.data.as_ref(),
        id: id.as_deref(),
        metadata: metadata.as_ref(),
    };
    let mut out = BytesMut::new();
    encode_with::<_, Box<dyn std::error::Error>>(&NestFraming, &mut out, 0, |out| {
        Ok(JsonCodec.encode_request(&again, out)?)
    })
    .unwrap();
    out
}

fn reply_frame(id: Option<&[u8]>, body: &ResponseBody) -> BytesMut {
    let mut out = BytesMut::new();
    encode_with::<_, Box<dyn std::error::Error>>(&NestFraming, &mut out, 64, |out| {
        Ok(JsonCodec.encode_response(id, body, None, out)?)
    })
    .unwrap();
    out
}

#[test]
fn every_captured_frame_is_read_and_written_again() {
    let golden_tcp = tcp();
    let mut vectors = golden_tcp["vectors"].as_array().unwrap().clone();
    for file in [
        include_str!("../vectors/nest12-tcp-event-metadata.json"),
        include_str!("../vectors/nest12-tcp-reply-to-metadata-request.json"),
        include_str!("../vectors/nest12-tcp-request-metadata-object-pattern-utf16-length.json"),
        include_str!("../vectors/nest12-tcp-request-metadata.json"),
    ] {
        vectors.push(golden(file));
    }
    let (mut requests, mut replies) = (0, 0);
    for vector in &vectors {
        let (name, raw) = (vector["name"].as_str().unwrap(), raw(vector));
        let [body] = &frames(&raw)[..] else { panic!("{name} is not one frame") };
        if vector["direction"] == "client->server" {
            let packet = JsonCodec.decode_request(body.into()).unwrap();
            assert_eq!(request_frame(&packet), raw, "{name}");
            requests += 1;
        } else {
            let reply = JsonCodec.decode_response(body.into()).unwrap();
            if &body[..]
                == format!("{{\"id\":{}}}", String::from_utf8_lossy(reply.id.as_ref().unwrap())).as_bytes()
            {
                // An undefined item, which we read but never send.
                assert_eq!(reply.body, ResponseBody::Item(Payload::null(Format::Json)), "{name}");
                continue;
            }
            assert_eq!(reply_frame(reply.id.as_deref(), &reply.body), raw, "{name}");
            replies += 1;
        }
    }
    assert_eq!((requests, replies), (102, 105));
}

#[test]
fn an_undefined_item_is_read_as_null() {
    let golden = golden(include_str!("../vectors/nest12-tcp-reply-undefined-item.json"));
    let bodies = frames(&raw(&golden));
    let replies: Vec<ResponseBody> =
        bodies.iter().map(|body| JsonCodec.decode_response(body.into()).unwrap().body).collect();
    let end = Payload::encode(Format::Json, "end").unwrap();
    assert_eq!(replies, [ResponseBody::Item(Payload::null(Format::Json)), ResponseBody::Last(Some(end))]);
}

/// What a Nest server did with hand-made bytes, we do too: close, wait, or take the frames.
#[test]
fn hand_made_input_is_judged_as_by_a_nest_server() {
    let golden = tcp();
    let cases = golden["raw_client_to_nest_server"].as_array().unwrap();
    assert_eq!(cases.len(), 57);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let sent: Vec<Vec<u8>> = case["sent"].as_array().unwrap().iter().map(raw).collect();
        let limits = match name.starts_with("maxbuf") {
            true => FrameLimits::default().with_max_frame(100),
            false => FrameLimits::default(),
        };
        let (bodies, left, error) = feed(&NestFraming, &limits, sent.iter().map(Vec::as_slice));
        let malformed = bodies.iter().any(|body| JsonCodec.decode_request(body.into()).is_err());
        let logged = case["logs"][0]["message"].as_str().unwrap_or_default();
        let nest_closed = logged.starts_with("InvalidTcpDataReceptionException");
        match name {
            // It was the timer that closed these.
            "incomplete_timeout_body" | "incomplete_timeout_length" => {
                assert!(left > 0 && error.is_none(), "{name}")
            }
            // We refuse a frame as soon as it says that it is too long.
            "maxbuf_huge_declared_length" => {
                assert!(matches!(error, Some(FrameError::TooLong { .. })), "{name}");
            }
            // We do not count frames together.
            "maxbuf_exceeded_by_coalesced_small_frames" => {
                assert_eq!((bodies.len(), left, error), (4, 0, None))
            }
            _ => {
                assert_eq!(error.is_some() || malformed, nest_closed, "{name}: {error:?}");
                if let Some(error) = &error {
                    assert!(logged.ends_with(error.server_text()), "{name}: {error:?}");
                }
            }
        }
        let received = raw(&case["received"]);
        if !received.is_empty() && name != "raw_bigint_response" {
            assert_eq!(bodies.len(), frames(&received).len(), "{name}");
        }
    }
}

#[test]
fn hand_made_input_is_judged_as_by_a_nest_client() {
    let golden = tcp();
    let cases = golden["raw_server_to_nest_client"].as_array().unwrap();
    assert_eq!(cases.len(), 23);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let sent: Vec<Vec<u8>> = case["server_sent"].as_array().unwrap().iter().map(raw).collect();
        let limits = match name {
            "client_maxbuffer" => FrameLimits::default().with_max_frame(200),
            _ => FrameLimits::default(),
        };
        let (bodies, left, error) = feed(&NestFraming, &limits, sent.iter().map(Vec::as_slice));
        match name {
            "client_corrupt_frame" | "client_maxbuffer" => {
                let error = error.unwrap();
                assert_eq!(error.client_text(), case["logs"][0]["message"].as_str().unwrap(), "{name}");
            }
            "client_invalid_json" => {
                assert!(JsonCodec.decode_response((&bodies[0]).into()).is_err(), "{name}")
            }
            "client_partial_then_incomplete_timeout" => assert!(left > 0, "{name}"),
            _ => {
                assert_eq!((left, error), (0, None), "{name}");
                assert!(bodies.iter().all(|body| JsonCodec.decode_response(body.into()).is_ok()), "{name}");
            }
        }
    }
}

#[test]
fn lengths_count_utf16_code_units() {
    check_frames("4#\"é\"x", &["\"é\"x"], 0);
    check_frames("4#\"😀\"1#5", &["\"😀\"", "5"], 0);
    check_frames("4#\"你好\"", &["\"你好\""], 0);
    check_frames("6#\"😀\"", &[], 8);
    check_fault("2#\"😀\"".as_bytes(), &FrameLimits::default(), |error| {
        *error == FrameError::SplitCharacter
    });
}

#[test]
fn sloppy_prefixes_are_what_parse_int_makes_of_them() {
    for prefix in [
        "1",
        "01",
        "+1",
        " \t\r\n1",
        "\u{a0}\u{feff}1",
        "1.9",
        "1e5",
        "1abc",
        "1 ",
        "0000000000000000001",
        "1\u{e9}",
    ] {
        check_frames(&format!("{prefix}#57#\"hello\""), &["5", "\"hello\""], 0);
    }
    for prefix in ["", " ", "x1", "+-1", "++1", "- 1", "#", ".5", "e1", "\u{85}1", "NaN", "Infinity", "一"] {
        check_fault(format!("{prefix}#5").as_bytes(), &FrameLimits::default(), |error| {
            matches!(error, FrameError::CorruptLength { .. })
                && error.server_text() == "Corrupted length value of the received data supplied in a packet"
        });
    }
    for prefix in ["0", "-1", "-0", "00", "0x1f", "-1junk"] {
        check_fault(format!("{prefix}#5").as_bytes(), &FrameLimits::default(), |error| {
            matches!(error, FrameError::NotPositive { .. })
                && error.server_text() == "The invalid received message from tcp server"
        });
    }
    check_fault(b"\xff1#5", &FrameLimits::default(), |error| {
        matches!(error, FrameError::CorruptLength { .. })
    });
}

#[test]
fn prefixes_have_bounds_on_both_sides() {
    let limits = FrameLimits::default();
    check_frames(&format!("{}#5", "0".repeat(19) + "1"), &["5"], 0);
    check_fault(format!("{}#5", "0".repeat(20) + "1").as_bytes(), &limits, |error| {
        matches!(error, FrameError::CorruptLength { .. })
    });
    check_frames(&format!("1{}#5", "x".repeat(63)), &["5"], 0);
    check_fault(format!("1{}#5", "x".repeat(64)).as_bytes(), &limits, |error| {
        matches!(error, FrameError::CorruptLength { .. })
    });
    // Without a `#` at all, too.
    check_frames(&"1".repeat(20), &[], 20);
    check_fault("1".repeat(65).as_bytes(), &limits, |error| {
        matches!(error, FrameError::CorruptLength { .. })
    });
    check_fault(
        "9".repeat(20).as_bytes().iter().copied().chain(*b"#").collect::<Vec<_>>().as_slice(),
        &limits,
        |error| matches!(error, FrameError::TooLong { length: usize::MAX, .. }),
    );
}

#[test]
fn frames_have_a_bound_on_both_sides() {
    let limits = FrameLimits::default().with_max_frame(8);
    let (bodies, ..) = feed(&NestFraming, &limits, [&b"6#\"abcd\"6#\"abcd\""[..]]);
    assert_eq!(bodies.len(), 2);
    check_fault(b"7#\"abcde\"", &limits, |error| *error == FrameError::TooLong { length: 9, limit: 8 });
    let (bodies, ..) = feed(&LengthDelimited, &limits, [&[0, 0, 0, 4, 1, 2, 3, 4][..]]);
    assert_eq!(bodies.len(), 1);
    let (.., error) = feed(&LengthDelimited, &limits, [&[0, 0, 0, 5][..]]);
    assert_eq!(error, Some(FrameError::TooLong { length: 9, limit: 8 }));
}

#[test]
fn bytes_that_are_not_utf8_become_replacement_characters() {
    let check = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let framed = [format!("{}#", text.encode_utf16().count()).as_bytes(), bytes, b"1#7"].concat();
        for pieces in [vec![&framed[..]], framed.chunks(1).collect()] {
            let (bodies, left, error) = feed(&NestFraming, &FrameLimits::default(), pieces);
            assert_eq!((left, error), (0, None), "{bytes:02x?}");
            assert_eq!(
                bodies,
                [Bytes::copy_from_slice(text.as_bytes()), Bytes::from_static(b"7")],
                "{bytes:02x?}"
            );
        }
    };
    check(b"\xff\xc3");
    check(b"a\xe2\x82");
    check(b"\xf0\x9f\x98x\xf0\x9f\x98\x80");
    check(b"\xed\xa0\x80\xc0\x80\xf5\xf4\x90\x80\x80\xe0\x80");
}

#[test]
fn what_cannot_be_framed_leaves_the_buffer_as_it_was() {
    let mut out = BytesMut::from("kept");
    assert_eq!(NestFraming.encode(b"", &mut out), Err(FrameError::Empty));
    assert_eq!(NestFraming.encode(b"\"\xff\"", &mut out), Err(FrameError::NotText));
    let failed = encode_with::<_, FrameError>(&NestFraming, &mut out, 10, |out| {
        out.extend_from_slice(b"half a packet");
        Err(FrameError::Empty)
    });
    assert_eq!(failed, Err(FrameError::Empty));
    assert_eq!(out, "kept");
    LengthDelimited.encode(b"", &mut out).unwrap();
    assert_eq!(out, "kept\0\0\0\0");
}

#[test]
fn any_hint_gives_the_same_frame() {
    for length in [1, 8, 9, 10, 11, 99, 100, 101, 999, 1000, 12345] {
        for hint in [0, 1, 9, 10, 99, 100, 1000, 100_000, length] {
            let body = "x".repeat(length);
            let mut out = BytesMut::from("kept");
            encode_with::<_, FrameError>(&NestFraming, &mut out, hint, |out| {
                out.extend_from_slice(body.as_bytes());
                Ok(())
            })
            .unwrap();
            assert_eq!(out, format!("kept{length}#{body}"), "hint {hint}");
        }
    }
}

/// The pieces of `text` between the given places.
fn split<'a>(text: &'a [u8], places: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = places.iter().map(|place| place.index(text.len() + 1)).collect();
    places.sort_unstable();
    let mut pieces = Vec::new();
    let mut from = 0;
    for place in places {
        pieces.push(&text[from..place]);
        from = place;
    }
    pieces.push(&text[from..]);
    pieces
}

fn faults_alike(
    a: &(Vec<Bytes>, usize, Option<FrameError>),
    b: &(Vec<Bytes>, usize, Option<FrameError>),
) -> bool {
    let kind = |error: &Option<FrameError>| error.as_ref().map(std::mem::discriminant);
    (&a.0, a.1, kind(&a.2)) == (&b.0, b.1, kind(&b.2))
}

proptest! {
    #[test]
    fn bodies_come_out_as_they_went_in(
        bodies in prop::collection::vec("\\PC{1,40}", 0..6),
        places in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        for framing in [&NestFraming as &dyn Framing, &LengthDelimited] {
            let mut out = BytesMut::new();
            for body in &bodies {
                framing.encode(body.as_bytes(), &mut out).unwrap();
            }
            for pieces in [split(&out, &places), out.chunks(1).collect()] {
                let found = feed(framing, &FrameLimits::default(), pieces);
                let expected = bodies.iter().map(|body| Bytes::copy_from_slice(body.as_bytes())).collect();
                prop_assert_eq!(found, (expected, 0, None));
            }
        }
    }

    #[test]
    fn binary_bodies_come_out_as_they_went_in(bodies in prop::collection::vec(any::<Vec<u8>>(), 0..5)) {
        let mut out = BytesMut::new();
        for body in &bodies {
            LengthDelimited.encode(body, &mut out).unwrap();
        }
        let (found, left, error) = feed(&LengthDelimited, &FrameLimits::default(), out.chunks(3));
        prop_assert_eq!((left, error), (0, None));
        prop_assert_eq!(found, bodies.into_iter().map(Bytes::from).collect::<Vec<_>>());
    }

    #[test]
    fn any_cut_of_any_bytes_gives_the_same(
        text in prop::collection::vec(
            prop_oneof![Just(b'#'), b'0'..=b'9', Just(b'"'), Just(0xc3), Just(0xa9), Just(0xf0), Just(0x9f), Just(0x98), any::<u8>()],
            0..40,
        ),
        places in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let limits = FrameLimits::default().with_max_frame(50);
        let whole = feed(&NestFraming, &limits, [&text[..]]);
        for pieces in [split(&text, &places), text.chunks(1).collect()] {
            let cut = feed(&NestFraming, &limits, pieces);
            prop_assert!(faults_alike(&whole, &cut), "{:?} but {:?}", whole, cut);
        }
        for body in whole.0 {
            prop_assert!(std::str::from_utf8(&body).is_ok());
        }
    }
}

#[test]
fn what_is_plain_to_see_is_what_reading_gives() {
    let limits = FrameLimits::default().with_max_frame(40);
    let plain = "5#[1,2]rest";
    assert_eq!(NestFraming.peek(plain.as_bytes(), &FrameState::default(), &limits), Some(2..7));
    let mut buf = BytesMut::from(plain);
    let body = NestFraming.decode(&mut buf, &mut FrameState::default(), &limits).unwrap().unwrap();
    assert_eq!((&body[..], &buf[..]), (&b"[1,2]"[..], &b"rest"[..]));
    let long = format!("39#{}", "x".repeat(39));
    for text in ["", "5", "5#[1,2", "0#", "-1#x", "+5#[1,2]", "3#\"\u{e9}\"", "x#y", "99999999#x", &long] {
        assert_eq!(NestFraming.peek(text.as_bytes(), &FrameState::default(), &limits), None, "{text}");
    }
    let mut state = FrameState::default();
    assert_eq!(NestFraming.decode(&mut BytesMut::from("5#[1,"), &mut state, &limits).unwrap(), None);
    assert_eq!(NestFraming.peek(b"5#[1,2]", &state, &limits), None, "a frame that is being read");
}
