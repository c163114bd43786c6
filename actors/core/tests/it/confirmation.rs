// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events whose transporter says later what the broker made of them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::StreamExt;
use martlet_core::backoff::BackoffOptions;
use martlet_core::error::SessionError;
use martlet_core::packet::IncomingPacket;
use martlet_core::transport::{
    Dial, Inbound, Outbound, OutboundMessage, PacketId, Response, Session, SessionPlan, SessionReader,
    SessionWriter, Taken, TransportId, TransportInfo, WriteError,
};
use martlet_core::{CallError, ClientOptions, ClientProxy, ConnectionStatus};
use parking_lot::Mutex;

/// A broker that says what the test says.
#[derive(Debug, Clone, Default)]
struct Broker(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    taken: Vec<PacketId>,
    say: VecDeque<(PacketId, Option<String>)>,
    lost: bool,
    unreachable: bool,
    waker: Option<Waker>,
}

impl Broker {
    fn client(&self) -> ClientProxy {
        ClientProxy::new(self.clone(), ClientOptions::default())
    }

    /// A client that makes a lost connection anew.
    fn lasting_client(&self) -> ClientProxy {
        let mut options = ClientOptions::default();
        options.reconnect = true;
        options.retry_delay = BackoffOptions::fixed(Duration::from_millis(5));
        ClientProxy::new(self.clone(), options)
    }

