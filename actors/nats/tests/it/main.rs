// SPDX-License-Identifier: MIT OR Apache-2.0
//! The NATS transporter against a real nats-server, which each test starts on a port of its own.
#![allow(clippy::unwrap_used)]

mod broker;
mod calls;
mod config;
mod conformance;
mod faults;
mod golden;
mod hello;
mod lifecycle;
mod login;
mod messages;
mod storm;
mod tls;
mod world;
