// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pool of actix threads that a service works on, and placement on it.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use actix_rt::{Arbiter, ArbiterHandle};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::error::StartError;

/// The arbiters of a service. Clones share one pool.
#[derive(Clone)]
pub struct Arbiters {
    inner: Arc<Inner>,
}

struct Inner {
    handles: Vec<ArbiterHandle>,
    owned: Mutex<Vec<Arbiter>>,
    next: AtomicUsize,
}

impl fmt::Debug for Arbiters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arbiters").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Arbiters {
    /// Works on the arbiter that runs now, and starts no thread.
    ///
    /// # Errors
    ///
    /// [`StartError::NoSystem`] outside of an actix system.
    pub fn current() -> Result<Self, StartError> {
        let handle = Arbiter::try_current().ok_or(StartError::NoSystem)?;
        Ok(Self::from_parts(vec![handle], Vec::new()))
    }

    /// Starts `threads` arbiters (at least one) of its own.
    ///
    /// # Errors
    ///
    /// [`StartError::NoSystem`] outside of an actix system.
    pub fn pool(threads: usize) -> Result<Self, StartError> {
        if actix_rt::System::try_current().is_none() {
            return Err(StartError::NoSystem);
        }
        let owned: Vec<_> = (0..threads.max(1)).map(|_| Arbiter::new()).collect();
        Ok(Self::from_parts(owned.iter().map(Arbiter::handle).collect(), owned))
    }

    fn from_parts(handles: Vec<ArbiterHandle>, owned: Vec<Arbiter>) -> Self {
        Self { inner: Arc::new(Inner { handles, owned: Mutex::new(owned), next: AtomicUsize::new(0) }) }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.inner.handles.len()
    }

    /// Never: there is at least one.
    pub fn is_empty(&self) -> bool {
        self.inner.handles.is_empty()
    }

    /// The next one in turn.
    pub fn next(&self) -> usize {
        self.inner.next.fetch_add(1, Ordering::Relaxed) % self.len().max(1)
    }

    /// Runs a future that is made on arbiter `index`; it need not be `Send`.
    ///
    /// The receiver fails when the arbiter has stopped or the future panicked.
    pub fn run_on<F, Fut, T>(&self, index: usize, make: F) -> oneshot::Receiver<T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let spawned = self.inner.handles.get(index).map(|handle| {
            handle.spawn_fn(move || {
                actix_rt::spawn(async move {
                    // The receiver may have stopped waiting.
                    let _ = sender.send(make().await);
                });
            })
        });
        if spawned != Some(true) {
            tracing::debug!(target: "martlet", index, "the arbiter has stopped");
        }
        receiver
    }

    /// Stops the threads that the pool started and waits for them. Whatever still runs on them is dropped.
    pub async fn stop(&self) {
        let owned = std::mem::take(&mut *self.inner.owned.lock());
        for arbiter in owned {
            arbiter.stop();
            // Joining waits for a thread that may be in the middle of a handler.
            let joined = tokio::task::spawn_blocking(move || arbiter.join());
            if tokio::time::timeout(std::time::Duration::from_secs(5), joined).await.is_err() {
                tracing::error!(target: "martlet", "an arbiter is blocked and did not stop within 5s");
            }
        }
    }
}
