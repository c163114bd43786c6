// SPDX-License-Identifier: MIT OR Apache-2.0
//! One session with a broker, for both roles.
use martlet_core::error::SessionError;
use martlet_core::transport::{Inbound, Outbound, Session, SessionReader, SessionWriter, WriteError};
use std::sync::Arc;
use std::task::{Context, Poll};
/// A session over one MQTT connection.
#[derive(Debug)]
pub struct MqttSession(std::convert::Infallible);
impl Session for MqttSession {
    type ReplyTo = ();
    type Reader = Self;
    type Writer = Self;
    fn peer(&self) -> Arc<str> {
        match self.0 {}
    }
    fn split(self) -> (Self, Self) {
        match self.0 {}
    }
}
impl SessionReader<()> for MqttSession {
    fn poll_next(&mut self, _cx: &mut Context<'_>) -> Poll<Option<Result<Inbound<()>, SessionError>>> {
        match self.0 {}
    }
    fn drain(&mut self) {
        match self.0 {}
    }
}
impl SessionWriter<()> for MqttSession {
    fn write(&mut self, _item: Outbound<()>) -> Result<(), WriteError> {
        match self.0 {}
    }
    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        match self.0 {}
    }
    fn pending_bytes(&self) -> usize {
        match self.0 {}
    }
    fn poll_close(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        match self.0 {}
    }
}
