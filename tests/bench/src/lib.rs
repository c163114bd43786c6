// SPDX-License-Identifier: MIT OR Apache-2.0
//! Baselines and load generators for Martlet's performance figures.
//!
//! The programs in `src/bin/` are either *baselines* (`loop_*`, `nats_*`, `broker_*`: what a competent
//! person writes by hand for one job), *load* (`tcp_load`: as cheap as possible, so that the server is
//! the limit; `broker_load`) or *subjects* (`subject_*`: the same job done with Martlet). The script `run` starts them
//! by the contract in its `--help`, and compares them in one interleaved run.
//!
//! Nothing in this library or in the baselines depends on Martlet.

pub mod broker;
pub mod frame;
pub mod load;
pub mod options;
pub mod process;
#[path = "../../../src/cli/report.rs"]
pub mod report;
pub mod service;
pub mod window;

/// What the programs here fail with: they print it and exit with 1.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
