// SPDX-License-Identifier: MIT OR Apache-2.0
//! RMQ-20: who hears of cancelled calls, and who does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use martlet_core::{ClientProxy, HandlerGroup, RpcError, message};
use martlet_rabbitmq::{RmqClient, RmqClientOptions, RmqServer, RmqServerOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};

use crate::raw::Raw;
use crate::world::{
    GRACE, client_options, serve, serve_apart, server_options, shared_broker, sum, unique, until,
};

/// Handles `endless`, and says how many of it run.
fn endless() -> (HandlerGroup, impl Fn() -> usize) {
    struct Run(Arc<AtomicUsize>);
    impl Drop for Run {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let running = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&running);
    let group = message("endless", move || {
        count.fetch_add(1, Ordering::Relaxed);
        let run = Run(Arc::clone(&count));
        async move {
            std::future::pending::<()>().await;
            drop(run);
            Ok::<_, RpcError>(())
        }
    });
    (group, move || running.load(Ordering::Relaxed))
}

fn server(broker: &Broker, queue: &str) -> RmqServerOptions {
    server_options(broker, queue).cancellation(true)
}

fn client(broker: &Broker, queue: &str) -> RmqClientOptions {
    client_options(broker, queue).cancellation(true)
}

/// Calls, and gives up as soon as the handler runs.
async fn give_up(client: &ClientProxy, running: &impl Fn() -> usize) {
    let before = running();
    let mut call = client.send::<()>("endless", 1);
    assert!((&mut call).now_or_never().is_none());
    until("it runs", || running() > before).await;
}

async fn answers(client: &ClientProxy) {
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
}

#[actix::test]
async fn a_client_goes_on_telling_when_services_come_and_go() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("cancel");
    let caller = RmqClient::new(client(&broker, &queue));
    for _ in 0..2 {
        let (group, running) = endless();
        let (service, reports) = serve(server(&broker, &queue), [group, sum()]).await;
        give_up(&caller, &running).await;
        until("it was stopped", || running() == 0).await;
        assert!(service.stop(GRACE).await.clean);
        // The exchange has gone with its service: nobody hears of this one, and nothing comes of that.
        let nobody = caller.send::<()>("sum", 1).timeout(Duration::from_millis(100)).await;
        assert!(nobody.is_err(), "{nobody:?}");
        assert!(!reports.contain("cancel"), "{:?}", reports.all());
    }
    caller.close().await;
}

#[actix::test]
async fn only_the_service_that_has_the_request_stops() {
    let broker = shared_broker();
    let (queue, other) = (unique("cancel-one"), unique("cancel-other"));
    let (group, running) = endless();
    let (others, others_running) = endless();
    let (twins, twins_running) = endless();
    let (service, _) = serve(server(&broker, &queue), [group, sum()]).await;
    let (second, _) = serve(server(&broker, &other), [others, sum()]).await;
    let (caller, second_caller) =
        (RmqClient::new(client(&broker, &queue)), RmqClient::new(client(&broker, &other)));
    let mut stays = second_caller.send::<()>("endless", 1);
    assert!((&mut stays).now_or_never().is_none());
    until("the other runs", || others_running() == 1).await;
    give_up(&caller, &running).await;
    until("it was stopped", || running() == 0).await;
    assert_eq!(others_running(), 1);
    // Of two services on one queue both are told.
    let (twin, _) = serve(server(&broker, &queue), [twins, sum()]).await;
    let mut calls = Vec::new();
    for number in 1..=4 {
        let mut call = caller.send::<()>("endless", 1);
        assert!((&mut call).now_or_never().is_none());
        calls.push(call);
        until("it runs", || running() + twins_running() == number).await;
    }
    assert_eq!((running(), twins_running()), (2, 2));
    for left in (0..4).rev() {
        drop(calls.pop());
        until("it was stopped", || running() + twins_running() <= left).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        // They were given in turn.
        assert_eq!((running() + twins_running(), running().abs_diff(twins_running())), (left, left % 2));
    }
    assert_eq!(others_running(), 1);
    drop(stays);
    until("the other was stopped", || others_running() == 0).await;
    for client in [caller, second_caller] {
        client.close().await;
    }
    for service in [service, second, twin] {
        assert!(service.stop(GRACE).await.clean);
    }
}

