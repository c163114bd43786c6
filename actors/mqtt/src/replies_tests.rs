// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use futures::task::noop_waker;
use martlet_core::payload::{Format, Payload};
use martlet_core::{Headers, Metadata, Pattern};

use super::*;

fn id(number: u32) -> PacketId {
    PacketId::from_text(format!("0abcdef00000007{number:06x}").as_bytes()).unwrap()
}

fn message(pattern: &str, number: u32) -> OutboundMessage {
    OutboundMessage {
        id: Some(id(number)),
        pattern: Pattern::from(pattern),
        data: Payload::new(Format::Json, Bytes::from_static(b"1")),
        metadata: Metadata::new(),
        timeout: None,
        headers: Headers::new(),
    }
}

fn ids(messages: Vec<OutboundMessage>) -> Vec<PacketId> {
    messages.into_iter().map(|message| message.id.unwrap()).collect()
}

fn poll_idle(replies: &mut Replies) -> Vec<String> {
    replies.poll_idle(&mut Context::from_waker(&noop_waker()))
}

/// MQTT-9.
#[tokio::test(start_paused = true)]
async fn a_request_waits_for_its_reply_topic_and_later_ones_do_not() {
    let mut replies = Replies::new(Duration::from_secs(1));
    let Next::Subscribe(key, filter) = replies.request(id(1), message("a", 1)) else { panic!() };
    assert_eq!(filter, "a/reply");
    assert!(matches!(replies.request(id(2), message("a", 2)), Next::Wait));
    assert!(matches!(replies.request(id(3), message("a", 3)), Next::Wait));
    assert!(replies.waiting_bytes() > 0);
    // Given up before it was sent.
    assert!(replies.end(&id(2)));
    assert!(!replies.end(&id(2)));
    assert_eq!(ids(replies.subscribed(key)), [id(1), id(3)]);
    assert_eq!(replies.waiting_bytes(), 0);
    assert!(matches!(replies.request(id(4), message("a", 4)), Next::Publish(_)));
    assert!(replies.is_ours(&id(99)));
    assert!(!replies.is_ours(&PacketId::from_text(b"fffffff00000007000001").unwrap()));
}

/// MQTT-24.
#[tokio::test(start_paused = true)]
async fn what_was_not_published_or_has_its_reply_is_not_cancelled() {
    let mut replies = Replies::new(Duration::from_secs(1));
    let Next::Subscribe(key, _) = replies.request(id(1), message("a", 1)) else { panic!() };
    replies.request(id(2), message("a", 2));
    assert!(!replies.cancel(&id(1)));
    assert_eq!(ids(replies.subscribed(key)), [id(2)]);
    replies.request(id(3), message("a", 3));
    assert!(replies.cancel(&id(2)) && !replies.cancel(&id(2)));
    assert!(replies.end(&id(3)) && !replies.cancel(&id(3)));
}

/// MQTT-9.
#[tokio::test(start_paused = true)]
async fn a_reply_topic_is_given_up_when_nobody_has_used_it_for_long_enough() {
    let mut replies = Replies::new(Duration::from_secs(4));
    for (number, pattern) in [(1, "a"), (2, "b")] {
        let Next::Subscribe(key, _) = replies.request(id(number), message(pattern, number)) else { panic!() };
        replies.subscribed(key);
    }
    replies.end(&id(1));
    assert!(poll_idle(&mut replies).is_empty());
    tokio::time::advance(Duration::from_millis(3999)).await;
    assert!(poll_idle(&mut replies).is_empty());
    tokio::time::advance(Duration::from_millis(2)).await;
    assert_eq!(poll_idle(&mut replies), ["a/reply"]);
    // One in use stays, however long.
    tokio::time::advance(Duration::from_secs(100)).await;
    assert!(poll_idle(&mut replies).is_empty());
    assert_eq!(replies.filters(), ["b/reply"]);
    // One that was used meanwhile gets its time anew.
    replies.end(&id(2));
    assert!(poll_idle(&mut replies).is_empty());
    tokio::time::advance(Duration::from_secs(3)).await;
    assert!(matches!(replies.request(id(5), message("b", 5)), Next::Publish(_)));
    replies.end(&id(5));
    tokio::time::advance(Duration::from_millis(1100)).await;
    assert!(poll_idle(&mut replies).is_empty());
    tokio::time::advance(Duration::from_secs(3)).await;
    assert_eq!(poll_idle(&mut replies), ["b/reply"]);
    assert!(matches!(replies.request(id(6), message("b", 6)), Next::Subscribe(..)));
}

#[tokio::test(start_paused = true)]
async fn a_refused_reply_topic_ends_the_calls_that_wait_for_it() {
    let mut replies = Replies::new(Duration::from_secs(1));
    let Next::Subscribe(key, _) = replies.request(id(1), message("a", 1)) else { panic!() };
    replies.request(id(2), message("a", 2));
    let mut ended = replies.refused(key);
    ended.sort_by_key(|id| id.to_string());
    assert_eq!(ended, [id(1), id(2)]);
    assert_eq!(replies.waiting_bytes(), 0);
    // The next one asks again.
    assert!(matches!(replies.request(id(3), message("a", 3)), Next::Subscribe(..)));
}
