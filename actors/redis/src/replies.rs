// SPDX-License-Identifier: MIT OR Apache-2.0
//! A client's reply channels: which are subscribed, who waits for that, who waits for a reply on them.

use bytes::Bytes;
use hashbrown::HashMap;
use martlet_core::pattern::Route;
use martlet_core::transport::PacketId;
use slab::Slab;

use crate::wire;

/// One reply channel.
struct Channel {
    route: Route,
    channel: Bytes,
    /// Requests to be published when the broker has confirmed the subscription; `None` once it has.
    waiting: Option<Vec<(PacketId, Bytes)>>,
    /// Requests that have no final reply yet.
    pending: usize,
    /// When it was last used, in requests of this client.
    used: u64,
}

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Publish it now.
    Publish,
    /// It waits for its reply channel, which is being subscribed.
    Wait,
    /// The same; the channel must be subscribed.
    Subscribe(Bytes),
}

/// The reply channels of a session.
pub(crate) struct ReplyChannels {
    channels: Slab<Channel>,
    by_route: HashMap<Route, usize>,
    by_channel: HashMap<Bytes, usize>,
    pending: HashMap<PacketId, usize>,
    /// Bytes of requests that wait.
    waiting_bytes: usize,
    requests: u64,
    limit: usize,
    /// What the ids of this client begin with.
    prefix: Option<[u8; 7]>,
}

