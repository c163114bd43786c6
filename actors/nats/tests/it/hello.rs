// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a connection begins: what we say of ourselves to a broker is what NestJS says, where that decides what the broker
//! does.

use martlet_core::SessionErrorKind;
use martlet_nats::{NatsClientOptions, NatsServerOptions};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use crate::world::{call_error, start_error};

const VECTOR: &str = include_str!("../vectors/nest12-nats-connect.json");

/// The fields of a `CONNECT`, behind which the broker is asked for an answer.
fn fields(lines: &str) -> Map<String, Value> {
    let connect = lines.strip_prefix("CONNECT ").and_then(|rest| rest.strip_suffix("\r\nPING\r\n"));
    serde_json::from_str(connect.unwrap_or_else(|| panic!("{lines:?}"))).unwrap()
}

/// A broker that hangs up when it has heard who is there.
struct Doorman(TcpListener);

impl Doorman {
    async fn new() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        (Self(listener), url)
    }

    /// The first two lines of whoever comes next.
    async fn hears(&self) -> String {
        let mut socket = BufReader::new(self.0.accept().await.unwrap().0);
        let info = json!({
            "server_id": "test", "server_name": "test", "version": "2.9.10", "go": "go1", "proto": 1,
            "host": "127.0.0.1", "port": self.0.local_addr().unwrap().port(), "headers": true,
            "max_payload": 1_048_576,
        });
        socket.write_all(format!("INFO {info}\r\n").as_bytes()).await.unwrap();
        let mut lines = String::new();
        for _ in 0..2 {
            socket.read_line(&mut lines).await.unwrap();
        }
        lines
    }
}

#[actix::test]
async fn a_broker_hears_of_us_what_it_hears_of_nestjs() {
    let golden: Value = serde_json::from_str(VECTOR).unwrap();
    let golden = fields(golden["raw"].as_str().unwrap());
    let (doorman, url) = Doorman::new().await;
    let server = NatsServerOptions::new().servers([url.clone()]);
    let client = NatsClientOptions::new().servers([url]);
    let (server_ends, of_server) = futures::join!(start_error(server), doorman.hears());
    let (client_ends, of_client) = futures::join!(call_error(client), doorman.hears());
    assert_eq!((server_ends.0, client_ends.0), (SessionErrorKind::Refused, SessionErrorKind::Refused));
    for lines in [of_server, of_client] {
        let ours = fields(&lines);
        for (name, value) in &golden {
            match name.as_str() {
                // The driver's own.
                "lang" | "version" => assert!(ours[name].is_string(), "{lines}"),
                _ => assert_eq!(&ours[name], value, "{name} in {lines}"),
            }
        }
        // What NestJS leaves out means that, to a broker: messages of one's own come back, no TLS, no name and no login.
        for (name, value) in ours.iter().filter(|(name, _)| !golden.contains_key(*name)) {
            let default = match name.as_str() {
                "echo" => json!(true),
                "tls_required" => json!(false),
                _ => Value::Null,
            };
            assert_eq!(*value, default, "{name} in {lines}");
        }
    }
}
