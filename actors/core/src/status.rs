// SPDX-License-Identifier: MIT OR Apache-2.0
//! Connection status: the current value and every change.

use std::fmt;
use std::sync::Arc;

use futures::Stream;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::broadcast;

/// How many changes a subscriber may lag behind before it loses the oldest.
pub const STATUS_BACKLOG: usize = 256;

/// Where a server or client stands with its peer or broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ConnectionStatus {
    /// A first connection is being made.
    Connecting,
    /// Usable. A server: listening, or subscribed.
    Connected,
    /// The line was lost and is being made anew.
    Reconnecting,
    /// There is no line; a client makes one at its next use.
    Disconnected,
    /// Finishing what was taken, taking nothing new.
    Draining,
    /// Closed on purpose.
    Closed,
}

impl ConnectionStatus {
    /// The text NestJS uses for it, or the nearest where NestJS has none: `connecting` and `draining` are
    /// Martlet's own.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Reconnecting => "reconnecting",
            Self::Disconnected => "disconnected",
            Self::Draining => "draining",
            Self::Closed => "closed",
        }
    }
}

impl fmt::Display for ConnectionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A status cell: written by its owner, read and watched by anyone. Clones share one cell.
#[derive(Clone)]
pub struct StatusCell {
    inner: Arc<Inner>,
}

struct Inner {
    current: Mutex<Option<ConnectionStatus>>,
    changes: broadcast::Sender<ConnectionStatus>,
}

impl fmt::Debug for StatusCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StatusCell").field(&self.current()).finish()
    }
}

impl Default for StatusCell {
    fn default() -> Self {
        let (changes, _) = broadcast::channel(STATUS_BACKLOG);
        Self { inner: Arc::new(Inner { current: Mutex::new(None), changes }) }
    }
}

impl StatusCell {
    /// The current status; `None` before the first.
    pub fn current(&self) -> Option<ConnectionStatus> {
        *self.inner.current.lock()
    }

    /// Sets the status. Setting the same one again is not a change.
    pub fn set(&self, status: ConnectionStatus) {
        let mut current = self.inner.current.lock();
        if *current != Some(status) {
            *current = Some(status);
            // Sent under the lock, so that subscribers see changes in order. Nobody listening is fine.
            let _ = self.inner.changes.send(status);
        }
    }

    /// The current status (if any), then every change. A subscriber that lags more than
    /// [`STATUS_BACKLOG`] changes behind skips the oldest.
    ///
    /// Dropping the stream at any point loses nothing for others.
    pub fn stream(&self) -> impl Stream<Item = ConnectionStatus> + Send + Unpin + 'static {
        let (current, receiver) = {
            let current = self.inner.current.lock();
            (*current, self.inner.changes.subscribe())
        };
        Box::pin(futures::stream::unfold((current, receiver), |(first, mut receiver)| async move {
            if let Some(status) = first {
                return Some((status, (None, receiver)));
            }
            loop {
                match receiver.recv().await {
                    Ok(status) => return Some((status, (None, receiver))),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        }))
    }

    /// Waits until the status is `wanted`. Returns at once if it is; `false` if the cell's owner is gone.
    ///
    /// Cancel safe.
    pub async fn wait_for(&self, wanted: ConnectionStatus) -> bool {
        use futures::StreamExt;
        let mut stream = self.stream();
        while let Some(status) = stream.next().await {
            if status == wanted {
                return true;
            }
        }
        false
    }
}
