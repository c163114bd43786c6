// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which handler a pattern belongs to where patterns may have wildcards, pure.

use std::collections::HashMap;

use martlet_core::pattern::{Route, route_of_incoming};
use martlet_core::payload::Format;
use martlet_core::transport::PatternKey;

/// How many spellings of patterns are remembered; callers choose them, so there must be a bound.
const REMEMBERED: usize = 4096;

/// The routes of a server with wildcards, in order of registration.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    routes: Vec<Route>,
    /// Raw patterns that were looked up before, and the wildcard route of each, if any.
    known: HashMap<Box<[u8]>, Option<Route>>,
}

impl Routes {
    pub(crate) fn add(&mut self, route: Route) {
        if !self.routes.contains(&route) {
            self.routes.push(route);
        }
        self.known.clear();
    }

    pub(crate) fn remove(&mut self, route: &Route) {
        self.routes.retain(|have| have != route);
        self.known.clear();
    }

    /// RMQ-14: the exact route wins, then the first one that matches.
    pub(crate) fn key_of(&mut self, format: Format, raw: &[u8]) -> PatternKey {
        if let Some(known) = self.known.get(raw) {
            return match known {
                Some(route) => PatternKey::Route(route.clone()),
                None => PatternKey::Packet,
            };
        }
        let found = self.find(format, raw);
        if self.known.len() >= REMEMBERED {
            self.known.clear();
        }
        self.known.insert(raw.into(), found.clone());
        found.map_or(PatternKey::Packet, PatternKey::Route)
    }

    fn find(&self, format: Format, raw: &[u8]) -> Option<Route> {
        let concrete = route_of_incoming(format, raw)?;
        if self.routes.contains(&concrete) {
            // The runtime finds it by itself.
            return None;
        }
        self.routes.iter().find(|route| is_wild(route) && matches(route, &concrete)).cloned()
    }
}

fn is_wild(route: &str) -> bool {
    route.split('.').any(|word| word == "*" || word == "#")
}

/// RMQ-13: the broker's semantics: words are what dots separate; `*` is exactly one, `#` any number of them.
pub(crate) fn matches(pattern: &str, key: &str) -> bool {
    // A key without a character has no word.
    let words: Vec<&str> = key.split('.').filter(|_| !key.is_empty()).collect();
    // For each number of words consumed, whether it can be reached: no path is walked twice.
    let mut reached = vec![false; words.len() + 1];
    reached[0] = true;
    for part in pattern.split('.') {
        match part {
            "#" => {
                for at in 0..words.len() {
                    reached[at + 1] |= reached[at];
                }
            }
            part => {
                for at in (0..words.len()).rev() {
                    reached[at + 1] = reached[at] && (part == "*" || part == words[at]);
                }
                reached[0] = false;
            }
        }
    }
    reached[words.len()]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use martlet_core::Pattern;

    #[track_caller]
    fn check(pattern: &str, matching: &[&str], others: &[&str]) {
        for key in matching {
            assert!(matches(pattern, key), "{pattern} {key}");
        }
        for key in others {
            assert!(!matches(pattern, key), "{pattern} {key}");
        }
    }

    #[test]
    fn a_hash_is_any_number_of_words_anywhere() {
        check("#", &["", "a", "a.b.c"], &[]);
        check("a.#", &["a", "a.b", "a.b.c"], &["b", "ab", "b.a"]);
        check("#.c", &["c", "a.c", "a.b.c"], &["c.a", "ac"]);
        check("a.#.c", &["a.c", "a.b.c", "a.b.b.c"], &["a", "c", "a.c.b"]);
        check("#.b.#", &["b", "a.b", "b.c", "a.b.c", "b.b"], &["a.c", ""]);
        check("a.#.#", &["a", "a.b"], &["b"]);
    }

    #[test]
    fn a_star_is_exactly_one_word() {
        check("a.*", &["a.b"], &["a", "a.b.c", "b.b"]);
        check("*.*", &["a.b"], &["a", "a.b.c"]);
        check("*.#", &["a", "a.b"], &[""]);
        check("*", &["a"], &["", "a.b"]);
        check("a*", &["a*"], &["ab"]);
    }

    #[test]
    fn what_nestjs_matches_matches_here_and_what_the_broker_matches_besides() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../tests/vectors/rmq_match.json")).unwrap();
        let mut more = Vec::new();
        for vector in vectors.as_array().unwrap() {
            let [pattern, key] = ["pattern", "routing_key"].map(|name| vector[name].as_str().unwrap());
            match (vector["match"] == true, matches(pattern, key)) {
                (nestjs, here) if nestjs == here => {}
                (true, _) => panic!("{pattern} {key}"),
                _ => more.push((pattern, key)),
            }
        }
        // `#` not at the end, and `*` for a word without a character.
        assert_eq!(more, [("a.#.c", "a.b.c"), ("#.c", "a.b.c"), ("a.*.b", "a..b"), ("*.b", ".b")]);
    }

    #[test]
    fn many_hashes_take_no_exponential_time() {
        let pattern = format!("{}b", "#.".repeat(60));
        check(&pattern, &[&format!("{}b", "a.".repeat(60))], &[&"a.".repeat(60)]);
    }

    fn raw(text: &str) -> Vec<u8> {
        serde_json::to_vec(text).unwrap()
    }

    #[test]
    fn the_exact_route_wins_then_the_first_that_matches() {
        let mut routes = Routes::default();
        for pattern in ["a.*", "a.#", "a.b"] {
            routes.add(Pattern::from(pattern).route().clone());
        }
        for _ in 0..2 {
            assert!(matches!(routes.key_of(Format::Json, &raw("a.b")), PatternKey::Packet));
            assert!(
                matches!(routes.key_of(Format::Json, &raw("a.c")), PatternKey::Route(found) if &*found == "a.*")
            );
            assert!(
                matches!(routes.key_of(Format::Json, &raw("a.c.d")), PatternKey::Route(found) if &*found == "a.#")
            );
            assert!(matches!(routes.key_of(Format::Json, &raw("x")), PatternKey::Packet));
        }
        routes.remove(Pattern::from("a.*").route());
        assert!(
            matches!(routes.key_of(Format::Json, &raw("a.c")), PatternKey::Route(found) if &*found == "a.#")
        );
    }
}
