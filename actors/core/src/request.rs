// SPDX-License-Identifier: MIT OR Apache-2.0
//! A request or event on its way to its handler, and the extractors that read it.

use std::any::{Any, TypeId};
use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;

use hashbrown::HashMap;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::client::ClientProxy;
use crate::error::RpcError;
use crate::interceptor::Interceptors;
use crate::packet::{IncomingPacket, Metadata};
use crate::pattern::{Pattern, Route};
use crate::payload::{DecodeError, Format, Payload};
use crate::responder::{Cancellation, ReplySink, RequestKey};
use crate::route::{Place, RouteTable};
use crate::trace::TraceContext;
use crate::transport::{ContextData, TransportInfo};

/// Metadata key that carries the caller's remaining time, in whole milliseconds.
pub const TIMEOUT_KEY: &str = "martlet-timeout-ms";
/// Metadata key by which a Martlet client tells a Martlet peer that it understands its extensions.
pub const PEER_KEY: &str = "martlet-peer";
/// Metadata key (and header) of the W3C trace context.
pub const TRACEPARENT_KEY: &str = "traceparent";
/// Metadata key (and header) of the W3C trace state.
pub const TRACESTATE_KEY: &str = "tracestate";

/// A map with one value per type: shared state, and per-request extensions.
#[derive(Default)]
pub struct TypeMap {
    values: HashMap<TypeId, Arc<dyn Any + Send + Sync>>,
}

impl TypeMap {
    /// Puts a value in, replacing one of the same type.
    pub fn insert<T: Send + Sync + 'static>(&mut self, value: T) {
        self.insert_arc(Arc::new(value));
    }

    /// Puts a shared value in, replacing one of the same type.
    pub fn insert_arc<T: Send + Sync + 'static>(&mut self, value: Arc<T>) {
        self.values.insert(TypeId::of::<T>(), value);
    }

    /// The value of a type.
    pub fn get<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        Arc::clone(self.values.get(&TypeId::of::<T>())?).downcast().ok()
    }
}

impl fmt::Debug for TypeMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TypeMap").field("len", &self.values.len()).finish()
    }
}

/// What an application shares with its handlers: state by type, clients by name.
#[derive(Debug, Default)]
pub struct AppData {
    /// State by type.
    pub state: TypeMap,
    /// Clients by name.
    pub clients: HashMap<String, ClientProxy>,
}

/// What every request that comes by one server has in common.
pub(crate) struct ServerScope {
    pub(crate) app: Arc<AppData>,
    pub(crate) transport: TransportInfo,
    /// Interceptors of this server alone, outside the service's.
    pub(crate) interceptors: Interceptors,
    /// Whether the service's interceptors apply.
    pub(crate) inherit: bool,
}

/// What every request of one session has in common, as long as its table stays the same.
pub(crate) struct Scope {
    pub(crate) server: Arc<ServerScope>,
    /// The session's context, for messages that bring none of their own.
    pub(crate) context: Option<ContextData>,
    /// Where the session's replies go.
    pub(crate) sink: Arc<dyn ReplySink>,
    /// The table that their routes are places of.
    pub(crate) table: Arc<RouteTable>,
}

/// Whether a message wants a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// It does.
    Request,
    /// It does not.
    Event,
}

/// A request or event on its way to its handler.
///
/// Cheap to clone (shared buffers); interceptors pass it on, changed or not.
#[derive(Clone)]
pub struct Request(pub(crate) Box<Parts>);

#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) scope: Arc<Scope>,
    /// Its place in the scope's table.
    pub(crate) route: u32,
    pub(crate) kind: MessageKind,
    /// Its route was found by the transporter's address, not by the packet's pattern.
    pub(crate) by_address: bool,
    /// Read in place. Its id is not kept here.
    pub(crate) packet: IncomingPacket,
    pub(crate) context: Option<ContextData>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) slot: RequestKey,
    pub(crate) extensions: Option<Arc<TypeMap>>,
}

