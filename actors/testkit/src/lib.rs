// SPDX-License-Identifier: MIT OR Apache-2.0
//! What Martlet's transporters are tested with, and what an application's tests can use.
//!
//! | module | is |
//! |---|---|
//! | [`memory`] | an in-memory transporter: peers, or a broker in the middle |
//! | [`conformance`], [`features`] | the suite that every transporter passes, one test per behaviour |
//! | [`fault`] | any transporter, with cuts, delays, losses, doubles and panics as told |
//! | [`nest`] | the application whose packets the golden vectors are, and the vectors read |
//! | [`probe`] | an actor that records what it receives |
//! | [`relay`] | a TCP relay that is cut and closed as told |
//! | [`storm`] | many calls of every kind, and what must hold of their outcomes |
//! | [`process`] | what memory a test's process takes, and one of its own for the test |
//! | [`world`] | a service with a few handlers, what it reports |
//! | [`vectors`] | packets that were captured from real NestJS |
//! | [`broker`] | a real broker process on a free port: restarted, frozen, killed when dropped |
//!
//! Not here: mocks of the runtime. Everything is a real implementation of the public contract.
#![warn(clippy::print_stdout)]

pub mod broker;
pub mod conformance;
pub mod fault;
pub mod features;
pub mod memory;
pub mod nest;
pub mod probe;
pub mod process;
pub mod relay;
pub mod storm;
pub mod vectors;
pub mod world;
