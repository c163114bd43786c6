// SPDX-License-Identifier: MIT OR Apache-2.0
//! The MQTT transporter against a real mosquitto, which each test starts on a port of its own.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod bounds;
mod calls;
mod cancel;
mod config;
mod confirm;
mod conformance;
mod delivery;
mod faults;
mod given_up;
mod messages;
mod raw;
mod storm;
mod world;
