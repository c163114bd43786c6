// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes wrong: at connecting, with what is declared, with the broker, with the lines to it.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use martlet_core::{
    CallError, ConnectionStatus, Data, FailurePolicy, Microservice, RpcError, SessionErrorKind, StartError,
    event, message,
};
use martlet_rabbitmq::{
    RmqClient, RmqClientOptions, RmqQueueOptions, RmqServer, RmqServerOptions, RmqSocketOptions,
    RmqTlsOptions,
};
use martlet_testkit::broker::{Broker, BrokerCommand, free_port};
use martlet_testkit::relay::Relay;

use crate::raw::Raw;
use crate::world::{
    GRACE, client, client_options, quick, serve, server_options, shared_broker, slow, sum, unique, until,
};

/// Why a service does not start.
async fn start_error(options: RmqServerOptions) -> (SessionErrorKind, String) {
    let error = Microservice::new()
        .on_current_arbiter()
        .handlers(sum())
        .server(RmqServer::new(options.max_connection_attempts(1)))
        .start()
        .await
        .unwrap_err();
    let StartError::Transport { cause, .. } = error else { panic!("{error}") };
    (cause.kind(), cause.to_string())
}

/// Why a call is not sent.
async fn call_error(options: RmqClientOptions) -> (SessionErrorKind, String) {
    let client = RmqClient::new(options);
    let error = client.send::<i64>("sum", [1]).await.unwrap_err();
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
    let CallError::NotSent { cause } = error else { panic!("{error}") };
    (cause.kind(), cause.to_string())
}

fn nobody_listens() -> String {
    let port = free_port().unwrap();
    format!("amqp://127.0.0.1:{port}")
}

/// Holds the same for both sides: the kind, and every word in the text.
async fn check(
    change: impl Fn(&mut Vec<String>, &mut RmqQueueOptions, &mut bool),
    kind: SessionErrorKind,
    words: &[&str],
) {
    let broker = shared_broker();
    let queue = unique("refused");
    let mut server = server_options(&broker, &queue);
    change(&mut server.urls, &mut server.queue_options, &mut server.no_assert);
    let mut client = client_options(&broker, &queue);
    change(&mut client.urls, &mut client.queue_options, &mut client.no_assert);
    for (found, text) in [start_error(server).await, call_error(client).await] {
        assert_eq!(found, kind, "{text}");
        for word in words {
            assert!(text.contains(word), "{word:?} in {text:?}");
        }
        assert!(!text.contains("secret"), "{text}");
    }
}

