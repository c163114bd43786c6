//! martlet-core

pub mod codec;
pub mod json;
pub mod msgpack;
pub mod packet;
pub mod pattern;
pub mod payload;
