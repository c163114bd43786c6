// SPDX-License-Identifier: MIT OR Apache-2.0
//! What lasts while a session has cancelled its consumer, or tries to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use martlet_core::{ConnectionStatus, RunningService};
use martlet_rabbitmq::{RmqClient, RmqQueueOptions, RmqServer, RmqServerOptions, RmqSocketOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
use martlet_testkit::world::Reports;

use crate::flood::{gated, publish};
use crate::raw::Raw;
use crate::world::{GRACE, client_options, dropped, serve_apart, server_options, sum, unique, until};

const MESSAGES: u64 = 1000;
const BYTES: usize = 32 * 1024;

async fn control(broker: &Broker, arguments: &[&str]) {
    broker.run_tool("/usr/lib/rabbitmq/bin/rabbitmqctl", arguments).await.unwrap();
}

fn small(options: RmqServerOptions) -> RmqServerOptions {
    let heartbeat = RmqSocketOptions::new().heartbeat_interval(Duration::from_secs(2));
    options.max_in_flight(20).receive_buffer_bytes(256 * 1024).socket_options(heartbeat)
}

/// For so long, the session does not end.
async fn lives(service: &RunningService, reports: &Reports, how_long: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < how_long {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(service.servers()[0].status(), Some(ConnectionStatus::Connected), "{:?}", reports.all());
    }
    assert!(!reports.contain("lost"), "{:?}", reports.all());
}

async fn handles_all(handled: &AtomicU64, reports: &Reports, messages: u64) {
    let limit = Instant::now() + Duration::from_secs(30);
    while handled.load(Ordering::Relaxed) + dropped(reports) < messages && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let handled = handled.load(Ordering::Relaxed);
    assert_eq!((handled, dropped(reports)), (messages, 0), "{:?}", reports.all());
}

/// Handlers take nothing for longer than the broker waits for an acknowledgement.
async fn outlasts(broker: &Broker, options: RmqQueueOptions, pause: Duration) {
    let queue = unique("pause");
    let (group, handled, open) = gated();
    let server = small(server_options(broker, &queue)).queue_options(options.clone());
    let (service, reports) = serve_apart(RmqServer::new(server), [group]).await;
    let client = RmqClient::new(client_options(broker, &queue).queue_options(options));
    publish(&client, MESSAGES, BYTES).await;
    lives(&service, &reports, pause).await;
    assert!(Raw::connect(broker).await.waiting(&queue).await > 0);
    open.store(true, Ordering::Relaxed);
    handles_all(&handled, &reports, MESSAGES).await;
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_pause_may_outlast_the_brokers_consumer_timeout() {
    // RMQ-19. The broker looks once a minute, unless it is told otherwise.
    let broker = Broker::start(BrokerCommand::rabbitmq_with("consumer_timeout = 15000", "")).unwrap();
    control(&broker, &["eval", "application:set_env(rabbit, channel_tick_interval, 500)."]).await;
    let counts = RmqQueueOptions::new().argument("x-queue-type", "quorum").argument("x-delivery-limit", 1);
    // The other queues refuse what comes back for a second time: whether in the pause or when it ends.
    let [ends, again] = [14, 24].map(|pause| outlasts(&broker, counts.clone(), Duration::from_secs(pause)));
    futures::join!(outlasts(&broker, RmqQueueOptions::new(), Duration::from_secs(20)), ends, again);
}

#[actix::test]
async fn of_a_queue_that_is_deleted_in_a_pause_it_is_said_what_is_lost() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("pause-deleted");
    let (group, _, open) = gated();
    let (service, reports) =
        serve_apart(RmqServer::new(small(server_options(&broker, &queue))), [group]).await;
    let client = RmqClient::new(client_options(&broker, &queue));
    publish(&client, MESSAGES, BYTES).await;
    lives(&service, &reports, Duration::from_secs(2)).await;
    Raw::connect(&broker).await.delete(&queue).await;
    let lost = |line: &String| {
        line.contains("its queue was deleted; ") && line.contains(" messages that waited here are lost")
    };
    until("it is said", || reports.all().iter().any(lost)).await;
    open.store(true, Ordering::Relaxed);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_service_is_drained_by_a_broker_that_does_not_answer() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("frozen-drain");
    let (group, handled, open) = gated();
    // Nobody notices by heartbeats.
    let never = RmqSocketOptions::new().heartbeat_interval(Duration::ZERO);
    let server = small(server_options(&broker, &queue)).socket_options(never);
    let (service, reports) = serve_apart(RmqServer::new(server), [group]).await;
    let client = RmqClient::new(client_options(&broker, &queue));
    publish(&client, MESSAGES, BYTES).await;
    client.close().await;
    lives(&service, &reports, Duration::from_secs(3)).await;
    broker.freeze().unwrap();
    open.store(true, Ordering::Relaxed);
    // It wants to consume again, and gets no answer.
    let mut before = 0;
    until("what was here is handled", || {
        let now = handled.load(Ordering::Relaxed);
        now > 20 && now == std::mem::replace(&mut before, now)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let begin = Instant::now();
    let report = service.stop(Duration::from_secs(30)).await;
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}: {report:?}", begin.elapsed());
    assert!(report.clean, "{report:?}");
    broker.thaw().unwrap();
}

#[actix::test]
async fn a_broker_that_blocks_is_held_back_rather_than_its_messages_dropped() {
    // RMQ-19: it gives up a peer that takes nothing for 15 s.
    let options = |options: RmqServerOptions| options.backlog_bytes(24 << 20);
    blocks(options, MESSAGES * 2, BYTES, Duration::from_secs(20)).await;
}

#[actix::test]
async fn of_a_broker_that_blocks_small_messages_are_read_too_and_heartbeats_behind_them() {
    // More than what is between broker and service, of less than a gate opens for.
    let options = |options: RmqServerOptions| options.receive_buffer_bytes(1 << 20);
    blocks(options, 120_000, 20, Duration::from_secs(10)).await;
}

async fn blocks(
    options: impl Fn(RmqServerOptions) -> RmqServerOptions,
    messages: u64,
    bytes: usize,
    how_long: Duration,
) {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("blocked-pause");
    let caller = RmqClient::new(client_options(&broker, &queue));
    let client = RmqClient::new(client_options(&broker, &queue));
    caller.connect().await.unwrap();
    // Its reply is what the broker blocks the service for.
    let call = tokio::task::spawn_local(caller.send::<i64>("sum", [1, 2]).timeout(Duration::from_secs(60)));
    let raw = Raw::connect(&broker).await;
    tokio::time::timeout(Duration::from_secs(5), async {
        while raw.waiting(&queue).await == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    publish(&client, messages, bytes).await;
    control(&broker, &["set_disk_free_limit", "1000000GB"]).await;
    let (group, handled, open) = gated();
    let server = options(small(server_options(&broker, &queue)));
    let (service, reports) = serve_apart(RmqServer::new(server), [group, sum()]).await;
    lives(&service, &reports, how_long).await;
    assert_eq!(dropped(&reports), 0, "{:?}", reports.all());
    assert!(raw.waiting(&queue).await > 0);
    control(&broker, &["set_disk_free_limit", "1MB"]).await;
    assert_eq!(call.await.unwrap().unwrap(), 3);
    open.store(true, Ordering::Relaxed);
    handles_all(&handled, &reports, messages).await;
    // Said when it reads again.
    assert!(reports.contain("the broker has blocked publishing"), "{:?}", reports.all());
    for client in [client, caller] {
        client.close().await;
    }
    assert!(service.stop(GRACE).await.clean);
}
