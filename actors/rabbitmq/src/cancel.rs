// SPDX-License-Identifier: MIT OR Apache-2.0
//! RMQ-20: tells services of calls whose callers have lost interest, where both sides have the option `cancellation`.
//!
//! Nobody knows which service has a request, so all that might are told: each has a queue of its own, bound to one
//! exchange by what its clients publish to. Both have a channel of their own for it: without the right to any of it
//! they do without, and say so once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::{LocalBoxFuture, try_join_all};
use futures::{FutureExt, StreamExt};
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, Consumer, ErrorKind, ExchangeKind};

use crate::options::Common;

/// Where cancellations go.
const EXCHANGE: &str = "martlet.cancel";

/// How many may wait to be told; further ones are not told.
const WAITING: usize = 1024;

/// What the cancellations of requests to a service are told by: the queue or the exchange that they go to.
fn keys(common: &Common) -> impl Iterator<Item = &str> {
    [Some(common.queue.as_str()), common.exchange_name()].into_iter().flatten().filter(|key| !key.is_empty())
}

/// What the cancellations of a client's requests are told by.
fn key(common: &Common) -> &str {
    match common.wildcards || common.is_fanout() {
        true => common.exchange_name().unwrap_or_default(),
        false => &common.queue,
    }
}

fn short(name: &str) -> ShortString {
    // Names were checked when they were declared.
    ShortString::try_new(name).unwrap_or_default()
}

async fn open(connection: &Connection) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    // It goes with the last service.
    let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
    let arguments = FieldTable::default();
    channel.exchange_declare(EXCHANGE.into(), ExchangeKind::Direct, options, arguments).await?;
    Ok(channel)
}

fn said(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(said) => said.get_message().to_string(),
        _ => error.to_string(),
    }
}

// === the serving side ===

/// What a service hears.
pub(crate) struct Hearing {
    _channel: Channel,
    consumer: Consumer,
}

impl Hearing {
    /// Begins to listen; a refusal is to be reported, unless it was `told` before.
    pub(crate) async fn begin(
        connection: &Connection,
        common: &Common,
        told: &AtomicBool,
    ) -> (Option<Self>, Option<String>) {
        if !common.cancellation {
            return (None, None);
        }
        match Self::listen(connection, common).await {
            Ok(hearing) => (Some(hearing), None),
            Err(error) if is_refused(&error) && !told.swap(true, Ordering::Relaxed) => {
                let said = said(&error);
                (None, Some(format!("cancelled calls are not heard of (option cancellation): {said}")))
            }
            // Said before; or the connection is lost, which declaring the rest says.
            Err(_) => (None, None),
        }
    }

    async fn listen(connection: &Connection, common: &Common) -> lapin::Result<Self> {
        let channel = open(connection).await?;
        let options =
            QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare(ShortString::default(), options, FieldTable::default()).await?;
        let queue = queue.name().clone();
        for key in keys(common) {
            let options = QueueBindOptions::default();
            let arguments = FieldTable::default();
            channel.queue_bind(queue.clone(), EXCHANGE.into(), short(key), options, arguments).await?;
        }
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consumer =
            channel.basic_consume(queue, ShortString::default(), options, FieldTable::default()).await?;
        Ok(Self { _channel: channel, consumer })
    }

    /// The raw id of the next request that nobody waits for; `None` when nothing more is heard.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        self.consumer.poll_next_unpin(cx).map(|next| Some(next?.ok()?.data.into()))
    }
}

// === the calling side ===

/// What a client tells.
pub(crate) struct Telling {
    connection: Arc<Connection>,
    key: ShortString,
    waiting: Vec<Bytes>,
    channel: Option<Channel>,
    underway: Option<LocalBoxFuture<'static, lapin::Result<Channel>>>,
    refused: bool,
}

impl Telling {
    /// `None` without the option.
    pub(crate) fn new(connection: &Arc<Connection>, common: &Common) -> Option<Self> {
        common.cancellation.then(|| Self {
            connection: Arc::clone(connection),
            key: short(key(common)),
            waiting: Vec::new(),
            channel: None,
            underway: None,
            refused: false,
        })
    }

    pub(crate) fn push(&mut self, id: Bytes) {
        if !self.refused && self.waiting.len() < WAITING {
            self.waiting.push(id);
        }
    }

    /// Tells what waits, nobody waits for it; gives what is to be reported.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Option<String> {
        loop {
            if let Some(underway) = &mut self.underway {
                let Poll::Ready(done) = underway.poll_unpin(cx) else { return None };
                self.underway = None;
                match done {
                    Ok(channel) => self.channel = Some(channel),
                    Err(error) if is_refused(&error) => {
                        self.refused = true;
                        self.waiting.clear();
                        return Some(format!(
                            "services are not told of cancelled calls (option cancellation): {}",
                            said(&error)
                        ));
                    }
                    // The exchange has gone with its last service, or the connection is lost.
                    Err(_) => {}
                }
            }
            if self.waiting.is_empty() {
                return None;
            }
            let ids = std::mem::take(&mut self.waiting);
            let (connection, key) = (Arc::clone(&self.connection), self.key.clone());
            let channel = self.channel.take().filter(|channel| channel.status().connected());
            self.underway = Some(async move { tell(connection, channel, key, ids).await }.boxed_local());
        }
    }
}

async fn tell(
    connection: Arc<Connection>,
    channel: Option<Channel>,
    key: ShortString,
    ids: Vec<Bytes>,
) -> lapin::Result<Channel> {
    let channel = match channel {
        Some(channel) => channel,
        None => {
            let channel = open(&connection).await?;
            // So that a refusal is known for what it is.
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            channel
        }
    };
    let mut confirmed = Vec::with_capacity(ids.len());
    for id in ids {
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
        let published = channel.basic_publish(EXCHANGE.into(), key.clone(), options, &id, properties);
        confirmed.push(published.await?);
    }
    try_join_all(confirmed).await?;
    Ok(channel)
}

/// Whether it would be refused again.
fn is_refused(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(said) => {
            matches!(said.kind(), AMQPErrorKind::Soft(soft) if *soft != AMQPSoftError::NOTFOUND)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{RmqClientOptions, RmqExchangeType, RmqServerOptions};

    #[track_caller]
    fn check(server: RmqServerOptions, client: RmqClientOptions) {
        let (server, client) = (server.common(), client.common());
        assert!(keys(&server).any(|heard| heard == key(&client)), "{server:?}");
    }

    #[test]
    fn what_a_client_tells_its_service_hears() {
        let (server, client) = (RmqServerOptions::new, RmqClientOptions::new);
        check(server().queue("q"), client().queue("q"));
        check(server().queue("q").wildcards(true), client().queue("q").wildcards(true));
        // RMQ-14: by the queue itself.
        check(server().queue("q").exchange("e").wildcards(true), client().queue("q"));
        check(server().queue("q").exchange("e").wildcards(true), client().exchange("e").wildcards(true));
        let fanout = RmqExchangeType::Fanout;
        check(server().exchange("e").exchange_type(fanout), client().exchange("e").exchange_type(fanout));
    }
}
