// SPDX-License-Identifier: MIT OR Apache-2.0
//! The right-hand sides of the tables of `docs/migrating.md`, as written there: they compile, and do what the left-hand
//! sides do.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream;
use martlet::interceptor::{catch_and_map, guard, pipe, timeout};
use martlet::prelude::*;
use martlet::tcp::{TcpClientOptions, TcpServerOptions};
use martlet::{
    Cancellation, ClientOptions, Deadline, FromRequest, HandlerGroup, Payload, Record, Request,
    RunningService, Server,
};
use serde_json::{Value, json};

/// A service on TCP and a client of it.
async fn serve(service: Microservice) -> (RunningService, ClientProxy) {
    let service = service.on_current_arbiter().server(TcpServer::bind("127.0.0.1", 0)).start().await.unwrap();
    let client = Transport::from_url(&service.url()).unwrap().into_client().unwrap();
    (service, client)
}

async fn end(service: RunningService, client: ClientProxy) {
    client.close().await;
    assert!(service.stop(Duration::from_secs(5)).await.clean);
}

/// What the caller reads.
async fn refused(client: &ClientProxy, pattern: &str) -> Value {
    match client.send::<Value>(pattern, 1).await {
        Err(CallError::Remote(error)) => error.decode().unwrap(),
        other => panic!("a remote error expected, got {other:?}"),
    }
}

// === arguments ===

/// Request-scoped: made for each request.
struct Scoped(String);

impl FromRequest for Scoped {
    async fn from_request(request: &Request) -> Result<Self, RpcError> {
        Ok(Self(request.property::<String>("email").map_err(|_| "no address")?))
    }
}

struct Arguments;

#[controller]
impl Arguments {
    #[message_pattern("property")]
    fn property(&self, #[payload("email")] email: String) -> String {
        email
    }

    #[message_pattern("by_hand")]
    fn by_hand(&self, request: Request) -> Result<String, RpcError> {
        request.property("email").map_err(|error| RpcError::message(error.to_string()))
    }

    #[message_pattern("context")]
    fn context(
        &self,
        context: Ctx<TcpContext>,
        pattern: Pattern,
        metadata: Metadata,
    ) -> (bool, String, bool) {
        let ours = metadata.get("tenant") == Some("acme");
        (context.remote_addr.ip().is_loopback(), pattern.route().to_string(), ours)
    }

    #[message_pattern("providers")]
    fn providers(
        &self,
        State(one): State<u64>,
        _: Deadline,
        _: Cancellation,
        scoped: Scoped,
    ) -> (u64, String) {
        (*one, scoped.0)
    }
}

#[actix::test]
async fn arguments() {
    let service = Microservice::new().controller(|| Arguments).state(7_u64);
    let (service, client) = serve(service).await;
    let email = json!({ "email": "a@b" });
    assert_eq!(client.send::<String>("property", &email).await.unwrap(), "a@b");
    assert_eq!(client.send::<String>("by_hand", &email).await.unwrap(), "a@b");
    let seen = client.send::<(bool, String, bool)>("context", ()).metadata("tenant", "acme").await.unwrap();
    assert_eq!(seen, (true, "context".to_owned(), true));
    assert_eq!(client.send::<(u64, String)>("providers", &email).await.unwrap(), (7, "a@b".to_owned()));
    end(service, client).await;
}

// === around handlers ===

#[actix::test]
async fn around_handlers() {
    let ok = |pattern: &'static str| {
        message(pattern, |Data(data): Data<Value>| async move { Ok::<_, RpcError>(data) })
    };
    let slow = message("slow", || async {
        tokio::time::sleep(Duration::from_secs(60)).await;
        Ok::<_, RpcError>(1)
    });
    let fails = message("fails", || async { Err::<(), _>(RpcError::message("one")) });
    let service = Microservice::new()
        .interceptor(timeout(Duration::from_millis(50)))
        .handlers(ok("guarded").interceptor(guard(|_| async { Ok(false) })))
        .handlers(ok("piped").interceptor(pipe(|request| {
            request.set_payload(Payload::encode(request.format(), &2).map_err(RpcError::unexpected)?);
            Ok(())
        })))
        .handlers(slow)
        .handlers(fails.interceptor(catch_and_map(|_| Err(RpcError::message("two")))));
    let (service, client) = serve(service).await;
    assert_eq!(refused(&client, "guarded").await["message"], "Forbidden resource");
    assert_eq!(client.send::<u64>("piped", 1).await.unwrap(), 2);
    assert_eq!(refused(&client, "slow").await["status"], "error");
    assert_eq!(refused(&client, "fails").await["message"], "two");
    end(service, client).await;
}

// === errors ===

#[derive(Debug, thiserror::Error, RpcError)]
enum Own {
    #[error("no order {0}")]
    #[rpc(code = "NOT_FOUND")]
    Missing(u32),
}

fn asks_the_database() -> Result<(), std::io::Error> {
    Err(std::io::Error::other("secret"))
}

