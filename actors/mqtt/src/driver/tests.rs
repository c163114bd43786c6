// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use rumqttc_v4::mqttbytes::v4;
use rumqttc_v5::mqttbytes::v5 as driver5;

use super::*;
use crate::options::{MqttServerOptions, MqttWill};
use crate::properties::MqttProperties;

/// What is written is read back by the driver's codec, which is somebody else's.
#[test]
fn messages_are_written_as_the_driver_reads_them() {
    let properties = MqttProperties::new().content_type("json").user_property("a", "b");
    for qos in [MqttQos::AtMostOnce, MqttQos::AtLeastOnce, MqttQos::ExactlyOnce] {
        for payload in [0, 1, 130, 20_000] {
            let payload = vec![b'x'; payload];
            let options = PublishOptions {
                qos,
                retain: payload.len() == 1,
                dup: true,
                properties: Some(Box::new(properties.to_driver())),
            };
            for version in [Version::V4, Version::V5] {
                let mut out = BytesMut::new();
                version.publish([b"a/b", b"/reply"], &payload, 7, &options, &mut out).unwrap();
                let Incoming::Publish(read) = version.read(&mut out, 100_000).unwrap() else { panic!() };
                assert!(out.is_empty());
                assert_eq!((&read.topic[..], &read.payload[..]), (&b"a/b/reply"[..], &payload[..]));
                let acked = qos != MqttQos::AtMostOnce;
                assert_eq!((read.qos, read.retain, read.dup), (qos, options.retain, acked));
                assert_eq!(read.id, if acked { 7 } else { 0 });
                assert_eq!(read.properties.is_some(), version.is_v5());
            }
        }
    }
}

#[test]
fn a_message_that_mqtt_cannot_carry_is_refused() {
    let mut out = BytesMut::new();
    let options = PublishOptions::default();
    let topic = vec![b'a'; 65_535];
    assert!(Version::V4.publish([&topic, b"/reply"], b"", 0, &options, &mut out).is_err());
}

/// MQTT-15: the bytes of acknowledgements, with MQTT 5's reason only where there is something to tell.
#[test]
fn acknowledgements_are_four_bytes() {
    let bytes = |version: Version, kind, failed| {
        let mut out = BytesMut::new();
        version.ack(kind, 0x0102, failed, &mut out);
        out.to_vec()
    };
    assert_eq!(bytes(Version::V4, AckKind::Taken, true), [0x40, 2, 1, 2]);
    assert_eq!(bytes(Version::V5, AckKind::Taken, false), [0x40, 2, 1, 2]);
    assert_eq!(bytes(Version::V5, AckKind::Taken, true), [0x40, 3, 1, 2, 0x80]);
    assert_eq!(bytes(Version::V4, AckKind::Received, false), [0x50, 2, 1, 2]);
    assert_eq!(bytes(Version::V4, AckKind::Release, false), [0x62, 2, 1, 2]);
    assert_eq!(bytes(Version::V5, AckKind::Complete, false), [0x70, 2, 1, 2]);
    for (version, kind) in [(Version::V4, AckKind::Taken), (Version::V5, AckKind::Taken)] {
        let mut read = BytesMut::from(&bytes(version, kind, version.is_v5())[..]);
        let Incoming::PubAck(ack) = version.read(&mut read, 100).unwrap() else { panic!() };
        assert_eq!((ack.id, ack.refusal.is_some()), (0x0102, version.is_v5()));
    }
}

