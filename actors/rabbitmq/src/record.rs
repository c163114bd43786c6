// SPDX-License-Identifier: MIT OR Apache-2.0
//! A value with AMQP properties, by NestJS's names.

use martlet_core::{Headers, Record};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A value with headers and properties: to send, or to answer with. NestJS's `RmqRecord`.
///
/// Properties travel in it as headers whose names begin with [`PROPERTY_PREFIX`], so that they can also be given
/// where there are only headers: `client.send("sum", data).header("amqp.priority", "3")`.
pub type RmqRecord<T> = Record<T>;

/// What the names of headers begin with that set a property instead: `amqp.priority`, `amqp.expiration`. After it
/// stands the name of an [`RmqRecordOptions`] field, as in configuration; `amqp.headers.name` is a header whose value
/// is JSON. Any other name after it refuses the message.
pub const PROPERTY_PREFIX: &str = "amqp.";

/// The properties of one message, by NestJS's names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct RmqRecordOptions {
    /// Headers; they win over the client's option `headers`. Texts, and any other JSON value that AMQP has a type for.
    pub headers: Map<String, Value>,
    /// Its priority, in a queue with `maxPriority`.
    pub priority: Option<u8>,
    /// How long it may wait in the queue, in milliseconds.
    pub expiration: Option<u64>,
    /// The body's type, `application/json`. NestJS neither sets nor reads it.
    pub content_type: Option<String>,
    /// The body's encoding, `gzip`. Neither end looks at it.
    pub content_encoding: Option<String>,
    /// An id for the application.
    pub message_id: Option<String>,
    /// Seconds since 1970.
    pub timestamp: Option<u64>,
    /// A type, for the application.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// The sending application.
    pub app_id: Option<String>,
    /// The sending user. The broker ends the session if it is not the one who logged in.
    pub user_id: Option<String>,
    /// Whether it is written to disk; wins over the client's option `persistent`.
    pub persistent: Option<bool>,
    /// Where replies are sent to. Of a request: not to this client, so the call ends by its timeout, as in NestJS.
    pub reply_to: Option<String>,
}

impl RmqRecordOptions {
    /// No properties.
    pub fn new() -> Self {
        Self::default()
    }

    fn into_lines(self) -> Headers {
        let text = |value: Option<String>| value;
        let number = |value: Option<u64>| value.map(|value| value.to_string());
        let properties = [
            ("priority", number(self.priority.map(u64::from))),
            ("expiration", number(self.expiration)),
            ("contentType", text(self.content_type)),
            ("contentEncoding", text(self.content_encoding)),
            ("messageId", text(self.message_id)),
            ("timestamp", number(self.timestamp)),
            ("type", text(self.kind)),
            ("appId", text(self.app_id)),
            ("userId", text(self.user_id)),
            ("persistent", self.persistent.map(|persistent| persistent.to_string())),
            ("replyTo", text(self.reply_to)),
        ];
        let properties = properties
            .into_iter()
            .filter_map(|(name, value)| Some((format!("{PROPERTY_PREFIX}{name}"), value?)));
        let headers = self.headers.into_iter().map(|(name, value)| match value {
            Value::String(text) => (name, text),
            value => (format!("{PROPERTY_PREFIX}headers.{name}"), value.to_string()),
        });
        headers.chain(properties).collect()
    }
}

/// Builds an [`RmqRecord`] as NestJS's class of the same name does.
///
/// # Examples
///
/// ```
/// use martlet_rabbitmq::{RmqRecordBuilder, RmqRecordOptions};
///
/// let mut options = RmqRecordOptions::new();
/// options.headers.insert("x-version".to_owned(), "1.0".into());
/// options.priority = Some(3);
/// let record = RmqRecordBuilder::new([1, 2, 3]).set_options(options).build();
/// assert_eq!(record.headers.get("x-version"), Some("1.0"));
/// assert_eq!(record.headers.get("amqp.priority"), Some("3"));
/// ```
#[derive(Debug, Clone)]
#[must_use = "a record is made by build()"]
pub struct RmqRecordBuilder<T> {
    data: T,
    options: RmqRecordOptions,
}

impl<T> RmqRecordBuilder<T> {
    /// Starts from the value.
    pub fn new(data: T) -> Self {
        Self { data, options: RmqRecordOptions::new() }
    }

    /// Sets a header, replacing one of the same name.
    pub fn set_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.options.headers.insert(name.into(), Value::String(value.into()));
        self
    }

    /// Sets the priority.
    pub fn set_priority(mut self, priority: u8) -> Self {
        self.options.priority = Some(priority);
        self
    }

    /// Sets every property and header.
    pub fn set_options(mut self, options: RmqRecordOptions) -> Self {
        self.options = options;
        self
    }

    /// The record.
    pub fn build(self) -> RmqRecord<T> {
        Record { data: self.data, headers: self.options.into_lines() }
    }
}
