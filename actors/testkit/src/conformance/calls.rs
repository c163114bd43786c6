// SPDX-License-Identifier: MIT OR Apache-2.0
//! The caller's side: one outcome for every call, and nothing left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use martlet_core::{
    CallError, Cancellation, Data, EmitMessage, HandlerGroup, Pattern, Payload, RpcError, SendMessage,
    Streaming, message,
};

use super::{Harness, Names, Stage, eventually, moment, ok, small};

/// Answers after so many milliseconds.
pub(super) fn slow(pattern: Pattern) -> HandlerGroup {
    message(pattern, |Data(millis): Data<u64>| async move {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        ok(millis)
    })
}

/// A call is lazy: made and dropped, it never was.
pub async fn nothing_is_sent_until_a_call_is_polled<H: Harness>(harness: H) {
    let names = Names::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    let group = message(names.of("count"), move || {
        count.fetch_add(1, Ordering::Relaxed);
        async { ok(1) }
    });
    let stage = Stage::new(harness, small().handlers(group)).await;
    let call = stage.client.send::<u64>(names.of("count"), 1);
    let stream = stage.client.send::<u64>(names.of("count"), 1).stream();
    moment().await;
    assert_eq!(stage.client.status(), None, "not even connected");
    assert_eq!(stage.client.occupied(), 0);
    drop(stream);
    call.await.unwrap();
    assert_eq!(ran.load(Ordering::Relaxed), 1);
    stage.end().await;
}

/// The timeout is the call's own or the client's; the late reply is dropped and counted.
pub async fn a_call_times_out<H: Harness>(harness: H) {
    let names = Names::new();
    let cancels = harness.features().cancel;
    let metadata = harness.features().metadata;
    let stage = Stage::with(
        harness,
        small().handlers(slow(names.of("slow"))),
        |_| {},
        |client| {
            client.timeout = Some(Duration::from_millis(150));
            client.propagate = false;
        },
    )
    .await;
    let call = || stage.client.send::<u64>(names.of("slow"), 400);
    match call().await {
        Err(CallError::Timeout { after }) => assert_eq!(after, Duration::from_millis(150)),
        other => panic!("a timeout expected, got {other:?}"),
    }
    assert_eq!(stage.client.occupied(), 0);
    match call().timeout(Duration::from_millis(20)).await {
        Err(CallError::Timeout { after }) => assert_eq!(after, Duration::from_millis(20)),
        other => panic!("a timeout expected, got {other:?}"),
    }
    assert_eq!(call().timeout(Duration::from_secs(20)).await.unwrap(), 400);
    assert_eq!(call().no_timeout().await.unwrap(), 400);
    if !cancels && !metadata {
        eventually("late replies are counted", || stage.client.late_replies() == 2).await;
    }
    stage.end().await;
}

/// For a stream the limit is on each reply, not on all of them.
pub async fn a_stream_times_out_between_replies<H: Harness>(harness: H) {
    let names = Names::new();
    let group = message(names.of("ticks"), || async {
        ok(Streaming(stream::iter([150u64, 150, 150, 150, 60_000, 0]).then(|millis| async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            millis
        })))
    });
    let cancels = harness.features().cancel;
    let stage = Stage::new(harness, small().handlers(group)).await;
    // Connecting may take longer than that.
    stage.client.connect().await.unwrap();
    // Less than all of them take, and far more than one does, on a busy machine too.
    let limit = Duration::from_millis(500);
    let mut replies = stage.client.send::<u64>(names.of("ticks"), 1).timeout(limit).stream();
    for _ in 0..4 {
        assert_eq!(replies.next().await.unwrap().unwrap(), 150);
    }
    assert!(matches!(replies.next().await, Some(Err(CallError::Timeout { .. }))));
    assert!(replies.next().await.is_none());
    assert_eq!(stage.client.occupied(), 0);
    stage.client.close().await;
    // Without cancellation on the wire, the handler's stream is still under way.
    let grace = if cancels { Duration::from_secs(5) } else { Duration::ZERO };
    stage.service.stop(grace).await;
}

