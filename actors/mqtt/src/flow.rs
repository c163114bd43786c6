// SPDX-License-Identifier: MIT OR Apache-2.0
//! The protocol state of quality of service 1 and 2, pure: no connection, no clock.
//!
//! It outlives a connection: the transporter keeps it between two sessions of one end (MQTT-16, MQTT-17).

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use martlet_core::transport::PacketId;

use crate::driver::{Ack, Refusal};
use crate::options::MqttQos;
use crate::record::PublishOptions;

/// How many connections a broker may close over the same message.
const MAX_CLOSED_OVER: u8 = 10;

/// A message of ours that the broker must acknowledge.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) topic: Bytes,
    pub(crate) payload: Bytes,
    pub(crate) options: PublishOptions,
    pub(crate) what: What,
    /// How many connections the broker has closed over it, as far as that can be told.
    pub(crate) closed_over: u8,
}

/// Who waits for the broker's word on a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// The call of this id, which ends with its connection.
    Request(PacketId),
    /// An event of this receipt.
    Event(PacketId),
    /// Nobody: a reply, most often.
    Unwatched,
}

impl Message {
    fn size(&self) -> usize {
        self.topic.len() + self.payload.len() + 16
    }

    fn is_request(&self) -> bool {
        matches!(self.what, What::Request(_))
    }
}

#[derive(Debug)]
struct Sent {
    order: u64,
    message: Message,
    /// PUBREC came, PUBREL went out.
    released: bool,
    /// Only its id is left of it, until the broker has forgotten that: there is nothing to send again.
    given_up: bool,
    /// Where it begins in what goes out on this connection; `None` if it was not written to it.
    at: Option<u64>,
}

/// Why a message is given up.
pub(crate) fn given_up() -> String {
    format!("the broker closed the connection {MAX_CLOSED_OVER} times after this message was sent")
}

/// What to send again on a new connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Again {
    Publish(u16),
    Release(u16),
    /// It is not sent again: the broker, it seems, closes the connection over it.
    GiveUp(u16),
    /// The same, of quality of service 2: the broker may know its id, and is to forget it.
    GiveUpAndRelease(u16),
}

/// What an acknowledgement led to.
#[derive(Debug)]
pub(crate) enum Acked {
    /// PUBREL is to be sent.
    Release,
    /// The message is with the broker.
    Done,
    /// The broker does not want it, or has nobody for it.
    Refused(Message, Refusal),
}

/// How many messages may be under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) all: usize,
    /// Of quality of service 2.
    pub(crate) twos: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    last_id: u16,
    order: u64,
    sent: HashMap<u16, Sent>,
    /// How many of them are of quality of service 2.
    twos: usize,
    /// One over which the broker may have closed the connection: nothing goes out beside it.
    alone: Option<u16>,
    /// The broker has closed the last connection when so many bytes had been written to it.
    closed_at: Option<u64>,
    waiting: VecDeque<Message>,
    waiting_bytes: usize,
    /// Ids of subscribing and unsubscribing under way.
    control: HashSet<u16>,
    /// What the broker made of events, not yet told. It outlives the connection, too: nobody would say it again.
    confirmed: VecDeque<(PacketId, Option<String>)>,
    /// Ids of messages of quality of service 2 that were taken and not yet released by the broker.
    received: HashSet<u16>,
}

impl Flow {
    fn fresh_id(&mut self) -> Option<u16> {
        for _ in 0..u16::MAX {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            if !self.sent.contains_key(&self.last_id) && !self.control.contains(&self.last_id) {
                return Some(self.last_id);
            }
        }
        None
    }

    // === outgoing ===

    pub(crate) fn push(&mut self, message: Message) {
        self.waiting_bytes += message.size();
        self.waiting.push_back(message);
    }

    /// Takes the next message that may go out, and its id.
    pub(crate) fn next(&mut self, window: Window) -> Option<(u16, &Message)> {
        let first = self.waiting.front()?;
        let is_two = first.options.qos == MqttQos::ExactlyOnce;
        let is_suspect = first.closed_over > 0;
        if self.sent.len() >= window.all || is_two && self.twos >= window.twos {
            return None;
        }
        // MQTT-22: so that it can be told over which of them the connection is closed.
        if self.alone.is_some() || is_suspect && !self.sent.is_empty() {
            return None;
        }
        let id = self.fresh_id()?;
        let message = self.waiting.pop_front()?;
        self.waiting_bytes -= message.size();
        self.twos += usize::from(is_two);
        self.alone = is_suspect.then_some(id);
        self.order += 1;
        let sent = Sent { order: self.order, message, released: false, given_up: false, at: None };
        Some((id, &self.sent.entry(id).insert_entry(sent).into_mut().message))
    }

