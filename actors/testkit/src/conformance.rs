// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance suite: what every transporter must do, one behaviour per function.
//!
//! A transporter crate writes a [`Harness`], names the groups of behaviours that its
//! [`Features`] promise, and gets one `#[test]` for each behaviour:
//!
//! ```
//! use martlet_core::{ClientOptions, ClientProxy, Server, ServerOptions};
//! use martlet_testkit::conformance::Harness;
//! use martlet_testkit::features::Features;
//! use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
//!
//! struct Memory(MemoryNetwork);
//!
//! impl Harness for Memory {
//!     fn features(&self) -> Features {
//!         Features::default()
//!     }
//!     fn server(&mut self, options: ServerOptions) -> Server {
//!         self.0 = MemoryNetwork::new();
//!         MemoryServer::with(&self.0, options)
//!     }
//!     fn client(&mut self, _url: &str, options: ClientOptions) -> ClientProxy {
//!         MemoryClient::with(&self.0, options)
//!     }
//! }
//!
//! martlet_testkit::conformance_tests!(Memory(MemoryNetwork::new()); core, metadata);
//! # fn main() {}
//! ```
//!
//! A behaviour fails by a panic that says what was expected. Nothing is skipped: a group that is not named
//! is not there, and the test `the_groups_are_those_promised` fails when a promised one is missing.

#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::LocalBoxFuture;
use martlet_core::{
    CallError, ClientOptions, ClientProxy, EventBus, Microservice, Pattern, RpcError, RunningService, Server,
    ServerOptions, ServiceEvent, ServiceReport,
};

use crate::features::Features;

pub mod accepts;
pub mod calls;
pub mod cancel;
pub mod cuts;
pub mod errors;
pub mod events;
pub mod handlers;
pub mod interceptors;
pub mod lifecycle;
pub mod limits;
pub mod metadata;
pub mod raw;
pub mod replies;
pub mod subscribes;

/// How a transporter is brought before the suite. One is made for each behaviour.
pub trait Harness: 'static {
    /// What it promises.
    fn features(&self) -> Features;

    /// A server at a free place of its own (port 0, a fresh network; a broker's servers may share it, the
    /// suite uses patterns of its own for each behaviour). A behaviour may ask for several.
    fn server(&mut self, options: ServerOptions) -> Server;

    /// A client to the server that reports this URL.
    fn client(&mut self, url: &str, options: ClientOptions) -> ClientProxy;

    /// Client options before a behaviour changes them: what this transporter sets itself.
    fn client_options(&self) -> ClientOptions {
        ClientOptions::default()
    }

    /// Cuts every connection now, both servers' and clients' (group `cuts`).
    fn cut(&mut self) {
        unimplemented!("the harness promises `cuts` and cannot cut");
    }

    /// Refuses new connections, or takes them again (group `cuts`).
    fn set_reachable(&mut self, _reachable: bool) {
        unimplemented!("the harness promises `cuts` and cannot refuse connections");
    }

    /// A peer that speaks in raw packets to the server with this URL (group `raw`).
    fn raw(&mut self, _url: &str) -> LocalBoxFuture<'static, Box<dyn RawPeer>> {
        unimplemented!("the harness promises `raw` and has no raw peer");
    }
}

/// A peer that puts packets of its own on the wire. Framing is its business; packets are the suite's.
pub trait RawPeer {
    /// Sends one packet.
    fn send(&mut self, packet: Bytes) -> LocalBoxFuture<'_, ()>;
    /// The next packet; `None` when the server has closed.
    fn recv(&mut self) -> LocalBoxFuture<'_, Option<Bytes>>;
}

/// Runs one behaviour in an actix system of its own, for at most two minutes.
///
/// # Panics
///
/// When the behaviour does not hold.
pub fn run<H: Harness, F: Future<Output = ()>>(make: impl FnOnce() -> H, behaviour: impl FnOnce(H) -> F) {
    quiet_deliberate_panics();
    actix_rt::System::new().block_on(async {
        let behaviour = behaviour(make());
        tokio::time::timeout(Duration::from_secs(120), behaviour)
            .await
            .expect("the behaviour ends within two minutes");
    });
}

/// Sees that the groups named are those that the features promise.
///
/// # Panics
///
/// When they differ.
pub fn check_groups(features: &Features, named: &[&str]) {
    let mut named = named.to_vec();
    let mut promised = features.groups();
    named.sort_unstable();
    promised.sort_unstable();
    assert_eq!(named, promised, "groups named in conformance_tests! and promised by Features");
}

