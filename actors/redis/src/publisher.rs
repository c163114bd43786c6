// SPDX-License-Identifier: MIT OR Apache-2.0
//! The publishing half of a session: one connection out of the pool, on which each turn of the session is one
//! pipeline of PUBLISH commands.
//!
//! Taking a connection from the pool costs a round trip of its own, so it is taken once per session. It is one
//! connection, because the packets of a stream must not overtake each other.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use deadpool_redis::{Connection, Pool};
use futures::future::LocalBoxFuture;
use martlet_core::error::SessionError;
use martlet_core::packet::Raw;
use martlet_core::transport::PacketId;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{Cmd, Pipeline, RedisError, ServerError, Value};

/// Pipelines on their way at once. While they are, what is published gathers in the next one.
const FLIGHTS: usize = 4;

/// What a PUBLISH protocol line costs besides channel and body, about.
const OVERHEAD: usize = 40;

/// Whom the outcome of a command concerns.
#[derive(Debug, Clone)]
pub(crate) enum Note {
    /// Nobody, unless it fails.
    Plain,
    /// Nobody, whatever comes of it: that there is an answer is all.
    Ping,
    /// The caller of a request.
    Request(PacketId),
    /// The sender of an event.
    Event(PacketId),
    /// The handler of a request, whose stream goes on.
    Item(Raw),
}

/// What became of a command.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// So many connections received it.
    Receivers(i64),
    /// The broker refused it.
    Refused(String),
}

struct Flight {
    commands: LocalBoxFuture<'static, Result<Vec<Value>, RedisError>>,
    notes: Vec<Note>,
    bytes: usize,
    /// Watchdog rounds it has seen.
    rounds: u32,
}

/// Publishes.
pub(crate) struct Publisher {
    /// Kept out of the pool while the session lives.
    owned: Option<Connection>,
    connection: MultiplexedConnection,
    next: Pipeline,
    notes: Vec<Note>,
    bytes: usize,
    flights: VecDeque<Flight>,
    flying_bytes: usize,
}

impl Publisher {
    /// Takes a connection from the pool.
    pub(crate) async fn new(pool: &Pool) -> Result<Self, deadpool_redis::PoolError> {
        let owned = pool.get().await?;
        let connection = MultiplexedConnection::clone(&owned);
        Ok(Self {
            owned: Some(owned),
            connection,
            next: Pipeline::new(),
            notes: Vec::new(),
            bytes: 0,
            flights: VecDeque::new(),
            flying_bytes: 0,
        })
    }

    /// Names the connection in the broker's list.
    pub(crate) fn set_name(&mut self, name: &str) {
        let mut command = redis::cmd("CLIENT");
        command.arg("SETNAME").arg(name);
        self.push(command, Note::Plain, OVERHEAD);
    }

    /// Queues a PUBLISH.
    pub(crate) fn publish(&mut self, channel: &[u8], body: &[u8], note: Note) {
        let mut command = Cmd::with_capacity(3, 7 + channel.len() + body.len());
        command.arg("PUBLISH").arg(channel).arg(body);
        self.push(command, note, channel.len() + body.len() + OVERHEAD);
    }

    fn push(&mut self, command: Cmd, note: Note, bytes: usize) {
        self.next.add_command(command);
        self.notes.push(note);
        self.bytes += bytes;
    }

    /// Bytes that the broker has not yet answered for.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.bytes + self.flying_bytes
    }

    /// Called at regular intervals: asks an idle connection whether it lives (which also keeps the broker's
    /// `timeout` away); `false` when what was sent is not answered for since the last time but one.
    pub(crate) fn is_alive(&mut self) -> bool {
        if let Some(first) = self.flights.front_mut() {
            first.rounds += 1;
            return first.rounds < 2;
        }
        if self.notes.is_empty() {
            self.push(redis::cmd("PING"), Note::Ping, OVERHEAD);
        }
        true
    }

    /// Sends what is queued; `settle` is told of every outcome that concerns somebody. Ready when all is
    /// answered for.
    pub(crate) fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        mut settle: impl FnMut(Note, Outcome),
    ) -> Poll<Result<(), SessionError>> {
        loop {
            if let Some(first) = self.flights.front_mut()
                && let Poll::Ready(result) = first.commands.as_mut().poll(cx)
            {
                let values = result.map_err(|error| {
                    SessionError::lost(format!("the publishing connection was lost: {error}"))
                })?;
                if let Some(flight) = self.flights.pop_front() {
                    self.flying_bytes -= flight.bytes;
                    for (note, value) in flight.notes.into_iter().zip(values) {
                        match (note, value) {
                            (Note::Ping, _) => {}
                            (note, Value::ServerError(error)) => {
                                settle(note, Outcome::Refused(said(&error)));
                            }
                            (Note::Plain, _) => {}
                            (note, Value::Int(receivers)) => settle(note, Outcome::Receivers(receivers)),
                            _ => {}
                        }
                    }
                }
                continue;
            }
            if self.notes.is_empty() {
                return if self.flights.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            if self.flights.len() >= FLIGHTS {
                return Poll::Pending;
            }
            self.take_off(cx);
        }
    }

    fn take_off(&mut self, cx: &mut Context<'_>) {
        let count = self.notes.len();
        let pipeline = std::mem::replace(&mut self.next, Pipeline::with_capacity(count));
        let notes = std::mem::replace(&mut self.notes, Vec::with_capacity(count));
        let bytes = std::mem::take(&mut self.bytes);
        let mut connection = self.connection.clone();
        let commands: LocalBoxFuture<'static, _> =
            Box::pin(async move { connection.req_packed_commands(&pipeline, 0, count).await });
        self.flying_bytes += bytes;
        self.flights.push_back(Flight { commands, notes, bytes, rounds: 0 });
        // The first poll hands it to the driver; the order of these is the order on the wire. An answer is looked
        // at when its turn comes.
        if self.flights.len() > 1
            && let Some(last) = self.flights.back_mut()
            && let Poll::Ready(result) = Pin::new(&mut last.commands).poll(cx)
        {
            last.commands = Box::pin(std::future::ready(result));
        }
    }
}

/// An error in the broker's own words.
fn said(error: &ServerError) -> String {
    format!("{} {}", error.code(), error.details().unwrap_or_default())
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // Closed with its session: nothing stays open that nobody uses.
        if let Some(owned) = self.owned.take() {
            drop(Connection::take(owned));
        }
    }
}
