//! martlet-macros
