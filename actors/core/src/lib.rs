// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core of Martlet: the contract of transporters, the runtime around them, and the handlers, clients
//! and supervision that applications see.
#![warn(clippy::print_stdout)]

pub mod arbiters;
pub mod backoff;
mod batch;
mod calls;
pub mod client;
pub mod codec;
mod correlation;
pub mod error;
pub mod events;
mod forward;
pub mod function;
pub mod handler;
pub mod headers;
mod in_flight;
pub mod interceptor;
pub mod json;
mod member;
pub mod microservice;
pub mod msgpack;
pub mod options;
pub mod packet;
pub mod pattern;
pub mod payload;
mod pending;
mod recycled;
pub mod registry;
mod replica;
pub mod reply;
pub mod request;
mod responder;
mod retry;
pub mod route;
pub mod server;
mod session;
pub mod settlement;
pub mod status;
pub mod supervise;
mod supervisor;
#[cfg(feature = "tower")]
pub mod tower;
pub mod trace;
pub mod transport;

pub use client::{
    Call, ClientActor, ClientOptions, ClientProxy, EmitMessage, EmitOptions, ReplyStream, SendMessage,
};
pub use error::{CallError, RemoteError, RpcError, SessionError, SessionErrorKind, StartError, Unexpected};
pub use events::{EventBus, ServiceEvent};
pub use function::{event, message};
pub use handler::{
    ActorGroup, Controller, Endpoint, HandlerDef, HandlerGroup, Outcome, Placement, SupervisorGroup,
    event_to, message_to,
};
pub use headers::Headers;
pub use interceptor::{Interceptor, Interceptors, Next};
pub use microservice::{Microservice, RunningService, ServiceReport};
pub use packet::Metadata;
pub use pattern::{Pattern, Route};
pub use payload::{Format, Payload};
pub use registry::{RegistrationId, Registry};
pub use reply::{HandlerResult, IntoReply, Record, Reply, Streaming, TryStreaming};
pub use request::{
    AppData, Client, ClientName, Ctx, Data, Deadline, Extension, FromRequest, MessageKind, Request, State,
    TypeMap,
};
pub use responder::Cancellation;
pub use route::{HandlerInfo, HandlerKind};
pub use server::{Server, ServerHandle, ServerOptions, ServerReport};
pub use session::Abandoned;
pub use settlement::{FailurePolicy, LastResort, RetryPolicy};
pub use status::ConnectionStatus;
pub use transport::{TransportId, TransportInfo};
