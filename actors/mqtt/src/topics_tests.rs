// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use martlet_core::pattern::Pattern;

use super::*;

fn routes(group: Option<&str>, patterns: &[&str]) -> Routes {
    let mut routes = Routes::new(group.map(str::to_owned));
    for pattern in patterns {
        routes.add(Pattern::from(*pattern).route());
    }
    routes
}

#[track_caller]
fn check_find(patterns: &[&str], topic: &str, expected: Option<&str>) {
    match (routes(None, patterns).find(topic, &[]), expected) {
        (Found::Handler(route, _), Some(expected)) => assert_eq!(route.as_str(), expected, "{topic}"),
        (Found::Nobody, None) => {}
        (found, _) => panic!("{topic}: {found:?}"),
    }
}

/// MQTT-6: recorded from NestJS.
#[test]
fn patterns_match_as_in_nestjs() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../tests/vectors/matching.json")).unwrap();
    let cases = golden["match"].as_array().unwrap();
    assert!(cases.len() >= 20);
    for case in cases {
        let (pattern, topic) = (case["pattern"].as_str().unwrap(), case["topic"].as_str().unwrap());
        assert_eq!(matches(pattern, topic), case["match"].as_bool().unwrap(), "{pattern} {topic}");
    }
}

/// MQTT-6.
#[test]
fn an_exact_pattern_comes_first_then_the_order_of_registration() {
    check_find(&["a/#", "a/b"], "a/b", Some("a/b"));
    check_find(&["a/#", "a/+"], "a/c", Some("a/#"));
    check_find(&["a/+", "a/#"], "a/c", Some("a/+"));
    check_find(&["a/+", "a/#"], "a/c/d", Some("a/#"));
    check_find(&["a/#"], "a", Some("a/#"));
    check_find(&["a/#"], "b", None);
    check_find(&["$share/g/a/b"], "a/b", Some("$share/g/a/b"));
    check_find(&["$share/g/a/b", "a/+"], "a/b", Some("$share/g/a/b"));
    check_find(&["a/+", "$share/g/a/b"], "a/b", Some("a/+"));
    check_find(&["$share/g/s/+"], "s/k", Some("$share/g/s/+"));
    check_find(&[r#"{"cmd":"sum"}"#], r#"{"cmd":"sum"}"#, Some(r#"{"cmd":"sum"}"#));
}

/// MQTT-7.
#[test]
fn of_several_copies_of_a_message_one_runs_a_handler() {
    let mut routes = Routes::default();
    let mut add = |text: &str| routes.add(Pattern::from(text).route()).2.unwrap();
    let (hash, exact, shared) = (add("a/#"), add("a/b"), add("$share/g/a/+"));
    let name = |identifiers: &[usize]| match routes.find("a/b", identifiers) {
        Found::Handler(route, _) => route.to_string(),
        other => format!("{other:?}"),
    };
    assert_eq!(name(&[]), "a/b");
    assert_eq!(name(&[exact]), "a/b");
    assert_eq!(name(&[hash]), "Copy");
    assert_eq!(name(&[hash, exact]), "a/b");
    // A copy for the group is another delivery: who else gets it is the broker's choice.
    assert_eq!(name(&[shared]), "$share/g/a/+");
    // An identifier of a session before ours.
    assert_eq!(name(&[7]), "a/b");
}

/// MQTT-4.
#[test]
fn a_group_is_put_before_patterns_that_have_none() {
    let mut routes = Routes::new(Some("g".to_owned()));
    assert_eq!(routes.add(Pattern::from("a").route()).0, "$share/g/a");
    let own = Pattern::from("$share/own/b");
    assert_eq!(routes.add(own.route()).0, "$share/own/b");
    assert!(matches!(routes.find("a", &[]), Found::Handler(route, false) if route.as_str() == "a"));
    assert_eq!(routes.remove(own.route()).as_deref(), Some("$share/own/b"));
    assert_eq!(routes.find("b", &[]), Found::Nobody);
    assert_eq!(routes.filters().collect::<Vec<_>>(), ["$share/g/a"]);
}

/// MQTT-3.
#[test]
fn what_cannot_be_a_topic_is_refused_with_the_reason() {
    for good in ["a", "a/b", "/a", "a//b", r#"{"cmd":"sum"}"#, "$SYS/x", "42"] {
        assert_eq!((check_topic(good), check_filter(good)), (Ok(()), Ok(())), "{good}");
    }
    for wildcards in ["+", "#", "a/+/b", "a/#", "$share/g/a/+"] {
        assert!(check_topic(wildcards).is_err(), "{wildcards}");
        assert_eq!(check_filter(wildcards), Ok(()), "{wildcards}");
    }
    for bad in [
        "",
        "a\0",
        r#"{"cmd":"a+b"}"#,
        "a/b#",
        "#/a",
        "a+/b",
        "$share/g",
        "$share//a",
        "$share/g/",
        "$share/g+/a",
        "_MARTLET/cancel/a",
        "$share/g/_MARTLET/cancel/#",
    ] {
        assert!(check_filter(bad).is_err(), "{bad}");
    }
    assert!(check_topic(&"a".repeat(65_530)).is_err());
    assert!(check_topic(&"a".repeat(65_529)).is_ok());
}
