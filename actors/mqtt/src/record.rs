// SPDX-License-Identifier: MIT OR Apache-2.0
//! A value with MQTT publish options, by NestJS's names.
//!
//! A record's headers are user properties. The other publish options travel inside the process as headers whose
//! names begin with a colon, which no user property of ours may.

use bytes::Bytes;
use martlet_core::{Headers, Record};
use rumqttc_v5::PublishProperties;

use crate::options::MqttQos;
use crate::properties::MqttProperties;

/// A value with publish options: to send, or to answer with. NestJS's `MqttRecord`.
pub type MqttRecord<T> = Record<T>;

const QOS: &str = ":qos";
const RETAIN: &str = ":retain";
const DUP: &str = ":dup";
const FORMAT: &str = ":payloadFormatIndicator";
const EXPIRY: &str = ":messageExpiryInterval";
const RESPONSE_TOPIC: &str = ":responseTopic";
const CORRELATION: &str = ":correlationData";
const CONTENT_TYPE: &str = ":contentType";

/// Builds an [`MqttRecord`] as NestJS's class of the same name does.
///
/// # Examples
///
/// ```
/// use martlet_mqtt::{MqttProperties, MqttQos, MqttRecordBuilder};
///
/// let record = MqttRecordBuilder::new([1, 2, 3])
///     .set_qos(MqttQos::AtLeastOnce)
///     .set_retain(true)
///     .set_properties(MqttProperties::new().user_property("x-version", "1.0"))
///     .build();
/// assert_eq!(record.headers.get("x-version"), Some("1.0"));
/// ```
#[derive(Debug, Clone)]
#[must_use = "a record is made by build()"]
pub struct MqttRecordBuilder<T> {
    record: Record<T>,
}

impl<T> MqttRecordBuilder<T> {
    /// Starts from the value.
    pub fn new(data: T) -> Self {
        Self { record: Record::new(data) }
    }

    /// Sets the quality of service. Default 0.
    pub fn set_qos(mut self, qos: MqttQos) -> Self {
        self.record.headers.insert(QOS, qos.as_u8().to_string());
        self
    }

    /// Sets whether the broker keeps the message for later subscribers. Default false.
    pub fn set_retain(self, retain: bool) -> Self {
        self.flag(RETAIN, retain)
    }

    /// Sets the duplicate flag. It is ignored at quality of service 0, where the protocol forbids it. Default
    /// false.
    pub fn set_dup(self, dup: bool) -> Self {
        self.flag(DUP, dup)
    }

    fn flag(mut self, name: &str, on: bool) -> Self {
        self.record.headers.insert(name, if on { "1" } else { "0" });
        self
    }

    /// Replaces the MQTT 5 properties. They are not sent with MQTT 3.1.1.
    pub fn set_properties(mut self, properties: MqttProperties) -> Self {
        let kept = self.record.headers.iter().filter(|(name, _)| matches!(*name, QOS | RETAIN | DUP));
        let mut headers: Headers = kept.collect();
        let mut set = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                headers.append(name, value);
            }
        };
        set(FORMAT, properties.payload_format_indicator.map(|text| u8::from(text).to_string()));
        set(EXPIRY, properties.message_expiry_interval.map(|seconds| seconds.to_string()));
        set(RESPONSE_TOPIC, properties.response_topic);
        set(CORRELATION, properties.correlation_data.map(|data| hex(&data)));
        set(CONTENT_TYPE, properties.content_type);
        for (name, value) in properties.user_properties.iter() {
            headers.append(name, value);
        }
        self.record.headers = headers;
        self
    }

    /// The record.
    pub fn build(self) -> MqttRecord<T> {
        self.record
    }
}

/// How one message is published.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct PublishOptions {
    pub(crate) qos: MqttQos,
    pub(crate) retain: bool,
    pub(crate) dup: bool,
    pub(crate) properties: Option<Box<PublishProperties>>,
}

