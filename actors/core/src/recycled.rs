// SPDX-License-Identifier: MIT OR Apache-2.0
//! Futures of one type in a box that is used again: most handlers are ready at once, and then the box is free for
//! the next request.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// A place for a future, which is `None` when it has ended.
type Place<F> = Pin<Box<Option<F>>>;

/// Runs futures of one type, one after the other in the same box as long as they are ready at once.
pub(crate) struct Recycled<F> {
    spare: RefCell<Option<Place<F>>>,
}

/// How far a future is that was polled once.
pub(crate) enum Started<F: Future> {
    Ready(F::Output),
    /// It goes on as this future.
    Pending(Unready<F>),
}

/// A future that was not ready at once, in its box.
pub(crate) struct Unready<F>(Place<F>);

impl<F> Default for Recycled<F> {
    fn default() -> Self {
        Self { spare: RefCell::default() }
    }
}

impl<F: Future> Recycled<F> {
    /// Polls a future once.
    pub(crate) fn start(&self, future: F) -> Started<F> {
        // Taken out, so that a handler that panics or comes back here finds no place in use.
        let spare = self.spare.borrow_mut().take();
        let mut place = match spare {
            Some(mut place) => {
                place.set(Some(future));
                place
            }
            None => Box::pin(Some(future)),
        };
        match poll(&mut place, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => {
                place.set(None);
                self.spare.replace(Some(place));
                Started::Ready(output)
            }
            Poll::Pending => Started::Pending(Unready(place)),
        }
    }
}

impl<F: Future> Future for Unready<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        poll(&mut self.0, cx)
    }
}

fn poll<F: Future>(place: &mut Place<F>, cx: &mut Context<'_>) -> Poll<F::Output> {
    match place.as_mut().as_pin_mut() {
        Some(future) => future.poll(cx),
        // Polled after its end.
        None => Poll::Pending,
    }
}
