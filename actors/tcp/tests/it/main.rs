// SPDX-License-Identifier: MIT OR Apache-2.0

//! Integration tests of `martlet-tcp`.
#![allow(clippy::unwrap_used)]

mod conformance;
mod frames;
mod storm;