    /// Takes back a request that still waits for room in the window. False if there is none.
    pub(crate) fn withdraw(&mut self, id: PacketId) -> bool {
        let at = self.waiting.iter().position(|message| message.what == What::Request(id));
        let Some(message) = at.and_then(|at| self.waiting.remove(at)) else { return false };
        self.waiting_bytes -= message.size();
        true
    }

    /// Ends an exchange.
    pub(crate) fn forget(&mut self, id: u16) -> Option<Message> {
        let message = self.sent.remove(&id)?.message;
        self.alone = self.alone.filter(|alone| *alone != id);
        self.twos -= usize::from(message.options.qos == MqttQos::ExactlyOnce);
        Some(message)
    }

    pub(crate) fn message(&self, id: u16) -> Option<&Message> {
        Some(&self.sent.get(&id)?.message)
    }

    /// Ends an exchange with what the broker has said, which is noted for those who wait for it.
    fn end(&mut self, id: u16, refusal: Option<Refusal>) -> Acked {
        let Some(message) = self.forget(id) else { return Acked::Done };
        if let What::Event(receipt) = message.what {
            // MQTT-21: an event for nobody is with the broker, too.
            let refused = match &refusal {
                None | Some(Refusal::NoSubscribers) => None,
                Some(Refusal::Because(reason)) => Some(format!("the broker refused the event: {reason}")),
            };
            self.confirmed.push_back((receipt, refused));
        }
        refusal.map_or(Acked::Done, |refusal| Acked::Refused(message, refusal))
    }

    /// Notes where a message begins in what goes out.
    pub(crate) fn sent_at(&mut self, id: u16, at: u64) {
        if let Some(sent) = self.sent.get_mut(&id) {
            sent.at = Some(at);
        }
    }

    /// Ends a message without the broker's word on it. If it is to be released, its id stays taken until the broker
    /// has forgotten it: otherwise the next message under that id would be taken for this one.
    pub(crate) fn give_up(&mut self, id: u16, reason: &str, release: bool) -> Option<Message> {
        let message = match release {
            false => self.forget(id)?,
            true => {
                let sent = self.sent.get_mut(&id)?;
                (sent.released, sent.given_up) = (true, true);
                let rest = Message {
                    topic: Bytes::new(),
                    payload: Bytes::new(),
                    what: What::Unwatched,
                    closed_over: 0,
                    ..sent.message.clone()
                };
                std::mem::replace(&mut sent.message, rest)
            }
        };
        if let What::Event(receipt) = message.what {
            self.confirmed.push_back((receipt, Some(reason.to_owned())));
        }
        Some(message)
    }

    /// PUBACK.
    pub(crate) fn on_puback(&mut self, ack: Ack) -> Acked {
        self.end(ack.id, ack.refusal)
    }

    /// PUBREC.
    pub(crate) fn on_pubrec(&mut self, ack: Ack) -> Acked {
        match (self.sent.get_mut(&ack.id), ack.refusal) {
            // An unknown one is released, too: the broker is to forget it.
            (None, _) => Acked::Release,
            (Some(sent), None) => {
                sent.released = true;
                Acked::Release
            }
            (Some(sent), Some(Refusal::NoSubscribers)) => {
                sent.released = true;
                match sent.message.is_request() {
                    true => Acked::Refused(sent.message.clone(), Refusal::NoSubscribers),
                    false => Acked::Release,
                }
            }
            (Some(_), refusal) => self.end(ack.id, refusal),
        }
    }

    /// PUBCOMP: only now does the message not depend on the session any more. (mosquitto passes it on when it is
    /// released, not when it says PUBREC.)
    pub(crate) fn on_pubcomp(&mut self, id: u16) {
        self.end(id, None);
    }

    /// What the broker made of an event: its receipt, and why it was refused if it was.
    pub(crate) fn next_confirmed(&mut self) -> Option<(PacketId, Option<String>)> {
        self.confirmed.pop_front()
    }