impl ReplyChannels {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            channels: Slab::new(),
            by_route: HashMap::new(),
            by_channel: HashMap::new(),
            pending: HashMap::new(),
            waiting_bytes: 0,
            requests: 0,
            limit: limit.max(1),
            prefix: None,
        }
    }

    /// REDIS-8: a request to a route; `body` is copied if it must wait.
    pub(crate) fn request(&mut self, id: PacketId, route: &Route, body: &[u8]) -> Ask {
        if self.prefix.is_none() {
            self.prefix = id.text().as_bytes().first_chunk().copied();
        }
        self.requests += 1;
        let (key, fresh) = match self.by_route.get(route) {
            Some(&key) => (key, false),
            None => {
                let channel = wire::reply_channel(route.as_bytes());
                let key = self.channels.insert(Channel {
                    route: route.clone(),
                    channel: channel.clone(),
                    waiting: Some(Vec::new()),
                    pending: 0,
                    used: 0,
                });
                self.by_route.insert(route.clone(), key);
                self.by_channel.insert(channel, key);
                (key, true)
            }
        };
        let Some(entry) = self.channels.get_mut(key) else { return Ask::Publish };
        entry.pending += 1;
        entry.used = self.requests;
        self.pending.insert(id, key);
        match &mut entry.waiting {
            None => Ask::Publish,
            Some(waiting) => {
                self.waiting_bytes += body.len();
                waiting.push((id, Bytes::copy_from_slice(body)));
                if fresh { Ask::Subscribe(entry.channel.clone()) } else { Ask::Wait }
            }
        }
    }

    /// Whether an id is of the kind that this client gives.
    pub(crate) fn is_ours(&self, id: &[u8]) -> bool {
        self.prefix.is_some_and(|prefix| id.starts_with(&prefix))
    }

    /// A request has its final reply, or nobody waits for one any more. `true` when it was not published yet, and
    /// now never will be.
    pub(crate) fn release(&mut self, id: &PacketId) -> bool {
        let Some(entry) = self.pending.remove(id).and_then(|key| self.channels.get_mut(key)) else {
            return false;
        };
        entry.pending -= 1;
        let Some(waiting) = &mut entry.waiting else { return false };
        let Some(at) = waiting.iter().position(|(other, _)| other == id) else { return false };
        let (_, body) = waiting.remove(at);
        self.waiting_bytes -= body.len();
        true
    }

    /// The broker has subscribed a channel: what waited for it, in order.
    pub(crate) fn confirmed(&mut self, channel: &[u8]) -> Option<(Route, Vec<(PacketId, Bytes)>)> {
        let entry = self.by_channel.get(channel).and_then(|&key| self.channels.get_mut(key))?;
        let waiting = entry.waiting.take()?;
        self.waiting_bytes -= waiting.iter().map(|(_, body)| body.len()).sum::<usize>();
        Some((entry.route.clone(), waiting))
    }

    /// The broker refused to subscribe a channel: who waited for it.
    pub(crate) fn refused(&mut self, channel: &[u8]) -> Vec<PacketId> {
        let waiting = self.confirmed(channel).map(|(_, waiting)| waiting).unwrap_or_default();
        if let Some(key) = self.by_channel.remove(channel)
            && let Some(entry) = self.channels.try_remove(key)
        {
            self.by_route.remove(&entry.route);
        }
        waiting
            .into_iter()
            .map(|(id, _)| {
                self.pending.remove(&id);
                id
            })
            .collect()
    }

    /// REDIS-9: when there are too many, the channel that was idle for longest; it is forgotten.
    pub(crate) fn evict(&mut self) -> Option<Bytes> {
        if self.channels.len() <= self.limit {
            return None;
        }
        let idle = self.channels.iter().filter(|(_, entry)| entry.pending == 0 && entry.waiting.is_none());
        let (key, _) = idle.min_by_key(|(_, entry)| entry.used)?;
        let entry = self.channels.try_remove(key)?;
        self.by_route.remove(&entry.route);
        self.by_channel.remove(&entry.channel);
        Some(entry.channel)
    }

    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn id(number: u64) -> PacketId {
        PacketId::from_text(format!("abcdef0{number:014x}").as_bytes()).unwrap()
    }

    fn route(text: &str) -> Route {
        Route::from(text.to_owned())
    }

    #[test]
    fn requests_wait_until_their_reply_channel_is_subscribed() {
        let mut channels = ReplyChannels::new(10);
        let sum = route("sum");
        assert_eq!(channels.request(id(1), &sum, b"one"), Ask::Subscribe(Bytes::from_static(b"sum.reply")));
        assert_eq!(channels.request(id(2), &sum, b"two"), Ask::Wait);
        assert_eq!(channels.request(id(3), &sum, b"three"), Ask::Wait);
        assert_eq!(channels.waiting_bytes(), 11);
        // Cancelled before it was published.
        assert!(channels.release(&id(2)));
        let (back, waiting) = channels.confirmed(b"sum.reply").unwrap();
        assert_eq!((back, waiting.len()), (sum.clone(), 2));
        assert_eq!(waiting[1], (id(3), Bytes::from_static(b"three")));
        assert_eq!(channels.waiting_bytes(), 0);
        assert_eq!(channels.request(id(4), &sum, b"four"), Ask::Publish);
        assert!(!channels.release(&id(4)));
        assert!(channels.confirmed(b"sum.reply").is_none());
    }

    #[test]
    fn only_idle_channels_make_room() {
        let mut channels = ReplyChannels::new(2);
        for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
            channels.request(id(number as u64), &route(name), b"");
            channels.confirmed(format!("{name}.reply").as_bytes()).unwrap();
        }
        assert_eq!(channels.evict(), None, "all have a request");
        channels.release(&id(1));
        channels.release(&id(2));
        assert_eq!(channels.evict().unwrap(), "b.reply", "the one that was used least recently");
        assert_eq!(channels.evict(), None, "there is room");
        assert!(matches!(channels.request(id(7), &route("b"), b""), Ask::Subscribe(_)), "it is gone");
    }

    #[test]
    fn a_refused_channel_names_who_waited_and_is_asked_for_anew() {
        let mut channels = ReplyChannels::new(2);
        channels.request(id(1), &route("a"), b"x");
        channels.request(id(2), &route("a"), b"x");
        assert_eq!(channels.refused(b"a.reply"), [id(1), id(2)]);
        assert_eq!(channels.waiting_bytes(), 0);
        assert!(matches!(channels.request(id(3), &route("a"), b"x"), Ask::Subscribe(_)));
    }

    #[test]
    fn ids_of_other_clients_are_told_apart() {
        let mut channels = ReplyChannels::new(2);
        assert!(!channels.is_ours(b"abcdef000000000000001"));
        channels.request(id(1), &route("a"), b"x");
        assert!(channels.is_ours(b"abcdef000000000000009"));
        assert!(!channels.is_ours(b"bbcdef000000000000009"));
        assert!(!channels.is_ours(b"abc"));
    }
}
