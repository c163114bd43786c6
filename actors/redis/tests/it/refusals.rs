// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is wrong from the start: one clear error that names the option. And TLS, where it is right.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use martlet_core::{CallError, Microservice, SessionErrorKind};
use martlet_redis::{RedisClient, RedisClientOptions, RedisServer, RedisServerOptions, RedisTlsOptions};
use martlet_testkit::broker::{Broker, BrokerCommand, free_port};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{GRACE, broker, client_options, serve, server_options, sum};

/// Why a server does not start, and a client does not connect: the same on both sides.
async fn refusal(server: RedisServerOptions, client: RedisClientOptions) -> String {
    let begin = Instant::now();
    let started = Microservice::new().handlers(sum()).server(RedisServer::new(server)).start().await;
    let server = started.expect_err("the server does not start").to_string();
    let client = RedisClient::new(client);
    let Err(CallError::NotSent { cause }) = client.connect().await else { panic!("it does not connect") };
    client.close().await;
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    assert!(server.ends_with(&cause.to_string()), "{server} / {cause}");
    cause.to_string()
}

async fn both(
    change: impl Fn(RedisServerOptions) -> RedisServerOptions,
    client: impl Fn(RedisClientOptions) -> RedisClientOptions,
) -> String {
    refusal(change(RedisServerOptions::new()), client(RedisClientOptions::new())).await
}

macro_rules! refused {
    ($options:ident => $change:expr) => {
        both(|$options| $change, |$options| $change).await
    };
}

#[actix::test]
async fn a_wrong_address_is_named() {
    let error = refused!(o => o.url("http://127.0.0.1:1"));
    assert!(error.contains("option url") && error.contains("must begin with redis://"), "{error}");
    let error = refused!(o => o.url("redis://me:secret@[zz"));
    assert!(error.contains("option url") && !error.contains("secret"), "{error}");
    let error = refused!(o => o.url("redis://127.0.0.1/notanumber"));
    assert!(error.contains("option url"), "{error}");
    let error = refused!(o => o.url("rediss://127.0.0.1:1/#insecure"));
    assert!(error.contains("option url"), "{error}");
    let port = free_port().unwrap();
    let error = refused!(o => o.host("127.0.0.1").port(port));
    let expected =
        format!("the broker cannot be reached (redis://127.0.0.1:{port}, options url, host and port)");
    assert!(error.contains(&expected), "{error}");
    let error = refused!(o => o.host("no.such.host.invalid"));
    assert!(error.contains("the broker cannot be reached"), "{error}");
}

