// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a handler gives back: nothing, a value, a record with headers, or a stream of values.

use std::any::TypeId;
use std::fmt;

use futures::stream::LocalBoxStream;
use futures::{Stream, StreamExt};
use serde::Serialize;

use crate::error::RpcError;
use crate::headers::Headers;
use crate::packet::Raw;
use crate::payload::{Format, Payload};

/// How a handler ended.
pub type HandlerResult = Result<Reply, RpcError>;

/// What a handler answers with.
#[non_exhaustive]
pub enum Reply {
    /// Completion without a value: NestJS's `undefined`.
    Empty,
    /// One value.
    Value(Payload),
    /// One value with headers, where the transporter has them.
    Record(Payload, Headers),
    /// A value per item, then completion. An error ends it.
    Stream(LocalBoxStream<'static, Result<Payload, RpcError>>),
}

impl Reply {
    /// What an answer that was left in its place is.
    pub(crate) fn in_place(place: Option<Payload>) -> Self {
        place.map_or(Self::Empty, Self::Value)
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("Empty"),
            Self::Value(payload) => f.debug_tuple("Value").field(payload).finish(),
            Self::Record(payload, headers) => f.debug_tuple("Record").field(payload).field(headers).finish(),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// A value that a handler can answer with.
///
/// Every `Serialize` type is one value, except `()`, which is completion without a value; [`Streaming`]
/// is a value per item; [`Record`] is a value with headers; [`Reply`] is itself.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the reply of a handler",
    label = "not a reply",
    note = "derive `serde::Serialize` for it, wrap a stream as `Streaming(stream)`, or return `Result<T, E>` where `E: Into<RpcError>`"
)]
pub trait IntoReply {
    /// Puts it in wire form.
    ///
    /// # Errors
    ///
    /// An unexpected error when it cannot be serialised.
    fn into_reply(self, format: Format) -> HandlerResult;

    /// The same; a plain value may be left in `place`, which is empty before: see
    /// [`Endpoint::call_in_place`](crate::handler::Endpoint::call_in_place).
    #[doc(hidden)]
    fn put_reply(self, format: Format, _place: &mut Option<Payload>) -> Option<HandlerResult>
    where
        Self: Sized,
    {
        Some(self.into_reply(format))
    }
}

impl<T: Serialize + 'static> IntoReply for T {
    fn into_reply(self, format: Format) -> HandlerResult {
        let mut place = None;
        self.put_reply(format, &mut place).unwrap_or_else(|| Ok(Reply::in_place(place)))
    }

    fn put_reply(self, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult> {
        if TypeId::of::<T>() == TypeId::of::<()>() {
            return None;
        }
        match place.insert(Payload::new(format, Raw::default())).fill(&self) {
            Ok(()) => None,
            Err(error) => {
                *place = None;
                Some(Err(error.into()))
            }
        }
    }
}

impl IntoReply for Reply {
    fn into_reply(self, _format: Format) -> HandlerResult {
        Ok(self)
    }
}

/// Answers with a reply per item of a stream.
///
/// Items are `T: Serialize` with [`Streaming`], `Result<T, E>` with [`TryStreaming`].
pub struct Streaming<S>(pub S);

impl<S> fmt::Debug for Streaming<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Streaming")
    }
}

impl<S> IntoReply for Streaming<S>
where
    S: Stream + 'static,
    S::Item: Serialize,
{
    fn into_reply(self, format: Format) -> HandlerResult {
        Ok(Reply::Stream(
            self.0.map(move |item| Payload::encode(format, &item).map_err(RpcError::from)).boxed_local(),
        ))
    }
}

/// Answers with a reply per item of a stream of results; an error ends it.
pub struct TryStreaming<S>(pub S);

impl<S> fmt::Debug for TryStreaming<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TryStreaming")
    }
}

impl<S, T, E> IntoReply for TryStreaming<S>
where
    S: Stream<Item = Result<T, E>> + 'static,
    T: Serialize,
    E: Into<RpcError>,
{
    fn into_reply(self, format: Format) -> HandlerResult {
        Ok(Reply::Stream(
            self.0
                .map(move |item| match item {
                    Ok(item) => Payload::encode(format, &item).map_err(RpcError::from),
                    Err(error) => Err(error.into()),
                })
                .boxed_local(),
        ))
    }
}

/// A value with headers: NestJS's record. Used to send and to answer; headers travel where the
/// transporter has them and are dropped elsewhere.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record<T> {
    /// The value.
    pub data: T,
    /// The headers.
    pub headers: Headers,
}

impl<T> Record<T> {
    /// A record without headers.
    pub fn new(data: T) -> Self {
        Self { data, headers: Headers::new() }
    }

    /// Appends a header line.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.append(name, value);
        self
    }
}

impl<T: Serialize> IntoReply for Record<T> {
    fn into_reply(self, format: Format) -> HandlerResult {
        Ok(Reply::Record(Payload::encode(format, &self.data)?, self.headers))
    }
}

/// Data that can be sent: any `Serialize` value, or a [`Record`] of one.
pub trait IntoRecord {
    /// The payload and the headers to send.
    ///
    /// # Errors
    ///
    /// When the value cannot be serialised.
    fn into_record(self, format: Format) -> Result<(Payload, Headers), crate::payload::EncodeError>;
}

impl<T: Serialize> IntoRecord for T {
    fn into_record(self, format: Format) -> Result<(Payload, Headers), crate::payload::EncodeError> {
        Ok((Payload::encode(format, &self)?, Headers::new()))
    }
}

impl<T: Serialize> IntoRecord for Record<T> {
    fn into_record(self, format: Format) -> Result<(Payload, Headers), crate::payload::EncodeError> {
        Ok((Payload::encode(format, &self.data)?, self.headers))
    }
}

impl IntoReply for Payload {
    fn into_reply(self, format: Format) -> HandlerResult {
        Ok(Reply::Value(self.transcode(format)?))
    }
}

impl IntoRecord for Payload {
    fn into_record(self, format: Format) -> Result<(Payload, Headers), crate::payload::EncodeError> {
        Ok((self.transcode(format)?, Headers::new()))
    }
}
