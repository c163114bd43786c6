// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cancellation: a caller that has lost interest stops the work, where the wire can say so.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use martlet_core::{CallError, Cancellation, Streaming, message};

use super::{Harness, Names, Stage, eventually, ok, small};

struct Count(Arc<AtomicUsize>);

impl Count {
    fn new(running: &Arc<AtomicUsize>) -> Self {
        running.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(running))
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The handler's own future is dropped, whether its call was dropped or timed out.
pub async fn dropping_a_call_drops_the_handlers_future<H: Harness>(harness: H) {
    let names = Names::new();
    let running = Arc::new(AtomicUsize::new(0));
    let run = Arc::clone(&running);
    let endless = message(names.of("endless"), move || {
        let count = Count::new(&run);
        async move {
            let _count = count;
            std::future::pending::<()>().await;
            ok(())
        }
    });
    let service = small().handlers(endless).handlers(message(names.of("alive"), || async { ok(1) }));
    let stage = Stage::with(harness, service, |_| {}, |client| client.propagate = false).await;
    let call = || stage.client.send::<()>(names.of("endless"), 1);
    let mut calls: Vec<_> = (0..20).map(|_| call()).collect();
    for call in &mut calls {
        assert!(call.now_or_never().is_none());
    }
    eventually("twenty run", || running.load(Ordering::SeqCst) == 20).await;
    calls.truncate(7);
    eventually("seven run", || running.load(Ordering::SeqCst) == 7).await;
    drop(calls);
    eventually("none runs", || running.load(Ordering::SeqCst) == 0).await;
    let late = call().timeout(Duration::from_millis(50)).await;
    assert!(matches!(late, Err(CallError::Timeout { .. })), "{late:?}");
    eventually("none runs", || running.load(Ordering::SeqCst) == 0).await;
    assert_eq!(stage.client.send::<u64>(names.of("alive"), 1).await.unwrap(), 1);
    stage.end().await;
}

/// An endless stream ends with its reader.
pub async fn dropping_a_stream_stops_the_handlers_stream<H: Harness>(harness: H) {
    let names = Names::new();
    let running = Arc::new(AtomicUsize::new(0));
    let run = Arc::clone(&running);
    let ticks = message(names.of("ticks"), move || {
        let count = Count::new(&run);
        async move {
            ok(Streaming(stream::iter(0u64..).then(move |tick| {
                let _alive = &count;
                async move {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    tick
                }
            })))
        }
    });
    let stage = Stage::new(harness, small().handlers(ticks)).await;
    let first: Vec<_> =
        stage.client.send::<u64>(names.of("ticks"), 1).stream().take(5).map(Result::unwrap).collect().await;
    assert_eq!(first, [0, 1, 2, 3, 4]);
    eventually("the stream was dropped", || running.load(Ordering::SeqCst) == 0).await;
    stage.end().await;
}

/// Work that the handler left behind learns it from the token.
pub async fn the_cancellation_token_outlives_the_handler<H: Harness>(harness: H) {
    let names = Names::new();
    let (told, mut tell) = tokio::sync::mpsc::unbounded_channel();
    let started = Arc::new(AtomicUsize::new(0));
    let begun = Arc::clone(&started);
    let group = message(names.of("leaves"), move |token: Cancellation| {
        let told = told.clone();
        begun.fetch_add(1, Ordering::SeqCst);
        actix_rt::spawn(async move {
            token.cancelled().await;
            let _ = told.send(());
        });
        async {
            std::future::pending::<()>().await;
            ok(())
        }
    });
    let stage = Stage::new(harness, small().handlers(group)).await;
    let mut call = stage.client.send::<()>(names.of("leaves"), 1);
    assert!((&mut call).now_or_never().is_none());
    eventually("it runs", || started.load(Ordering::SeqCst) == 1).await;
    assert!(tell.try_recv().is_err());
    drop(call);
    tell.recv().await.expect("the token tells");
    stage.end().await;
}
