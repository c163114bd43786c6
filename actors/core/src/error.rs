// SPDX-License-Identifier: MIT OR Apache-2.0
//! The errors of Martlet: what crosses the wire, what a caller sees, what a transporter reports.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::codec::{CodecError, INTERNAL_ERROR_TEXT};
use crate::payload::{DecodeError, EncodeError, Format, Payload};

/// A shared cause, so that everyone who waited on one failure can keep it.
pub type SharedError = Arc<dyn StdError + Send + Sync + 'static>;

// === RpcError: what a handler fails with ===

/// The failure of a handler, as it crosses the wire.
///
/// The wire form is NestJS's, byte for byte:
///
/// | made by | wire value of `err` |
/// |---|---|
/// | [`RpcError::message`] | `{"status":"error","message":"…"}` |
/// | [`RpcError::json`] with an object or array | that value, verbatim |
/// | [`RpcError::json`] with any other value | `{"status":"error","message":<value>}` |
/// | [`RpcError::unexpected`] | `{"status":"error","message":"Internal server error"}`; the cause is reported here and never sent |
///
/// # Examples
///
/// ```
/// use martlet_core::RpcError;
///
/// let refused = RpcError::message("boom");
/// assert_eq!(refused.to_json(), r#"{"status":"error","message":"boom"}"#);
/// let typed = RpcError::json(serde_json::json!({"code": 42}));
/// assert_eq!(typed.to_json(), r#"{"code":42}"#);
/// ```
#[derive(Clone)]
pub struct RpcError(Box<Failure>);

/// In a box, so that results that are not errors are small.
#[derive(Clone)]
struct Failure {
    body: ErrorBody,
    source: Option<SharedError>,
}

#[derive(Clone)]
enum ErrorBody {
    Message(Value),
    Json(Payload),
    Unexpected,
}

#[derive(Serialize)]
struct NestError<'a> {
    status: &'static str,
    message: &'a Value,
}

impl RpcError {
    fn new(body: ErrorBody, source: Option<SharedError>) -> Self {
        Self(Box::new(Failure { body, source }))
    }

    /// Fails with a text for the caller: `{"status":"error","message":text}`.
    pub fn message(text: impl Into<String>) -> Self {
        Self::new(ErrorBody::Message(Value::String(text.into())), None)
    }

    /// Fails with a value for the caller. Objects and arrays go out verbatim, members in the order
    /// in which they serialise; any other value becomes the `message` of NestJS's error object.
    ///
    /// A value that cannot be serialised becomes an unexpected error.
    pub fn json<T: Serialize>(value: T) -> Self {
        let payload = match Payload::encode(Format::Json, &value) {
            Ok(payload) => payload,
            Err(error) => return Self::unexpected(error),
        };
        match payload.bytes().first() {
            Some(b'{' | b'[') => Self::new(ErrorBody::Json(payload), None),
            _ => Self::new(ErrorBody::Message(payload.to_value().unwrap_or(Value::Null)), None),
        }
    }

    /// Fails with an error that is not for callers: they read "Internal server error", the cause is
    /// reported as an event and in the log of this process only.
    pub fn unexpected(source: impl Into<Box<dyn StdError + Send + Sync + 'static>>) -> Self {
        let source: Box<dyn StdError + Send + Sync> = source.into();
        Self::new(ErrorBody::Unexpected, Some(Arc::from(source)))
    }

    /// The error NestJS answers when a guard refuses: `Forbidden resource`.
    pub fn forbidden() -> Self {
        Self::message("Forbidden resource")
    }

