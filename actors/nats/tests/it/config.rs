// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options from configuration, by NestJS's names.

use std::time::Duration;

use martlet_nats::{NatsClientOptions, NatsServerOptions};
use serde_json::json;

#[test]
fn options_have_nestjs_names() {
    let options: NatsServerOptions = serde_json::from_value(json!({
        "servers": "nats://a:1, nats://b:2", "queue": "workers", "user": "u", "pass": "p",
        "tls": {"caFile": "ca.pem", "certFile": "c.pem", "keyFile": "k.pem"},
        "maxReconnectAttempts": -1, "reconnectTimeWait": 250, "pingInterval": 1000, "timeout": 5000,
        "gracefulShutdown": true, "gracePeriod": 3000, "inboxPrefix": "my.inbox", "maxHeaderBytes": 100,
        "servicesDiscovery": {"name": "n", "version": "1.0.0"},
    }))
    .unwrap();
    assert_eq!(options.servers, ["nats://a:1", "nats://b:2"]);
    assert_eq!(options.queue.as_deref(), Some("workers"));
    assert_eq!(options.reconnect_time_wait, Duration::from_millis(250));
    assert_eq!(options.grace_period, Some(Duration::from_secs(3)));
    assert_eq!(options.max_reconnect_attempts, -1);
    assert_eq!(options.services_discovery.unwrap().version, "1.0.0");
    let options: NatsClientOptions = serde_json::from_value(json!({
        "servers": ["nats://a"], "headers": {"x-version": "1.0", "x-m": ["1", "2"]}, "callTimeout": null,
        "deadlineHeader": true,
    }))
    .unwrap();
    assert_eq!(options.headers.get_all("x-m").collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!((options.call_timeout, options.deadline_header), (None, true));
    assert_eq!(options.client.max_pending, 65_536);
}

#[test]
fn the_defaults_are_those_of_the_driver_of_nestjs() {
    let options: NatsServerOptions = serde_json::from_value(json!({})).unwrap();
    assert_eq!(options.servers, ["nats://localhost:4222"]);
    assert_eq!(options.max_reconnect_attempts, 10);
    assert_eq!(options.reconnect_time_wait, Duration::from_secs(2));
    assert_eq!(options.reconnect_jitter, Duration::from_millis(100));
    assert_eq!(options.ping_interval, Duration::from_secs(120));
    assert_eq!(options.inbox_prefix, "_INBOX");
    assert!(!NatsClientOptions::new().deadline_header);
}

#[test]
fn every_option_is_listed_and_unknown_ones_are_refused() {
    for key in ["servers", "queue", "gracePeriod", "servicesDiscovery", "subscriptionCapacity"] {
        assert!(NatsServerOptions::OPTION_KEYS.contains(&key), "{key}");
    }
    assert!(NatsClientOptions::OPTION_KEYS.contains(&"headers"));
    assert!(!NatsClientOptions::OPTION_KEYS.contains(&"queue"));
    assert!(!NatsClientOptions::OPTION_KEYS.contains(&"client"));
    let error = serde_json::from_value::<NatsServerOptions>(json!({"quue": "x"})).unwrap_err();
    assert!(error.to_string().contains("quue"), "{error}");
}

#[test]
fn secrets_stay_out_of_debug_output() {
    let options =
        NatsClientOptions::new().servers(["nats://me:secret@host:1"]).pass("secret").token("secret");
    let shown = format!("{options:?}");
    assert!(shown.contains("nats://host:1") && !shown.contains("secret"), "{shown}");
}
