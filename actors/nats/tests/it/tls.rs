// SPDX-License-Identifier: MIT OR Apache-2.0
//! TLS: client certificates, a broker that begins with TLS, and what is said of wrong and missing files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use martlet_core::SessionErrorKind;
use martlet_nats::{NatsClient, NatsClientOptions, NatsServerOptions, NatsTlsOptions};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

use crate::broker::Broker;
use crate::world::{GRACE, call_error, client_options, serve, server_options, start_error, sum};

/// PEM files in a directory of their own.
struct Files(PathBuf);

impl Files {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("martlet-nats-pem-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn authority(&self, name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let file = self.write(&format!("{name}.pem"), &params.self_signed(&key).unwrap().pem());
        Authority { file, issuer: Issuer::new(params, key) }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Left behind at worst: a directory of certificates for tests.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Authority {
    file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// The files of a certificate and of its key.
struct Identity {
    cert: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn signs(&self, files: &Files, name: &str) -> Identity {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity {
            cert: files.write(&format!("{name}-cert.pem"), &cert),
            key: files.write(&format!("{name}-key.pem"), &key.serialize_pem()),
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn trusting(authority: &Authority) -> NatsTlsOptions {
    NatsTlsOptions::new().ca_file(&authority.file)
}

async fn works(server: NatsServerOptions, client: NatsClientOptions) {
    let (service, _) = serve(server, [sum()]).await;
    let client = NatsClient::new(client);
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop(GRACE).await;
}

/// Neither a service nor a client connects with these options; the reason has these parts.
async fn fails(broker: &Broker, tls: NatsTlsOptions, parts: &[&str]) {
    let server = start_error(server_options(broker).tls(tls.clone())).await;
    let client = call_error(client_options(broker).tls(tls)).await;
    for (kind, text) in [server, client] {
        assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{text} lacks one of {parts:?}");
    }
}

#[actix::test]
async fn client_certificates_are_shown_and_their_errors_name_the_options() {
    let files = Files::new();
    let (good, other) = (files.authority("good"), files.authority("other"));
    let server = good.signs(&files, "broker");
    let broker = Broker::start_with(&[
        "--tlsverify",
        "--tlscert",
        text(&server.cert),
        "--tlskey",
        text(&server.key),
        "--tlscacert",
        text(&good.file),
    ]);
    let mine = good.signs(&files, "mine");
    let tls = trusting(&good).certificate(&mine.cert, &mine.key);
    works(server_options(&broker).tls(tls.clone()), client_options(&broker).tls(tls)).await;
    // None; of an authority that the broker does not trust.
    let asks = "the broker asks for a certificate: options tls.certFile and tls.keyFile";
    fails(&broker, trusting(&good), &["TLS", asks]).await;
    let strange = other.signs(&files, "strange");
    let tls = trusting(&good).certificate(&strange.cert, &strange.key);
    fails(&broker, tls, &["TLS", "does not accept the certificate of option tls.certFile"]).await;
    // The broker's authority is not ours to trust.
    let tls = trusting(&other).certificate(&mine.cert, &mine.key);
    fails(&broker, tls, &["TLS", "option tls.caFile names the authorities to trust"]).await;
    // The key of another certificate; one of the two alone.
    let tls = trusting(&good).certificate(&mine.cert, &strange.key);
    fails(&broker, tls, &["options tls.certFile and tls.keyFile do not belong together"]).await;
    let mut tls = trusting(&good);
    tls.cert_file = Some(mine.cert.clone());
    fails(&broker, tls, &["options tls.certFile and tls.keyFile need each other"]).await;
    // Files that are not there, or not what they should be: told before anything is sent.
    let nowhere = Path::new("/nowhere/x.pem");
    let said = |option| [option, "/nowhere/x.pem", "No such file"];
    fails(&broker, NatsTlsOptions::new().ca_file(nowhere), &said("option tls.caFile")).await;
    fails(&broker, trusting(&good).certificate(nowhere, &mine.key), &said("option tls.certFile")).await;
    fails(&broker, trusting(&good).certificate(&mine.cert, nowhere), &said("option tls.keyFile")).await;
    let tls = NatsTlsOptions::new().ca_file(&mine.key);
    fails(&broker, tls, &["option tls.caFile", "mine-key.pem", "no certificate in it"]).await;
    let tls = trusting(&good).certificate(&mine.key, &mine.key);
    fails(&broker, tls, &["option tls.certFile", "no certificate in it"]).await;
    let tls = trusting(&good).certificate(&mine.cert, &mine.cert);
    fails(&broker, tls, &["option tls.keyFile", "no private key in it"]).await;
}

/// A front for a plain broker that begins with TLS, before the broker's first word. (nats-server has
/// `handshake_first` since 2.10.4; what it puts on the wire is what this does.)
struct TlsFirst {
    port: u16,
    task: AbortHandle,
}

impl TlsFirst {
    async fn start(broker: u16, identity: &Identity) -> Self {
        let chain: Vec<_> =
            CertificateDer::pem_file_iter(&identity.cert).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(&identity.key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = actix_rt::spawn(async move {
            while let Ok((peer, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                actix_rt::spawn(async move {
                    let Ok(mut peer) = acceptor.accept(peer).await else { return };
                    let mut broker = TcpStream::connect(("127.0.0.1", broker)).await.unwrap();
                    // It ends with either side.
                    let _ = tokio::io::copy_bidirectional(&mut peer, &mut broker).await;
                });
            }
        });
        Self { port, task: task.abort_handle() }
    }

    fn servers(&self) -> [String; 1] {
        [format!("nats://127.0.0.1:{}", self.port)]
    }
}

impl Drop for TlsFirst {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[actix::test]
async fn a_broker_may_begin_with_tls() {
    let files = Files::new();
    let authority = files.authority("good");
    let broker = Broker::start();
    let front = TlsFirst::start(broker.port, &authority.signs(&files, "broker")).await;
    let first = trusting(&authority).handshake_first(true);
    let server = |tls| server_options(&broker).servers(front.servers()).tls(tls);
    let client = |tls| client_options(&broker).servers(front.servers()).tls(tls);
    works(server(first.clone()), client(first.clone())).await;
    // Without the option each end waits for the other's first word.
    let late = trusting(&authority);
    let timeout = Duration::from_millis(300);
    for (kind, text) in [
        start_error(server(late.clone()).timeout(timeout)).await,
        call_error(client(late).timeout(timeout)).await,
    ] {
        assert_eq!(kind, SessionErrorKind::Refused, "{text}");
        assert!(text.contains("option timeout") && text.contains("option tls.handshakeFirst"), "{text}");
    }
    // With it, to a broker that does not begin with TLS.
    fails(&broker, first, &["TLS", "option tls.handshakeFirst is for a broker that begins with TLS"]).await;
}
