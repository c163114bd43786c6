// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a handler may know of the Redis message it serves.

use std::sync::Arc;

/// The context of a message that came by Redis, extracted with `Ctx<RedisContext>`.
#[derive(Debug, Clone)]
pub struct RedisContext {
    pub(crate) channel: Arc<str>,
    pub(crate) pattern: Option<Arc<str>>,
}

impl RedisContext {
    /// The channel it was published to: the concrete one, where the handler's pattern is a glob.
    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// The glob that matched, on servers with `wildcards`; `None` elsewhere.
    pub fn pattern(&self) -> Option<&str> {
        self.pattern.as_deref()
    }
}
