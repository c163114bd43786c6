// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests, replies, streams, errors.

use martlet_core::{CallError, ConnectionStatus};

use crate::broker::Broker;
use crate::world::{GRACE, client, failing, serve, server_options, streaming, sum, sum_object};

#[actix::test]
async fn a_request_gets_its_reply() {
    let broker = Broker::start();
    let (service, _) = serve(server_options(&broker), [sum(), sum_object()]).await;
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1, 2, 3]).await.unwrap(), 6);
    let object = martlet_core::Pattern::parse(r#"{"cmd":"sum"}"#);
    assert_eq!(client.send::<i64>(object, [4, 5]).await.unwrap(), 9);
    assert_eq!(client.status(), Some(ConnectionStatus::Connected));
    client.close().await;
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
    assert_eq!(report.done(), 2);
}

#[actix::test]
async fn a_stream_of_replies_arrives_in_order() {
    let broker = Broker::start();
    let (service, _) = serve(server_options(&broker), [streaming()]).await;
    let client = client(&broker);
    for items in [vec![], vec![7], (0..500).collect::<Vec<i64>>()] {
        let replies = client.send::<i64>("stream", &items).stream().collect_all().await.unwrap();
        assert_eq!(replies, items);
    }
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn errors_reach_the_caller_as_nestjs_words_them() {
    let broker = Broker::start();
    let (service, reports) = serve(server_options(&broker), [failing()]).await;
    let client = client(&broker);
    let fail = async |kind: &str| match client.send::<i64>("fail", kind).await {
        Err(CallError::Remote(error)) => serde_json::to_string(&error.payload().to_value().unwrap()).unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(fail("message").await, r#"{"message":"boom","status":"error"}"#);
    assert_eq!(fail("object").await, r#"{"code":42,"message":"m"}"#);
    let internal = r#"{"message":"Internal server error","status":"error"}"#;
    assert_eq!(fail("unexpected").await, internal);
    assert_eq!(fail("panic").await, internal);
    assert!(reports.contain("a secret"), "{:?}", reports.all());
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_request_that_nobody_handles_says_so_at_once() {
    let broker = Broker::start();
    let client = client(&broker);
    let begin = std::time::Instant::now();
    match client.send::<i64>("nobody", 1).await {
        Err(CallError::NoHandler { pattern }) => assert_eq!(pattern, "nobody"),
        other => panic!("{other:?}"),
    }
    assert!(begin.elapsed() < std::time::Duration::from_secs(2));
    assert_eq!(client.occupied(), 0);
    client.close().await;
}
