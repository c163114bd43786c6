//! martlet
