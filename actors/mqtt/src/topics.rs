// SPDX-License-Identifier: MIT OR Apache-2.0
//! Topics, topic filters, and which handler a message is for. Pure.

use std::collections::{BTreeMap, HashMap};

use martlet_core::pattern::Route;

use crate::cancel;

/// What a reply topic ends with.
pub(crate) const REPLY: &str = "/reply";

const MAX_BYTES: usize = 65_535;

/// Checks that a route can be published to (MQTT-3).
pub(crate) fn check_topic(route: &str) -> Result<(), String> {
    check_text(route, MAX_BYTES - REPLY.len())?;
    match route.chars().find(|c| matches!(c, '+' | '#')) {
        Some(found) => Err(format!("an MQTT topic cannot contain {found:?}, which is a wildcard")),
        None => Ok(()),
    }
}

/// Checks that a route can be subscribed (MQTT-3).
pub(crate) fn check_filter(route: &str) -> Result<(), String> {
    check_text(route, MAX_BYTES)?;
    let (group, own) = match route.strip_prefix("$share/") {
        None => (None, route),
        Some(rest) => match rest.split_once('/') {
            Some((group, own)) => (Some(group), own),
            None => return Err("a shared subscription is $share/<group>/<pattern>".to_owned()),
        },
    };
    if let Some(group) = group {
        check_group(group)?;
        if own.is_empty() {
            return Err("a shared subscription is $share/<group>/<pattern>".to_owned());
        }
    }
    if cancel::is_cancellation(own) {
        return Err(format!("topics below {} are for cancelled calls", cancel::PREFIX));
    }
    let last = own.split('/').count() - 1;
    for (index, level) in own.split('/').enumerate() {
        match level {
            "+" => {}
            "#" if index == last => {}
            "#" => return Err("the wildcard '#' must be the last level".to_owned()),
            other => {
                if let Some(found) = other.chars().find(|c| matches!(c, '+' | '#')) {
                    return Err(format!(
                        "{found:?} is a wildcard and must be a whole level of an MQTT topic"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Checks the name of a group of subscribers.
pub(crate) fn check_group(group: &str) -> Result<(), String> {
    if group.is_empty() || group.contains(['/', '+', '#', '\0']) {
        return Err(format!("a group of shared subscriptions cannot be called {group:?}"));
    }
    Ok(())
}

fn check_text(text: &str, limit: usize) -> Result<(), String> {
    if text.is_empty() {
        return Err("an MQTT topic cannot be empty".to_owned());
    }
    if text.contains('\0') {
        return Err("an MQTT topic cannot contain a zero character".to_owned());
    }
    if text.len() > limit {
        return Err(format!("an MQTT topic has at most {limit} bytes here, not {}", text.len()));
    }
    Ok(())
}

/// A handler's pattern without the prefix of a shared subscription.
pub(crate) fn own_pattern(pattern: &str) -> &str {
    if !pattern.starts_with("$share") {
        return pattern;
    }
    let mut rest = pattern;
    for _ in 0..2 {
        rest = rest.split_once('/').map_or("", |(_, rest)| rest);
    }
    rest
}

/// NestJS's matcher (MQTT-6); the pattern has no prefix any more.
pub(crate) fn matches(pattern: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    let mut patterns = pattern.split('/').peekable();
    while let Some(part) = patterns.next() {
        if part.starts_with('#') {
            return patterns.peek().is_none();
        }
        match levels.next() {
            // `a/#` is for `a`, too.
            None => return false,
            Some(level) if part.is_empty() && level.is_empty() => {}
            Some(level) if part.starts_with('+') && !level.is_empty() => {}
            Some(level) if part == level => {}
            Some(_) => return false,
        }
    }
    levels.next().is_none()
}

fn has_wildcards(pattern: &str) -> bool {
    pattern.contains(['+', '#'])
}

/// A number for a filter that is the same in every process: MQTT 5's subscription identifier. A session that the
/// broker has kept may bring messages with identifiers of another process.
fn identifier(filter: &str) -> usize {
    const LARGEST: u64 = 268_435_455;
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in filter.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    (hash % LARGEST + 1) as usize
}

/// What is done with an arrival.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<'a> {
    /// Its handler, and whether that has wildcards.
    Handler(&'a Route, bool),
    /// Another copy of it brings or has brought it to its handler.
    Copy,
    /// Nobody wants it.
    Nobody,
}

#[derive(Debug)]
struct Entry {
    route: Route,
    filter: String,
    shared: bool,
    wild: bool,
    /// None of its own if another filter happens to have the same one.
    identifier: Option<usize>,
}

/// The subscribed patterns, in order of registration.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    group: Option<String>,
    next: u32,
    entries: BTreeMap<u32, Entry>,
    by_route: HashMap<Route, u32>,
    /// Patterns without wildcards and prefix.
    exact: HashMap<String, u32>,
    /// The others: with wildcards, and (in order with those, MQTT-6) shared ones by their own pattern.
    wild: Vec<u32>,
    shared: HashMap<String, u32>,
    by_identifier: HashMap<usize, u32>,
}

impl Routes {
    pub(crate) fn new(group: Option<String>) -> Self {
        Self { group, ..Self::default() }
    }

    /// Adds a pattern; the filter to subscribe, and its identifier if it has one of its own.
    pub(crate) fn add(&mut self, route: &Route) -> (String, bool, Option<usize>) {
        self.remove(route);
        let key = self.next;
        self.next += 1;
        let text = route.as_str();
        let prefixed = text.starts_with("$share");
        let filter = match &self.group {
            Some(group) if !prefixed => format!("$share/{group}/{text}"),
            _ => text.to_owned(),
        };
        let own = own_pattern(text);
        let wild = has_wildcards(own);
        match (prefixed, wild) {
            (_, true) => self.wild.push(key),
            (true, false) => {
                self.shared.entry(own.to_owned()).or_insert(key);
            }
            (false, false) => {
                self.exact.insert(own.to_owned(), key);
            }
        }
        let number = identifier(&filter);
        let identifier = (*self.by_identifier.entry(number).or_insert(key) == key).then_some(number);
        let shared = filter.starts_with("$share/");
        self.by_route.insert(route.clone(), key);
        self.entries
            .insert(key, Entry { route: route.clone(), filter: filter.clone(), shared, wild, identifier });
        (filter, shared, identifier)
    }

    /// Takes a pattern out; its filter, to be unsubscribed.
    pub(crate) fn remove(&mut self, route: &Route) -> Option<String> {
        let key = self.by_route.remove(route)?;
        let entry = self.entries.remove(&key)?;
        let own = own_pattern(route.as_str());
        if entry.wild {
            self.wild.retain(|have| *have != key);
        } else {
            for names in [&mut self.exact, &mut self.shared] {
                if names.get(own) == Some(&key) {
                    names.remove(own);
                }
            }
        }
        if let Some(identifier) = entry.identifier {
            self.by_identifier.remove(&identifier);
        }
        Some(entry.filter)
    }

    /// The filters of all patterns.
    pub(crate) fn filters(&self) -> impl Iterator<Item = &str> {
        self.entries.values().map(|entry| entry.filter.as_str())
    }

    /// Finds the handler of a message by NestJS's rule, and with MQTT 5's identifiers the one copy of it that
    /// runs it (MQTT-7).
    pub(crate) fn find(&self, topic: &str, identifiers: &[usize]) -> Found<'_> {
        let shared_copy = identifiers
            .iter()
            .find_map(|identifier| self.entries.get(self.by_identifier.get(identifier)?))
            .map(|entry| entry.shared);
        let Some(entry) = self.first(topic, shared_copy).or_else(|| self.first(topic, None)) else {
            return Found::Nobody;
        };
        if shared_copy.is_some() && entry.identifier.is_some_and(|own| !identifiers.contains(&own)) {
            return Found::Copy;
        }
        Found::Handler(&entry.route, entry.wild)
    }

    /// The first match in NestJS's order, of one kind of subscription or of both.
    fn first(&self, topic: &str, shared: Option<bool>) -> Option<&Entry> {
        let wanted = |key: &u32| {
            let entry = self.entries.get(key)?;
            (shared.is_none_or(|shared| entry.shared == shared)).then_some((*key, entry))
        };
        if let Some((_, entry)) = self.exact.get(topic).and_then(wanted) {
            return Some(entry);
        }
        let by_name = self.shared.get(topic).and_then(wanted);
        let matching = self
            .wild
            .iter()
            .filter_map(wanted)
            .find(|(_, entry)| matches(own_pattern(entry.route.as_str()), topic));
        match (by_name, matching) {
            (Some(one), Some(other)) => Some(if one.0 < other.0 { one.1 } else { other.1 }),
            (one, other) => one.or(other).map(|(_, entry)| entry),
        }
    }
}

#[cfg(test)]
#[path = "topics_tests.rs"]
mod tests;
