// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TCP frame by hand: `<length in UTF-16 units>#<json>`.
//!
//! The baselines share it with nobody: what they are compared with must not be in it.

use crate::Result;

/// Digits accepted before the `#`.
const MAX_DIGITS: usize = 20;
/// The length limit NestJS has, in UTF-16 units.
const MAX_UNITS: usize = 134_217_728;

/// Cuts the next frame's body off the front of `input`; `None` while it is incomplete.
pub fn next<'a>(input: &mut &'a [u8]) -> Result<Option<&'a [u8]>> {
    let head = &input[..input.len().min(MAX_DIGITS + 1)];
    let Some(hash) = memchr::memchr(b'#', head) else {
        if head.len() > MAX_DIGITS {
            return Err("no length in front of a frame".into());
        }
        return Ok(None);
    };
    let mut units = 0_usize;
    for digit in &head[..hash] {
        if !digit.is_ascii_digit() {
            return Err("the length of a frame is not a number".into());
        }
        units = units.saturating_mul(10).saturating_add(usize::from(digit - b'0'));
    }
    if hash == 0 || units > MAX_UNITS {
        return Err("the length of a frame is missing or too large".into());
    }
    let rest = &input[hash + 1..];
    let Some(bytes) = bytes_of(rest, units)? else { return Ok(None) };
    let (body, after) = rest.split_at(bytes);
    *input = after;
    Ok(Some(body))
}

/// How many bytes hold `units` UTF-16 units at the start of `text`, where they are all there.
fn bytes_of(text: &[u8], units: usize) -> Result<Option<usize>> {
    if text.len() < units {
        return Ok(None);
    }
    if text[..units].is_ascii() {
        return Ok(Some(units));
    }
    let mut left = units;
    let mut position = 0;
    while left > 0 {
        let Some(&lead) = text.get(position) else { return Ok(None) };
        let (bytes, cost) = match lead {
            0..0xc0 => (1, 1),
            0xc0..0xe0 => (2, 1),
            0xe0..0xf0 => (3, 1),
            _ => (4, 2),
        };
        position += bytes;
        left = left.checked_sub(cost).ok_or("the length of a frame cuts a character")?;
    }
    Ok((position <= text.len()).then_some(position))
}

/// Appends `<length>#<body>` to `out`.
pub fn push(out: &mut Vec<u8>, body: &[u8]) {
    push_number(out, units_of(body));
    out.push(b'#');
    out.extend_from_slice(body);
}

/// The UTF-16 length of valid UTF-8.
pub fn units_of(text: &[u8]) -> usize {
    if text.is_ascii() {
        return text.len();
    }
    text.iter().map(|&byte| usize::from(byte & 0xc0 != 0x80) + usize::from(byte >= 0xf0)).sum()
}

/// Appends a decimal number.
pub fn push_number(out: &mut Vec<u8>, mut number: usize) {
    let mut digits = [0; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(body: &str) -> Vec<u8> {
        let mut out = Vec::new();
        push(&mut out, body.as_bytes());
        out
    }

    #[test]
    fn lengths_count_utf16_units() {
        assert_eq!(frame("{}"), b"2#{}");
        assert_eq!(frame("\"😀é\""), "5#\"😀é\"".as_bytes());
    }

    #[test]
    fn garbage_is_refused() {
        for bytes in ["#{}", "abc#", "-1#", "999999999999#", "111111111111111111111", "1#😀"] {
            assert!(next(&mut bytes.as_bytes()).is_err(), "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn frames_survive_every_split(bodies in prop::collection::vec("\\PC{1,12}", 1..4)) {
            let stream: Vec<u8> = bodies.iter().flat_map(|body| frame(body)).collect();
            for split in 0..=stream.len() {
                let mut found = Vec::new();
                let mut buffer = Vec::new();
                for part in [&stream[..split], &stream[split..]] {
                    buffer.extend_from_slice(part);
                    let mut rest = buffer.as_slice();
                    while let Some(body) = next(&mut rest).unwrap() {
                        found.push(String::from_utf8(body.to_vec()).unwrap());
                    }
                    buffer = rest.to_vec();
                }
                prop_assert_eq!(&found, &bodies);
                prop_assert!(buffer.is_empty());
            }
        }
    }
}
