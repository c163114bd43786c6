// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a handler may know of the MQTT message it serves.

use bytes::Bytes;
use rumqttc_v5::PublishProperties;

use crate::options::MqttQos;
use crate::properties::MqttProperties;

/// The context of a message that came by MQTT, extracted with `Ctx<MqttContext>`: NestJS's `getTopic()` and
/// `getPacket()`.
#[derive(Debug, Clone)]
pub struct MqttContext {
    pub(crate) topic: Bytes,
    pub(crate) qos: MqttQos,
    pub(crate) retain: bool,
    pub(crate) dup: bool,
    pub(crate) packet_id: Option<u16>,
    pub(crate) properties: Option<Box<PublishProperties>>,
}

impl MqttContext {
    /// The topic it was published to: the concrete one, where the handler's pattern has wildcards.
    pub fn topic(&self) -> &str {
        // It was checked when it was read.
        std::str::from_utf8(&self.topic).unwrap_or_default()
    }

    /// The quality of service it was delivered with.
    pub fn qos(&self) -> MqttQos {
        self.qos
    }

    /// Whether it is a retained message, sent because the subscription is new (or, with `rap`, was published as
    /// one).
    pub fn retain(&self) -> bool {
        self.retain
    }

    /// Whether the broker may have sent it before.
    pub fn dup(&self) -> bool {
        self.dup
    }

    /// Its packet id; `None` at quality of service 0.
    pub fn packet_id(&self) -> Option<u16> {
        self.packet_id
    }

    /// Its MQTT 5 properties; none with MQTT 3.1.1.
    pub fn properties(&self) -> MqttProperties {
        self.properties.as_deref().map(MqttProperties::from_driver).unwrap_or_default()
    }

    /// The first user property of a name.
    pub fn user_property(&self, name: &str) -> Option<&str> {
        let properties = self.properties.as_deref()?;
        properties.user_properties.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}
