// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logging in: nkeys, credentials with a JWT, and what is said of wrong and missing ones.

use std::path::PathBuf;
use std::time::Duration;

use martlet_core::{ConnectionStatus, SessionErrorKind};
use martlet_nats::{NatsClient, NatsClientOptions, NatsServerOptions};
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::broker::Broker;
use crate::world::{GRACE, call_error, client_options, serve, server_options, start_error, sum, until};

/// An operator, an account of it, and users of that: a broker's JWT authentication.
struct Operator {
    operator: KeyPair,
    account: KeyPair,
}

/// URL-safe base 64 without padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().enumerate().fold(0u32, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        for digit in 0..=chunk.len() {
            text.push(char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    text
}

/// A JWT in which `issuer` says something of `subject`. It does not expire unless `expires` says so.
fn jwt(issuer: &KeyPair, subject: &KeyPair, expires: Option<u64>, nats: Value) -> String {
    let header = json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let mut claims = json!({
        "jti": "test", "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject.public_key(),
        "name": "test", "nats": nats,
    });
    if let Some(expires) = expires {
        claims["exp"] = expires.into();
    }
    let signed =
        format!("{}.{}", base64(header.to_string().as_bytes()), base64(claims.to_string().as_bytes()));
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", base64(&signature))
}

/// The content of a `.creds` file.
fn creds(jwt: &str, user: &KeyPair) -> String {
    format!(
        "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        user.seed().unwrap()
    )
}

impl Operator {
    fn new() -> Self {
        Self { operator: KeyPair::new_operator(), account: KeyPair::new_account() }
    }

    fn broker(&self) -> Broker {
        Broker::configured(&self.config(), &[])
    }

    /// What a broker is told to trust.
    fn config(&self) -> String {
        let operator = jwt(&self.operator, &self.operator, None, json!({"type": "operator", "version": 2}));
        let none = -1;
        let limits = json!({
            "subs": none, "data": none, "payload": none, "imports": none, "exports": none,
            "wildcards": true, "conn": none, "leaf": none,
        });
        let account = json!({"type": "account", "version": 2, "limits": limits});
        let account = jwt(&self.operator, &self.account, None, account);
        let name = self.account.public_key();
        format!("operator: {operator}\nresolver: MEMORY\nresolver_preload: {{ {name}: {account} }}\n")
    }

    /// Credentials of a user of the account.
    fn user(&self, expires: Option<u64>) -> String {
        let user = KeyPair::new_user();
        let none = -1;
        let nats = json!({"type": "user", "version": 2, "subs": none, "data": none, "payload": none});
        creds(&jwt(&self.account, &user, expires, nats), &user)
    }
}

struct File(PathBuf);

