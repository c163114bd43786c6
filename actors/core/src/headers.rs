// SPDX-License-Identifier: MIT OR Apache-2.0
//! Message headers: for transporters whose protocol has them (NATS now).

use std::sync::Arc;

/// An ordered list of header lines. Names keep their case; a name may repeat. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers {
    lines: Option<Arc<Vec<(String, String)>>>,
}

impl Headers {
    /// No headers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a line.
    pub fn append(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let lines = self.lines.get_or_insert_with(Arc::default);
        Arc::make_mut(lines).push((name.into(), value.into()));
    }

    /// Replaces every line of a name by one.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let name = name.into();
        if let Some(lines) = &mut self.lines {
            Arc::make_mut(lines).retain(|(have, _)| *have != name);
        }
        self.append(name, value);
    }

    /// The first value of a name; case matters.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(have, _)| *have == name).map(|(_, value)| value)
    }

    /// Every value of a name, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.iter().filter(move |(have, _)| *have == name).map(|(_, value)| value)
    }

    /// Whether a name is present.
    pub fn contains(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Every line, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().flat_map(|lines| lines.iter().map(|(name, value)| (name.as_str(), value.as_str())))
    }

    /// How many lines there are.
    pub fn len(&self) -> usize {
        self.lines.as_ref().map_or(0, |lines| lines.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(lines: I) -> Self {
        let mut headers = Self::new();
        for (name, value) in lines {
            headers.append(name, value);
        }
        headers
    }
}