#[actix::test]
async fn a_broker_that_cannot_be_reached_is_said_at_once() {
    // What the node that others share takes to start does not count.
    let _broker = shared_broker();
    let begin = Instant::now();
    let nobody = nobody_listens();
    check(
        |urls, _, _| *urls = vec![nobody.clone()],
        SessionErrorKind::Refused,
        &["option urls", "127.0.0.1"],
    )
    .await;
    check(
        |urls, _, _| *urls = vec!["http://x".to_owned()],
        SessionErrorKind::Fatal,
        &["option urls", "http"],
    )
    .await;
    check(|urls, _, _| urls.clear(), SessionErrorKind::Fatal, &["option urls is empty"]).await;
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[actix::test]
async fn a_refused_login_and_a_missing_vhost_are_said() {
    let broker = shared_broker();
    let login = format!("amqp://guest:secret@{}", broker.address());
    check(|urls, _, _| *urls = vec![login.clone()], SessionErrorKind::Fatal, &["login", "user and password"])
        .await;
    let vhost = format!("{}/nowhere", broker.url());
    check(|urls, _, _| *urls = vec![vhost.clone()], SessionErrorKind::Fatal, &["vhost", "nowhere"]).await;
}

#[actix::test]
async fn a_missing_queue_that_is_not_to_be_declared_is_said() {
    check(
        |_, _, no_assert| *no_assert = true,
        SessionErrorKind::Fatal,
        &["noAssert", "refused-", "no queue"],
    )
    .await;
    check(|_, queue, _| queue.no_assert = true, SessionErrorKind::Fatal, &["noAssert", "refused-"]).await;
}

#[actix::test]
async fn a_queue_with_other_arguments_is_said() {
    let broker = shared_broker();
    let queue = unique("other");
    Raw::connect(&broker).await.declare(&queue).await;
    let other = || RmqQueueOptions::new().max_length(7);
    let words = ["queueOptions", &queue, "x-max-length"];
    let server = start_error(server_options(&broker, &queue).queue_options(other())).await;
    let client = call_error(client_options(&broker, &queue).queue_options(other())).await;
    let exchange = start_error(server_options(&broker, &queue).exchange("amq.direct")).await;
    assert!(exchange.1.contains("exchangeType") && exchange.0 == SessionErrorKind::Fatal, "{exchange:?}");
    for (kind, text) in [server, client] {
        assert_eq!(kind, SessionErrorKind::Fatal);
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    // As it is, it can be used without declaring it.
    let (service, _) = serve(server_options(&broker, &queue).no_assert(true), [sum()]).await;
    let client = RmqClient::new(client_options(&broker, &queue).no_assert(true));
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn options_that_do_not_fit_each_other_are_said() {
    let broker = shared_broker();
    for (options, word) in [
        (server_options(&broker, "q").routing_key("x"), "routingKey"),
        (server_options(&broker, &"x".repeat(256)), "option queue"),
        (server_options(&broker, "q").tls(RmqTlsOptions::new()), "tls"),
    ] {
        let (kind, text) = start_error(options).await;
        assert!(kind == SessionErrorKind::Fatal && text.contains(word), "{text}");
    }
    let (_, text) = call_error(client_options(&broker, "")).await;
    assert!(text.contains("option queue is empty"), "{text}");
    let (_, text) = call_error(client_options(&broker, "").wildcards(true)).await;
    assert!(text.contains("option wildcards"), "{text}");
    let (_, text) = call_error(client_options(&broker, "q").headers([("x".repeat(256), "1")])).await;
    assert!(text.contains("option headers"), "{text}");
}

#[actix::test]
async fn what_does_not_speak_amqp_or_does_not_answer_is_said() {
    use std::io::Write;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://{}", listener.local_addr().unwrap());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let web = std::thread::spawn(move || {
        for peer in listener.incoming() {
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            let _ = peer.unwrap().write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let broker = shared_broker();
    let (_, text) = start_error(server_options(&broker, "q").urls([&url])).await;
    assert!(text.contains("option urls"), "{text}");
    stop.store(true, Ordering::Relaxed);
    drop(std::net::TcpStream::connect(&url[7..]).unwrap());
    web.join().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://{}", silent.local_addr().unwrap());
    let begin = Instant::now();
    let (kind, text) =
        call_error(client_options(&broker, "q").urls([&url]).timeout(Duration::from_millis(300))).await;
    assert!(kind == SessionErrorKind::Refused && text.contains("option timeout"), "{text}");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[actix::test]
async fn brokers_are_tried_in_order() {
    let broker = shared_broker();
    let queue = unique("order");
    let urls = [nobody_listens(), broker.url()];
    let (service, _) = serve(server_options(&broker, &queue).urls(urls.clone()), [sum()]).await;
    let client = RmqClient::new(client_options(&broker, &queue).urls(urls));
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_queue_deleted_under_its_consumer_is_declared_again() {
    let broker = shared_broker();
    let queue = unique("deleted");
    let (service, reports) = serve(server_options(&broker, &queue), [sum()]).await;
    let client = client(&broker, &queue);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let raw = Raw::connect(&broker).await;
    for _ in 0..3 {
        raw.delete(&queue).await;
        let begin = Instant::now();
        while client.send::<i64>("sum", [1]).timeout(Duration::from_millis(300)).await.is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10), "deaf");
        }
    }
    assert!(reports.contain("its queue was deleted"), "{:?}", reports.all());
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn an_exclusive_queue_is_waited_for() {
    let broker = shared_broker();
    let queue = unique("exclusive");
    let options = server_options(&broker, &queue).queue_options(RmqQueueOptions::new().exclusive(true));
    let (first, _) = serve(options.clone(), [sum()]).await;
    let (kind, text) = start_error(options.clone()).await;
    assert!(kind == SessionErrorKind::Refused && text.contains("queueOptions"), "{text}");
    let second = async { serve(options.max_connection_attempts(100), [sum()]).await };
    let (_, (second, _)) = futures::join!(
        async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            first.stop(GRACE).await
        },
        second
    );
    second.stop(GRACE).await;
}

#[actix::test]
async fn a_cut_line_ends_each_call_once_and_everything_is_back() {
    let broker = shared_broker();
    let queue = unique("cut");
    let relay = Relay::start(broker.port());
    let url = [format!("amqp://127.0.0.1:{}", relay.port())];
    let (service, _) = serve(server_options(&broker, &queue).urls(url.clone()), [sum(), slow()]).await;
    let client = RmqClient::new(client_options(&broker, &queue).urls(url));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let calls = futures::future::join_all((0..10).map(|_| client.send::<u64>("slow", 5000)));
    let (results, ()) = futures::join!(calls, async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        relay.cut();
    });
    assert!(results.iter().all(|result| matches!(result, Err(CallError::Lost { .. }))), "{results:?}");
    let begin = Instant::now();
    until("both are back", || {
        client.status() == Some(ConnectionStatus::Connected)
            && service.servers()[0].status() == Some(ConnectionStatus::Connected)
    })
    .await;
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop(Duration::ZERO).await;
}

#[actix::test]
async fn a_frozen_broker_is_noticed_by_its_missing_heartbeats() {
    let broker = Broker::start(BrokerCommand::rabbitmq()).unwrap();
    let queue = unique("frozen");
    let heartbeat = || {
        RmqSocketOptions::new()
            .heartbeat_interval(Duration::from_secs(1))
            .reconnect_time(Duration::from_millis(50))
    };
    let server = server_options(&broker, &queue).socket_options(heartbeat()).timeout(Duration::from_secs(1));
    let (service, _) = serve(server, [sum()]).await;
    let client = RmqClient::new(
        client_options(&broker, &queue)
            .socket_options(heartbeat())
            .timeout(Duration::from_secs(1))
            .call_timeout(Duration::from_secs(30)),
    );
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    broker.freeze().unwrap();
    let begin = Instant::now();
    let lost = client.send::<i64>("sum", [1]).await;
    assert!(matches!(lost, Err(CallError::Lost { .. })), "{lost:?}");
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    until("the service has noticed", || {
        service.servers()[0].status() == Some(ConnectionStatus::Reconnecting)
    })
    .await;
    broker.thaw().unwrap();
    until("it is back", || service.servers()[0].status() == Some(ConnectionStatus::Connected)).await;
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_server_gives_up_after_its_attempts() {
    let begin = Instant::now();
    let broker = shared_broker();
    let options = server_options(&broker, "q").urls([nobody_listens()]).socket_options(quick());
    let error = Microservice::new()
        .on_current_arbiter()
        .handlers(sum())
        .server(RmqServer::new(options.max_connection_attempts(3)))
        .start()
        .await
        .unwrap_err();
    assert!(matches!(error, StartError::Transport { .. }), "{error}");
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(100) && took < Duration::from_secs(20), "{took:?}");
}

#[actix::test]
async fn a_drain_loses_nothing_that_was_confirmed() {
    let broker = shared_broker();
    for no_ack in [true, false] {
        let raw = Raw::connect(&broker).await;
        let queue = unique("drain");
        let count = Arc::new(AtomicU64::new(0));
        let group = || {
            let count = Arc::clone(&count);
            event("evt", move |Data(_): Data<u64>| {
                let count = Arc::clone(&count);
                async move {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    count.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, RpcError>(())
                }
            })
        };
        let options = || match no_ack {
            true => server_options(&broker, &queue),
            false => server_options(&broker, &queue).no_ack(false).on_failure(FailurePolicy::Requeue),
        };
        let client = client(&broker, &queue);
        client.emit("evt", 0).await.unwrap();
        let emitting = async {
            for _ in 0..40 {
                let events = (0..50).map(|number| client.emit("evt", number)).collect::<Vec<_>>();
                for event in futures::future::join_all(events).await {
                    event.unwrap();
                }
            }
        };
        let serving = async {
            for _ in 0..4 {
                let (service, _) = serve(options(), [group()]).await;
                tokio::time::sleep(Duration::from_millis(60)).await;
                let report = service.stop(GRACE).await;
                assert!(report.clean, "{report:?}");
            }
        };
        futures::join!(emitting, serving);
        let (service, _) = serve(options(), [group()]).await;
        until("every event has been handled", || count.load(Ordering::Relaxed) >= 2001).await;
        assert!(service.stop(GRACE).await.clean);
        assert_eq!((count.load(Ordering::Relaxed), raw.waiting(&queue).await), (2001, 0));
        client.close().await;
    }
}

#[actix::test]
async fn routes_come_and_go_with_wildcards() {
    let broker = shared_broker();
    let queue = unique("come-and-go");
    let (service, _) = serve(server_options(&broker, &queue).wildcards(true), [sum()]).await;
    let client = RmqClient::new(client_options(&broker, &queue).wildcards(true));
    for round in 0..5 {
        let group = message(format!("late.{round}.*"), async || Ok::<_, RpcError>("late"));
        let id = service.registry().register(vec![group]).await.unwrap();
        let begin = Instant::now();
        while client.send::<String>(format!("late.{round}.x"), 1).await.is_err() {
            assert!(begin.elapsed() < Duration::from_secs(5));
        }
        service.registry().unregister(id).await.unwrap();
        let begin = Instant::now();
        while client.send::<String>(format!("late.{round}.x"), 1).await.is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(5));
        }
        assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    }
    client.close().await;
    service.stop(GRACE).await;
}

