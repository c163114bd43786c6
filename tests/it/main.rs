// SPDX-License-Identifier: MIT OR Apache-2.0
//! End to end through the facade.
#![allow(clippy::unwrap_used)]

#[cfg(all(feature = "cli", feature = "tcp"))]
mod brokers;
#[cfg(all(feature = "cli", feature = "tcp"))]
mod cli;
mod config;
#[cfg(all(feature = "macros", feature = "tcp"))]
mod migrating;
#[cfg(all(feature = "tcp", feature = "redis", feature = "mqtt"))]
mod together;
mod url;
