// SPDX-License-Identifier: MIT OR Apache-2.0
//! Code around handlers: it may look, change, refuse, map an error, or give up waiting.
//!
//! Guard, pipe and filter are shapes of one thing, the [`Interceptor`]. Interceptors run from the outside
//! in: global, controller, handler; within one scope in the order in which they were added.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::LocalBoxFuture;

use crate::error::RpcError;
use crate::handler::{Endpoint, Outcome};
use crate::reply::{HandlerResult, Reply};
use crate::request::Request;

/// Code around a handler.
///
/// # Examples
///
/// ```
/// use futures::future::LocalBoxFuture;
/// use martlet_core::{HandlerResult, Interceptor, Next, Request};
///
/// struct Timing;
///
/// impl Interceptor for Timing {
///     fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
///         Box::pin(async move {
///             let route = request.route().clone();
///             let started = std::time::Instant::now();
///             let result = next.run(request).await;
///             eprintln!("{route} took {:?}", started.elapsed());
///             result
///         })
///     }
/// }
/// ```
pub trait Interceptor: Send + Sync + 'static {
    /// Handles a request, usually by passing it on with [`Next::run`].
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the request is cancelled or its deadline passes.
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult>;
}

/// What lies further in: more interceptors, then the handler. A copy can be run again.
#[derive(Clone, Copy)]
pub struct Next<'a> {
    /// The server's, the service's, the group's and handler's.
    scopes: [&'a [Arc<dyn Interceptor>]; 3],
    endpoint: &'a dyn Endpoint,
}

impl fmt::Debug for Next<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Next").field("interceptors", &self.scopes.map(<[_]>::len)).finish()
    }
}

impl<'a> Next<'a> {
    pub(crate) fn new(scopes: [&'a [Arc<dyn Interceptor>]; 3], endpoint: &'a dyn Endpoint) -> Self {
        Self { scopes, endpoint }
    }

    /// Passes the request on. For a handler that streams, this ends when the stream is there, not when
    /// it is done.
    ///
    /// # Errors
    ///
    /// The failure of the handler, or of an interceptor further in.
    pub async fn run(mut self, request: Request) -> HandlerResult {
        let first = self.scopes.iter_mut().find_map(|scope| {
            let (first, rest) = scope.split_first()?;
            *scope = rest;
            Some(first)
        });
        match first {
            Some(first) => first.intercept(request, self).await,
            None => match self.endpoint.call(request) {
                Outcome::Ready(result) => result,
                Outcome::Future(future) | Outcome::Started(future) => future.await,
            },
        }
    }
}

/// A list of interceptors, in order.
pub type Interceptors = Vec<Arc<dyn Interceptor>>;

// === shapes ===

struct Guard<F>(F);

impl<F, Fut> Interceptor for Guard<F>
where
    F: Fn(Request) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<bool, RpcError>> + 'static,
{
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            if (self.0)(request.clone()).await? {
                next.run(request).await
            } else {
                Err(RpcError::forbidden())
            }
        })
    }
}

/// Refuses requests: `Ok(false)` is answered as NestJS does, with `Forbidden resource`; an error is
/// answered as it is.
pub fn guard<F, Fut>(check: F) -> Arc<dyn Interceptor>
where
    F: Fn(Request) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<bool, RpcError>> + 'static,
{
    Arc::new(Guard(check))
}

struct Pipe<F>(F);

impl<F> Interceptor for Pipe<F>
where
    F: Fn(&mut Request) -> Result<(), RpcError> + Send + Sync + 'static,
{
    fn intercept<'a>(&'a self, mut request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            (self.0)(&mut request)?;
            next.run(request).await
        })
    }
}

/// Validates or changes the request (its payload, its extensions) before the handler sees it.
pub fn pipe<F>(change: F) -> Arc<dyn Interceptor>
where
    F: Fn(&mut Request) -> Result<(), RpcError> + Send + Sync + 'static,
{
    Arc::new(Pipe(change))
}

struct Filter<F>(Arc<F>);

impl<F> Interceptor for Filter<F>
where
    F: Fn(RpcError) -> HandlerResult + Send + Sync + 'static,
{
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            match next.run(request).await {
                Err(error) => (self.0)(error),
                Ok(Reply::Stream(stream)) => {
                    let map = Arc::clone(&self.0);
                    // An error inside a stream can be mapped to another error or to a last value.
                    let mapped = stream.map(move |item| match item {
                        Ok(item) => Ok(item),
                        Err(error) => match map(error)? {
                            Reply::Value(payload) | Reply::Record(payload, _) => Ok(payload),
                            Reply::Empty | Reply::Stream(_) => Err(RpcError::unexpected(
                                "a filter must map a stream's error to a value or an error",
                            )),
                        },
                    });
                    Ok(Reply::Stream(mapped.boxed_local()))
                }
                done => done,
            }
        })
    }
}

/// Catches errors and maps them: to another error, or to a value that is answered instead.
pub fn catch_and_map<F>(map: F) -> Arc<dyn Interceptor>
where
    F: Fn(RpcError) -> HandlerResult + Send + Sync + 'static,
{
    Arc::new(Filter(Arc::new(map)))
}

// === ready-made ===

struct Timeout(Duration);

impl Interceptor for Timeout {
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            match tokio::time::timeout(self.0, next.run(request)).await {
                Ok(result) => result,
                Err(_) => Err(RpcError::message(format!("Timeout: no result within {:?}", self.0))),
            }
        })
    }
}

/// Drops the handler and answers an error when it has no result within `limit`. For a stream, the limit
/// is on getting the stream.
pub fn timeout(limit: Duration) -> Arc<dyn Interceptor> {
    Arc::new(Timeout(limit))
}

struct ConcurrencyLimit {
    running: AtomicUsize,
    max: usize,
}

impl Interceptor for ConcurrencyLimit {
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        struct Leave<'a>(&'a AtomicUsize);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::AcqRel);
            }
        }
        Box::pin(async move {
            let before = self.running.fetch_add(1, Ordering::AcqRel);
            let _leave = Leave(&self.running);
            if before >= self.max {
                return Err(RpcError::message("Too many requests"));
            }
            next.run(request).await
        })
    }
}

/// Refuses requests with `Too many requests` while `max` are running, over all arbiters. (To make them
/// wait instead, use a handler's own `concurrency`.)
pub fn concurrency_limit(max: usize) -> Arc<dyn Interceptor> {
    Arc::new(ConcurrencyLimit { running: AtomicUsize::new(0), max })
}

struct TraceSpan;

impl Interceptor for TraceSpan {
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        use tracing::Instrument;
        let trace = request.trace();
        let span = tracing::info_span!(
            target: "martlet",
            "rpc",
            "otel.kind" = "server",
            "rpc.system" = "nestjs",
            "rpc.method" = %request.route(),
            "network.transport" = %request.transport().name,
            "trace_id" = tracing::field::Empty,
            "parent_span_id" = tracing::field::Empty,
            "error" = tracing::field::Empty,
        );
        if let Some(trace) = &trace {
            span.record("trace_id", format!("{:032x}", trace.trace_id()));
            span.record("parent_span_id", format!("{:016x}", trace.span_id()));
        }
        let record = span.clone();
        Box::pin(
            async move {
                let result = next.run(request).await;
                if let Err(error) = &result {
                    record.record("error", tracing::field::display(error));
                }
                result
            }
            .instrument(span),
        )
    }
}

/// Runs each request inside a `tracing` span named `rpc`, with the route, the transporter and the caller's
/// W3C trace id.
pub fn trace_span() -> Arc<dyn Interceptor> {
    Arc::new(TraceSpan)
}
