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

/// A message of ours that the broker must acknowledge.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) topic: Bytes,
    pub(crate) payload: Bytes,
    pub(crate) options: PublishOptions,
    /// The call it is the request of; its call ends with its connection.
    pub(crate) request: Option<PacketId>,
}

impl Message {
    fn size(&self) -> usize {
        self.topic.len() + self.payload.len() + 16
    }
}

#[derive(Debug)]
struct Sent {
    order: u64,
    message: Message,
    /// PUBREC came, PUBREL went out.
    released: bool,
}

/// What to send again on a new connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Again {
    Publish(u16),
    Release(u16),
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
    waiting: VecDeque<Message>,
    waiting_bytes: usize,
    /// Ids of subscribing and unsubscribing under way.
    control: HashSet<u16>,
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
        let is_two = self.waiting.front()?.options.qos == MqttQos::ExactlyOnce;
        if self.sent.len() >= window.all || is_two && self.twos >= window.twos {
            return None;
        }
        let id = self.fresh_id()?;
        let message = self.waiting.pop_front()?;
        self.waiting_bytes -= message.size();
        self.twos += usize::from(is_two);
        self.order += 1;
        let sent = Sent { order: self.order, message, released: false };
        Some((id, &self.sent.entry(id).insert_entry(sent).into_mut().message))
    }

    /// Ends an exchange.
    pub(crate) fn forget(&mut self, id: u16) -> Option<Message> {
        let message = self.sent.remove(&id)?.message;
        self.twos -= usize::from(message.options.qos == MqttQos::ExactlyOnce);
        Some(message)
    }

    pub(crate) fn message(&self, id: u16) -> Option<&Message> {
        Some(&self.sent.get(&id)?.message)
    }

    /// PUBACK.
    pub(crate) fn on_puback(&mut self, ack: Ack) -> Acked {
        match (self.forget(ack.id), ack.refusal) {
            (Some(message), Some(refusal)) => Acked::Refused(message, refusal),
            _ => Acked::Done,
        }
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
                match sent.message.request {
                    Some(_) => Acked::Refused(sent.message.clone(), Refusal::NoSubscribers),
                    None => Acked::Release,
                }
            }
            (Some(_), Some(refusal)) => match self.forget(ack.id) {
                Some(message) => Acked::Refused(message, refusal),
                None => Acked::Done,
            },
        }
    }

    /// PUBCOMP.
    pub(crate) fn on_pubcomp(&mut self, id: u16) {
        self.forget(id);
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

    /// What is to be sent again, in order. Without the broker's session, everything it has not finished is queued
    /// as new, except requests: their calls have ended.
    pub(crate) fn resume(&mut self, session_present: bool) -> Vec<Again> {
        self.control.clear();
        let unsent = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        let mut sent: Vec<(u64, u16, bool)> =
            self.sent.iter().map(|(id, sent)| (sent.order, *id, sent.released)).collect();
        sent.sort_unstable();
        let again = if session_present {
            // MQTT-16.
            let again = |(_, id, released)| if released { Again::Release(id) } else { Again::Publish(id) };
            sent.into_iter().map(again).collect()
        } else {
            self.received.clear();
            // MQTT-17.
            for (_, id, _) in sent {
                if let Some(message) = self.forget(id)
                    && message.request.is_none()
                {
                    self.push(message);
                }
            }
            Vec::new()
        };
        for message in unsent.into_iter().filter(|message| message.request.is_none()) {
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
            request: None,
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
        flow.push(Message { request: Some(id), ..message("request", MqttQos::AtLeastOnce) });
        flow.next(window(2));
        flow.next(window(2));
        flow.received(9);
        assert_eq!(flow.resume(false), []);
        assert!(!flow.is_received(9));
        let names: Vec<_> = topics(&mut flow).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["a", "b", "c"]);
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
