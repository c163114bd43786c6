// SPDX-License-Identifier: MIT OR Apache-2.0
//! Acknowledgement: NestJS's way, by the handler, and by a failure policy.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet_core::{
    Ctx, Data, FailurePolicy, HandlerGroup, LastResort, Microservice, RpcError, StartError, event, message,
};
use martlet_rabbitmq::{RmqContext, RmqQueueOptions, RmqServer, RmqServerOptions, SettleError};
use martlet_testkit::broker::Broker;
use parking_lot::Mutex;

use crate::raw::Raw;
use crate::world::{GRACE, client, client_options, serve, server_options, shared_broker, unique, until};

/// A queue whose dead letters go to another, which is declared.
async fn with_dead_letters(broker: &Broker) -> (Raw, String, String, RmqQueueOptions) {
    let raw = Raw::connect(broker).await;
    let (queue, dead) = (unique("work"), unique("dead"));
    raw.declare(&dead).await;
    let options = RmqQueueOptions::new().dead_letter_exchange("").dead_letter_routing_key(&dead);
    (raw, queue, dead, options)
}

fn acknowledging(broker: &Broker, queue: &str) -> RmqServerOptions {
    server_options(broker, queue).no_ack(false)
}

async fn until_waiting(raw: &Raw, queue: &str, count: u32) {
    for _ in 0..500 {
        if raw.waiting(queue).await == count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{count} messages expected in {queue}, there are {}", raw.waiting(queue).await);
}

type Failures = Arc<AtomicU64>;

/// Fails as often as it is told, then succeeds.
fn failing_times(times: u64, runs: &Failures) -> HandlerGroup {
    let runs = Arc::clone(runs);
    event("work", move |Data(_): Data<u64>| {
        let run = runs.fetch_add(1, Ordering::Relaxed);
        async move { if run < times { Err(RpcError::message("not yet")) } else { Ok(()) } }
    })
}

#[actix::test]
async fn without_a_policy_the_handler_acknowledges_from_any_thread() {
    let broker = shared_broker();
    let raw = Raw::connect(&broker).await;
    let queue = unique("manual");
    let held: Arc<Mutex<Vec<Arc<RmqContext>>>> = Arc::default();
    let hold = Arc::clone(&held);
    let group = message("work", move |Ctx(context): Ctx<RmqContext>| {
        hold.lock().push(context);
        async { Ok::<_, RpcError>("done") }
    });
    let (service, _) = serve(acknowledging(&broker, &queue), [group]).await;
    let client = client(&broker, &queue);
    for _ in 0..4 {
        assert_eq!(client.send::<String>("work", 1).await.unwrap(), "done");
    }
    let contexts = std::mem::take(&mut *held.lock());
    assert!(contexts.iter().all(|context| !context.is_settled()));
    // Out of order, from a thread that is no arbiter.
    let settled = std::thread::spawn(move || {
        contexts[2].ack().unwrap();
        contexts[0].ack().unwrap();
        contexts[1].reject(false).unwrap();
        assert_eq!(contexts[1].ack(), Err(SettleError::AlreadySettled));
        contexts
    });
    let contexts = settled.join().unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(service.stop(GRACE).await.clean);
    // What was not acknowledged is delivered again.
    until_waiting(&raw, &queue, 1).await;
    assert_eq!(contexts[3].ack(), Err(SettleError::SessionEnded));
    client.close().await;
}

#[actix::test]
async fn without_acknowledgement_there_is_nothing_to_settle() {
    let broker = shared_broker();
    let queue = unique("automatic");
    let group = message("work", async |Ctx(context): Ctx<RmqContext>| {
        Ok::<_, RpcError>(context.ack().unwrap_err().to_string())
    });
    let (service, _) = serve(server_options(&broker, &queue), [group]).await;
    let client = client(&broker, &queue);
    let error: String = client.send("work", 1).await.unwrap();
    assert!(error.contains("noAck"), "{error}");
    client.close().await;
    service.stop(GRACE).await;
    let refused = Microservice::new()
        .on_current_arbiter()
        .handlers(event("work", async || Ok::<_, RpcError>(())))
        .server(RmqServer::new(server_options(&broker, &queue).on_failure(FailurePolicy::Requeue)))
        .start()
        .await
        .unwrap_err();
    assert!(matches!(refused, StartError::FailurePolicy { .. }), "{refused}");
    assert!(refused.to_string().contains("noAck"), "{refused}");
}

#[actix::test]
async fn what_nobody_handles_or_can_read_is_dead_lettered() {
    let broker = shared_broker();
    let (raw, queue, dead, options) = with_dead_letters(&broker).await;
    let group =
        event("work", async |Ctx(context): Ctx<RmqContext>| context.ack().map_err(RpcError::unexpected));
    let (service, _) = serve(acknowledging(&broker, &queue).queue_options(options), [group]).await;
    for body in
        [r#"{"pattern":"other","data":1}"#, "not JSON", "5", r#"{"pattern":"other","data":1,"id":"1"}"#]
    {
        raw.publish(&queue, body, lapin::BasicProperties::default()).await;
    }
    until_waiting(&raw, &dead, 4).await;
    assert!(service.stop(GRACE).await.clean);
    assert_eq!(raw.waiting(&queue).await, 0);
}

#[actix::test]
async fn a_policy_settles_what_its_handler_did_not() {
    let broker = shared_broker();
    for (policy, failures, runs_expected, dead_expected) in [
        (FailurePolicy::Discard, 1, 1, 0),
        (FailurePolicy::DeadLetter, 1, 1, 1),
        (FailurePolicy::Requeue, 3, 4, 0),
        (FailurePolicy::retry(2).every(Duration::from_millis(10)), 2, 3, 0),
        (FailurePolicy::retry(2).every(Duration::from_millis(10)), 9, 3, 1),
        (FailurePolicy::retry(1).every(Duration::from_millis(10)).then(LastResort::Discard), 9, 2, 0),
        // It succeeds, and is acknowledged.
        (FailurePolicy::DeadLetter, 0, 1, 0),
    ] {
        let (raw, queue, dead, options) = with_dead_letters(&broker).await;
        let runs = Failures::default();
        let server = acknowledging(&broker, &queue).queue_options(options.clone()).on_failure(policy);
        let (service, _) = serve(server, [failing_times(failures, &runs)]).await;
        let client = martlet_rabbitmq::RmqClient::new(client_options(&broker, &queue).queue_options(options));
        client.emit("work", 1).await.unwrap();
        until("it has run", || runs.load(Ordering::Relaxed) == runs_expected).await;
        until_waiting(&raw, &dead, dead_expected).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(runs.load(Ordering::Relaxed), runs_expected, "{policy:?}");
        assert!(service.stop(GRACE).await.clean);
        assert_eq!(raw.waiting(&queue).await, 0, "{policy:?}");
        client.close().await;
    }
}

#[actix::test]
async fn a_handlers_own_policy_holds_without_one_of_the_server() {
    let broker = shared_broker();
    let raw = Raw::connect(&broker).await;
    let queue = unique("own-policy");
    let runs = Failures::default();
    let own = failing_times(1, &runs).on_failure(FailurePolicy::Requeue);
    let nests = event("nests", async || Ok::<_, RpcError>(()));
    let (service, _) = serve(acknowledging(&broker, &queue), [own, nests]).await;
    let client = client(&broker, &queue);
    client.emit("work", 1).await.unwrap();
    client.emit("nests", 1).await.unwrap();
    until("it has run twice", || runs.load(Ordering::Relaxed) == 2).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(service.stop(GRACE).await.clean);
    // The one of the handler without a policy was not acknowledged, the other one was.
    until_waiting(&raw, &queue, 1).await;
    client.close().await;
}

#[actix::test]
async fn a_handler_that_settles_by_itself_is_not_settled_again() {
    let broker = shared_broker();
    let (raw, queue, dead, options) = with_dead_letters(&broker).await;
    let group = event("work", async |Ctx(context): Ctx<RmqContext>, Data(acks): Data<bool>| {
        match acks {
            true => context.ack(),
            false => context.nack(false),
        }
        .map_err(RpcError::unexpected)?;
        // It fails all the same.
        if acks { Err(RpcError::message("failed")) } else { Ok(()) }
    });
    let server =
        acknowledging(&broker, &queue).queue_options(options.clone()).on_failure(FailurePolicy::DeadLetter);
    let (service, reports) = serve(server, [group]).await;
    let client = martlet_rabbitmq::RmqClient::new(client_options(&broker, &queue).queue_options(options));
    for acks in [true, false, true, false] {
        client.emit("work", acks).await.unwrap();
    }
    until_waiting(&raw, &dead, 2).await;
    assert!(!reports.contain("lost"), "{:?}", reports.all());
    assert!(service.stop(GRACE).await.clean);
    assert_eq!((raw.waiting(&queue).await, raw.waiting(&dead).await), (0, 2));
    client.close().await;
}

#[actix::test]
async fn what_a_stopping_service_does_not_finish_goes_back() {
    let broker = shared_broker();
    let raw = Raw::connect(&broker).await;
    let queue = unique("handed-back");
    let started = Failures::default();
    let count = Arc::clone(&started);
    let group = event("work", move || {
        count.fetch_add(1, Ordering::Relaxed);
        async {
            std::future::pending::<()>().await;
            Ok::<_, RpcError>(())
        }
    });
    let server = acknowledging(&broker, &queue).prefetch_count(3).on_failure(FailurePolicy::Discard);
    let (service, _) = serve(server, [group]).await;
    let client = client(&broker, &queue);
    for _ in 0..5 {
        client.emit("work", 1).await.unwrap();
    }
    until("three have begun", || started.load(Ordering::Relaxed) == 3).await;
    let report = service.stop(Duration::from_millis(100)).await;
    assert_eq!(report.handed_back(), 3, "{report:?}");
    until_waiting(&raw, &queue, 5).await;
    client.close().await;
}

#[actix::test]
async fn the_brokers_window_is_the_prefetch_count_or_the_in_flight_bound() {
    let broker = shared_broker();
    for (prefetch, in_flight, window) in [(0, 7, 7), (4, 7, 4)] {
        let raw = Raw::connect(&broker).await;
        let queue = unique("window");
        let group = event("work", async || {
            std::future::pending::<()>().await;
            Ok::<_, RpcError>(())
        });
        let server = acknowledging(&broker, &queue)
            .prefetch_count(prefetch)
            .max_in_flight(in_flight)
            .on_failure(FailurePolicy::Discard);
        let (service, _) = serve(server, [group]).await;
        let client = client(&broker, &queue);
        for _ in 0..100 {
            client.emit("work", 1).await.unwrap();
        }
        until_waiting(&raw, &queue, 100 - window).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(raw.waiting(&queue).await, 100 - window);
        service.stop(Duration::ZERO).await;
        until_waiting(&raw, &queue, 100).await;
        client.close().await;
    }
}
