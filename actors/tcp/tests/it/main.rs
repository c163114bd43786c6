// SPDX-License-Identifier: MIT OR Apache-2.0

//! Integration tests of `martlet-tcp`.
#![allow(clippy::unwrap_used)]

mod cancel;
mod conformance;
mod connections;
mod foreign;
mod frames;
mod golden;
mod hostile;
mod limits;
mod storm;
mod support;
mod tls;