    /// Waits for so many events.
    async fn takes(&self, events: usize) -> Vec<PacketId> {
        while self.0.lock().taken.len() < events {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.0.lock().taken.clone()
    }

    fn tell(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        change(&mut state);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}

impl Dial for Broker {
    type Session = Self;

    fn info(&self) -> TransportInfo {
        TransportInfo::new(TransportId::custom(2000), "confirming")
    }

    async fn dial(&self, _: SessionPlan) -> Result<Self, SessionError> {
        let state = self.0.lock();
        if state.unreachable { Err(SessionError::refused("nobody there")) } else { Ok(self.clone()) }
    }
}

impl Session for Broker {
    type ReplyTo = ();
    type Reader = Self;
    type Writer = Self;

    fn peer(&self) -> Arc<str> {
        "broker".into()
    }

    fn split(self) -> (Self, Self) {
        (self.clone(), self)
    }
}

impl SessionReader<()> for Broker {
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        _: &mut IncomingPacket,
    ) -> Poll<Option<Result<Inbound<()>, SessionError>>> {
        let mut state = self.0.lock();
        if let Some((receipt, refused)) = state.say.pop_front() {
            return Poll::Ready(Some(Ok(Inbound::Confirmed { receipt, refused })));
        }
        if std::mem::take(&mut state.lost) {
            return Poll::Ready(Some(Err(SessionError::lost("cut"))));
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn drain(&mut self) {}
}

impl SessionWriter<()> for Broker {
    fn write(&mut self, _: Outbound<()>) -> Result<(), WriteError> {
        Ok(())
    }

    fn write_response(&mut self, _: &mut Response<()>) -> Result<(), WriteError> {
        Ok(())
    }

    fn write_event(&mut self, message: OutboundMessage, receipt: PacketId) -> Result<Taken, WriteError> {
        if message.pattern.route().as_str() == "at-once" {
            return Ok(Taken::Written);
        }
        self.0.lock().taken.push(receipt);
        Ok(if message.pattern.route().as_str() == "kept" { Taken::Carried } else { Taken::Confirming })
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        Poll::Ready(Ok(()))
    }

    fn pending_bytes(&self) -> usize {
        0
    }

    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        Poll::Ready(Ok(()))
    }
}

#[actix::test]
async fn an_event_resolves_when_it_is_confirmed() {
    let broker = Broker::default();
    let client = broker.client();
    client.emit("at-once", 1).await.unwrap();
    let mut event = client.emit("evt", 1);
    let receipt = broker.takes(1).await[0];
    assert!(futures::poll!(&mut event).is_pending());
    assert_eq!(client.pending(), 1);
    broker.tell(|state| state.say.push_back((receipt, None)));
    event.await.unwrap();
    assert_eq!((client.pending(), client.occupied()), (0, 0));
}

#[actix::test]
async fn an_event_that_the_broker_refuses_is_not_sent() {
    let broker = Broker::default();
    let client = broker.client();
    let (first, second) = (client.emit("evt", 1), client.emit("evt", 2));
    let receipts = broker.takes(2).await;
    // In any order.
    broker.tell(|state| state.say.push_back((receipts[1], None)));
    broker.tell(|state| state.say.push_back((receipts[0], Some("it is full".to_owned()))));
    let error = first.await.unwrap_err();
    assert!(error.is_not_sent() && error.to_string().contains("it is full"), "{error}");
    second.await.unwrap();
}

#[actix::test]
async fn an_event_whose_connection_is_lost_before_it_is_confirmed_is_lost() {
    let broker = Broker::default();
    let client = broker.client();
    let event = client.emit("evt", 1);
    broker.takes(1).await;
    broker.tell(|state| state.lost = true);
    let error = event.await.unwrap_err();
    assert!(matches!(error, CallError::Lost { .. }), "{error}");
    assert_eq!(client.occupied(), 0);
}

/// Cuts the line and waits until there is another.
async fn next_session(broker: &Broker, client: &ClientProxy) {
    let mut statuses = client.status_stream();
    broker.tell(|state| state.lost = true);
    while statuses.next().await != Some(ConnectionStatus::Reconnecting) {}
    while statuses.next().await != Some(ConnectionStatus::Connected) {}
}

#[actix::test]
async fn an_event_that_the_transporter_carries_over_is_confirmed_in_a_later_session() {
    let broker = Broker::default();
    let client = broker.lasting_client();
    let (mut kept, other) = (client.emit("kept", 1), client.emit("evt", 2));
    let receipt = broker.takes(2).await[0];
    next_session(&broker, &client).await;
    assert!(matches!(other.await, Err(CallError::Lost { .. })));
    assert!(futures::poll!(&mut kept).is_pending());
    assert_eq!(client.pending(), 1);
    next_session(&broker, &client).await;
    broker.tell(|state| state.say.push_back((receipt, None)));
    kept.await.unwrap();
    assert_eq!((client.pending(), client.occupied()), (0, 0));
}

#[actix::test]
async fn a_refusal_says_not_sent_only_where_no_earlier_session_can_have_sent_it() {
    let broker = Broker::default();
    let client = broker.lasting_client();
    let first = client.emit("kept", 1);
    let receipt = broker.takes(1).await[0];
    next_session(&broker, &client).await;
    let second = client.emit("kept", 2);
    let fresh = broker.takes(2).await[1];
    broker.tell(|state| state.say.extend([receipt, fresh].map(|receipt| (receipt, Some("full".to_owned())))));
    let error = first.await.unwrap_err();
    assert!(matches!(&error, CallError::Lost { cause } if cause.to_string().contains("full")), "{error}");
    assert!(second.await.unwrap_err().is_not_sent());
}

#[actix::test]
async fn an_event_that_is_carried_over_ends_with_its_time_or_the_client_or_where_no_session_follows() {
    let broker = Broker::default();
    // A client that does not make the connection anew.
    let client = broker.client();
    let event = client.emit("kept", 1);
    broker.takes(1).await;
    broker.tell(|state| state.lost = true);
    assert!(matches!(event.await, Err(CallError::Lost { .. })));
    // One that tries and fails.
    let client = broker.lasting_client();
    let event = client.emit("kept", 2);
    broker.takes(2).await;
    broker.tell(|state| (state.unreachable, state.lost) = (true, true));
    assert!(matches!(event.await, Err(CallError::Lost { .. })));
    broker.tell(|state| state.unreachable = false);
    // Closed between two sessions.
    let event = client.emit("kept", 3);
    broker.takes(3).await;
    client.close().await;
    assert!(matches!(event.await, Err(CallError::Closed)));
    // In time.
    let mut options = ClientOptions::default();
    (options.reconnect, options.timeout) = (true, Some(Duration::from_millis(50)));
    let client = ClientProxy::new(broker.clone(), options);
    let event = client.emit("kept", 4);
    broker.takes(4).await;
    next_session(&broker, &client).await;
    assert!(matches!(event.await, Err(CallError::Timeout { .. })));
    assert_eq!((client.pending(), client.occupied()), (0, 0));
}

#[actix::test]
async fn an_event_that_is_not_confirmed_in_time_times_out() {
    let broker = Broker::default();
    let mut options = ClientOptions::default();
    options.timeout = Some(Duration::from_millis(50));
    let client = ClientProxy::new(broker.clone(), options);
    let error = client.emit("evt", 1).await.unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error}");
    assert_eq!((broker.takes(1).await.len(), client.occupied()), (1, 0));
}

#[actix::test]
async fn an_event_that_nobody_waits_for_leaves_nothing_behind() {
    let broker = Broker::default();
    let client = broker.client();
    drop(client.emit("evt", 1));
    let receipt = broker.takes(1).await[0];
    assert_eq!(client.occupied(), 1);
    broker.tell(|state| {
        state.say.push_back((receipt, None));
        // Said twice, and said of what nobody knows.
        state.say.push_back((receipt, Some("late".to_owned())));
    });
    while client.occupied() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
