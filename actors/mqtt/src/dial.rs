// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session with a broker is made, for both roles.

use std::sync::Arc;

use martlet_core::error::{SessionError, SessionErrorKind};
use martlet_core::settlement::Settles;
use martlet_core::transport::{Dial, Role, SessionPlan, TransportId, TransportInfo};
use martlet_core::{Headers, Pattern};
use parking_lot::Mutex;

use crate::driver::{ConnectRefusal, Login, MAX_REMAINING, Version};
use crate::link::{Carry, Control, Limits, Link, Signal};
use crate::net::{self, Target};
use crate::options::{MqttClientOptions, MqttQos, MqttServerOptions, MqttSubscribeOptions, without_secrets};
use crate::session::{MqttConnection, MqttSession, Settings, Shared};
use crate::topics;

/// How many subscriptions may wait for the broker's answer.
const SUBSCRIBE_WINDOW: usize = 1024;

/// Opens sessions with an MQTT broker: the transporter itself, for either role.
///
/// [`MqttServer`](crate::MqttServer) and [`MqttClient`](crate::MqttClient) put it into the runtime. Its clones, and
/// the sessions that follow each other, are one end for the broker: they share the client id and what MQTT has not
/// finished. The runtime that it is given to must not have a lower `high_water_bytes` than its own options.
#[derive(Debug, Clone)]
pub struct MqttDial {
    settings: Arc<Settings>,
    carry: Arc<Mutex<Carry>>,
}

impl MqttDial {
    /// For the serving side.
    pub fn server(options: &MqttServerOptions) -> Self {
        Self::new(Settings {
            client_id: client_id(options.client_id.as_deref()),
            common: options.common(),
            role: Role::Server,
            subscribe_options: options.subscribe_options,
            shared_group: options.shared_group.clone().filter(|group| !group.is_empty()),
            manual_acks: options.manual_acks || options.on_failure.is_some(),
            max_connection_attempts: options.max_connection_attempts,
            high_water_bytes: options.high_water_bytes,
            user_properties: Headers::new(),
            reply_idle: std::time::Duration::ZERO,
            codec: Arc::clone(&options.codec),
        })
    }

    /// For the calling side.
    pub fn client(options: &MqttClientOptions) -> Self {
        Self::new(Settings {
            client_id: client_id(options.client_id.as_deref()),
            common: options.common(),
            role: Role::Client,
            subscribe_options: MqttSubscribeOptions::default(),
            shared_group: None,
            manual_acks: false,
            max_connection_attempts: -1,
            high_water_bytes: options.client.high_water_bytes,
            user_properties: options.user_properties.clone(),
            reply_idle: options.reply_idle,
            codec: Arc::clone(&options.codec),
        })
    }

    fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), carry: Arc::default() }
    }

    /// The broker's address, without secrets.
    pub fn url(&self) -> String {
        without_secrets(&self.settings.common.url)
    }

    fn version(&self) -> Result<Version, SessionError> {
        match self.settings.common.protocol_version {
            4 => Ok(Version::V4),
            5 => Ok(Version::V5),
            other => Err(SessionError::fatal(format!(
                "option protocolVersion: 4 is MQTT 3.1.1 and 5 is MQTT 5; {other} is not spoken here"
            ))),
        }
    }

    /// What can be known to be wrong before anything is sent.
    fn check(&self) -> Result<(Version, Target), SessionError> {
        let common = &self.settings.common;
        let version = self.version()?;
        let target = Target::parse(&common.url).map_err(|reason| {
            SessionError::fatal(format!("option url: {}: {reason}", without_secrets(&common.url)))
        })?;
        if !common.clean && common.client_id.as_deref().is_none_or(str::is_empty) {
            return Err(SessionError::fatal(
                "option clean: false needs option clientId, by which the broker knows its session",
            ));
        }
        if let Some(will) = &common.will {
            topics::check_topic(&will.topic)
                .map_err(|reason| SessionError::fatal(format!("option will.topic: {reason}")))?;
        }
        if self.settings.subscribe_options.rh > 2 {
            let rh = self.settings.subscribe_options.rh;
            return Err(SessionError::fatal(format!("option subscribeOptions.rh is 0, 1 or 2, not {rh}")));
        }
        if let Some(group) = &self.settings.shared_group {
            topics::check_group(group)
                .map_err(|reason| SessionError::fatal(format!("option sharedGroup: {reason}")))?;
        }
        Ok((version, target))
    }

    async fn open(&self, plan: &SessionPlan) -> Result<MqttSession, SessionError> {
        let settings = &self.settings;
        let common = &settings.common;
        let (version, target) = self.check()?;
        let stream = net::connect(&common.url, &target, common.tls.as_ref()).await?;
        let limits = Limits {
            max_packet_bytes: common.max_packet_bytes.clamp(128, MAX_REMAINING + 5),
            buffered_bytes: common.buffered_bytes,
            high_water_bytes: settings.high_water_bytes.max(1),
            publish_window: usize::from(common.publish_window.max(1)),
            comes_again: (settings.role == Role::Server && settings.manual_acks && !common.clean)
                .then_some(MqttQos::AtLeastOnce),
        };
        let mut link = Link::new(stream, version, limits, Arc::clone(&self.carry));
        let shown = without_secrets(&common.url);
        let login = Login {
            client_id: &settings.client_id,
            username: common.username.as_deref().or(target.username.as_deref()),
            password: common.password.as_deref().or(target.password.as_deref()),
        };
        link.put(|version, out| version.connect(common, &login, out)).map_err(SessionError::fatal)?;
        let connack = std::future::poll_fn(|cx| link.poll_connack(cx)).await.map_err(|error| {
            SessionError::refused(format!(
                "option url: the broker at {shown} did not take the connection ({error}): is it an MQTT broker, and \
                 is its port one for {}?",
                if target.tls { "TLS" } else { "connections without TLS" }
            ))
        })?;
        if let Some(refusal) = connack.refusal {
            return Err(self.refused(&shown, refusal));
        }
        self.carry.lock().connected = true;
        let about = MqttConnection {
            client_id: connack.client_id.clone().unwrap_or_else(|| settings.client_id.clone()),
            protocol_version: common.protocol_version,
            session_present: connack.session_present,
        };
        link.opened(connack, common.keepalive)?;
        let stale = std::mem::take(&mut self.carry.lock().reply_filters);
        if about.session_present && !stale.is_empty() {
            link.unsubscribe(stale).map_err(SessionError::fatal)?;
        }
        let mut shared = Shared::new(link, Arc::clone(settings));
        for subscription in &plan.subscriptions {
            shared
                .subscribe(subscription)
                .map_err(|reason| SessionError::fatal(format!("pattern {}: {reason}", subscription.route)))?;
            if shared.link.controls() >= SUBSCRIBE_WINDOW {
                confirmed(&mut shared.link, SUBSCRIBE_WINDOW / 2).await?;
            }
        }
        confirmed(&mut shared.link, 0).await?;
        shared.link.is_handed_over();
        Ok(MqttSession::new(shared, Arc::from(shown), about))
    }

    /// MQTT-19: which option a refusal is about.
    fn refused(&self, shown: &str, refusal: ConnectRefusal) -> SessionError {
        let common = &self.settings.common;
        let at = format!("the broker at {shown}");
        match refusal {
            ConnectRefusal::Version => SessionError::fatal(format!(
                "option protocolVersion: {at} does not speak version {}",
                common.protocol_version
            )),
            ConnectRefusal::ClientId => SessionError::fatal(format!(
                "option clientId: {at} refused the client id {:?}",
                self.settings.client_id
            )),
            ConnectRefusal::Credentials => SessionError::fatal(format!(
                "options username and password: {at} refused them (bad user name or password)"
            )),
            ConnectRefusal::NotAuthorized => SessionError::fatal(format!(
                "options username and password: {at} refused the connection (not authorized)"
            )),
            ConnectRefusal::Will => SessionError::fatal(format!("option will: {at} refused it")),
            ConnectRefusal::Unavailable => SessionError::refused(format!("option url: {at} is unavailable")),
            ConnectRefusal::Other(reason) => {
                SessionError::refused(format!("option url: {at} refused the connection: {reason}"))
            }
        }
    }
}

