// SPDX-License-Identifier: MIT OR Apache-2.0
//! A service and a client on a broker, and what the service reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use martlet_core::{
    ClientProxy, Data, HandlerGroup, Microservice, RpcError, RunningService, ServiceEvent, Streaming, event,
    message,
};
use martlet_mqtt::{MqttClient, MqttClientOptions, MqttServer, MqttServerOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
use parking_lot::Mutex;

pub(crate) const GRACE: Duration = Duration::from_secs(5);

/// A broker with further lines of configuration; a missing mosquitto is a failure.
pub(crate) fn broker_with(config: &str) -> Broker {
    Broker::start(BrokerCommand::mosquitto_with(config)).unwrap()
}

pub(crate) fn broker() -> Broker {
    broker_with("")
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

pub(crate) fn server_options(broker: &Broker) -> MqttServerOptions {
    MqttServerOptions::new().url(broker.url()).reconnect_period(Duration::from_millis(50))
}

pub(crate) fn client_options(broker: &Broker) -> MqttClientOptions {
    MqttClientOptions::new()
        .url(broker.url())
        .reconnect_period(Duration::from_millis(50))
        .call_timeout(Duration::from_secs(10))
}

pub(crate) fn client(broker: &Broker) -> ClientProxy {
    MqttClient::new(client_options(broker))
}

pub(crate) async fn serve(
    options: MqttServerOptions,
    groups: impl IntoIterator<Item = HandlerGroup>,
) -> (RunningService, Reports) {
    let reports = Reports::default();
    let sink = reports.clone();
    let mut service = Microservice::new()
        .on_current_arbiter()
        .on(move |event| sink.0.lock().push(event.clone()))
        .server(MqttServer::new(options));
    for group in groups {
        service = service.handlers(group);
    }
    (service.start().await.unwrap(), reports)
}

pub(crate) fn sum() -> HandlerGroup {
    sum_on("sum")
}

pub(crate) fn sum_on(pattern: &str) -> HandlerGroup {
    message(martlet_core::Pattern::parse(pattern), async |Data(numbers): Data<Vec<i64>>| {
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

/// An event handler that counts.
pub(crate) fn counting(pattern: &str, count: &Arc<AtomicU64>) -> HandlerGroup {
    let count = Arc::clone(count);
    event(pattern, move || {
        count.fetch_add(1, Ordering::Relaxed);
        async { Ok::<_, RpcError>(()) }
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
