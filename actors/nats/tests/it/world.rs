// SPDX-License-Identifier: MIT OR Apache-2.0
//! A service and a client on a broker, and what the service reports.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use martlet_core::{
    CallError, ClientProxy, Data, HandlerGroup, Microservice, RpcError, RunningService, ServiceEvent,
    SessionErrorKind, StartError, Streaming, message,
};
use martlet_nats::{NatsClient, NatsClientOptions, NatsServer, NatsServerOptions};
use parking_lot::Mutex;

use crate::broker::Broker;

pub(crate) const GRACE: Duration = Duration::from_secs(5);

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

pub(crate) fn server_options(broker: &Broker) -> NatsServerOptions {
    NatsServerOptions::new()
        .servers([broker.url()])
        .reconnect_time_wait(Duration::from_millis(50))
        .reconnect_jitter(Duration::ZERO)
        .max_reconnect_attempts(200)
}

pub(crate) fn client_options(broker: &Broker) -> NatsClientOptions {
    NatsClientOptions::new()
        .servers([broker.url()])
        .reconnect_time_wait(Duration::from_millis(50))
        .reconnect_jitter(Duration::ZERO)
        .max_reconnect_attempts(200)
        .call_timeout(Duration::from_secs(10))
}

pub(crate) fn client(broker: &Broker) -> ClientProxy {
    NatsClient::new(client_options(broker))
}

pub(crate) async fn serve(
    options: NatsServerOptions,
    groups: impl IntoIterator<Item = HandlerGroup>,
) -> (RunningService, Reports) {
    let reports = Reports::default();
    let sink = reports.clone();
    let mut service = Microservice::new()
        .on_current_arbiter()
        .on(move |event| sink.0.lock().push(event.clone()))
        .server(NatsServer::new(options));
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

/// Why a service with these options does not start.
pub(crate) async fn start_error(options: NatsServerOptions) -> (SessionErrorKind, String) {
    let service = Microservice::new().on_current_arbiter().handlers(sum()).server(NatsServer::new(options));
    match service.start().await.unwrap_err() {
        StartError::Transport { cause, .. } => (cause.kind(), cause.to_string()),
        other => panic!("{other:?}"),
    }
}

/// Why a call of a client with these options is not sent.
pub(crate) async fn call_error(options: NatsClientOptions) -> (SessionErrorKind, String) {
    let client = NatsClient::new(options);
    let error = client.send::<i64>("sum", [1]).await.unwrap_err();
    client.close().await;
    match error {
        CallError::NotSent { cause } => (cause.kind(), cause.to_string()),
        other => panic!("{other:?}"),
    }
}

/// A URL on which nobody listens.
pub(crate) fn nobody_listens() -> String {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    format!("nats://127.0.0.1:{port}")
}

/// Waits until something holds; fails after ten seconds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(10), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
