// SPDX-License-Identifier: MIT OR Apache-2.0
//! MQTT 5, by the driver's codec.

use bytes::{Bytes, BytesMut};
use rumqttc_v5::mqttbytes::v5::{
    Connect, ConnectAuth, ConnectProperties, ConnectReturnCode, DisconnectReasonCode, LastWill,
    LastWillProperties, Packet, PubAckReason, PubRecReason, RetainForwardRule, Subscribe, SubscribeFilter,
    SubscribeProperties, SubscribeReasonCode, Unsubscribe,
};
use rumqttc_v5::mqttbytes::{Error, QoS};

use super::{
    Ack, ConnAck, ConnectRefusal, Filter, Goodbye, Incoming, Login, Publish, ReadError, Refusal, qos_of,
};
use crate::options::{Common, MqttQos};

/// How many unacknowledged messages a broker may send, unless the options say otherwise.
const RECEIVE_MAXIMUM: u16 = 1024;

fn qos(qos: MqttQos) -> QoS {
    match qos {
        MqttQos::AtMostOnce => QoS::AtMostOnce,
        MqttQos::AtLeastOnce => QoS::AtLeastOnce,
        MqttQos::ExactlyOnce => QoS::ExactlyOnce,
    }
}

pub(super) fn read(input: &mut BytesMut, max_bytes: usize) -> Result<Incoming, ReadError> {
    let limit = u32::try_from(max_bytes).unwrap_or(u32::MAX);
    let refused = refused(input);
    let packet = match Packet::read(input, Some(limit)) {
        Ok(packet) => packet,
        Err(Error::InsufficientBytes(more)) => return Err(ReadError::Incomplete(more)),
        Err(Error::PayloadSizeLimitExceeded { .. }) => return Err(ReadError::TooLarge),
        // The packet has been cut off.
        Err(other) => return refused.ok_or_else(|| ReadError::Malformed(other.to_string())),
    };
    let because = |reason: &dyn std::fmt::Debug, said: Option<String>| {
        Some(Refusal::Because(match said {
            Some(said) => format!("{}: {said}", words(reason)),
            None => words(reason),
        }))
    };
    Ok(match packet {
        Packet::Publish(publish) => Incoming::Publish(Publish {
            topic: publish.topic,
            payload: publish.payload,
            id: publish.pkid,
            qos: qos_of(publish.qos as u8),
            retain: publish.retain,
            dup: publish.dup,
            properties: publish.properties.map(Box::new),
        }),
        Packet::ConnAck(ack) => {
            let mut connack = ConnAck {
                session_present: ack.session_present,
                refusal: refusal(ack.code),
                ..ConnAck::default()
            };
            if let Some(properties) = ack.properties {
                connack.receive_maximum = properties.receive_max;
                connack.max_packet_size = properties.max_packet_size;
                connack.max_qos = properties.max_qos;
                connack.no_retain = properties.retain_available == Some(0);
                connack.no_subscription_ids = properties.subscription_identifiers_available == Some(0);
                connack.keepalive = properties.server_keep_alive;
                connack.client_id = properties.assigned_client_identifier;
            }
            Incoming::ConnAck(connack)
        }
        Packet::PubAck(ack) => Incoming::PubAck(Ack {
            id: ack.pkid,
            refusal: match ack.reason {
                PubAckReason::Success => None,
                PubAckReason::NoMatchingSubscribers => Some(Refusal::NoSubscribers),
                other => because(&other, ack.properties.and_then(|properties| properties.reason_string)),
            },
        }),
        Packet::PubRec(ack) => Incoming::PubRec(Ack {
            id: ack.pkid,
            refusal: match ack.reason {
                PubRecReason::Success => None,
                PubRecReason::NoMatchingSubscribers => Some(Refusal::NoSubscribers),
                other => because(&other, ack.properties.and_then(|properties| properties.reason_string)),
            },
        }),
        Packet::PubRel(ack) => Incoming::PubRel(ack.pkid),
        Packet::PubComp(ack) => Incoming::PubComp(ack.pkid),
        Packet::SubAck(ack) => Incoming::SubAck(Ack {
            id: ack.pkid,
            refusal: match ack.return_codes.first() {
                None | Some(SubscribeReasonCode::Success(_)) => None,
                Some(other) => because(other, ack.properties.and_then(|properties| properties.reason_string)),
            },
        }),
        Packet::UnsubAck(ack) => Incoming::UnsubAck(ack.pkid),
        Packet::PingResp => Incoming::Pong,
        Packet::Disconnect(disconnect) => {
            let said = disconnect.properties.and_then(|properties| properties.reason_string);
            let reason = words(&disconnect.reason_code);
            Incoming::Disconnect(Goodbye {
                reason: said.map_or(reason.clone(), |said| format!("{reason}: {said}")),
                over_us: is_over_us(disconnect.reason_code),
            })
        }
        other => {
            return Err(ReadError::Malformed(format!("a broker does not send {:?}", other.packet_type())));
        }
    })
}