    /// Attaches a cause, which is reported here and never sent.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync + 'static>>) -> Self {
        let source: Box<dyn StdError + Send + Sync> = source.into();
        self.0.source = Some(Arc::from(source));
        self
    }

    /// Whether callers see only "Internal server error".
    pub fn is_unexpected(&self) -> bool {
        matches!(self.0.body, ErrorBody::Unexpected)
    }

    /// The value of `err` as JSON text.
    pub fn to_json(&self) -> String {
        let payload = self.to_payload(Format::Json);
        String::from_utf8_lossy(payload.bytes()).into_owned()
    }

    /// The value of `err` in a payload format.
    pub fn to_payload(&self, format: Format) -> Payload {
        let internal = Value::String(INTERNAL_ERROR_TEXT.to_owned());
        let encoded = match &self.0.body {
            ErrorBody::Message(message) => Payload::encode(format, &NestError { status: "error", message }),
            ErrorBody::Json(payload) => payload.transcode(format),
            ErrorBody::Unexpected => {
                Payload::encode(format, &NestError { status: "error", message: &internal })
            }
        };
        // A JSON value always encodes; null would be read as "no error" by NestJS, so it is never used
        // when something could be said.
        encoded.unwrap_or_else(|_| Payload::null(format))
    }
}

impl fmt::Debug for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpcError").field("wire", &self.to_json()).field("source", &self.0.source).finish()
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.body {
            ErrorBody::Message(Value::String(text)) => f.write_str(text),
            ErrorBody::Message(value) => write!(f, "{value}"),
            ErrorBody::Json(payload) => f.write_str(&String::from_utf8_lossy(payload.bytes())),
            ErrorBody::Unexpected => match &self.0.source {
                Some(source) => write!(f, "unexpected error: {source}"),
                None => f.write_str("unexpected error"),
            },
        }
    }
}

impl StdError for RpcError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

impl From<&str> for RpcError {
    fn from(text: &str) -> Self {
        Self::message(text)
    }
}

impl From<String> for RpcError {
    fn from(text: String) -> Self {
        Self::message(text)
    }
}

impl From<Cow<'_, str>> for RpcError {
    fn from(text: Cow<'_, str>) -> Self {
        Self::message(text.into_owned())
    }
}

impl From<Value> for RpcError {
    fn from(value: Value) -> Self {
        Self::json(value)
    }
}

impl From<DecodeError> for RpcError {
    fn from(error: DecodeError) -> Self {
        Self::unexpected(error)
    }
}

impl From<EncodeError> for RpcError {
    fn from(error: EncodeError) -> Self {
        Self::unexpected(error)
    }
}

impl From<CallError> for RpcError {
    /// A remote error passes through to the next caller as it came; every other outcome of a call is
    /// an unexpected error of this service.
    fn from(error: CallError) -> Self {
        match error {
            CallError::Remote(remote) => remote.into_rpc_error(),
            other => Self::unexpected(other),
        }
    }
}

impl From<std::convert::Infallible> for RpcError {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

/// Any error at all, not meant for callers: lets a handler use `?` on everything.
///
/// A handler that returns `Result<T, Unexpected>` answers "Internal server error" and reports the cause.
///
/// # Examples
///
/// ```
/// use martlet_core::Unexpected;
///
/// fn read() -> Result<u32, Unexpected> {
///     Ok("12".parse::<u32>()?)
/// }
/// assert_eq!(read().unwrap(), 12);
/// ```
pub struct Unexpected(Box<dyn StdError + Send + Sync + 'static>);

impl fmt::Debug for Unexpected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<E: Into<Box<dyn StdError + Send + Sync + 'static>>> From<E> for Unexpected {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl From<Unexpected> for RpcError {
    fn from(error: Unexpected) -> Self {
        Self::unexpected(error.0)
    }
}

// === CallError: what a caller sees ===

/// How a call ended, when it did not end with a value. Every call has exactly one outcome.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The remote handler answered with an error.
    #[error("remote error: {0}")]
    Remote(RemoteError),
    /// Nobody serves the pattern: the service said so, or the broker knows no subscriber.
    #[error("no handler for pattern {pattern}")]
    NoHandler {
        /// The route of the pattern called.
        pattern: String,
    },
    /// No (further) reply within the limit. The handler may have run.
    #[error("reply timed out after {after:?}")]
    Timeout {
        /// The limit that passed.
        after: Duration,
    },
    /// The connection failed before the request was handed to it: the handler has not run.
    #[error("not sent: {cause}")]
    NotSent {
        /// Why there was no connection.
        cause: SessionError,
    },
    /// The connection was lost after the request was handed to it: the handler may have run.
    #[error("connection lost before the reply: {cause}")]
    Lost {
        /// What ended the connection.
        cause: SessionError,
    },
    /// A bound of this client was reached; nothing was sent, or the replies came faster than they were read.
    #[error("overloaded: {bound} is at its limit of {limit}")]
    Overloaded {
        /// The name of the option that holds the bound.
        bound: &'static str,
        /// Its value.
        limit: usize,
    },
    /// The caller's cancellation ended the call.
    #[error("cancelled by the caller")]
    Cancelled,
    /// The client was closed.
    #[error("client is closed")]
    Closed,
    /// The request could not be put in wire form; nothing was sent.
    #[error("cannot encode the request: {0}")]
    Encode(SharedError),
    /// The reply could not be read as the type asked for.
    #[error("cannot decode the reply: {0}")]
    Decode(SharedError),
    /// The handler completed without a value, and the type asked for needs one.
    #[error("the handler completed without a value")]
    NoValue,
}

