// SPDX-License-Identifier: MIT OR Apache-2.0
//! RabbitMQ for Martlet: requests, events and replies as NestJS's RabbitMQ transport puts them on the wire.
#![warn(clippy::print_stdout)]
