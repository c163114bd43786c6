// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection to a broker: what the two halves of a session share.
//!
//! The loop is ours, on the driver's codec: reading goes on while the runtime takes nothing (so that
//! acknowledgements, pings and the end of the connection are seen), what was read waits here under a bound, and a
//! message is acknowledged when it is taken, not when it is read.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use martlet_core::error::SessionError;
use martlet_core::pattern::Route;
use martlet_core::transport::{PacketId, poll_discard};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep};

use crate::driver::{
    self, Ack, AckKind, ConnAck, Filter, Goodbye, Incoming, Publish, ReadError, Refusal, Version,
};
use crate::flow::{self, Acked, Again, Flow, Message, What, Window};
use crate::net::Stream;
use crate::options::{MqttQos, MqttSubscribeOptions};
use crate::record::PublishOptions;

/// How much is read at once, and how much one turn reads.
const READ_CHUNK: usize = 64 * 1024;
/// The least room to read into.
const READ_LEAST: usize = 4 * 1024;
/// Answers of the broker that wait to be taken; beyond, skipped messages are only counted.
pub(crate) const MAX_SIGNALS: usize = 1024;
/// How many exchanges of quality of service 2 a broker of MQTT 3.1.1 is trusted with: mosquitto's default.
const UNTOLD_WINDOW: usize = 20;

/// What outlives a connection: of one end of one service or client.
#[derive(Debug, Default)]
pub(crate) struct Carry {
    pub(crate) flow: Flow,
    /// Reply topics that a session was subscribed to when it ended.
    pub(crate) reply_filters: Vec<String>,
    /// Whether there was a connection already.
    pub(crate) connected: bool,
    /// Attempts at the first connection.
    pub(crate) attempts: i32,
    /// Whether it was said that the broker does not permit cancellations.
    cancellation_refused: bool,
}

/// What subscribing or unsubscribing is for.
#[derive(Debug)]
pub(crate) enum Control {
    Route(Route),
    /// The reply topic of this key.
    Reply(usize),
    /// Topics of cancellations.
    Cancel,
    Gone,
}

/// What the session must know of.
#[derive(Debug)]
pub(crate) enum Signal {
    Subscribed(Control, Option<Refusal>),
    Unsubscribed,
    /// A request that the broker does not take.
    Refused(PacketId, Refusal),
    Report(String),
}

/// How a message is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AckTo {
    pub(crate) id: u16,
    pub(crate) qos: MqttQos,
}

/// Bounds of a connection, and what becomes of its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) max_packet_bytes: usize,
    pub(crate) buffered_bytes: usize,
    /// From how many unwritten bytes on the runtime takes nothing.
    pub(crate) high_water_bytes: usize,
    pub(crate) publish_window: usize,
    /// From which quality of service on the broker sends again what was not taken when the connection ended; `None`
    /// if it does not.
    pub(crate) comes_again: Option<MqttQos>,
}

/// The rest of a packet that is too large to be taken.
#[derive(Debug)]
struct Skip {
    bytes: usize,
    ack: Option<AckTo>,
}

pub(crate) struct Link {
    stream: Stream,
    pub(crate) version: Version,
    limits: Limits,
    carry: Arc<Mutex<Carry>>,
    pub(crate) flow: Flow,
    input: BytesMut,
    output: BytesMut,
    unflushed: bool,
    /// How many bytes went out.
    written: u64,
    /// Whether the broker has closed the connection, and whether it may have done so over what it was sent.
    is_closed: bool,
    blameless: bool,
    arrived: VecDeque<Publish>,
    arrived_bytes: usize,
    /// Messages dropped for want of room: not yet reported, and in all.
    dropped: u64,
    dropped_before: u64,
    skip: Option<Skip>,
    /// Whether what was read has packets for which there is no room.
    has_more: bool,
    /// Whether something waited already when this turn began to read.
    is_behind: bool,
    /// Whether somebody takes what arrives: not before the session is made.
    is_taken: bool,
    connack: Option<ConnAck>,
    is_open: bool,
    /// What the broker allows.
    broker: ConnAck,
    controls: HashMap<u16, Control>,
    pub(crate) signals: VecDeque<Signal>,
    /// Messages that were skipped and are not among the signals.
    skipped: u64,
    last_words: Option<String>,
    /// Why the connection is over; told when what it brought has been taken.
    ended: Option<SessionError>,
    /// Whether messages are still wanted.
    pub(crate) intake: bool,
    keep: Keep,
}