#[actix::test]
async fn a_refused_login_is_told_without_the_password() {
    let broker = Broker::start(BrokerCommand::redis_with(&["--requirepass", "right"])).unwrap();
    let (host, port) = ("127.0.0.1", broker.port());
    let error = refused!(o => o.host(host).port(port).password("wr0ng"));
    assert!(
        error.contains("refused the credentials") && error.contains("options username and password"),
        "{error}"
    );
    assert!(error.contains("WRONGPASS") && !error.contains("wr0ng"), "{error}");
    let error = refused!(o => o.host(host).port(port));
    assert!(error.contains("refused the credentials") && error.contains("NOAUTH"), "{error}");
    let error = refused!(o => o.host(host).port(port).username("nobody").password("right"));
    assert!(error.contains("refused the credentials"), "{error}");
    let error = refused!(o => o.host(host).port(port).username("nobody"));
    assert!(error.contains("option username needs option password"), "{error}");
    let right = RedisServerOptions::new().url(format!("redis://:right@{host}:{port}"));
    let (service, _) = serve(right, [sum()]).await;
    let client = RedisClient::new(
        RedisClientOptions::new().host(host).port(port).username("default").password("right"),
    );
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_database_that_is_not_there_is_named() {
    let broker = broker();
    let error = refused!(o => o.host("127.0.0.1").port(broker.port()).db(99));
    assert!(error.contains("option db"), "{error}");
    let error = refused!(o => o.host("127.0.0.1").port(broker.port()).connection_name("no spaces"));
    assert!(error.contains("option connectionName"), "{error}");
}

#[actix::test]
async fn a_user_without_rights_hears_what_is_missing() {
    let users = "--user default on nopass ~* &* +@all \
                 --user reader on >p ~* resetchannels &sum &sum.reply +@all \
                 --user bare on >p ~* &* -@all +subscribe +unsubscribe +publish \
                 --user mute on >p ~* &* +@all -publish";
    let users: Vec<_> = users.split_whitespace().collect();
    let broker = Broker::start(BrokerCommand::redis_with(&users)).unwrap();
    let as_user = |user: &str| {
        (
            server_options(&broker).username(user).password("p"),
            client_options(&broker).username(user).password("p"),
        )
    };
    let (server, client) = as_user("reader");
    let started = Microservice::new()
        .handlers(sum())
        .handlers(crate::world::slow())
        .server(RedisServer::new(server.clone()))
        .start()
        .await;
    let error = started.expect_err("not allowed").to_string();
    assert!(error.contains("refused the subscription of slow") && error.contains("NOPERM"), "{error}");
    // What is allowed works, without the right to cancellations or to the replies of older wildcard servers.
    let (service, reports) = serve(server, [sum()]).await;
    let client = RedisClient::new(client);
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    // REDIS-8: what is not, ends the call.
    let error = client.send::<i64>("other", 1).await.unwrap_err();
    assert!(matches!(error, CallError::Remote(_)), "{error}");
    assert!(error.to_string().contains("refused the subscription of other.reply"), "{error}");
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3, "the session goes on");
    assert_eq!((client.occupied(), reports.all().len()), (0, 0), "{:?}", reports.all());
    client.close().await;
    // Nothing else is needed.
    let (server, options) = as_user("bare");
    let quick = Duration::from_millis(50);
    let (bare_service, bare_reports) = serve(server.ping_interval(quick), [sum()]).await;
    let bare = RedisClient::new(options.ping_interval(quick));
    for _ in 0..10 {
        assert_eq!(bare.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
        tokio::time::sleep(quick).await;
    }
    bare.close().await;
    assert!(bare_service.stop(GRACE).await.clean);
    assert_eq!(bare_reports.all(), Vec::<String>::new());
    let mute = RedisClient::new(as_user("mute").1);
    let error = mute.send::<i64>("sum", [1]).await.unwrap_err();
    assert!(
        error.to_string().contains("the broker refused the request") && error.to_string().contains("NOPERM"),
        "{error}"
    );
    let error = mute.emit("sum", [1]).await.unwrap_err();
    assert!(error.to_string().contains("the broker refused the event: NOPERM"), "{error}");
    mute.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn whoever_is_no_redis_server_is_recognised() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let web = actix_rt::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut some = [0; 1024];
            let _ = socket.read(&mut some).await;
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let error = refused!(o => o.host("127.0.0.1").port(port));
    assert!(error.contains("does not speak Redis's protocol") && error.contains("HTTP/1.1 400"), "{error}");
    web.abort();
}

#[actix::test]
async fn a_broker_that_does_not_answer_is_given_up_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let error = refused!(o => o.host("127.0.0.1").port(port).connect_timeout(Duration::from_millis(200)));
    assert!(
        error.contains("did not answer within 200ms") && error.contains("option connectTimeout"),
        "{error}"
    );
}

// === TLS ===

struct Files(PathBuf);

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Left behind at worst: a directory with test certificates.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An authority, a certificate for the broker, one for a client, and another authority.
fn certificates(name: &str) -> Files {
    let files = Files(std::env::temp_dir().join(format!("martlet-redis-{name}-{}", std::process::id())));
    std::fs::create_dir_all(&files.0).unwrap();
    let authority = || {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    };
    let write = |name: &str, text: String| std::fs::write(files.path(name), text).unwrap();
    let ca = authority();
    write("ca.pem", ca.pem());
    write("other.pem", authority().pem());
    for (name, host) in [("broker", "localhost"), ("client", "client")] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, host);
        let cert = params.signed_by(&key, &ca).unwrap();
        write(&format!("{name}.pem"), cert.pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
    files
}

fn tls_broker(files: &Files, auth_clients: &str) -> Broker {
    let (cert, key, ca) = (files.text("broker.pem"), files.text("broker.key"), files.text("ca.pem"));
    let auth_clients = auth_clients.to_owned();
    Broker::start(BrokerCommand::new("redis-server", "rediss", "apt-get install redis-server", move |port| {
        let port = port.to_string();
        [
            "--bind",
            "127.0.0.1",
            "--port",
            "0",
            "--tls-port",
            &port,
            "--save",
            "",
            "--appendonly",
            "no",
            "--tls-cert-file",
            &cert,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &ca,
            "--tls-auth-clients",
            &auth_clients,
        ]
        .map(str::to_owned)
        .to_vec()
    }))
    .unwrap()
}

