// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options from configuration, by NestJS's names.

use std::time::Duration;

use martlet_core::FailurePolicy;
use martlet_rabbitmq::{
    RmqClientOptions, RmqDial, RmqExchangeType, RmqQueueOptions, RmqServerOptions, RmqSocketOptions,
    RmqTlsOptions,
};
use serde_json::json;

#[test]
fn options_have_nestjs_names() {
    let options: RmqServerOptions = serde_json::from_value(json!({
        "urls": ["amqp://a", {"hostname": "b", "port": 99, "username": "u", "password": "p", "vhost": "v"}],
        "queue": "q", "prefetchCount": 5, "isGlobalPrefetchCount": true, "noAck": false, "consumerTag": "c",
        "queueOptions": {
            "durable": false, "exclusive": true, "autoDelete": true, "messageTtl": 1000, "expires": 2000,
            "deadLetterExchange": "dlx", "deadLetterRoutingKey": "dlk", "maxLength": 10, "maxPriority": 4,
            "arguments": {"x-queue-type": "classic"}, "noAssert": false,
        },
        "socketOptions": {"heartbeatIntervalInSeconds": 60, "reconnectTimeInSeconds": 5},
        "noAssert": true, "wildcards": true, "cancellation": true, "exchange": "e", "exchangeType": "headers",
        "exchangeArguments": {"k": "v"}, "routingKey": "rk", "maxConnectionAttempts": 3,
        "onFailure": {"retry": {"attempts": 2, "then": "deadLetter"}}, "maxInFlight": 7, "tls": {"caFile": "ca.pem"},
    }))
    .unwrap();
    assert_eq!(options.urls, ["amqp://a", "amqp://u:p@b:99/v"]);
    assert_eq!((options.prefetch_count, options.no_ack, options.max_connection_attempts), (5, false, 3));
    assert_eq!(options.queue_options.message_ttl, Some(Duration::from_secs(1)));
    assert_eq!(options.queue_options.dead_letter_exchange.as_deref(), Some("dlx"));
    assert_eq!(options.exchange_type, RmqExchangeType::Headers);
    assert_eq!(options.socket_options.heartbeat_interval, Duration::from_secs(60));
    assert!(options.cancellation);
    assert!(matches!(options.on_failure, Some(FailurePolicy::Retry(policy)) if policy.attempts == 2));
    let options: RmqClientOptions = serde_json::from_value(json!({
        "urls": "amqp://a, amqp://b", "queue": "q", "headers": {"x": "1"}, "replyQueue": "r", "persistent": true,
        "callTimeout": null, "noAck": false,
    }))
    .unwrap();
    assert_eq!(options.urls, ["amqp://a", "amqp://b"]);
    assert_eq!(options.headers.get("x"), Some("1"));
    assert_eq!((options.reply_queue.as_str(), options.persistent), ("r", true));
    assert_eq!(options.call_timeout, None);
}

#[test]
fn the_defaults_are_nestjs_own() {
    let options: RmqServerOptions = serde_json::from_value(json!({})).unwrap();
    assert_eq!((options.urls, options.queue.as_str()), (vec!["amqp://localhost".to_owned()], ""));
    assert_eq!((options.prefetch_count, options.is_global_prefetch_count), (0, false));
    assert!(options.no_ack && !options.no_assert && !options.wildcards && !options.cancellation);
    assert_eq!(options.queue_options, RmqQueueOptions::new());
    assert!(options.queue_options.durable && !options.queue_options.exclusive);
    assert_eq!(options.exchange_type, RmqExchangeType::Topic);
    assert_eq!((options.consumer_tag.as_str(), options.max_connection_attempts), ("", -1));
    assert_eq!(options.socket_options.heartbeat_interval, Duration::from_secs(5));
    let options = RmqClientOptions::new();
    assert_eq!((options.reply_queue.as_str(), options.persistent), ("amq.rabbitmq.reply-to", false));
}

#[test]
fn every_option_is_listed_and_unknown_ones_are_refused() {
    for key in
        ["urls", "queueOptions", "wildcards", "onFailure", "receiveBufferBytes", "maxConnectionAttempts"]
    {
        assert!(RmqServerOptions::OPTION_KEYS.contains(&key), "{key}");
    }
    assert!(RmqClientOptions::OPTION_KEYS.contains(&"replyQueue"));
    assert!(!RmqClientOptions::OPTION_KEYS.contains(&"consumerTag"));
    assert!(!RmqClientOptions::OPTION_KEYS.contains(&"client"));
    for (bad, key) in [
        (json!({"quue": "x"}), "quue"),
        (json!({"queueOptions": {"ttl": 1}}), "ttl"),
        (json!({"socketOptions": {"reconnect": 1}}), "reconnect"),
        (json!({"socketOptions": {"reconnectTimeInSeconds": -1}}), "negative"),
        (json!({"tls": {"ca": "x"}}), "ca"),
    ] {
        let error = serde_json::from_value::<RmqServerOptions>(bad).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn the_names_of_nested_options_are_theirs() {
    fn check<T: serde::de::DeserializeOwned>(keys: &[&str]) {
        let unknown = serde_json::from_value::<T>(json!({"nobody": 1})).err().unwrap().to_string();
        for key in keys {
            assert!(unknown.contains(&format!("`{key}`")), "{key}: {unknown}");
        }
    }
    check::<RmqQueueOptions>(RmqQueueOptions::OPTION_KEYS);
    check::<RmqSocketOptions>(RmqSocketOptions::OPTION_KEYS);
    check::<RmqTlsOptions>(RmqTlsOptions::OPTION_KEYS);
}

#[test]
fn secrets_stay_out_of_debug_output_and_urls() {
    let options =
        RmqServerOptions::new().urls(["amqp://me:secret@host:1/v"]).queue("a queue").wildcards(true);
    let shown = format!("{options:?}");
    assert!(shown.contains("amqp://host:1/v") && !shown.contains("secret"), "{shown}");
    assert_eq!(RmqDial::server(&options).url(), "amqp://host:1/v?queue=a%20queue&wildcards=true");
    let options = RmqClientOptions::new().urls(["amqp://me:secret@host"]);
    assert_eq!(RmqDial::client(&options).url(), "amqp://host");
    assert!(!format!("{options:?}").contains("secret"));
}