/// Defines one `#[test]` per behaviour of the groups named: `conformance_tests!(harness; group, …)`. The
/// harness is an expression, evaluated for each test inside its actix system.
#[macro_export]
macro_rules! conformance_tests {
    ($harness:expr; $($group:ident),+ $(,)?) => {
        #[test]
        fn the_groups_are_those_promised() {
            $crate::conformance::run(|| $harness, |harness| async move {
                let features = $crate::conformance::Harness::features(&harness);
                $crate::conformance::check_groups(&features, &[$(stringify!($group)),+]);
            });
        }
        $($crate::__conformance_group!($group, $harness);)+
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_behaviours {
    ($harness:expr, $($file:ident: $($behaviour:ident)+;)+) => {
        $($(
            #[test]
            fn $behaviour() {
                $crate::conformance::run(|| $harness, $crate::conformance::$file::$behaviour);
            }
        )+)+
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_group {
    (core, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            replies:
                a_handler_gives_one_reply
                a_handler_gives_nothing_or_null
                any_json_value_comes_back_as_it_went
                unicode_and_large_payloads_come_through
                a_stream_gives_every_item_then_ends
                a_stream_may_end_late_or_empty
                a_stream_may_fail_in_its_middle
                a_single_reply_of_a_stream_is_its_first
                replies_come_in_the_order_they_finish
                many_calls_are_in_flight_at_once
                a_call_nobody_handles_says_so;
            events:
                an_event_reaches_its_handler
                every_handler_of_an_event_runs
                a_failing_event_handler_does_not_stop_the_others
                an_unknown_event_is_reported_and_disturbs_nothing
                a_message_reaches_an_event_handler_and_is_answered
                a_message_to_several_event_handlers_gives_the_nested_reply
                an_event_reaches_a_message_handler
                many_large_events_all_arrive;
            handlers:
                patterns_are_strings_numbers_and_objects_in_any_key_order
                singleton_state_is_one
                each_arbiter_has_a_replica_of_its_own
                concurrency_one_serialises
                handlers_come_and_go_while_traffic_flows
                a_second_message_handler_is_refused_with_both_places
                a_handler_limited_to_another_transport_is_not_reached
                shared_state_and_request_scoped_values_reach_the_handler
                a_handler_calls_a_named_client
                an_actor_handles_messages;
            errors:
                the_error_value_is_nestjs_own
                a_panic_is_answered_and_the_service_lives
                a_panic_rebuilds_the_state
                twenty_thousand_panics_are_each_answered
                a_poisonous_message_is_refused
                a_payload_of_another_shape_is_answered;
            interceptors:
                interceptors_run_from_global_to_handler
                a_guard_refuses
                a_pipe_changes_the_payload
                a_filter_maps_errors
                a_timeout_and_a_concurrency_limit_answer_errors;
            calls:
                nothing_is_sent_until_a_call_is_polled
                a_call_times_out
                a_stream_times_out_between_replies
                a_dropped_call_frees_its_slot
                a_token_cancels_a_call
                pending_calls_are_bounded
                unread_replies_are_bounded
                errors_and_responses_can_be_mapped
                a_client_is_an_address;
            limits:
                a_full_waiting_room_answers_overload
                a_full_mailbox_answers_overload
                in_flight_requests_are_bounded_and_all_answered;
            lifecycle:
                status_says_connecting_connected_closed
                a_closed_client_ends_its_calls
                a_closed_client_connects_anew
                a_stop_answers_what_was_taken
                a_stop_abandons_what_does_not_end
                a_stop_ends_a_full_service
                a_client_outlives_a_stopped_arbiter
                a_storm_leaves_nothing_behind;
        }
    };
    (metadata, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            metadata:
                a_handler_sees_metadata
                a_deadline_travels_and_is_honoured
                a_trace_is_passed_on_by_calls_inside_a_handler;
        }
    };
    (cancel, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            cancel:
                dropping_a_call_drops_the_handlers_future
                dropping_a_stream_stops_the_handlers_stream
                the_cancellation_token_outlives_the_handler;
        }
    };
    (cuts, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            cuts:
                a_cut_ends_calls_under_way_as_lost
                a_refused_connection_ends_calls_as_not_sent
                an_idempotent_call_is_sent_again
                a_client_reconnects_and_its_status_says_so
                retries_reach_a_server_that_comes_late
                an_event_has_a_timeout_of_its_own
                a_storm_of_cuts_gives_every_call_one_outcome
                events_over_cuts_have_one_outcome_each
                a_cut_cancels_the_handlers_work;
        }
    };
    (raw, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            raw:
                error_bytes_are_nestjs_own
                reply_bytes_are_nestjs_own
                ids_of_any_kind_are_echoed
                unreadable_packets_disturb_nobody;
        }
    };
    (accepts, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            accepts:
                connections_above_their_number_are_closed
                reading_stops_at_the_in_flight_bound;
        }
    };
    (subscribes, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            subscribes:
                a_route_registered_later_is_subscribed
                an_unregistered_route_reaches_nobody
                registrations_are_back_after_a_cut;
        }
    };
    (shares, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            subscribes:
                two_services_share_the_calls_of_a_route;
        }
    };
    (wildcards, $harness:expr) => {
        $crate::__conformance_behaviours! { $harness,
            subscribes:
                a_wildcard_route_receives_what_matches;
        }
    };
}

