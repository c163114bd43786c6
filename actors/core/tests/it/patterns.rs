// SPDX-License-Identifier: MIT OR Apache-2.0

//! Patterns and routes against what NestJS computed.

use martlet_core::json;
use martlet_core::pattern::{Pattern, route_of_incoming};
use martlet_core::payload::Format;
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("../vectors/packets.json")).unwrap()
}

#[track_caller]
fn check_incoming(raw: &str, route: Option<&str>) {
    let found = route_of_incoming(Format::Json, raw.as_bytes());
    assert_eq!(found.as_deref(), route, "route of the raw pattern {raw}");
}

#[test]
fn routes_equal_nests() {
    for case in golden()["normalise"].as_array().unwrap() {
        let text = case["pattern_json"].as_str().unwrap();
        let mut route = case["route"].as_str().unwrap().to_owned();
        if route.contains(r#","u":undefined"#) {
            // An undefined member exists in JavaScript only; JSON has already lost it.
            route = route.replace(r#","u":undefined"#, "");
        }
        check_incoming(text, Some(&route));
        assert_eq!(&**Pattern::parse(text).route(), route, "route of {text}");
    }
}

#[test]
fn text_is_looked_up_as_nest_does() {
    for case in golden()["lookup_from_string"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        // What Nest makes a literal is unreachable there, and text here.
        let route = if case["route"].is_string() { case["route"].as_str().unwrap() } else { text };
        let quoted = String::from_utf8(json::to_vec(text).unwrap()).unwrap();
        check_incoming(&quoted, Some(route));
        assert_eq!(&**Pattern::from(text).route(), route, "route of the text {text}");
    }
}

#[test]
fn keys_sort_as_in_nest() {
    let golden = golden();
    let ascii = golden["key_order"][0]["ascii_printable_in_sort_order"].as_str().unwrap();
    let ascii: Vec<String> = ascii.chars().map(String::from).collect();
    let words: Vec<String> =
        serde_json::from_value(golden["key_order"][1]["words_in_sort_order"].clone()).unwrap();
    for order in [ascii, words] {
        // Objects of two keys each, as longer ones are cut off.
        for (index, first) in order.iter().enumerate() {
            for second in &order[index + 1..] {
                let key = |key: &String| String::from_utf8(json::to_vec(key).unwrap()).unwrap();
                let sorted = format!("{{{}:1,{}:2}}", key(first), key(second));
                let reversed = format!("{{{}:2,{}:1}}", key(second), key(first));
                check_incoming(&reversed, route_of_incoming(Format::Json, sorted.as_bytes()).as_deref());
                let route = route_of_incoming(Format::Json, sorted.as_bytes()).unwrap();
                assert!(
                    route.find(":1").unwrap() < route.find(":2").unwrap(),
                    "{first:?} sorts before {second:?}"
                );
            }
        }
    }
}
