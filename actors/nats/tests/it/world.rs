// SPDX-License-Identifier: MIT OR Apache-2.0
//! A service and a client on a broker, and what the service reports.

use std::time::Duration;

use martlet_core::{CallError, ClientProxy, Microservice, SessionErrorKind, StartError};
use martlet_nats::{NatsClient, NatsClientOptions, NatsServer, NatsServerOptions};
use martlet_testkit::broker::free_port;
pub(crate) use martlet_testkit::world::{GRACE, failing, serve, slow, streaming, sum, sum_object, until};

use crate::broker::Broker;

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
    let port = free_port().unwrap();
    format!("nats://127.0.0.1:{port}")
}
