// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tower layers around handlers.

use std::task::{Context, Poll};
use std::time::Duration;

use martlet_core::interceptor::catch_and_map;
use martlet_core::{Data, Microservice, Reply, Request, RpcError, message, tower as adapter};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
use tower::Service;
use tower::layer::layer_fn;
use tower::limit::ConcurrencyLimitLayer;
use tower::timeout::TimeoutLayer;

use crate::support::{ms, ok, paused};

#[test]
fn layers_wrap_a_handler_and_their_errors_are_answers() {
    paused(async {
        let network = MemoryNetwork::new();
        let slow = message("slow", |Data(millis): Data<u64>| async move {
            tokio::time::sleep(ms(millis)).await;
            ok(millis)
        })
        .interceptor(catch_and_map(|error| match error.is_unexpected() {
            true => Err(RpcError::message("too slow")),
            false => Err(error),
        }))
        .interceptor(adapter::layer(&ConcurrencyLimitLayer::new(1)))
        .interceptor(adapter::layer(&TimeoutLayer::new(Duration::from_secs(1))));
        let service = Microservice::new().on_current_arbiter().handlers(slow);
        let service = service.server(MemoryServer::new(&network)).start().await.unwrap();
        let client = MemoryClient::new(&network);
        assert_eq!(client.send::<u64>("slow", 900).await.unwrap(), 900);
        let error = client.send::<u64>("slow", 1100).await.unwrap_err();
        assert_eq!(error.remote().and_then(|remote| remote.message()).as_deref(), Some("too slow"));
        // The limit of one makes two calls take turns.
        let started = tokio::time::Instant::now();
        let (one, two) = futures::join!(client.send::<u64>("slow", 500), client.send::<u64>("slow", 500));
        assert_eq!((one.unwrap(), two.unwrap()), (500, 500));
        assert!(started.elapsed() >= ms(1000), "{:?}", started.elapsed());
        client.close().await;
        assert!(service.stop(ms(1000)).await.clean);
    });
}

/// Calls what is inside twice.
#[derive(Clone)]
struct Twice<S>(S);

impl<S> Service<Request> for Twice<S>
where
    S: Service<Request, Response = Reply> + Clone + 'static,
{
    type Response = Reply;
    type Error = S::Error;
    type Future = futures::future::LocalBoxFuture<'static, Result<Reply, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut inner = self.0.clone();
        Box::pin(async move {
            match inner.call(request.clone()).await {
                Ok(_) => inner.call(request).await,
                failed => failed,
            }
        })
    }
}

#[test]
fn a_layer_may_call_the_handler_again_and_an_rpc_error_passes_through() {
    paused(async {
        let network = MemoryNetwork::new();
        let count = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let seen = std::sync::Arc::clone(&count);
        let counted = message("count", move |Data(fail): Data<bool>| {
            let now = seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
            async move { if fail { Err(RpcError::message("boom")) } else { Ok(now) } }
        })
        .interceptor(adapter::layer(&layer_fn(Twice)));
        let service = Microservice::new().on_current_arbiter().handlers(counted);
        let service = service.server(MemoryServer::new(&network)).start().await.unwrap();
        let client = MemoryClient::new(&network);
        assert_eq!(client.send::<u64>("count", false).await.unwrap(), 2);
        let error = client.send::<u64>("count", true).await.unwrap_err();
        assert_eq!(error.remote().and_then(|remote| remote.message()).as_deref(), Some("boom"));
        assert_eq!(count.load(std::sync::atomic::Ordering::SeqCst), 3);
        client.close().await;
        service.stop(ms(1000)).await;
    });
}
