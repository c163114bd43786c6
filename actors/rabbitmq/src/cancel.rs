// SPDX-License-Identifier: MIT OR Apache-2.0
//! RMQ-20: tells services of calls whose callers have lost interest, where both sides have the option `cancellation`.
//!
//! Nobody knows which service has a request, so all that might are told: each has a queue of its own, bound to one
//! exchange by what its clients publish to. Both have a channel of their own for it: without the right to any of it
//! they do without, and say so once.

use std::collections::VecDeque;
use std::sync::Arc;
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

use crate::link::Settings;
use crate::options::Common;

/// Where cancellations go.
const EXCHANGE: &str = "martlet.cancel";

/// How many may wait: to be told, further ones are not told; to be heard by the session, the oldest is forgotten.
const WAITING: usize = 1024;

/// No call has a longer id.
const ID_BYTES: usize = 1024;

/// How often it is tried again when the exchange has gone with the last other service, before this one was bound to it.
const RETRIES: usize = 3;

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
    /// `None` when nothing more is heard.
    consumer: Option<Consumer>,
    heard: Heard,
}

/// The raw ids of requests that nobody waits for, until the session reads.
#[derive(Debug, Default)]
struct Heard {
    ids: VecDeque<Bytes>,
    forgotten: u64,
}

impl Heard {
    fn push(&mut self, id: Bytes) {
        if id.len() > ID_BYTES {
            return;
        }
        if self.ids.len() >= WAITING {
            self.ids.pop_front();
            self.forgotten += 1;
        }
        self.ids.push_back(id);
    }

    fn take_forgotten(&mut self) -> Option<String> {
        let forgotten = std::mem::take(&mut self.forgotten);
        (forgotten > 0).then(|| {
            format!(
                "{forgotten} cancelled calls were forgotten: more than {WAITING} of them waited while the session did \
                 not read"
            )
        })
    }
}

impl Hearing {
    /// Begins to listen; why it does not is to be reported.
    pub(crate) async fn begin(
        connection: &Connection,
        settings: &Settings,
    ) -> (Option<Self>, Option<String>) {
        if !settings.common.cancellation {
            return (None, None);
        }
        let mut retries = RETRIES;
        let error = loop {
            match Self::listen(connection, &settings.common).await {
                Ok(hearing) => return (Some(hearing), None),
                Err(error) if retries > 0 && is_soft(&error, |soft| *soft == AMQPSoftError::NOTFOUND) => {
                    retries -= 1;
                }
                Err(error) => break error,
            }
        };
        // That the connection is lost is what declaring the rest says.
        let report = connection.status().connected() && settings.is_news(is_refused(&error));
        let said = report
            .then(|| format!("cancelled calls are not heard of (option cancellation): {}", said(&error)));
        (None, said)
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
        Ok(Self { _channel: channel, consumer: Some(consumer), heard: Heard::default() })
    }

    /// Takes what has arrived, whether or not the session reads: the driver would keep it without a bound.
    pub(crate) fn tend(&mut self, cx: &mut Context<'_>) {
        while let Some(consumer) = &mut self.consumer {
            match consumer.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(arrived))) => self.heard.push(arrived.data.into()),
                Poll::Ready(_) => self.consumer = None,
                Poll::Pending => break,
            }
        }
    }

    /// What is to be reported: how many were forgotten.
    pub(crate) fn take_forgotten(&mut self) -> Option<String> {
        self.heard.take_forgotten()
    }

    /// The raw id of the next request that nobody waits for; `None` when nothing more is heard.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        self.tend(cx);
        match self.heard.ids.pop_front() {
            None if self.consumer.is_some() => Poll::Pending,
            next => Poll::Ready(next),
        }
    }
}

// === the calling side ===

/// What a client tells.
pub(crate) struct Telling {
    connection: Arc<Connection>,
    settings: Arc<Settings>,
    key: ShortString,
    waiting: Vec<Bytes>,
    channel: Option<Channel>,
    underway: Option<LocalBoxFuture<'static, lapin::Result<Channel>>>,
    refused: bool,
}

impl Telling {
    /// `None` without the option.
    pub(crate) fn new(connection: &Arc<Connection>, settings: &Arc<Settings>) -> Option<Self> {
        settings.common.cancellation.then(|| Self {
            connection: Arc::clone(connection),
            settings: Arc::clone(settings),
            key: short(key(&settings.common)),
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
                        return self.settings.is_news(true).then(|| {
                            let said = said(&error);
                            format!("services are not told of cancelled calls (option cancellation): {said}")
                        });
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
    is_soft(error, |soft| *soft != AMQPSoftError::NOTFOUND)
}

fn is_soft(error: &lapin::Error, which: impl FnOnce(&AMQPSoftError) -> bool) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(said) => {
            matches!(said.kind(), AMQPErrorKind::Soft(soft) if which(soft))
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
    fn of_what_is_heard_while_nobody_reads_the_oldest_is_forgotten() {
        let mut heard = Heard::default();
        let id = |number: usize| Bytes::from(number.to_string());
        (0..WAITING).for_each(|number| heard.push(id(number)));
        heard.push(Bytes::from(vec![b'1'; ID_BYTES + 1]));
        assert_eq!(heard.take_forgotten(), None);
        (WAITING..WAITING + 5).for_each(|number| heard.push(id(number)));
        assert_eq!((heard.ids.len(), heard.ids.front()), (WAITING, Some(&id(5))));
        assert!(heard.take_forgotten().is_some_and(|said| said.starts_with("5 cancelled calls ")));
        assert_eq!(heard.take_forgotten(), None);
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
