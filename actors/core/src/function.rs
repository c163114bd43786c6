// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers from functions: async, sync, or returning a stream, told apart by what they return.
//!
//! A function is a handler by its arguments ([`HandlerFn`]) and by its result ([`HandlerOutput`]). The parameter
//! `Kind` of the latter is found by the compiler; nobody writes it.

use std::future::Future;
use std::panic::Location;
use std::sync::Arc;

use futures::Stream;
use serde::Serialize;

use crate::error::RpcError;
use crate::handler::{Endpoint, HandlerGroup, IntoOutcome, Outcome};
use crate::pattern::Pattern;
use crate::payload::{Format, Payload};
use crate::recycled::{Recycled, Started};
use crate::reply::{HandlerResult, IntoReply, Reply, Streaming, TryStreaming};
use crate::request::{FromRequest, Request};
use crate::route::{HandlerInfo, HandlerKind};

/// A message handler from a function: async, sync, or returning a stream.
///
/// | the function returns | it answers |
/// |---|---|
/// | `Result<R, E>`, where `R: IntoReply` and `E: Into<RpcError>` | one value, or the error |
/// | `()` | completion without a value |
/// | `impl Stream<Item = T>`, where `T: Serialize` | a reply per item |
/// | `impl Stream<Item = Result<T, E>>`, where `E: Into<RpcError>` | a reply per item, until an error ends them |
/// | `Result<impl Stream<…>, E>` | the error, or a reply per item |
/// | a future of any of these (`async fn`) | the same, later |
///
/// Where `E` is `Serialize` as well (a `String`), the items of a stream could be meant as values: say which by
/// [`Streaming`] or [`TryStreaming`] around the stream.
///
/// A sync function is for work that ends at once: while it runs, nothing else does on its arbiter.
///
/// # Examples
///
/// ```
/// use futures::stream::{self, Stream};
/// use martlet_core::{Data, RpcError, message};
///
/// // Async, as a closure.
/// let sum = message("sum", |Data(numbers): Data<Vec<i64>>| async move {
///     Ok::<_, RpcError>(numbers.iter().sum::<i64>())
/// });
///
/// // Sync.
/// fn half(Data(number): Data<i64>) -> Result<i64, RpcError> {
///     if number % 2 == 0 { Ok(number / 2) } else { Err(RpcError::message("odd")) }
/// }
/// let half = message("half", half);
///
/// // A reply per item.
/// fn count(Data(to): Data<u32>) -> impl Stream<Item = u32> {
///     stream::iter(1..=to)
/// }
/// let count = message("count", count);
/// ```
#[track_caller]
pub fn message<H, Args>(pattern: impl Into<Pattern>, handler: H) -> HandlerGroup
where
    H: HandlerFn<Args>,
    Args: 'static,
{
    from_fn(HandlerKind::Message, pattern.into(), handler)
}

/// An event handler from a function: async, sync, or returning a stream, as for [`message`]. What it returns is
/// discarded (a stream is read to its end); an error is counted, and reported if it is unexpected.
///
/// # Examples
///
/// ```
/// use martlet_core::{Data, event};
///
/// let seen = event("user.created", |Data(name): Data<String>| println!("welcome, {name}"));
/// ```
#[track_caller]
pub fn event<H, Args>(pattern: impl Into<Pattern>, handler: H) -> HandlerGroup
where
    H: HandlerFn<Args>,
    Args: 'static,
{
    from_fn(HandlerKind::Event, pattern.into(), handler)
}

#[track_caller]
fn from_fn<H, Args>(kind: HandlerKind, pattern: Pattern, handler: H) -> HandlerGroup
where
    H: HandlerFn<Args>,
    Args: 'static,
{
    let name: Arc<str> = Arc::from(pattern.route().to_string());
    let info =
        HandlerInfo { location: Location::caller(), ..HandlerInfo::new(Arc::clone(&name), kind, pattern) };
    HandlerGroup::from_parts(name, vec![info], move |_| {
        let handler = handler.clone();
        let call = move |request| handler.clone().call(request);
        vec![Box::new(FnEndpoint { call, futures: Recycled::default(), put: H::put })]
    })
}

