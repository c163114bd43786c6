// SPDX-License-Identifier: MIT OR Apache-2.0
//! The part of the Redis protocol (RESP2) that a subscribing connection needs, pure: commands to bytes, and what
//! arrives, frame by frame.

use std::ops::Range;

use bytes::{BufMut, BytesMut};

/// How many elements an array may have: `pmessage` has four.
const MAX_ELEMENTS: usize = 4;

/// How long a line (a number, an error) may be.
const MAX_LINE: usize = 64 * 1024;

/// The largest text but a message's body: a channel.
const MAX_TEXT: usize = 1024 * 1024;

/// Writes a command.
pub(crate) fn command(out: &mut BytesMut, parts: &[&[u8]]) {
    head(out, b'*', parts.len());
    for part in parts {
        head(out, b'$', part.len());
        out.put_slice(part);
        out.put_slice(b"\r\n");
    }
}

fn head(out: &mut BytesMut, kind: u8, number: usize) {
    out.put_u8(kind);
    out.put_slice(number.to_string().as_bytes());
    out.put_slice(b"\r\n");
}

/// What confirms what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Confirmed {
    Subscribe,
    Psubscribe,
    Unsubscribe,
    Punsubscribe,
}

/// One thing that arrived; ranges are places in the bytes it was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A message, on a subscribed channel or on one that a subscribed glob matches.
    Message { pattern: Option<Range<usize>>, channel: Range<usize>, body: Range<usize> },
    /// A message whose body is larger than is taken; the frame ends before it, `skip` bytes follow.
    TooLarge { channel: Range<usize>, size: usize, skip: usize },
    /// A subscription was made or ended.
    Confirmed(Confirmed),
    /// A command failed.
    Error(Range<usize>),
    /// A command succeeded: `+text`.
    Simple,
    /// A command's answer: a number.
    Integer(i64),
    /// A command's answer: a text (PING's, on a connection without subscriptions) or nothing.
    Text,
    /// PING's answer on a connection with subscriptions.
    Pong,
}

/// What a look at the bytes that have arrived gives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// The frame, and how many bytes it takes.
    Frame(Frame, usize),
    /// There is more to come: the frame takes at least so many bytes.
    Incomplete(usize),
}

/// The bytes are not what a Redis server sends to a subscriber.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotRedis(pub(crate) String);

enum Element {
    Text(Range<usize>),
    Integer,
    Nil,
}

/// A line without its end, and where the next one begins.
fn line(bytes: &[u8], from: usize) -> Result<Option<(Range<usize>, usize)>, NotRedis> {
    match memchr::memchr(b'\n', &bytes[from..]) {
        Some(at) if at > 0 && bytes[from + at - 1] == b'\r' => Ok(Some((from..from + at - 1, from + at + 1))),
        Some(_) => Err(not_redis(bytes)),
        None if bytes.len() - from > MAX_LINE => Err(not_redis(bytes)),
        None => Ok(None),
    }
}

fn not_redis(bytes: &[u8]) -> NotRedis {
    let shown = bytes.get(..40).unwrap_or(bytes);
    NotRedis(format!("\"{}\"", shown.escape_ascii()))
}

fn number(bytes: &[u8], digits: Range<usize>) -> Result<i64, NotRedis> {
    let text = &bytes[digits];
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    if digits.is_empty() || digits.len() > 18 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(not_redis(bytes));
    }
    let value = digits.iter().fold(0i64, |value, digit| value * 10 + i64::from(digit - b'0'));
    Ok(if negative { -value } else { value })
}

/// Reads the next frame. `limit` is the largest body that is taken.
pub(crate) fn parse(bytes: &[u8], limit: usize) -> Result<Parsed, NotRedis> {
    let Some(&kind) = bytes.first() else { return Ok(Parsed::Incomplete(0)) };
    let Some((first, next)) = line(bytes, 1)? else { return Ok(Parsed::Incomplete(0)) };
    let frame = match kind {
        b'*' => return array(bytes, number(bytes, first)?, next, limit),
        b'-' => Frame::Error(first),
        b'+' => Frame::Simple,
        b':' => Frame::Integer(number(bytes, first)?),
        b'$' => {
            let size = number(bytes, first)?;
            let Ok(size) = usize::try_from(size) else { return Ok(Parsed::Frame(Frame::Text, next)) };
            if size > MAX_TEXT {
                return Err(not_redis(bytes));
            }
            return Ok(if bytes.len() < next + size + 2 {
                Parsed::Incomplete(next + size + 2)
            } else {
                Parsed::Frame(Frame::Text, next + size + 2)
            });
        }
        _ => return Err(not_redis(bytes)),
    };
    Ok(Parsed::Frame(frame, next))
}

