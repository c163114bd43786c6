// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cancelled calls: MQTT-24.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet_core::{CallError, ClientProxy, ConnectionStatus, Data, HandlerGroup, RpcError, event, message};
use martlet_mqtt::{MqttClient, MqttClientOptions, MqttQos, MqttRecordBuilder, MqttServerOptions};
use martlet_testkit::broker::Broker;
use rumqttc_v5::mqttbytes::QoS;
use rumqttc_v5::mqttbytes::v5::{Packet, SubAck, SubscribeReasonCode};
use tokio::net::TcpListener;

use crate::raw::Raw;
use crate::world;
use crate::world::{GRACE, broker, broker_with, counting, serve, server_options, slow, sum, until};

/// No deadline travels: what stops a handler is the cancellation.
fn client_options(broker: &Broker) -> MqttClientOptions {
    let mut options = world::client_options(broker);
    options.client.propagate = false;
    options
}

const PATIENCE: Duration = Duration::from_millis(100);

struct Stopped(Arc<AtomicU64>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A handler that never ends of its own, and how often it was begun and stopped.
type Stuck = (HandlerGroup, Arc<AtomicU64>, Arc<AtomicU64>);

fn stuck(pattern: &str) -> Stuck {
    let (begun, stopped) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
    let (runs, ends) = (Arc::clone(&begun), Arc::clone(&stopped));
    let group = message(martlet_core::Pattern::from(pattern), move || {
        runs.fetch_add(1, Ordering::Relaxed);
        let guard = Stopped(Arc::clone(&ends));
        async move {
            std::future::pending::<()>().await;
            drop(guard);
            Ok::<_, RpcError>(1)
        }
    });
    (group, begun, stopped)
}

async fn gives_up(client: &ClientProxy, topic: &str, millis: u64) {
    let call = client.send::<i64>(topic, millis).timeout(PATIENCE).await;
    assert!(matches!(call, Err(CallError::Timeout { .. })), "{call:?}");
}

fn id_of(request: &str) -> String {
    serde_json::from_str::<serde_json::Value>(request).unwrap()["id"].to_string()
}

#[actix::test]
async fn a_cancelled_call_stops_its_handler() {
    let broker = broker();
    for (version, qos) in [
        (4, MqttQos::AtMostOnce),
        (5, MqttQos::AtMostOnce),
        (4, MqttQos::AtLeastOnce),
        (5, MqttQos::ExactlyOnce),
    ] {
        let (service, _) = serve(server_options(&broker).protocol_version(version), [slow()]).await;
        let client = MqttClient::new(client_options(&broker).protocol_version(version));
        let mut peer = Raw::connect(&broker).await;
        peer.subscribe("_MARTLET/#").await;
        peer.subscribe("slow").await;
        let record = MqttRecordBuilder::new(60_000).set_qos(qos).build();
        let call = client.send::<u64>("slow", record).timeout(PATIENCE).await;
        assert!(matches!(call, Err(CallError::Timeout { .. })), "{call:?}");
        let (topic, request) = peer.text().await;
        assert_eq!(topic, "slow");
        let cancelled = peer.message().await;
        assert_eq!(cancelled.topic, "_MARTLET/cancel/slow");
        assert_eq!((cancelled.qos, cancelled.retain), (QoS::AtMostOnce, false));
        assert_eq!(cancelled.payload, id_of(&request));
        // One that has its reply is not cancelled.
        assert_eq!(client.send::<u64>("slow", 0).await.unwrap(), 0);
        assert_eq!(peer.text().await.0, "slow");
        assert!(peer.is_silent().await);
        // It would wait for the handler.
        let report = service.stop(GRACE).await;
        assert!(report.clean && report.abandoned().count() == 0, "{report:?}");
        client.close().await;
    }
}

/// Whichever member of a group runs it, and under wildcards.
#[actix::test]
async fn every_member_of_a_group_hears_what_one_of_them_is_to_stop() {
    let broker = broker();
    let members: Vec<_> = ["stuck/+", "$share/g/stuck/#", "stuck/+"].map(stuck).into();
    let mut services = Vec::new();
    for (number, (group, _, _)) in members.iter().enumerate() {
        let mut options = server_options(&broker).protocol_version([4, 5, 4][number]);
        if number != 1 {
            options = options.shared_group("g");
        }
        services.push(serve(options, [group.clone(), sum()]).await);
    }
    let client = MqttClient::new(client_options(&broker));
    let all = |of: fn(&Stuck) -> &Arc<AtomicU64>| {
        members.iter().map(|member| of(member).load(Ordering::Relaxed)).collect::<Vec<_>>()
    };
    let call = || client.send::<i64>("stuck/a", 1);
    let mut calls: Vec<_> = (0..30).map(|_| Box::pin(call())).collect();
    for call in &mut calls {
        assert!(futures::poll!(call).is_pending());
    }
    // (Members under other filters of the same group get a copy each.)
    until("all have begun", || all(|member| &member.1).iter().sum::<u64>() >= 30).await;
    tokio::time::sleep(PATIENCE).await;
    let begun = all(|member| &member.1);
    assert!(begun.iter().all(|begun| *begun > 0), "{begun:?}");
    drop(calls);
    until("all were stopped", || all(|member| &member.2) == begun).await;
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    for (service, reports) in services {
        assert!(service.stop(GRACE).await.clean);
        assert_eq!(reports.all(), Vec::<String>::new());
    }
}

/// It is no event, not even to a handler of everything.
#[actix::test]
async fn a_cancellation_runs_no_handler() {
    let broker = broker();
    for version in [4, 5] {
        let count = Arc::default();
        let seen = counting("#", &count);
        let (stuck, begun, stopped) = stuck("stuck");
        let (service, reports) =
            serve(server_options(&broker).protocol_version(version), [seen, stuck]).await;
        let client = MqttClient::new(client_options(&broker));
        for _ in 0..3 {
            gives_up(&client, "stuck", 1).await;
        }
        until("they were stopped", || stopped.load(Ordering::Relaxed) == begun.load(Ordering::Relaxed)).await;
        // Of nobody, of nothing.
        let mut raw = Raw::connect(&broker).await;
        for payload in ["", "\"none\"", "{", r#"{"pattern":"sum","data":[1],"id":"a"}"#] {
            raw.publish("_MARTLET/cancel/stuck", payload).await;
        }
        client.emit("last", 1).await.unwrap();
        until("the last has come", || count.load(Ordering::Relaxed) > 0).await;
        tokio::time::sleep(PATIENCE).await;
        assert_eq!(count.load(Ordering::Relaxed), 1, "{:?}", reports.all());
        client.close().await;
        assert!(service.stop(GRACE).await.clean);
        assert_eq!(reports.all(), Vec::<String>::new());
    }
}

#[actix::test]
async fn the_option_turns_it_off_on_either_side() {
    let broker = broker();
    let mut peer = Raw::connect(&broker).await;
    peer.subscribe("_MARTLET/#").await;
    for (serving, calling) in [(false, true), (true, false)] {
        let (group, begun, stopped) = stuck("stuck");
        let (service, _) = serve(server_options(&broker).cancellation(serving), [group]).await;
        let client = MqttClient::new(client_options(&broker).cancellation(calling));
        gives_up(&client, "stuck", 1).await;
        assert_eq!(peer.is_silent().await, !calling);
        assert_eq!((begun.load(Ordering::Relaxed), stopped.load(Ordering::Relaxed)), (1, 0));
        client.close().await;
        let report = service.stop(PATIENCE).await;
        assert_eq!(report.abandoned().count(), 1, "{report:?}");
    }
}

/// A request that waits for its reply topic goes nowhere when its caller has gone.
#[actix::test]
async fn a_call_that_was_not_published_is_neither_published_nor_cancelled() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let client = MqttClient::new(MqttClientOptions::new().url(url).protocol_version(5));
    let (connected, mut raw) = futures::join!(client.connect(), Raw::accept(&listener, false));
    connected.unwrap();
    gives_up(&client, "sum", 1).await;
    raw.grant().await;
    let (call, ()) = futures::join!(client.send::<i64>("sum", 2).timeout(PATIENCE), async {
        let Packet::Publish(publish) = raw.packet().await else { panic!() };
        assert!(String::from_utf8_lossy(&publish.payload).contains(r#""data":2"#), "{publish:?}");
    });
    assert!(matches!(call, Err(CallError::Timeout { .. })), "{call:?}");
    let Packet::Publish(publish) = raw.packet().await else { panic!() };
    assert_eq!(publish.topic, "_MARTLET/cancel/sum");
    let (_, ()) = futures::join!(client.close(), async { drop(raw) });
}

/// A broker played by hand: mosquitto grants subscriptions whose topics it will not deliver.
#[actix::test]
async fn a_service_that_may_not_hear_of_cancellations_serves_and_says_so_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = MqttServerOptions::new()
        .url(format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port()))
        .protocol_version(5)
        .reconnect_period(Duration::from_millis(10));
    let session = async || {
        let mut raw = Raw::accept(&listener, false).await;
        for _ in 0..4 {
            let packet = raw.packet().await;
            let Packet::Subscribe(subscribe) = packet else { panic!("{packet:?}") };
            let code = match subscribe.filters[0].path.starts_with("_MARTLET/") {
                true => SubscribeReasonCode::NotAuthorized,
                false => SubscribeReasonCode::Success(QoS::AtMostOnce),
            };
            let return_codes = vec![code];
            raw.send(Packet::SubAck(SubAck { pkid: subscribe.pkid, return_codes, properties: None })).await;
        }
        raw
    };
    let ((service, reports), mut raw) = futures::join!(serve(options, [sum(), slow()]), session());
    for _ in 0..2 {
        raw.publish("sum", r#"{"pattern":"sum","data":[1,2],"id":"a"}"#).await;
        let Packet::Publish(reply) = raw.packet().await else { panic!() };
        assert_eq!(
            (&*reply.topic, &*reply.payload),
            (&b"sum/reply"[..], &br#"{"response":3,"isDisposed":true,"id":"a"}"#[..])
        );
        drop(raw);
        raw = session().await;
    }
    until("it is connected", || service.servers()[0].status() == Some(ConnectionStatus::Connected)).await;
    let told =
        || reports.all().into_iter().filter(|report| report.contains("cancelled calls")).collect::<Vec<_>>();
    assert_eq!(told().len(), 1, "{:?}", reports.all());
    assert!(
        told()[0].contains("_MARTLET/cancel/") && told()[0].contains("not authorized"),
        "{told:?}",
        told = told()
    );
    drop(raw);
    service.stop(PATIENCE).await;
}

/// What a client may not publish is gone, and nothing else. (With `max_queued_messages 0`, mosquitto 2.0.11 closes the
/// connection behind whatever it refuses.)
#[actix::test]
async fn a_client_that_may_not_cancel_is_not_disturbed() {
    let path = std::env::temp_dir().join(format!("martlet-mqtt-cancel-acl-{}", std::process::id()));
    writeln!(std::fs::File::create(&path).unwrap(), "topic readwrite open/#").unwrap();
    let broker = broker_with(&format!("max_queued_messages 1000\nacl_file {}", path.display()));
    for version in [4, 5] {
        let (stuck, begun, stopped) = stuck("open/stuck");
        let echo = message("open/echo", async |Data(number): Data<u64>| Ok::<_, RpcError>(number));
        let none = event("open/none", async || Ok::<_, RpcError>(()));
        let (service, reports) =
            serve(server_options(&broker).protocol_version(version), [stuck, echo, none]).await;
        let client = MqttClient::new(client_options(&broker).protocol_version(version));
        let mut changes = Box::pin(client.status_stream());
        for number in 0..5 {
            gives_up(&client, "open/stuck", 1).await;
            assert_eq!(client.send::<u64>("open/echo", number).await.unwrap(), number);
        }
        assert_eq!((begun.load(Ordering::Relaxed), stopped.load(Ordering::Relaxed)), (5, 0));
        let mut statuses = Vec::new();
        while let Some(Some(status)) =
            futures::FutureExt::now_or_never(futures::StreamExt::next(&mut changes))
        {
            statuses.push(status);
        }
        assert!(!statuses.contains(&ConnectionStatus::Reconnecting), "{statuses:?}");
        assert_eq!(reports.all(), Vec::<String>::new());
        client.close().await;
        service.stop(PATIENCE).await;
    }
    std::fs::remove_file(&path).unwrap();
}