#[actix::test]
async fn tls_with_a_private_authority_works_on_both_connections() {
    let files = certificates("tls");
    let broker = tls_broker(&files, "no");
    let url = format!("rediss://localhost:{}", broker.port());
    let tls = RedisTlsOptions::new().ca_file(files.path("ca.pem"));
    let (service, _) = serve(RedisServerOptions::new().url(&url).tls(tls.clone()), [sum()]).await;
    let options = RedisClientOptions::new().host("localhost").port(broker.port()).tls(tls);
    let client = RedisClient::new(options);
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    let large = vec![1i64; 300_000];
    assert_eq!(client.send::<i64>("sum", large).await.unwrap(), 300_000);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn a_certificate_of_our_own_is_shown() {
    let files = certificates("mtls");
    let broker = tls_broker(&files, "yes");
    let url = format!("rediss://localhost:{}", broker.port());
    let tls = RedisTlsOptions::new()
        .ca_file(files.path("ca.pem"))
        .certificate(files.path("client.pem"), files.path("client.key"));
    let (service, _) = serve(RedisServerOptions::new().url(&url).tls(tls), [sum()]).await;
    service.stop(GRACE).await;
    let without = RedisTlsOptions::new().ca_file(files.path("ca.pem"));
    let error = refused!(o => o.url(&url).tls(without.clone()));
    assert!(error.contains("options url and tls") && error.contains("CertificateRequired"), "{error}");
}

#[actix::test]
async fn a_wrong_certificate_is_not_trusted() {
    let files = certificates("wrong");
    let broker = tls_broker(&files, "no");
    let url = format!("rediss://localhost:{}", broker.port());
    let other = RedisTlsOptions::new().ca_file(files.path("other.pem"));
    let error = refused!(o => o.url(&url).tls(other.clone()));
    assert!(error.contains("TLS with the broker failed") && error.contains("options url and tls"), "{error}");
    let error = refused!(o => o.url(&url));
    assert!(error.contains("TLS with the broker failed"), "the platform does not trust it: {error}");
    let by_address = format!("rediss://127.0.0.1:{}", broker.port());
    let right = RedisTlsOptions::new().ca_file(files.path("ca.pem"));
    let error = refused!(o => o.url(&by_address).tls(right.clone()));
    assert!(error.contains("TLS with the broker failed"), "it is for localhost: {error}");
    let error = refused!(o => o.url(format!("redis://localhost:{}", broker.port())));
    assert!(error.contains("option tls"), "{error}");
    let plain = crate::world::broker();
    let url = format!("rediss://localhost:{}", plain.port());
    let moment = Duration::from_millis(300);
    let error = refused!(o => o.url(&url).tls(right.clone()).connect_timeout(moment));
    assert!(error.contains("does it speak TLS?"), "{error}");
}

#[actix::test]
async fn wrong_certificate_files_are_named() {
    let files = certificates("files");
    let url = "rediss://localhost:1";
    for (tls, named) in [
        (RedisTlsOptions::new().ca_file("/nowhere.pem"), "option tls.caFile: cannot read file"),
        (
            RedisTlsOptions::new().ca_file(files.path("broker.key")),
            "option tls.caFile holds no PEM certificate",
        ),
        (
            RedisTlsOptions::new().certificate(files.path("client.pem"), files.path("ca.pem")),
            "option tls.keyFile is not a PEM private key",
        ),
        (
            RedisTlsOptions::new().certificate(files.path("client.pem"), files.path("broker.key")),
            "option tls.keyFile does not fit option tls.certFile",
        ),
    ] {
        let error = refused!(o => o.url(url).tls(tls.clone()));
        assert!(error.contains(named), "{error}");
    }
    let mut alone = RedisTlsOptions::new();
    alone.cert_file = Some(files.path("client.pem"));
    let error = refused!(o => o.url(url).tls(alone.clone()));
    assert!(error.contains("options tls.certFile and tls.keyFile need each other"), "{error}");
}

#[test]
fn what_cannot_help_is_not_retried() {
    actix_rt::System::new().block_on(async {
        let broker = Broker::start(BrokerCommand::redis_with(&["--requirepass", "right"])).unwrap();
        let client = RedisClient::new(client_options(&broker));
        let Err(CallError::NotSent { cause }) = client.connect().await else { panic!("it is refused") };
        assert_eq!(cause.kind(), SessionErrorKind::Fatal);
        client.close().await;
    });
}