impl PublishOptions {
    /// Reads a record's headers. With MQTT 5 (`v5`), the properties are those of the record, and the user
    /// properties of the options that it does not have (MQTT-11).
    pub(crate) fn read(own: &Headers, fixed: &Headers, v5: bool) -> Result<Self, String> {
        let mut options = Self::default();
        if own.is_empty() && (!v5 || fixed.is_empty()) {
            return Ok(options);
        }
        let mut properties = PublishProperties::default();
        for (name, value) in own.iter() {
            let bad = |_| format!("record option {name}: bad value {value:?}");
            match name {
                QOS => {
                    let number: u8 = value.parse().map_err(bad)?;
                    options.qos = MqttQos::try_from(number)?;
                }
                RETAIN => options.retain = value == "1",
                DUP => options.dup = value == "1",
                FORMAT => properties.payload_format_indicator = Some(value.parse().map_err(bad)?),
                EXPIRY => properties.message_expiry_interval = Some(value.parse().map_err(bad)?),
                RESPONSE_TOPIC => properties.response_topic = Some(value.to_owned()),
                CORRELATION => properties.correlation_data = Some(unhex(value)),
                CONTENT_TYPE => properties.content_type = Some(value.to_owned()),
                _ => properties.user_properties.push((name.to_owned(), value.to_owned())),
            }
        }
        if v5 && !fixed.is_empty() {
            properties.user_properties = merged(std::mem::take(&mut properties.user_properties), fixed);
        }
        if v5 && properties != PublishProperties::default() {
            options.properties = Some(Box::new(properties));
        }
        Ok(options)
    }
}

/// User properties in the order in which NestJS merges them: those of the options, with the record's values where it
/// has the same name, then the record's others.
fn merged(mut own: Vec<(String, String)>, fixed: &Headers) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String)> = Vec::with_capacity(own.len() + fixed.len());
    let mut taken: Vec<&str> = Vec::new();
    for (name, value) in fixed.iter() {
        if taken.contains(&name) {
            continue;
        }
        if own.iter().any(|(have, _)| have == name) {
            lines.extend(own.extract_if(.., |(have, _)| have == name));
            taken.push(name);
        } else {
            lines.push((name.to_owned(), value.to_owned()));
        }
    }
    lines.extend(own);
    lines
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn unhex(text: &str) -> Bytes {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_as_it_was_built() {
        let properties = MqttProperties::new()
            .content_type("json")
            .correlation_data(vec![0, 255, 16])
            .response_topic("r")
            .message_expiry_interval(7)
            .payload_format_indicator(true)
            .user_property("n", "1")
            .user_property("n", "2");
        let record = MqttRecordBuilder::new(1)
            .set_properties(MqttProperties::new().user_property("gone", "1"))
            .set_qos(MqttQos::ExactlyOnce)
            .set_retain(true)
            .set_dup(true)
            .set_properties(properties.clone())
            .build();
        let read = PublishOptions::read(&record.headers, &Headers::new(), true).unwrap();
        assert_eq!((read.qos, read.retain, read.dup), (MqttQos::ExactlyOnce, true, true));
        assert_eq!(MqttProperties::from_driver(&read.properties.unwrap()), properties);
        // MQTT-11: nothing of it with 3.1.1.
        let read = PublishOptions::read(&record.headers, &Headers::new(), false).unwrap();
        assert_eq!((read.qos, read.properties), (MqttQos::ExactlyOnce, None));
    }

    #[test]
    fn a_records_user_properties_win() {
        let own = Record::new(0).header("n", "1").header("x-over", "req").header("n", "2").headers;
        let fixed: Headers = [("x-version", "1"), ("x-over", "opt")].into_iter().collect();
        let read = PublishOptions::read(&own, &fixed, true).unwrap();
        let lines = read.properties.unwrap().user_properties;
        let lines: Vec<_> = lines.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(lines, [("x-version", "1"), ("x-over", "req"), ("n", "1"), ("n", "2")]);
    }
}
