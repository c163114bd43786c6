// SPDX-License-Identifier: MIT OR Apache-2.0
//! URLs of transports.

use martlet::{ConfigError, Transport, TransportKind};
#[cfg(any(feature = "tcp", feature = "nats"))]
use serde_json::{Value, json};

#[cfg(any(feature = "tcp", feature = "nats"))]
fn check(url: &str, kind: TransportKind, options: Value) {
    let transport = Transport::from_url(url).unwrap();
    assert_eq!(transport.kind(), kind, "{url}");
    assert_eq!(Value::Object(transport.options().clone()), options, "{url}");
}

/// The text of the error that a URL gives.
fn refused(url: &str) -> String {
    match Transport::from_url(url) {
        Err(error @ ConfigError::Url { .. }) => error.to_string(),
        other => panic!("{url}: {other:?}"),
    }
}

#[cfg(feature = "tcp")]
#[test]
fn a_tcp_url_is_a_host_a_port_and_options_by_their_nest_names() {
    let check = |url, options| check(url, TransportKind::Tcp, options);
    check("tcp://127.0.0.1:3000", json!({"host": "127.0.0.1", "port": 3000}));
    check("tcp://[::1]:0", json!({"host": "::1", "port": 0}));
    check("tcp://example.com", json!({"host": "example.com"}));
    check("tcp://:4000/", json!({"port": 4000}));
    check("tcp://", json!({}));
    check(
        "TCP://a?maxBufferSize=1000&retryAttempts=5",
        json!({
            "host": "a", "maxBufferSize": "1000", "retryAttempts": "5"
        }),
    );
    check("tcp://a?tlsOptions.ca=%2Fca%20x.pem", json!({"host": "a", "tlsOptions": {"ca": "/ca x.pem"}}));
    check(
        "tcps://a?ca=ca.pem&servername=b",
        json!({
            "host": "a", "tlsOptions": {"ca": "ca.pem", "servername": "b"}
        }),
    );
    check("tcps://a", json!({"host": "a", "tlsOptions": {}}));
}

#[cfg(feature = "nats")]
#[test]
fn a_nats_url_is_a_list_of_brokers_credentials_and_options() {
    let check = |url, options| check(url, TransportKind::Nats, options);
    check("nats://a", json!({"servers": ["nats://a"]}));
    check("nats://", json!({}));
    check(
        "nats://us%3Aer:p%40ss@a:4222,[::1]:4223?queue=workers",
        json!({
            "servers": ["nats://a:4222", "nats://[::1]:4223"], "user": "us:er", "pass": "p@ss", "queue": "workers"
        }),
    );
    check("nats://secret@a", json!({"servers": ["nats://a"], "token": "secret"}));
    check("tls://a:4222?caFile=ca.pem", json!({"servers": ["tls://a:4222"], "tls": {"caFile": "ca.pem"}}));

    let options =
        Transport::from_url("nats://u:1234@a,b?queue=w&pingInterval=500&gracefulShutdown&headers.x=1")
            .unwrap();
    let error = options.nats_server_options().unwrap_err().to_string();
    assert_eq!(error, "option headers is for nats clients, not for nats servers");
    let options = Transport::from_url("nats://u:1234@a,b?queue=w&pingInterval=500&gracefulShutdown").unwrap();
    let options = options.nats_server_options().unwrap();
    assert_eq!(options.servers, ["nats://a", "nats://b"]);
    assert_eq!((options.user.as_deref(), options.pass.as_deref()), (Some("u"), Some("1234")));
    assert_eq!(options.queue.as_deref(), Some("w"));
    assert_eq!(options.ping_interval, std::time::Duration::from_millis(500));
    assert!(options.graceful_shutdown);
}

#[cfg(feature = "tcp")]
#[test]
fn a_url_that_cannot_be_read_says_why() {
    for (url, reason) in [
        ("tcp://a,b", "tcp has one host"),
        ("tcp://me@a", "tcp has no users"),
        ("tcp://a:70000", "port \"70000\" is not a number from 0 to 65535"),
        ("tcp://::1", "an IPv6 address needs brackets: [::1]:3000"),
        ("tcp://a/path", "it has a path, which transports do not have"),
        ("tcp://a?port=1", "port is given twice: before and after the ?"),
        (
            "tcp://a?x=%zz",
            "\"%zz\" has a % that is not followed by two hexadecimal digits (write %25 for it)",
        ),
    ] {
        assert_eq!(refused(url), format!("bad url {url:?}: {reason}").replace("me@", ""));
    }
}

#[test]
fn an_unknown_scheme_names_the_nearest() {
    assert_eq!(
        refused("tpc://a"),
        "bad url \"tpc://a\": unknown scheme tpc: did you mean tcp? (schemes are: tcp, tcps, nats, tls)"
    );
    assert_eq!(
        refused("amqp://a"),
        "bad url \"amqp://a\": unknown scheme amqp (schemes are: tcp, tcps, nats, tls)"
    );
    refused("localhost:3000");
}

#[test]
fn secrets_stay_out_of_messages() {
    let error = refused("natz://user:hunter2@a?pass=hunter2&token=hunter2&x=1");
    assert!(!error.contains("hunter2") && error.contains("x=1"), "{error}");
}

#[cfg(feature = "nats")]
#[test]
fn secrets_stay_out_of_debug_and_display() {
    let transport = Transport::from_url("nats://user:hunter2@a:1,b?nkey=hunter2").unwrap();
    assert_eq!(transport.to_string(), "nats://a:1,b");
    assert!(!format!("{transport:?}").contains("hunter2"), "{transport:?}");
}

#[test]
fn a_transport_that_is_not_in_this_build_names_its_feature() {
    for (kind, url) in [(TransportKind::Tcp, "tcp://a"), (TransportKind::Nats, "nats://a")] {
        match Transport::from_url(url) {
            Ok(transport) => assert!(kind.is_enabled() && transport.kind() == kind),
            Err(error) => {
                assert!(!kind.is_enabled(), "{error}");
                let feature = format!("enable the cargo feature `{}` of martlet", kind.name());
                assert!(error.to_string().contains(&feature), "{error}");
            }
        }
    }
}
