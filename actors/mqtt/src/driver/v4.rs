// SPDX-License-Identifier: MIT OR Apache-2.0
//! MQTT 3.1.1, by the driver's codec.

use bytes::{Bytes, BytesMut};
use rumqttc_v4::mqttbytes::v4::{
    Connect, ConnectAuth, ConnectReturnCode, LastWill, Packet, Subscribe, SubscribeFilter,
    SubscribeReasonCode, Unsubscribe,
};
use rumqttc_v4::mqttbytes::{Error, QoS};

use super::{Ack, ConnAck, ConnectRefusal, Filter, Incoming, Login, Publish, ReadError, Refusal, qos_of};
use crate::options::{Common, MqttQos};

fn qos(qos: MqttQos) -> QoS {
    match qos {
        MqttQos::AtMostOnce => QoS::AtMostOnce,
        MqttQos::AtLeastOnce => QoS::AtLeastOnce,
        MqttQos::ExactlyOnce => QoS::ExactlyOnce,
    }
}

pub(super) fn read(input: &mut BytesMut, max_bytes: usize) -> Result<Incoming, ReadError> {
    let packet = Packet::read(input, max_bytes).map_err(|error| match error {
        Error::InsufficientBytes(more) => ReadError::Incomplete(more),
        Error::PayloadSizeLimitExceeded { .. } => ReadError::TooLarge,
        other => ReadError::Malformed(other.to_string()),
    })?;
    let plain = |id| Ack { id, refusal: None };
    Ok(match packet {
        Packet::Publish(publish) => Incoming::Publish(Publish {
            topic: publish.topic,
            payload: publish.payload,
            id: publish.pkid,
            qos: qos_of(publish.qos as u8),
            retain: publish.retain,
            dup: publish.dup,
            properties: None,
        }),
        Packet::ConnAck(ack) => Incoming::ConnAck(ConnAck {
            session_present: ack.session_present,
            refusal: match ack.code {
                ConnectReturnCode::Success => None,
                ConnectReturnCode::RefusedProtocolVersion => Some(ConnectRefusal::Version),
                ConnectReturnCode::BadClientId => Some(ConnectRefusal::ClientId),
                ConnectReturnCode::ServiceUnavailable => Some(ConnectRefusal::Unavailable),
                ConnectReturnCode::BadUserNamePassword => Some(ConnectRefusal::Credentials),
                ConnectReturnCode::NotAuthorized => Some(ConnectRefusal::NotAuthorized),
            },
            ..ConnAck::default()
        }),
        Packet::PubAck(ack) => Incoming::PubAck(plain(ack.pkid)),
        Packet::PubRec(ack) => Incoming::PubRec(plain(ack.pkid)),
        Packet::PubRel(ack) => Incoming::PubRel(ack.pkid),
        Packet::PubComp(ack) => Incoming::PubComp(ack.pkid),
        Packet::SubAck(ack) => Incoming::SubAck(Ack {
            id: ack.pkid,
            refusal: ack.return_codes.first().and_then(|code| match code {
                SubscribeReasonCode::Success(_) => None,
                SubscribeReasonCode::Failure => {
                    Some(Refusal::Because("it does not say why (MQTT 3.1.1 has no reasons)".to_owned()))
                }
            }),
        }),
        Packet::UnsubAck(ack) => Incoming::UnsubAck(ack.pkid),
        Packet::PingResp => Incoming::Pong,
        other => {
            return Err(ReadError::Malformed(format!("a broker does not send {:?}", other.packet_type())));
        }
    })
}

pub(super) fn connect(options: &Common, login: &Login<'_>, out: &mut BytesMut) -> Result<(), String> {
    let mut connect = Connect::new(login.client_id);
    connect.keep_alive = options.keepalive;
    connect.clean_session = options.clean;
    connect.auth = match (login.username, login.password) {
        (None, None) => ConnectAuth::None,
        (Some(username), None) => ConnectAuth::Username { username: username.to_owned() },
        (Some(username), Some(password)) => ConnectAuth::UsernamePassword {
            username: username.to_owned(),
            password: Bytes::copy_from_slice(password.as_bytes()),
        },
        (None, Some(_)) => return Err("option password needs option username with MQTT 3.1.1".to_owned()),
    };
    connect.last_will = options.will.as_ref().map(|will| LastWill {
        topic: will.topic.clone(),
        message: Bytes::copy_from_slice(will.payload.as_bytes()),
        qos: qos(will.qos),
        retain: will.retain,
    });
    connect.write(out).map(drop).map_err(|error| error.to_string())
}

pub(super) fn subscribe(id: u16, filter: &Filter<'_>, out: &mut BytesMut) -> Result<(), String> {
    let filters = vec![SubscribeFilter::new(filter.filter.to_owned(), qos(filter.options.qos))];
    Subscribe { pkid: id, filters }.write(out).map(drop).map_err(|error| error.to_string())
}

pub(super) fn unsubscribe(id: u16, filters: Vec<String>, out: &mut BytesMut) -> Result<(), String> {
    Unsubscribe { pkid: id, topics: filters }.write(out).map(drop).map_err(|error| error.to_string())
}