/// An endpoint that calls an async function with the whole request, for handlers of a
/// [`Controller`](crate::handler::Controller) written by hand. It is called at once, and if it is ready then, which most
/// handlers are, costs no allocation.
///
/// # Examples
///
/// ```
/// use std::rc::Rc;
/// use martlet_core::function::endpoint;
/// use martlet_core::{Controller, HandlerDef, HandlerInfo, HandlerKind, RpcError};
///
/// struct Prices(u64);
///
/// impl Controller for Prices {
///     fn handlers() -> Vec<HandlerDef<Self>> {
///         let price = HandlerDef {
///             info: HandlerInfo::new("Prices::price", HandlerKind::Message, "price"),
///             interceptors: Vec::new(),
///             endpoint: |prices: &Rc<Prices>| {
///                 let prices = Rc::clone(prices);
///                 endpoint(move |request| {
///                     let prices = Rc::clone(&prices);
///                     async move { Ok::<_, RpcError>(prices.0 * request.data::<u64>()?) }
///                 })
///             },
///         };
///         vec![price]
///     }
/// }
/// ```
pub fn endpoint<F, R, E>(call: impl Fn(Request) -> F + 'static) -> Box<dyn Endpoint>
where
    F: Future<Output = Result<R, E>> + 'static,
    R: IntoReply + 'static,
    E: Into<RpcError> + 'static,
{
    Box::new(FnEndpoint { call, futures: Recycled::default(), put: IntoOutcome::put_outcome })
}

/// Calls a function, and makes a handler's result of what it gives or leaves a plain value in place.
struct FnEndpoint<C, F, P> {
    call: C,
    futures: Recycled<F>,
    put: P,
}

impl<C, F, P> Endpoint for FnEndpoint<C, F, P>
where
    C: Fn(Request) -> F + 'static,
    F: Future + 'static,
    P: Fn(F::Output, Format, &mut Option<Payload>) -> Option<HandlerResult> + Copy + 'static,
{
    fn call(&self, request: Request) -> Outcome {
        let mut place = None;
        let outcome = self.call_in_place(request, &mut place);
        outcome.unwrap_or_else(|| Outcome::Ready(Ok(Reply::in_place(place))))
    }

    fn call_in_place(&self, request: Request, place: &mut Option<Payload>) -> Option<Outcome> {
        let format = request.format();
        match self.futures.start((self.call)(request)) {
            Started::Ready(answer) => (self.put)(answer, format, place).map(Outcome::Ready),
            Started::Pending(future) => {
                let put = self.put;
                Some(Outcome::Started(Box::pin(async move {
                    let answer = future.await;
                    let mut place = None;
                    put(answer, format, &mut place).unwrap_or_else(|| Ok(Reply::in_place(place)))
                })))
            }
        }
    }
}

// === functions ===

/// A function that can be a handler: its arguments are extractors, its result is a [`HandlerOutput`].
#[diagnostic::on_unimplemented(
    message = "this function cannot be a handler",
    label = "not a handler",
    note = "a handler takes at most eight arguments, each of which implements `FromRequest`: the payload as `Data<T>` where `T: serde::Deserialize`, shared state as `State<T>`",
    note = "a handler returns `Result<R, E>` where `R: serde::Serialize`, or a stream of `T` or of `Result<T, E>` where `T: serde::Serialize`, or nothing; it may be async",
    note = "its error type is `RpcError`, or converts into it: derive `martlet::RpcError` for your own, or make others `martlet::Unexpected`"
)]
pub trait HandlerFn<Args>: Clone + Send + Sync + 'static {
    /// What it answers with.
    type Answer: 'static;

    /// Calls it; an extractor may fail before.
    fn call(self, request: Request) -> impl Future<Output = Result<Self::Answer, RpcError>> + 'static;

    /// Makes the handler's result of it, or leaves a plain value in `place` and returns `None`: see
    /// [`Endpoint::call_in_place`].
    #[doc(hidden)]
    fn put(
        answer: Result<Self::Answer, RpcError>,
        format: Format,
        place: &mut Option<Payload>,
    ) -> Option<HandlerResult>;
}