#[actix::test]
async fn errors() {
    let service = Microservice::new()
        .handlers(message("message", || async { Err::<(), _>(RpcError::message("boom")) }))
        .handlers(message("text", || async { Err::<(), RpcError>("boom".into()) }))
        .handlers(message("object", || async { Err::<(), _>(RpcError::json(json!({ "code": 42 }))) }))
        .handlers(message("unexpected", || async {
            Err::<(), _>(Unexpected::from(std::io::Error::other("secret")))
        }))
        .handlers(message("question_mark", || async {
            asks_the_database()?;
            Ok::<_, Unexpected>(())
        }))
        .handlers(message("own", || async { Err::<(), _>(Own::Missing(7)) }))
        .handlers(message("panic", || async {
            if true {
                panic!("deliberate panic");
            }
            Ok::<_, RpcError>(())
        }));
    let (service, client) = serve(service).await;
    for (pattern, reads) in [
        ("message", json!({ "status": "error", "message": "boom" })),
        ("text", json!({ "status": "error", "message": "boom" })),
        ("object", json!({ "code": 42 })),
        ("unexpected", json!({ "status": "error", "message": "Internal server error" })),
        ("question_mark", json!({ "status": "error", "message": "Internal server error" })),
        ("own", json!({ "status": "error", "message": "no order 7", "code": "NOT_FOUND" })),
        ("panic", json!({ "status": "error", "message": "Internal server error" })),
    ] {
        assert_eq!(refused(&client, pattern).await, reads, "{pattern}");
    }
    end(service, client).await;
}

// === replies ===

#[actix::test]
async fn replies() {
    let numbers = |to: u64| stream::iter(1..=to);
    let service = Microservice::new()
        .handlers(message("undefined", || async { Ok::<_, RpcError>(()) }))
        .handlers(message("null", || async { Ok::<_, RpcError>(None::<u64>) }))
        .handlers(message("values", move || async move { Ok::<_, RpcError>(Streaming(numbers(3))) }))
        .handlers(message("fallible", move || async move {
            Ok::<_, RpcError>(TryStreaming(stream::iter([Ok(1), Err(RpcError::message("enough"))])))
        }))
        .handlers(message("record", || async { Ok::<_, RpcError>(Record::new(5).header("name", "value")) }))
        .handlers(message("half", |Data(number): Data<i64>| Ok::<_, RpcError>(number / 2)))
        .handlers(message("count", |Data(to): Data<u32>| stream::iter(1..=to)));
    let (service, client) = serve(service).await;
    client.send::<()>("undefined", ()).await.unwrap();
    assert!(matches!(client.send::<u64>("undefined", ()).await, Err(CallError::NoValue)));
    assert_eq!(client.send::<Option<u64>>("null", ()).await.unwrap(), None);
    assert_eq!(client.send::<u64>("values", ()).stream().collect_all().await.unwrap(), [1, 2, 3]);
    assert_eq!(client.send::<u64>("values", ()).await.unwrap(), 1, "firstValueFrom");
    client.send::<u64>("fallible", ()).stream().collect_all().await.unwrap_err();
    assert_eq!(client.send::<u64>("record", ()).await.unwrap(), 5);
    assert_eq!(client.send::<i64>("half", 8).await.unwrap(), 4);
    assert_eq!(client.send::<u32>("count", 2).stream().collect_all().await.unwrap(), [1, 2]);
    end(service, client).await;
}

// === the service, and calling ===

#[actix::test]
async fn a_service_and_its_clients() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let see = Arc::clone(&seen);
    let group: HandlerGroup =
        message("echo", |Data(data): Data<Value>| async move { Ok::<_, RpcError>(data) });
    let apart = Server::from(TcpServerOptions::new().address("127.0.0.1", 0)).inherit_app_config(false);
    let service = Microservice::new()
        .handlers(group)
        .on(move |event| see.lock().unwrap().push(event.name()))
        .interceptor(guard(|_| async { Ok(false) }))
        .client("MATH", TcpClientOptions::new().address("127.0.0.1", 1))
        .server(TcpServerOptions::new().address("127.0.0.1", 0))
        .server(apart)
        .on_current_arbiter();
    let service = service.start().await.unwrap();
    let servers = service.servers();
    assert_eq!(
        servers[0].status_cell().current().map(|status| status.to_string()).as_deref(),
        Some("connected")
    );
    assert!(servers[0].unwrap::<martlet::tcp::TcpListening>().is_some());
    let client = |url: &str, options: ClientOptions| {
        let port = url.rsplit(':').next().unwrap().parse().unwrap();
        let mut all = TcpClientOptions::new().address("127.0.0.1", port);
        all.client = options;
        ClientProxy::from(all)
    };
    let inherits = client(&servers[0].url(), ClientOptions::default());
    assert_eq!(refused(&inherits, "echo").await["message"], "Forbidden resource");
    let mapped = ClientOptions::default()
        .map_error(|_| CallError::Cancelled)
        .map_response(|payload| Ok(Payload::encode(payload.format(), &"mapped").unwrap()));
    let apart = client(&servers[1].url(), mapped);
    apart.connect().await.unwrap();
    assert!(!apart.unwrap::<TcpContext>().unwrap().tls);
    let call = apart.send::<String>("echo", 1).timeout(Duration::from_secs(5)).idempotent();
    assert_eq!(call.metadata("key", "value").await.unwrap(), "mapped");
    apart.emit("created", 1).await.unwrap();
    inherits.close().await;
    apart.close().await;
    assert!(service.stop(Duration::from_secs(5)).await.clean);
    assert_eq!(*seen.lock().unwrap(), ["no_event_handler"]);
}
