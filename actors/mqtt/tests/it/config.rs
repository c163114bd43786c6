// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options from configuration, by the names of NestJS and mqtt.js.

use std::time::Duration;

use martlet_core::settlement::{FailurePolicy, LastResort};
use martlet_mqtt::{MqttClientOptions, MqttDial, MqttQos, MqttServerOptions};
use serde_json::json;

#[test]
fn options_have_nestjs_names() {
    let options: MqttServerOptions = serde_json::from_value(json!({
        "url": "mqtts://u:p@h:1", "clientId": "c", "username": "u", "password": "p", "protocolVersion": 5,
        "keepalive": 7, "clean": false, "reconnectPeriod": 250, "connectTimeout": 5000, "maxConnectionAttempts": 3,
        "tls": {"caFile": "ca.pem", "certFile": "c.pem", "keyFile": "k.pem"},
        "will": {"topic": "gone", "payload": "bye", "qos": 1, "retain": true, "willDelayInterval": 3,
                 "properties": {"contentType": "text", "correlationData": "c", "userProperties": {"a": ["1", "2"]}}},
        "properties": {"sessionExpiryInterval": 60, "receiveMaximum": 10, "userProperties": {"a": "b"}},
        "subscribeOptions": {"qos": 2, "nl": true, "rap": true, "rh": 1}, "sharedGroup": "g", "manualAcks": true,
        "onFailure": {"retry": {"attempts": 2, "then": "discard"}},
        "maxInFlight": 5, "highWaterBytes": 6, "maxPacketBytes": 7, "bufferedBytes": 8, "publishWindow": 9,
        "cancellation": false,
    }))
    .unwrap();
    assert_eq!(options.protocol_version, 5);
    assert_eq!(options.reconnect_period, Duration::from_millis(250));
    assert_eq!(options.subscribe_options.qos, MqttQos::ExactlyOnce);
    assert!(
        options.subscribe_options.nl && options.subscribe_options.rap && options.subscribe_options.rh == 1
    );
    assert_eq!(
        options.on_failure.map(|policy: FailurePolicy| policy.last_resort()),
        Some(LastResort::Discard)
    );
    assert!(!options.cancellation);
    let will = options.will.unwrap();
    assert_eq!(
        (will.topic.as_str(), will.qos, will.will_delay_interval),
        ("gone", MqttQos::AtLeastOnce, Some(3))
    );
    assert_eq!(will.properties.user_properties.get_all("a").collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(options.properties.session_expiry_interval, Some(60));
    assert_eq!(options.shared_group.as_deref(), Some("g"));
    let options: MqttClientOptions = serde_json::from_value(json!({
        "url": "mqtt://a", "userProperties": {"x-version": "1.0", "x-m": ["1", "2"]}, "callTimeout": null,
        "replyIdle": 0,
    }))
    .unwrap();
    assert_eq!(options.user_properties.get_all("x-m").collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!((options.call_timeout, options.reply_idle), (None, Duration::ZERO));
}

#[test]
fn the_defaults_are_those_of_nestjs() {
    let options: MqttServerOptions = serde_json::from_value(json!({})).unwrap();
    assert_eq!(options.url, "mqtt://localhost:1883");
    assert_eq!((options.protocol_version, options.keepalive, options.clean), (4, 60, true));
    assert_eq!(options.reconnect_period, Duration::from_secs(1));
    assert_eq!(options.connect_timeout, Duration::from_secs(30));
    assert_eq!(options.max_connection_attempts, -1);
    assert_eq!(options.subscribe_options.qos, MqttQos::AtMostOnce);
    assert!(options.cancellation);
    assert!(!options.manual_acks && options.shared_group.is_none() && options.will.is_none());
}

#[test]
fn every_option_is_listed_and_unknown_ones_are_refused() {
    for key in ["url", "clientId", "subscribeOptions", "sharedGroup", "manualAcks", "bufferedBytes"] {
        assert!(MqttServerOptions::OPTION_KEYS.contains(&key), "{key}");
    }
    assert!(MqttClientOptions::OPTION_KEYS.contains(&"userProperties"));
    assert!(!MqttClientOptions::OPTION_KEYS.contains(&"sharedGroup"));
    for wrong in [json!({"ur": "x"}), json!({"will": {"topc": "x"}}), json!({"subscribeOptions": {"qos": 3}})]
    {
        assert!(serde_json::from_value::<MqttServerOptions>(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn secrets_stay_out_of_debug_output_and_urls() {
    let options = MqttClientOptions::new().url("mqtt://me:secret@host:1/path").password("secret");
    let shown = format!("{options:?}");
    assert!(shown.contains("mqtt://host:1/path") && !shown.contains("secret"), "{shown}");
    assert_eq!(MqttDial::client(&options).url(), "mqtt://host:1/path");
}
