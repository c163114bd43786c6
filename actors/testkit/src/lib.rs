// SPDX-License-Identifier: MIT OR Apache-2.0
//! What Martlet's transporters are tested with, and what an application's tests can use: an in-memory
//! transporter, the conformance suite, faults, a probe actor, real brokers under control.

pub mod conformance;
pub mod features;
pub mod memory;
