// SPDX-License-Identifier: MIT OR Apache-2.0
//! A node that the tests of this binary share, services and clients on it, and what a service reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet_core::ClientProxy;
use martlet_rabbitmq::{RmqClient, RmqClientOptions, RmqServerOptions, RmqSocketOptions};
use martlet_testkit::broker::{Broker, BrokerCommand};
use martlet_testkit::world::Reports;
pub(crate) use martlet_testkit::world::{
    GRACE, failing, serve, serve_apart, slow, streaming, sum, sum_object, until,
};
use parking_lot::Mutex;

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

/// How many messages a service has reported as dropped.
pub(crate) fn dropped(reports: &Reports) -> u64 {
    let of = |line: &String| line.split_once(" messages (")?.0.rsplit(' ').next()?.parse::<u64>().ok();
    reports.all().iter().filter_map(of).sum()
}
