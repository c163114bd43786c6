// SPDX-License-Identifier: MIT OR Apache-2.0
//! URLs and data forms of the brokers' transports, at work over real brokers: services, clients, the tool.

use std::time::{Duration, Instant};

use martlet::prelude::*;
use martlet_testkit::broker::{Broker, BrokerCommand};
use serde_json::{Value, json};

use crate::cli::{Run, Running, Service, free_address, run};

/// What a broker's transport can be asked to show.
struct Wire {
    /// The URL of a service.
    url: String,
    /// The same service in NestJS's form.
    data: Value,
    /// The URL of another service, whose patterns may have wildcards.
    wild: String,
    /// A pattern with a wildcard, and an address that it has.
    wildcard: (&'static str, &'static str),
    /// The exit code of a call that nobody serves, where somebody says so.
    no_handler: Option<i32>,
    /// The URL of a service whose messages have headers, if any do.
    headers: Option<String>,
}

fn sum(url: &str) -> Run {
    run(&["send", url, r#"{"cmd":"sum"}"#, "[1,2,3]"])
}

impl Wire {
    /// Calls, feeds and measures a service, and stands in for one.
    fn check(&self) {
        self.tool_against_a_service();
        self.data_form();
        self.listening();
        self.nobody_there();
    }

    fn tool_against_a_service(&self) {
        let service = Service::on(Transport::from_url(&self.url).unwrap());
        let send = |arguments: &[&str]| run(&[&["send", &self.url], arguments].concat());
        sum(&self.url).printed("6\n");
        send(&["echo", r#"{"b": 2.50, "a": [null]}"#]).printed("{\"b\":2.50,\"a\":[null]}\n");
        send(&["items", "--stream"]).printed("1\n2\n3\n");
        send(&["nothing"]).printed("");
        send(&["object"]).failed(1, &["{\"code\":42}"]);
        send(&["never", "--timeout", "200ms"]).failed(4, &["within 200ms"]);
        send(&["metadata", "-m", "a=1"]).printed("{\"a\":\"1\"}\n");
        let unserved = send(&["nobody", "--timeout", "300ms"]);
        match self.no_handler {
            Some(code) => unserved.failed(code, &["no handler for pattern nobody"]),
            None => unserved.failed(4, &["within 300ms"]),
        }
        for number in 0..20 {
            run(&["emit", &self.url, "noted", &number.to_string()]).printed("");
        }
        service.saw(&(0..20).map(Value::from).collect::<Vec<_>>());
        let bench = run(&[
            "bench",
            &self.url,
            "--duration",
            "300ms",
            "--warmup",
            "50ms",
            "--connections",
            "2",
            "--depth",
            "8",
            "--json",
        ]);
        assert_eq!(bench.code, 0, "{bench:?}");
        let report: Value = serde_json::from_str(&bench.out).unwrap();
        assert!(report["requests"].as_u64().unwrap() > 0, "{report}");
        if self.headers.is_none() {
            send(&["echo", "-H", "a=1"]).failed(2, &["--metadata"]);
        }
    }

    fn data_form(&self) {
        let service = Service::on(Transport::from_value(self.data.clone()).unwrap());
        let clients = Clients::from_json(&json!({ "sums": self.data }).to_string()).unwrap();
        actix::System::new().block_on(async {
            let client = clients.get("sums").unwrap();
            let sum: i64 = client.send(pattern!({ "cmd": "sum" }), [4, 5]).await.unwrap();
            assert_eq!(sum, 9);
            client.emit("noted", "by data").await.unwrap();
            service.saw(&[json!("by data")]);
            client.close().await;
        });
    }

    fn listening(&self) {
        let (wildcard, address) = self.wildcard;
        // The same URL is a server's and a client's.
        let (mut listening, _) = Running::listen_on(&self.wild, &[wildcard, "--echo", "--count", "2"]);
        run(&["send", &self.wild, address, "[1]"]).printed("[1]\n");
        let seen = listening.json();
        assert_eq!((&seen["kind"], &seen["pattern"]), (&json!("request"), &json!(address)));
        run(&["emit", &self.wild, address, "2"]).printed("");
        let seen = listening.json();
        assert_eq!(
            (&seen["kind"], &seen["pattern"], &seen["data"]),
            (&json!("event"), &json!(address), &json!(2))
        );
        assert_eq!(listening.end().code, 0);

        let Some(url) = &self.headers else { return };
        let (mut listening, _) = Running::listen_on(url, &["x", "--reply", "1", "--count", "1"]);
        run(&["send", url, "x", "-H", "tenant=acme", "-H", "other=1"]).printed("1\n");
        assert_eq!(listening.json()["headers"], json!({"tenant": "acme", "other": "1"}));
        assert_eq!(listening.end().code, 0);
    }

    /// A broker that is not there: an error, and soon.
    fn nobody_there(&self) {
        let (scheme, rest) = self.url.split_once("://").unwrap();
        let query = rest.split_once('?').map(|(_, query)| format!("?{query}")).unwrap_or_default();
        let url = format!("{scheme}://{}{query}", free_address());
        let begun = Instant::now();
        sum(&url).failed(5, &["not sent to"]);
        run(&["emit", &url, "noted"]).failed(5, &["not sent to"]);
        run(&["listen", &url, "x"]).failed(5, &["could not start", "reached"]);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }
}

#[cfg(feature = "nats")]
#[test]
fn nats_serves_calls_and_the_tool() {
    let broker = Broker::start(BrokerCommand::nats()).unwrap();
    let url = broker.url();
    Wire {
        data: json!({"transport": "NATS", "options": {"servers": [url], "name": "data"}}),
        wild: url.clone(),
        wildcard: ("orders.*", "orders.new"),
        no_handler: Some(3),
        headers: Some(format!("{url}?queue=headers")),
        url,
    }
    .check();
}

#[cfg(feature = "redis")]
#[test]
fn redis_serves_calls_and_the_tool() {
    let broker = Broker::start(BrokerCommand::redis()).unwrap();
    Wire {
        url: broker.url(),
        data: json!({"transport": "REDIS", "options": {"host": "127.0.0.1", "port": broker.port()}}),
        wild: format!("{}?wildcards=true", broker.url()),
        wildcard: ("orders.*", "orders.new"),
        // The broker says how many received it.
        no_handler: Some(3),
        headers: None,
    }
    .check();
}

#[cfg(feature = "rabbitmq")]
#[test]
fn rabbitmq_serves_calls_and_the_tool() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let url = broker.url();
    Wire {
        url: format!("{url}?queue=plain"),
        data: json!({"transport": "RMQ", "options": {"urls": [url], "queue": "data", "queueOptions": {"durable": false}}}),
        wild: format!("{url}?queue=wild&wildcards=true"),
        wildcard: ("orders.#", "orders.new.big"),
        no_handler: Some(3),
        headers: Some(format!("{url}?queue=headers")),
    }
    .check();
}

#[cfg(feature = "mqtt")]
#[test]
fn mqtt_serves_calls_and_the_tool() {
    let broker = Broker::start(BrokerCommand::mosquitto()).unwrap();
    let url = broker.url();
    Wire {
        data: json!({"transport": "MQTT", "options": {"url": url, "protocolVersion": 5}}),
        wild: url.clone(),
        wildcard: ("orders/+/new", "orders/7/new"),
        no_handler: None,
        headers: Some(format!("{url}?protocolVersion=5")),
        url,
    }
    .check();
}
