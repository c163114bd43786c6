// SPDX-License-Identifier: MIT OR Apache-2.0

//! A service with a few handlers, and raw sockets to talk to it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use martlet_core::events::ServiceEvent;
use martlet_core::{Data, Microservice, Payload, RpcError, RunningService, StartError, Streaming, message};
use martlet_tcp::{TcpServer, TcpServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A running service and what it reported.
pub(crate) struct Service {
    pub(crate) running: RunningService,
    pub(crate) running_streams: Arc<AtomicU64>,
    pub(crate) handled: Arc<AtomicU64>,
    events: Arc<Mutex<Vec<ServiceEvent>>>,
}

/// Lowers a counter at the end of a stream, however it ends.
struct Lower(Arc<AtomicU64>);

impl Drop for Lower {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Service {
    /// Serves `sum`, `echo`, `slow`, `big` and `infinite` on a free port of 127.0.0.1, with changed options.
    pub(crate) async fn with(change: impl FnOnce(&mut TcpServerOptions)) -> Self {
        Self::try_start(TcpServerOptions::new().address("127.0.0.1", 0).with(change)).await.unwrap()
    }

    pub(crate) async fn try_start(options: TcpServerOptions) -> Result<Self, StartError> {
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let running_streams = Arc::new(AtomicU64::new(0));
        let streams = Arc::clone(&running_streams);
        let handled = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&handled);
        let sum = message("sum", move |Data(numbers): Data<Vec<i64>>| {
            count.fetch_add(1, Ordering::SeqCst);
            async move { Ok::<_, RpcError>(numbers.iter().sum::<i64>()) }
        });
        let infinite = message("infinite", move || {
            streams.fetch_add(1, Ordering::SeqCst);
            let lower = Lower(Arc::clone(&streams));
            async move {
                let items = futures::stream::unfold((0_u64, lower), |(next, lower)| async move {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    Some((next, (next + 1, lower)))
                });
                Ok::<_, RpcError>(Streaming(items.boxed_local()))
            }
        });
        let service = Microservice::new()
            .arbiters(1)
            .on(move |event| sink.lock().unwrap().push(event.clone()))
            .handlers(sum)
            .handlers(infinite)
            .handlers(message("echo", |data: Payload| async move { Ok::<_, RpcError>(data) }))
            .handlers(message("big", |Data(n): Data<usize>| async move { Ok::<_, RpcError>("x".repeat(n)) }))
            .handlers(message("slow", |Data(ms): Data<u64>| async move {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                Ok::<_, RpcError>(ms)
            }))
            .server(TcpServer::new(options));
        Ok(Self { running: service.start().await?, running_streams, handled, events })
    }

    pub(crate) fn port(&self) -> u16 {
        self.running.url().rsplit(':').next().unwrap().parse().unwrap()
    }

    pub(crate) async fn raw(&self) -> Raw {
        Raw(TcpStream::connect(("127.0.0.1", self.port())).await.unwrap())
    }

    /// What it reported since the last look, one text each.
    pub(crate) fn take_events(&self) -> Vec<String> {
        self.events.lock().unwrap().drain(..).map(|event| format!("{}: {event}", event.name())).collect()
    }

    /// Waits for one report whose text contains every part.
    pub(crate) async fn reports(&self, parts: &[&str]) {
        let mut all = Vec::new();
        let found = within(async {
            loop {
                all.extend(self.take_events());
                if all.iter().any(|event| parts.iter().all(|part| event.contains(part))) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(found.await.is_some(), "no report with {parts:?}: {all:#?}");
    }

    /// A client other than the one under test is served as if nothing had happened.
    pub(crate) async fn serves_others(&self) {
        let mut other = self.raw().await;
        other.send(&sum("others", &[1, 2])).await;
        assert_eq!(other.frame().await, r#"{"response":3,"isDisposed":true,"id":"others"}"#);
    }

    pub(crate) async fn stop(&self) {
        self.running.stop(Duration::from_millis(500)).await;
    }
}

/// The value, if it comes within twenty seconds: what takes longer hangs.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(Duration::from_secs(20), future).await.ok()
}

/// Waits until `probe` holds.
pub(crate) async fn eventually(what: &str, probe: impl Fn() -> bool) {
    let waiting = async {
        while !probe() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(within(waiting).await.is_some(), "waited in vain for {what}");
}

pub(crate) fn frame(json: &str) -> String {
    format!("{}#{json}", json.encode_utf16().count())
}

pub(crate) fn sum(id: &str, numbers: &[i64]) -> String {
    frame(&format!(r#"{{"pattern":"sum","data":{numbers:?},"id":"{id}"}}"#))
}

/// A socket without a framing of its own.
pub(crate) struct Raw(pub(crate) TcpStream);

impl Raw {
    pub(crate) async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// The body of the next frame; its prefix must be right.
    pub(crate) async fn frame(&mut self) -> String {
        let read = async {
            let mut units = 0;
            loop {
                match self.0.read_u8().await.unwrap() {
                    b'#' => break,
                    digit @ b'0'..=b'9' => units = units * 10 + usize::from(digit - b'0'),
                    other => panic!("{other} in a prefix"),
                }
            }
            let mut body = vec![0; units];
            self.0.read_exact(&mut body).await.unwrap();
            // Beyond ASCII there are more bytes than code units.
            loop {
                let text = std::str::from_utf8(&body);
                match text.map(|text| text.encode_utf16().count()) {
                    Ok(counted) if counted == units => return String::from_utf8(body).unwrap(),
                    _ => body.push(self.0.read_u8().await.unwrap()),
                }
            }
        };
        within(read).await.unwrap_or_else(|| panic!("no frame"))
    }

    /// Everything until the server closes.
    pub(crate) async fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        let read = within(self.0.read_to_end(&mut rest)).await;
        assert!(read.is_some(), "the server did not close; it sent {:?}", String::from_utf8_lossy(&rest));
        String::from_utf8(rest).unwrap()
    }

    /// Nothing comes, and the connection stays open.
    pub(crate) async fn stays_silent(&mut self) {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(60), self.0.read(&mut byte)).await;
        assert!(read.is_err(), "{read:?}");
    }
}
