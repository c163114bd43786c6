// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bounds of the serving side: overload is answered, or reading stops; nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use martlet_core::{
    CallError, Data, HandlerGroup, HandlerInfo, HandlerKind, Outcome, Reply, Request, message,
};

use super::calls::slow;
use super::{Harness, Names, Stage, ok, small, watch};

fn overloaded(result: &Result<u64, CallError>) -> bool {
    match result {
        Ok(_) => false,
        Err(CallError::Remote(error)) => {
            assert_eq!(error.message().as_deref(), Some("Service overloaded"));
            true
        }
        Err(other) => panic!("a value or overload expected, got {other}"),
    }
}

/// `concurrency(1)` with two waiting places: three are served, the rest is answered at once.
pub async fn a_full_waiting_room_answers_overload<H: Harness>(harness: H) {
    let names = Names::new();
    let group = slow(names.of("slow")).concurrency(1).supervision(|supervision| supervision.max_waiting = 2);
    let stage = Stage::new(harness, small().handlers(group)).await;
    let seen = watch(stage.service.events());
    let calls = (0..10).map(|_| stage.client.send::<u64>(names.of("slow"), 100));
    let results = futures::future::join_all(calls).await;
    assert_eq!(results.iter().filter(|result| overloaded(result)).count(), 7);
    assert!(seen("bound_hit") > 0);
    assert_eq!(stage.client.send::<u64>(names.of("slow"), 1).await.unwrap(), 1);
    stage.end().await;
}

/// A replica whose mailbox is full refuses; every request is answered.
pub async fn a_full_mailbox_answers_overload<H: Harness>(harness: H) {
    let names = Names::new();
    let info = HandlerInfo::new("busy", HandlerKind::Message, names.of("busy"));
    // It blocks its arbiter, so that messages from another one pile up.
    let group = HandlerGroup::from_parts("busy", vec![info], |_| {
        vec![Box::new(|request: Request| {
            std::thread::sleep(Duration::from_millis(2));
            Outcome::Ready(Ok(Reply::Value(request.payload())))
        })]
    });
    let group = group.singleton().supervision(|supervision| supervision.mailbox_capacity = 4);
    // The sessions are placed in turn, the singleton lives on the first arbiter.
    let service = martlet_core::Microservice::new().arbiters(2).handlers(group);
    let mut stage = Stage::new(harness, service).await;
    let seen = watch(stage.service.events());
    let options = stage.harness.client_options();
    let other = stage.harness.client(&stage.service.url(), options);
    let calls = (0..400u64).map(|number| {
        let call = if number % 2 == 0 { &stage.client } else { &other }.send::<u64>(names.of("busy"), number);
        async move {
            // What a session reads in one turn is one message: they come one by one.
            tokio::time::sleep(Duration::from_millis(number)).await;
            call.await
        }
    });
    let results = futures::future::join_all(calls).await;
    let refused = results.iter().filter(|result| overloaded(result)).count();
    assert!(refused > 0, "nothing was refused");
    assert!(refused < results.len(), "nothing was served");
    // Requests that were read in one turn are refused, and reported, as one.
    assert!((1..=refused).contains(&seen("bound_hit")), "{} reports, {refused} refused", seen("bound_hit"));
    other.close().await;
    stage.end().await;
}

/// With `max_in_flight` 3 there are never four at work, and all are answered.
pub async fn in_flight_requests_are_bounded_and_all_answered<H: Harness>(harness: H) {
    let names = Names::new();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (busy, peak) = (Arc::clone(&now), Arc::clone(&most));
    let group = message(names.of("work"), move |Data(number): Data<u64>| {
        let (busy, peak) = (Arc::clone(&busy), Arc::clone(&peak));
        async move {
            peak.fetch_max(busy.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(3)).await;
            busy.fetch_sub(1, Ordering::SeqCst);
            ok(number)
        }
    });
    let stage =
        Stage::with(harness, small().handlers(group), |server| server.max_in_flight = 3, |_| {}).await;
    let seen = watch(stage.service.events());
    let calls = (0..120u64).map(|number| stage.client.send::<u64>(names.of("work"), number));
    let replies = futures::future::try_join_all(calls).await.unwrap();
    assert_eq!(replies, (0..120).collect::<Vec<_>>());
    assert_eq!(most.load(Ordering::SeqCst), 3);
    assert_eq!(seen("bound_hit"), 1, "reported once per session");
    stage.end().await;
}
