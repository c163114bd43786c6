// SPDX-License-Identifier: MIT OR Apache-2.0

//! Integration tests of `martlet-core`.
#![allow(clippy::unwrap_used)]

mod actors;
mod confirmation;
mod conformance;
mod edges;
mod extractors;
mod faults;
mod functions;
mod listening;
mod memory;
mod packets;
mod patterns;
mod poison;
mod settlement;
mod spans;
mod supervision;
mod supervision_tree;
mod supervisors;
mod support;
#[cfg(feature = "tower")]
mod tower;
