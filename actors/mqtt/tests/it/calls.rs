// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests, replies, streams, errors, with both versions of the protocol.

use std::time::{Duration, Instant};

use futures::future::join_all;
use martlet_core::{CallError, ConnectionStatus};
use martlet_mqtt::{MqttClient, MqttQos, MqttRecordBuilder};

use crate::world::{
    GRACE, broker, client, client_options, failing, serve, server_options, streaming, sum, sum_on,
};

#[actix::test]
async fn a_request_gets_its_reply() {
    let broker = broker();
    for version in [4, 5] {
        let options = server_options(&broker).protocol_version(version);
        let (service, _) = serve(options, [sum(), sum_on(r#"{"cmd":"sum"}"#)]).await;
        let client = MqttClient::new(client_options(&broker).protocol_version(version));
        assert_eq!(client.send::<i64>("sum", [1, 2, 3]).await.unwrap(), 6);
        let object = martlet_core::Pattern::parse(r#"{"cmd":"sum"}"#);
        assert_eq!(client.send::<i64>(object, [4, 5]).await.unwrap(), 9);
        assert_eq!(client.status(), Some(ConnectionStatus::Connected));
        client.close().await;
        let report = service.stop(GRACE).await;
        assert!(report.clean, "{report:?}");
        assert_eq!(report.done(), 2);
    }
}

#[actix::test]
async fn a_stream_of_replies_arrives_in_order() {
    let broker = broker();
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
    let broker = broker();
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

/// MQTT-9.
#[actix::test]
async fn calls_that_start_together_on_one_pattern_all_get_their_replies() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker), [sum()]).await;
    // Given up at once, so that subscribing and unsubscribing go on all the time.
    let client = MqttClient::new(client_options(&broker).reply_idle(Duration::ZERO));
    for round in 0..20i64 {
        let calls = (0..120).map(|number| client.send::<i64>("sum", [round, number]));
        for (number, reply) in join_all(calls).await.into_iter().enumerate() {
            assert_eq!(reply.unwrap(), round + number as i64);
        }
    }
    assert_eq!(client.occupied(), 0);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_request_that_nobody_handles_ends_by_its_timeout() {
    let broker = broker();
    let client = client(&broker);
    let begin = Instant::now();
    let call = client.send::<i64>("nobody", 1).timeout(Duration::from_millis(300)).await;
    assert!(matches!(call, Err(CallError::Timeout { .. })), "{call:?}");
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert_eq!(client.occupied(), 0);
    client.close().await;
}

/// MQTT-10: a request that the broker acknowledges can be told that nobody is there.
#[actix::test]
async fn a_request_of_quality_one_that_nobody_handles_says_so_at_once() {
    let broker = broker();
    let client = MqttClient::new(client_options(&broker).protocol_version(5));
    let record = MqttRecordBuilder::new(1).set_qos(MqttQos::AtLeastOnce).build();
    let call = client.send::<i64>("nobody", record).await;
    assert!(matches!(call, Err(CallError::NoHandler { .. })), "{call:?}");
    assert_eq!(client.occupied(), 0);
    client.close().await;
}