impl File {
    fn new(name: &str, content: &str) -> Self {
        let path = std::env::temp_dir().join(format!("martlet-nats-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // Left behind at worst: a file for tests.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A service and a client log in; one calls the other.
async fn works(server: NatsServerOptions, client: NatsClientOptions) {
    let (service, _) = serve(server, [sum()]).await;
    let client = NatsClient::new(client);
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop(GRACE).await;
}

/// Neither a service nor a client gets in, for good; the reason has these parts and no secret.
async fn fails(server: NatsServerOptions, client: NatsClientOptions, parts: &[&str], secrets: &[&str]) {
    for (kind, text) in [start_error(server).await, call_error(client).await] {
        assert_eq!(kind, SessionErrorKind::Fatal, "{text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{text} lacks one of {parts:?}");
        assert!(!secrets.iter().any(|secret| text.contains(secret)), "{text}");
    }
}

#[actix::test]
async fn an_nkey_logs_in() {
    let (user, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    let config = format!("authorization {{ users = [ {{ nkey: {} }} ] }}\n", user.public_key());
    let broker = Broker::configured(&config, &[]);
    let server = |nkey: &str| server_options(&broker).nkey(nkey);
    let client = |nkey: &str| client_options(&broker).nkey(nkey);
    let seed = user.seed().unwrap();
    // White space around it, as from a file, is no part of a seed.
    works(server(&seed), client(&format!("{seed}\n"))).await;
    // Known to nobody; none at all.
    let other = stranger.seed().unwrap();
    let refused = "the broker refused the credentials";
    fails(server(&other), client(&other), &[refused, "option nkey"], &[&other]).await;
    fails(server_options(&broker), client_options(&broker), &[refused, "no option gives any"], &[]).await;
    // No seed, the public key, the seed of an account: told before anything is sent.
    fails(server("SUAX"), client("SUAX"), &["option nkey", "not the seed"], &["SUAX"]).await;
    let public = user.public_key();
    fails(server(&public), client(&public), &["option nkey", "public key", "seed (SU…)"], &[&public]).await;
    let account = KeyPair::new_account().seed().unwrap();
    fails(server(&account), client(&account), &["option nkey", "Account", "SU…"], &[&account]).await;
}

#[actix::test]
async fn credentials_with_a_jwt_log_in_as_text_and_as_file() {
    let operator = Operator::new();
    let broker = operator.broker();
    let creds = operator.user(None);
    let file = File::new("user.creds", &creds);
    works(server_options(&broker).credentials(&creds), client_options(&broker).credentials_file(&file.0))
        .await;
    works(server_options(&broker).credentials_file(&file.0), client_options(&broker).credentials(&creds))
        .await;
}

#[actix::test]
async fn a_credentials_file_is_read_anew_at_every_connect() {
    let operator = Operator::new();
    let mut broker = operator.broker();
    let file = File::new("renewed.creds", &operator.user(None));
    let (service, reports) = serve(server_options(&broker).credentials_file(&file.0), [sum()]).await;
    let client = NatsClient::new(client_options(&broker).credentials_file(&file.0));
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let server = service.servers()[0].clone();
    let both = || [server.status(), client.status()];
    // The broker is of another operator when it is back, and the file has credentials of that.
    broker.stop();
    until("the loss is seen", || !both().contains(&Some(ConnectionStatus::Connected))).await;
    let other = Operator::new();
    std::fs::write(&file.0, other.user(None)).unwrap();
    broker.reconfigure(&other.config());
    broker.restart();
    until("they are connected", || both() == [Some(ConnectionStatus::Connected); 2]).await;
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1, "{:?}", reports.all());
    client.close().await;
    service.stop(GRACE).await;
}

/// NATS-23: the broker is back before the file has its new credentials.
#[actix::test]
async fn credentials_that_were_good_are_tried_once_more() {
    let operator = Operator::new();
    for renewed in [true, false] {
        let mut broker = operator.broker();
        let file = File::new("late.creds", &operator.user(None));
        let options =
            server_options(&broker).reconnect_time_wait(Duration::from_secs(1)).max_reconnect_attempts(-1);
        let (service, reports) = serve(options.credentials_file(&file.0), [sum()]).await;
        let server = service.servers()[0].clone();
        let other = Operator::new();
        broker.stop();
        broker.reconfigure(&other.config());
        broker.restart();
        until("it is refused", || reports.contain("the broker refused the credentials")).await;
        assert_eq!(server.status(), Some(ConnectionStatus::Reconnecting));
        if renewed {
            std::fs::write(&file.0, other.user(None)).unwrap();
            until("it is connected", || server.status() == Some(ConnectionStatus::Connected)).await;
            service.stop(GRACE).await;
        } else {
            until("it gives up", || reports.contain("gave up")).await;
            let refusals =
                reports.all().iter().filter(|it| it.contains("session ended: the broker refused")).count();
            assert_eq!(refusals, 2, "{:?}", reports.all());
        }
    }
}

#[actix::test]
async fn wrong_credentials_are_fatal_and_name_their_option() {
    let operator = Operator::new();
    let broker = operator.broker();
    let text = |creds: &str| {
        (server_options(&broker).credentials(creds), client_options(&broker).credentials(creds))
    };
    let file = |path: &PathBuf| {
        (server_options(&broker).credentials_file(path), client_options(&broker).credentials_file(path))
    };
    let refused = "the broker refused the credentials";
    // Of another operator; expired; the JWT of one user with the seed of another.
    let jwt_of_another = {
        let (mine, other) = (operator.user(None), operator.user(None));
        let seed_at = |creds: &str| creds.find("-----BEGIN USER").unwrap();
        format!("{}{}", &mine[..seed_at(&mine)], &other[seed_at(&other)..])
    };
    let expired = operator.user(Some(1_700_000_001));
    for creds in [Operator::new().user(None), expired, jwt_of_another] {
        let (server, client) = text(&creds);
        fails(server, client, &[refused, "option credentials"], &["SU", "eyJ"]).await;
        let at = File::new("wrong.creds", &creds);
        let (server, client) = file(&at.0);
        fails(server, client, &[refused, "option credentialsFile"], &["SU", "eyJ"]).await;
    }
    fails(server_options(&broker), client_options(&broker), &[refused, "no option gives any"], &[]).await;
    // No credentials at all, told before anything is sent.
    let (server, client) = text("nothing");
    fails(server, client, &["option credentials:", "JWT"], &[]).await;
    let nothing = File::new("nothing.creds", "nothing");
    let (server, client) = file(&nothing.0);
    fails(server, client, &["option credentialsFile", "nothing.creds", "JWT"], &[]).await;
    let (server, client) = file(&PathBuf::from("/nowhere/user.creds"));
    fails(server, client, &["option credentialsFile", "/nowhere/user.creds", "No such file"], &[]).await;
}

#[actix::test]
async fn options_that_do_not_go_together_are_refused() {
    let broker = Broker::start();
    let server = || server_options(&broker);
    let client = || client_options(&broker);
    let creds = Operator::new().user(None);
    let nkey = KeyPair::new_user().seed().unwrap();
    let parts = ["options credentials and nkey exclude each other"];
    fails(server().nkey(&nkey).credentials(&creds), client().nkey(&nkey).credentials(&creds), &parts, &[])
        .await;
    let parts = ["options credentials and credentialsFile exclude each other"];
    let both = (
        server().credentials(&creds).credentials_file("x"),
        client().credentials(&creds).credentials_file("x"),
    );
    fails(both.0, both.1, &parts, &[]).await;
    fails(server().pass("p"), client().pass("p"), &["option pass needs option user"], &[]).await;
}

#[actix::test]
async fn wrong_users_and_tokens_name_their_option() {
    let refused = "the broker refused the credentials";
    let broker = Broker::start_with(&["--auth", "right"]);
    works(server_options(&broker).token("right"), client_options(&broker).token("right")).await;
    let url = |user: &str| [format!("nats://{user}@127.0.0.1:{}", broker.port)];
    works(server_options(&broker).servers(url("right")), client_options(&broker).servers(url("right"))).await;
    let parts = [refused, "option token"];
    fails(server_options(&broker).token("wr0ng"), client_options(&broker).token("wr0ng"), &parts, &["wr0ng"])
        .await;
    let (server, client) =
        (server_options(&broker).servers(url("wr0ng")), client_options(&broker).servers(url("wr0ng")));
    fails(server, client, &[refused, "the url's user, taken as a token"], &["wr0ng"]).await;
    let (server, client) =
        (server_options(&broker).servers(url("me:wr0ng")), client_options(&broker).servers(url("me:wr0ng")));
    fails(server, client, &[refused, "user and password of the url"], &["wr0ng"]).await;
    let broker = Broker::start_with(&["--user", "me", "--pass", "right"]);
    let (server, client) =
        (server_options(&broker).user("me").pass("wr0ng"), client_options(&broker).user("me").pass("wr0ng"));
    fails(server, client, &[refused, "options user and pass"], &["wr0ng"]).await;
}