/// Asking whether the broker lives.
#[derive(Debug, Default)]
struct Keep {
    /// Half of the interval: something is sent in each, and something must come in two.
    period: Duration,
    tick: Option<Pin<Box<Sleep>>>,
    sent: bool,
    received: bool,
    silent: u32,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Link {
    pub(crate) fn new(stream: Stream, version: Version, limits: Limits, carry: Arc<Mutex<Carry>>) -> Self {
        let flow = std::mem::take(&mut carry.lock().flow);
        Self {
            stream,
            version,
            limits,
            carry,
            flow,
            input: BytesMut::new(),
            output: BytesMut::new(),
            unflushed: false,
            written: 0,
            is_closed: false,
            blameless: false,
            arrived: VecDeque::new(),
            arrived_bytes: 0,
            dropped: 0,
            dropped_before: 0,
            skip: None,
            has_more: false,
            is_behind: false,
            is_taken: false,
            connack: None,
            is_open: false,
            broker: ConnAck::default(),
            controls: HashMap::new(),
            signals: VecDeque::new(),
            skipped: 0,
            last_words: None,
            ended: None,
            intake: true,
            keep: Keep::default(),
        }
    }

    // === opening ===

    /// Writes a packet that the driver makes.
    pub(crate) fn put(
        &mut self,
        write: impl FnOnce(Version, &mut BytesMut) -> Result<(), String>,
    ) -> Result<(), String> {
        let start = self.output.len();
        let written = write(self.version, &mut self.output);
        if written.is_err() {
            self.output.truncate(start);
        }
        written
    }

    /// Waits for the answer to CONNECT.
    pub(crate) fn poll_connack(&mut self, cx: &mut Context<'_>) -> Poll<Result<ConnAck, SessionError>> {
        let worked = self.poll_work(cx).map(drop);
        // A broker that refuses closes the connection behind its answer.
        if let Some(connack) = self.connack.take() {
            return Poll::Ready(Ok(connack));
        }
        worked?;
        // Whatever is left to be told of an earlier session: it can wait.
        self.check_alive()?;
        Poll::Pending
    }

    /// The connection is accepted; what is unfinished is sent again.
    pub(crate) fn opened(&mut self, connack: ConnAck, keepalive: u16) -> Result<(), SessionError> {
        let again = self.flow.resume(connack.session_present);
        self.is_open = true;
        let keepalive = connack.keepalive.unwrap_or(keepalive);
        self.broker = connack;
        for again in again {
            match again {
                Again::Release(id) => self.version.ack(AckKind::Release, id, false, &mut self.output),
                Again::Publish(id) => self.write_sent(id, true),
                Again::GiveUp(id) => self.give_up(id, &flow::given_up(), false),
                Again::GiveUpAndRelease(id) => self.give_up(id, &flow::given_up(), true),
            }
        }
        if keepalive > 0 {
            self.keep.period = Duration::from_millis(500) * u32::from(keepalive);
            self.keep.tick = Some(Box::pin(tokio::time::sleep(self.keep.period)));
        }
        Ok(())
    }

    /// The session is made: what arrives is taken from now on.
    pub(crate) fn is_handed_over(&mut self) {
        self.is_taken = true;
    }

    /// Whether subscriptions can have MQTT 5's identifiers.
    pub(crate) fn has_identifiers(&self) -> bool {
        self.version.is_v5() && !self.broker.no_subscription_ids
    }

    // === subscribing ===

    /// Asks for a subscription; its end comes as a signal.
    pub(crate) fn subscribe(
        &mut self,
        filter: &str,
        options: MqttSubscribeOptions,
        identifier: Option<usize>,
        control: Control,
    ) -> Result<(), String> {
        let identifier = identifier.filter(|_| self.has_identifiers());
        let filter = Filter { filter, options, identifier };
        self.control(control, |version, id, out| version.subscribe(id, &filter, out))
    }

    pub(crate) fn unsubscribe(&mut self, filters: Vec<String>) -> Result<(), String> {
        self.control(Control::Gone, |version, id, out| version.unsubscribe(id, filters, out))
    }

    fn control(
        &mut self,
        control: Control,
        write: impl FnOnce(Version, u16, &mut BytesMut) -> Result<(), String>,
    ) -> Result<(), String> {
        let id = self.flow.control_id().ok_or("65,535 packets wait for the broker's acknowledgement")?;
        let written = self.put(|version, out| write(version, id, out));
        match written {
            Ok(()) => {
                self.controls.insert(id, control);
            }
            Err(_) => self.flow.control_done(id),
        }
        written
    }

    /// How many of them the broker has not answered.
    pub(crate) fn controls(&self) -> usize {
        self.controls.len()
    }

    // === publishing ===

    /// Publishes a message; its topic is given in two parts. `payload` is left empty. Says whether the broker is to
    /// acknowledge it.
    pub(crate) fn publish(
        &mut self,
        topic: [&[u8]; 2],
        payload: &mut BytesMut,
        mut options: PublishOptions,
        what: What,
    ) -> Result<bool, String> {
        // MQTT-10: a broker that offers less gets less.
        let best = self.broker.max_qos.map_or(MqttQos::ExactlyOnce, driver::qos_of);
        options.qos = options.qos.min(best);
        if options.qos == MqttQos::AtMostOnce {
            let start = self.output.len();
            let written =
                write_checked(self.version, &self.broker, topic, payload, 0, &options, &mut self.output);
            if written.is_err() {
                self.output.truncate(start);
            }
            payload.clear();
            return written.map(|()| false);
        }
        // Held against the broker's bounds before it is taken.
        let fits = self.check(topic.concat().as_slice(), payload, &options);
        let payload = payload.split().freeze();
        fits?;
        let topic = Bytes::from(topic.concat());
        self.flow.push(Message { topic, payload, options, what, closed_over: 0 });
        self.publish_waiting();
        Ok(true)
    }

    /// Whether the broker takes such a message.
    pub(crate) fn check(
        &mut self,
        topic: &[u8],
        payload: &[u8],
        options: &PublishOptions,
    ) -> Result<(), String> {
        let start = self.output.len();
        let topic = [topic, &[]];
        let written = write_checked(self.version, &self.broker, topic, payload, 1, options, &mut self.output);
        self.output.truncate(start);
        written
    }

    /// Sends what the window has room for.
    fn publish_waiting(&mut self) {
        if !self.is_open {
            return;
        }
        let broker = self.broker.receive_maximum.map_or(usize::MAX, usize::from);
        let all = self.limits.publish_window.min(broker).max(1);
        // MQTT-10: an MQTT 3.1.1 broker does not tell its bound, and mosquitto loses exchanges beyond it.
        let twos = if self.version.is_v5() { all } else { all.min(UNTOLD_WINDOW) };
        let window = Window { all, twos };
        while let Some((id, _)) = self.flow.next(window) {
            self.write_sent(id, false);
        }
    }

    fn write_sent(&mut self, id: u16, again: bool) {
        let Some(message) = self.flow.message(id) else { return };
        let options = match again {
            true => &PublishOptions { dup: true, ..message.options.clone() },
            false => &message.options,
        };
        let start = self.output.len();
        let topic = [&*message.topic, &[]];
        let (broker, payload) = (&self.broker, &message.payload);
        let written = write_checked(self.version, broker, topic, payload, id, options, &mut self.output);
        // It was held against the bounds of the broker of its time.
        match written {
            Ok(()) => self.flow.sent_at(id, self.written + start as u64),
            Err(reason) => {
                let is_two = message.options.qos == MqttQos::ExactlyOnce;
                self.output.truncate(start);
                self.give_up(id, &reason, again && is_two);
            }
        }
    }

    /// Ends a message without the broker's word on it; if it is to be released, the broker may know its id.
    fn give_up(&mut self, id: u16, reason: &str, release: bool) {
        let Some(message) = self.flow.give_up(id, reason, release) else { return };
        if release {
            self.version.ack(AckKind::Release, id, false, &mut self.output);
        }
        let topic = String::from_utf8_lossy(&message.topic);
        self.signals.push_back(match message.what {
            What::Request(id) => Signal::Refused(id, Refusal::Because(reason.to_owned())),
            _ => Signal::Report(format!("a message on {topic} was given up: {reason}")),
        });
    }

    /// Whether the connection has ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.ended.is_some()
    }

