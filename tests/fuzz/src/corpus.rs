// SPDX-License-Identifier: MIT OR Apache-2.0

//! Inputs to start from, and what is done to them.

use bytes::Bytes;
use martlet_core::payload::{Format, Payload};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;

use crate::Target;

/// Golden messages, by what they are good for.
pub(crate) struct Corpus {
    frames: Vec<Vec<u8>>,
    packets: Vec<Vec<u8>>,
    patterns: Vec<Vec<u8>>,
}

/// Pieces that parsers care about.
const PIECES: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b":",
    b",",
    b"\\",
    b"\\u",
    b"\\ud83d",
    b"\\ude00",
    b"#",
    b"0",
    b"-",
    b"1e400",
    b".5",
    b"e+",
    b"null",
    b"true",
    b"\"id\":",
    b"\"pattern\":",
    b"\"data\":",
    b"\"err\":",
    b"\"response\":",
    b"\"isDisposed\":",
    b"\xf0\x9f\x98\x80",
    b"\xc3\xa9",
    b"\xc3",
    b"\xff",
    b"\0",
    b"\n",
    b" ",
    b"{\"a\":",
    b"[[[[[[[[",
    b"\xc0",
    b"\xc1",
    b"\x81",
    b"\x91",
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\x00\x01\x00\x00",
    b"\xd9",
    b"\xcb",
    b"\xc7",
    b"99999999999999999999",
    b"+12",
    b"\"\\\"x\\\"\"",
];

/// Reads the golden data of the crates.
pub(crate) fn load() -> Corpus {
    let mut corpus = Corpus { frames: Vec::new(), packets: Vec::new(), patterns: Vec::new() };
    for text in [
        include_str!("../../../actors/tcp/tests/vectors/tcp.json"),
        include_str!("../../../actors/core/tests/vectors/nats.json"),
        include_str!("../../../actors/core/tests/vectors/packets.json"),
        include_str!("../../../actors/core/tests/vectors/nest12-reply-classification.json"),
    ] {
        let payload = Payload::new(Format::Json, Bytes::from_static(text.as_bytes()));
        corpus.collect(&payload.to_value().expect("golden data is json"));
    }
    let packed: Vec<Vec<u8>> = corpus
        .packets
        .iter()
        .filter_map(|packet| Payload::new(Format::Json, packet.clone()).transcode(Format::MessagePack).ok())
        .map(|payload| payload.into_bytes().to_vec())
        .collect();
    corpus.packets.extend(packed);
    corpus
}

impl Corpus {
    fn collect(&mut self, value: &Value) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| self.collect(item)),
            Value::Object(members) => {
                for (key, value) in members {
                    match (key.as_str(), value) {
                        ("raw", Value::String(text)) => match text.split_once('#') {
                            Some((length, body)) if length.parse::<usize>().is_ok() => {
                                self.frames.push(text.clone().into_bytes());
                                self.packets.push(body.as_bytes().to_vec());
                            }
                            _ => self.packets.push(text.clone().into_bytes()),
                        },
                        ("pattern_json" | "text", Value::String(text)) => {
                            self.patterns.push(text.clone().into_bytes());
                        }
                        ("pattern" | "pattern_given", value) => {
                            self.patterns.push(value.to_string().into_bytes())
                        }
                        ("value", value) => self.packets.push(value.to_string().into_bytes()),
                        _ => self.collect(value),
                    }
                }
            }
            _ => {}
        }
    }

    /// One entry with a few changes, at times with none.
    pub(crate) fn mutated(&self, target: Target, random: &mut StdRng) -> Vec<u8> {
        let entries = match target {
            Target::Frame => &self.frames,
            Target::Packet => &self.packets,
            Target::Pattern => &self.patterns,
        };
        let pick = |random: &mut StdRng| &entries[random.random_range(0..entries.len())];
        let mut input = pick(random).clone();
        for _ in 0..random.random_range(0..6) {
            let place = random.random_range(0..=input.len());
            match random.random_range(0..8) {
                0 if place < input.len() => input[place] = random.random(),
                1 if place < input.len() => input[place] ^= 1 << random.random_range(0..8),
                2 if place < input.len() => drop(input.remove(place)),
                3 => input.truncate(place),
                4 => {
                    let end = random.random_range(place..=input.len());
                    let copied = input[place..end].to_vec();
                    input.splice(place..place, copied);
                }
                5 => {
                    let other = pick(random);
                    input.truncate(place);
                    input.extend_from_slice(&other[random.random_range(0..=other.len())..]);
                }
                6 => {
                    let other = pick(random).clone();
                    input.extend_from_slice(&other);
                }
                _ => {
                    let piece = PIECES[random.random_range(0..PIECES.len())];
                    input.splice(place..place, piece.iter().copied());
                }
            }
            input.truncate(1 << 16);
        }
        input
    }
}
