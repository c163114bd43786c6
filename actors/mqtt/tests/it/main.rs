// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tests of the MQTT transporter against a real broker.
