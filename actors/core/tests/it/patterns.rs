// SPDX-License-Identifier: MIT OR Apache-2.0

//! Patterns and routes against what NestJS computed.

use martlet_core::json;
use martlet_core::pattern::{Pattern, PatternError, route_of_incoming};
use martlet_core::payload::{Format, Payload};
use proptest::prelude::*;
use serde_json::{Value, json};

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

#[test]
fn literals_have_no_route_unless_they_are_text() {
    for literal in ["true", "false", "null"] {
        check_incoming(literal, None);
        check_incoming(&format!("\"{literal}\""), Some(literal));
        assert_eq!(&**Pattern::from(literal).route(), literal);
    }
    check_incoming("1e400", None);
    check_incoming("\"1e400\"", Some("Infinity"));
    check_incoming(r#"{"a":1e400,"b":true}"#, Some(r#"{"a":null,"b":true}"#));
    assert!(matches!(Pattern::from_json(&true), Err(PatternError::NoRoute { .. })));
    assert!(matches!(Pattern::try_from(Value::Null), Err(PatternError::NoRoute { .. })));
    for broken in ["", "{", "sum", "\"\\x\""] {
        check_incoming(broken, None);
    }
}

#[test]
fn spellings_of_one_value_are_one_pattern() {
    let same = |texts: &[&str], route: &str| {
        for text in texts {
            assert_eq!(&**Pattern::from(*text).route(), route, "{text}");
        }
    };
    same(&["42", " 42 ", "42.0", "4.2e1", "\"42\"", "\"42.0\""], "42");
    same(&["sum", "\"sum\"", "\"\\\"sum\\\"\""], "sum");
    same(&["{\"b\":1,\"a\":2.0}", " { \"a\" : 2 , \"b\" : 1 } "], r#"{"a":2,"b":1}"#);
    same(&["{\"a\":1,\"b\":3,\"a\":2}"], r#"{"a":2,"b":3}"#);
    assert_eq!(&**Pattern::from(42).route(), "42");
    assert_eq!(&**Pattern::from(i64::MAX).route(), "9223372036854776000");
    assert_eq!(Pattern::from(i64::MAX).text(), "9223372036854775807");
}

#[test]
fn patterns_keep_what_was_given() {
    let object = Pattern::from_json(&json!({"b": 1.0, "a": "x"})).unwrap();
    assert_eq!((object.text(), object.as_str()), (r#"{"a":"x","b":1}"#, None));
    let text = Pattern::from("a\"b");
    assert_eq!(
        (text.text(), text.as_str(), text.to_string()),
        (r#""a\"b""#, Some("a\"b"), "a\"b".to_owned())
    );
    #[derive(serde::Serialize)]
    struct Command {
        version: u8,
        cmd: &'static str,
    }
    let command = Pattern::from_json(&Command { version: 1, cmd: "sum" }).unwrap();
    assert_eq!(command.to_string(), r#"{"version":1,"cmd":"sum"}"#);
    assert_eq!(&**command.route(), r#"{"cmd":"sum","version":1}"#);
}

#[test]
fn patterns_are_read_as_a_person_types_them() {
    let check = |typed: &str, text: &str, route: &str| {
        let pattern: Pattern = typed.parse().unwrap();
        assert_eq!((pattern.text(), &**pattern.route()), (text, route), "{typed}");
    };
    check("sum", "\"sum\"", "sum");
    check("\"sum\"", "\"sum\"", "sum");
    check(r#" {"cmd": "sum"} "#, r#"{"cmd": "sum"}"#, r#"{"cmd":"sum"}"#);
    check("42", "42", "42");
    check("true", "\"true\"", "true");
    check("{cmd:sum}", "\"{cmd:sum}\"", "{cmd:sum}");
    check("a b", "\"a b\"", "a b");
}

#[test]
fn likely_spellings_lead_back() {
    let check = |pattern: &str, expected: &[&str]| {
        let spellings = Pattern::parse(pattern).route().raw_spellings();
        let spellings: Vec<&str> = spellings.iter().map(|it| std::str::from_utf8(it).unwrap()).collect();
        assert_eq!(spellings, expected, "{pattern}");
    };
    check("sum", &["\"sum\""]);
    check("42", &["42", "\"42\""]);
    check(r#"{"cmd":"sum"}"#, &[r#"{"cmd":"sum"}"#, r#""{\"cmd\":\"sum\"}""#]);
    check("true", &["\"true\""]);
    check(r#"{"a":"x\ny"}"#, &[r#""{\"a\":\"x\ny\"}""#]);
}

#[test]
fn messagepack_patterns_have_the_same_routes() {
    let check = |value: Value| {
        let packed = Payload::encode(Format::MessagePack, &value).unwrap();
        let text = Payload::encode(Format::Json, &value).unwrap();
        assert_eq!(
            route_of_incoming(Format::MessagePack, packed.bytes()),
            route_of_incoming(Format::Json, text.bytes()),
            "{value}"
        );
    };
    for value in [
        json!("sum"),
        json!("42"),
        json!(42),
        json!(4.5),
        json!(true),
        json!(null),
        json!({"b": 1, "a": ["x", 2.0]}),
        json!("{\"cmd\": 1}"),
    ] {
        check(value);
    }
    assert_eq!(route_of_incoming(Format::MessagePack, &[0xc1]), None);
}

proptest! {
    /// An event carries its route, which is looked up again.
    #[test]
    fn a_route_is_its_own_route(text in prop_oneof![
        any::<String>(),
        "[\"{}\\[\\]:,0-9a-z\\\\ .-]{0,16}",
        "\\{\"[a-zA-Z0-9_é-]{0,3}\":[0-9]{1,3}(,\"[a-zA-Z0-9_é-]{0,3}\":(\"[a-z\\n]{0,2}\"|\\[1,\\{\\}\\])){0,4}\\}",
    ]) {
        let route = Pattern::from(text).route().clone();
        prop_assert_eq!(Pattern::from(route.as_str()).route().clone(), route.clone());
        let quoted = json::to_vec(route.as_str()).unwrap();
        prop_assert_eq!(route_of_incoming(Format::Json, &quoted), Some(route.clone()));
        for spelling in route.raw_spellings() {
            prop_assert_eq!(route_of_incoming(Format::Json, &spelling), Some(route.clone()));
        }
    }

    #[test]
    fn key_order_does_not_matter(
        members in prop::collection::hash_map("[a-zA-Z0-9_é-]{0,4}", any::<i32>(), 0..8),
    ) {
        let text = |members: Vec<(&String, &i32)>| {
            let members: Vec<String> = members.iter().map(|(key, value)| format!("{key:?}:{value}")).collect();
            format!("{{{}}}", members.join(","))
        };
        let forward: Vec<_> = members.iter().collect();
        let backward: Vec<_> = forward.iter().rev().copied().collect();
        prop_assert_eq!(Pattern::from(text(forward)), Pattern::from(text(backward)));
    }
}
