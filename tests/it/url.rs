// SPDX-License-Identifier: MIT OR Apache-2.0
//! URLs of transports.

use martlet::{ConfigError, Transport, TransportKind};
#[cfg(any(
    feature = "tcp",
    feature = "nats",
    feature = "redis",
    feature = "rabbitmq",
    feature = "mqtt"
))]
use serde_json::{Value, json};

#[cfg(any(feature = "tcp", feature = "nats", feature = "redis", feature = "rabbitmq", feature = "mqtt"))]
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

#[cfg(feature = "redis")]
#[test]
fn a_redis_url_is_a_host_a_login_and_a_database() {
    let check = |url, options| check(url, TransportKind::Redis, options);
    check("redis://a", json!({"host": "a"}));
    check("redis://", json!({}));
    check("redis://[::1]:7000/", json!({"host": "::1", "port": 7000}));
    check(
        "redis://us%3Aer:p%40ss@a:7000/3?wildcards=true",
        json!({"host": "a", "port": 7000, "username": "us:er", "password": "p@ss", "db": 3, "wildcards": "true"}),
    );
    check("redis://:secret@a", json!({"host": "a", "password": "secret"}));
    check("rediss://a?caFile=ca.pem", json!({"host": "a", "tls": {"caFile": "ca.pem"}}));

    let transport = Transport::from_url("rediss://u:hunter2@a/3?wildcards=true&retryAttempts=2").unwrap();
    assert_eq!(transport.to_string(), "rediss://a:6379/3");
    let options = transport.redis_server_options().unwrap();
    assert_eq!((options.host.as_str(), options.port, options.db), ("a", 6379, 3));
    assert!(options.wildcards && options.tls.is_some());
    let transport =
        Transport::from_json(r#"{"transport":"REDIS","options":{"url":"redis://u:hunter2@b:1/2"}}"#);
    assert_eq!(transport.unwrap().to_string(), "redis://b:1/2");

    assert_eq!(refused("redis://a,b"), "bad url \"redis://a,b\": redis has one host");
    assert_eq!(
        refused("redis://a/x"),
        "bad url \"redis://a/x\": its path /x is not a number, that of a database"
    );
    assert!(refused("redis://a/1?db=2").ends_with(": db is given twice: before and after the ?"));
}

#[cfg(feature = "rabbitmq")]
#[test]
fn an_amqp_url_is_a_list_of_brokers_a_login_and_a_vhost() {
    let check = |url, options| check(url, TransportKind::Rmq, options);
    check("amqp://a?queue=orders", json!({"urls": ["amqp://a"], "queue": "orders"}));
    check("amqp://?queue=orders", json!({"queue": "orders"}));
    check(
        "amqp://us%3Aer:p%40ss@a:5673,[::1]:5674/my%2Fhost?queue=q&wildcards=true",
        json!({
            "urls": ["amqp://us%3Aer:p%40ss@a:5673/my%2Fhost", "amqp://us%3Aer:p%40ss@[::1]:5674/my%2Fhost"],
            "queue": "q", "wildcards": "true",
        }),
    );
    check("amqps://", json!({"urls": ["amqps://localhost"], "tls": {}}));
    check("amqps://a/?caFile=ca.pem", json!({"urls": ["amqps://a"], "tls": {"caFile": "ca.pem"}}));

    let url = "amqp://u:hunter2@a,b:1/v?queue=q&queueOptions.maxLength=10&noAck=false&onFailure.retry.attempts=5\
               &socketOptions.heartbeatIntervalInSeconds=3&exchangeType=fanout";
    let transport = Transport::from_url(url).unwrap();
    assert_eq!(transport.to_string(), "amqp://a,b:1/v");
    let options = transport.rmq_server_options().unwrap();
    assert_eq!(options.urls, ["amqp://u:hunter2@a/v", "amqp://u:hunter2@b:1/v"]);
    assert_eq!((options.queue.as_str(), options.queue_options.max_length), ("q", Some(10)));
    assert_eq!(options.socket_options.heartbeat_interval, std::time::Duration::from_secs(3));
    assert_eq!(options.on_failure, Some(martlet::FailurePolicy::retry(5)));
    assert_eq!(options.exchange_type, martlet::rabbitmq::RmqExchangeType::Fanout);
    let one = Transport::from_url("amqp://a?noAck=false&onFailure=discard").unwrap();
    assert_eq!(one.rmq_server_options().unwrap().on_failure, Some(martlet::FailurePolicy::Discard));

    let refusal = |url: &str| Transport::from_url(url).unwrap().rmq_server_options().unwrap_err().to_string();
    assert_eq!(
        refusal("amqp://a?onFailure.retry.atempts=5").split(" (").next().unwrap(),
        "unknown option onFailure.retry.atempts for rmq servers: did you mean onFailure.retry.attempts?"
    );
    assert!(
        refusal("amqp://a?onFailure=explode")
            .starts_with("option onFailure for rmq servers: unknown variant")
    );
    assert!(refusal("amqp://a?onFailure.discard.x=1").contains("discard has no options of its own"));
    assert!(refused("amqp://a/v/w").contains("write %2F for one in a vhost's name"));
    assert!(refused("amqp://u:p/w@a").contains("it has an @ behind a /"));

    let data = r#"{"transport":"RMQ","options":{"urls":[{"hostname":"h","port":1,"password":"hunter2","vhost":"v/w"}]}}"#;
    assert_eq!(Transport::from_json(data).unwrap().to_string(), "amqp://h:1/v%2Fw");
    let data = r#"{"transport":"RMQ","options":{"urls":"amqp://u:hunter2@h:1?heartbeat=1"}}"#;
    assert_eq!(Transport::from_json(data).unwrap().to_string(), "amqp://h:1");
}

#[cfg(feature = "mqtt")]
#[test]
fn an_mqtt_url_is_a_broker_a_login_and_over_websockets_a_path() {
    let check = |url, options| check(url, TransportKind::Mqtt, options);
    check("mqtt://a", json!({"url": "mqtt://a"}));
    check("mqtt://?protocolVersion=5", json!({"protocolVersion": "5"}));
    check("mqtt://:1884", json!({"url": "mqtt://localhost:1884"}));
    check(
        "mqtt://us%3Aer:p%40ss@[::1]:1884",
        json!({"url": "mqtt://[::1]:1884", "username": "us:er", "password": "p@ss"}),
    );
    check("mqtts://a?caFile=ca.pem", json!({"url": "mqtts://a", "tls": {"caFile": "ca.pem"}}));
    check("ws://a:9001/mqtt/x", json!({"url": "ws://a:9001/mqtt/x"}));
    check("wss://a/mqtt", json!({"url": "wss://a/mqtt", "tls": {}}));

    let transport =
        Transport::from_url("mqtt://u:1234@a?protocolVersion=5&subscribeOptions.qos=1&will.topic=t").unwrap();
    assert_eq!(transport.to_string(), "mqtt://a");
    let options = transport.mqtt_server_options().unwrap();
    assert_eq!((options.url.as_str(), options.protocol_version), ("mqtt://a", 5));
    assert_eq!((options.username.as_deref(), options.password.as_deref()), (Some("u"), Some("1234")));
    assert_eq!(options.subscribe_options.qos, martlet::mqtt::MqttQos::AtLeastOnce);
    let refusal =
        |url: &str| Transport::from_url(url).unwrap().mqtt_server_options().unwrap_err().to_string();
    assert!(refusal("mqtt://a?userProperties.x=1").contains("is for mqtt clients, not for mqtt servers"));
    assert!(refusal("mqtt://a?sharedGrup=x").contains("did you mean sharedGroup?"));
    assert!(
        refusal("mqtt://a?subscribeOptions.qos=3")
            .starts_with("option subscribeOptions.qos for mqtt servers: ")
    );

    assert_eq!(refused("mqtt://a/x"), "bad url \"mqtt://a/x\": it has a path, which mqtt:// does not have");
    assert_eq!(refused("mqtt://a,b"), "bad url \"mqtt://a,b\": mqtt has one host");
}

#[cfg(feature = "tcp")]
#[test]
fn a_url_that_cannot_be_read_says_why() {
    for (url, reason) in [
        ("tcp://a,b", "tcp has one host"),
        ("tcp://me@a", "tcp has no users"),
        ("tcp://a:70000", "port \"70000\" is not a number from 0 to 65535"),
        ("tcp://::1", "an IPv6 address needs brackets: [::1]:3000"),
        ("tcp://a/path", "it has a path, which tcp:// does not have"),
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
    let schemes = "(schemes are: tcp, tcps, redis, rediss, nats, tls, mqtt, mqtts, ws, wss, amqp, amqps)";
    assert_eq!(
        refused("tpc://a"),
        format!("bad url \"tpc://a\": unknown scheme tpc: did you mean tcp? {schemes}")
    );
    assert_eq!(refused("kafka://a"), format!("bad url \"kafka://a\": unknown scheme kafka {schemes}"));
    let error = refused("localhost:3000");
    assert!(error.contains("it does not begin with tcp://, tcps://, redis://, "), "{error}");
    assert!(error.ends_with(" or amqps://"), "{error}");
}

#[test]
fn secrets_stay_out_of_messages() {
    let error = refused("natz://user:hunter2@a?pass=hunter2&password=hunter2&token=hunter2&x=1");
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
    let urls = ["tcp://a", "redis://a", "nats://a", "mqtt://a", "amqp://a"];
    assert_eq!(TransportKind::all().count(), urls.len());
    for (kind, url) in TransportKind::all().zip(urls) {
        match Transport::from_url(url) {
            Ok(transport) => assert!(kind.is_enabled() && transport.kind() == kind),
            Err(error) => {
                assert!(!kind.is_enabled(), "{error}");
                let feature = format!("enable the cargo feature `{}` of martlet", kind.feature());
                assert!(error.to_string().contains(&feature), "{error}");
            }
        }
    }
    assert_eq!(TransportKind::Rmq.feature(), "rabbitmq");
}