/// Waits until at most so many subscriptions are unanswered; a refused one ends the session (MQTT-4).
async fn confirmed(link: &mut Link, at_most: usize) -> Result<(), SessionError> {
    std::future::poll_fn(|cx| {
        // Messages may have arrived already, and nobody takes them yet.
        if let Err(error) = link.poll_work(cx).and_then(|_| link.check_alive()) {
            return std::task::Poll::Ready(Err(error));
        }
        let mut others = std::collections::VecDeque::new();
        while let Some(signal) = link.signals.pop_front() {
            match signal {
                Signal::Subscribed(Control::Route(route), Some(refusal)) => {
                    let crate::driver::Refusal::Because(reason) = refusal else { continue };
                    return std::task::Poll::Ready(Err(SessionError::fatal(format!(
                        "pattern {route}: the broker refused the subscription: {reason}"
                    ))));
                }
                Signal::Subscribed(Control::Route(_), None) => {}
                other => others.push_back(other),
            }
        }
        link.signals = others;
        if link.controls() <= at_most { std::task::Poll::Ready(Ok(())) } else { std::task::Poll::Pending }
    })
    .await
}

/// The client id of the options, or a random one.
fn client_id(given: Option<&str>) -> String {
    use std::hash::{BuildHasher, Hasher};
    match given {
        Some(id) if !id.is_empty() => id.to_owned(),
        // Each state is keyed at random.
        _ => {
            let bits = std::collections::hash_map::RandomState::new().build_hasher().finish();
            format!("martlet_{:08x}", bits as u32)
        }
    }
}

impl Dial for MqttDial {
    type Session = MqttSession;

    fn info(&self) -> TransportInfo {
        let settles = match self.settings.manual_acks {
            true => Settles::Results { requeue: false, dead_letter: false },
            false => Settles::Never(
                "messages are acknowledged when they are taken, unless option manualAcks is true",
            ),
        };
        let format = self.settings.codec.format();
        TransportInfo { subscribes: true, settles, format, ..TransportInfo::new(TransportId::MQTT, "mqtt") }
    }

    async fn dial(&self, plan: SessionPlan) -> Result<MqttSession, SessionError> {
        let opened = self.open(&plan).await;
        let limit = self.settings.max_connection_attempts;
        if let Err(error) = &opened {
            let mut carry = self.carry.lock();
            carry.attempts = carry.attempts.saturating_add(1);
            if limit >= 0
                && !carry.connected
                && carry.attempts >= limit.max(1)
                && error.kind() != SessionErrorKind::Fatal
            {
                return Err(SessionError::fatal(format!(
                    "{error} (attempt {} of option maxConnectionAttempts, {limit})",
                    carry.attempts
                )));
            }
        }
        opened
    }

    fn check_pattern(&self, pattern: &Pattern) -> Result<(), String> {
        match self.settings.role {
            Role::Server => topics::check_filter(pattern.route()),
            Role::Client => topics::check_topic(pattern.route()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use martlet_core::transport::PacketId;

    use super::*;
    use crate::flow::{Message, What, Window};
    use crate::record::PublishOptions;

    /// What the broker said of an event in a session that ended before it was told.
    #[actix::test]
    async fn a_line_that_breaks_before_the_broker_answers_is_noticed_whatever_is_left_to_be_told() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let dial = MqttDial::client(&MqttClientOptions::new().url(url));
        {
            let flow = &mut dial.carry.lock().flow;
            flow.push(Message {
                topic: bytes::Bytes::from_static(b"evt"),
                payload: bytes::Bytes::new(),
                options: PublishOptions { qos: MqttQos::AtLeastOnce, ..PublishOptions::default() },
                what: What::Event(PacketId::from_text(&[b'1'; 21]).unwrap()),
                closed_over: 0,
            });
            let (id, _) = flow.next(Window { all: 1, twos: 1 }).unwrap();
            flow.on_puback(crate::driver::Ack { id, refusal: None });
            assert!(flow.has_confirmed());
        }
        let plan = SessionPlan { role: Role::Client, subscriptions: Vec::new() };
        let accept = async { drop(listener.accept().await.unwrap()) };
        let (dialled, ()) =
            futures::join!(tokio::time::timeout(Duration::from_secs(5), dial.dial(plan)), accept);
        assert_eq!(dialled.unwrap().unwrap_err().kind(), SessionErrorKind::Refused);
        assert!(dial.carry.lock().flow.has_confirmed());
    }
}
