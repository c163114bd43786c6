// SPDX-License-Identifier: MIT OR Apache-2.0
//! The brokers of the lab: a new one for each pair of ends, unless that takes seconds; then one for all, with queues of
//! their own, and a second one for the tests that restart theirs.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use martlet_testkit::broker::BrokerCommand;

use crate::peer::SET_UP;

/// A broker's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Nats,
    Redis,
    Rabbitmq,
    Mosquitto,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Nats, Self::Redis, Self::Rabbitmq, Self::Mosquitto];

    /// The program, which `setup.sh` installs.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Nats => "nats-server",
            Self::Redis => "redis-server",
            Self::Rabbitmq => "rabbitmq-server",
            Self::Mosquitto => "mosquitto",
        }
    }

    fn command(self) -> BrokerCommand {
        match self {
            Self::Nats => BrokerCommand::nats(),
            Self::Redis => BrokerCommand::redis(),
            Self::Rabbitmq => BrokerCommand::rabbitmq(),
            Self::Mosquitto => BrokerCommand::mosquitto(),
        }
    }

    /// RabbitMQ takes seconds to start: tests share two.
    fn is_slow(self) -> bool {
        self == Self::Rabbitmq
    }
}

/// A running broker, which can be killed and started again. It ends with the last handle.
#[derive(Clone)]
pub(crate) struct Broker(Arc<Mutex<martlet_testkit::broker::Broker>>);

impl Broker {
    pub(crate) async fn start(kind: Kind) -> Self {
        let start = move || martlet_testkit::broker::Broker::start(kind.command());
        let broker = tokio::task::spawn_blocking(start).await.unwrap();
        Self(Arc::new(Mutex::new(broker.unwrap_or_else(|error| panic!("{error}; {SET_UP}")))))
    }

    pub(crate) fn url(&self) -> String {
        self.0.lock().unwrap().url()
    }

    /// Kills it and starts it again on the same port.
    pub(crate) async fn restart(&self) {
        self.0.lock().unwrap().stop();
        // Whoever is connected notices that it is gone, and tries again in vain.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let broker = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || broker.lock().unwrap().resume()).await.unwrap().unwrap();
    }
}

/// The brokers that are shared, started when they are first needed.
#[derive(Default)]
pub(crate) struct Brokers {
    shared: RefCell<Vec<(Kind, Broker)>>,
    restarted: RefCell<Vec<(Kind, Broker)>>,
}

impl Brokers {
    /// The one for everybody, which is never stopped.
    async fn shared(&self, kind: Kind) -> Broker {
        Self::find_or_start(&self.shared, kind).await
    }

    /// One that the caller has for itself as long as its test lasts, and may restart.
    pub(crate) async fn own(&self, kind: Kind) -> Broker {
        if kind.is_slow() {
            Self::find_or_start(&self.restarted, kind).await
        } else {
            Broker::start(kind).await
        }
    }

    /// One where nobody else uses the same patterns: where there are queues, the shared one will do.
    pub(crate) async fn elsewhere(&self, kind: Kind) -> Broker {
        if kind.is_slow() { self.shared(kind).await } else { Broker::start(kind).await }
    }

    async fn find_or_start(brokers: &RefCell<Vec<(Kind, Broker)>>, kind: Kind) -> Broker {
        let found = brokers.borrow().iter().find(|(it, _)| *it == kind).map(|(_, broker)| broker.clone());
        if let Some(broker) = found {
            return broker;
        }
        let broker = Broker::start(kind).await;
        brokers.borrow_mut().push((kind, broker.clone()));
        broker
    }
}
