// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets that were captured from real NestJS, as the files of vectors hold them.

#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use martlet_core::{Format, Payload};
use serde_json::Value;

/// The vectors of one transporter: the large file of NestJS 11, and the small ones of NestJS 12.
#[derive(Debug, Clone)]
pub struct Vectors {
    nest_11: Value,
    nest_12: Vec<Value>,
}

impl Vectors {
    /// Reads the files' texts.
    ///
    /// # Panics
    ///
    /// When one is not JSON.
    pub fn new(nest_11: &str, nest_12: &[&str]) -> Self {
        Self { nest_11: parsed(nest_11), nest_12: nest_12.iter().map(|text| parsed(text)).collect() }
    }

    /// Every message that NestJS put on the wire in one direction (`client->server`).
    ///
    /// # Panics
    ///
    /// When the file has no vectors.
    pub fn captured(&self, direction: &str) -> Vec<Value> {
        let all = self.nest_11["vectors"].as_array().unwrap().iter().chain(&self.nest_12);
        all.filter(|vector| vector["direction"] == direction).cloned().collect()
    }

    /// Hand-made messages against real NestJS peers: the list of this name.
    ///
    /// # Panics
    ///
    /// When the file has no such list.
    pub fn tried(&self, list: &str, direction: &str) -> Vec<Value> {
        let all = self.nest_11[list].as_array().unwrap().iter();
        all.filter(|vector| vector["direction"] == direction).cloned().collect()
    }
}

/// Reads JSON as packets are read: NestJS may send halves of surrogate pairs.
///
/// # Panics
///
/// When it is not JSON.
pub fn parsed(text: &str) -> Value {
    Payload::new(Format::Json, Bytes::copy_from_slice(text.as_bytes())).to_value().unwrap()
}

/// The bytes of a vector as they were on the wire.
///
/// # Panics
///
/// When it has none.
pub fn raw(vector: &Value) -> Bytes {
    Bytes::from(vector["raw"].as_str().unwrap().to_owned())
}