/// Whether a broker may end the connection for this reason over a message.
fn is_over_us(reason: DisconnectReasonCode) -> bool {
    use DisconnectReasonCode as Code;
    !matches!(
        reason,
        Code::NormalDisconnection
            | Code::ServerBusy
            | Code::ServerShuttingDown
            | Code::KeepAliveTimeout
            | Code::SessionTakenOver
            | Code::AdministrativeAction
            | Code::UseAnotherServer
            | Code::ServerMoved
            | Code::ConnectionRateExceeded
            | Code::MaximumConnectTime
    )
}

/// A refusal, read by hand for reasons that the driver does not know. (mosquitto answers a message beyond its
/// `message_size_limit` with 0x95, which the protocol does not have there.)
fn refused(input: &[u8]) -> Option<Incoming> {
    let (head, body) = super::frame(input)?;
    let incoming = match head >> 4 {
        4 => Incoming::PubAck,
        5 => Incoming::PubRec,
        _ => return None,
    };
    let &[high, low, reason @ 0x80..=0xff, ..] = input.get(body)? else { return None };
    let said = match reason {
        0x95 => "packet too large (0x95)".to_owned(),
        other => format!("reason code {other:#x}"),
    };
    Some(incoming(Ack { id: u16::from_be_bytes([high, low]), refusal: Some(Refusal::Because(said)) }))
}

/// A reason's name in words: `NotAuthorized` as `not authorized`.
fn words(reason: &dyn std::fmt::Debug) -> String {
    let mut text = String::new();
    for (index, c) in format!("{reason:?}").chars().enumerate() {
        if c.is_ascii_uppercase() && index > 0 {
            text.push(' ');
        }
        text.push(c.to_ascii_lowercase());
    }
    text
}

fn refusal(code: ConnectReturnCode) -> Option<ConnectRefusal> {
    use ConnectReturnCode as Code;
    Some(match code {
        Code::Success => return None,
        Code::RefusedProtocolVersion | Code::UnsupportedProtocolVersion => ConnectRefusal::Version,
        Code::BadClientId | Code::ClientIdentifierNotValid => ConnectRefusal::ClientId,
        Code::BadUserNamePassword => ConnectRefusal::Credentials,
        Code::NotAuthorized => ConnectRefusal::NotAuthorized,
        Code::ServiceUnavailable
        | Code::ServerUnavailable
        | Code::ServerBusy
        | Code::ConnectionRateExceeded => ConnectRefusal::Unavailable,
        Code::RetainNotSupported
        | Code::QoSNotSupported
        | Code::TopicNameInvalid
        | Code::PayloadFormatInvalid => ConnectRefusal::Will,
        Code::Banned => ConnectRefusal::Other("the client is banned"),
        Code::BadAuthenticationMethod => ConnectRefusal::Other("bad authentication method"),
        Code::PacketTooLarge => ConnectRefusal::Other("the connect packet is too large"),
        Code::QuotaExceeded => ConnectRefusal::Other("quota exceeded"),
        Code::UseAnotherServer | Code::ServerMoved => ConnectRefusal::Other("use another server"),
        Code::MalformedPacket => ConnectRefusal::Other("malformed packet"),
        Code::ProtocolError => ConnectRefusal::Other("protocol error"),
        Code::ImplementationSpecificError => ConnectRefusal::Other("implementation specific error"),
        Code::UnspecifiedError => ConnectRefusal::Other("unspecified error"),
    })
}