impl CallError {
    /// Whether the remote handler has certainly not run, so that the call can be made again.
    pub fn is_not_sent(&self) -> bool {
        matches!(
            self,
            Self::NotSent { .. } | Self::Overloaded { .. } | Self::Encode(_) | Self::NoHandler { .. }
        )
    }

    /// The remote error, if that is what ended the call.
    pub fn remote(&self) -> Option<&RemoteError> {
        match self {
            Self::Remote(error) => Some(error),
            _ => None,
        }
    }

    /// A short, stable name of the outcome, for metrics and exit codes.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Remote(_) => "remote_error",
            Self::NoHandler { .. } => "no_handler",
            Self::Timeout { .. } => "timeout",
            Self::NotSent { .. } => "not_sent",
            Self::Lost { .. } => "lost",
            Self::Overloaded { .. } => "overloaded",
            Self::Cancelled => "cancelled",
            Self::Closed => "closed",
            Self::Encode(_) => "encode",
            Self::Decode(_) => "decode",
            Self::NoValue => "no_value",
        }
    }
}

/// The error value that a remote handler answered, as it came.
#[derive(Clone, PartialEq)]
pub struct RemoteError {
    payload: Payload,
}

impl RemoteError {
    /// Wraps the value of `err`.
    pub fn new(payload: Payload) -> Self {
        Self { payload }
    }

    /// The value as it came.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The text NestJS puts in `message`, or the value itself when it is a bare text.
    pub fn message(&self) -> Option<String> {
        match self.payload.to_value().ok()? {
            Value::String(text) => Some(text),
            Value::Object(mut members) => match members.remove("message")? {
                Value::String(text) => Some(text),
                other => Some(other.to_string()),
            },
            _ => None,
        }
    }

    /// Reads the value as a type.
    ///
    /// # Errors
    ///
    /// When the value has another shape.
    pub fn decode<T: serde::de::DeserializeOwned>(&self) -> Result<T, DecodeError> {
        self.payload.decode()
    }

    /// The same error as a handler's failure, so that it can be passed on unchanged.
    pub fn into_rpc_error(self) -> RpcError {
        match self.payload.transcode(Format::Json) {
            // As it came: a generic value would sort its members.
            Ok(payload) if matches!(payload.bytes().first(), Some(b'{' | b'[')) => {
                RpcError::new(ErrorBody::Json(payload), None)
            }
            Ok(payload) => match payload.to_value() {
                Ok(value) => RpcError::json(value),
                Err(error) => RpcError::unexpected(error),
            },
            Err(error) => RpcError::unexpected(error),
        }
    }
}

impl fmt::Debug for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemoteError").field(&self.payload).finish()
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.message() {
            Some(message) => f.write_str(&message),
            None => write!(f, "{:?}", self.payload),
        }
    }
}

// === SessionError: what a transporter reports ===

/// What follows from the failure of a session. **The kind is the decision.**
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionErrorKind {
    /// The line broke. Retried with backoff.
    Lost,
    /// Nobody took the call, yet. Retried with backoff.
    Refused,
    /// The other end broke the protocol or a bound. Ends this peer; a dialled session is retried.
    Protocol,
    /// Credentials or configuration are wrong: retrying cannot help.
    Fatal,
}

