// SPDX-License-Identifier: MIT OR Apache-2.0

//! Peers that are slow, broken or mean: they get what NestJS would give them, and nobody else notices.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use martlet_testkit::process::{Memory, alone};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Service, eventually, frame, sum, within};

#[actix::test]
async fn frames_byte_by_byte() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    raw.0.set_nodelay(true).unwrap();
    for text in [frame(r#"{"pattern":"echo","data":"ż😀","id":"a"}"#), sum("b", &[1])] {
        for byte in text.bytes() {
            raw.0.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(raw.frame().await, r#"{"response":"ż😀","isDisposed":true,"id":"a"}"#);
    assert_eq!(raw.frame().await, r#"{"response":1,"isDisposed":true,"id":"b"}"#);
    service.stop().await;
}

#[actix::test]
async fn a_half_closed_peer_is_answered() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    raw.send(&frame(r#"{"pattern":"slow","data":100,"id":"a"}"#)).await;
    raw.send(&sum("b", &[1, 2])).await;
    raw.0.shutdown().await.unwrap();
    assert_eq!(raw.frame().await, r#"{"response":3,"isDisposed":true,"id":"b"}"#);
    assert_eq!(raw.frame().await, r#"{"response":100,"isDisposed":true,"id":"a"}"#);
    assert_eq!(raw.rest().await, "");
    service.stop().await;
}

#[actix::test]
async fn a_half_closed_peer_is_waited_for_as_long_as_the_option_says() {
    for (limit, answered) in [(100, false), (5000, true)] {
        let service = Service::with(|it| it.half_close_timeout = Duration::from_millis(limit)).await;
        let mut raw = service.raw().await;
        raw.send(&frame(r#"{"pattern":"slow","data":1200,"id":"a"}"#)).await;
        let started = Instant::now();
        raw.0.shutdown().await.unwrap();
        let rest = raw.rest().await;
        assert_eq!(
            rest.contains(r#"{"response":1200,"isDisposed":true,"id":"a"}"#),
            answered,
            "{limit}: {rest}"
        );
        assert_eq!(started.elapsed() >= Duration::from_millis(1200), answered, "{:?}", started.elapsed());
        service.stop().await;
    }
}

/// A NestJS client that closes waits until the server has closed, too: a stream without end must not keep it.
#[actix::test]
async fn a_half_closed_peer_does_not_keep_an_endless_stream() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    raw.send(&frame(r#"{"pattern":"infinite","data":1,"id":"a"}"#)).await;
    assert_eq!(raw.frame().await, r#"{"response":0,"id":"a"}"#);
    let started = Instant::now();
    raw.0.shutdown().await.unwrap();
    assert!(raw.rest().await.contains(r#"{"response":1,"id":"a"}"#));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    eventually("the stream to end", || service.running_streams.load(Ordering::SeqCst) == 0).await;
    let report = service.running.stop(Duration::from_secs(1)).await;
    assert!(report.clean, "{report:?}");
}

#[actix::test]
async fn a_peer_that_vanishes_ends_its_streams() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    for id in 0..20 {
        raw.send(&frame(&format!(r#"{{"pattern":"infinite","data":1,"id":{id}}}"#))).await;
    }
    eventually("20 streams", || service.running_streams.load(Ordering::SeqCst) == 20).await;
    drop(raw);
    eventually("no stream", || service.running_streams.load(Ordering::SeqCst) == 0).await;
    service.stop().await;
}

#[actix::test]
async fn a_peer_silent_inside_a_frame_is_closed() {
    let service = Service::with(|it| it.incomplete_message_timeout = Duration::from_millis(150)).await;
    for part in ["5", "50#{\"pattern\"", " ", &format!("{} ", sum("a", &[1]))] {
        let mut raw = service.raw().await;
        let started = Instant::now();
        raw.send(part).await;
        let received = raw.rest().await;
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(140) && took < Duration::from_secs(2), "{part:?}: {took:?}");
        // What was asked before the part was answered before the silence.
        assert_eq!(received.contains("response"), part.contains("sum"), "{part:?}: {received:?}");
        service.reports(&["session", "incompleteMessageTimeout", "150ms"]).await;
    }
    // A byte in time keeps the connection, as does silence between frames.
    let mut raw = service.raw().await;
    for piece in ["39#{\"pattern\"", ":\"sum\",\"d", "ata\":[1,2]", ",\"id\":\"a\"}"] {
        raw.send(piece).await;
        tokio::time::sleep(Duration::from_millis(90)).await;
    }
    assert_eq!(raw.frame().await, r#"{"response":3,"isDisposed":true,"id":"a"}"#);
    tokio::time::sleep(Duration::from_millis(250)).await;
    raw.stays_silent().await;
    service.stop().await;
}

#[actix::test]
async fn ten_thousand_levels_of_nesting() {
    let service = Service::with(|_| {}).await;
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    let deep_object = format!("{}1{}", r#"{"a":"#.repeat(10_000), "}".repeat(10_000));
    for deep in [&deep, &deep_object] {
        let mut raw = service.raw().await;
        // Payloads are handed on without looking inside.
        raw.send(&frame(&format!(r#"{{"pattern":"echo","data":{deep},"id":"a"}}"#))).await;
        assert_eq!(raw.frame().await, format!(r#"{{"response":{deep},"isDisposed":true,"id":"a"}}"#));
        // A handler that looks inside is told that it cannot.
        raw.send(&frame(&format!(r#"{{"pattern":"sum","data":{deep},"id":"b"}}"#))).await;
        assert!(raw.frame().await.contains(r#""err":"#));
        raw.send(&frame(&format!(r#"{{"pattern":{deep},"data":1,"id":"c"}}"#))).await;
        assert!(raw.frame().await.contains("There is no matching message handler"));
        raw.send(&frame(&format!(r#"{{"pattern":"sum","data":[1],"id":{deep}}}"#))).await;
        assert_eq!(raw.frame().await, format!(r#"{{"response":1,"isDisposed":true,"id":{deep}}}"#));
        raw.send(&frame(&format!(r#"{{"pattern":"sum","data":[1],"metadata":{deep},"id":"e"}}"#))).await;
        assert_eq!(raw.frame().await, r#"{"response":1,"isDisposed":true,"id":"e"}"#);
    }
    service.serves_others().await;
    service.stop().await;
}

#[actix::test]
async fn sloppy_prefixes_that_nestjs_takes() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    let body = r#"{"pattern":"sum","data":[1,2],"id":"a"}"#;
    for prefix in ["39", "00039", "\r\n 39", "39abc", "39.9", "+39", "\t39 "] {
        raw.send(&format!("{prefix}#{body}")).await;
        assert_eq!(raw.frame().await, r#"{"response":3,"isDisposed":true,"id":"a"}"#, "{prefix:?}");
    }
    service.stop().await;
}

#[actix::test]
async fn what_is_no_frame_closes_without_a_word() {
    let service = Service::with(|_| {}).await;
    for text in ["abc#{}", "#{}", "-1#{}", "0#", "5#{bad}", "NaN#{}", "1e3#{}"] {
        let mut raw = service.raw().await;
        raw.send(text).await;
        assert_eq!(raw.rest().await, "", "{text:?}");
        service.reports(&["bad_input", "tcp"]).await;
    }
    service.serves_others().await;
    service.stop().await;
}

/// NestJS drops the reply it owes; we send it before we close.
#[actix::test]
async fn a_fault_after_good_frames_does_not_lose_their_replies() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    let slow = frame(r#"{"pattern":"slow","data":100,"id":"s"}"#);
    raw.send(&format!("{slow}{}zz#{}", sum("a", &[1]), sum("never", &[1]))).await;
    assert_eq!(raw.frame().await, r#"{"response":1,"isDisposed":true,"id":"a"}"#);
    assert_eq!(raw.frame().await, r#"{"response":100,"isDisposed":true,"id":"s"}"#);
    assert_eq!(raw.rest().await, "");
    service.stop().await;
}

#[actix::test]
async fn ten_thousand_requests_in_one_write() {
    let service = Service::with(|_| {}).await;
    let raw = service.raw().await;
    let all: String = (0..10_000).map(|i| sum(&i.to_string(), &[i, 1])).collect();
    let (mut read, mut write) = raw.0.into_split();
    let writing = async { write.write_all(all.as_bytes()).await.unwrap() };
    let reading = async {
        let mut replies = Vec::new();
        while replies.iter().filter(|byte| **byte == b'#').count() < 10_000 {
            assert!(read.read_buf(&mut replies).await.unwrap() > 0);
        }
        replies
    };
    let ((), replies) = within(async { futures::join!(writing, reading) }).await.unwrap();
    let expected: String = (0..10_000)
        .map(|i| frame(&format!(r#"{{"response":{},"isDisposed":true,"id":"{i}"}}"#, i + 1)))
        .collect();
    // The last frame may still be on its way.
    assert!(expected.as_bytes().starts_with(&replies) && replies.len() > expected.len() - 64);
    service.stop().await;
}

#[actix::test]
async fn a_client_that_never_reads_costs_no_memory() {
    if alone() {
        return;
    }
    let service = Service::with(|_| {}).await;
    let memory = Memory::watch();
    let mut raw = service.raw().await;
    // Six gigabytes are asked for.
    let request = frame(r#"{"pattern":"big","data":64000,"id":"a"}"#);
    let all = request.repeat(100_000);
    let written = tokio::time::timeout(Duration::from_millis(500), raw.0.write_all(all.as_bytes())).await;
    assert!(written.is_err(), "the service goes on reading");
    let mut streaming = service.raw().await;
    streaming.send(&frame(r#"{"pattern":"infinite","data":1,"id":"a"}"#)).await;
    service.serves_others().await;
    let grown = memory.grown();
    assert!(grown < 64 << 20, "{grown} bytes more");
    drop(raw);
    service.serves_others().await;
    service.stop().await;
}

#[actix::test]
async fn ids_of_every_kind_come_back_as_they_were() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    for id in ["null", "0", "-0", r#""""#, "false", r#"{"b":1,"a":[]}"#, "[1]", "1e5", r#""\u0061\ud83d""#] {
        raw.send(&frame(&format!(r#"{{"pattern":"sum","data":[1],"id":{id}}}"#))).await;
        let reply = raw.frame().await;
        // A number may be written as JavaScript would; everything else is the same text.
        assert!(reply.starts_with(r#"{"response":1,"isDisposed":true,"id":"#), "{id}: {reply}");
        if !["-0", "1e5", r#""\u0061\ud83d""#].contains(&id) {
            assert_eq!(reply, format!(r#"{{"response":1,"isDisposed":true,"id":{id}}}"#));
        }
    }
    service.stop().await;
}

#[actix::test]
async fn duplicate_ids_are_all_answered() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    let slow = |ms| frame(&format!(r#"{{"pattern":"slow","data":{ms},"id":"d"}}"#));
    raw.send(&[slow(60), slow(20), sum("d", &[3])].concat()).await;
    for value in [3, 20, 60] {
        assert_eq!(raw.frame().await, format!(r#"{{"response":{value},"isDisposed":true,"id":"d"}}"#));
    }
    service.stop().await;
}

#[actix::test]
async fn values_that_are_no_packets_are_unknown_events() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    for text in ["null", "5", r#""sum""#, "[1]", "{}", r#"{"id":"x"}"#] {
        raw.send(&frame(text)).await;
        service.reports(&["no_event_handler", "Event pattern: undefined"]).await;
    }
    raw.stays_silent().await;
    raw.send(&sum("a", &[1])).await;
    assert_eq!(raw.frame().await, r#"{"response":1,"isDisposed":true,"id":"a"}"#);
    service.stop().await;
}

#[actix::test]
async fn nothing_of_a_cancellation_is_left_in_the_next_message() {
    let service = Service::with(|_| {}).await;
    let mut raw = service.raw().await;
    let cancel = frame(r#"{"pattern":"martlet.cancel","data":"nobody","metadata":{"a":"b"}}"#);
    raw.send(&[cancel, frame(r#"{"data":5}"#)].concat()).await;
    service.reports(&["no_event_handler", "Event pattern: undefined"]).await;
    service.stop().await;
}

/// The event by which a Martlet client cancels is no weapon against others.
#[actix::test]
async fn cancelling_reaches_only_the_own_connection() {
    let service = Service::with(|_| {}).await;
    let (mut victim, mut other) = (service.raw().await, service.raw().await);
    victim.send(&frame(r#"{"pattern":"slow","data":150,"id":"a"}"#)).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    for data in [r#""a""#, "null", "{}", r#"["a"]"#] {
        other.send(&frame(&format!(r#"{{"pattern":"martlet.cancel","data":{data}}}"#))).await;
    }
    assert_eq!(victim.frame().await, r#"{"response":150,"isDisposed":true,"id":"a"}"#);
    other.send(&sum("b", &[1])).await;
    assert_eq!(other.frame().await, r#"{"response":1,"isDisposed":true,"id":"b"}"#);
    service.stop().await;
}