fn written(
    options: &MqttServerOptions,
    write: impl FnOnce(Version, &Common, &Login<'_>, &mut BytesMut),
) -> BytesMut {
    let version = if options.protocol_version == 5 { Version::V5 } else { Version::V4 };
    let login = Login { client_id: "me", username: Some("user"), password: Some("pw") };
    let mut out = BytesMut::new();
    write(version, &options.common(), &login, &mut out);
    out
}

/// MQTT-16, and the defaults of NestJS: keepalive 60, clean session, no will.
#[test]
fn the_connect_packet_says_what_the_options_say() {
    let connect = |options: &MqttServerOptions| {
        written(options, |version, common, login, out| version.connect(common, login, out).unwrap())
    };
    let plain = MqttServerOptions::new();
    let v4::Packet::Connect(packet) = v4::Packet::read(&mut connect(&plain), 1000).unwrap() else { panic!() };
    assert_eq!((packet.keep_alive, packet.clean_session, packet.last_will), (60, true, None));
    assert_eq!(packet.client_id, "me");
    assert!(packet.auth.validate("user", b"pw"));
    let properties = MqttProperties::new().content_type("text");
    let will = MqttWill::new("gone", "bye").qos(MqttQos::AtLeastOnce).retain(true).will_delay_interval(3);
    let full = MqttServerOptions::new().protocol_version(5).clean(false).keepalive(7);
    let full = full.will(will.properties(properties)).max_packet_bytes(4096);
    let driver5::Packet::Connect(packet, will, _) = driver5::Packet::read(&mut connect(&full), None).unwrap()
    else {
        panic!()
    };
    let own = packet.properties.unwrap();
    assert_eq!((packet.keep_alive, packet.clean_start), (7, false));
    assert_eq!((own.session_expiry_interval, own.max_packet_size), (Some(u32::MAX), Some(4096)));
    assert_eq!(own.receive_maximum, Some(1024));
    let will = will.unwrap();
    assert_eq!(
        (&will.topic[..], &will.message[..], will.qos as u8, will.retain),
        (&b"gone"[..], &b"bye"[..], 1, true)
    );
    let own = will.properties.unwrap();
    assert_eq!((own.delay_interval, own.content_type.as_deref()), (Some(3), Some("text")));
}

/// MQTT-4.
#[test]
fn a_subscription_has_the_options_of_its_version() {
    let options = MqttSubscribeOptions::qos(MqttQos::AtLeastOnce).nl(true).rap(true).rh(2);
    let filter = Filter { filter: "a/#", options, identifier: Some(9) };
    let mut out = BytesMut::new();
    Version::V4.subscribe(3, &filter, &mut out).unwrap();
    let v4::Packet::Subscribe(packet) = v4::Packet::read(&mut out, 1000).unwrap() else { panic!() };
    assert_eq!((packet.pkid, packet.filters[0].path.as_str(), packet.filters[0].qos as u8), (3, "a/#", 1));
    Version::V5.subscribe(3, &filter, &mut out).unwrap();
    let driver5::Packet::Subscribe(packet) = driver5::Packet::read(&mut out, None).unwrap() else { panic!() };
    let own = &packet.filters[0];
    assert!(own.nolocal && own.preserve_retain);
    assert_eq!(own.retain_forward_rule, driver5::RetainForwardRule::Never);
    assert_eq!(packet.properties.unwrap().id, Some(9));
}

#[test]
fn a_frame_is_found_without_reading_it() {
    assert_eq!(frame(&[0x30]), None);
    assert_eq!(frame(&[0x30, 0x80]), None);
    assert_eq!(frame(&[0x30, 5, 1]), Some((0x30, 2..7)));
    assert_eq!(frame(&[0x32, 0x80, 0x01]), Some((0x32, 3..131)));
}

#[test]
fn bytes_that_are_no_packet_are_told_from_those_that_are_not_complete() {
    for version in [Version::V4, Version::V5] {
        let read = |bytes: &[u8]| version.read(&mut BytesMut::from(bytes), 100).map(drop);
        assert!(matches!(read(&[0x30, 5, 0]), Err(ReadError::Incomplete(_))));
        assert!(matches!(read(&[0x30, 0xff, 0x7f]), Err(ReadError::TooLarge)));
        assert!(matches!(read(&[0x00, 0]), Err(ReadError::Malformed(_))));
        assert!(matches!(read(&[0x30, 3, 0xff, 0xff, 1]), Err(ReadError::Malformed(_))));
        // What only clients send.
        assert!(matches!(read(&[0xc0, 0]), Err(ReadError::Malformed(_))));
    }
}

#[test]
fn refusals_that_the_driver_does_not_know_are_refusals() {
    let read = |bytes: &[u8]| {
        let mut input = BytesMut::from(bytes);
        let read = Version::V5.read(&mut input, 100);
        assert_eq!(&input[..], b"next");
        read
    };
    let because = |said: &str| Ack { id: 7, refusal: Some(Refusal::Because(said.to_owned())) };
    for (bytes, said) in [
        (&b"\x40\x03\0\x07\x95next"[..], "packet too large (0x95)"),
        (b"\x40\x04\0\x07\xa0\0next", "reason code 0xa0"),
        (b"\x40\x03\0\x07\x97next", "quota exceeded"),
    ] {
        assert!(matches!(read(bytes), Ok(Incoming::PubAck(ack)) if ack == because(said)), "{said}");
    }
    assert!(matches!(read(b"\x50\x03\0\x07\x95next"), Ok(Incoming::PubRec(ack)) if ack.refusal.is_some()));
    // A success that is none, and another packet.
    assert!(matches!(read(b"\x40\x03\0\x07\x05next"), Err(ReadError::Malformed(_))));
    assert!(matches!(read(b"\x90\x04\0\x07\0\xffnext"), Err(ReadError::Malformed(_))));
}
