// SPDX-License-Identifier: MIT OR Apache-2.0
//! CPU time of a process, the contract's ready line, and the signal that ends a server.

use std::io::Write;
use std::time::Duration;

use nix::time::ClockId;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use crate::Result;

/// CPU time a living process has used so far: all its threads, also those that have ended.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(pid)?))?;
    Ok(Duration::from(clock.now()?))
}

/// Writes one line to standard output at once.
pub fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// Tells the driver that work is accepted: `ready <port or "nats"> <pid>`.
pub fn say_ready(place: &str) -> Result<()> {
    say(&format!("ready {place} {}", std::process::id()))
}

/// Resolves on SIGTERM or SIGINT.
pub async fn terminated() -> Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Runs a program's async main on one current-thread runtime.
pub fn on_one_thread<F: Future<Output = Result<()>>>(main: F) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(main)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_counts_every_thread_and_keeps_what_ended() {
        fn burn() {
            let start = cpu_time(std::process::id()).unwrap();
            while cpu_time(std::process::id()).unwrap() < start + Duration::from_millis(20) {}
        }
        let before = cpu_time(std::process::id()).unwrap();
        std::thread::spawn(burn).join().unwrap();
        let ended = cpu_time(std::process::id()).unwrap();
        assert!(ended >= before + Duration::from_millis(20));
        burn();
        assert!(cpu_time(std::process::id()).unwrap() >= ended + Duration::from_millis(20));
    }

    #[test]
    fn nobodys_cpu_time_is_an_error() {
        assert!(cpu_time(u32::MAX).is_err());
        // Above the highest id that Linux gives.
        assert!(cpu_time(5_000_000).is_err());
    }
}