#[actix::test]
async fn without_the_option_nothing_is_declared_and_nothing_told() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("cancel-off");
    let (group, running) = endless();
    let (service, reports) = serve(server_options(&broker, &queue), [group, sum()]).await;
    let silent = RmqClient::new(client_options(&broker, &queue));
    give_up(&silent, &running).await;
    answers(&silent).await;
    let raw = Raw::connect(&broker).await;
    let options = lapin::options::ExchangeDeclareOptions { passive: true, ..Default::default() };
    let declared = raw
        .channel
        .exchange_declare("martlet.cancel".into(), lapin::ExchangeKind::Direct, options, Default::default())
        .await;
    assert!(declared.is_err());
    // Nothing would be lost if a service with it were there.
    let raw = Raw::connect(&broker).await;
    let heard = unique("cancel-heard");
    raw.declare(&heard).await;
    let options = lapin::options::ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
    let (exchange, direct) = ("martlet.cancel", lapin::ExchangeKind::Direct);
    raw.channel.exchange_declare(exchange.into(), direct, options, Default::default()).await.unwrap();
    let (from, to, by) = (exchange.into(), heard.as_str().into(), queue.as_str().into());
    raw.channel.queue_bind(to, from, by, Default::default(), Default::default()).await.unwrap();
    give_up(&silent, &running).await;
    answers(&silent).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(raw.waiting(&heard).await, 0);
    // A service without it, NestJS's for one, gets no message that it does not know.
    let telling = RmqClient::new(client(&broker, &queue));
    give_up(&telling, &running).await;
    answers(&telling).await;
    let heard = raw.consume(&heard).await.next().await;
    assert!(!heard.data.is_empty());
    assert_eq!(running(), 3);
    assert!(reports.all().is_empty(), "{:?}", reports.all());
    for client in [silent, telling] {
        client.close().await;
    }
    service.stop(Duration::from_millis(10)).await;
}

#[actix::test]
async fn a_request_that_has_not_left_is_not_sent() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("cancel-unsent");
    let (group, running) = endless();
    let (service, _) = serve(server_options(&broker, &queue), [group, sum()]).await;
    // One at a time: the second waits until the broker has confirmed the first.
    let caller = RmqClient::new(client_options(&broker, &queue).max_unconfirmed(1));
    answers(&caller).await;
    broker.freeze().unwrap();
    let (mut first, mut second) = (caller.send::<i64>("sum", [1, 2]), caller.send::<()>("endless", 1));
    assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(second);
    tokio::time::sleep(Duration::from_millis(200)).await;
    broker.thaw().unwrap();
    assert_eq!(first.await.unwrap(), 3);
    answers(&caller).await;
    assert_eq!(running(), 0);
    caller.close().await;
    assert!(service.stop(GRACE).await.clean);
}

/// With permissions to configure and to write, service and client work, and each says once what it lacks.
async fn restricted(broker: &Broker, user: &str, configure: &str, write: &str, deaf: bool) {
    let control = async |arguments: &[&str]| {
        broker.run_tool("/usr/lib/rabbitmq/bin/rabbitmqctl", arguments).await.unwrap();
    };
    control(&["add_user", user, "pw"]).await;
    control(&["set_permissions", user, configure, write, ".*"]).await;
    let url = [format!("amqp://{user}:pw@127.0.0.1:{}", broker.port())];
    let queue = unique(user);
    let (group, running) = endless();
    let (service, heard) =
        serve_apart(RmqServer::new(server(broker, &queue).urls(url.clone())), [group, sum()]).await;
    let caller = RmqClient::new(client(broker, &queue).urls(url));
    let told = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let sink = Arc::clone(&told);
    caller.events().on(move |event| sink.lock().push(event.to_string()));
    let said = |lines: &[String], words: &str| lines.iter().filter(|line| line.contains(words)).count();
    for _ in 0..3 {
        give_up(&caller, &running).await;
        answers(&caller).await;
    }
    until("the client has said it", || said(&told.lock(), "services are not told") == 1).await;
    answers(&caller).await;
    assert_eq!(said(&told.lock(), "services are not told"), 1, "{:?}", told.lock());
    assert_eq!(said(&heard.all(), "are not heard of"), usize::from(deaf), "{:?}", heard.all());
    assert_eq!(running(), 3);
    // Not again in another session.
    control(&["close_all_connections", "a test"]).await;
    while caller.send::<i64>("sum", [1, 2]).await.is_err() {}
    give_up(&caller, &running).await;
    answers(&caller).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(said(&told.lock(), "services are not told"), 1, "{:?}", told.lock());
    assert_eq!(said(&heard.all(), "are not heard of"), usize::from(deaf), "{:?}", heard.all());
    caller.close().await;
    service.stop(Duration::from_millis(10)).await;
}

#[actix::test]
async fn without_the_rights_to_it_services_and_clients_work() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    restricted(&broker, "no-exchange", "^(?!martlet).*", ".*", true).await;
    restricted(&broker, "no-write", ".*", "^(?!martlet).*", false).await;
    restricted(&broker, "no-queue", "^(?!amq.gen).*", "^(?!martlet).*", true).await;
}
