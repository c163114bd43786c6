// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests for actors: the message, its answer, and whether the actor panicked over it.
//!
//! An actor's panic is caught where the actor runs (`member.rs`); whoever asked it only learns that no answer will come,
//! as it also does when the actor has stopped. But the message that is being handled is the one whose answer is given up
//! *while* the panic unwinds, and that wakes the asker from the panicking thread. So the panic is counted against its
//! message, and not against those that wait behind it.

use std::future::{Future, poll_fn};
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

use actix::{MailboxError, Message, Recipient};
use futures::task::AtomicWaker;

use crate::error::RpcError;
use crate::handler::{IntoOutcome, Outcome};
use crate::request::Request;

/// What a request's future panics with when the actor that it waits for has panicked over it: a panic of the handler in
/// every respect, but that there is nothing to rebuild, which is the business of the actor's own supervisor.
pub(crate) struct ActorPanicked;

/// The endpoint that makes a message of a request and waits for the actor's answer.
pub(crate) fn forward<M>(
    recipient: Recipient<M>,
    make: impl Fn(&Request) -> Result<M, RpcError> + 'static,
) -> impl Fn(Request) -> Outcome + 'static
where
    M: Message + Send + 'static,
    M::Result: IntoOutcome + Send,
{
    move |request| {
        let message = match make(&request) {
            Ok(message) => message,
            Err(error) => return Outcome::Ready(Err(error)),
        };
        let format = request.format();
        drop(request);
        let asked = recipient.send(message);
        let watch = Arc::new(Watch::default());
        let waker = Waker::from(Arc::clone(&watch));
        Outcome::future(async move {
            let mut asked = pin!(asked);
            let answer = poll_fn(|cx| {
                watch.waker.register(cx.waker());
                asked.as_mut().poll(&mut Context::from_waker(&waker))
            });
            match answer.await {
                Ok(result) => result.into_outcome(format),
                Err(MailboxError::Closed) if watch.panicked.load(Ordering::Acquire) => {
                    resume_unwind(Box::new(ActorPanicked))
                }
                Err(error) => Err(RpcError::unexpected(format!("the handler actor did not answer: {error}"))),
            }
        })
    }
}

/// Notices being woken by a thread that panics.
#[derive(Default)]
struct Watch {
    waker: AtomicWaker,
    panicked: AtomicBool,
}

impl Wake for Watch {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if std::thread::panicking() {
            self.panicked.store(true, Ordering::Release);
        }
        self.waker.wake();
    }
}
