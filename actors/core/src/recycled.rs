// SPDX-License-Identifier: MIT OR Apache-2.0
//! Futures of one type in a box that is used again: most handlers are ready at once, and then the box is free for
//! the next request.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::handler::Outcome;
use crate::reply::HandlerResult;

/// A place for a future, which is `None` when it has ended.
type Place<F> = Pin<Box<Option<F>>>;

/// Runs futures of one type, one after the other in the same box as long as they are ready at once.
pub(crate) struct Recycled<F> {
    spare: RefCell<Option<Place<F>>>,
}

impl<F> Default for Recycled<F> {
    fn default() -> Self {
        Self { spare: RefCell::default() }
    }
}

impl<F: Future<Output = HandlerResult> + 'static> Recycled<F> {
    /// Polls a future once; the outcome holds it if it is not ready.
    pub(crate) fn start(&self, future: F) -> Outcome {
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
            Poll::Ready(result) => {
                place.set(None);
                self.spare.replace(Some(place));
                Outcome::Ready(result)
            }
            Poll::Pending => Outcome::Started(Box::pin(std::future::poll_fn(move |cx| poll(&mut place, cx)))),
        }
    }
}

fn poll<F: Future>(place: &mut Place<F>, cx: &mut Context<'_>) -> Poll<F::Output> {
    match place.as_mut().as_pin_mut() {
        Some(future) => future.poll(cx),
        // Polled after its end.
        None => Poll::Pending,
    }
}
