// SPDX-License-Identifier: MIT OR Apache-2.0
//! CPU time of a process, the contract's ready line, and the signal that ends a server.

use std::fs;
use std::io::Write;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::Result;

/// CPU time a living process has used so far, all threads.
///
/// `/proc/PID/stat` counts in ticks of 10 ms; the scheduler's own nanosecond counters, one file per
/// thread, say the same more finely and are preferred where the kernel has them.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    if let Some(fine) = scheduler_time(pid) {
        return Ok(fine);
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name is in parentheses and may itself contain spaces: fields are counted behind it.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| -> Result<u64> { Ok(fields.get(index).ok_or("short stat line")?.parse()?) };
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

fn scheduler_time(pid: u32) -> Option<Duration> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let text = fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        total += text.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    (total > 0).then(|| Duration::from_nanos(total))
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
    fn cpu_time_grows_with_work() {
        let before = cpu_time(std::process::id()).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            std::hint::black_box(start);
        }
        assert!(cpu_time(std::process::id()).unwrap() > before);
        assert!(cpu_time(u32::MAX).is_err());
    }
}
