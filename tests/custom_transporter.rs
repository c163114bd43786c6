// SPDX-License-Identifier: MIT OR Apache-2.0
//! The transporter of `examples/custom_transporter.rs` keeps what the conformance suite asks of every transporter.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use martlet_core::{ClientOptions, ClientProxy, Server, ServerOptions};
use martlet_testkit::conformance::{Harness, RawPeer};
use martlet_testkit::fault::{Faults, FaultyDial, FaultyListen};
use martlet_testkit::features::Features;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

// Its main function is not called here, and what it hands out to others is not seen from outside.
#[allow(dead_code, unreachable_pub)]
#[path = "../examples/custom_transporter.rs"]
mod example;

use example::{UnixDial, UnixListen};

/// Servers and clients on the example's transporter; only cutting the line is left to the testkit.
struct Unix {
    faults: Faults,
}

impl Unix {
    fn new() -> Self {
        Self { faults: Faults::new() }
    }
}

fn path_of(url: &str) -> PathBuf {
    PathBuf::from(url.strip_prefix("unix://").unwrap())
}

impl Harness for Unix {
    fn features(&self) -> Features {
        let mut features = Features::default();
        features.cancel = true;
        features.cuts = true;
        features.raw = true;
        features.accepts = true;
        features
    }

    fn server(&mut self, options: ServerOptions) -> Server {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("martlet-conformance-{}-{number}.sock", std::process::id());
        let listen = UnixListen::new(std::env::temp_dir().join(name));
        Server::listen(FaultyListen::new(listen, &self.faults), options)
    }

    fn client(&mut self, url: &str, options: ClientOptions) -> ClientProxy {
        ClientProxy::new(FaultyDial::new(UnixDial::new(path_of(url)), &self.faults), options)
    }

    fn cut(&mut self) {
        self.faults.cut();
    }

    fn set_reachable(&mut self, reachable: bool) {
        self.faults.change(|plan| plan.refuse = !reachable);
        if !reachable {
            self.faults.cut();
        }
    }

    fn raw(&mut self, url: &str) -> LocalBoxFuture<'static, Box<dyn RawPeer>> {
        let path = path_of(url);
        async move {
            let socket = UnixStream::connect(path).await.unwrap();
            Box::new(Lines(BufReader::new(socket))) as Box<dyn RawPeer>
        }
        .boxed_local()
    }
}

struct Lines(BufReader<UnixStream>);

impl RawPeer for Lines {
    fn send(&mut self, packet: Bytes) -> LocalBoxFuture<'_, ()> {
        async move {
            self.0.get_mut().write_all(&[&packet[..], b"\n"].concat()).await.unwrap();
        }
        .boxed_local()
    }

    fn recv(&mut self) -> LocalBoxFuture<'_, Option<Bytes>> {
        async move {
            let mut line = Vec::new();
            self.0.read_until(b'\n', &mut line).await.unwrap();
            (line.pop() == Some(b'\n')).then(|| Bytes::from(line))
        }
        .boxed_local()
    }
}

martlet_testkit::conformance_tests!(Unix::new(); core, metadata, cancel, cuts, raw, accepts);

/// A pretty-printed payload, copied as it came, must not break the framing.
#[actix::test]
async fn line_breaks_inside_a_payload_stay_on_one_line() {
    use martlet_core::{Microservice, Payload, RpcError, message};

    let echo = message("echo", async |payload: Payload| Ok::<_, RpcError>(payload));
    let mut unix = Unix::new();
    let server = unix.server(ServerOptions::default());
    let service =
        Microservice::new().on_current_arbiter().handlers(echo).server(server).start().await.unwrap();
    let client = unix.client(&service.url(), ClientOptions::default());
    let pretty = Payload::new(martlet_core::Format::Json, Bytes::from_static(b"{\n  \"a\": [\n1,\n2]\n}"));
    let value: serde_json::Value = client.send("echo", pretty).await.unwrap();
    assert_eq!(value, serde_json::json!({ "a": [1, 2] }));
    client.close().await;
    service.stop(std::time::Duration::from_secs(5)).await;
}
