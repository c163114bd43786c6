// SPDX-License-Identifier: MIT OR Apache-2.0
//! Brokers that refuse, vanish, freeze and come back; TLS and WebSocket; shutting down.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use martlet_core::{CallError, ConnectionStatus, Microservice, SessionErrorKind, StartError};
use martlet_mqtt::{MqttClient, MqttClientOptions, MqttServer, MqttServerOptions, MqttTlsOptions, MqttWill};
use martlet_testkit::broker::{Broker, free_port};
use martlet_testkit::relay::Relay;
use martlet_testkit::storm::stop_under_load;
use rumqttc_core::WsAdapter;

use crate::raw::Raw;
use crate::world::{
    GRACE, broker, broker_with, client, client_options, counting, serve, server_options, slow, sum, until,
};

async fn start_error(options: MqttServerOptions) -> (SessionErrorKind, String) {
    let service = Microservice::new().on_current_arbiter().handlers(sum()).server(MqttServer::new(options));
    match service.start().await.unwrap_err() {
        StartError::Transport { cause, .. } => (cause.kind(), cause.to_string()),
        other => panic!("{other:?}"),
    }
}

async fn call_error(options: MqttClientOptions) -> (SessionErrorKind, String) {
    let client = MqttClient::new(options);
    let error = client.send::<i64>("sum", [1]).await.unwrap_err();
    client.close().await;
    match error {
        CallError::NotSent { cause } => (cause.kind(), cause.to_string()),
        other => panic!("{other:?}"),
    }
}

fn nobody_listens() -> String {
    let port = free_port().unwrap();
    format!("mqtt://127.0.0.1:{port}")
}

/// MQTT-19.
#[actix::test]
async fn a_broker_that_cannot_be_reached_is_said() {
    let url = nobody_listens();
    let (kind, text) = call_error(MqttClientOptions::new().url(&url)).await;
    assert_eq!(kind, SessionErrorKind::Refused);
    assert!(text.contains("option url") && text.contains(&url) && text.contains("refused"), "{text}");
    let options = MqttServerOptions::new().url(&url).reconnect_period(Duration::from_millis(20));
    let (kind, text) = start_error(options.max_connection_attempts(3)).await;
    assert_eq!(kind, SessionErrorKind::Fatal);
    assert!(text.contains(&url) && text.contains("attempt 3 of option maxConnectionAttempts"), "{text}");
}

/// MQTT-19: a server waits for its broker, as NestJS's does.
#[actix::test]
async fn a_server_waits_for_a_broker_that_comes_late() {
    let broker = broker();
    let relay = Relay::start(broker.port());
    relay.close();
    let options = server_options(&broker).url(format!("mqtt://127.0.0.1:{}", relay.port()));
    let (started, ()) = futures::join!(serve(options, [sum()]), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        relay.open();
    });
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    started.0.stop(GRACE).await;
}

