// SPDX-License-Identifier: MIT OR Apache-2.0
//! Holds the place of the session.
#![allow(missing_docs)]
use std::sync::Arc;
use std::task::{Context, Poll};

use martlet_core::error::SessionError;
use martlet_core::transport::{Inbound, Outbound, Session, SessionReader, SessionWriter, WriteError};

#[derive(Debug)]
pub enum Stub {}

impl Session for Stub {
    type ReplyTo = ();
    type Reader = Self;
    type Writer = Self;
    fn peer(&self) -> Arc<str> {
        match *self {}
    }
    fn split(self) -> (Self, Self) {
        match self {}
    }
}

impl SessionReader<()> for Stub {
    fn poll_next(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Inbound<()>, SessionError>>> {
        match *self {}
    }
    fn drain(&mut self) {}
}

impl SessionWriter<()> for Stub {
    fn write(&mut self, _: Outbound<()>) -> Result<(), WriteError> {
        match *self {}
    }
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        match *self {}
    }
    fn pending_bytes(&self) -> usize {
        0
    }
    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        match *self {}
    }
}