impl Parts {
    /// The route that matched.
    pub(crate) fn place(&self) -> &Place {
        self.scope.table.place_at(self.route)
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("route", self.route())
            .field("kind", &self.0.kind)
            .field("data", &self.0.packet.data)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// For the next packet that arrives.
    pub(crate) fn empty(scope: &Arc<Scope>) -> Self {
        // Written where it is, not moved there: it is large.
        Self(Box::write(
            Box::new_uninit(),
            Parts {
                scope: Arc::clone(scope),
                route: 0,
                kind: MessageKind::Event,
                by_address: false,
                packet: IncomingPacket::default(),
                context: None,
                deadline: None,
                slot: RequestKey::NONE,
                extensions: None,
            },
        ))
    }

    /// The route that matched.
    pub fn route(&self) -> &Route {
        &self.0.place().route
    }

    /// The pattern as its handler wrote it.
    pub fn pattern(&self) -> &Pattern {
        &self.0.place().pattern
    }

    /// The pattern as it came, in the payload format; `None` where the transporter routes by address.
    pub fn raw_pattern(&self) -> Option<&[u8]> {
        self.0.packet.pattern.as_deref().filter(|_| !self.0.by_address)
    }

    /// Whether a response is wanted.
    pub fn kind(&self) -> MessageKind {
        self.0.kind
    }

    /// The transporter it came by.
    pub fn transport(&self) -> &TransportInfo {
        &self.0.scope.server.transport
    }

    /// The format of payloads on this transporter.
    pub fn format(&self) -> Format {
        self.0.scope.server.transport.format
    }

    /// The payload, raw; null when the packet had none.
    pub fn payload(&self) -> Payload {
        self.0.packet.data.clone().unwrap_or_else(|| Payload::null(self.format()))
    }

    /// Replaces the payload: what a pipe does.
    pub fn set_payload(&mut self, payload: Payload) {
        self.0.packet.data = Some(payload);
    }

    /// Reads the payload as a type.
    ///
    /// # Errors
    ///
    /// When it has another shape.
    pub fn data<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        match &self.0.packet.data {
            Some(data) => data.decode(),
            None => Payload::null(self.format()).decode(),
        }
    }

    /// Reads one property of the payload as a type; a missing property reads as null.
    ///
    /// # Errors
    ///
    /// When it has another shape.
    pub fn property<T: DeserializeOwned>(&self, name: &str) -> Result<T, DecodeError> {
        match self.0.packet.data.as_ref().map(|data| data.property(name)).transpose()?.flatten() {
            Some(value) => value.decode(),
            None => Payload::null(self.format()).decode(),
        }
    }

    /// The packet's metadata; empty when it has none or when it is not an object.
    pub fn metadata(&self) -> Metadata {
        self.0.packet.metadata.as_ref().and_then(|raw| raw.decode().ok()).unwrap_or_default()
    }

    /// The packet's metadata, raw.
    pub fn raw_metadata(&self) -> Option<&Payload> {
        self.0.packet.metadata.as_ref()
    }

    /// The caller's trace, if it sent one.
    pub fn trace(&self) -> Option<TraceContext> {
        self.0.packet.metadata.as_ref()?;
        let metadata = self.metadata();
        TraceContext::parse(metadata.get(TRACEPARENT_KEY)?, metadata.get(TRACESTATE_KEY))
    }

    /// The transporter's context of this message, if it is of this type.
    pub fn context<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.0.context.as_ref().or(self.0.scope.context.as_ref())?.clone().downcast().ok()
    }

    /// When the caller stops waiting, if it said so.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// A token that tells when the caller has lost interest.
    pub fn cancellation(&self) -> Cancellation {
        self.0.scope.sink.cancellation(self.0.slot)
    }

    /// Shared state of a type.
    pub fn state<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.0.scope.server.app.state.get()
    }

    /// A client by its declared name.
    pub fn client(&self, name: &str) -> Option<ClientProxy> {
        self.0.scope.server.app.clients.get(name).cloned()
    }

    /// A value that an interceptor left for the handler.
    pub fn extension<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.0.extensions.as_ref()?.get()
    }

    /// Leaves a value for interceptors further in and for the handler.
    pub fn set_extension<T: Send + Sync + 'static>(&mut self, value: T) {
        let mut map = TypeMap::default();
        if let Some(have) = &self.0.extensions {
            map.values = have.values.clone();
        }
        map.insert(value);
        self.0.extensions = Some(Arc::new(map));
    }
}

// === extractors ===

