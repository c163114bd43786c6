//! martlet-tcp
