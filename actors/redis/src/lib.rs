// SPDX-License-Identifier: MIT OR Apache-2.0
//! Redis for Martlet: requests, events and replies as NestJS's Redis transport puts them on the wire.
#![warn(clippy::print_stdout)]