/// A value built from a request, per request: the arguments of handlers.
///
/// Implement it for request-scoped values of your own; it may wait (for a database, for a call).
///
/// # Cancel safety
///
/// The future is dropped when the request is cancelled or its deadline passes.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of a handler",
    label = "not an extractor",
    note = "take the payload as `Data<T>` (or mark the argument `#[payload]`), shared state as `State<T>`, the transporter's context as `Ctx<T>`, or implement `FromRequest` for `{Self}`"
)]
pub trait FromRequest: Sized {
    /// Builds the value.
    ///
    /// # Errors
    ///
    /// The error is the handler's answer; the handler does not run.
    fn from_request(request: &Request) -> impl Future<Output = Result<Self, RpcError>>;
}

/// The payload, read as `T`. A payload of another shape is answered with an error that says where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data<T>(pub T);

/// The error for a payload that is not what the handler takes.
pub fn bad_payload(error: DecodeError) -> RpcError {
    RpcError::message(format!("Bad payload: {error}")).with_source(error)
}

impl<T: DeserializeOwned> FromRequest for Data<T> {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        request.data().map(Self).map_err(bad_payload)
    }
}

impl<T> Deref for Data<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl FromRequest for Request {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(request.clone())
    }
}

impl FromRequest for Payload {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(request.payload())
    }
}

impl FromRequest for Metadata {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(request.metadata())
    }
}

impl FromRequest for Pattern {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(request.pattern().clone())
    }
}

impl FromRequest for Cancellation {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(request.cancellation())
    }
}

/// `None` wherever `T` cannot be had, whatever the reason: an `Option<Data<T>>` is `None` for a payload of another shape, too.
/// A payload that may be missing or null is a `Data<Option<T>>`.
impl<T: FromRequest> FromRequest for Option<T> {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(T::from_request(request).await.ok())
    }
}

/// Shared state of type `T`, put into the service by `Microservice::state`. A handler that asks for state
/// that nobody put in answers "Internal server error" and reports the type's name.
#[derive(Debug)]
pub struct State<T>(pub Arc<T>);

impl<T: Send + Sync + 'static> FromRequest for State<T> {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        request.state().map(Self).ok_or_else(|| missing("shared state", std::any::type_name::<T>()))
    }
}

impl<T> Deref for State<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// The transporter's context of type `T` (`TcpContext`, `NatsContext`). Taken as `Option<Ctx<T>>` by a
/// handler that several transporters share.
#[derive(Debug)]
pub struct Ctx<T>(pub Arc<T>);

impl<T: Send + Sync + 'static> FromRequest for Ctx<T> {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        request.context().map(Self).ok_or_else(|| missing("transport context", std::any::type_name::<T>()))
    }
}

impl<T> Deref for Ctx<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// A value that an interceptor left with [`Request::set_extension`].
#[derive(Debug)]
pub struct Extension<T>(pub Arc<T>);

impl<T: Send + Sync + 'static> FromRequest for Extension<T> {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        request.extension().map(Self).ok_or_else(|| missing("extension", std::any::type_name::<T>()))
    }
}

/// When the caller stops waiting; `None` when it did not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline(pub Option<Instant>);

impl Deadline {
    /// The time left; `None` when there is no deadline.
    pub fn remaining(&self) -> Option<std::time::Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

impl FromRequest for Deadline {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(Self(request.deadline()))
    }
}

/// Names a declared client by a type, so that handlers can take [`Client<N>`].
pub trait ClientName: 'static {
    /// The name it is declared by.
    const NAME: &'static str;
}

/// The client declared under the name of `N`.
pub struct Client<N> {
    proxy: ClientProxy,
    name: std::marker::PhantomData<fn() -> N>,
}

impl<N: ClientName> fmt::Debug for Client<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Client").field(&N::NAME).finish()
    }
}

impl<N> Deref for Client<N> {
    type Target = ClientProxy;
    fn deref(&self) -> &ClientProxy {
        &self.proxy
    }
}

impl<N: ClientName> FromRequest for Client<N> {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        match request.client(N::NAME) {
            Some(proxy) => Ok(Self { proxy, name: std::marker::PhantomData }),
            None => Err(missing("client", N::NAME)),
        }
    }
}

fn missing(what: &str, name: &str) -> RpcError {
    RpcError::unexpected(format!("the handler asks for {what} {name}, which the service does not have"))
}