fn lines(headers: &martlet_core::Headers) -> Vec<(String, String)> {
    headers.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

pub(super) fn connect(options: &Common, login: &Login<'_>, out: &mut BytesMut) -> Result<(), String> {
    let given = &options.properties;
    // MQTT-16: without `clean` the session is kept for ever, as with MQTT 3.1.1, unless the options say for how long.
    let expiry = given.session_expiry_interval.or((!options.clean).then_some(u32::MAX));
    let properties = ConnectProperties {
        session_expiry_interval: expiry,
        receive_maximum: Some(given.receive_maximum.unwrap_or(RECEIVE_MAXIMUM).max(1)),
        max_packet_size: Some(u32::try_from(options.max_packet_bytes.max(1)).unwrap_or(u32::MAX)),
        user_properties: lines(&given.user_properties),
        ..ConnectProperties::new()
    };
    let auth = match (login.username.map(str::to_owned), login.password) {
        (None, None) => ConnectAuth::None,
        (Some(username), None) => ConnectAuth::Username { username },
        (None, Some(password)) => {
            ConnectAuth::Password { password: Bytes::copy_from_slice(password.as_bytes()) }
        }
        (Some(username), Some(password)) => {
            ConnectAuth::UsernamePassword { username, password: Bytes::copy_from_slice(password.as_bytes()) }
        }
    };
    let will = options.will.as_ref().map(|will| {
        let properties = will.properties.to_driver();
        LastWill {
            topic: Bytes::copy_from_slice(will.topic.as_bytes()),
            message: Bytes::copy_from_slice(will.payload.as_bytes()),
            qos: qos(will.qos),
            retain: will.retain,
            properties: Some(LastWillProperties {
                delay_interval: will.will_delay_interval,
                payload_format_indicator: properties.payload_format_indicator,
                message_expiry_interval: properties.message_expiry_interval,
                content_type: properties.content_type,
                response_topic: properties.response_topic,
                correlation_data: properties.correlation_data,
                user_properties: properties.user_properties,
            }),
        }
    });
    let connect = Connect {
        keep_alive: options.keepalive,
        client_id: login.client_id.to_owned(),
        clean_start: options.clean,
        properties: Some(properties),
    };
    connect.write(&will, &auth, out).map(drop).map_err(|error| error.to_string())
}

pub(super) fn subscribe(id: u16, filter: &Filter<'_>, out: &mut BytesMut) -> Result<(), String> {
    let mut driver = SubscribeFilter::new(filter.filter, qos(filter.options.qos));
    driver.nolocal = filter.options.nl;
    driver.preserve_retain = filter.options.rap;
    driver.retain_forward_rule = match filter.options.rh {
        0 => RetainForwardRule::OnEverySubscribe,
        1 => RetainForwardRule::OnNewSubscribe,
        _ => RetainForwardRule::Never,
    };
    let properties = filter
        .identifier
        .map(|identifier| SubscribeProperties { id: Some(identifier), user_properties: Vec::new() });
    Subscribe { pkid: id, filters: vec![driver], properties }
        .write(out)
        .map(drop)
        .map_err(|error| error.to_string())
}

pub(super) fn unsubscribe(id: u16, filters: Vec<String>, out: &mut BytesMut) -> Result<(), String> {
    Unsubscribe { pkid: id, filters, properties: None }
        .write(out)
        .map(drop)
        .map_err(|error| error.to_string())
}
