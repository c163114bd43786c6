// SPDX-License-Identifier: MIT OR Apache-2.0

//! Integration tests of `martlet-core`.
#![allow(clippy::unwrap_used)]

mod confirmation;
mod conformance;
mod edges;
mod extractors;
mod faults;
mod functions;
mod memory;
mod packets;
mod patterns;
mod settlement;
mod supervision;
mod supervision_tree;
mod supervisors;
mod support;
#[cfg(feature = "tower")]
mod tower;
