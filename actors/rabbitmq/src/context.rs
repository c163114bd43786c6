// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a handler may know of the AMQP message it serves, and how it acknowledges it by itself.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::ShortString;
use martlet_core::packet::Raw;
use martlet_core::pattern::route_of_incoming;
use martlet_core::payload::Format;
use serde_json::Value;

use crate::settle::{Settler, Verdict};
use crate::wire;

/// The context of a message that came by RabbitMQ, extracted with `Ctx<RmqContext>`.
///
/// Of a server with `noAck` false and without `onFailure`, the handler acknowledges: [`ack`](Self::ack),
/// [`nack`](Self::nack) or [`reject`](Self::reject), from any thread, at any time until the session ends. A message
/// that is never acknowledged is delivered again when the connection ends.
///
/// # Examples
///
/// ```
/// use martlet_core::{Ctx, Data, RpcError, event};
/// use martlet_rabbitmq::RmqContext;
///
/// let handler = event("order.placed", async |Data(order): Data<u64>, context: Ctx<RmqContext>| {
///     match order {
///         0 => context.reject(false).map_err(RpcError::unexpected),
///         _ => context.ack().map_err(RpcError::unexpected),
///     }
/// });
/// # let _ = handler;
/// ```
pub struct RmqContext {
    pub(crate) pattern: Option<Raw>,
    pub(crate) format: Format,
    pub(crate) content: Bytes,
    pub(crate) properties: BasicProperties,
    pub(crate) exchange: ShortString,
    pub(crate) routing_key: ShortString,
    pub(crate) redelivered: bool,
    pub(crate) tag: u64,
    pub(crate) settled: AtomicBool,
    /// `None` where nothing is acknowledged.
    pub(crate) settler: Option<Arc<Settler>>,
}

/// Why a message could not be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SettleError {
    /// The server's `noAck` is true: the broker has forgotten the message.
    #[error("option noAck is true: the broker expects no acknowledgement")]
    NoAck,
    /// It has been acknowledged, negatively or not.
    #[error("the message has been acknowledged before")]
    AlreadySettled,
    /// The session it came by has ended: the broker delivers it again.
    #[error("the session that the message came by has ended")]
    SessionEnded,
}

/// The properties of a message, as the broker delivered them.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct RmqProperties {
    /// The headers.
    pub headers: serde_json::Map<String, Value>,
    /// 2 when it is persistent.
    pub delivery_mode: Option<u8>,
    /// The priority.
    pub priority: Option<u8>,
    /// The id that its reply has, too.
    pub correlation_id: Option<String>,
    /// Where its reply goes.
    pub reply_to: Option<String>,
    /// How long it could wait, in milliseconds.
    pub expiration: Option<String>,
    /// The body's type.
    pub content_type: Option<String>,
    /// The body's encoding.
    pub content_encoding: Option<String>,
    /// An id of the application's.
    pub message_id: Option<String>,
    /// Seconds since 1970.
    pub timestamp: Option<u64>,
    /// A type of the application's.
    pub kind: Option<String>,
    /// The sending user.
    pub user_id: Option<String>,
    /// The sending application.
    pub app_id: Option<String>,
}

impl RmqContext {
    /// The pattern of the message, as text: the concrete one, where the handler's has wildcards.
    pub fn pattern(&self) -> String {
        let raw = self.pattern.as_deref().unwrap_or_default();
        match route_of_incoming(self.format, raw) {
            Some(route) => route.to_string(),
            None => String::from_utf8_lossy(raw).into_owned(),
        }
    }

    /// The whole body.
    pub fn content(&self) -> &Bytes {
        &self.content
    }

    /// The exchange it was published to; empty for the default one.
    pub fn exchange(&self) -> &str {
        self.exchange.as_str()
    }

    /// The routing key it was published with.
    pub fn routing_key(&self) -> &str {
        self.routing_key.as_str()
    }

    /// Whether the broker delivered it before, to whomever.
    pub fn redelivered(&self) -> bool {
        self.redelivered
    }

    /// Its number on its channel.
    pub fn delivery_tag(&self) -> u64 {
        self.tag
    }

    /// One header; `None` when there is none of that name.
    pub fn header(&self, name: &str) -> Option<Value> {
        self.properties.headers().as_ref()?.inner().get(name).map(wire::json_value)
    }

    /// Its properties, headers included.
    pub fn properties(&self) -> RmqProperties {
        let from = &self.properties;
        let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
        let headers = from.headers().iter().flatten();
        RmqProperties {
            headers: headers.map(|(name, value)| (name.to_string(), wire::json_value(value))).collect(),
            delivery_mode: *from.delivery_mode(),
            priority: *from.priority(),
            correlation_id: text(from.correlation_id()),
            reply_to: text(from.reply_to()),
            expiration: text(from.expiration()),
            content_type: text(from.content_type()),
            content_encoding: text(from.content_encoding()),
            message_id: text(from.message_id()),
            timestamp: *from.timestamp(),
            kind: text(from.kind()),
            user_id: text(from.user_id()),
            app_id: text(from.app_id()),
        }
    }

    /// Acknowledges it: the broker forgets it. Takes no time: it is told with the session's next turn.
    ///
    /// # Errors
    ///
    /// When there is nothing to acknowledge, see [`SettleError`].
    pub fn ack(&self) -> Result<(), SettleError> {
        self.settle(Verdict::Ack)
    }

    /// Refuses it: back to the queue with `requeue`, else to the dead-letter exchange.
    ///
    /// # Errors
    ///
    /// As [`ack`](Self::ack).
    pub fn nack(&self, requeue: bool) -> Result<(), SettleError> {
        self.settle(Verdict::Nack { requeue })
    }

    /// The same as [`nack`](Self::nack), by AMQP's older name.
    ///
    /// # Errors
    ///
    /// As [`ack`](Self::ack).
    pub fn reject(&self, requeue: bool) -> Result<(), SettleError> {
        self.nack(requeue)
    }

    /// Whether it has been acknowledged, negatively or not.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    pub(crate) fn settle(&self, verdict: Verdict) -> Result<(), SettleError> {
        let settler = self.settler.as_ref().ok_or(SettleError::NoAck)?;
        if self.settled.swap(true, Ordering::AcqRel) {
            return Err(SettleError::AlreadySettled);
        }
        settler.push(self.tag, verdict)
    }
}

impl fmt::Debug for RmqContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RmqContext")
            .field("pattern", &self.pattern())
            .field("routing_key", &self.routing_key())
            .field("delivery_tag", &self.tag)
            .finish_non_exhaustive()
    }
}
