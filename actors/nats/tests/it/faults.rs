// SPDX-License-Identifier: MIT OR Apache-2.0
//! Brokers that refuse, vanish and come back; shutting down; cancelling.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::{
    CallError, ConnectionStatus, Data, HandlerGroup, RpcError, SessionErrorKind, Streaming, event, message,
};
use martlet_nats::{NatsClient, NatsClientOptions, NatsServerOptions, NatsTlsOptions};
use martlet_testkit::broker::free_port;

use crate::broker::Broker;
use crate::world::{
    GRACE, call_error, client, client_options, nobody_listens, serve, server_options, slow, start_error, sum,
    until,
};

#[actix::test]
async fn a_broker_that_cannot_be_reached_is_said_at_once() {
    let url = nobody_listens();
    let begin = Instant::now();
    let (kind, text) = start_error(NatsServerOptions::new().servers([url.clone()])).await;
    assert_eq!(kind, SessionErrorKind::Refused);
    assert!(text.contains(&url) && text.contains("refused"), "{text}");
    let (kind, text) = call_error(NatsClientOptions::new().servers([url.clone()])).await;
    assert_eq!(kind, SessionErrorKind::Refused);
    assert!(text.contains(&url), "{text}");
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[actix::test]
async fn brokers_are_tried_in_order() {
    let broker = Broker::start();
    let options = server_options(&broker).servers([nobody_listens(), broker.url()]);
    let (service, _) = serve(options, [sum()]).await;
    let client = NatsClient::new(client_options(&broker).servers([nobody_listens(), broker.url()]));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn wrong_credentials_are_fatal_and_said() {
    let broker = Broker::start_with(&["--user", "me", "--pass", "se:cret"]);
    let right = |options: NatsServerOptions| options.user("me").pass("se:cret");
    let (service, _) = serve(right(server_options(&broker)), [sum()]).await;
    let in_url = format!("nats://me:se%3Acret@127.0.0.1:{}", broker.port);
    let client = NatsClient::new(client_options(&broker).servers([in_url]));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
    for options in [server_options(&broker), server_options(&broker).user("me").pass("wrong")] {
        let (kind, text) = start_error(options).await;
        assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
        assert!(text.contains("refused the credentials"), "{text}");
        assert!(!text.contains("wrong"), "{text}");
    }
    let (kind, text) = call_error(client_options(&broker).token("t")).await;
    assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
}

#[actix::test]
async fn a_route_that_the_broker_does_not_permit_is_said_at_start() {
    let config = r#"
        authorization { users = [
            { user: me, password: pw, permissions: { publish: [">"], subscribe: ["_INBOX.>", "other"] } }
        ] }
    "#;
    let broker = Broker::configured(config, &[]);
    let (kind, text) = start_error(server_options(&broker).user("me").pass("pw")).await;
    assert_eq!(kind, SessionErrorKind::Fatal);
    assert!(text.to_lowercase().contains("permissions violation") && text.contains("sum"), "{text}");
}

#[actix::test]
async fn a_service_without_permission_for_cancellations_serves_all_the_same() {
    let config = r#"
        authorization { users = [
            { user: me, password: pw, permissions: { publish: [">"], subscribe: ["_INBOX.>", "sum"] } }
        ] }
    "#;
    let broker = Broker::configured(config, &[]);
    let (service, _) = serve(server_options(&broker).user("me").pass("pw"), [sum()]).await;
    let client = NatsClient::new(client_options(&broker).user("me").pass("pw"));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn tls_is_verified_and_its_errors_are_said() {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let directory = std::env::temp_dir().join(format!("martlet-nats-tls-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (cert, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    std::fs::write(&cert, pair.cert.pem()).unwrap();
    std::fs::write(&key, pair.signing_key.serialize_pem()).unwrap();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let broker = Broker::start_with(&["--tls", "--tlscert", &text(&cert), "--tlskey", &text(&key)]);
    let trusting = || NatsTlsOptions::new().ca_file(&cert);
    let (service, _) = serve(server_options(&broker).tls(trusting()), [sum()]).await;
    let client = NatsClient::new(client_options(&broker).tls(trusting()));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
    // An authority that nobody vouches for; a file that is not there; a broker without TLS.
    let (kind, said) = call_error(client_options(&broker)).await;
    assert_eq!(kind, SessionErrorKind::Fatal, "{said}");
    assert!(said.contains("TLS") && said.contains("certificate"), "{said}");
    let (kind, said) =
        call_error(client_options(&broker).tls(NatsTlsOptions::new().ca_file("/nowhere/ca.pem"))).await;
    assert_eq!(kind, SessionErrorKind::Fatal, "{said}");
    assert!(said.contains("option tls.caFile"), "{said}");
    let plain = Broker::start();
    let (kind, said) = call_error(client_options(&plain).tls(trusting())).await;
    assert_eq!(kind, SessionErrorKind::Fatal, "{said}");
    assert!(said.contains("TLS"), "{said}");
    std::fs::remove_dir_all(&directory).unwrap();
}

/// How many connections the broker has, from its monitoring page.
fn connections(monitor: u16) -> u64 {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", monitor)).unwrap();
    stream.write_all(b"GET /connz HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let body = page.split_once("\r\n\r\n").unwrap().1;
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    body["num_connections"].as_u64().unwrap()
}

#[actix::test]
async fn a_broker_that_is_restarted_mid_call_ends_each_call_once_and_gets_every_route_back() {
    let monitor = free_port().unwrap();
    let mut broker = Broker::start_with(&["-m", &monitor.to_string()]);
    let (service, _) = serve(server_options(&broker), [sum(), slow()]).await;
    let server = service.servers()[0].clone();
    let client = client(&broker);
    for _ in 0..3 {
        let calls: Vec<_> = (0..50)
            .map(|number| {
                let client = client.clone();
                actix_rt::spawn(async move {
                    let millis = if number % 2 == 0 { 5000 } else { 1 };
                    client.send::<u64>("slow", millis).await
                })
            })
            .collect();
        until("calls are under way", || client.pending() == 25).await;
        broker.stop();
        let mut outcomes = BTreeMap::new();
        for call in calls {
            let kind = call.await.unwrap().map_or_else(|error| error.kind(), |_| "value");
            *outcomes.entry(kind).or_insert(0) += 1;
        }
        assert_eq!(outcomes, BTreeMap::from([("lost", 25), ("value", 25)]));
        assert_eq!(client.occupied(), 0);
        until("the loss is seen", || server.status() == Some(ConnectionStatus::Reconnecting)).await;
        broker.restart();
        until("it is connected", || server.status() == Some(ConnectionStatus::Connected)).await;
        // Not before the routes are back: nobody is told that there is no handler.
        assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    }
    // No connection was left behind by the sessions that were lost.
    assert_eq!(connections(monitor), 2);
    client.close().await;
    service.stop(GRACE).await;
    until("the connections are gone", || connections(monitor) == 0).await;
}

#[actix::test]
async fn a_server_gives_up_after_its_attempts() {
    let mut broker = Broker::start();
    let options = server_options(&broker).max_reconnect_attempts(2);
    let (service, reports) = serve(options, [sum()]).await;
    broker.stop();
    let report = service.run_until(std::future::pending::<String>()).await.unwrap();
    assert!(!report.clean, "{report:?}");
    assert!(reports.contain("refused"), "{:?}", reports.all());
}

#[actix::test]
async fn a_drain_loses_nothing_under_load() {
    for round in 0..5u64 {
        let broker = Broker::start();
        let done = Arc::new(AtomicU64::new(0));
        let handled = Arc::clone(&done);
        let work = message("work", move |Data(number): Data<u64>| {
            let handled = Arc::clone(&handled);
            async move {
                if number % 16 == 0 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                handled.fetch_add(1, Ordering::Relaxed);
                Ok::<_, RpcError>(number)
            }
        });
        let (service, _) = serve(server_options(&broker), [work]).await;
        let client = client(&broker);
        client.connect().await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let callers: Vec<_> = (0..64)
            .map(|caller| {
                let (client, stop) = (client.clone(), Arc::clone(&stop));
                actix_rt::spawn(async move {
                    let (mut served, mut unserved) = (0u64, 0u64);
                    for number in 0.. {
                        let sent = number * 64 + caller;
                        let call = client.send::<u64>("work", sent).timeout(Duration::from_secs(4));
                        match call.await {
                            Ok(back) => {
                                assert_eq!(back, sent);
                                served += 1;
                            }
                            Err(CallError::NoHandler { .. }) => unserved += 1,
                            // Delivered and not answered: lost.
                            Err(error) => panic!("{error}"),
                        }
                        if unserved > 3 || stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                    served
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(50 + 7 * round)).await;
        until("it is under load", || done.load(Ordering::Relaxed) > 200).await;
        let report = service.stop(GRACE).await;
        assert!(report.clean, "{report:?}");
        stop.store(true, Ordering::Relaxed);
        let mut served = 0;
        for caller in callers {
            served += caller.await.unwrap();
        }
        assert!(served > 100, "{served}");
        assert_eq!(served, done.load(Ordering::Relaxed));
        assert_eq!(served, report.done());
        client.close().await;
    }
}

#[actix::test]
async fn events_that_were_published_before_a_drain_are_all_handled() {
    let broker = Broker::start();
    let count = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&count);
    let group = event("evt", move || {
        seen.fetch_add(1, Ordering::Relaxed);
        async { Ok::<_, RpcError>(()) }
    });
    let (service, reports) = serve(server_options(&broker), [group]).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    for number in 0..20_000u32 {
        raw.publish("evt", number.to_string().into()).await.unwrap();
    }
    // A round trip: the broker has them all.
    let mut probe = raw.subscribe("probe").await.unwrap();
    raw.publish("probe", "".into()).await.unwrap();
    probe.next().await.unwrap();
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
    assert_eq!(count.load(Ordering::Relaxed), 20_000, "{report:?} {:?}", reports.all());
}

#[actix::test]
async fn a_handler_that_does_not_end_is_abandoned_after_the_grace_period() {
    let broker = Broker::start();
    let options = server_options(&broker).grace_period(Duration::from_millis(300)).max_in_flight(1);
    let (service, _) = serve(options, [slow()]).await;
    let client = client(&broker);
    let waiting = client.clone();
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let waiting = waiting.clone();
            actix_rt::spawn(async move {
                waiting.send::<u64>("slow", 60_000).timeout(Duration::from_secs(3)).await
            })
        })
        .collect();
    until("they are under way", || client.pending() == 3).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begin = Instant::now();
    let report = service.stop(Duration::from_secs(60)).await;
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert!(!report.clean);
    assert_eq!(report.abandoned().count(), 1, "{report:?}");
    for call in calls {
        call.await.unwrap().unwrap_err();
    }
    client.close().await;
}

/// Tells when its handler's future is dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn endless(pattern: &str, dropped: &Arc<AtomicBool>) -> HandlerGroup {
    let dropped = Arc::clone(dropped);
    message(pattern, move || {
        let guard = Dropped(Arc::clone(&dropped));
        async move {
            std::future::pending::<()>().await;
            drop(guard);
            Ok::<_, RpcError>(0)
        }
    })
}

#[actix::test]
async fn a_dropped_call_cancels_its_handler() {
    let broker = Broker::start();
    let (exact, wild, stream) = (Arc::default(), Arc::default(), Arc::new(AtomicBool::new(false)));
    let dropped = Arc::clone(&stream);
    let ticks = message("ticks", move || {
        let guard = Dropped(Arc::clone(&dropped));
        async move {
            let ticks = futures::stream::unfold((guard, 0u64), |(guard, number)| async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                Some((number, (guard, number + 1)))
            });
            Ok::<_, RpcError>(Streaming(ticks))
        }
    });
    let groups = [endless("end", &exact), endless("w.*", &wild), ticks];
    // In a queue group the cancellation must reach the instance that has the request.
    let (service, _) = serve(server_options(&broker).queue("q"), groups).await;
    let client = client(&broker);
    for (pattern, dropped) in [("end", &exact), ("w.x", &wild)] {
        let call = client.send::<u64>(pattern, 1);
        let waited = tokio::time::timeout(Duration::from_millis(100), call).await;
        assert!(waited.is_err());
        until("its handler is dropped", || dropped.load(Ordering::Relaxed)).await;
    }
    let mut ticks = client.send::<u64>("ticks", 1).stream();
    assert_eq!(ticks.next().await.unwrap().unwrap(), 0);
    drop(ticks);
    until("the stream is dropped", || stream.load(Ordering::Relaxed)).await;
    assert_eq!(client.occupied(), 0);
    client.close().await;
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
}

#[actix::test]
async fn a_nestjs_service_hears_nothing_of_a_cancellation() {
    let broker = Broker::start();
    let raw = async_nats::connect(broker.url()).await.unwrap();
    // What a NestJS service with this handler subscribes.
    let mut requests = raw.subscribe("nest").await.unwrap();
    raw.flush().await.unwrap();
    let client = client(&broker);
    let call = client.send::<u64>("nest", 1);
    assert!(tokio::time::timeout(Duration::from_millis(100), call).await.is_err());
    requests.next().await.unwrap();
    let more = tokio::time::timeout(Duration::from_millis(200), requests.next()).await;
    assert!(more.is_err(), "{more:?}");
    client.close().await;
}

#[actix::test]
async fn a_cancellation_without_an_id_stops_no_event() {
    let broker = Broker::start();
    let (begun, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (begin, end) = (Arc::clone(&begun), Arc::clone(&ended));
    let slow = event("slow", move || {
        let (begin, end) = (Arc::clone(&begin), Arc::clone(&end));
        async move {
            begin.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(300)).await;
            end.fetch_add(1, Ordering::SeqCst);
        }
    });
    let (service, _) = serve(server_options(&broker), [sum(), slow]).await;
    let client = client(&broker);
    client.emit("slow", 1).await.unwrap();
    until("it has begun", || begun.load(Ordering::SeqCst) == 1).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    raw.publish("_MARTLET.cancel.sum", "".into()).await.unwrap();
    raw.flush().await.unwrap();
    until("it has ended", || ended.load(Ordering::SeqCst) == 1).await;
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn services_discovery_answers_ping_info_and_stats() {
    let broker = Broker::start();
    let options = server_options(&broker).queue("q").discoverable("calc", "1.2.3", "sums");
    let large = message("large", || Ok::<_, RpcError>("x".repeat(2_000_000)));
    let (service, _) = serve(options, [sum(), crate::world::failing(), large]).await;
    let client = client(&broker);
    // Beyond the broker's bound: what is sent, and counted, is an error.
    client.send::<String>("large", ()).await.unwrap_err();
    client.send::<i64>("sum", [1]).await.unwrap();
    client.send::<i64>("sum", [2]).await.unwrap();
    client.send::<i64>("fail", "message").await.unwrap_err();
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let ask = async |subject: String| {
        let reply = raw.request(subject, "".into()).await.unwrap();
        serde_json::from_slice::<serde_json::Value>(&reply.payload).unwrap()
    };
    let ping = ask("$SRV.PING".to_owned()).await;
    assert_eq!(ping["type"], "io.nats.micro.v1.ping_response");
    assert_eq!((&ping["name"], &ping["version"]), (&"calc".into(), &"1.2.3".into()));
    let id = ping["id"].as_str().unwrap().to_owned();
    assert_eq!(ask(format!("$SRV.PING.calc.{id}")).await, ping);
    let info = ask("$SRV.INFO.calc".to_owned()).await;
    assert_eq!(info["type"], "io.nats.micro.v1.info_response");
    assert_eq!(info["description"], "sums");
    let endpoint =
        |name: &str| serde_json::json!({"name": name, "subject": name, "queue_group": "q", "metadata": {}});
    assert_eq!(info["endpoints"], serde_json::json!([endpoint("sum"), endpoint("fail"), endpoint("large")]));
    let stats = ask(format!("$SRV.STATS.calc.{id}")).await;
    assert_eq!(stats["type"], "io.nats.micro.v1.stats_response");
    assert!(stats["started"].as_str().unwrap().ends_with('Z'));
    let endpoints = stats["endpoints"].as_array().unwrap();
    assert_eq!((&endpoints[0]["num_requests"], &endpoints[0]["num_errors"]), (&2.into(), &0.into()));
    assert_eq!((&endpoints[1]["num_requests"], &endpoints[1]["num_errors"]), (&1.into(), &1.into()));
    assert_eq!((&endpoints[2]["num_requests"], &endpoints[2]["num_errors"]), (&1.into(), &1.into()));
    assert!(endpoints[0]["average_processing_time"].as_u64().unwrap() > 0);
    assert!(endpoints[1]["last_error"].as_str().unwrap().contains("boom"));
    client.close().await;
    service.stop(GRACE).await;
    let (kind, text) = start_error(server_options(&broker).discoverable("a b", "1.0.0", "")).await;
    assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
}

#[actix::test]
async fn routes_come_and_go_while_traffic_flows() {
    let broker = Broker::start();
    let (service, _) = serve(server_options(&broker), [sum()]).await;
    let client = client(&broker);
    for _ in 0..3 {
        let before = client.send::<u64>("slow", 1).await;
        assert!(matches!(before, Err(CallError::NoHandler { .. })), "{before:?}");
        let registration = service.registry().register(vec![slow()]).await.unwrap();
        let begin = Instant::now();
        while client.send::<u64>("slow", 1).await.is_err() {
            assert!(begin.elapsed() < Duration::from_secs(5));
        }
        assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
        service.registry().unregister(registration).await.unwrap();
        let begin = Instant::now();
        while client.send::<u64>("slow", 1).await.is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(5));
        }
        until("the broker knows no subscriber", || true).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    client.close().await;
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
}

#[actix::test]
async fn a_late_route_that_nats_cannot_carry_is_reported_and_disturbs_nobody() {
    let mut broker = Broker::start();
    let (service, _) = serve(server_options(&broker), [sum()]).await;
    let reported = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&reported);
    service.events().on(move |event| {
        if event.name() == "bad_input" && event.to_string().contains("white space") {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let late = message("a b", || async { Ok::<_, RpcError>(()) });
    service.registry().register(vec![late]).await.unwrap();
    until("the report", || reported.load(Ordering::SeqCst) == 1).await;
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    broker.restart();
    // In the next session, too.
    until("the next report", || reported.load(Ordering::SeqCst) == 2).await;
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
}

#[actix::test]
async fn what_cannot_wait_any_more_is_dropped_counted_and_reported() {
    let broker = Broker::start();
    let count = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&count);
    let group = event("evt", move || {
        seen.fetch_add(1, Ordering::Relaxed);
        async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok::<_, RpcError>(())
        }
    });
    let options = server_options(&broker).subscription_capacity(10).max_in_flight(1);
    let (service, reports) = serve(options, [group, sum()]).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    for number in 0..500u32 {
        raw.publish("evt", number.to_string().into()).await.unwrap();
    }
    raw.flush().await.unwrap();
    until("it is reported", || reports.contain("subscriptionCapacity")).await;
    until("some were handled", || count.load(Ordering::Relaxed) >= 3).await;
    assert!(count.load(Ordering::Relaxed) < 50);
    service.stop(GRACE).await;
}