/// Why a session ended or could not begin. Cheap to clone: everyone waiting hears the same cause.
#[derive(Clone)]
pub struct SessionError {
    kind: SessionErrorKind,
    message: Arc<str>,
    source: Option<SharedError>,
}

impl SessionError {
    /// Makes an error of a kind.
    pub fn new(kind: SessionErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: Arc::from(message.into()), source: None }
    }

    /// The line broke.
    pub fn lost(message: impl Into<String>) -> Self {
        Self::new(SessionErrorKind::Lost, message)
    }

    /// Nobody took the call.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(SessionErrorKind::Refused, message)
    }

    /// The other end broke the protocol.
    pub fn protocol(message: impl Into<String>) -> Self {
        Self::new(SessionErrorKind::Protocol, message)
    }

    /// Retrying cannot help.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self::new(SessionErrorKind::Fatal, message)
    }

    /// Attaches the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync + 'static>>) -> Self {
        let source: Box<dyn StdError + Send + Sync> = source.into();
        self.source = Some(Arc::from(source));
        self
    }

    /// What follows from it.
    pub fn kind(&self) -> SessionErrorKind {
        self.kind
    }
}

impl fmt::Debug for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionError({:?}: {self})", self.kind)
    }
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl StdError for SessionError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

impl From<std::io::Error> for SessionError {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::ConnectionRefused | Io::TimedOut | Io::NotFound | Io::AddrNotAvailable => {
                SessionErrorKind::Refused
            }
            Io::PermissionDenied | Io::InvalidInput | Io::AddrInUse => SessionErrorKind::Fatal,
            _ => SessionErrorKind::Lost,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<CodecError> for SessionError {
    fn from(error: CodecError) -> Self {
        Self::protocol(error.to_string())
    }
}

// === StartError: what main sees ===

/// Why a service or a client could not start.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Two message handlers claim one pattern on one transporter.
    #[error("pattern {pattern} has two message handlers on {transport}: {first} and {second}")]
    DuplicateHandler {
        /// The route claimed twice.
        pattern: String,
        /// The transporter.
        transport: String,
        /// Where the first was registered.
        first: String,
        /// Where the second was registered.
        second: String,
    },
    /// An option has a value that cannot be used.
    #[error("option {option}: {reason}")]
    Option {
        /// The option's name.
        option: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// A pattern cannot be used on a transporter.
    #[error("pattern {pattern} cannot be used on {transport}: {reason}")]
    Pattern {
        /// The route.
        pattern: String,
        /// The transporter.
        transport: String,
        /// Why.
        reason: String,
    },
    /// A failure policy cannot be honoured by a transporter.
    #[error("the failure policy of {of} cannot be honoured by {transport}: {reason}")]
    FailurePolicy {
        /// Whose policy it is.
        of: String,
        /// The transporter.
        transport: String,
        /// Why.
        reason: String,
    },
    /// A transporter could not start.
    #[error("{transport} could not start: {cause}")]
    Transport {
        /// The transporter.
        transport: String,
        /// Why.
        cause: SessionError,
    },
    /// There is no actix system on this thread.
    #[error("no actix system runs on this thread: start one with #[actix::main] or actix::System::new()")]
    NoSystem,
    /// A name was asked for that nobody declared.
    #[error("no client named {name:?} is declared; declared are {declared}")]
    UnknownClient {
        /// The name asked for.
        name: String,
        /// The names there are.
        declared: String,
    },
    /// The service has already stopped.
    #[error("the service has stopped")]
    Stopped,
    /// A handler or actor factory panicked while starting.
    #[error("{what} panicked while starting: {cause}")]
    Panicked {
        /// What was being started.
        what: String,
        /// The panic's text.
        cause: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_error_is_passed_on_as_it_came() {
        for (came, goes) in [
            (r#"{"b":1,"a":{"d":1,"c":2}}"#, r#"{"b":1,"a":{"d":1,"c":2}}"#),
            (r#"["b","a"]"#, r#"["b","a"]"#),
            (r#""text""#, r#"{"status":"error","message":"text"}"#),
        ] {
            let remote = RemoteError::new(Payload::new(Format::Json, bytes::Bytes::from(came)));
            assert_eq!(remote.into_rpc_error().to_json(), goes);
        }
    }
}