/// Dropping a call at any stage leaves no slot behind, and others undisturbed.
pub async fn a_dropped_call_frees_its_slot<H: Harness>(harness: H) {
    let names = Names::new();
    let stage = Stage::new(harness, small().handlers(slow(names.of("slow")))).await;
    let mut calls: Vec<_> = (0..50).map(|_| stage.client.send::<u64>(names.of("slow"), 50)).collect();
    for call in &mut calls {
        assert!(call.now_or_never().is_none());
    }
    assert_eq!(stage.client.pending(), 50);
    calls.truncate(25);
    assert_eq!(stage.client.pending(), 25);
    let mut more: Vec<_> = (0..25).map(|_| stage.client.send::<u64>(names.of("slow"), 51)).collect();
    for call in &mut more {
        assert!(call.now_or_never().is_none());
    }
    moment().await;
    more.truncate(10);
    assert_eq!(futures::future::try_join_all(calls).await.unwrap(), [50; 25]);
    assert_eq!(futures::future::try_join_all(more).await.unwrap(), [51; 10]);
    assert_eq!(stage.client.occupied(), 0);
    stage.end().await;
}

/// A call ends as cancelled when its token is, before and after it was sent.
pub async fn a_token_cancels_a_call<H: Harness>(harness: H) {
    let names = Names::new();
    let group = slow(names.of("slow"));
    let tokens = Arc::new(parking_lot::Mutex::new(Vec::<Cancellation>::new()));
    let keep = Arc::clone(&tokens);
    // A token of a request of our own is cancelled when that request's caller goes away.
    let lend = message(names.of("lend"), move |token: Cancellation| {
        keep.lock().push(token);
        std::future::pending::<Result<(), RpcError>>()
    });
    let mut stage = Stage::new(harness, small().handlers(group).handlers(lend)).await;
    let options = stage.harness.client_options();
    let lender = stage.harness.client(&stage.service.url(), options);
    let lent = actix_rt::spawn({
        let lender = lender.clone();
        async move { lender.send::<()>(names.of("lend"), 1).await }
    });
    eventually("the token was lent", || tokens.lock().len() == 1).await;
    let token = tokens.lock().pop().unwrap();
    let mut call = stage.client.send::<u64>(names.of("slow"), 300).cancel_on(token.clone());
    assert!((&mut call).now_or_never().is_none());
    moment().await;
    assert!(!token.is_cancelled());
    if stage.harness.features().subscribes && !stage.harness.features().cancel {
        // Behind a broker a service does not see its callers go.
        drop(call);
        lender.close().await;
        drop(lent);
        stage.client.close().await;
        stage.service.stop(Duration::ZERO).await;
        return;
    }
    lent.abort();
    if !stage.harness.features().cancel {
        lender.close().await;
    }
    assert!(matches!(call.await, Err(CallError::Cancelled)));
    let born_cancelled = stage.client.send::<u64>(names.of("slow"), 300).cancel_on(token);
    assert!(matches!(born_cancelled.await, Err(CallError::Cancelled)));
    assert_eq!(stage.client.occupied(), 0);
    lender.close().await;
    stage.client.close().await;
    stage.service.stop(Duration::from_secs(1)).await;
}

/// One call above `max_pending` is refused at once and was not sent; a place that is freed is taken.
pub async fn pending_calls_are_bounded<H: Harness>(harness: H) {
    let names = Names::new();
    let stage = Stage::with(
        harness,
        small().handlers(slow(names.of("slow"))),
        |_| {},
        |client| client.max_pending = 4,
    )
    .await;
    let mut calls: Vec<_> = (0..4).map(|_| stage.client.send::<u64>(names.of("slow"), 100)).collect();
    for call in &mut calls {
        assert!(call.now_or_never().is_none());
    }
    match stage.client.send::<u64>(names.of("slow"), 1).await {
        Err(error @ CallError::Overloaded { bound: "max_pending", limit: 4 }) => assert!(error.is_not_sent()),
        other => panic!("overload expected, got {other:?}"),
    }
    assert!(matches!(stage.client.emit(names.of("slow"), 1).await, Err(CallError::Overloaded { .. })));
    drop(calls.pop());
    assert_eq!(stage.client.send::<u64>(names.of("slow"), 1).await.unwrap(), 1);
    assert_eq!(futures::future::try_join_all(calls).await.unwrap(), [100; 3]);
    stage.end().await;
}

