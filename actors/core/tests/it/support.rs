// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests share.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use martlet_core::backoff::BackoffOptions;
use martlet_core::{ClientProxy, EventBus, RpcError, RunningService, ServerOptions, ServiceEvent};
use martlet_testkit::conformance::quiet_deliberate_panics;
use parking_lot::Mutex;

/// Runs a test in an actix system of one thread whose clock is virtual.
pub(crate) fn paused<F: Future<Output = ()>>(test: F) {
    quiet_deliberate_panics();
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    actix_rt::System::with_tokio_rt(runtime).block_on(async {
        let day = Duration::from_secs(24 * 3600);
        tokio::time::timeout(day, test).await.expect("the test ends within a (virtual) day");
    });
}

/// Runs a test in an actix system, for at most 60 s.
pub(crate) fn real<F: Future<Output = ()>>(test: F) {
    quiet_deliberate_panics();
    actix_rt::System::new().block_on(async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test ends within 60s");
    });
}

pub(crate) fn ok<T>(value: T) -> Result<T, RpcError> {
    Ok(value)
}

pub(crate) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Waits until something holds, for at most 10 s.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if holds() {
            return;
        }
        tokio::time::sleep(ms(2)).await;
    }
    panic!("within 10s: {what}");
}

/// The texts of everything a bus reports from now on.
pub(crate) fn log(bus: &EventBus) -> Arc<Mutex<Vec<String>>> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let write = Arc::clone(&log);
    bus.on(move |event: &ServiceEvent| write.lock().push(format!("{}: {event}", event.name())));
    log
}

/// Short pauses between attempts.
pub(crate) fn quick() -> BackoffOptions {
    BackoffOptions::between(ms(5), ms(50))
}

/// A server that tries again quickly.
pub(crate) fn server_options() -> ServerOptions {
    let mut options = ServerOptions::default();
    options.retry_delay = quick();
    options
}

/// Closes both; nothing may be left.
pub(crate) async fn end(client: ClientProxy, service: RunningService) {
    assert_eq!(client.occupied(), 0);
    client.close().await;
    let report = service.stop(ms(2000)).await;
    assert!(report.clean, "{report:?}");
}
