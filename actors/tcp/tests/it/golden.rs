// SPDX-License-Identifier: MIT OR Apache-2.0

//! The golden exchanges through real sockets: what NestJS clients sent is answered with the bytes that NestJS
//! answered with.

use std::cell::RefCell;

use martlet_core::Microservice;
use martlet_tcp::TcpServer;
use martlet_testkit::conformance::quiet_deliberate_panics;
use martlet_testkit::nest::{DIFFERENT, Exchange, NestApp, exchanges};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{eventually, frame, within};

const VECTORS: &str = include_str!("../vectors/tcp.json");

async fn serve(app: &NestApp) -> (martlet_core::RunningService, TcpStream) {
    quiet_deliberate_panics();
    let mut service = Microservice::new().on_current_arbiter().server(TcpServer::bind("127.0.0.1", 0));
    for group in app.handlers() {
        // A test asks the same of a handler over and over, panics included.
        service = service.handlers(group.supervision(|supervision| supervision.poison_after = 0));
    }
    let service = service.start().await.unwrap();
    let port: u16 = service.url().rsplit(':').next().unwrap().parse().unwrap();
    let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    (service, socket)
}

/// Sends what a NestJS client sent and reads as many bytes as NestJS answered with.
async fn replay(socket: &mut TcpStream, exchange: &Exchange) -> Vec<String> {
    socket.write_all(exchange.raw().as_bytes()).await.unwrap();
    let mut replies = Vec::new();
    for expected in &exchange.replies {
        let mut bytes = vec![0; expected.len()];
        let read = within(socket.read_exact(&mut bytes)).await;
        read.unwrap_or_else(|| panic!("{}: no reply but {replies:?}", exchange.name)).unwrap();
        replies.push(String::from_utf8_lossy(&bytes).into_owned());
    }
    replies
}

#[actix::test]
async fn what_nestjs_answered_is_answered_byte_for_byte() {
    let app = NestApp::new();
    let (service, mut socket) = serve(&app).await;
    let (mut replies, mut errors) = (0, 0);
    for exchange in exchanges(VECTORS) {
        if exchange.is_different() || exchange.is_event {
            continue;
        }
        let answered = replay(&mut socket, &exchange).await;
        assert_eq!(answered, exchange.replies, "{}", exchange.name);
        replies += answered.len();
        errors += answered.iter().filter(|reply| reply.contains(r#""err":"#)).count();
    }
    // Nothing comes beyond what was expected: the answer to this is the very next.
    socket.write_all(frame(r#"{"pattern":"sum","data":[1],"id":"last"}"#).as_bytes()).await.unwrap();
    let expected = frame(r#"{"response":1,"isDisposed":true,"id":"last"}"#);
    let mut last = vec![0; expected.len()];
    within(socket.read_exact(&mut last)).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&last), expected);
    // Every error that NestJS sent is among them.
    let all = exchanges(VECTORS);
    let golden = all.iter().flat_map(|exchange| &exchange.replies);
    assert_eq!(errors, golden.filter(|reply| reply.contains(r#""err":"#)).count());
    assert!(errors >= 26 && replies >= 95, "{errors} errors of {replies} replies");
    service.stop(std::time::Duration::from_secs(1)).await;
}

#[actix::test]
async fn events_of_nestjs_reach_their_handlers_and_get_no_answer() {
    let app = NestApp::new();
    let (service, mut socket) = serve(&app).await;
    let mut expected = Vec::new();
    for exchange in exchanges(VECTORS).iter().filter(|exchange| exchange.is_event) {
        assert!(exchange.replies.is_empty());
        socket.write_all(exchange.raw().as_bytes()).await.unwrap();
        let pattern = match &exchange.request["pattern"] {
            Value::String(text) => text.clone(),
            object => martlet_core::Pattern::from_json(object).unwrap().route().to_string(),
        };
        if ["evt", "evt_err", "evt_obs", r#"{"type":"created","v":1}"#].contains(&&*pattern) {
            expected.push((pattern, exchange.request["data"].clone()));
        }
    }
    assert!(expected.len() >= 6, "{expected:?}");
    let seen = RefCell::new(Vec::new());
    eventually("all were seen", || {
        seen.borrow_mut().extend(app.take_events());
        seen.borrow().len() >= expected.len()
    })
    .await;
    // Each pattern has a handler of its own, and those do not wait for each other.
    let sorted = |mut events: Vec<(String, Value)>| {
        events.sort_by_key(|(pattern, data)| format!("{pattern} {data}"));
        events
    };
    assert_eq!(sorted(seen.into_inner()), sorted(expected));
    let mut byte = [0];
    let silence = tokio::time::timeout(std::time::Duration::from_millis(100), socket.read(&mut byte)).await;
    assert!(silence.is_err(), "{silence:?}");
    service.stop(std::time::Duration::from_secs(1)).await;
}

#[test]
fn every_exception_is_of_an_exchange() {
    let all = exchanges(VECTORS);
    for (name, _) in DIFFERENT {
        assert!(all.iter().any(|exchange| exchange.name == *name), "{name}");
    }
}