/// MQTT-19.
#[actix::test]
async fn wrong_options_are_named_before_anything_is_sent() {
    let options = MqttServerOptions::new;
    for (options, named) in [
        (options().url("http://x"), "option url"),
        (options().url("mqtt://h:x"), "option url"),
        (options().protocol_version(3), "option protocolVersion"),
        (options().clean(false), "option clientId"),
        (options().will(MqttWill::new("a/#", "")), "option will.topic"),
        (options().shared_group("a/b"), "option sharedGroup"),
        (options().tls(MqttTlsOptions::new()), "option tls needs"),
        (
            options().url("mqtts://localhost").tls(MqttTlsOptions::new().ca_file("/nowhere")),
            "option tls.caFile",
        ),
        (
            options().url("mqtts://localhost").tls(MqttTlsOptions::new().certificate("/no", "/no")),
            "option tls.",
        ),
    ] {
        let (kind, text) = start_error(options).await;
        assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
        assert!(text.contains(named), "{named}: {text}");
    }
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("martlet-mqtt-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// MQTT-19: refusals of the broker, each with the option it is about.
#[actix::test]
async fn refused_connections_name_their_option() {
    let folder = folder("login");
    let passwords = folder.join("passwords");
    // mosquitto_passwd's form for a plain password is hashed; a broker without users refuses everyone.
    std::fs::write(&passwords, "").unwrap();
    let broker = broker_with(&format!("allow_anonymous false\npassword_file {}", passwords.display()));
    for version in [4, 5] {
        let options = server_options(&broker).protocol_version(version).username("me").password("secret");
        let (kind, text) = start_error(options).await;
        assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
        assert!(text.contains("options username and password") && !text.contains("secret"), "{text}");
        let in_url = format!("mqtt://me:secret@127.0.0.1:{}", broker.port());
        let (kind, text) = call_error(client_options(&broker).url(in_url).protocol_version(version)).await;
        assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
        assert!(text.contains("options username and password") && !text.contains("secret"), "{text}");
    }
    // A client id that the broker does not take.
    let strict = broker_with("clientid_prefixes known-");
    let (kind, text) = start_error(server_options(&strict).client_id("other")).await;
    // mosquitto says "not authorized" where MQTT has a word for it.
    assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
    assert!(text.contains("option clientId") || text.contains("not authorized"), "{text}");
    let (service, _) = serve(server_options(&strict).client_id("known-1"), [sum()]).await;
    service.stop(GRACE).await;
    std::fs::remove_dir_all(&folder).unwrap();
}

/// MQTT-19: brokers played by hand, for what mosquitto never answers.
#[actix::test]
async fn every_refusal_code_has_its_words() {
    for (version, code, kind, named) in [
        (4u8, 1u8, SessionErrorKind::Fatal, "option protocolVersion"),
        (4, 2, SessionErrorKind::Fatal, "option clientId"),
        (4, 3, SessionErrorKind::Refused, "unavailable"),
        (4, 4, SessionErrorKind::Fatal, "bad user name or password"),
        (4, 5, SessionErrorKind::Fatal, "not authorized"),
        (5, 0x84, SessionErrorKind::Fatal, "option protocolVersion"),
        (5, 0x85, SessionErrorKind::Fatal, "option clientId"),
        (5, 0x86, SessionErrorKind::Fatal, "bad user name or password"),
        (5, 0x87, SessionErrorKind::Fatal, "not authorized"),
        (5, 0x89, SessionErrorKind::Refused, "unavailable"),
        (5, 0x8a, SessionErrorKind::Refused, "banned"),
        (5, 0x9b, SessionErrorKind::Fatal, "option will"),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let answer = async {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut connect = [0; 1024];
            assert!(stream.read(&mut connect).await.unwrap() > 0);
            let refusal: &[u8] = if version == 4 { &[0x20, 2, 0, code] } else { &[0x20, 3, 0, code, 0] };
            stream.write_all(refusal).await.unwrap();
            stream
        };
        let options = MqttClientOptions::new().url(url).protocol_version(version);
        let ((found, text), _stream) = futures::join!(call_error(options), answer);
        assert_eq!(found, kind, "{code}: {text}");
        assert!(text.contains(named), "{code}: {text}");
    }
}

/// MQTT-19: what is no MQTT broker, or one for TLS.
#[actix::test]
async fn a_peer_that_is_no_broker_is_said() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let answers: [&[u8]; 2] = [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""];
    for answer in answers {
        let play = async {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut connect = [0; 1024];
            assert!(stream.read(&mut connect).await.unwrap() > 0);
            stream.write_all(answer).await.unwrap();
        };
        let ((kind, text), ()) = futures::join!(call_error(MqttClientOptions::new().url(&url)), play);
        assert_eq!(kind, SessionErrorKind::Refused, "{text}");
        assert!(text.contains("option url") && text.contains("is it an MQTT broker"), "{text}");
    }
}

/// A line that breaks while the routes are being subscribed, with a message that nobody takes yet.
#[actix::test]
async fn a_line_that_breaks_while_subscribing_is_noticed_at_once() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let play = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = [0; 1024];
        assert!(stream.read(&mut bytes).await.unwrap() > 0);
        stream.write_all(&[0x20, 2, 0, 0]).await.unwrap();
        assert!(stream.read(&mut bytes).await.unwrap() > 0);
        stream.write_all(b"\x30\x06\x00\x03sum1").await.unwrap();
    };
    let begin = Instant::now();
    let options = MqttServerOptions::new().url(&url).reconnect_period(Duration::ZERO);
    let ((kind, text), ()) = futures::join!(start_error(options), play);
    assert_eq!(kind, SessionErrorKind::Lost, "{text}");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

