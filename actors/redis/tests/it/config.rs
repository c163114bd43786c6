// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options from configuration, by NestJS's names.

use std::time::Duration;

use martlet_redis::{RedisClientOptions, RedisDial, RedisServerOptions};
use serde_json::json;

#[test]
fn options_have_nestjs_names() {
    let options: RedisServerOptions = serde_json::from_value(json!({
        "host": "redis.local", "port": 6380, "db": 2, "username": "u", "password": "p",
        "tls": {"caFile": "ca.pem", "certFile": "c.pem", "keyFile": "k.pem"},
        "retryAttempts": 5, "retryDelay": 250, "wildcards": true, "connectionName": "me",
        "connectTimeout": 5000, "pingInterval": 1000, "poolSize": 2, "gracePeriod": 3000,
        "subscriptionCapacity": 10, "subscriptionBytes": 1000, "maxPayloadBytes": 100, "receiverCount": false,
        "cancellation": false, "maxInFlight": 7, "highWaterBytes": 8,
    }))
    .unwrap();
    assert_eq!((options.host.as_str(), options.port, options.db), ("redis.local", 6380, 2));
    assert_eq!(options.retry_attempts, Some(5));
    assert_eq!(options.retry_delay, Duration::from_millis(250));
    assert!(options.wildcards && !options.receiver_count);
    assert_eq!(options.grace_period, Some(Duration::from_secs(3)));
    let options: RedisClientOptions = serde_json::from_value(json!({
        "url": "redis://a", "callTimeout": null, "wildcardReplies": false, "maxReplyChannels": 3,
    }))
    .unwrap();
    assert_eq!(options.call_timeout, None);
    assert_eq!(options.max_reply_channels, 3);
    assert_eq!(options.client.max_pending, 65_536);
}

#[test]
fn the_defaults_are_nestjs_s() {
    let options: RedisServerOptions = serde_json::from_value(json!({})).unwrap();
    assert_eq!((options.host.as_str(), options.port, options.db), ("localhost", 6379, 0));
    assert_eq!((options.retry_attempts, options.retry_delay), (None, Duration::from_secs(5)));
    assert!(!options.wildcards && options.tls.is_none() && options.url.is_none());
}

#[test]
fn every_option_is_listed_and_unknown_ones_are_refused() {
    for key in ["url", "host", "retryAttempts", "wildcards", "subscriptionCapacity"] {
        assert!(RedisServerOptions::OPTION_KEYS.contains(&key), "{key}");
    }
    assert!(RedisClientOptions::OPTION_KEYS.contains(&"wildcardReplies"));
    assert!(!RedisClientOptions::OPTION_KEYS.contains(&"wildcards"));
    assert!(!RedisClientOptions::OPTION_KEYS.contains(&"client"));
    let error = serde_json::from_value::<RedisServerOptions>(json!({"hots": "x"})).unwrap_err();
    assert!(error.to_string().contains("hots"), "{error}");
}

#[test]
fn secrets_stay_out_of_debug_output_and_urls() {
    let options = RedisClientOptions::new().url("redis://me:secret@host:1/3").password("secret");
    let shown =
        format!("{options:?} {:?} {}", RedisDial::client(&options), RedisDial::client(&options).url());
    assert!(shown.contains("redis://host:1/3") && !shown.contains("secret"), "{shown}");
    let wrong = RedisClientOptions::new().url("http://me:secret@host");
    let shown = format!("{wrong:?} {}", RedisDial::client(&wrong).url());
    assert!(shown.contains("http://host") && !shown.contains("secret"), "{shown}");
}

#[test]
fn addresses_are_made_of_the_url_or_of_its_parts() {
    let url = |options: RedisServerOptions| RedisDial::server(&options).url();
    let new = RedisServerOptions::new;
    assert_eq!(url(new()), "redis://localhost:6379");
    assert_eq!(url(new().host("h").port(1).db(2)), "redis://h:1/2");
    assert_eq!(url(new().host("h").tls(martlet_redis::RedisTlsOptions::new())), "rediss://h:6379");
    assert_eq!(url(new().url("redis://h").port(1)), "redis://h:6379");
    assert_eq!(url(new().url("rediss://u:p@h:7/1")), "rediss://h:7/1");
    assert_eq!(url(new().url("redis://[::1]:7")), "redis://[::1]:7");
}
