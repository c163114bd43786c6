// SPDX-License-Identifier: MIT OR Apache-2.0

//! What must hold for any input. A check fails by panicking.

use bytes::{Bytes, BytesMut};
use martlet_core::codec::{Codec, JsonCodec, MessagePackCodec};
use martlet_core::json;
use martlet_core::packet::{Metadata, OutgoingPacket, PatternText, ResponseBody};
use martlet_core::pattern::{Pattern, Route, route_of_incoming};
use martlet_core::payload::{Format, Payload};
use martlet_tcp::wire::{FrameError, FrameLimits, FrameState, Framing, LengthDelimited, NestFraming};
use rand::Rng;
use rand::rngs::StdRng;

// === Frames ===

/// What a reader makes of `pieces`: the bodies, the bytes left, and the kind of fault.
type Read = (Vec<Bytes>, usize, Option<std::mem::Discriminant<FrameError>>);

fn read<'a>(framing: &dyn Framing, limits: &FrameLimits, pieces: impl Iterator<Item = &'a [u8]>) -> Read {
    let (mut buf, mut state, mut bodies) = (BytesMut::new(), FrameState::default(), Vec::new());
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            match framing.decode(&mut buf, &mut state, limits) {
                Ok(Some(body)) => bodies.push(body),
                Ok(None) => break,
                Err(error) => return (bodies, 0, Some(std::mem::discriminant(&error))),
            }
        }
    }
    (bodies, buf.len(), None)
}

/// However the bytes are cut, the frames are the same; what was read can be written and read again.
pub(crate) fn frame(input: &[u8], random: &mut StdRng) {
    let limits = FrameLimits::default().with_max_frame(1 << random.random_range(6..20));
    let framings: [&dyn Framing; 2] = [&NestFraming, &LengthDelimited];
    for framing in framings {
        let whole = read(framing, &limits, std::iter::once(input));
        assert_eq!(whole, read(framing, &limits, input.chunks(1)), "cut into bytes, {}", framing.name());
        let size = random.random_range(2..40);
        assert_eq!(whole, read(framing, &limits, input.chunks(size)), "cut every {size}, {}", framing.name());

        let mut out = BytesMut::new();
        for body in &whole.0 {
            framing.encode(body, &mut out).expect("what was read can be written");
        }
        let again = read(framing, &FrameLimits::default(), std::iter::once(&out[..]));
        assert_eq!((whole.0, 0, None), again, "written and read again, {}", framing.name());
    }
}

// === Packets ===

/// What is read can be written and read again; the scanner agrees with the parser.
pub(crate) fn packet(input: &[u8]) {
    let valid =
        std::str::from_utf8(input).is_ok() && serde_json::from_slice::<serde::de::IgnoredAny>(input).is_ok();
    assert_eq!(json::validate(input).is_ok(), valid, "the scanner and the parser disagree");

    let frame = Bytes::copy_from_slice(input);
    let codecs: [&dyn Codec; 2] = [&JsonCodec, &MessagePackCodec];
    for codec in codecs {
        if let Ok(reply) = codec.decode_response((&frame).into()) {
            let mut out = BytesMut::new();
            codec
                .encode_response(reply.id.as_deref(), &reply.body, None, &mut out)
                .expect("what was read can be written");
            let again = codec.decode_response((&out.freeze()).into()).expect("what was written can be read");
            assert_eq!((again.id, &again.body), (reply.id, &reply.body), "a reply changed, {}", codec.name());
            if let ResponseBody::Item(value) | ResponseBody::Last(Some(value)) | ResponseBody::Error(value) =
                &reply.body
            {
                payload(value);
            }
        }
        let Ok(request) = codec.decode_request((&frame).into()) else { continue };
        [&request.data, &request.metadata].into_iter().flatten().for_each(payload);
        let Some(raw) = &request.pattern else { continue };
        let Some(route) = route_of_incoming(codec.format(), raw) else { continue };
        let text = request.id.map(|id| Payload::new(codec.format(), id)).map(|id| id.decode::<String>());
        let Ok(id) = text.transpose() else { continue };
        let metadata = request.metadata.as_ref().and_then(|metadata| metadata.decode::<Metadata>().ok());
        let sent = OutgoingPacket {
            pattern: PatternText::Route(&route),
            data: request.data.as_ref(),
            id: id.as_deref(),
            metadata: metadata.as_ref(),
        };
        let mut out = BytesMut::new();
        codec.encode_request(&sent, &mut out).expect("what was read can be written");
        let again = codec.decode_request((&out.freeze()).into()).expect("what was written can be read");
        assert_eq!(again.data, request.data, "data changed, {}", codec.name());
        assert_eq!(again.pattern.and_then(|raw| route_of_incoming(codec.format(), &raw)), Some(route));
        assert_eq!(again.metadata.and_then(|it| it.decode::<Metadata>().ok()), metadata);
        let again =
            again.id.map(|id| Payload::new(codec.format(), id).decode::<String>().expect("an id is text"));
        assert_eq!(again, id);
    }
}

/// Nothing that is asked of a payload panics, and its other form has the same value.
fn payload(value: &Payload) {
    let _ = format!("{value:?}");
    let id = value.property("id").expect("a payload that was read is one value");
    assert!(id.is_none_or(|id| id.property("x").is_ok()));
    let other = match value.format() {
        Format::Json => Format::MessagePack,
        _ => Format::Json,
    };
    let Ok(tree) = value.to_value() else { return };
    let Ok(rewritten) = value.transcode(other) else { return };
    // Floats may become integers on the way, so trees are compared by their text.
    let text = |tree: &serde_json::Value| {
        String::from_utf8(json::to_vec(tree).expect("a tree has a text")).expect("json is utf-8")
    };
    let again = rewritten.to_value().expect("what was rewritten can be read");
    assert_eq!(text(&again), text(&tree), "{value:?} changed as {other}");
}

// === Patterns ===

/// A route is found again from the route and from all its spellings, whatever the pattern was.
pub(crate) fn pattern(input: &[u8]) {
    let stable = |route: &Route| {
        assert_eq!(Pattern::from(route.as_str()).route(), route, "a route is its own route");
        for spelling in route.raw_spellings() {
            assert_eq!(
                route_of_incoming(Format::Json, &spelling).as_ref(),
                Some(route),
                "a spelling leads elsewhere"
            );
        }
    };
    for format in [Format::Json, Format::MessagePack] {
        if let Some(route) = route_of_incoming(format, input) {
            stable(&route);
        }
    }
    let text = String::from_utf8_lossy(input);
    for pattern in [Pattern::from(&*text), Pattern::parse(&text)] {
        stable(pattern.route());
        assert!(json::validate(pattern.text().as_bytes()).is_ok(), "a pattern's text is json");
        let incoming = route_of_incoming(Format::Json, pattern.text().as_bytes());
        assert_eq!(incoming.as_ref(), Some(pattern.route()), "a pattern as sent leads elsewhere");
    }
}
