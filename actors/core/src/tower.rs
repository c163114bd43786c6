// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tower layers around handlers (feature `tower`).
//!
//! A layer is built once, around a service of ours that stands for "what lies further in"; each request
//! then goes through a clone of the layered service. Layers that clone (timeouts, concurrency limits, load
//! shedding, maps, filters) fit; replies may be `!Send` streams, so layers that send responses to other
//! threads (buffers) do not.

use std::cell::{Cell, RefCell};
use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::LocalBoxFuture;
use hashbrown::HashMap;
use tokio::sync::{mpsc, oneshot};
use tower_layer::Layer;
use tower_service::Service;

use crate::error::RpcError;
use crate::interceptor::{Interceptor, Next};
use crate::reply::{HandlerResult, Reply};
use crate::request::Request;

type BoxError = Box<dyn StdError + Send + Sync>;

/// A request on its way out of the layers, with the way back for its result.
type Handover = (Request, oneshot::Sender<HandlerResult>);

thread_local! {
    /// The interceptors at work on this thread: results are not `Send`, so requests carry only a number.
    static AT_WORK: RefCell<HashMap<u64, mpsc::Sender<Handover>>> = RefCell::default();
    static NEXT: Cell<u64> = const { Cell::new(0) };
}

/// Where the innermost service finds the interceptor that its request came through.
struct Inside(u64);

/// Keeps an interceptor findable for as long as it works.
struct Findable(u64);

impl Findable {
    fn new(inside: mpsc::Sender<Handover>) -> Self {
        let number = NEXT.get();
        NEXT.set(number.wrapping_add(1));
        AT_WORK.with_borrow_mut(|at_work| at_work.insert(number, inside));
        Self(number)
    }
}

impl Drop for Findable {
    fn drop(&mut self) {
        AT_WORK.with_borrow_mut(|at_work| at_work.remove(&self.0));
    }
}

/// The service at the heart of a layer: what lies further in, the handler at last.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Handler;

impl Service<Request> for Handler {
    type Response = Reply;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Reply, BoxError>>>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        Box::pin(async move {
            let gone = || BoxError::from("the layer called the handler after its own end");
            let inside = request.extension::<Inside>().ok_or_else(gone)?;
            let (answer, result) = oneshot::channel();
            let sender = AT_WORK.with_borrow(|at_work| at_work.get(&inside.0).cloned()).ok_or_else(gone)?;
            sender.send((request, answer)).await.map_err(|_| gone())?;
            result.await.map_err(|_| gone())?.map_err(BoxError::from)
        })
    }
}

struct Layered<S>(S);

impl<S> fmt::Debug for Layered<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Layered")
    }
}

/// Makes an interceptor of a tower layer.
///
/// An error of the layer that is an [`RpcError`] is answered as it is; any other (a timeout's, a shed
/// load's) is an unexpected error: put a [`catch_and_map`](crate::interceptor::catch_and_map) outside to say
/// more.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// let limit = martlet_core::tower::layer(&tower::limit::ConcurrencyLimitLayer::new(8));
/// let timeout = martlet_core::tower::layer(&tower::timeout::TimeoutLayer::new(Duration::from_secs(1)));
/// ```
pub fn layer<L>(layer: &L) -> Arc<dyn Interceptor>
where
    L: Layer<Handler>,
    L::Service: Service<Request, Response = Reply> + Clone + Send + Sync + 'static,
    <L::Service as Service<Request>>::Error: Into<BoxError>,
{
    Arc::new(Layered(layer.layer(Handler)))
}

impl<S> Interceptor for Layered<S>
where
    S: Service<Request, Response = Reply> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
{
    fn intercept<'a>(&'a self, mut request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        let mut service = self.0.clone();
        Box::pin(async move {
            let (inside, mut requests) = mpsc::channel(1);
            let findable = Findable::new(inside);
            request.set_extension(Inside(findable.0));
            let layered = async {
                std::future::poll_fn(|cx| service.poll_ready(cx)).await.map_err(Into::into)?;
                service.call(request).await.map_err(Into::into)
            };
            tokio::pin!(layered);
            // The layers may call the handler never, once, or (a retry) again.
            loop {
                tokio::select! {
                    biased;
                    result = &mut layered => return result.map_err(rpc_error),
                    Some((request, answer)) = requests.recv() => {
                        let inner = next.run(request);
                        tokio::pin!(inner);
                        tokio::select! {
                            biased;
                            result = &mut layered => return result.map_err(rpc_error),
                            // A layer that does not wait any more has ended, or will.
                            result = &mut inner => drop(answer.send(result)),
                        }
                    }
                }
            }
        })
    }
}

fn rpc_error(error: BoxError) -> RpcError {
    match error.downcast::<RpcError>() {
        Ok(error) => *error,
        Err(error) => RpcError::unexpected(error),
    }
}
