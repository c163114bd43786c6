// SPDX-License-Identifier: MIT OR Apache-2.0
//! NATS's services discovery (its ADR-32): what a service answers to `$SRV.PING`, `INFO` and `STATS`.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use martlet_core::pattern::Route;
use parking_lot::Mutex;
use serde::Serialize;

use crate::options::ServicesDiscovery;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Ping,
    Info,
    Stats,
}

/// A discoverable service; outlives the sessions of its server.
pub(crate) struct Service {
    about: ServicesDiscovery,
    id: String,
    started: String,
    endpoints: Mutex<Vec<Endpoint>>,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("about", &self.about).field("id", &self.id).finish_non_exhaustive()
    }
}

struct Endpoint {
    route: Route,
    queue: String,
    live: bool,
    requests: u64,
    errors: u64,
    last_error: String,
    time: Duration,
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    name: &'a str,
    id: &'a str,
    version: &'a str,
    metadata: Empty,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    started: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoints: Option<Vec<EndpointAnswer<'a>>>,
}

#[derive(Serialize)]
struct EndpointAnswer<'a> {
    name: String,
    subject: &'a str,
    queue_group: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Empty>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    stats: Option<StatsAnswer<'a>>,
}

#[derive(Serialize)]
struct StatsAnswer<'a> {
    num_requests: u64,
    num_errors: u64,
    last_error: &'a str,
    processing_time: u64,
    average_processing_time: u64,
}

#[derive(Serialize)]
struct Empty {}

impl Service {
    pub(crate) fn new(about: ServicesDiscovery, id: String) -> Self {
        let started = rfc3339(SystemTime::now());
        Self { about, id, started, endpoints: Mutex::default() }
    }

    pub(crate) fn about(&self) -> &ServicesDiscovery {
        &self.about
    }

    /// Checks name and version by the ADR's rules.
    pub(crate) fn check(about: &ServicesDiscovery) -> Result<(), String> {
        let name_ok = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if about.name.is_empty() || !about.name.chars().all(name_ok) {
            return Err(format!(
                "servicesDiscovery.name {:?} must be of letters, digits, `_` and `-`",
                about.name
            ));
        }
        let core = about.version.split(['-', '+']).next().unwrap_or_default();
        let numbers: Vec<_> = core.split('.').collect();
        let number_ok = |n: &&str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
        if numbers.len() != 3 || !numbers.iter().all(number_ok) {
            return Err(format!(
                "servicesDiscovery.version {:?} must be a semantic version such as 1.0.0",
                about.version
            ));
        }
        Ok(())
    }

    /// The subjects to listen on.
    pub(crate) fn subjects(&self) -> Vec<(Verb, String)> {
        let verbs = [(Verb::Ping, "PING"), (Verb::Info, "INFO"), (Verb::Stats, "STATS")];
        let (name, id) = (&self.about.name, &self.id);
        let of = |(verb, word): (Verb, &str)| {
            [format!("$SRV.{word}"), format!("$SRV.{word}.{name}"), format!("$SRV.{word}.{name}.{id}")]
                .map(|subject| (verb, subject))
        };
        verbs.into_iter().flat_map(of).collect()
    }

    /// The number of a route's endpoint.
    pub(crate) fn endpoint(&self, route: &Route, queue: Option<&str>) -> u32 {
        let mut endpoints = self.endpoints.lock();
        let queue = queue.unwrap_or_default();
        if let Some(index) = endpoints.iter().position(|endpoint| endpoint.route == *route) {
            endpoints[index].live = true;
            endpoints[index].queue = queue.to_owned();
            return index as u32;
        }
        endpoints.push(Endpoint {
            route: route.clone(),
            queue: queue.to_owned(),
            live: true,
            requests: 0,
            errors: 0,
            last_error: String::new(),
            time: Duration::ZERO,
        });
        (endpoints.len() - 1) as u32
    }

    pub(crate) fn remove(&self, route: &Route) {
        let mut endpoints = self.endpoints.lock();
        if let Some(endpoint) = endpoints.iter_mut().find(|endpoint| endpoint.route == *route) {
            endpoint.live = false;
        }
    }

    /// Counts a request that has ended.
    pub(crate) fn ended(&self, endpoint: u32, took: Duration, error: Option<&[u8]>) {
        let mut endpoints = self.endpoints.lock();
        let Some(endpoint) = endpoints.get_mut(endpoint as usize) else { return };
        endpoint.requests += 1;
        endpoint.time += took;
        if let Some(error) = error {
            endpoint.errors += 1;
            let error = error.get(..256).unwrap_or(error);
            endpoint.last_error = String::from_utf8_lossy(error).into_owned();
        }
    }

    /// The answer to a question.
    pub(crate) fn answer(&self, verb: Verb) -> Bytes {
        let endpoints = self.endpoints.lock();
        let live = || endpoints.iter().filter(|endpoint| endpoint.live);
        let one = |endpoint: &'_ Endpoint| EndpointAnswerParts {
            name: endpoint_name(&endpoint.route),
            stats: (endpoint.requests, endpoint.errors, nanos(endpoint.time)),
        };
        let list = live()
            .map(|endpoint| {
                let EndpointAnswerParts { name, stats: (requests, errors, time) } = one(endpoint);
                EndpointAnswer {
                    name,
                    subject: endpoint.route.as_str(),
                    queue_group: &endpoint.queue,
                    metadata: (verb == Verb::Info).then_some(Empty {}),
                    stats: (verb == Verb::Stats).then(|| StatsAnswer {
                        num_requests: requests,
                        num_errors: errors,
                        last_error: &endpoint.last_error,
                        processing_time: time,
                        average_processing_time: time.checked_div(requests).unwrap_or(0),
                    }),
                }
            })
            .collect();
        let answer = Answer {
            kind: match verb {
                Verb::Ping => "io.nats.micro.v1.ping_response",
                Verb::Info => "io.nats.micro.v1.info_response",
                Verb::Stats => "io.nats.micro.v1.stats_response",
            },
            name: &self.about.name,
            id: &self.id,
            version: &self.about.version,
            metadata: Empty {},
            description: (verb == Verb::Info).then_some(self.about.description.as_str()),
            started: (verb == Verb::Stats).then_some(self.started.as_str()),
            endpoints: (verb != Verb::Ping).then_some(list),
        };
        // Strings and numbers always serialise.
        serde_json::to_vec(&answer).unwrap_or_default().into()
    }
}

struct EndpointAnswerParts {
    name: String,
    stats: (u64, u64, u64),
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// An endpoint's name may have letters, digits, `_` and `-` only; the subject tells the route.
fn endpoint_name(route: &Route) -> String {
    let mut name = String::new();
    for c in route.chars() {
        if c.is_ascii_alphanumeric() || c == '_' || c == '-' {
            name.push(c);
        } else if !name.is_empty() && !name.ends_with('_') {
            name.push('_');
        }
    }
    let name = name.trim_end_matches('_');
    if name.is_empty() { "any".to_owned() } else { name.to_owned() }
}

/// A time as RFC 3339 text in UTC, to the second.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to a date, counting years from March so that the leap day comes last.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn endpoint_names_are_made_of_allowed_characters() {
        let name = |route: &str| endpoint_name(&Route::from(route.to_owned()));
        assert_eq!(name(r#"{"cmd":"sum"}"#), "cmd_sum");
        assert_eq!(name("time.us.*"), "time_us");
        assert_eq!(name(">"), "any");
    }
}
