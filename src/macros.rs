// SPDX-License-Identifier: MIT OR Apache-2.0
//! The macros, with examples that run.

/// # Examples
///
/// ```
/// use std::cell::Cell;
///
/// use futures::stream::{self, Stream};
/// use martlet::{Controller, HandlerKind, Metadata, RpcError, controller};
///
/// #[derive(Default)]
/// struct Math {
///     calls: Cell<u64>,
/// }
///
/// #[controller]
/// impl Math {
///     #[message_pattern({ "cmd": "sum" })]
///     #[message_pattern("sum", concurrency = 4)]
///     fn sum(&self, #[payload] numbers: Vec<i64>) -> i64 {
///         self.calls.set(self.calls.get() + 1);
///         numbers.iter().sum()
///     }
///
///     #[message_pattern(cmd = "divide")]
///     async fn divide(&self, #[payload("a")] a: i64, #[payload("b")] b: i64) -> Result<i64, RpcError> {
///         a.checked_div(b).ok_or_else(|| RpcError::message("cannot divide by zero"))
///     }
///
///     #[message_pattern("count", transport = TCP)]
///     fn count(&self, #[payload] to: u64) -> impl Stream<Item = u64> {
///         stream::iter(1..=to)
///     }
///
///     #[event_pattern("reset", queue = "math")]
///     async fn reset(&self, _metadata: Metadata) {
///         self.calls.set(0);
///     }
/// }
///
/// let handlers = Math::handlers();
/// assert_eq!(handlers.len(), 5);
/// assert_eq!(&*handlers[0].info.name, "Math::sum");
/// assert_eq!(handlers[2].info.pattern.route().as_str(), r#"{"cmd":"divide"}"#);
/// assert_eq!(handlers[4].info.kind, HandlerKind::Event);
/// assert_eq!(handlers[4].info.extras["queue"], "math");
/// ```
pub use martlet_macros::controller;
pub use martlet_macros::{event_pattern, message_pattern};

/// # Examples
///
/// ```
/// use martlet::RpcError;
///
/// #[derive(Debug, thiserror::Error, RpcError)]
/// enum OrderError {
///     #[error("order {0} is closed")]
///     Closed(u32),
///     #[error("no order {id}")]
///     #[rpc(code = "NOT_FOUND")]
///     Missing { id: u32 },
///     #[error("the database is away")]
///     #[rpc(unexpected)]
///     Database(#[from] std::io::Error),
/// }
///
/// let wire = |error: OrderError| RpcError::from(error).to_json();
/// assert_eq!(wire(OrderError::Closed(7)), r#"{"status":"error","message":"order 7 is closed"}"#);
/// assert_eq!(
///     wire(OrderError::Missing { id: 7 }),
///     r#"{"status":"error","message":"no order 7","code":"NOT_FOUND"}"#
/// );
/// assert_eq!(
///     wire(std::io::Error::other("disk").into()),
///     r#"{"status":"error","message":"Internal server error"}"#
/// );
/// ```
pub use martlet_macros::RpcError;

/// # Examples
///
/// ```
/// use actix::prelude::{Actor, Context};
/// use martlet::Supervised;
///
/// #[derive(Default, Supervised)]
/// struct Counter(u64);
///
/// impl Actor for Counter {
///     type Context = Context<Self>;
/// }
///
/// let child = martlet::supervise::ChildSpec::new(Counter::default);
/// # let _ = child;
/// ```
pub use martlet_macros::Supervised;
