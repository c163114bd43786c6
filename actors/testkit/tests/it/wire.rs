// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the in-memory transporter itself promises: bounds of frames, context, headers, one listener.

use std::time::Duration;

use martlet_core::{
    CallError, Ctx, Data, HandlerGroup, Microservice, Payload, Record, RpcError, RunningService, StartError,
    message,
};
use martlet_testkit::memory::{MemoryClient, MemoryContext, MemoryNetwork, MemoryOptions, MemoryServer};
use martlet_testkit::probe::Probe;
use serde_json::json;

async fn serve(network: &MemoryNetwork, group: HandlerGroup) -> RunningService {
    let service = Microservice::new().on_current_arbiter().handlers(group).server(MemoryServer::new(network));
    service.start().await.unwrap()
}

fn check(options: MemoryOptions, test: impl AsyncFnOnce(MemoryNetwork)) {
    actix_rt::System::new().block_on(async {
        let test = test(MemoryNetwork::with(options));
        tokio::time::timeout(Duration::from_secs(20), test).await.expect("within 20s");
    });
}

#[test]
fn a_frame_above_the_limit_is_refused_alone() {
    let options = MemoryOptions { max_frame_bytes: 1000, ..MemoryOptions::default() };
    check(options, async |network| {
        let group =
            message("long", |Data(size): Data<usize>| async move { Ok::<_, RpcError>("x".repeat(size)) });
        let service = serve(&network, group).await;
        let client = MemoryClient::new(&network);
        assert_eq!(client.send::<String>("long", 900).await.unwrap().len(), 900);
        let request = client.send::<String>("long", "x".repeat(1000)).await;
        assert!(matches!(request, Err(CallError::Encode(_))), "{request:?}");
        match client.send::<String>("long", 1000).await {
            Err(CallError::Remote(error)) => {
                assert_eq!(error.message().as_deref(), Some("Internal server error"));
            }
            other => panic!("a remote error expected, got {other:?}"),
        }
        assert_eq!(client.send::<String>("long", 1).await.unwrap(), "x");
        assert_eq!(client.occupied(), 0);
        client.close().await;
        assert!(service.stop(Duration::from_secs(1)).await.clean);
    });
}

#[test]
fn the_context_has_the_peer_and_the_headers() {
    for broker in [false, true] {
        let options = if broker { MemoryOptions::broker() } else { MemoryOptions::default() };
        check(options, async |network| {
            let group = message("who", |context: Ctx<MemoryContext>, payload: Payload| async move {
                let subject = context.subject.as_ref().map(ToString::to_string);
                let header = context.headers.get("tenant").map(str::to_owned);
                Ok::<_, RpcError>((header, subject, payload.to_value().unwrap(), context.peer.is_empty()))
            });
            let service = serve(&network, group).await;
            let client = MemoryClient::new(&network);
            let record = Record::new(json!(5)).header("tenant", "seven");
            let seen = client.send::<serde_json::Value>("who", record).await.unwrap();
            let subject = broker.then_some("who");
            assert_eq!(seen, json!(["seven", subject, 5, false]));
            assert!(client.unwrap::<MemoryNetwork>().is_some(), "the native handle is the network");
            client.close().await;
            service.stop(Duration::from_secs(1)).await;
        });
    }
}

#[test]
fn one_service_listens_on_a_network() {
    check(MemoryOptions::default(), async |network| {
        let service = serve(&network, message("a", || async { Ok::<_, RpcError>(1) })).await;
        let second =
            Microservice::new().on_current_arbiter().server(MemoryServer::new(&network)).start().await;
        assert!(matches!(second, Err(StartError::Transport { .. })), "{second:?}");
        service.stop(Duration::ZERO).await;
        // Its place is free again.
        let service = serve(&network, message("a", || async { Ok::<_, RpcError>(1) })).await;
        service.stop(Duration::ZERO).await;
    });
}

#[test]
fn a_probe_records_in_order_and_answers_messages() {
    check(MemoryOptions::default(), async |network| {
        let probe = Probe::start();
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(probe.event("evt"))
            .handlers(probe.message("msg"))
            .server(MemoryServer::new(&network))
            .start()
            .await
            .unwrap();
        let client = MemoryClient::new(&network);
        for number in 0..5 {
            client.emit("evt", number).await.unwrap();
        }
        assert_eq!(client.send::<u64>("msg", 5).metadata("k", "v").await.unwrap(), 5);
        for number in 0..6 {
            let received = probe.next().await;
            assert_eq!(received.data, json!(number));
            assert_eq!(received.request, number == 5);
            assert_eq!(received.route, if number == 5 { "msg" } else { "evt" });
            assert_eq!(received.metadata.get("k"), (number == 5).then_some("v"));
        }
        assert!(probe.try_next().is_none());
        assert_eq!(probe.count(), 6);
        client.close().await;
        service.stop(Duration::from_secs(1)).await;
    });
}
