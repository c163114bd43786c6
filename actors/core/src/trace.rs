// SPDX-License-Identifier: MIT OR Apache-2.0
//! W3C trace context, and what a call made inside a handler inherits from the request.
//!
//! The format is that of the W3C recommendation "Trace Context", level 1.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::Instant;

/// A position in a distributed trace: the value of `traceparent`, and `tracestate` passed through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    flags: u8,
    state: Option<String>,
}

impl TraceContext {
    /// A new trace, sampled.
    pub fn root() -> Self {
        let nonzero = |make: fn() -> u64| loop {
            let value = make();
            if value != 0 {
                return value;
            }
        };
        let high = u128::from(nonzero(rand::random::<u64>));
        let low = u128::from(rand::random::<u64>());
        Self { trace_id: high << 64 | low, span_id: nonzero(rand::random::<u64>), flags: 1, state: None }
    }

    /// Reads `traceparent` (and passes `tracestate` through, up to 512 bytes). `None` for anything that
    /// the recommendation calls invalid: a trace is then begun anew, as it asks.
    pub fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex = |text: &str, len: usize| {
            let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            text.len() == len && text.bytes().all(lower)
        };
        if !hex(version, 2) || version == "ff" || !hex(trace, 32) || !hex(span, 16) || !hex(flags, 2) {
            return None;
        }
        if version == "00" && parts.next().is_some() {
            return None;
        }
        let trace_id = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
        let span_id = u64::from_str_radix(span, 16).ok().filter(|id| *id != 0)?;
        let flags = u8::from_str_radix(flags, 16).ok()?;
        let state = tracestate.filter(|state| state.len() <= 512).map(str::to_owned);
        Some(Self { trace_id, span_id, flags, state })
    }

    /// The same trace, one span further in.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { span_id: rand::random::<u64>().max(1), ..self.clone() }
    }

    /// The trace's id.
    pub fn trace_id(&self) -> u128 {
        self.trace_id
    }

    /// The span's id.
    pub fn span_id(&self) -> u64 {
        self.span_id
    }

    /// Whether the caller samples this trace.
    pub fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }

    /// The value of `tracestate`, as received.
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

impl fmt::Display for TraceContext {
    /// Writes the value of `traceparent`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, self.flags)
    }
}

/// What a call made inside a handler inherits: the request's trace and its deadline.
#[derive(Debug, Clone, Default)]
pub struct Ambient {
    /// The request's trace.
    pub trace: Option<TraceContext>,
    /// The request's deadline.
    pub deadline: Option<Instant>,
}

thread_local! {
    static CURRENT: RefCell<Option<Ambient>> = const { RefCell::new(None) };
}

impl Ambient {
    /// That of the handler that is running on this thread now, if any.
    pub fn current() -> Option<Self> {
        Self::map_current(Clone::clone)
    }

    /// As [`current`](Self::current), without a copy.
    pub(crate) fn map_current<T>(map: impl FnOnce(&Self) -> T) -> Option<T> {
        CURRENT.with_borrow(|current| current.as_ref().map(map))
    }

    /// Runs `work` inside it.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Restore(Option<Ambient>);
        impl Drop for Restore {
            fn drop(&mut self) {
                let before = self.0.take();
                CURRENT.set(before);
            }
        }
        let _restore = Restore(CURRENT.replace(Some(self.clone())));
        work()
    }

    /// Runs a future inside it, poll by poll.
    pub fn scope<F: Future>(self, future: F) -> impl Future<Output = F::Output> {
        Scoped { ambient: self, future: Box::pin(future) }
    }
}

struct Scoped<F> {
    ambient: Ambient,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        let ambient = &this.ambient;
        let future = &mut this.future;
        ambient.enter(|| future.as_mut().poll(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparent_reads_back_as_written() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let trace = TraceContext::parse(text, Some("a=1")).expect("valid");
        assert_eq!(trace.to_string(), text);
        assert_eq!(trace.state(), Some("a=1"));
        let child = trace.child();
        assert_eq!(child.trace_id(), trace.trace_id());
        assert_ne!(child.span_id(), trace.span_id());
    }

    #[test]
    fn invalid_traceparents_are_refused() {
        for text in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra",
        ] {
            assert_eq!(TraceContext::parse(text, None), None, "{text}");
        }
    }

    #[test]
    fn ambient_is_restored_after_a_panic() {
        let ambient = Ambient { trace: Some(TraceContext::root()), deadline: None };
        let result = std::panic::catch_unwind(|| ambient.enter(|| panic!("inside")));
        assert!(result.is_err());
        assert!(Ambient::current().is_none());
    }
}
