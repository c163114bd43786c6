// SPDX-License-Identifier: MIT OR Apache-2.0
//! Servers behind a broker: subscriptions follow the routes, through route changes and reconnects.

use std::collections::HashSet;
use std::time::Duration;

use martlet_core::backoff::BackoffOptions;
use martlet_core::{CallError, ConnectionStatus, HandlerGroup, Pattern, message};

use super::{Harness, Names, Stage, eventually, ok, small};

fn says(pattern: Pattern, text: &'static str) -> HandlerGroup {
    message(pattern, move || async move { ok(text) })
}

/// A call goes to one of the services that serve its route, and only to those.
pub async fn two_services_share_the_calls_of_a_route<H: Harness>(mut harness: H) {
    let names = Names::new();
    let other = small()
        .handlers(says(names.of("who"), "other").extra("queue", "conformance"))
        .server(harness.server(Default::default()))
        .start()
        .await
        .unwrap();
    let group = says(names.of("who"), "one").extra("queue", "conformance");
    let stage = Stage::new(harness, small().handlers(group).handlers(says(names.of("mine"), "one"))).await;
    let mut who = HashSet::new();
    for _ in 0..200 {
        let all = stage.client.send::<String>(names.of("who"), 1).stream().collect_all().await.unwrap();
        assert_eq!(all.len(), 1, "one service answers");
        who.extend(all);
        assert_eq!(stage.client.send::<String>(names.of("mine"), 1).await.unwrap(), "one");
    }
    assert_eq!(who.len(), 2, "{who:?}");
    other.stop(Duration::from_secs(1)).await;
    for _ in 0..50 {
        assert_eq!(stage.client.send::<String>(names.of("who"), 1).await.unwrap(), "one");
    }
    stage.end().await;
}

/// Calls until somebody answers.
async fn answered<H: Harness>(stage: &Stage<H>, pattern: &Pattern) -> String {
    for _ in 0..1000 {
        let call = stage.client.send::<String>(pattern, 1).timeout(Duration::from_secs(1));
        if let Ok(reply) = call.await {
            return reply;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("{pattern} is not answered");
}

/// A route registered while the service runs is subscribed.
pub async fn a_route_registered_later_is_subscribed<H: Harness>(harness: H) {
    let names = Names::new();
    let stage = Stage::new(harness, small().handlers(says(names.of("early"), "early"))).await;
    for round in 0..20 {
        let pattern = names.of(&format!("late{round}"));
        stage.service.registry().register(vec![says(pattern.clone(), "late")]).await.unwrap();
        assert_eq!(answered(&stage, &pattern).await, "late");
    }
    assert_eq!(answered(&stage, &names.of("early")).await, "early");
    stage.end().await;
}

/// A route that was taken back is unsubscribed.
pub async fn an_unregistered_route_reaches_nobody<H: Harness>(harness: H) {
    let names = Names::new();
    let stage = Stage::new(harness, small().handlers(says(names.of("stays"), "stays"))).await;
    let id = stage.service.registry().register(vec![says(names.of("goes"), "goes")]).await.unwrap();
    assert_eq!(answered(&stage, &names.of("goes")).await, "goes");
    stage.service.registry().unregister(id).await.unwrap();
    for attempt in 0.. {
        let gone = stage.client.send::<String>(names.of("goes"), 1).timeout(Duration::from_secs(1)).await;
        if matches!(gone, Err(CallError::NoHandler { .. } | CallError::Timeout { .. })) {
            break;
        }
        assert!(attempt < 1000, "{gone:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(answered(&stage, &names.of("stays")).await, "stays");
    stage.end().await;
}

/// After a cut everything is subscribed again: what was there before, what came meanwhile; not what went.
pub async fn registrations_are_back_after_a_cut<H: Harness>(mut harness: H) {
    let names = Names::new();
    let cuts = harness.features().cuts;
    if !cuts {
        // The group `cuts` is promised apart; without it there is nothing to come back from.
        let server = harness.server(Default::default());
        let service = small().handlers(says(names.of("one"), "one")).server(server).start().await.unwrap();
        assert!(service.stop(Duration::from_secs(1)).await.clean);
        return;
    }
    let quick = BackoffOptions::between(Duration::from_millis(20), Duration::from_millis(50));
    let mut stage = Stage::with(
        harness,
        small().handlers(says(names.of("early"), "early")),
        |server| server.retry_delay = quick,
        |client| {
            client.retry_attempts = 100;
            client.retry_delay = quick;
        },
    )
    .await;
    let goes = stage.service.registry().register(vec![says(names.of("goes"), "goes")]).await.unwrap();
    assert_eq!(answered(&stage, &names.of("goes")).await, "goes");
    let server = stage.service.servers().remove(0);
    stage.harness.set_reachable(false);
    eventually("the server notices", || server.status() == Some(ConnectionStatus::Reconnecting)).await;
    stage.service.registry().register(vec![says(names.of("late"), "late")]).await.unwrap();
    stage.service.registry().unregister(goes).await.unwrap();
    stage.harness.set_reachable(true);
    for name in ["early", "late"] {
        assert_eq!(answered(&stage, &names.of(name)).await, name);
    }
    let gone = stage.client.send::<String>(names.of("goes"), 1).timeout(Duration::from_secs(1)).await;
    assert!(matches!(gone, Err(CallError::NoHandler { .. } | CallError::Timeout { .. })), "{gone:?}");
    assert!(stage.service.tree().find(&server.info().name).expect("in the tree").restarts > 0);
    stage.client.close().await;
    assert!(stage.service.stop(Duration::from_secs(5)).await.clean);
}

/// `*` is one token, `>` is all that follow.
pub async fn a_wildcard_route_receives_what_matches<H: Harness>(harness: H) {
    let names = Names::new();
    let service =
        small().handlers(says(names.of("time.us.*"), "us")).handlers(says(names.of("log.>"), "log"));
    let stage = Stage::new(harness, service).await;
    let send = |name: &str| stage.client.send::<String>(names.of(name), 1).timeout(Duration::from_secs(1));
    assert_eq!(send("time.us.east").await.unwrap(), "us");
    assert_eq!(send("time.us.west").await.unwrap(), "us");
    assert_eq!(send("log.a.b.c").await.unwrap(), "log");
    for nobody in ["time.us", "time.us.east.coast", "time.de.east", "log"] {
        let result = send(nobody).await;
        assert!(matches!(result, Err(CallError::NoHandler { .. } | CallError::Timeout { .. })), "{nobody}");
    }
    stage.end().await;
}
