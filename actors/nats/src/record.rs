// SPDX-License-Identifier: MIT OR Apache-2.0
//! A value with NATS headers, by NestJS's names.

use martlet_core::{Headers, Record};

/// A value with headers: to send, or to answer with. NestJS's `NatsRecord`.
pub type NatsRecord<T> = Record<T>;

/// Builds a [`NatsRecord`] as NestJS's class of the same name does.
///
/// # Examples
///
/// ```
/// use martlet_nats::NatsRecordBuilder;
///
/// let record = NatsRecordBuilder::new([1, 2, 3]).set_header("x-version", "1.0").build();
/// assert_eq!(record.headers.get("x-version"), Some("1.0"));
/// ```
#[derive(Debug, Clone)]
#[must_use = "a record is made by build()"]
pub struct NatsRecordBuilder<T> {
    record: Record<T>,
}

impl<T> NatsRecordBuilder<T> {
    /// Starts from the value.
    pub fn new(data: T) -> Self {
        Self { record: Record::new(data) }
    }

    /// Sets a header, replacing lines of the same name.
    pub fn set_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.record.headers.insert(name, value);
        self
    }

    /// Adds a line to a header.
    pub fn append_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.record.headers.append(name, value);
        self
    }

    /// Replaces every header.
    pub fn set_headers(mut self, headers: Headers) -> Self {
        self.record.headers = headers;
        self
    }

    /// The record.
    pub fn build(self) -> NatsRecord<T> {
        self.record
    }
}