// === TLS ===

#[actix::test]
async fn tls_is_verified_and_its_errors_are_said() {
    let folder = std::env::temp_dir().join(unique("martlet-rabbitmq-tls"));
    std::fs::create_dir_all(&folder).unwrap();
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let authority = |name: &str| {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        (cert.pem(), rcgen::Issuer::new(params, key))
    };
    let (ca, issuer) = authority("ours");
    let (other, _) = authority("another");
    let key = rcgen::KeyPair::generate().unwrap();
    let cert =
        rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    for (name, text) in
        [("ca.pem", &ca), ("other.pem", &other), ("cert.pem", &cert.pem()), ("key.pem", &key.serialize_pem())]
    {
        std::fs::write(path(name), text).unwrap();
    }
    let config = format!(
        "listeners.tcp = none\nlisteners.ssl.1 = 127.0.0.1:$PORT\nssl_options.cacertfile = {}\nssl_options.certfile \
         = {}\nssl_options.keyfile = {}\nssl_options.verify = verify_none\nssl_options.fail_if_no_peer_cert = false",
        path("ca.pem"),
        path("cert.pem"),
        path("key.pem")
    );
    let broker = Broker::start(BrokerCommand::rabbitmq_with(&config, "")).unwrap();
    let queue = unique("tls");
    let url = format!("amqps://localhost:{}", broker.port());
    let trusting = |name: &str| RmqTlsOptions::new().ca_file(path(name));
    let (service, _) =
        serve(server_options(&broker, &queue).urls([&url]).tls(trusting("ca.pem")), [sum()]).await;
    let client = RmqClient::new(client_options(&broker, &queue).urls([&url]).tls(trusting("ca.pem")));
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    for (options, word) in [
        (client_options(&broker, &queue).urls([&url]).tls(trusting("other.pem")), "option tls"),
        (client_options(&broker, &queue).urls([&url]), "option tls"),
        (client_options(&broker, &queue).urls([&url]).tls(trusting("nowhere.pem")), "tls.caFile"),
        // The certificate is for another name.
        (
            client_options(&broker, &queue)
                .urls([url.replace("localhost", "127.0.0.1")])
                .tls(trusting("ca.pem")),
            "option tls",
        ),
    ] {
        let (kind, text) = call_error(options).await;
        assert!(kind == SessionErrorKind::Fatal && text.contains(word), "{kind:?} {text}");
    }
    // Without TLS, the broker is not spoken to in clear text by mistake, and says nothing.
    let (_, text) = call_error(
        client_options(&broker, &queue).urls([url.replace("amqps", "amqp")]).timeout(Duration::from_secs(2)),
    )
    .await;
    assert!(text.contains("option"), "{text}");
    client.close().await;
    service.stop(GRACE).await;
    std::fs::remove_dir_all(&folder).unwrap();
}

#[actix::test]
async fn an_amqps_url_begins_with_a_tls_handshake() {
    use std::io::Read;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqps://localhost:{}", listener.local_addr().unwrap().port());
    let first = std::thread::spawn(move || {
        let mut bytes = [0; 3];
        listener.accept().unwrap().0.read_exact(&mut bytes).unwrap();
        bytes
    });
    let broker = shared_broker();
    let (_, text) =
        call_error(client_options(&broker, "q").urls([url]).timeout(Duration::from_secs(5))).await;
    assert!(text.contains("option"), "{text}");
    // A record of type handshake, version 3.x.
    assert_eq!(first.join().unwrap()[..2], [22, 3]);
}