    pub(crate) fn has_confirmed(&self) -> bool {
        !self.confirmed.is_empty()
    }

    /// Bytes of messages that wait for room in the window.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the broker has everything.
    pub(crate) fn is_idle(&self) -> bool {
        self.sent.is_empty() && self.waiting.is_empty()
    }

    // === subscribing ===

    pub(crate) fn control_id(&mut self) -> Option<u16> {
        let id = self.fresh_id()?;
        self.control.insert(id);
        Some(id)
    }

    pub(crate) fn control_done(&mut self, id: u16) {
        self.control.remove(&id);
    }

    // === incoming ===

    /// Whether a message of quality of service 2 is one that was taken already.
    pub(crate) fn is_received(&self, id: u16) -> bool {
        self.received.contains(&id)
    }

    pub(crate) fn received(&mut self, id: u16) {
        self.received.insert(id);
    }

    /// PUBREL.
    pub(crate) fn released(&mut self, id: u16) {
        self.received.remove(&id);
    }

    // === a new connection ===

    /// The broker has closed the connection, to which so many bytes had been written.
    pub(crate) fn closed(&mut self, written: u64) {
        self.closed_at = Some(written);
    }

    /// MQTT-22: the message over which the broker may have closed the last connection: it takes them in order, so it
    /// is the first that was on its way. Not one whose PUBREC still holds.
    fn suspect(&self, session_present: bool) -> Option<u16> {
        let written = self.closed_at?;
        let begun = |sent: &Sent| sent.at.is_some_and(|at| at < written);
        let open = |sent: &Sent| !(session_present && sent.released);
        let suspects = self.sent.iter().filter(|(_, sent)| begun(sent) && open(sent));
        suspects.min_by_key(|(_, sent)| sent.order).map(|(id, _)| *id)
    }

