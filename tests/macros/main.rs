// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the macros make, against the same written by hand; how they run; what they refuse.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "macros")]

mod calls;
mod derives;
mod twins;
mod ui;
