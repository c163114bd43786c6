// SPDX-License-Identifier: MIT OR Apache-2.0
//! A probe: an actor that records what it receives, to be put where a handler would be.
//!
//! # Examples
//!
//! ```
//! use martlet_core::Microservice;
//! use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
//! use martlet_testkit::probe::Probe;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! actix_rt::System::new().block_on(async {
//!     let network = MemoryNetwork::new();
//!     let probe = Probe::start();
//!     let service = Microservice::new()
//!         .on_current_arbiter()
//!         .handlers(probe.event("user.created"))
//!         .server(MemoryServer::new(&network))
//!         .start()
//!         .await?;
//!     let client = MemoryClient::new(&network);
//!     client.emit("user.created", "Ada").await?;
//!     assert_eq!(probe.next().await.data, "Ada");
//!     client.close().await;
//!     service.stop(std::time::Duration::from_secs(1)).await;
//!     Ok(())
//! })
//! # }
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use actix::prelude::{Actor, Addr, Context, Handler, Message};
use martlet_core::{HandlerGroup, MessageKind, Metadata, Pattern, Request, RpcError, event, message};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;

/// What a probe received.
#[derive(Debug, Clone, Message)]
#[rtype(result = "()")]
#[non_exhaustive]
pub struct Received {
    /// The route.
    pub route: String,
    /// Whether a reply was wanted.
    pub request: bool,
    /// The payload; null when there was none, or when it was no value.
    pub data: Value,
    /// The metadata.
    pub metadata: Metadata,
}

/// The actor behind a probe.
#[derive(Debug)]
pub struct ProbeActor {
    log: Arc<Log>,
}

#[derive(Debug, Default)]
struct Log {
    unread: Mutex<VecDeque<Received>>,
    total: Mutex<usize>,
    arrived: Notify,
}

impl Actor for ProbeActor {
    type Context = Context<Self>;
}

impl Handler<Received> for ProbeActor {
    type Result = ();

    fn handle(&mut self, received: Received, _: &mut Self::Context) {
        self.log.unread.lock().push_back(received);
        *self.log.total.lock() += 1;
        self.log.arrived.notify_one();
    }
}

/// The handle of a probe. Clones are the same probe.
#[derive(Debug, Clone)]
pub struct Probe {
    actor: Addr<ProbeActor>,
    log: Arc<Log>,
}

impl Probe {
    /// Starts one on the current arbiter.
    pub fn start() -> Self {
        let log = Arc::new(Log::default());
        Self { actor: ProbeActor { log: Arc::clone(&log) }.start(), log }
    }

    /// Its address.
    pub fn address(&self) -> Addr<ProbeActor> {
        self.actor.clone()
    }

    /// A handler that passes events of a pattern to it.
    #[track_caller]
    pub fn event(&self, pattern: impl Into<Pattern>) -> HandlerGroup {
        let actor = self.actor.clone();
        event(pattern, move |request: Request| record(actor.clone(), request))
    }

    /// A handler that passes messages of a pattern to it and answers with the payload.
    #[track_caller]
    pub fn message(&self, pattern: impl Into<Pattern>) -> HandlerGroup {
        let actor = self.actor.clone();
        message(pattern, move |request: Request| record(actor.clone(), request))
    }

    /// What it received next, in order; waits for it.
    ///
    /// Cancel safe.
    pub async fn next(&self) -> Received {
        loop {
            let arrived = self.log.arrived.notified();
            if let Some(received) = self.try_next() {
                return received;
            }
            arrived.await;
        }
    }

    /// What it received next, if it is there.
    pub fn try_next(&self) -> Option<Received> {
        self.log.unread.lock().pop_front()
    }

    /// How many messages it received.
    pub fn count(&self) -> usize {
        *self.log.total.lock()
    }
}

async fn record(actor: Addr<ProbeActor>, request: Request) -> Result<Value, RpcError> {
    let data = request.payload().to_value().unwrap_or_default();
    let received = Received {
        route: request.route().to_string(),
        request: request.kind() == MessageKind::Request,
        data: data.clone(),
        metadata: request.metadata(),
    };
    actor.send(received).await.map_err(RpcError::unexpected)?;
    Ok(data)
}
