//! martlet-tcp

pub mod wire;
