// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where cancellations go (MQTT-24), and which of their topics a session listens on. Pure.

use std::collections::{HashMap, HashSet};

use martlet_core::pattern::Route;

use crate::topics::own_pattern;

/// What the topics of cancellations begin with. No topic of NestJS does.
pub(crate) const PREFIX: &str = "_MARTLET/cancel/";

/// The longest topic.
const MAX_BYTES: usize = 65_535;

pub(crate) fn is_cancellation(topic: &str) -> bool {
    topic.starts_with(PREFIX)
}

/// The filter that covers the cancellations of all requests to a pattern; `None` if it would be too long. There is no
/// group in it: every member must hear what one of them is to stop.
fn filter_of(route: &Route) -> Option<String> {
    let own = own_pattern(route.as_str());
    (PREFIX.len() + own.len() <= MAX_BYTES).then(|| format!("{PREFIX}{own}"))
}

/// The patterns whose requests can be cancelled. Those of several groups share a filter.
#[derive(Debug, Default)]
pub(crate) struct Cancellations {
    routes: HashSet<Route>,
    filters: HashMap<String, usize>,
}

impl Cancellations {
    /// Adds a pattern; the filter to subscribe, if that is new.
    pub(crate) fn add(&mut self, route: &Route) -> Option<String> {
        let filter = filter_of(route)?;
        if !self.routes.insert(route.clone()) {
            return None;
        }
        let patterns = self.filters.entry(filter.clone()).or_insert(0);
        *patterns += 1;
        (*patterns == 1).then_some(filter)
    }

    /// Takes a pattern out; the filter to unsubscribe, if no other pattern needs it.
    pub(crate) fn remove(&mut self, route: &Route) -> Option<String> {
        if !self.routes.remove(route) {
            return None;
        }
        let filter = filter_of(route)?;
        let patterns = self.filters.get_mut(&filter)?;
        *patterns -= 1;
        if *patterns > 0 {
            return None;
        }
        self.filters.remove(&filter);
        Some(filter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(text: &str) -> Route {
        Route::from(text.to_owned())
    }

    /// MQTT-24.
    #[test]
    fn patterns_of_several_groups_share_the_topic_of_their_cancellations() {
        let mut cancellations = Cancellations::default();
        let topic = Some("_MARTLET/cancel/a/+".to_owned());
        let (plain, one, two) = (route("a/+"), route("$share/one/a/+"), route("$share/two/a/+"));
        assert_eq!(cancellations.add(&one), topic);
        assert_eq!(cancellations.add(&two), None);
        assert_eq!(cancellations.add(&plain), None);
        assert_eq!(cancellations.add(&plain), None);
        assert_eq!(cancellations.remove(&one), None);
        assert_eq!(cancellations.remove(&plain), None);
        assert_eq!(cancellations.remove(&plain), None);
        assert_eq!(cancellations.remove(&two), topic);
        assert_eq!(cancellations.add(&two), topic);
    }

    #[test]
    fn a_topic_that_is_too_long_for_it_has_no_cancellations() {
        let mut cancellations = Cancellations::default();
        let longest = route(&"x".repeat(MAX_BYTES - PREFIX.len()));
        assert!(cancellations.add(&longest).is_some());
        let longer = route(&"x".repeat(MAX_BYTES - PREFIX.len() + 1));
        assert_eq!((cancellations.add(&longer), cancellations.remove(&longer)), (None, None));
    }

    #[test]
    fn a_cancellation_is_known_by_its_topic() {
        assert!(is_cancellation("_MARTLET/cancel/a"));
        assert!(!is_cancellation("_MARTLET/other") && !is_cancellation("a/_MARTLET/cancel/a"));
    }
}