macro_rules! handler_fn {
    ($($arg:ident),*) => {
        impl<F, O, Kind: 'static, $($arg),*> HandlerFn<(Kind, $($arg,)*)> for F
        where
            F: Fn($($arg),*) -> O + Clone + Send + Sync + 'static,
            O: HandlerOutput<Kind> + 'static,
            $($arg: FromRequest + 'static,)*
        {
            type Answer = O::Answer;

            #[allow(non_snake_case, unused_variables)]
            async fn call(self, request: Request) -> Result<Self::Answer, RpcError> {
                $(let $arg = $arg::from_request(&request).await?;)*
                drop(request);
                Ok(self($($arg),*).resolve().await)
            }

            fn put(
                answer: Result<Self::Answer, RpcError>,
                format: Format,
                place: &mut Option<Payload>,
            ) -> Option<HandlerResult> {
                match answer {
                    Ok(answer) => O::put(answer, format, place),
                    Err(error) => Some(Err(error)),
                }
            }
        }
    };
}

handler_fn!();
handler_fn!(A1);
handler_fn!(A1, A2);
handler_fn!(A1, A2, A3);
handler_fn!(A1, A2, A3, A4);
handler_fn!(A1, A2, A3, A4, A5);
handler_fn!(A1, A2, A3, A4, A5, A6);
handler_fn!(A1, A2, A3, A4, A5, A6, A7);
handler_fn!(A1, A2, A3, A4, A5, A6, A7, A8);

// === what they return ===

/// What a function that is a handler returns: an [`Answer`], or a future of one.
pub trait HandlerOutput<Kind> {
    /// What it is a future of, or what it is itself.
    type Answer: 'static;

    /// Waits for the answer.
    fn resolve(self) -> impl Future<Output = Self::Answer>;

    /// Makes the handler's result of it, or leaves a plain value in `place` and returns `None`: see
    /// [`Endpoint::call_in_place`].
    #[doc(hidden)]
    fn put(answer: Self::Answer, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult>;
}

/// What a handler answers with, once it is there.
pub trait Answer<Kind> {
    /// The handler's result; or leaves a plain value in `place` and returns `None`: see [`Endpoint::call_in_place`].
    fn put_answer(self, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult>;
}

/// The kinds of what functions return. They are never written, only found.
pub mod kind {
    /// It is there when the function returns.
    #[derive(Debug)]
    pub struct Sync<Kind>(std::marker::PhantomData<Kind>);
    /// It is awaited.
    #[derive(Debug)]
    pub struct Async<Kind>(std::marker::PhantomData<Kind>);
    /// One value, an error, or nothing.
    #[derive(Debug)]
    pub struct Single;
    /// A stream whose items are values.
    #[derive(Debug)]
    pub struct StreamOfValues;
    /// A stream whose items are results.
    #[derive(Debug)]
    pub struct StreamOfResults;
    /// A stream, or an error instead of it.
    #[derive(Debug)]
    pub struct StreamOrError<Kind>(std::marker::PhantomData<Kind>);
}

impl<O: Answer<Kind> + 'static, Kind> HandlerOutput<kind::Sync<Kind>> for O {
    type Answer = O;

    fn resolve(self) -> impl Future<Output = O> {
        std::future::ready(self)
    }

    fn put(answer: O, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult> {
        answer.put_answer(format, place)
    }
}

impl<O, Kind> HandlerOutput<kind::Async<Kind>> for O
where
    O: Future,
    O::Output: Answer<Kind> + 'static,
{
    type Answer = O::Output;

    fn resolve(self) -> impl Future<Output = O::Output> {
        self
    }

    fn put(answer: O::Output, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult> {
        answer.put_answer(format, place)
    }
}

impl<O: IntoOutcome> Answer<kind::Single> for O {
    fn put_answer(self, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult> {
        self.put_outcome(format, place)
    }
}

impl<S> Answer<kind::StreamOfValues> for S
where
    S: Stream + 'static,
    S::Item: Serialize,
{
    fn put_answer(self, format: Format, _: &mut Option<Payload>) -> Option<HandlerResult> {
        Some(Streaming(self).into_reply(format))
    }
}

impl<S, T, E> Answer<kind::StreamOfResults> for S
where
    S: Stream<Item = Result<T, E>> + 'static,
    T: Serialize,
    E: Into<RpcError>,
{
    fn put_answer(self, format: Format, _: &mut Option<Payload>) -> Option<HandlerResult> {
        Some(TryStreaming(self).into_reply(format))
    }
}

impl<S, E, Kind> Answer<kind::StreamOrError<Kind>> for Result<S, E>
where
    S: Stream + Answer<Kind>,
    E: Into<RpcError>,
{
    fn put_answer(self, format: Format, place: &mut Option<Payload>) -> Option<HandlerResult> {
        match self {
            Ok(stream) => stream.put_answer(format, place),
            Err(error) => Some(Err(error.into())),
        }
    }
}