/// A caller that does not read its stream ends with overload; its line goes on for others.
pub async fn unread_replies_are_bounded<H: Harness>(harness: H) {
    let names = Names::new();
    let count =
        message(names.of("count"), |Data(to): Data<u64>| async move { ok(Streaming(stream::iter(0..to))) });
    let stage =
        Stage::with(harness, small().handlers(count), |_| {}, |client| client.max_buffered_replies = 10)
            .await;
    let call = |to: u64| stage.client.send::<u64>(names.of("count"), to);
    let mut unread = call(500).stream();
    assert!(unread.next().now_or_never().is_none());
    eventually("the call has ended", || stage.client.pending() == 0).await;
    assert_eq!(call(1).await.unwrap(), 0, "others go on");
    for expected in 0..10 {
        assert_eq!(unread.next().await.unwrap().unwrap(), expected);
    }
    let end = unread.next().await;
    assert!(
        matches!(end, Some(Err(CallError::Overloaded { bound: "max_buffered_replies", limit: 10 }))),
        "{end:?}"
    );
    assert!(unread.next().await.is_none());
    stage.end().await;
}

/// How a remote error and a response become values can be replaced.
pub async fn errors_and_responses_can_be_mapped<H: Harness>(harness: H) {
    let names = Names::new();
    let service = small()
        .handlers(message(names.of("fail"), || async { Err::<(), _>(RpcError::message("boom")) }))
        .handlers(message(names.of("wrapped"), || async { ok(serde_json::json!({"value": 5})) }));
    let stage = Stage::with(
        harness,
        service,
        |_| {},
        |client| {
            *client = client
                .clone()
                .map_error(|error| match error.message().as_deref() {
                    Some("boom") => CallError::NoValue,
                    _ => CallError::Remote(error),
                })
                .map_response(|payload| {
                    let value = payload.property("value").ok().flatten();
                    Ok(value.unwrap_or(payload))
                });
        },
    )
    .await;
    assert!(matches!(stage.client.send::<()>(names.of("fail"), 1).await, Err(CallError::NoValue)));
    assert_eq!(stage.client.send::<u64>(names.of("wrapped"), 1).await.unwrap(), 5);
    stage.end().await;
}

/// Actors message the client itself.
pub async fn a_client_is_an_address<H: Harness>(harness: H) {
    let names = Names::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    let double = message(names.of("double"), move |Data(number): Data<i64>| {
        count.fetch_add(1, Ordering::Relaxed);
        async move { ok(number * 2) }
    });
    let stage = Stage::new(harness, small().handlers(double).handlers(slow(names.of("slow")))).await;
    let address = stage.client.address().unwrap();
    let format = stage.client.transport().format;
    let data = |number: u64| Payload::encode(format, &number).unwrap();
    let send = SendMessage { pattern: names.of("double"), data: data(21), timeout: None };
    let reply = address.send(send).await.unwrap().unwrap();
    assert_eq!(reply.decode::<i64>().unwrap(), 42);
    let limit = Some(Duration::from_millis(20));
    let send = SendMessage { pattern: names.of("slow"), data: data(100), timeout: limit };
    assert!(matches!(address.send(send).await.unwrap(), Err(CallError::Timeout { .. })));
    address.send(EmitMessage { pattern: names.of("double"), data: data(1) }).await.unwrap().unwrap();
    eventually("the event arrived", || ran.load(Ordering::Relaxed) == 2).await;
    stage.end().await;
}