/// MQTT-4: a subscription that the broker does not grant.
#[actix::test]
async fn a_pattern_that_the_broker_does_not_permit_is_said_at_start() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    // mosquitto grants subscriptions whose topics it will not deliver: played by hand.
    let play = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = [0; 1024];
        assert!(stream.read(&mut bytes).await.unwrap() > 0);
        stream.write_all(&[0x20, 2, 0, 0]).await.unwrap();
        assert!(stream.read(&mut bytes).await.unwrap() > 0);
        stream.write_all(&[0x90, 3, bytes[2], bytes[3], 0x80]).await.unwrap();
        stream
    };
    let ((kind, text), _stream) = futures::join!(start_error(MqttServerOptions::new().url(&url)), play);
    assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
    assert!(text.contains("pattern sum") && text.contains("refused the subscription"), "{text}");
    // MQTT-9: a reply topic that is refused ends its calls at once; played by hand.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let play = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = [0; 1024];
        assert!(stream.read(&mut bytes).await.unwrap() > 0);
        stream.write_all(&[0x20, 2, 0, 0]).await.unwrap();
        assert!(stream.read(&mut bytes).await.unwrap() > 0);
        stream.write_all(&[0x90, 3, bytes[2], bytes[3], 0x80]).await.unwrap();
        // Until the client has said goodbye.
        while stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {}
    };
    let asking = async {
        let client = MqttClient::new(MqttClientOptions::new().url(&url));
        let begin = Instant::now();
        let refused = client.send::<i64>("sum", [1]).await;
        assert!(
            matches!(&refused, Err(CallError::Remote(e)) if e.to_string().contains("reply topic")),
            "{refused:?}"
        );
        assert!(begin.elapsed() < Duration::from_secs(2));
        client.close().await;
    };
    futures::join!(asking, play);
}