    /// Bytes that are not yet on the wire; none are waited for when it is gone.
    pub(crate) fn pending_bytes(&self) -> usize {
        if self.is_gone() { 0 } else { self.output.len() + self.flow.waiting_bytes() }
    }

    /// Acknowledges a message.
    pub(crate) fn acknowledge(&mut self, to: AckTo, failed: bool) {
        match to.qos {
            MqttQos::AtMostOnce => {}
            MqttQos::AtLeastOnce => self.version.ack(AckKind::Taken, to.id, failed, &mut self.output),
            MqttQos::ExactlyOnce => {
                self.version.ack(AckKind::Received, to.id, failed, &mut self.output);
                // A refusal ends the exchange; without MQTT 5 there is none.
                if !failed || !self.version.is_v5() {
                    self.flow.received(to.id);
                }
            }
        }
    }

    pub(crate) fn say_goodbye(&mut self) {
        self.blameless = true;
        self.version.disconnect(&mut self.output);
    }

    // === the work of a turn ===

    /// Writes and reads what there is; ready when nothing is left to be written.
    pub(crate) fn poll_work(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, SessionError> {
        self.poll_keepalive(cx)?;
        let written = self.poll_write(cx);
        // Also where the line takes no more: the broker may have said why.
        self.poll_read(cx);
        if let Err(error) = written {
            self.end(error);
        }
        self.check_ended()?;
        if self.ended.is_some() {
            return Ok(Poll::Pending);
        }
        // What reading led to.
        let written = self.poll_write(cx)?;
        Ok(if written.is_ready() && !self.flow.is_waiting() { Poll::Ready(()) } else { Poll::Pending })
    }

    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, SessionError> {
        while !self.output.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.output) {
                Poll::Ready(Ok(0)) => return Err(self.lost("it takes no more bytes")),
                Poll::Ready(Ok(written)) => {
                    self.output.advance(written);
                    self.written += written as u64;
                    self.keep.sent = true;
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(self.broken(&error)),
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => return Err(self.broken(&error)),
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
        Ok(Poll::Ready(()))
    }

    pub(crate) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // The other end may be gone already.
        Pin::new(&mut self.stream).poll_shutdown(cx).map(drop)
    }

    /// After DISCONNECT: reads and discards until the broker has closed its side, and so has taken all that was written.
    pub(crate) fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        poll_discard(|read| Pin::new(&mut self.stream).poll_read(cx, read))
    }

