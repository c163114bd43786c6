// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a handler may know of the NATS message it serves.

use async_nats::Subject;
use martlet_core::Headers;

/// The context of a message that came by NATS, extracted with `Ctx<NatsContext>`.
#[derive(Debug, Clone)]
pub struct NatsContext {
    pub(crate) subject: Subject,
    pub(crate) reply: Option<Subject>,
    pub(crate) headers: Headers,
}

impl NatsContext {
    /// The subject it was published to: the concrete one, where the handler's pattern has wildcards.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Its headers, ordered by name (the driver does not keep the order of the wire); lines of one name are
    /// in order.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// The subject that replies go to; `None` when nobody waits for one.
    pub fn reply(&self) -> Option<&str> {
        self.reply.as_deref()
    }
}