/// An authority, and a certificate it has signed for this machine.
struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    fn new(name: &str) -> Self {
        let folder = folder(name);
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "authority");
        std::fs::write(folder.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = rcgen::Issuer::new(params, key);
        for who in ["server", "client"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params =
                rcgen::CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, who);
            let certificate = params.signed_by(&key, &issuer).unwrap();
            std::fs::write(folder.join(format!("{who}.pem")), certificate.pem()).unwrap();
            std::fs::write(folder.join(format!("{who}.key")), key.serialize_pem()).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn lines(&self, require: bool) -> String {
        format!(
            "cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate {require}\n",
            self.path("ca.pem").display(),
            self.path("server.pem").display(),
            self.path("server.key").display()
        )
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn secure(broker: &Broker) -> String {
    format!("mqtts://127.0.0.1:{}", broker.port())
}

fn trusting(ca: &Path) -> MqttTlsOptions {
    MqttTlsOptions::new().ca_file(ca)
}

#[actix::test]
async fn tls_is_verified_and_its_errors_are_said() {
    let certificates = Certificates::new("tls");
    let ca = certificates.path("ca.pem");
    let broker = broker_with(&certificates.lines(false));
    let (service, _) = serve(server_options(&broker).url(secure(&broker)).tls(trusting(&ca)), [sum()]).await;
    let client =
        MqttClient::new(client_options(&broker).url(secure(&broker)).tls(trusting(&ca)).protocol_version(5));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let large: Vec<i64> = vec![1; 100_000];
    assert_eq!(client.send::<i64>("sum", &large).await.unwrap(), 100_000);
    client.close().await;
    service.stop(GRACE).await;
    // An authority that nobody vouches for; a broker without TLS; TLS that is not asked for.
    let others = Certificates::new("tls-others");
    let (kind, said) =
        call_error(client_options(&broker).url(secure(&broker)).tls(trusting(&others.path("ca.pem")))).await;
    assert_eq!(kind, SessionErrorKind::Fatal, "{said}");
    assert!(said.contains("option tls") && said.contains("certificate"), "{said}");
    let plain = broker_with("");
    let (_, said) = call_error(client_options(&plain).url(secure(&plain)).tls(trusting(&ca))).await;
    assert!(said.contains("option tls"), "{said}");
    let (_, said) = call_error(client_options(&broker)).await;
    assert!(said.contains("option url") && said.contains("TLS"), "{said}");
}

#[actix::test]
async fn a_broker_may_demand_a_certificate() {
    let certificates = Certificates::new("mutual");
    let broker = broker_with(&certificates.lines(true));
    let tls = trusting(&certificates.path("ca.pem"));
    let shown = tls.clone().certificate(certificates.path("client.pem"), certificates.path("client.key"));
    let (service, _) = serve(server_options(&broker).url(secure(&broker)).tls(shown.clone()), [sum()]).await;
    let client = MqttClient::new(client_options(&broker).url(secure(&broker)).tls(shown));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
    let (_, said) = call_error(client_options(&broker).url(secure(&broker)).tls(tls.clone())).await;
    assert!(said.contains("ertificate"), "{said}");
    let mismatch = tls.certificate(certificates.path("client.pem"), certificates.path("server.key"));
    let (kind, said) = call_error(client_options(&broker).url(secure(&broker)).tls(mismatch)).await;
    assert_eq!(kind, SessionErrorKind::Fatal, "{said}");
    assert!(said.contains("tls.keyFile"), "{said}");
}

/// Debian's mosquitto has no WebSocket: a bridge before it has.
async fn websocket_bridge(target: u16) -> (u16, tokio::task::JoinHandle<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let bridge = actix_rt::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            actix_rt::spawn(async move {
                #[allow(clippy::result_large_err)]
                let callback =
                    |request: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
                        assert_eq!(request.uri().path(), "/mqtt");
                        if let Some(protocol) = request.headers().get("Sec-WebSocket-Protocol") {
                            response.headers_mut().insert("Sec-WebSocket-Protocol", protocol.clone());
                        }
                        Ok(response)
                    };
                let Ok(socket) = async_tungstenite::tokio::accept_hdr_async(stream, callback).await else {
                    return;
                };
                let mut socket = WsAdapter::new(socket);
                let mut broker = tokio::net::TcpStream::connect(("127.0.0.1", target)).await.unwrap();
                broker.set_nodelay(true).unwrap();
                let _ = tokio::io::copy_bidirectional(&mut socket, &mut broker).await;
            });
        }
    });
    (port, bridge)
}

#[actix::test]
async fn websocket_carries_the_same_packets() {
    let broker = broker();
    let (port, bridge) = websocket_bridge(broker.port()).await;
    let url = format!("ws://127.0.0.1:{port}/mqtt");
    let (service, _) = serve(server_options(&broker).url(&url), [sum()]).await;
    let client = MqttClient::new(client_options(&broker).url(&url).protocol_version(5));
    let calls = (0..200).map(|number| client.send::<i64>("sum", [number, 1]));
    for (number, reply) in futures::future::join_all(calls).await.into_iter().enumerate() {
        assert_eq!(reply.unwrap(), number as i64 + 1);
    }
    let large: Vec<i64> = vec![1; 100_000];
    assert_eq!(client.send::<i64>("sum", &large).await.unwrap(), 100_000);
    client.close().await;
    service.stop(GRACE).await;
    bridge.abort();
    // A broker that speaks no WebSocket.
    let (_, said) =
        call_error(client_options(&broker).url(format!("ws://127.0.0.1:{}", broker.port()))).await;
    assert!(said.contains("option url") && said.contains("WebSocket"), "{said}");
}

#[actix::test]
async fn the_will_is_published_when_the_line_breaks_and_only_then() {
    let broker = broker();
    let mut raw = Raw::connect(&broker).await;
    raw.subscribe("gone").await;
    for version in [4, 5] {
        let relay = Relay::start(broker.port());
        let options = client_options(&broker)
            .url(format!("mqtt://127.0.0.1:{}", relay.port()))
            .protocol_version(version)
            .will(MqttWill::new("gone", "bye"));
        let client = MqttClient::new(options.clone());
        client.connect().await.unwrap();
        client.close().await;
        assert!(raw.is_silent().await);
        let client = MqttClient::new(options);
        client.connect().await.unwrap();
        relay.close();
        assert_eq!(raw.text().await, ("gone".to_owned(), "bye".to_owned()));
        client.close().await;
    }
}