    /// Reads what there is, within bounds. The end of the connection is kept until it is asked for.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>) {
        if self.ended.is_none()
            && let Err(error) = self.read_some(cx)
        {
            self.end(error);
        }
        // Acknowledgements may have made room.
        if self.flow.is_waiting() {
            self.publish_waiting();
        }
    }

    /// The connection is over, which is told once everything that it brought has been taken.
    fn end(&mut self, error: SessionError) {
        self.ended.get_or_insert(error);
        // Acknowledgements, perhaps. The connection is over already, whatever is wrong with them.
        if std::mem::take(&mut self.has_more) {
            let _ = self.decode();
        }
        // Nothing can be acknowledged any more: what the broker delivers again in the next session does not run now.
        if let Some(qos) = self.limits.comes_again {
            self.arrived.retain(|publish| publish.qos < qos);
            self.arrived_bytes = self.arrived.iter().map(Publish::size).sum();
        }
    }

    fn read_some(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        let mut budget = READ_CHUNK;
        self.is_behind = !self.arrived.is_empty();
        loop {
            if std::mem::take(&mut self.has_more) {
                self.decode()?;
            }
            if self.is_full() {
                // What waits is the broker's sign of life; taking it brings us back here.
                self.keep.received = true;
                return Ok(());
            }
            if self.input.capacity() - self.input.len() < READ_LEAST {
                self.input.reserve(READ_CHUNK);
            }
            let read = {
                let mut room = (&mut self.input).limit(READ_CHUNK);
                let future = tokio::io::AsyncReadExt::read_buf(&mut self.stream, &mut room);
                tokio::pin!(future);
                future.poll(cx)
            };
            match read {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => {
                    self.is_closed = true;
                    return Err(self.lost("it closed the connection"));
                }
                Poll::Ready(Err(error)) => return Err(self.broken(&error)),
                Poll::Ready(Ok(bytes)) => {
                    self.keep.received = true;
                    self.decode()?;
                    budget = budget.saturating_sub(bytes);
                    if budget == 0 {
                        cx.waker().wake_by_ref();
                        return Ok(());
                    }
                }
            }
        }
    }

    /// MQTT-13: whether the broker is held back by not reading: more waits than may, and none of it can be dropped.
    /// Not where what waits is taken only after the broker has said something that comes behind it: that a route is
    /// subscribed, or that it has our messages, where so many of those wait that the runtime takes nothing.
    fn is_full(&self) -> bool {
        self.arrived_bytes > self.limits.buffered_bytes
            && self.arrived.back().is_some_and(|publish| publish.qos != MqttQos::AtMostOnce)
            && (self.is_taken && self.intake && self.ended.is_none())
            && self.pending_bytes() < self.limits.high_water_bytes
    }

    /// Why the connection is over, whatever it has brought: for those who do not take arrivals.
    pub(crate) fn check_alive(&self) -> Result<(), SessionError> {
        match &self.ended {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Why the connection is over, once everything it brought has been taken.
    pub(crate) fn check_ended(&self) -> Result<(), SessionError> {
        match &self.ended {
            Some(error)
                if self.arrived.is_empty() && self.signals.is_empty() && !self.flow.has_confirmed() =>
            {
                Err(error.clone())
            }
            _ => Ok(()),
        }
    }

    fn poll_keepalive(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        let keep = &mut self.keep;
        let Some(tick) = &mut keep.tick else { return Ok(()) };
        if tick.as_mut().poll(cx).is_pending() {
            return Ok(());
        }
        tick.as_mut().reset(Instant::now() + keep.period);
        // Polled again, so that it is registered.
        cx.waker().wake_by_ref();
        // MQTT-20.
        let received = std::mem::take(&mut keep.received);
        let sent = std::mem::take(&mut keep.sent);
        keep.silent = if received { 0 } else { keep.silent + 1 };
        if keep.silent > 2 {
            let interval = keep.period * 2;
            return Err(self.lost(&format!("nothing came for {interval:?}, the option keepalive")));
        }
        if !received || !sent {
            self.version.ping(&mut self.output);
        }
        Ok(())
    }

    /// Why the session is over, when the stream says so.
    fn broken(&mut self, error: &io::Error) -> SessionError {
        self.is_closed |= !is_of_the_network(error.kind());
        self.lost(&error.to_string())
    }

    /// Why the session is over.
    pub(crate) fn lost(&self, why: &str) -> SessionError {
        match &self.last_words {
            Some(words) => SessionError::lost(format!("the connection to the broker was lost: {words}")),
            None => SessionError::lost(format!("the connection to the broker was lost: {why}")),
        }
    }

    // === arrivals ===

    fn decode(&mut self) -> Result<(), SessionError> {
        loop {
            if let Some(skip) = &mut self.skip {
                let bytes = skip.bytes.min(self.input.len());
                self.input.advance(bytes);
                skip.bytes -= bytes;
                if skip.bytes > 0 {
                    return Ok(());
                }
                let ack = skip.ack;
                self.skip = None;
                if let Some(ack) = ack {
                    self.acknowledge(ack, true);
                }
            }
            if self.input.is_empty() {
                return Ok(());
            }
            if self.is_full() {
                self.has_more = true;
                return Ok(());
            }
            match self.version.read(&mut self.input, self.limits.max_packet_bytes) {
                Ok(packet) => self.take(packet)?,
                Err(ReadError::Incomplete(more)) => {
                    self.input.reserve(more.min(self.limits.max_packet_bytes));
                    return Ok(());
                }
                Err(ReadError::TooLarge) => {
                    if !self.skip_packet()? {
                        return Ok(());
                    }
                }
                Err(ReadError::Malformed(reason)) => {
                    return Err(SessionError::protocol(format!("the broker broke the protocol: {reason}")));
                }
            }
        }
    }

    /// MQTT-14: a message over `maxPacketBytes` is read past, and acknowledged so that it does not come again. False
    /// when its head is not there yet.
    fn skip_packet(&mut self) -> Result<bool, SessionError> {
        let limit = self.limits.max_packet_bytes;
        let Some((head, body)) = driver::frame(&self.input) else { return Ok(false) };
        if head >> 4 != 3 {
            return Err(SessionError::protocol(format!(
                "the broker sent a packet of {} bytes, more than maxPacketBytes, {limit}",
                body.end
            )));
        }
        let qos = driver::qos_of(head >> 1 & 3);
        let acked = qos != MqttQos::AtMostOnce;
        let at = body.start;
        let Some(len) = self.input.get(at..at + 2) else { return Ok(false) };
        let topic_end = at + 2 + usize::from(u16::from_be_bytes([len[0], len[1]]));
        let head_end = topic_end + if acked { 2 } else { 0 };
        if head_end > body.end {
            return Err(SessionError::protocol(
                "the broker broke the protocol: a topic longer than its packet",
            ));
        }
        if self.input.len() < head_end {
            return Ok(false);
        }
        let topic = String::from_utf8_lossy(&self.input[at + 2..topic_end]).into_owned();
        let ack = acked.then(|| AckTo {
            id: u16::from_be_bytes([self.input[topic_end], self.input[topic_end + 1]]),
            qos,
        });
        // Nobody may be taking what is read: reports wait within a bound, and short.
        if self.signals.len() < MAX_SIGNALS {
            let topic: String = topic.chars().take(256).collect();
            self.signals.push_back(Signal::Report(format!(
                "message on {topic}: {} bytes exceed maxPacketBytes, {limit}; it was skipped",
                body.end
            )));
        } else {
            self.skipped += 1;
        }
        self.skip = Some(Skip { bytes: body.end, ack });
        Ok(true)
    }

    fn take(&mut self, packet: Incoming) -> Result<(), SessionError> {
        match packet {
            Incoming::Publish(publish) => self.arrive(publish),
            Incoming::PubAck(ack) => {
                let acked = self.flow.on_puback(ack);
                self.acked(0, acked);
            }
            Incoming::PubRec(ack) => {
                let id = ack.id;
                let acked = self.flow.on_pubrec(ack);
                self.acked(id, acked);
            }
            Incoming::PubRel(id) => {
                self.flow.released(id);
                self.version.ack(AckKind::Complete, id, false, &mut self.output);
            }
            Incoming::PubComp(id) => self.flow.on_pubcomp(id),
            Incoming::SubAck(Ack { id, refusal }) => {
                self.flow.control_done(id);
                if let Some(control) = self.controls.remove(&id) {
                    self.signals.push_back(Signal::Subscribed(control, refusal));
                }
            }
            Incoming::UnsubAck(id) => {
                self.flow.control_done(id);
                if self.controls.remove(&id).is_some() {
                    self.signals.push_back(Signal::Unsubscribed);
                }
            }
            Incoming::ConnAck(connack) => self.connack = Some(connack),
            Incoming::Pong => {}
            Incoming::Disconnect(Goodbye { reason, over_us }) => {
                self.last_words = Some(format!("the broker said: {reason}"));
                self.blameless |= !over_us;
            }
        }
        Ok(())
    }

    fn acked(&mut self, id: u16, acked: Acked) {
        match acked {
            Acked::Done => {}
            Acked::Release => self.version.ack(AckKind::Release, id, false, &mut self.output),
            Acked::Refused(message, refusal) => {
                if refusal == Refusal::NoSubscribers && message.options.qos == MqttQos::ExactlyOnce {
                    self.version.ack(AckKind::Release, id, false, &mut self.output);
                }
                match (message.what, refusal) {
                    (What::Request(id), refusal) => self.signals.push_back(Signal::Refused(id, refusal)),
                    // An event for nobody.
                    (_, Refusal::NoSubscribers) => {}
                    (_, Refusal::Because(reason)) => self.signals.push_back(Signal::Report(format!(
                        "the broker refused a message on {}: {reason}",
                        String::from_utf8_lossy(&message.topic)
                    ))),
                }
            }
        }
    }

    fn arrive(&mut self, mut publish: Publish) {
        if publish.qos == MqttQos::ExactlyOnce && self.flow.is_received(publish.id) {
            // It was taken; the broker has not heard of it.
            self.version.ack(AckKind::Received, publish.id, false, &mut self.output);
            return;
        }
        if !self.intake {
            // Not acknowledged: the broker keeps it for the next session.
            return;
        }
        let size = publish.size();
        if publish.qos == MqttQos::AtMostOnce
            && !self.arrived.is_empty()
            && self.arrived_bytes + size > self.limits.buffered_bytes
        {
            // MQTT-13.
            self.dropped += 1;
            return;
        }
        if self.is_behind {
            // It may wait for long, and would hold all that was read together with it.
            publish.detach(READ_CHUNK);
        }
        self.arrived_bytes += size;
        self.arrived.push_back(publish);
    }

    /// Whether something waits to be looked at.
    pub(crate) fn has_news(&self) -> bool {
        !self.arrived.is_empty()
            || !self.signals.is_empty()
            || self.flow.has_confirmed()
            || self.dropped > 0
            || self.skipped > 0
            || self.ended.is_some()
    }

    /// Whether a refused subscription of cancellations is the first one of this end.
    pub(crate) fn is_first_refusal(&self) -> bool {
        !std::mem::replace(&mut self.carry.lock().cancellation_refused, true)
    }

    /// Reply topics that the broker goes on sending to a session that it keeps.
    pub(crate) fn keep_reply_filters(&self, filters: Vec<String>) {
        self.carry.lock().reply_filters = filters;
    }

    /// The next message that arrived.
    pub(crate) fn next_arrival(&mut self) -> Option<Publish> {
        let publish = self.arrived.pop_front()?;
        self.arrived_bytes -= publish.size();
        Some(publish)
    }

    /// A report of messages that were dropped since the last one.
    pub(crate) fn take_dropped(&mut self) -> Option<String> {
        if self.skipped > 0 {
            let skipped = std::mem::take(&mut self.skipped);
            return Some(format!("{skipped} more messages exceeded maxPacketBytes; they were skipped"));
        }
        if self.dropped == 0 {
            return None;
        }
        let dropped = std::mem::take(&mut self.dropped);
        self.dropped_before += dropped;
        Some(format!(
            "{dropped} messages of quality of service 0 ({} in this session) were dropped: bufferedBytes, {}, were \
             waiting",
            self.dropped_before, self.limits.buffered_bytes
        ))
    }
}

/// Whether an error is the network's, and not the other end's.
fn is_of_the_network(kind: io::ErrorKind) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        kind,
        Kind::TimedOut
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::NetworkDown
            | Kind::AddrNotAvailable
    )
}

/// Writes a message, unless it is one that the broker has said it does not take.
fn write_checked(
    version: Version,
    broker: &ConnAck,
    topic: [&[u8]; 2],
    payload: &[u8],
    id: u16,
    options: &PublishOptions,
    out: &mut BytesMut,
) -> Result<(), String> {
    if options.retain && broker.no_retain {
        return Err("the broker does not keep retained messages".to_owned());
    }
    let start = out.len();
    version.publish(topic, payload, id, options, out)?;
    let size = out.len() - start;
    match broker.max_packet_size {
        Some(limit) if size > limit as usize => {
            Err(format!("a packet of {size} bytes exceeds what the broker takes, {limit}"))
        }
        _ => Ok(()),
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // MQTT-22.
        if self.is_open && self.is_closed && !self.blameless {
            self.flow.closed(self.written);
        }
        self.carry.lock().flow = std::mem::take(&mut self.flow);
    }
}
