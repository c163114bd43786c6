// SPDX-License-Identifier: MIT OR Apache-2.0
//! The Redis transporter against a real redis-server, which each test starts on a port of its own.
#![allow(clippy::unwrap_used)]

mod config;
mod conformance;
mod faults;
mod flood;
mod messages;
mod refusals;
mod storm;
mod wildcards;
mod world;
