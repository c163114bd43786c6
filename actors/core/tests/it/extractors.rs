// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a handler can take: every extractor, what is in it, and what is answered when it is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::LocalBoxFuture;
use martlet_core::interceptor::{Interceptor, Next};
use martlet_core::{
    CallError, Cancellation, Client, ClientName, ClientOptions, ClientProxy, Ctx, Data, Deadline, Extension,
    HandlerResult, Metadata, Microservice, Pattern, Payload, Request, RpcError, RunningService, State,
    message,
};
use martlet_testkit::fault::{Faults, FaultyDial};
use martlet_testkit::memory::{MemoryClient, MemoryContext, MemoryDial, MemoryNetwork, MemoryServer};
use serde_json::json;

use crate::support::{log, ms, ok, paused, quick};

struct Shop;

impl ClientName for Shop {
    const NAME: &'static str = "shop";
}

/// Leaves a text for the handler.
#[derive(Debug)]
struct Leaves(&'static str);

impl Interceptor for Leaves {
    fn intercept<'a>(&'a self, mut request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            request.set_extension(self.0);
            next.run(request).await
        })
    }
}

async fn serve(network: &MemoryNetwork, service: Microservice) -> (RunningService, ClientProxy) {
    let service = service.on_current_arbiter().server(MemoryServer::new(network)).start().await.unwrap();
    (service, MemoryClient::new(network))
}

#[test]
fn each_extractor_gives_its_part_of_the_request() {
    paused(async {
        let network = MemoryNetwork::new();
        let own = MemoryClient::new(&network);
        let one = message(
            "one",
            async |Data(number): Data<u64>,
                   payload: Payload,
                   metadata: Metadata,
                   pattern: Pattern,
                   State(state): State<u64>,
                   Ctx(context): Ctx<MemoryContext>,
                   Extension(extension): Extension<&'static str>,
                   request: Request| {
                assert_eq!(payload.decode::<u64>().unwrap(), number);
                assert_eq!(pattern.route(), request.route());
                let named = context.peer.is_empty();
                ok(json!([number, metadata.get("a"), pattern.route().as_str(), *state, *extension, named]))
            },
        );
        let two = message(
            "two",
            async |deadline: Deadline,
                   cancellation: Cancellation,
                   shop: Client<Shop>,
                   none: Option<State<String>>,
                   some: Option<State<u64>>| {
                let left = deadline.remaining().map(|left| left.as_secs());
                let called: u64 = shop.send("three", ()).await.map_err(RpcError::unexpected)?;
                ok(json!([left, cancellation.is_cancelled(), called, none.is_some(), some.is_some()]))
            },
        );
        let service = Microservice::new()
            .state(7_u64)
            .client("shop", own)
            .interceptor(Arc::new(Leaves("left")))
            .handlers(one)
            .handlers(two)
            .handlers(message("three", || async { ok(3) }));
        let (service, client) = serve(&network, service).await;
        let call = client.send::<serde_json::Value>("one", 5).metadata("a", "b");
        assert_eq!(call.await.unwrap(), json!([5, "b", "one", 7, "left", false]));
        let call = client.send::<serde_json::Value>("two", ()).timeout(ms(90_500));
        assert_eq!(call.await.unwrap(), json!([90, false, 3, false, true]));
        let call = client.send::<serde_json::Value>("two", ()).no_timeout();
        assert_eq!(call.await.unwrap(), json!([null, false, 3, false, true]));
        client.close().await;
        service.stop(ms(1000)).await;
    });
}

#[test]
fn what_the_service_does_not_have_is_an_event_that_names_it() {
    paused(async {
        let network = MemoryNetwork::new();
        let service = Microservice::new()
            .handlers(message("state", |_: State<String>| async { ok(1) }))
            .handlers(message("context", |_: Ctx<String>| async { ok(1) }))
            .handlers(message("extension", |_: Extension<String>| async { ok(1) }))
            .handlers(message("client", |_: Client<Shop>| async { ok(1) }));
        let (service, client) = serve(&network, service).await;
        let log = log(service.events());
        for (pattern, part) in [
            ("state", "shared state alloc::string::String"),
            ("context", "transport context alloc::string::String"),
            ("extension", "extension alloc::string::String"),
            ("client", "client shop"),
        ] {
            match client.send::<u64>(pattern, ()).await {
                // No word of it to the caller.
                Err(CallError::Remote(error)) => {
                    assert_eq!(error.message().as_deref(), Some("Internal server error"));
                }
                other => panic!("{other:?}"),
            }
            let told = std::mem::take(&mut *log.lock()).join("\n");
            let expected = format!("the handler asks for {part}, which the service does not have");
            assert!(told.starts_with("unexpected_error: ") && told.ends_with(&expected), "{told}");
        }
        client.close().await;
        service.stop(ms(1000)).await;
    });
}

#[test]
fn what_nobody_handles_is_reported_with_its_pattern() {
    paused(async {
        let network = MemoryNetwork::new();
        let (service, client) = serve(&network, Microservice::new()).await;
        let log = log(service.events());
        let pattern = Pattern::from_json(&json!({ "cmd": "none" })).unwrap();
        let called = client.send::<u64>(pattern.clone(), ()).await;
        assert!(matches!(called, Err(CallError::NoHandler { .. })), "{called:?}");
        client.emit(pattern, ()).await.unwrap();
        tokio::time::sleep(ms(100)).await;
        let log = log.lock().clone();
        assert_eq!(log.len(), 2, "{log:?}");
        // In NestJS's words, which quote an event's pattern once more.
        let expected =
            [("no_message_handler", r#"{"cmd":"none"}"#), ("no_event_handler", r#""{\"cmd\":\"none\"}""#)];
        for (told, (name, pattern)) in log.iter().zip(expected) {
            assert!(told.starts_with(name) && told.ends_with(pattern), "{told}");
        }
        client.close().await;
        service.stop(ms(1000)).await;
    });
}

#[test]
fn an_idempotent_call_is_sent_again_as_often_as_its_option_says() {
    for (idempotent, resend_attempts, sent) in [(false, 3, 1), (true, 0, 1), (true, 1, 2), (true, 3, 4)] {
        paused(async move {
            let network = MemoryNetwork::new();
            let (faults, runs) = (Faults::new(), Arc::new(AtomicU64::new(0)));
            let (cutting, running) = (faults.clone(), Arc::clone(&runs));
            let cuts = message("cuts", move || {
                running.fetch_add(1, Ordering::SeqCst);
                cutting.cut();
                std::future::pending::<Result<u64, RpcError>>()
            });
            let (service, unused) = serve(&network, Microservice::new().handlers(cuts)).await;
            unused.close().await;
            let mut options = ClientOptions::default();
            (options.resend_attempts, options.retry_delay) = (resend_attempts, quick());
            let client = ClientProxy::new(FaultyDial::new(MemoryDial::new(&network), &faults), options);
            let call = client.send::<u64>("cuts", ());
            let called = if idempotent { call.idempotent().await } else { call.await };
            assert!(matches!(called, Err(CallError::Lost { .. })), "{called:?}");
            assert_eq!(runs.load(Ordering::SeqCst), sent, "with {resend_attempts}");
            assert_eq!(client.occupied(), 0);
            client.close().await;
            service.stop(ms(100)).await;
        });
    }
}
