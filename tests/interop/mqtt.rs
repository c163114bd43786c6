// SPDX-License-Identifier: MIT OR Apache-2.0
//! What MQTT alone has: shared subscriptions, and handlers that cover their own reply topics.

use std::sync::atomic::Ordering;
use std::time::Duration;

use martlet::{Data, RpcError, message};
use serde_json::{Value, json};

use crate::behaviours;
use crate::pair::{Pair, start_service};
use crate::peer::eventually;
use crate::service::Service;
use crate::wire::Transport;

fn on_mqtt(_: u32, transport: Transport) -> bool {
    transport.is_mqtt()
}

behaviours! { TO_MARTLET:
    "shared subscription of a handler: each request once, the reply to the plain topic" [on_mqtt] shared_handler,
    "shared subscriptions of a service: each event once" [on_mqtt] shared_service,
    "a handler that covers its own reply topic runs once" [on_mqtt] own_replies,
}

behaviours! { TO_NEST:
    "shared subscription of a handler: each request once" [on_mqtt] shared_in_nest,
}

async fn shared_handler(pair: &Pair) {
    let (_, other) = start_service("other", &pair.place).await;
    pair.nest.hold(json!("shared/k")).await;
    let mut names = Vec::new();
    for _ in 0..40 {
        let sent = pair.nest.send(json!("shared/k"), json!(1)).await;
        assert_eq!(sent.0["completed"], true, "{sent:?}");
        names.extend(sent.0["items"].as_array().unwrap().clone());
    }
    assert_eq!(names.len(), 40);
    let of = |name: &str| names.iter().filter(|it| **it == name).count();
    assert!(of("ours") > 5 && of("other") > 5 && of("ours") + of("other") == 40, "{names:?}");
    pair.ours().seen.subjects.lock().unwrap().clear();
    for i in 0..20 {
        pair.nest.emit(json!(format!("sharedEvent/{i}")), json!(1)).await;
    }
    let counts = || [&pair.ours().seen, &other.seen].map(|seen| seen.subjects.lock().unwrap().len());
    eventually("20 events", || async { counts().iter().sum::<usize>() >= 20 }).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(counts().iter().sum::<usize>(), 20, "{:?}", counts());
    other.stop().await;
    pair.ours().seen.subjects.lock().unwrap().clear();
}

async fn shared_service(pair: &Pair) {
    let place = pair.elsewhere().await;
    let start = |name: &'static str| {
        let server = place.server_with(json!({ "sharedGroup": "workers" }));
        Service::start(name, place.transport, server, None)
    };
    let (one, two) = (start("one").await, start("two").await);
    let nest = place.nest(pair.version, "client", &[]).await;
    for i in 0..60 {
        nest.emit(json!("notification"), json!(i)).await;
    }
    let counts = || [&one, &two].map(|service| service.seen.notifications.load(Ordering::SeqCst));
    eventually("60 events", || async { counts().iter().sum::<u64>() >= 60 }).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(counts().iter().sum::<u64>(), 60, "{:?}", counts());
    assert!(counts().iter().all(|count| *count > 10), "{:?}", counts());
    // Its wildcards are in the group, too.
    nest.send(json!("time/us/east"), json!(1)).await.completes(json!(["time/us/east"]));
    drop(nest);
    one.stop().await;
    two.stop().await;
}

async fn own_replies(pair: &Pair) {
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counter = std::sync::Arc::clone(&runs);
    let covering = message("cover/#", move |Data(data): Data<Value>| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, RpcError>(data) }
    });
    let place = pair.elsewhere().await;
    let service = Service::with("covering", place.transport, place.server(), None, vec![covering]).await;
    let nest = place.nest(pair.version, "client", &[]).await;
    for i in 0..10 {
        nest.send(json!("cover/a/b"), json!(i)).await.completes(json!([i]));
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(runs.load(Ordering::SeqCst), 10);
    drop(nest);
    service.stop().await;
}

async fn shared_in_nest(pair: &Pair) {
    let other = pair.place.nest(pair.version, "server", &["--name", "other"]).await;
    let mut names: Vec<String> = Vec::new();
    for _ in 0..40 {
        names.push(pair.client().send("shared/k", 1).await.unwrap());
    }
    let of = |name: &str| names.iter().filter(|it| *it == name).count();
    assert!(of("nest") > 5 && of("other") > 5 && of("nest") + of("other") == 40, "{names:?}");
    drop(other);
}
