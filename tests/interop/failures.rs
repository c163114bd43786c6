// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens when something fails: every call still has one outcome, everyone else is undisturbed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet::tcp::{
    TcpClient, TcpClientOptions, TcpServer, TcpServerOptions, TlsClientOptions, TlsServerOptions,
};
use martlet::{CallError, Data, Microservice, RpcError, message};
use martlet_testkit::process::resident;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::pair::{Pair, Place, is_not_answered, start_service};
use crate::peer::eventually;
use crate::service::{Process, Service, cmd};
use crate::wire::{Nobody, Transport};
use crate::{behaviours, everywhere, on_tcp, with_broker};

/// Once per transport: its modes do the same when a process dies.
fn in_the_main_mode(_: u32, transport: Transport) -> bool {
    !matches!(transport, Transport::RedisWildcards | Transport::RmqWildcards | Transport::Mqtt5)
}

/// Restarting a broker that takes seconds is done once per transport, not per mode.
fn where_brokers_restart(version: u32, transport: Transport) -> bool {
    with_broker(version, transport) && !matches!(transport, Transport::RmqAcks | Transport::RmqWildcards)
}

behaviours! { TO_MARTLET:
    "TLS" [on_tcp] tls_service,
    "the client is killed in mid-call" [in_the_main_mode] client_killed,
    "the service is killed in mid-call" [in_the_main_mode] service_killed,
    "the service stops at once in mid-call" [on_tcp] service_stops_at_once,
    "the service goes away and comes back" [on_tcp] service_returns,
    "a service that has stopped answers no more" [everywhere] stopped_for_good,
    "the service drains under load: no request handled whose reply does not arrive" [everywhere] drained_under_load,
    "the broker restarts in mid-call" [where_brokers_restart] broker_restarts_under_our_service,
    "garbage of others on the same port" [on_tcp] garbage,
    "a frame above maxBufferSize" [on_tcp] oversized_frame,
    "a client that does not read" [on_tcp] client_that_does_not_read,
}

behaviours! { TO_NEST:
    "TLS" [on_tcp] tls_client,
    "the service is killed in mid-call" [in_the_main_mode] nest_killed,
    "the service is closed under load: each call has one outcome" [in_the_main_mode] nest_closed_under_load,
    "the service goes away and comes back" [in_the_main_mode] nest_returns,
    "the broker restarts in mid-call" [where_brokers_restart] broker_restarts_under_our_client,
    "a reply above our maxBufferSize" [on_tcp] oversized_reply,
}

/// A self-signed certificate for 127.0.0.1: its key and itself, as PEM texts.
fn certificate() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    (made.signing_key.serialize_pem(), made.cert.pem())
}

fn tcp(port: u16) -> Place {
    Place::new(Transport::Tcp, None).at(port)
}

// === a NestJS client calls our service ===

