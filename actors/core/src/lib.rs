//! martlet-core
