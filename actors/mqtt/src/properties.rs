// SPDX-License-Identifier: MIT OR Apache-2.0
//! The MQTT 5 properties of a message, apart from the driver's types.

use bytes::Bytes;
use martlet_core::Headers;
use martlet_core::options::header_lines;
use rumqttc_v5::PublishProperties;
use serde::{Deserialize, Deserializer};

/// The MQTT 5 properties of a message, with NestJS's names (mqtt.js's `properties`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[non_exhaustive]
pub struct MqttProperties {
    /// Whether the payload is text (UTF-8).
    pub payload_format_indicator: Option<bool>,
    /// For how many seconds the message is worth delivering.
    pub message_expiry_interval: Option<u32>,
    /// Where replies are wanted. NestJS's replies do not follow it.
    pub response_topic: Option<String>,
    /// What ties a reply to a request. NestJS's replies do not carry it.
    #[serde(deserialize_with = "text_bytes")]
    pub correlation_data: Option<Bytes>,
    /// What the payload is.
    pub content_type: Option<String>,
    /// User properties, in order.
    #[serde(deserialize_with = "header_lines")]
    pub user_properties: Headers,
}

fn text_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Bytes>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(Bytes::from))
}

impl MqttProperties {
    /// No properties.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether the payload is text.
    #[must_use]
    pub fn payload_format_indicator(mut self, text: bool) -> Self {
        self.payload_format_indicator = Some(text);
        self
    }

    /// Sets for how many seconds the message is worth delivering.
    #[must_use]
    pub fn message_expiry_interval(mut self, seconds: u32) -> Self {
        self.message_expiry_interval = Some(seconds);
        self
    }

    /// Sets where replies are wanted.
    #[must_use]
    pub fn response_topic(mut self, topic: impl Into<String>) -> Self {
        self.response_topic = Some(topic.into());
        self
    }

    /// Sets what ties a reply to a request.
    #[must_use]
    pub fn correlation_data(mut self, data: impl Into<Bytes>) -> Self {
        self.correlation_data = Some(data.into());
        self
    }

    /// Sets what the payload is.
    #[must_use]
    pub fn content_type(mut self, content_type: impl Into<String>) -> Self {
        self.content_type = Some(content_type.into());
        self
    }

    /// Adds a user property.
    #[must_use]
    pub fn user_property(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.user_properties.append(name, value);
        self
    }

    pub(crate) fn from_driver(properties: &PublishProperties) -> Self {
        Self {
            payload_format_indicator: properties.payload_format_indicator.map(|indicator| indicator == 1),
            message_expiry_interval: properties.message_expiry_interval,
            response_topic: properties.response_topic.clone(),
            correlation_data: properties.correlation_data.clone(),
            content_type: properties.content_type.clone(),
            user_properties: properties.user_properties.iter().cloned().collect(),
        }
    }

    pub(crate) fn to_driver(&self) -> PublishProperties {
        PublishProperties {
            payload_format_indicator: self.payload_format_indicator.map(u8::from),
            message_expiry_interval: self.message_expiry_interval,
            response_topic: self.response_topic.clone(),
            correlation_data: self.correlation_data.clone(),
            content_type: self.content_type.clone(),
            user_properties: self
                .user_properties
                .iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            ..PublishProperties::default()
        }
    }
}
