// SPDX-License-Identifier: MIT OR Apache-2.0
//! What becomes of a message whose handler failed, as a value: the same for every transporter that
//! acknowledges.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use crate::backoff::BackoffOptions;

/// What becomes of a message whose handler failed: it answered an error, panicked, or was dropped. A message
/// whose handler succeeded is acknowledged.
///
/// For a whole server it is an option, [`ServerOptions::on_failure`](crate::ServerOptions::on_failure), for one handler
/// [`HandlerGroup::on_failure`](crate::HandlerGroup::on_failure), which wins. Without one, the transporter does
/// what NestJS does. A policy that a transporter cannot honour is refused at start.
///
/// In data: `"requeue"`, `"deadLetter"`, `"discard"`, or `{"retry": {"attempts": 3, "then": "deadLetter"}}`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FailurePolicy {
    /// Back to the broker, which delivers it again, to whomever: at once and without end, if it fails every time.
    /// A request is not: its caller has been answered, so it is settled as done.
    Requeue,
    /// To the queue's dead-letter exchange; dropped by the broker if there is none.
    DeadLetter,
    /// Acknowledged, and so gone.
    Discard,
    /// Once more in this process, after a pause, some times; the message stays unacknowledged meanwhile and
    /// keeps its in-flight credit. Of a request, only the last attempt is answered.
    Retry(RetryPolicy),
}

/// Whether a transporter acknowledges, and what it can make of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settles {
    /// It acknowledges nothing; with the reason, as a clause: "tcp has no acknowledgement".
    Never(&'static str),
    /// The runtime reports how each delivery ended. Acknowledging (done, discarded) is always possible.
    Results {
        /// Whether it can give a message back for another delivery.
        requeue: bool,
        /// Whether it can send a message to a dead-letter exchange.
        dead_letter: bool,
    },
}

impl Settles {
    /// Whether deliveries must be settled.
    pub fn is_needed(self) -> bool {
        matches!(self, Self::Results { .. })
    }

    /// Why a policy cannot be honoured, if it cannot.
    pub(crate) fn refuses(self, policy: &FailurePolicy) -> Option<String> {
        let cannot = |what: &str| Some(format!("a failed message cannot be {what} here"));
        match self {
            Self::Never(why) => Some(why.to_owned()),
            Self::Results { requeue: false, .. } if policy.last_resort() == LastResort::Requeue => {
                cannot("requeued")
            }
            Self::Results { dead_letter: false, .. } if policy.last_resort() == LastResort::DeadLetter => {
                cannot("dead-lettered")
            }
            Self::Results { .. } => None,
        }
    }
}

/// How often a failed message is tried again, and what becomes of it after that.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct RetryPolicy {
    /// Attempts after the first one. Default 3. Counted in this process: a message that the broker delivers anew
    /// begins anew.
    pub attempts: u32,
    /// The pause before each further attempt; in data, a number of milliseconds or `{"min", "max", "factor",
    /// "jitter"}`. Default: from 50 ms to 5 s.
    #[serde(deserialize_with = "pause")]
    pub delay: BackoffOptions,
    /// What becomes of it when all have failed. Default: dead-lettered.
    pub then: LastResort,
}

fn pause<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BackoffOptions, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Pause {
        Fixed(u64),
        Grows(BackoffOptions),
    }
    Ok(match Pause::deserialize(deserializer)? {
        Pause::Fixed(millis) => BackoffOptions::fixed(Duration::from_millis(millis)),
        Pause::Grows(options) => options,
    })
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { attempts: 3, delay: BackoffOptions::default(), then: LastResort::DeadLetter }
    }
}

/// What becomes of a message that failed for the last time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LastResort {
    /// As [`FailurePolicy::Requeue`].
    Requeue,
    /// As [`FailurePolicy::DeadLetter`].
    DeadLetter,
    /// As [`FailurePolicy::Discard`].
    Discard,
}

impl FailurePolicy {
    /// So many further attempts, then the dead-letter exchange.
    pub fn retry(attempts: u32) -> Self {
        Self::Retry(RetryPolicy { attempts, ..RetryPolicy::default() })
    }

    /// The same, with another end. Changes nothing unless this is a retry.
    #[must_use]
    pub fn then(mut self, last: LastResort) -> Self {
        if let Self::Retry(retry) = &mut self {
            retry.then = last;
        }
        self
    }

    /// The same, with a fixed pause between attempts. Changes nothing unless this is a retry.
    #[must_use]
    pub fn every(mut self, pause: Duration) -> Self {
        if let Self::Retry(retry) = &mut self {
            retry.delay = BackoffOptions::fixed(pause);
        }
        self
    }

    /// What becomes of a message in the end.
    pub fn last_resort(&self) -> LastResort {
        match self {
            Self::Requeue => LastResort::Requeue,
            Self::DeadLetter => LastResort::DeadLetter,
            Self::Discard => LastResort::Discard,
            Self::Retry(retry) => retry.then,
        }
    }
}