async fn tls_service(pair: &Pair) {
    let (key, cert) = certificate();
    let tls = TlsServerOptions::new(key, cert.clone());
    let options = TcpServerOptions::new().address("127.0.0.1", 0).tls(tls);
    let service = Service::start("encrypted", Transport::Tcp, TcpServer::new(options).into(), None).await;
    let place = tcp(service.port());
    let trusting = json!({ "tlsOptions": { "ca": cert } }).to_string();
    let nest = place.nest(pair.version, "client", &["--options", &trusting]).await;
    nest.send(json!({ "cmd": "sum" }), json!([1, 2, 3])).await.completes(json!([6]));
    let text = "ż😀".repeat(100_000);
    nest.send(json!("echo"), json!(text)).await.completes(json!([text]));
    nest.expect_errors(0).await;
    assert_eq!(service.take_events(), Vec::<&str>::new());
    // Without that authority there is no connection, and a report.
    let doubting = place.nest(pair.version, "client", &["--options", r#"{"tlsOptions":{}}"#]).await;
    doubting.send(json!("echo"), json!(1)).await.error_text();
    eventually("the report", || async { service.take_events() == ["session"] }).await;
    nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    service.stop().await;
}

async fn client_killed(pair: &Pair) {
    let (place, service) = start_service("victim", &pair.elsewhere().await).await;
    let doomed = place.nest(pair.version, "client", &[]).await;
    let other = place.nest(pair.version, "client", &[]).await;
    doomed.hold(json!("slow")).await;
    let pending: Vec<_> =
        (0..10).map(|_| doomed.begin("send", json!({ "pattern": "slow", "data": { "ms": 300 } }))).collect();
    eventually("10 calls to run", || async { service.seen.slow_running.load(Ordering::SeqCst) == 10 }).await;
    doomed.kill();
    other.send(json!("echo"), json!(1)).await.completes(json!([1]));
    eventually("the calls to end", || async { service.seen.slow_running.load(Ordering::SeqCst) == 0 }).await;
    other.send(json!("echo"), json!(2)).await.completes(json!([2]));
    other.expect_errors(0).await;
    drop((pending, other));
    service.stop().await;
}

async fn service_killed(pair: &Pair) {
    let place = pair.elsewhere().await;
    let process = Process::start(&place);
    let place = place.at_url(&process.url);
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.send(json!("whoami"), json!({})).await.completes(json!(["process"]));
    nest.hold(json!("slow")).await;
    let more = json!({ "timeout": 1000 });
    let pending: Vec<_> =
        (0..10).map(|_| nest.begin_send(json!("slow"), json!({ "ms": 60_000 }), more.clone())).collect();
    // One after the other on one line: when this is answered, the ten have begun.
    nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    drop(process);
    for sent in pending {
        let sent = sent.await;
        match pair.transport {
            Transport::Tcp => assert_eq!(sent.error_text(), "Connection closed"),
            // The broker does not tell who died.
            _ => sent.timed_out(),
        }
    }
    let sent = nest.send_with(json!("echo"), json!(1), json!({ "timeout": 250 })).await;
    match pair.transport {
        Transport::Tcp => assert!(sent.error_text().contains("ECONNREFUSED"), "{sent:?}"),
        Transport::Nats => is_not_answered(Nobody::Refused, "echo", &sent),
        // Nobody listens, or the queue keeps it.
        _ => sent.timed_out(),
    }
}

async fn service_stops_at_once(pair: &Pair) {
    let (place, service) = start_service("ours", &tcp(0)).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    let pending: Vec<_> =
        (0..10).map(|_| nest.begin_send(json!("slow"), json!({ "ms": 5000 }), json!({}))).collect();
    eventually("10 calls to run", || async { service.seen.slow_running.load(Ordering::SeqCst) == 10 }).await;
    let started = Instant::now();
    let report = service.running.stop(Duration::ZERO).await;
    assert_eq!(report.abandoned().count(), 10, "{report:?}");
    for sent in pending {
        assert_eq!(sent.await.error_text(), "Connection closed");
    }
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

async fn service_returns(pair: &Pair) {
    let (place, service) = start_service("first", &tcp(0)).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.send(json!("whoami"), json!({})).await.completes(json!(["first"]));
    service.stop().await;
    assert!(nest.send(json!("whoami"), json!({})).await.error_text().contains("ECONNREFUSED"));
    let (_, service) = start_service("second", &place).await;
    nest.send(json!("whoami"), json!({})).await.completes(json!(["second"]));
    service.stop().await;
}

async fn stopped_for_good(pair: &Pair) {
    let (place, first) = start_service("first", &pair.elsewhere().await).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    let pending = nest.begin_send(json!("never"), json!(1), json!({ "timeout": 100 }));
    nest.send(json!("whoami"), json!(1)).await.completes(json!(["first"]));
    assert!(pending.await.0["completed"] == false);
    first.running.stop(Duration::from_millis(100)).await;
    let (_, second) = start_service("second", &place).await;
    let whoami = || async { nest.send(json!("whoami"), json!(1)).await.0["items"].clone() };
    if pair.transport == Transport::Tcp {
        // A client of 10 and 11 may hear late that its connection is gone.
        whoami().await;
    }
    for _ in 0..20 {
        assert_eq!(whoami().await, json!(["second"]));
    }
    // Where messages are acknowledged, it has got the one that has no end.
    second.running.stop(Duration::from_millis(100)).await;
}

async fn drained_under_load(pair: &Pair) {
    let place = pair.elsewhere().await;
    let (begun, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let counters = (Arc::clone(&begun), Arc::clone(&done));
    let sum = message(cmd("sum"), move |Data(numbers): Data<Vec<i64>>| {
        let (begun, done) = counters.clone();
        async move {
            begun.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(5)).await;
            done.fetch_add(1, Ordering::SeqCst);
            Ok::<_, RpcError>(numbers.iter().sum::<i64>())
        }
    });
    let service = Microservice::new().arbiters(2).handlers(sum).server(place.server()).start().await.unwrap();
    let place = place.at_url(&service.url());
    let nests =
        [place.nest(pair.version, "client", &[]).await, place.nest(pair.version, "client", &[]).await];
    let load = json!({ "n": 20_000, "inFlight": 200, "timeout": 3000 });
    // By a broker a request that was sent while the service went away has no answer.
    let load = match pair.transport {
        Transport::Tcp => load,
        _ => json!({ "n": 3000, "inFlight": 100, "timeout": 1500, "giveUp": 1 }),
    };
    let batches: Vec<_> = nests.iter().map(|nest| nest.begin("batch", load.clone())).collect();
    eventually("load", || async { begun.load(Ordering::SeqCst) > 500 }).await;
    let report = service.stop(Duration::from_secs(10)).await;
    let mut ok = 0;
    for batch in batches {
        let batch = batch.await;
        assert_eq!(batch["wrong"], 0, "{batch}");
        assert_ne!(batch["ok"], batch["n"], "the load ended before the service did");
        ok += batch["ok"].as_u64().unwrap();
    }
    let (begun, done) = (begun.load(Ordering::SeqCst), done.load(Ordering::SeqCst));
    assert_eq!((begun, done, ok), (begun, begun, begun), "begun, done, replies that arrived");
    assert_eq!((report.done(), report.abandoned().count(), report.clean), (begun, 0, true), "{report:?}");
}

/// How often; RabbitMQ takes seconds.
fn restarts(transport: Transport) -> u64 {
    if transport.is_rmq() { 1 } else { 3 }
}

async fn broker_restarts_under_our_service(pair: &Pair) {
    let (place, broker) = pair.restartable().await;
    let (_, service) = start_service("ours", &place).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    let pending = nest.begin_send(json!("slow"), json!({ "ms": 200 }), json!({ "timeout": 2000 }));
    eventually("the call to run", || async { service.seen.slow_running.load(Ordering::SeqCst) == 1 }).await;
    for _ in 0..restarts(pair.transport) {
        broker.restart().await;
        eventually("the service to be back", || async {
            let more = json!({ "timeout": 300 });
            nest.send_with(json!({ "cmd": "sum" }), json!([1, 2]), more).await.0["items"] == json!([3])
        })
        .await;
    }
    // Every registration is back, also the wildcards and the events.
    if let Some(wild) = &pair.wire().wildcards {
        let east = wild.join(&["time", "us", "east"]);
        nest.send(json!(east), json!(1)).await.completes(json!([east]));
    }
    nest.emit(json!("notification"), json!(1)).await;
    eventually("the event", || async { service.seen.notifications.load(Ordering::SeqCst) == 1 }).await;
    // The reply was lost with the line: the NestJS client hears nothing, and gives up.
    let outcome = pending.await;
    assert!(outcome.0["timedOut"] == true || outcome.0["failed"] == true, "{outcome:?}");
    service.stop().await;
}

async fn garbage(pair: &Pair) {
    let port = pair.ours().port();
    pair.ours().take_events();
    let garbage: [&[u8]; 8] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n#",
        b"abc#{}",
        b"-1#{}",
        b"0#",
        b"5#{bad}",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03#",
        &[b'9'; 100],
        &[0xff; 4096],
    ];
    let pending = pair.nest.begin_send(json!("slow"), json!({ "ms": 200 }), json!({}));
    for bytes in garbage {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(3), socket.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "{} was not closed", String::from_utf8_lossy(bytes));
        assert!(answer.is_empty(), "NestJS sends no error frame: {}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(pair.ours().take_events(), ["bad_input"; 8]);
    pending.await.completes(json!([200]));
}

async fn oversized_frame(pair: &Pair) {
    let options = TcpServerOptions::new().address("127.0.0.1", 0).with(|it| it.max_buffer_size = 10_000);
    let service = Service::start("small", Transport::Tcp, TcpServer::new(options).into(), None).await;
    let place = tcp(service.port());
    let (large, small) =
        (place.nest(pair.version, "client", &[]).await, place.nest(pair.version, "client", &[]).await);
    let pending = small.begin_send(json!("slow"), json!({ "ms": 200 }), json!({}));
    let sent = large.send(json!("echo"), json!("x".repeat(1_000_000))).await;
    assert_eq!(sent.error_text(), "Connection closed");
    assert_eq!(service.take_events(), ["bad_input"]);
    pending.await.completes(json!([200]));
    // The next call of the same client connects anew.
    large.send(json!("echo"), json!("x".repeat(9000))).await.completes(json!(["x".repeat(9000)]));
    service.stop().await;
}

async fn client_that_does_not_read(pair: &Pair) {
    let port = pair.ours().port();
    let before = resident();
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = r#"{"pattern":"big","data":{"n":1000000},"id":"a"}"#;
    let frames = format!("{}#{request}", request.len()).repeat(2000);
    // 2 GB are asked for. Writing ends when the service stops reading.
    let written = tokio::time::timeout(Duration::from_secs(1), socket.write_all(frames.as_bytes())).await;
    pair.nest.send(json!("echo"), json!(1)).await.completes(json!([1]));
    let grown = resident().saturating_sub(before);
    assert!(grown < 100 << 20, "{grown} bytes more, written: {written:?}");
    drop(socket);
    pair.ours().take_events();
}

// === our client calls a NestJS service ===

async fn tls_client(pair: &Pair) {
    let (key, cert) = certificate();
    let options = json!({ "tlsOptions": { "key": key, "cert": cert } }).to_string();
    let (_, nest) = tcp(0).nest_server(pair.version, &["--options", &options]).await;
    let address = || TcpClientOptions::new().address("127.0.0.1", nest.port);
    let client = TcpClient::new(address().tls(TlsClientOptions::new(cert)));
    assert_eq!(client.send::<i64>(cmd("sum"), [1, 2, 3]).await.unwrap(), 6);
    let text = "ż😀".repeat(100_000);
    assert_eq!(client.send::<String>("echo", &text).await.unwrap(), text);
    nest.expect_errors(0).await;
    let doubting = TcpClient::new(address().tls(TlsClientOptions::new(certificate().1)));
    let error = doubting.send::<Value>("echo", 1).await.unwrap_err();
    assert!(matches!(error, CallError::NotSent { .. }), "{error:?}");
    assert!(error.to_string().contains("tls handshake failed"), "{error}");
    assert_eq!(client.send::<i64>("echo", 1).await.unwrap(), 1);
    client.close().await;
}

async fn nest_killed(pair: &Pair) {
    let (place, nest) = pair.elsewhere().await.nest_server(pair.version, &[]).await;
    let client = place.client();
    client.connect().await.unwrap();
    let mut calls = Vec::new();
    for _ in 0..10 {
        let client = client.clone();
        calls.push(actix_rt::spawn(async move {
            client.send::<Value>("slow", json!({ "ms": 60_000 })).timeout(Duration::from_secs(2)).await
        }));
    }
    eventually("the calls to run", || async { nest.stats().await["slowRunning"] == 10 }).await;
    nest.kill();
    let killed = Instant::now();
    for call in calls {
        let error = call.await.unwrap().unwrap_err();
        match pair.transport {
            Transport::Tcp => assert!(matches!(error, CallError::Lost { .. }), "{error:?}"),
            // The broker does not tell who died.
            _ => assert!(matches!(error, CallError::Timeout { .. }), "{error:?}"),
        }
    }
    if pair.transport == Transport::Tcp {
        assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    }
    let error = client.send::<Value>("echo", 1).timeout(Duration::from_millis(250)).await.unwrap_err();
    match pair.transport {
        Transport::Tcp => assert!(matches!(error, CallError::NotSent { .. }), "{error:?}"),
        // The queue keeps it.
        _ if pair.transport.is_rmq() => assert!(matches!(error, CallError::Timeout { .. }), "{error:?}"),
        _ => pair.nobody_answered("echo", &error),
    }
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
}

async fn nest_closed_under_load(pair: &Pair) {
    let (place, nest) = pair.elsewhere().await.nest_server(pair.version, &[]).await;
    let client = place.client();
    client.connect().await.unwrap();
    let outcomes: RefCell<BTreeMap<&str, u32>> = RefCell::default();
    let count = |outcome| *outcomes.borrow_mut().entry(outcome).or_insert(0) += 1;
    let begun = Cell::new(0);
    let calls = (0..3000).map(|_| async {
        begun.set(begun.get() + 1);
        let call = client.send::<u64>("slow", json!({ "ms": 5 })).timeout(Duration::from_millis(700));
        match call.await {
            Ok(value) => {
                assert_eq!(value, 5);
                count("value");
            }
            Err(error) => count(error.kind()),
        }
    });
    // Once they time out there is nothing more to learn.
    let closing = Cell::new(false);
    let goes_on = || !(closing.get() && outcomes.borrow().contains_key("timeout"));
    let calls = futures::stream::iter(calls).take_while(|_| std::future::ready(goes_on()));
    let load = calls.buffer_unordered(100).collect::<Vec<()>>();
    let close = async {
        eventually("replies", || async { outcomes.borrow().get("value").is_some_and(|it| *it > 300) }).await;
        closing.set(true);
        nest.call("close", json!({})).await;
    };
    futures::join!(load, close);
    let outcomes = outcomes.into_inner();
    assert_eq!(outcomes.values().sum::<u32>(), begun.get(), "{outcomes:?}");
    let known: &[&str] = match pair.transport {
        Transport::Tcp => &["value", "lost", "not_sent"],
        _ => &["value", "timeout", "no_handler"],
    };
    assert!(outcomes.keys().all(|outcome| known.contains(outcome)), "{outcomes:?}");
    if pair.version == 10 && pair.transport == Transport::Tcp {
        // NestJS 10 closes its listening socket and goes on serving the connections that are open.
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
    } else {
        assert!(outcomes.len() > 1, "the load ended before the service did: {outcomes:?}");
    }
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
}

async fn nest_returns(pair: &Pair) {
    let (place, first) = pair.elsewhere().await.nest_server(pair.version, &["--name", "first"]).await;
    let client = place.client();
    assert_eq!(client.send::<String>("whoami", 1).await.unwrap(), "first");
    first.kill();
    eventually("the call to fail", || async {
        client.send::<String>("whoami", 1).timeout(Duration::from_millis(250)).await.is_err()
    })
    .await;
    let second = place.nest(pair.version, "server", &["--name", "second"]).await;
    assert_eq!(client.send::<String>("whoami", 1).await.unwrap(), "second");
    client.close().await;
    second.expect_errors(0).await;
}

async fn broker_restarts_under_our_client(pair: &Pair) {
    let (place, broker) = pair.restartable().await;
    let nest = place.nest(pair.version, "server", &[]).await;
    let client = place.client();
    for round in 1..=restarts(pair.transport) {
        let pending = {
            let client = client.clone();
            actix_rt::spawn(async move { client.send::<u64>("slow", json!({ "ms": 20_000 })).await })
        };
        // The calls of the rounds before still run over there.
        eventually("the call to run", || async { nest.stats().await["slowRunning"] == round }).await;
        let lost = async {
            let started = Instant::now();
            let error = pending.await.unwrap().unwrap_err();
            assert!(matches!(error, CallError::Lost { .. }), "{error:?}");
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        };
        futures::join!(broker.restart(), lost);
        eventually("calls to work again", || async {
            client.send::<i64>(cmd("sum"), [1, 2]).timeout(Duration::from_millis(300)).await.ok() == Some(3)
        })
        .await;
    }
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
}

async fn oversized_reply(pair: &Pair) {
    let options =
        TcpClientOptions::new().address("127.0.0.1", pair.nest.port).with(|it| it.max_buffer_size = 10_000);
    let client = TcpClient::new(options);
    let error = client.send::<String>("big", json!({ "n": 1_000_000 })).await.unwrap_err();
    assert!(matches!(&error, CallError::Lost { cause } if cause.to_string().contains("10000")), "{error}");
    let text: String = client.send("big", json!({ "n": 9000 })).await.unwrap();
    assert_eq!(text.len(), 9000);
    client.close().await;
    // A NestJS service logs the connection that was cut off while it wrote.
    pair.nest.forgive().await;
}
