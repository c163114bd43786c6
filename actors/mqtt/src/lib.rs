// SPDX-License-Identifier: MIT OR Apache-2.0
//! MQTT for Martlet: requests, events and replies as NestJS's MQTT transport puts them on the wire.
#![warn(clippy::print_stdout)]
