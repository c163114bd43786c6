// SPDX-License-Identifier: MIT OR Apache-2.0
//! A node that the tests of this binary share, services and clients on it, and what a service reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use martlet_core::{
    ClientProxy, Data, HandlerGroup, Microservice, RpcError, RunningService, ServiceEvent, Streaming, message,
};
use martlet_rabbitmq::{RmqClient, RmqClientOptions, RmqServer, RmqServerOptions, RmqSocketOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
use parking_lot::Mutex;

pub(crate) const GRACE: Duration = Duration::from_secs(5);

/// The node that tests share which leave it alone; it ends when no test needs it.
pub(crate) fn shared_broker() -> Arc<Broker> {
    static SHARED: Mutex<Option<std::sync::Weak<Broker>>> = Mutex::new(None);
    let mut shared = SHARED.lock();
    if let Some(running) = shared.as_ref().and_then(std::sync::Weak::upgrade) {
        return running;
    }
    let broker = Arc::new(Broker::start(BrokerCommand::rabbitmq()).unwrap());
    *shared = Some(Arc::downgrade(&broker));
    broker
}

/// A queue's name that no other test has.
pub(crate) fn unique(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// What a service has reported so far.
#[derive(Clone, Default)]
pub(crate) struct Reports(Arc<Mutex<Vec<ServiceEvent>>>);

impl Reports {
    pub(crate) fn contain(&self, text: &str) -> bool {
        self.0.lock().iter().any(|event| event.to_string().contains(text))
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().iter().map(ToString::to_string).collect()
    }
}

pub(crate) fn quick() -> RmqSocketOptions {
    RmqSocketOptions::new().reconnect_time(Duration::from_millis(50))
}

pub(crate) fn server_options(broker: &Broker, queue: &str) -> RmqServerOptions {
    RmqServerOptions::new().urls([broker.url()]).queue(queue).socket_options(quick())
}

pub(crate) fn client_options(broker: &Broker, queue: &str) -> RmqClientOptions {
    RmqClientOptions::new()
        .urls([broker.url()])
        .queue(queue)
        .socket_options(quick())
        .call_timeout(Duration::from_secs(10))
}

pub(crate) fn client(broker: &Broker, queue: &str) -> ClientProxy {
    RmqClient::new(client_options(broker, queue))
}

pub(crate) async fn serve(
    options: RmqServerOptions,
    groups: impl IntoIterator<Item = HandlerGroup>,
) -> (RunningService, Reports) {
    let reports = Reports::default();
    let sink = reports.clone();
    let mut service = Microservice::new()
        .on_current_arbiter()
        .on(move |event| sink.0.lock().push(event.clone()))
        .server(RmqServer::new(options));
    for group in groups {
        service = service.handlers(group);
    }
    (service.start().await.unwrap(), reports)
}

pub(crate) fn sum() -> HandlerGroup {
    message("sum", async |Data(numbers): Data<Vec<i64>>| Ok::<_, RpcError>(numbers.iter().sum::<i64>()))
}

pub(crate) fn sum_object() -> HandlerGroup {
    message(martlet_core::Pattern::parse(r#"{"cmd":"sum"}"#), async |Data(numbers): Data<Vec<i64>>| {
        Ok::<_, RpcError>(numbers.iter().sum::<i64>())
    })
}

pub(crate) fn slow() -> HandlerGroup {
    message("slow", async |Data(millis): Data<u64>| {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        Ok::<_, RpcError>(millis)
    })
}

pub(crate) fn streaming() -> HandlerGroup {
    message("stream", async |Data(items): Data<Vec<i64>>| {
        Ok::<_, RpcError>(Streaming(futures::stream::iter(items)))
    })
}

pub(crate) fn failing() -> HandlerGroup {
    message("fail", async |Data(kind): Data<String>| match kind.as_str() {
        "message" => Err::<i64, _>(RpcError::message("boom")),
        "object" => Err(RpcError::json(serde_json::json!({"code": 42, "message": "m"}))),
        "unexpected" => Err(RpcError::unexpected("a secret")),
        _ => panic!("asked for"),
    })
}

/// Waits until something holds; fails after ten seconds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(10), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
