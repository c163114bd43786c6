// SPDX-License-Identifier: MIT OR Apache-2.0

//! TLS: right and wrong certificates, on both sides; what is wrong is said on both sides.

use std::net::SocketAddr;
use std::time::Duration;

use martlet_core::CallError;
use martlet_tcp::{TcpClient, TcpClientOptions, TlsClientOptions, TlsServerOptions};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::time::timeout;

use crate::support::{Service, sum, within};

/// An authority that signs certificates.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A key and its certificate, as PEM texts.
struct Identity {
    key: String,
    cert: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    fn signs(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { key: key.serialize_pem(), cert }
    }
}

fn server(identity: &Identity) -> TlsServerOptions {
    TlsServerOptions::new(identity.key.clone(), identity.cert.clone())
}

async fn service(tls: TlsServerOptions) -> Service {
    Service::with(|it| it.tls_options = Some(tls)).await
}

async fn call(service: &Service, tls: TlsClientOptions) -> Result<i64, CallError> {
    let options = TcpClientOptions::new().address("127.0.0.1", service.port()).tls(tls);
    let client = TcpClient::new(options);
    let outcome = within(async { client.send::<i64>("sum", [1, 2]).await }).await.expect("an outcome");
    client.close().await;
    outcome
}

/// The call was not sent or got no reply, and its error contains the parts.
#[track_caller]
fn fails(outcome: Result<i64, CallError>, parts: &[&str]) {
    let error = outcome.unwrap_err();
    assert!(matches!(&error, CallError::NotSent { .. } | CallError::Lost { .. }), "{error:?}");
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text} lacks one of {parts:?}");
}

#[actix::test]
async fn both_sides_agree() {
    let authority = Authority::new("good");
    let service = service(server(&authority.signs(&["127.0.0.1", "localhost"], |_| {}))).await;
    assert!(service.running.url().starts_with("tcps://127.0.0.1:"), "{}", service.running.url());
    let options = TcpClientOptions::new()
        .address("127.0.0.1", service.port())
        .tls(TlsClientOptions::new(authority.pem.clone()));
    let client = TcpClient::new(options);
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    let text = "ż😀".repeat(200_000);
    assert_eq!(client.send::<String>("echo", &text).await.unwrap(), text);
    let calls = (0..1000_i64).map(|i| client.send::<i64>("sum", [i, 1]));
    assert!(futures::future::try_join_all(calls).await.unwrap().into_iter().eq(1..=1000));
    // Under another name than that of the address.
    let named = TlsClientOptions::new(authority.pem.clone()).servername("localhost");
    assert_eq!(call(&service, named).await.unwrap(), 3);
    client.close().await;
    assert_eq!(service.take_events(), Vec::<String>::new());
    service.stop().await;
}

/// What TLS has taken and the socket has not leaves, too, when there is room again.
#[actix::test]
async fn a_reply_reaches_a_peer_that_reads_slowly_to_its_end() {
    let authority = Authority::new("good");
    let service = service(server(&authority.signs(&["127.0.0.1"], |_| {}))).await;
    let slow = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = TcpClientOptions::new()
        .address("127.0.0.1", slow.local_addr().unwrap().port())
        .tls(TlsClientOptions::new(authority.pem.clone()));
    let target = SocketAddr::from(([127, 0, 0, 1], service.port()));
    actix_rt::spawn(async move {
        let (client, _) = slow.accept().await.unwrap();
        let server = TcpSocket::new_v4().unwrap();
        // Little is on its way, so that the server has to wait.
        server.set_recv_buffer_size(16 * 1024).unwrap();
        let server = server.connect(target).await.unwrap();
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        actix_rt::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
        let mut chunk = vec![0; 256 * 1024];
        loop {
            // Until the server can write no more; then all that there is.
            from_server.readable().await.unwrap();
            tokio::time::sleep(Duration::from_millis(60)).await;
            while let Ok(read) = timeout(Duration::from_millis(20), from_server.read(&mut chunk)).await {
                match read.unwrap() {
                    0 => return,
                    read => to_client.write_all(&chunk[..read]).await.unwrap(),
                }
            }
        }
    });
    let client = TcpClient::new(options);
    // Of some of these the end meets a full socket.
    for kib in (2048..4096).step_by(48) {
        let text = "x".repeat(kib << 10);
        let echo = client.send::<String>("echo", &text).timeout(Duration::from_secs(10)).await;
        assert!(echo.unwrap() == text);
    }
    client.close().await;
    service.stop().await;
}

