// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON text laid out anew: members keep their order, numbers and texts their spelling.

/// How to lay it out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Style {
    pub(super) pretty: bool,
    pub(super) colours: bool,
}

const NAME: &str = "\x1b[34m";
const TEXT: &str = "\x1b[32m";
const NUMBER: &str = "\x1b[33m";
const WORD: &str = "\x1b[35m";
const RESET: &str = "\x1b[0m";

/// Lays out well-formed JSON. Text that is none comes out in some way, never as a panic.
pub(super) fn lay_out(text: &str, style: Style) -> String {
    let mut out = String::with_capacity(text.len());
    let mut depth = 0_usize;
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = token(rest, first);
        let (token, after) = rest.split_at(length);
        rest = after.trim_start();
        match first {
            '{' | '[' => {
                out.push(first);
                if rest.starts_with(['}', ']']) {
                    out.push_str(&rest[..1]);
                    rest = rest[1..].trim_start();
                } else {
                    depth += 1;
                    line(&mut out, depth, style);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth, style);
                out.push(first);
            }
            ',' => {
                out.push(',');
                line(&mut out, depth, style);
            }
            ':' => out.push_str(if style.pretty { ": " } else { ":" }),
            _ => {
                let colour = match first {
                    '"' if rest.starts_with(':') => NAME,
                    '"' => TEXT,
                    '-' | '0'..='9' => NUMBER,
                    _ => WORD,
                };
                if style.colours {
                    out.extend([colour, token, RESET]);
                } else {
                    out.push_str(token);
                }
            }
        }
    }
    out
}

fn line(out: &mut String, depth: usize, style: Style) {
    if style.pretty {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    }
}

/// The length of the token that `text` begins with.
fn token(text: &str, first: char) -> usize {
    match first {
        '{' | '}' | '[' | ']' | ',' | ':' => 1,
        '"' => {
            let mut escaped = false;
            for (at, byte) in text.bytes().enumerate().skip(1) {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => return at + 1,
                    _ => {}
                }
            }
            text.len()
        }
        _ => text
            .find(|c: char| c.is_whitespace() || "{}[],:\"".contains(c))
            .unwrap_or(text.len())
            .max(first.len_utf8()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#" { "b" : [1, 2.50,{}, [ ]], "a":"x, \"y\": [", "c": null,"ü":{"d":-1e5}} "#;

    #[test]
    fn compact_keeps_order_and_spelling() {
        let compact = lay_out(TEXT, Style::default());
        assert_eq!(compact, r#"{"b":[1,2.50,{},[]],"a":"x, \"y\": [","c":null,"ü":{"d":-1e5}}"#);
        assert_eq!(lay_out(&compact, Style::default()), compact);
    }

    #[test]
    fn pretty_is_the_same_value() {
        let pretty = lay_out(TEXT, Style { pretty: true, colours: false });
        assert!(pretty.starts_with("{\n  \"b\": [\n    1,\n    2.50,\n    {},\n    []\n  ],\n"), "{pretty}");
        assert_eq!(lay_out(&pretty, Style::default()), lay_out(TEXT, Style::default()));
    }

    #[test]
    fn names_and_texts_have_different_colours() {
        let coloured = lay_out(r#"{"a":"b"}"#, Style { pretty: false, colours: true });
        assert_eq!(coloured, "{\x1b[34m\"a\"\x1b[0m:\x1b[32m\"b\"\x1b[0m}");
    }

    #[test]
    fn what_is_not_json_does_no_harm() {
        for text in ["", "\"", "\"\\", "}", "]]", "{", "é", "a\u{a0}b", "[}"] {
            lay_out(text, Style { pretty: true, colours: true });
        }
    }
}
