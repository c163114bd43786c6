//! martlet-testkit
