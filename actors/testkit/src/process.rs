// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that a test runs in: what memory it takes, and one of its own for a test that measures it.
//!
//! ```no_run
//! use martlet_testkit::process::{Memory, alone};
//!
//! #[test]
//! fn it_takes_little_memory() {
//!     if alone() {
//!         return;
//!     }
//!     let memory = Memory::watch();
//!     // …
//!     assert!(memory.grown() < 1 << 20);
//! }
//! ```

#![allow(clippy::unwrap_used)]

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const ALONE: &str = "MARTLET_TEST_ALONE";

/// Runs the test that calls it in a process of its own, where no other test takes memory, and waits for it. The first
/// statement of a test; what is behind it runs where this is false:
///
/// - in that process;
/// - where tests run one after the other (`--test-threads 1`).
///
/// It blocks the test's thread.
///
/// # Panics
///
/// When the test fails there, with what it printed; or when this is not the thread of a test.
#[must_use = "where it is true, the test has run"]
pub fn alone() -> bool {
    let thread = std::thread::current();
    // The test harness names a test's thread after it.
    let name = thread.name().expect("the thread of a test");
    if name == "main" || std::env::var_os(ALONE).is_some() {
        return false;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads", "1"])
        .env(ALONE, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}, alone in a process: {}\n{printed}", output.status);
    assert!(printed.contains("1 passed"), "{name} was not found in its own process:\n{printed}");
    true
}

/// Watches how much memory the process takes, until it is dropped.
#[derive(Debug)]
pub struct Memory {
    before: u64,
    most: Arc<AtomicU64>,
}

impl Memory {
    /// Begins to watch, every 10 ms from a thread of its own.
    ///
    /// # Panics
    ///
    /// Where there is no `/proc`.
    pub fn watch() -> Self {
        let before = resident();
        let most = Arc::new(AtomicU64::new(before));
        let noted = Arc::downgrade(&most);
        std::thread::spawn(move || {
            while let Some(most) = noted.upgrade() {
                most.fetch_max(resident(), Ordering::Relaxed);
                drop(most);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { before, most }
    }

    /// The most bytes so far beyond what there was at first.
    pub fn grown(&self) -> u64 {
        self.most.fetch_max(resident(), Ordering::Relaxed).max(self.before) - self.before
    }
}

/// What the process has in memory, in bytes: all tests that run in it.
///
/// # Panics
///
/// Where there is no `/proc`.
pub fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