// === what the behaviours share ===

/// A service and a client to it.
pub(crate) struct Stage<H> {
    pub(crate) harness: H,
    pub(crate) service: RunningService,
    pub(crate) client: ClientProxy,
}

impl<H: Harness> Stage<H> {
    /// Starts a service on one server, and makes a client to it.
    pub(crate) async fn new(harness: H, service: Microservice) -> Self {
        Self::with(harness, service, |_| {}, |_| {}).await
    }

    pub(crate) async fn with(
        mut harness: H,
        service: Microservice,
        server: impl FnOnce(&mut ServerOptions),
        client: impl FnOnce(&mut ClientOptions),
    ) -> Self {
        let mut server_options = ServerOptions::default();
        server(&mut server_options);
        let service =
            service.server(harness.server(server_options)).start().await.expect("the service starts");
        let mut client_options = harness.client_options();
        client(&mut client_options);
        let client = harness.client(&service.url(), client_options);
        Self { harness, service, client }
    }

    /// Ends both in order; nothing may be left.
    pub(crate) async fn end(self) -> ServiceReport {
        // An event that nobody waits for may still wait for its broker's confirmation.
        eventually("no call is pending", || self.client.pending() == 0).await;
        assert_eq!(self.client.occupied(), 0, "slots occupied at the end");
        self.client.close().await;
        let report = self.service.stop(Duration::from_secs(5)).await;
        assert!(report.clean, "the service stopped cleanly: {report:?}");
        report
    }
}

/// A service on the current arbiter.
pub(crate) fn small() -> Microservice {
    Microservice::new().on_current_arbiter()
}

pub(crate) fn ok<T>(value: T) -> Result<T, RpcError> {
    Ok(value)
}

/// Patterns of one behaviour's own: brokers may be shared.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names(u64);

impl Names {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let process = u64::from(std::process::id());
        Self(process << 20 | NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// A string pattern.
    pub(crate) fn of(self, name: &str) -> Pattern {
        Pattern::from(format!("t{}.{name}", self.0))
    }

    /// The number that makes them its own.
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// How long a call that may reach nobody is waited for.
pub(crate) fn patience(features: &Features) -> Duration {
    Duration::from_millis(if features.says_nobody { 30_000 } else { 300 })
}

/// Whether a call ended because nobody handles it, or (where nobody says so) as if.
pub(crate) fn is_nobody<T>(features: &Features, result: &Result<T, CallError>) -> bool {
    match result {
        Err(CallError::NoHandler { .. }) => true,
        Err(CallError::Timeout { .. }) => !features.says_nobody,
        _ => false,
    }
}

/// Waits until something holds, for at most 30 s.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < Duration::from_secs(30) {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("within 30 s: {what}");
}

/// Gives others on this arbiter, and the wire, a moment.
pub(crate) async fn moment() {
    tokio::time::sleep(Duration::from_millis(30)).await;
}

/// Collects the events of a bus from now on.
pub(crate) fn watch(bus: &EventBus) -> impl Fn(&str) -> usize + Clone + Send + Sync + 'static {
    let seen = std::sync::Arc::new(parking_lot::Mutex::new(Vec::<&'static str>::new()));
    let write = std::sync::Arc::clone(&seen);
    bus.on(move |event: &ServiceEvent| write.lock().push(event.name()));
    move |name| seen.lock().iter().filter(|seen| **seen == name).count()
}

/// The text in every panic that a behaviour raises on purpose.
pub(crate) const DELIBERATE: &str = "deliberate panic";

/// Keeps deliberate panics out of the tests' output; others are printed as ever.
pub fn quiet_deliberate_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload_as_str().is_some_and(|text| text.starts_with(DELIBERATE)) {
                before(info);
            }
        }));
    });
}
