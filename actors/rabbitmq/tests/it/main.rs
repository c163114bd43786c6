// SPDX-License-Identifier: MIT OR Apache-2.0
//! The RabbitMQ transporter against a real node, which the test binary starts.
#![allow(clippy::unwrap_used)]

mod acks;
mod blocked;
mod cancel;
mod config;
mod conformance;
mod faults;
mod flood;
mod messages;
mod pauses;
mod raw;
mod storm;
mod world;