fn array(bytes: &[u8], count: i64, mut at: usize, limit: usize) -> Result<Parsed, NotRedis> {
    let count = usize::try_from(count).ok().filter(|count| (2..=MAX_ELEMENTS).contains(count));
    let Some(count) = count else { return Err(not_redis(bytes)) };
    let mut elements: [Element; MAX_ELEMENTS] = [const { Element::Nil }; MAX_ELEMENTS];
    for index in 0..count {
        let Some(&kind) = bytes.get(at) else { return Ok(Parsed::Incomplete(0)) };
        let Some((digits, next)) = line(bytes, at + 1)? else { return Ok(Parsed::Incomplete(0)) };
        let value = number(bytes, digits)?;
        elements[index] = match (kind, usize::try_from(value)) {
            (b':', _) => {
                at = next;
                Element::Integer
            }
            (b'$', Err(_)) => {
                at = next;
                Element::Nil
            }
            (b'$', Ok(size)) => {
                let is_body = index + 1 == count && index >= 2;
                if is_body && size > limit {
                    let Element::Text(channel) = &elements[index - 1] else { return Err(not_redis(bytes)) };
                    let frame = Frame::TooLarge { channel: channel.clone(), size, skip: size + 2 };
                    return Ok(Parsed::Frame(frame, next));
                }
                if !is_body && size > MAX_TEXT {
                    return Err(not_redis(bytes));
                }
                let end = next + size;
                if bytes.len() < end + 2 {
                    return Ok(Parsed::Incomplete(end + 2));
                }
                if &bytes[end..end + 2] != b"\r\n" {
                    return Err(not_redis(bytes));
                }
                at = end + 2;
                Element::Text(next..end)
            }
            _ => return Err(not_redis(bytes)),
        };
    }
    let Element::Text(name) = &elements[0] else { return Err(not_redis(bytes)) };
    let frame = match (&bytes[name.clone()], &elements[1..count]) {
        (b"message", [Element::Text(channel), Element::Text(body)]) => {
            Frame::Message { pattern: None, channel: channel.clone(), body: body.clone() }
        }
        (b"pmessage", [Element::Text(pattern), Element::Text(channel), Element::Text(body)]) => {
            Frame::Message { pattern: Some(pattern.clone()), channel: channel.clone(), body: body.clone() }
        }
        (b"subscribe", [_, Element::Integer]) => Frame::Confirmed(Confirmed::Subscribe),
        (b"psubscribe", [_, Element::Integer]) => Frame::Confirmed(Confirmed::Psubscribe),
        (b"unsubscribe", [_, Element::Integer]) => Frame::Confirmed(Confirmed::Unsubscribe),
        (b"punsubscribe", [_, Element::Integer]) => Frame::Confirmed(Confirmed::Punsubscribe),
        (b"pong", [_]) => Frame::Pong,
        _ => return Err(not_redis(bytes)),
    };
    Ok(Parsed::Frame(frame, at))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LIMIT: usize = 100;

    #[track_caller]
    fn check(bytes: &[u8], expected: Frame) {
        let length = bytes.len();
        assert_eq!(parse(bytes, LIMIT), Ok(Parsed::Frame(expected, length)), "{}", bytes.escape_ascii());
        // Every part of it is incomplete, and what follows changes nothing.
        for end in 0..length {
            let part = parse(&bytes[..end], LIMIT);
            assert!(matches!(part, Ok(Parsed::Incomplete(least)) if least <= length), "{end}: {part:?}");
        }
        let more = [bytes, b"*3\r\n"].concat();
        assert!(matches!(parse(&more, LIMIT), Ok(Parsed::Frame(_, taken)) if taken == length));
    }

    #[test]
    fn commands_are_arrays_of_texts() {
        let mut out = BytesMut::new();
        command(&mut out, &[b"SUBSCRIBE", b"{\"cmd\":\"sum\"}", b""]);
        assert_eq!(&out[..], b"*3\r\n$9\r\nSUBSCRIBE\r\n$13\r\n{\"cmd\":\"sum\"}\r\n$0\r\n\r\n");
    }

    #[test]
    fn messages_are_read_and_their_parts_found() {
        let bytes = b"*3\r\n$7\r\nmessage\r\n$3\r\nsum\r\n$5\r\n\r\n{}\n\r\n";
        check(bytes, Frame::Message { pattern: None, channel: 21..24, body: 30..35 });
        let bytes = b"*4\r\n$8\r\npmessage\r\n$3\r\nw.*\r\n$3\r\nw.b\r\n$0\r\n\r\n";
        check(bytes, Frame::Message { pattern: Some(22..25), channel: 31..34, body: 40..40 });
    }

    #[test]
    fn confirmations_and_answers_are_read() {
        check(b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n", Frame::Confirmed(Confirmed::Subscribe));
        check(b"*3\r\n$12\r\npunsubscribe\r\n$-1\r\n:0\r\n", Frame::Confirmed(Confirmed::Punsubscribe));
        check(b"*2\r\n$4\r\npong\r\n$0\r\n\r\n", Frame::Pong);
        check(b"+PONG\r\n", Frame::Simple);
        check(b":17\r\n", Frame::Integer(17));
        check(b"$4\r\nabcd\r\n", Frame::Text);
        check(b"-NOPERM no\r\n", Frame::Error(1..10));
    }

    #[test]
    fn a_body_above_the_limit_is_told_before_it_has_arrived() {
        let limit = b"*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$100\r\n";
        assert_eq!(parse(limit, LIMIT), Ok(Parsed::Incomplete(limit.len() + 102)));
        let over = b"*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$101\r\n";
        let frame = Frame::TooLarge { channel: 21..22, size: 101, skip: 103 };
        assert_eq!(parse(over, LIMIT), Ok(Parsed::Frame(frame, over.len())));
    }

    #[test]
    fn what_no_redis_server_sends_is_refused() {
        let wrong: &[&[u8]] = &[
            b"HTTP/1.1 400 Bad Request\r\n",
            b"*9\r\n",
            b"*1\r\n$1\r\na\r\n",
            b"*-1\r\n",
            b"*3\r\n$x\r\n",
            b"*3\r\n$7\r\nmessage\r\n$1\r\nab\r\n$1\r\na\r\n",
            b"*3\r\n$7\r\nunknown\r\n$1\r\na\r\n$1\r\na\r\n",
            b"*3\r\n:1\r\n:1\r\n:1\r\n",
            b"*3\r\n$99999999999999999999\r\n",
            b"$2000000\r\n",
            b"+no carriage return\n",
        ];
        for bytes in wrong {
            assert!(parse(bytes, LIMIT).is_err(), "{}", bytes.escape_ascii());
        }
        assert!(parse(&vec![b'+'; MAX_LINE + 2], LIMIT).is_err());
    }
}
