// SPDX-License-Identifier: MIT OR Apache-2.0
//! The attribute and derive macros of Martlet. Use them through the facade, `martlet`, with its feature
//! `macros` (on by default): what they expand to names `::martlet` and nothing else, so an application
//! needs no further dependency.
//!
//! | macro | goes on | makes |
//! |---|---|---|
//! | [`macro@controller`] | `impl Type { … }` | `Controller` for the type: its handlers, their patterns and options |
//! | [`macro@message_pattern`], [`macro@event_pattern`] | a method in such a block | one handler that answers, or does not |
//! | [`macro@RpcError`] | an error enum or struct | `From<Type> for martlet::RpcError` |
//! | [`macro@Supervised`] | an actor | `actix::Supervised`, which takes a fresh state from the factory |
//!
//! # Goals
//!
//! - A macro expands to the calls that a person would write by hand; whatever it can say can be said without it.
//! - A mistake is reported where it is, names the fix, and all mistakes of a block are reported at once.
//! - Nothing is decided at run time that is known when the block is compiled.
//!
//! # Non-goals
//!
//! - Dependency injection: a controller is built by the factory it is registered with.
//! - Registering by itself: a controller is served when it is passed to `Microservice::controller`.
//! - Generic controllers: handlers are listed once, for one type.

use proc_macro::TokenStream;

mod controller;
mod derives;
mod options;

/// Makes the methods of an `impl` block that carry [`macro@message_pattern`] or [`macro@event_pattern`]
/// handlers, by implementing `martlet::Controller` for the type. Other methods stay as they are.
///
/// # Options
///
/// | option | meaning |
/// |---|---|
/// | `interceptors = [a, b]` | expressions of type `Arc<dyn Interceptor>` around every handler, the first outermost |
/// | `name = "math"` | the controller's name in reports; the type's name if left out |
///
/// # Handlers
///
/// A handler is an `async fn` or a plain `fn` that takes `&self`, because handlers run concurrently; state
/// that changes lives in a `Cell`, `RefCell` or `Mutex`. Its further arguments are read from the request, from
/// left to right, and the first that cannot be read is the answer:
///
/// | argument | is |
/// |---|---|
/// | `name: T` where `T: FromRequest` | an extractor: `Data<T>`, `Metadata`, `State<T>`, `Ctx<T>`, `Deadline`, … |
/// | `#[payload] name: T` | the payload, read as `T: Deserialize` |
/// | `#[payload("key")] name: T` | one property of the payload; a missing one reads as null |
///
/// A plain `fn` whose arguments are all marked `#[payload]` (or that has none) is called in place, without a
/// future.
///
/// The return type is read by its spelling:
///
/// | return type | answer |
/// |---|---|
/// | none | completion without a value |
/// | a type named `…Result` (`Result<T, E>`, `io::Result<T>`, an alias) | `Ok` as below; `Err` through `Into<RpcError>` |
/// | `impl Stream<Item = T>`, `LocalBoxStream<'_, T>`, `BoxStream<'_, T>` | a reply per item; the stream may borrow `self` |
/// | such a stream whose items are named `…Result` | a reply per item; an error ends it |
/// | any other type | one value, through `IntoReply`: `T: Serialize`, `Reply`, `Record<T>`, `Streaming<S>` |
///
/// A plain value whose type's name ends in `Result` without being one needs another name, or an alias.
///
/// A handler's name in reports is `Type::method`, its place that of its pattern attribute. `#[cfg(…)]` on a
/// method holds for its handler too.
///
/// # Errors
///
/// The facade's documentation of this macro has an example; each mistake (`&mut self`, a generic block, an
/// unknown option, …) is a compile error that names the fix.
#[proc_macro_attribute]
pub fn controller(arguments: TokenStream, item: TokenStream) -> TokenStream {
    controller::expand(arguments.into(), item.into()).into()
}

/// Routes requests of a pattern to a method of a [`macro@controller`], which answers them: NestJS's
/// `@MessagePattern`. Several attributes on one method give it several patterns.
///
/// # Patterns
///
/// | written | pattern |
/// |---|---|
/// | `#[message_pattern("sum")]` | a string |
/// | `#[message_pattern(7)]` | a whole number |
/// | `#[message_pattern({ "cmd": "sum", "v": 2 })]` | an object, as in `serde_json::json!` |
/// | `#[message_pattern(cmd = "sum", v = 2)]` | the same object, for keys that are names; a key that is named (almost) like an option needs the form above |
/// | `#[message_pattern(SUM)]` | an expression of a type that is `Into<Pattern>` |
///
/// # Options
///
/// After (or, in the short form, among) the pattern, separated by commas:
///
/// | option | meaning | default |
/// |---|---|---|
/// | `transport = TCP` | serve it by one transporter only: `TCP`, `REDIS`, `NATS`, `MQTT`, `GRPC`, `RMQ`, `KAFKA`, `MEMORY`, or an expression of type `TransportId` | all |
/// | `queue = "workers"` | the extra `queue`, which NATS reads; wins over one in `extras` | none |
/// | `extras = { "key": value }` | NestJS's `extras` | none |
/// | `concurrency = 1` | how many requests of this handler run at once on one replica; at least 1 | no bound of its own |
/// | `interceptors = [a, b]` | expressions of type `Arc<dyn Interceptor>` around this handler, inside the controller's | none |
#[proc_macro_attribute]
pub fn message_pattern(_arguments: TokenStream, item: TokenStream) -> TokenStream {
    controller::stray_pattern("message_pattern", item.into()).into()
}

/// Routes events of a pattern to a method of a [`macro@controller`]: NestJS's `@EventPattern`. What the method
/// returns is discarded; an error is reported. Patterns and options are those of [`macro@message_pattern`].
#[proc_macro_attribute]
pub fn event_pattern(_arguments: TokenStream, item: TokenStream) -> TokenStream {
    controller::stray_pattern("event_pattern", item.into()).into()
}

/// Makes an error type one that handlers can fail with: `From<Type> for martlet::RpcError`, so that `?` and
/// `Result<T, Type>` work. It goes well with `thiserror::Error`.
///
/// `#[rpc(…)]` says how the error crosses the wire. On the type it holds for all variants, on a variant of an
/// enum for that one.
///
/// | attribute | the caller reads | needs |
/// |---|---|---|
/// | none | `{"status":"error","message":<text>}`, the text from `Display` | `Display` |
/// | `#[rpc(code = "NOT_FOUND")]` | `{"status":"error","message":<text>,"code":"NOT_FOUND"}`; the code is any expression that is `Serialize` | `Display` |
/// | `#[rpc(json)]` | the whole value through `Serialize` (an enum as serde writes it, variant name included); objects and arrays verbatim, other values as the `message` of the first row | `Serialize` |
/// | `#[rpc(unexpected)]` | `{"status":"error","message":"Internal server error"}`; the error itself is reported here only | `std::error::Error + Send + Sync + 'static` |
#[proc_macro_derive(RpcError, attributes(rpc))]
pub fn derive_rpc_error(input: TokenStream) -> TokenStream {
    derives::rpc_error(input.into()).into()
}

/// Implements `actix::Supervised` for an actor: on a restart it is replaced by a fresh one from the factory of
/// its `ChildSpec` or `ActorGroup`. Under actix's own `Supervisor`, which has no factory, the state is kept.
#[proc_macro_derive(Supervised)]
pub fn derive_supervised(input: TokenStream) -> TokenStream {
    derives::supervised(input.into()).into()
}