/// MQTT-20: a broker that hangs is seen by what it does not say.
#[actix::test]
async fn a_frozen_broker_is_noticed_within_the_keepalive() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker).keepalive(1), [sum()]).await;
    let server = service.servers()[0].clone();
    let client = MqttClient::new(client_options(&broker).keepalive(1));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    // A quiet line is kept alive.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(server.status(), Some(ConnectionStatus::Connected));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    broker.freeze().unwrap();
    let begin = Instant::now();
    until("the server notices", || server.status() == Some(ConnectionStatus::Reconnecting)).await;
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    broker.thaw().unwrap();
    until("it is back", || server.status() == Some(ConnectionStatus::Connected)).await;
    let mut last = client.send::<i64>("sum", [2]).timeout(Duration::from_secs(1)).await;
    for _ in 0..20 {
        if last.is_ok() {
            break;
        }
        last = client.send::<i64>("sum", [2]).timeout(Duration::from_secs(1)).await;
    }
    assert_eq!(last.unwrap(), 2);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_broker_that_is_restarted_mid_call_ends_each_call_once_and_gets_every_route_back() {
    let mut broker = broker();
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
        let mut outcomes = std::collections::BTreeMap::new();
        for call in calls {
            let kind = call.await.unwrap().map_or_else(|error| error.kind(), |_| "value");
            *outcomes.entry(kind).or_insert(0) += 1;
        }
        assert_eq!(outcomes, std::collections::BTreeMap::from([("lost", 25), ("value", 25)]));
        assert_eq!(client.occupied(), 0);
        until("the loss is seen", || server.status() == Some(ConnectionStatus::Reconnecting)).await;
        broker.restart().unwrap();
        until("it is connected", || server.status() == Some(ConnectionStatus::Connected)).await;
        assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    }
    client.close().await;
    assert_eq!(client.status(), Some(ConnectionStatus::Closed));
    service.stop(GRACE).await;
}

/// MQTT-18: a drain takes what the broker has sent, and answers it.
#[actix::test]
async fn a_drain_loses_nothing_under_load() {
    let broker = broker();
    stop_under_load(
        || MqttServer::new(server_options(&broker)),
        |_| MqttClient::new(client_options(&broker).call_timeout(Duration::from_secs(2))),
        // Over MQTT 3.1.1 nobody says that there is nobody.
        |error| matches!(error, CallError::Timeout { .. }),
    )
    .await;
}

/// MQTT-18.
#[actix::test]
async fn events_that_were_published_before_a_drain_are_all_handled() {
    let broker = broker();
    let count = Arc::default();
    let (service, reports) = serve(server_options(&broker), [counting("evt", &count)]).await;
    let mut raw = Raw::connect(&broker).await;
    for number in 0..20_000u32 {
        raw.publish("evt", number.to_string()).await;
    }
    // A round trip: the broker has them all.
    raw.subscribe("probe").await;
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
    assert_eq!(count.load(Ordering::Relaxed), 20_000, "{report:?} {:?}", reports.all());
}

#[actix::test]
async fn a_handler_that_does_not_end_is_abandoned_after_the_grace_period() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker).max_in_flight(1), [slow()]).await;
    let client = client(&broker);
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let client = client.clone();
            actix_rt::spawn(async move {
                client.send::<u64>("slow", 60_000).timeout(Duration::from_secs(3)).await
            })
        })
        .collect();
    until("they are under way", || client.pending() == 3).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begin = Instant::now();
    let report = service.stop(Duration::from_millis(300)).await;
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert!(!report.clean);
    assert_eq!(report.abandoned().count(), 1, "{report:?}");
    for call in calls {
        call.await.unwrap().unwrap_err();
    }
    client.close().await;
}
