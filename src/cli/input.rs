// SPDX-License-Identifier: MIT OR Apache-2.0
//! What users type: patterns, data, durations, `key=value`.

use std::io::Read;
use std::time::Duration;

use bytes::Bytes;
use martlet::{Format, Pattern, Payload};
use serde::de::IgnoredAny;

use super::Failure;
use super::json::{Style, lay_out};

/// Reads a pattern, and refuses what was surely meant to be JSON.
pub(super) fn pattern(text: &str) -> Result<Pattern, Failure> {
    let trimmed = text.trim();
    if trimmed.starts_with(['{', '['])
        && let Err(error) = serde_json::from_str::<IgnoredAny>(trimmed)
    {
        let text = format!(
            "pattern {trimmed} looks like JSON but is none ({error}): names and texts need double quotes, as in \
             '{{\"cmd\":\"sum\"}}'"
        );
        return Err(Failure::usage(text));
    }
    Ok(Pattern::parse(text))
}

/// Reads data: JSON, `-` for stdin, `@file` for a file. With `as_text`, what is read is a text.
pub(super) fn data(argument: Option<&str>, as_text: bool) -> Result<Payload, Failure> {
    let (text, place) = match argument {
        None => return Ok(Payload::null(Format::Json)),
        Some("-") => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|error| Failure::usage(format!("cannot read data from stdin: {error}")))?;
            (text, "data from stdin".to_owned())
        }
        Some(argument) => match argument.strip_prefix('@') {
            Some(file) => {
                let text = std::fs::read_to_string(file)
                    .map_err(|error| Failure::usage(format!("cannot read data from file {file}: {error}")))?;
                (text, format!("data from file {file}"))
            }
            None => (argument.to_owned(), "data".to_owned()),
        },
    };
    if as_text {
        return Payload::encode(Format::Json, &text).map_err(|error| Failure::usage(error.to_string()));
    }
    json(&text).map_err(|error| {
        let shown: String = text.trim().chars().take(60).collect();
        let text = if place == "data" {
            format!(
                "data is not JSON ({error}): {shown}\n  to send it as a text, add --text; JSON texts have quotes of their \
                 own: '\"{shown}\"'"
            )
        } else {
            format!("{place} is not JSON ({error}); to send it as a text, add --text")
        };
        Failure::usage(text)
    })
}

/// Checks JSON and makes it compact.
pub(super) fn json(text: &str) -> Result<Payload, serde_json::Error> {
    serde_json::from_str::<IgnoredAny>(text)?;
    Ok(Payload::new(Format::Json, Bytes::from(lay_out(text, Style::default()))))
}

/// Reads `500ms`, `5s`, `2m`, `1h`; a bare number is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("{text:?} has no unit that is known: write 500ms, 5s, 2m or 1h")),
    };
    let number: f64 =
        number.parse().map_err(|_| format!("{text:?} is no duration: write 500ms, 5s or 2m"))?;
    Duration::try_from_secs_f64(number * factor).map_err(|error| format!("{text:?}: {error}"))
}

/// Reads `name=value`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not of the form name=value")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        let check = |text| duration(text).unwrap().as_millis();
        assert_eq!(
            [check("500ms"), check("5s"), check("1.5"), check("2m"), check("1h")],
            [500, 5000, 1500, 120_000, 3_600_000]
        );
        for wrong in ["", "s", "5 days", "-1s", "1..2s", "9e99h"] {
            duration(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_pattern_that_is_almost_json_is_refused() {
        assert_eq!(pattern(r#"{"cmd":"sum"}"#).unwrap(), Pattern::parse(r#"{"cmd":"sum"}"#));
        assert_eq!(pattern("time.us.*").unwrap(), Pattern::from("time.us.*"));
        assert_eq!(pattern("{cmd:sum}").unwrap_err().code, super::super::USAGE);
    }

    #[test]
    fn data_is_json_unless_it_is_said_to_be_text() {
        let check = |text, as_text| data(Some(text), as_text).map(Payload::into_bytes);
        assert_eq!(check(" [1, 2.50] ", false).unwrap(), "[1,2.50]");
        assert_eq!(check("hello", true).unwrap(), "\"hello\"");
        let failure = check("hello", false).unwrap_err();
        assert!(failure.text.contains("'\"hello\"'") && failure.text.contains("--text"), "{}", failure.text);
        assert_eq!(data(None, false).unwrap().bytes(), b"null");
        assert_eq!(check("@/no/such/file", false).unwrap_err().code, super::super::USAGE);
    }
}