    /// What is to be sent again, in order. Without the broker's session, everything it has not finished is queued
    /// as new, except requests: their calls have ended.
    pub(crate) fn resume(&mut self, session_present: bool) -> Vec<Again> {
        self.control.clear();
        let unsent = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        let mut sent: Vec<(u64, u16, bool)> =
            self.sent.iter().map(|(id, sent)| (sent.order, *id, sent.released)).collect();
        sent.sort_unstable();
        let mut again = Vec::new();
        if let Some(id) = self.suspect(session_present)
            && let Some(suspect) = self.sent.get_mut(&id)
        {
            suspect.message.closed_over += 1;
            if suspect.message.closed_over >= MAX_CLOSED_OVER {
                let release = session_present && suspect.message.options.qos == MqttQos::ExactlyOnce;
                again.push(if release { Again::GiveUpAndRelease(id) } else { Again::GiveUp(id) });
                sent.retain(|(_, other, _)| *other != id);
            }
        }
        self.closed_at = None;
        self.alone = None;
        self.sent.values_mut().for_each(|sent| sent.at = None);
        if session_present {
            // MQTT-16.
            let each = |(_, id, released)| if released { Again::Release(id) } else { Again::Publish(id) };
            again.extend(sent.into_iter().map(each));
        } else {
            self.received.clear();
            // MQTT-17.
            for (_, id, _) in sent {
                let given_up = self.sent.get(&id).is_some_and(|sent| sent.given_up);
                if let Some(message) = self.forget(id)
                    && !message.is_request()
                    && !given_up
                {
                    self.push(message);
                }
            }
        }
        for message in unsent.into_iter().filter(|message| !message.is_request()) {
            self.push(message);
        }
        again
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn window(all: usize) -> Window {
        Window { all, twos: all }
    }

    fn message(name: &'static str, qos: MqttQos) -> Message {
        Message {
            topic: Bytes::from_static(name.as_bytes()),
            payload: Bytes::new(),
            options: PublishOptions { qos, ..PublishOptions::default() },
            what: What::Unwatched,
            closed_over: 0,
        }
    }

    fn ack(id: u16) -> Ack {
        Ack { id, refusal: None }
    }

    fn topics(flow: &mut Flow) -> Vec<(u16, String)> {
        let mut topics = Vec::new();
        while let Some((id, message)) = flow.next(window(usize::MAX)) {
            topics.push((id, String::from_utf8(message.topic.to_vec()).unwrap()));
        }
        topics
    }

    #[test]
    fn the_window_holds_messages_back_until_the_broker_has_acknowledged() {
        let mut flow = Flow::default();
        for name in ["a", "b", "c"] {
            flow.push(message(name, MqttQos::AtLeastOnce));
        }
        assert_eq!(flow.next(window(2)).unwrap().0, 1);
        assert_eq!(flow.next(window(2)).unwrap().0, 2);
        assert!(flow.next(window(2)).is_none());
        assert!(matches!(flow.on_puback(ack(1)), Acked::Done));
        assert_eq!(flow.waiting_bytes(), 17);
        assert_eq!(flow.next(window(2)).unwrap().0, 3);
        assert_eq!(flow.waiting_bytes(), 0);
        assert!(!flow.is_idle());
        flow.on_puback(ack(2));
        flow.on_puback(ack(3));
        assert!(flow.is_idle());
    }

    #[test]
    fn exactly_once_takes_four_packets() {
        let mut flow = Flow::default();
        flow.push(message("a", MqttQos::ExactlyOnce));
        assert_eq!(flow.next(window(1)).unwrap().0, 1);
        assert!(matches!(flow.on_pubrec(ack(1)), Acked::Release));
        assert!(!flow.is_idle());
        flow.on_pubcomp(1);
        assert!(flow.is_idle());
    }

    /// MQTT-21.
    #[test]
    fn events_are_confirmed_when_their_exchange_is_complete() {
        let receipts: [PacketId; 4] =
            ["1", "2", "3", "4"].map(|digit| PacketId::from_text(digit.repeat(21).as_bytes()).unwrap());
        let mut flow = Flow::default();
        for (receipt, qos) in receipts.iter().zip([1, 2, 1, 2]) {
            let qos = MqttQos::try_from(qos).unwrap();
            flow.push(Message { what: What::Event(*receipt), ..message("a", qos) });
        }
        topics(&mut flow);
        let no = |id, reason: &str| Ack { id, refusal: Some(Refusal::Because(reason.to_owned())) };
        assert!(matches!(flow.on_pubrec(ack(2)), Acked::Release));
        assert!(!flow.has_confirmed());
        flow.on_pubcomp(2);
        // Said in a session that ends before anyone is told.
        flow.resume(true);
        assert_eq!(flow.next_confirmed(), Some((receipts[1], None)));
        flow.on_puback(Ack { id: 1, refusal: Some(Refusal::NoSubscribers) });
        assert!(matches!(flow.on_puback(no(3, "not authorized")), Acked::Refused(..)));
        // A refusal ends the exchange: nothing is released.
        assert!(matches!(flow.on_pubrec(no(4, "quota exceeded")), Acked::Refused(..)));
        let told: Vec<_> = std::iter::from_fn(|| flow.next_confirmed()).collect();
        let refused = |reason: &str| Some(format!("the broker refused the event: {reason}"));
        assert_eq!(
            told,
            [
                (receipts[0], None),
                (receipts[2], refused("not authorized")),
                (receipts[3], refused("quota exceeded"))
            ]
        );
        assert!(flow.is_idle());
        // Said of what nobody knows.
        flow.on_puback(ack(1));
        flow.on_pubcomp(2);
        assert!(!flow.has_confirmed());
    }

    #[test]
    fn exactly_once_has_a_window_of_its_own() {
        let mut flow = Flow::default();
        for qos in [MqttQos::ExactlyOnce, MqttQos::AtLeastOnce, MqttQos::ExactlyOnce, MqttQos::AtLeastOnce] {
            flow.push(message("a", qos));
        }
        let narrow = Window { all: 10, twos: 1 };
        assert_eq!(flow.next(narrow).unwrap().0, 1);
        assert_eq!(flow.next(narrow).unwrap().0, 2);
        // In order: what is behind it waits, too.
        assert!(flow.next(narrow).is_none());
        flow.on_pubrec(ack(1));
        assert!(flow.next(narrow).is_none());
        flow.on_pubcomp(1);
        assert_eq!(flow.next(narrow).unwrap().0, 3);
        assert_eq!(flow.next(narrow).unwrap().0, 4);
    }

    /// MQTT-24.
    #[test]
    fn a_request_that_waits_can_be_taken_back() {
        let id = |digit: &str| PacketId::from_text(digit.repeat(21).as_bytes()).unwrap();
        let mut flow = Flow::default();
        for digit in ["1", "2", "3"] {
            flow.push(Message { what: What::Request(id(digit)), ..message("a", MqttQos::AtLeastOnce) });
        }
        flow.next(window(1));
        assert!(!flow.withdraw(id("1")), "it is on its way");
        assert!(flow.withdraw(id("2")) && !flow.withdraw(id("2")));
        assert_eq!(flow.waiting_bytes(), 17);
        flow.on_puback(ack(1));
        assert_eq!(flow.next(window(1)).unwrap().1.what, What::Request(id("3")));
        assert_eq!(flow.waiting_bytes(), 0);
    }

    #[test]
    fn a_kept_session_goes_on_where_it_was() {
        let mut flow = Flow::default();
        for name in ["a", "b", "c"] {
            flow.push(message(name, MqttQos::ExactlyOnce));
        }
        flow.next(window(2));
        flow.next(window(2));
        flow.on_pubrec(ack(1));
        flow.received(9);
        assert_eq!(flow.resume(true), [Again::Release(1), Again::Publish(2)]);
        assert!(flow.is_received(9));
        assert_eq!(topics(&mut flow), [(3, "c".to_owned())]);
    }

    #[test]
    fn a_lost_session_publishes_what_is_unfinished_anew_except_requests() {
        let mut flow = Flow::default();
        for name in ["a", "b", "c"] {
            flow.push(message(name, MqttQos::AtLeastOnce));
        }
        let id = PacketId::from_text(b"0abcdef000000070fffff").unwrap();
        flow.push(Message { what: What::Request(id), ..message("request", MqttQos::AtLeastOnce) });
        flow.next(window(2));
        flow.next(window(2));
        flow.received(9);
        assert_eq!(flow.resume(false), []);
        assert!(!flow.is_received(9));
        let names: Vec<_> = topics(&mut flow).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }

    /// A connection on which everything that is under way was written, and which the broker has closed.
    fn closed_after(flow: &mut Flow, kept: bool) -> Vec<Again> {
        for (id, _) in topics(flow) {
            flow.sent_at(id, u64::from(id));
        }
        flow.closed(u64::MAX);
        flow.resume(kept)
    }

    /// As a link writes them again.
    fn written_again(flow: &mut Flow, again: &[Again]) {
        for again in again {
            if let Again::Publish(id) = again {
                flow.sent_at(*id, 0);
            }
        }
    }

    fn gives_up(again: &[Again]) -> bool {
        again.iter().any(|again| matches!(again, Again::GiveUp(_) | Again::GiveUpAndRelease(_)))
    }

    /// MQTT-22.
    #[test]
    fn a_message_over_which_every_connection_is_closed_is_given_up_alone() {
        for (kept, qos) in [(true, 1), (false, 1), (true, 2), (false, 2)] {
            let mut flow = Flow::default();
            let receipt = PacketId::from_text(&[b'1'; 21]).unwrap();
            let first = message("a", MqttQos::try_from(qos).unwrap());
            flow.push(Message { what: What::Event(receipt), ..first });
            flow.push(message("b", MqttQos::AtLeastOnce));
            let mut again = Vec::new();
            for _ in 0..MAX_CLOSED_OVER {
                assert!(!gives_up(&again));
                written_again(&mut flow, &again);
                again = closed_after(&mut flow, kept);
            }
            let release = kept && qos == 2;
            let id = match again[0] {
                Again::GiveUp(id) if !release => id,
                Again::GiveUpAndRelease(id) if release => id,
                _ => panic!("{again:?}"),
            };
            let message = flow.give_up(id, &given_up(), release).unwrap();
            assert_eq!(&message.topic[..], b"a");
            let (told, reason) = flow.next_confirmed().unwrap();
            assert_eq!(
                (told, reason.as_deref()),
                (receipt, Some("the broker closed the connection 10 times after this message was sent"))
            );
            // The other one is at its first, however often it was on its way behind it.
            again.remove(0);
            written_again(&mut flow, &again);
            assert!(!gives_up(&closed_after(&mut flow, kept)));
            let other = flow.sent.values().map(|sent| &sent.message).chain(&flow.waiting);
            let other = other.filter(|message| message.topic == "b").map(|message| message.closed_over);
            assert_eq!(other.collect::<Vec<_>>(), [1]);
            // The broker may hold the id of what was released: it is not given to another message before PUBCOMP.
            assert_eq!(flow.sent.contains_key(&id), release || kept && id == 2);
            flow.on_pubcomp(id);
            assert!(!flow.sent.contains_key(&id));
            assert!(!flow.has_confirmed());
        }
    }

    /// MQTT-17.
    #[test]
    fn nothing_is_sent_of_what_was_given_up_when_the_broker_has_lost_the_session() {
        let mut flow = Flow::default();
        flow.push(message("a", MqttQos::ExactlyOnce));
        let (id, _) = topics(&mut flow).remove(0);
        flow.give_up(id, "why", true).unwrap();
        assert_eq!(flow.resume(true), [Again::Release(id)]);
        assert_eq!(flow.resume(false), []);
        assert_eq!(topics(&mut flow), []);
        assert!(flow.sent.is_empty());
    }

    /// MQTT-22.
    #[test]
    fn only_what_was_on_its_way_on_a_connection_that_the_broker_closed_counts() {
        for kept in [true, false] {
            let mut flow = Flow::default();
            flow.push(message("a", MqttQos::AtLeastOnce));
            let mut again = Vec::new();
            for round in 0..100u64 {
                written_again(&mut flow, &again);
                topics(&mut flow);
                match round % 3 {
                    // The line broke.
                    0 => flow.sent_at(1, 10),
                    // Nothing of it was written.
                    1 => {
                        flow.sent_at(1, 10);
                        flow.closed(10);
                    }
                    // It was not sent.
                    _ => {
                        flow.sent.values_mut().for_each(|sent| sent.at = None);
                        flow.closed(1000);
                    }
                }
                again = flow.resume(kept);
                assert!(!gives_up(&again));
            }
            // From the other side: a byte of it was.
            for round in 1..=MAX_CLOSED_OVER {
                topics(&mut flow);
                let id = *flow.sent.keys().next().unwrap();
                flow.sent_at(id, 10);
                flow.closed(11);
                assert_eq!(gives_up(&flow.resume(kept)), round == MAX_CLOSED_OVER);
            }
        }
    }

    /// MQTT-22: what the broker has said PUBREC to is its own, as long as it keeps the session.
    #[test]
    fn a_message_that_the_broker_has_received_is_never_given_up() {
        let mut flow = Flow::default();
        flow.push(message("a", MqttQos::ExactlyOnce));
        for (id, _) in topics(&mut flow) {
            flow.sent_at(id, 0);
        }
        flow.on_pubrec(ack(1));
        for _ in 0..100 {
            flow.closed(100);
            assert_eq!(flow.resume(true), [Again::Release(1)]);
        }
        // Without the session its word is worth nothing.
        flow.resume(false);
        for round in 1..=MAX_CLOSED_OVER {
            let (id, _) = topics(&mut flow)[0];
            flow.sent_at(id, 0);
            flow.on_pubrec(ack(id));
            flow.closed(100);
            assert_eq!(gives_up(&flow.resume(false)), round == MAX_CLOSED_OVER);
        }
    }

    /// MQTT-22: two messages on their way, and the broker has answered the first halfway.
    #[test]
    fn a_suspect_goes_out_alone() {
        let mut flow = Flow::default();
        flow.push(message("a", MqttQos::ExactlyOnce));
        for name in ["b", "c"] {
            flow.push(message(name, MqttQos::AtLeastOnce));
        }
        for (id, _) in topics(&mut flow) {
            flow.sent_at(id, 0);
        }
        flow.on_pubrec(ack(1));
        flow.closed(100);
        flow.resume(false);
        let [(id, name)] = &topics(&mut flow)[..] else { panic!() };
        assert_eq!(name, "a");
        flow.sent_at(*id, 0);
        flow.on_pubrec(ack(*id));
        assert!(topics(&mut flow).is_empty());
        flow.on_pubcomp(*id);
        let names: Vec<_> = topics(&mut flow).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["b", "c"]);
    }

    #[test]
    fn ids_under_way_are_not_given_out_again() {
        let mut flow = Flow::default();
        flow.push(message("a", MqttQos::AtLeastOnce));
        assert_eq!(flow.next(window(1)).unwrap().0, 1);
        let control: Vec<_> = (0..65_534).map(|_| flow.control_id().unwrap()).collect();
        assert!(!control.contains(&1) && !control.contains(&0));
        assert_eq!(flow.control_id(), None);
        flow.control_done(7);
        assert_eq!(flow.control_id(), Some(7));
    }
}
