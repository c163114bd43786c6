// SPDX-License-Identifier: MIT OR Apache-2.0
//! A service and a client on a broker, and what the service reports.

use std::time::Duration;

use martlet_core::ClientProxy;
use martlet_mqtt::{MqttClient, MqttClientOptions, MqttServerOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
pub(crate) use martlet_testkit::world::{
    GRACE, Reports, counting, failing, serve, serve_apart, slow, streaming, sum, sum_on, until,
};

/// A broker with further lines of configuration; a missing mosquitto is a failure.
pub(crate) fn broker_with(config: &str) -> Broker {
    Broker::start(BrokerCommand::mosquitto_with(config)).unwrap()
}

pub(crate) fn broker() -> Broker {
    broker_with("")
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

/// How many messages a service has reported as dropped.
pub(crate) fn dropped(reports: &Reports) -> u64 {
    let all = reports.all();
    let told = all.iter().filter(|report| report.contains("were dropped"));
    told.filter_map(|report| report.split(' ').find_map(|word| word.parse::<u64>().ok())).sum()
}

pub(crate) fn client(broker: &Broker) -> ClientProxy {
    MqttClient::new(client_options(broker))
}
