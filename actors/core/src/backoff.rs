// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pause before a retry: grows from `min` to `max`, with jitter. Pure: no clock, no sleep.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How pauses between attempts grow.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct BackoffOptions {
    /// The first pause; in data, in milliseconds. Default 50 ms.
    #[serde(with = "crate::options::millis")]
    pub min: Duration,
    /// No pause is longer, jitter aside; in data, in milliseconds. Default 5 s.
    #[serde(with = "crate::options::millis")]
    pub max: Duration,
    /// Each pause is the previous one times this. Default 2.0; values below 1 count as 1.
    pub factor: f64,
    /// A pause is changed at random by up to this share of itself, both ways. Default 0.2; from 0 to 1.
    pub jitter: f64,
}

impl Default for BackoffOptions {
    fn default() -> Self {
        Self { min: Duration::from_millis(50), max: Duration::from_secs(5), factor: 2.0, jitter: 0.2 }
    }
}

impl BackoffOptions {
    /// The same pause every time, as NestJS's `retryDelay`.
    pub fn fixed(delay: Duration) -> Self {
        Self { min: delay, max: delay, factor: 1.0, jitter: 0.0 }
    }

    /// Pauses from `min` to `max`.
    pub fn between(min: Duration, max: Duration) -> Self {
        Self { min, max, ..Self::default() }
    }
}

/// A running sequence of pauses.
#[derive(Debug, Clone)]
pub struct Backoff {
    options: BackoffOptions,
    next: Duration,
}

impl Backoff {
    /// Starts at `min`.
    pub fn new(options: BackoffOptions) -> Self {
        Self { options, next: options.min }
    }

    /// The next pause; `random` is a number from 0 to 1 that decides the jitter.
    pub fn pause(&mut self, random: f64) -> Duration {
        let base = self.next.min(self.options.max);
        let grown = self.next.as_secs_f64() * self.options.factor.max(1.0);
        self.next = Duration::try_from_secs_f64(grown).unwrap_or(self.options.max).min(self.options.max);
        let jitter = self.options.jitter.clamp(0.0, 1.0) * (random.clamp(0.0, 1.0) * 2.0 - 1.0);
        Duration::try_from_secs_f64(base.as_secs_f64() * (1.0 + jitter)).unwrap_or(base)
    }

    /// The next pause, with jitter from the thread's random numbers.
    pub fn next_pause(&mut self) -> Duration {
        self.pause(rand::random::<f64>())
    }

    /// The pause that would come next, before jitter: a session that outlives it has proved itself.
    pub fn current(&self) -> Duration {
        self.next
    }

    /// Begins again at `min`.
    pub fn reset(&mut self) {
        self.next = self.options.min;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_maximum_and_reset() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(BackoffOptions::between(ms(10), ms(35)));
        let middle: Vec<_> = (0..4).map(|_| backoff.pause(0.5)).collect();
        assert_eq!(middle, [ms(10), ms(20), ms(35), ms(35)]);
        backoff.reset();
        assert_eq!(backoff.pause(0.5), ms(10));
    }

    #[test]
    fn jitter_stays_inside_its_share() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(BackoffOptions { jitter: 0.5, ..BackoffOptions::fixed(ms(100)) });
        assert_eq!(backoff.pause(0.0), ms(50));
        assert_eq!(backoff.pause(1.0), ms(150));
    }
}
