// SPDX-License-Identifier: MIT OR Apache-2.0

//! Integration tests of `martlet-testkit`: brokers under control, the wire, the probe. (The in-memory
//! transporter, the conformance suite and faults are at work in the tests of `martlet-core`.)
#![allow(clippy::unwrap_used)]

mod broker;
mod wire;
