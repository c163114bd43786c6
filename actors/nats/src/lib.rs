//! martlet-nats