#[actix::test]
async fn files_are_read() {
    let authority = Authority::new("good");
    let identity = authority.signs(&["127.0.0.1"], |_| {});
    let folder = std::env::temp_dir().join(format!("martlet-tls-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = |name: &str, text: &str| {
        std::fs::write(folder.join(name), text).unwrap();
        folder.join(name).to_str().unwrap().to_owned()
    };
    let tls = TlsServerOptions::new(path("key.pem", &identity.key), path("cert.pem", &identity.cert));
    let service = service(tls).await;
    let answer = call(&service, TlsClientOptions::new(path("ca.pem", &authority.pem))).await;
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(answer.unwrap(), 3);
    service.stop().await;
    let missing = TlsServerOptions::new("/no/such/key.pem", identity.cert.clone());
    let options = martlet_tcp::TcpServerOptions::new().address("127.0.0.1", 0).tls(missing);
    let error = Service::try_start(options).await.err().unwrap().to_string();
    // The system's own words, once.
    let told =
        r#"tlsOptions.key: cannot read file "/no/such/key.pem": No such file or directory (os error 2)"#;
    assert!(error.ends_with(told), "{error}");
    let mut forgotten = TlsServerOptions::default();
    forgotten.key = identity.key.into();
    let options = martlet_tcp::TcpServerOptions::new().address("127.0.0.1", 0).tls(forgotten);
    let error = Service::try_start(options).await.err().unwrap().to_string();
    assert!(error.ends_with("tlsOptions.cert is required: a PEM text, or a file with one"), "{error}");
}

#[actix::test]
async fn an_authority_s_own_certificate_is_no_server_s_and_that_is_explained() {
    let authority = Authority::new("good");
    let own = authority.signs(&["127.0.0.1"], |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    let service = service(server(&own)).await;
    let outcome = call(&service, TlsClientOptions::new(authority.pem)).await;
    fails(outcome, &["tls handshake failed", "an authority's own", "sign another one"]);
    service.reports(&["session", "tls handshake failed"]).await;
    service.stop().await;
}

#[actix::test]
async fn an_authority_that_the_client_does_not_know() {
    let (good, other) = (Authority::new("good"), Authority::new("other"));
    let service = service(server(&good.signs(&["127.0.0.1"], |_| {}))).await;
    fails(call(&service, TlsClientOptions::new(other.pem)).await, &["tls handshake failed", "UnknownIssuer"]);
    service.reports(&["session", "tls handshake failed", "UnknownCA"]).await;
    assert_eq!(call(&service, TlsClientOptions::new(good.pem)).await.unwrap(), 3);
    service.stop().await;
}

#[actix::test]
async fn a_certificate_that_has_expired() {
    let authority = Authority::new("good");
    let expired = authority.signs(&["127.0.0.1"], |params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    let service = service(server(&expired)).await;
    fails(call(&service, TlsClientOptions::new(authority.pem)).await, &["tls handshake failed", "expired"]);
    service.reports(&["session", "tls handshake failed", "CertificateExpired"]).await;
    service.stop().await;
}

#[actix::test]
async fn a_certificate_for_another_name() {
    let authority = Authority::new("good");
    let service = service(server(&authority.signs(&["elsewhere.example"], |_| {}))).await;
    let outcome = call(&service, TlsClientOptions::new(authority.pem.clone())).await;
    fails(outcome, &["tls handshake failed", "not valid for name", "127.0.0.1", "elsewhere.example"]);
    service.reports(&["session", "tls handshake failed"]).await;
    let named = TlsClientOptions::new(authority.pem).servername("elsewhere.example");
    assert_eq!(call(&service, named).await.unwrap(), 3);
    service.stop().await;
}

#[actix::test]
async fn client_certificates() {
    let (authority, clients, other) =
        (Authority::new("good"), Authority::new("clients"), Authority::new("other"));
    let tls = server(&authority.signs(&["127.0.0.1"], |_| {})).client_ca(clients.pem.clone());
    let service = service(tls).await;
    let trusting = || TlsClientOptions::new(authority.pem.clone());
    let known = clients.signs(&["a-client"], |_| {});
    assert_eq!(call(&service, trusting().identity(known.key, known.cert)).await.unwrap(), 3);
    fails(call(&service, trusting()).await, &["CertificateRequired"]);
    service.reports(&["session", "tls handshake failed", "peer sent no certificates"]).await;
    let wrong = other.signs(&["a-client"], |_| {});
    fails(call(&service, trusting().identity(wrong.key, wrong.cert)).await, &["UnknownCA"]);
    service.reports(&["session", "tls handshake failed", "UnknownIssuer"]).await;
    let expired = clients.signs(&["a-client"], |params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    fails(call(&service, trusting().identity(expired.key, expired.cert)).await, &["CertificateExpired"]);
    service.reports(&["session", "tls handshake failed", "expired"]).await;
    service.stop().await;
}

#[actix::test]
async fn client_certificates_that_are_only_asked_for() {
    let (authority, clients) = (Authority::new("good"), Authority::new("clients"));
    let mut tls = server(&authority.signs(&["127.0.0.1"], |_| {})).client_ca(clients.pem.clone());
    tls.reject_unauthorized = false;
    let service = service(tls).await;
    assert_eq!(call(&service, TlsClientOptions::new(authority.pem)).await.unwrap(), 3);
    service.stop().await;
}

#[actix::test]
async fn plain_and_encrypted_do_not_mix() {
    let authority = Authority::new("good");
    let encrypted = service(server(&authority.signs(&["127.0.0.1"], |_| {}))).await;
    let mut raw = encrypted.raw().await;
    raw.send(&sum("a", &[1])).await;
    // An alert at most, then the end.
    let mut answer = Vec::new();
    within(raw.0.read_to_end(&mut answer)).await.expect("the server to close").unwrap();
    assert!(answer.len() < 16, "{answer:?}");
    encrypted.reports(&["session", "tls handshake failed", "does not speak TLS here"]).await;
    let client = TcpClient::connect_to("127.0.0.1", encrypted.port());
    let outcome = within(async { client.send::<i64>("sum", [1, 2]).await }).await.expect("an outcome");
    assert!(matches!(outcome, Err(CallError::Lost { .. })), "{outcome:?}");
    client.close().await;
    encrypted.stop().await;

    let plain = Service::with(|_| {}).await;
    let options = TcpClientOptions::new()
        .address("127.0.0.1", plain.port())
        .tls(TlsClientOptions::new(authority.pem.clone()))
        .with(|it| it.connect_timeout = std::time::Duration::from_millis(500));
    let client = TcpClient::new(options);
    let outcome = within(async { client.send::<i64>("sum", [1, 2]).await }).await.expect("an outcome");
    assert!(matches!(&outcome, Err(CallError::NotSent { .. })), "{outcome:?}");
    client.close().await;
    plain.serves_others().await;
    plain.stop().await;
}

#[actix::test]
async fn a_handshake_that_does_not_end() {
    let authority = Authority::new("good");
    let tls = server(&authority.signs(&["127.0.0.1"], |_| {}));
    let service = Service::with(|it| {
        it.tls_options = Some(tls);
        it.handshake_timeout = std::time::Duration::from_millis(150);
    })
    .await;
    let mut raw = service.raw().await;
    raw.0.write_all(&[0x16, 0x03]).await.unwrap();
    let mut answer = Vec::new();
    within(raw.0.read_to_end(&mut answer)).await.expect("the server to close").unwrap();
    service.reports(&["session", "no handshake within 150ms"]).await;
    assert_eq!(call(&service, TlsClientOptions::new(authority.pem)).await.unwrap(), 3);
    service.stop().await;
}

#[actix::test]
async fn options_that_make_no_sense_are_refused_at_start() {
    let authority = Authority::new("good");
    let (one, two) = (authority.signs(&["127.0.0.1"], |_| {}), authority.signs(&["127.0.0.1"], |_| {}));
    let mut no_ca = server(&one);
    no_ca.request_cert = true;
    let cases = [
        (
            TlsServerOptions::new(one.key.clone(), two.cert.clone()),
            "tlsOptions.key does not fit tlsOptions.cert",
        ),
        (
            TlsServerOptions::new(one.cert.clone(), one.cert.clone()),
            "tlsOptions.key is not a PEM private key",
        ),
        (TlsServerOptions::new(one.key.clone(), one.key.clone()), "tlsOptions.cert holds no PEM certificate"),
        (no_ca, "tlsOptions.requestCert needs tlsOptions.ca"),
    ];
    for (tls, reason) in cases {
        let options = martlet_tcp::TcpServerOptions::new().address("127.0.0.1", 0).tls(tls);
        let error = Service::try_start(options).await.err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
        // Keys are never shown.
        assert!(!error.contains("BEGIN"), "{error}");
    }
    let no_ca = TcpClientOptions::new().address("127.0.0.1", 1).tls(TlsClientOptions::new(""));
    let error = TcpClient::new(no_ca).send::<i64>("sum", [1]).await.unwrap_err();
    assert!(error.to_string().contains("tlsOptions.ca is required"), "{error}");
}
