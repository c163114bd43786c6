// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes: what the service puts on the wire, and what it makes of bytes that no client of ours sends.

use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use martlet_core::{Data, Pattern, Payload, RpcError, Streaming, message};
use serde_json::json;

use super::{DELIBERATE, Harness, Names, RawPeer, Stage, eventually, ok, small, watch};

async fn ask(peer: &mut Box<dyn RawPeer>, packet: String) -> String {
    peer.send(Bytes::from(packet)).await;
    let reply = tokio::time::timeout(Duration::from_secs(5), peer.recv()).await.expect("a reply within 5s");
    String::from_utf8(reply.expect("a reply").to_vec()).unwrap()
}

fn request(pattern: &Pattern, data: &str) -> String {
    format!(r#"{{"pattern":{},"data":{data},"id":"x1"}}"#, pattern.text())
}

/// Error packets, byte for byte.
pub async fn error_bytes_are_nestjs_own<H: Harness>(harness: H) {
    let names = Names::new();
    let fail = message(names.of("fail"), |Data(kind): Data<String>| async move {
        Err::<(), RpcError>(match kind.as_str() {
            "message" => RpcError::message("boom \"quoted\" \n ü"),
            "object" => RpcError::json(json!({"code": 42, "message": "m"})),
            "panic" => panic!("{DELIBERATE}"),
            _ => RpcError::unexpected("a secret"),
        })
    });
    let mut stage = Stage::new(harness, small().handlers(fail)).await;
    let mut peer = stage.harness.raw(&stage.service.url()).await;
    for (kind, err) in [
        (r#""message""#, r#"{"status":"error","message":"boom \"quoted\" \n ü"}"#),
        (r#""object""#, r#"{"code":42,"message":"m"}"#),
        (r#""unexpected""#, r#"{"status":"error","message":"Internal server error"}"#),
        (r#""panic""#, r#"{"status":"error","message":"Internal server error"}"#),
    ] {
        let reply = ask(&mut peer, request(&names.of("fail"), kind)).await;
        assert_eq!(reply, format!(r#"{{"err":{err},"isDisposed":true,"id":"x1"}}"#));
    }
    let reply = ask(&mut peer, request(&names.of("nowhere"), "1")).await;
    let text = "There is no matching message handler defined in the remote service.";
    assert_eq!(reply, format!(r#"{{"id":"x1","status":"error","err":"{text}"}}"#));
    drop(peer);
    stage.end().await;
}

/// Value packets, byte for byte.
pub async fn reply_bytes_are_nestjs_own<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small()
        .handlers(message(names.of("echo"), |payload: Payload| async move { ok(payload) }))
        .handlers(message(names.of("null"), || async { ok(None::<u64>) }))
        .handlers(message(names.of("nothing"), || async { ok(()) }))
        .handlers(message(names.of("items"), || async { ok(Streaming(stream::iter([1, 2, 3]))) }))
        .handlers(message(names.of("float"), || async { ok(3.0) }));
    let mut stage = Stage::new(harness, service).await;
    let mut peer = stage.harness.raw(&stage.service.url()).await;
    let raw = r#"{"b":[1,2.50,"é"],"a":null}"#;
    let reply = ask(&mut peer, request(&names.of("echo"), raw)).await;
    assert_eq!(reply, format!(r#"{{"response":{raw},"isDisposed":true,"id":"x1"}}"#));
    let reply = ask(&mut peer, request(&names.of("null"), "1")).await;
    assert_eq!(reply, r#"{"response":null,"isDisposed":true,"id":"x1"}"#);
    let reply = ask(&mut peer, request(&names.of("nothing"), "1")).await;
    assert_eq!(reply, r#"{"isDisposed":true,"id":"x1"}"#);
    let reply = ask(&mut peer, request(&names.of("float"), "1")).await;
    assert_eq!(reply, r#"{"response":3,"isDisposed":true,"id":"x1"}"#);
    let first = ask(&mut peer, request(&names.of("items"), "1")).await;
    assert_eq!(first, r#"{"response":1,"id":"x1"}"#);
    for expected in [r#"{"response":2,"id":"x1"}"#, r#"{"response":3,"isDisposed":true,"id":"x1"}"#] {
        assert_eq!(peer.recv().await.unwrap(), expected.as_bytes());
    }
    drop(peer);
    stage.end().await;
}

/// An id is any JSON value and comes back as it went; one id may be in flight twice.
pub async fn ids_of_any_kind_are_echoed<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small().handlers(message(names.of("one"), || async {
        tokio::time::sleep(Duration::from_millis(1)).await;
        ok(1)
    }));
    let mut stage = Stage::new(harness, service).await;
    let mut peer = stage.harness.raw(&stage.service.url()).await;
    let pattern = names.of("one");
    for id in [r#""text""#, "0", "null", "false", r#""""#, r#"{"a":[1, 2]}"#, r#""\u00e9""#] {
        let reply =
            ask(&mut peer, format!(r#"{{"id":{id},"data":1,"pattern":{},"x":[]}}"#, pattern.text())).await;
        assert_eq!(reply, format!(r#"{{"response":1,"isDisposed":true,"id":{id}}}"#));
    }
    for _ in 0..2 {
        peer.send(Bytes::from(request(&pattern, "1"))).await;
    }
    for _ in 0..2 {
        assert_eq!(peer.recv().await.unwrap(), r#"{"response":1,"isDisposed":true,"id":"x1"}"#.as_bytes());
    }
    drop(peer);
    stage.end().await;
}

/// Packets that cannot be read are reported; other connections go on.
pub async fn unreadable_packets_disturb_nobody<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small().handlers(message(names.of("one"), || async { ok(1) }));
    let mut stage = Stage::new(harness, service).await;
    let seen = watch(stage.service.events());
    for bad in
        [&b"{"[..], b"nonsense", b"{\"pattern\":}", b"\xff\xfe", b"[1,2", b"{\"pattern\":\"a\"} trailing"]
    {
        // Where the protocol demands it, this peer's connection is closed; so each has one of its own.
        let mut peer = stage.harness.raw(&stage.service.url()).await;
        let before = seen("bad_input") + seen("session");
        peer.send(Bytes::from_static(bad)).await;
        eventually("bad input is reported", || seen("bad_input") + seen("session") > before).await;
        assert_eq!(stage.client.send::<u64>(names.of("one"), 1).await.unwrap(), 1);
    }
    // Readable, but of no meaning: no pattern, patterns without a route, foreign values.
    let mut peer = stage.harness.raw(&stage.service.url()).await;
    for odd in ["5", "null", "[]", "{}", r#"{"id":"x"}"#, r#"{"pattern":null,"data":1}"#] {
        peer.send(Bytes::from_static(odd.as_bytes())).await;
    }
    let reply = ask(&mut peer, r#"{"pattern":true,"data":1,"id":"x1"}"#.to_owned()).await;
    assert!(reply.contains("There is no matching message handler"), "{reply}");
    assert_eq!(
        ask(&mut peer, request(&names.of("one"), "1")).await,
        r#"{"response":1,"isDisposed":true,"id":"x1"}"#
    );
    drop(peer);
    assert_eq!(stage.client.send::<u64>(names.of("one"), 1).await.unwrap(), 1);
    stage.end().await;
}
