// SPDX-License-Identifier: MIT OR Apache-2.0
//! The service that the tests call: the same handlers on every transporter it is given, those that the NestJS
//! service of `tests/interop` has too.
//!
//! ```text
//! $ cargo run --example interop_service -- tcp://127.0.0.1:0 'tcp://127.0.0.1:0?maxBufferSize=100000'
//! ready tcp://127.0.0.1:…
//! ready tcp://127.0.0.1:…
//! ^C
//! ```
//!
//! With the features of the brokers, any of these: `nats://HOST?queue=workers`, `redis://HOST?wildcards=true`,
//! `amqp://HOST?queue=NAME&wildcards=true`, `mqtt://HOST?protocolVersion=5`.
//!
//! On SIGTERM or SIGINT it answers what is in flight and exits with 0. `--name NAME` is what `whoami` answers; by default
//! the process id. NestJS's `undefinedItem` is missing: JSON has no undefined inside a stream.

#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::LocalBoxFuture;
use futures::{Stream, StreamExt, stream};
use martlet::interceptor::Next;
use martlet::microservice::shutdown_signal;
use martlet::prelude::*;
use martlet::reply::{HandlerResult, IntoReply, Reply};
use martlet::{Interceptor, Request, TransportId, TransportKind};
use serde::Deserialize;
use serde_json::{Value, json};

/// What all arbiters share.
#[derive(Default)]
struct Shared {
    name: String,
    calls: Mutex<HashMap<String, u64>>,
    notifications: AtomicU64,
    last_notification: Mutex<Option<Value>>,
    slow_running: AtomicU64,
    infinite_active: AtomicU64,
    subjects: Mutex<Vec<String>>,
    /// Whether handlers acknowledge what came by RabbitMQ, which NestJS leaves to them with `noAck=false`.
    #[cfg_attr(not(feature = "rabbitmq"), allow(dead_code))]
    acknowledges: bool,
    /// How this service is reached, per transporter, and the clients made of it.
    own: Arc<Mutex<HashMap<u16, Transport>>>,
    clients: Mutex<HashMap<u16, ClientProxy>>,
}

impl Shared {
    fn count(&self, key: &str) {
        *lock(&self.calls).entry(key.to_owned()).or_default() += 1;
    }

    /// A client of this very service.
    fn own_client(&self, id: TransportId) -> Result<ClientProxy, Unexpected> {
        let mut clients = lock(&self.clients);
        if let Some(client) = clients.get(&id.0) {
            return Ok(client.clone());
        }
        let transport = lock(&self.own).get(&id.0).cloned().ok_or("the service does not know its address")?;
        let client = transport.into_client()?;
        clients.insert(id.0, client.clone());
        Ok(client)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Counts one while it lives.
struct Running<F: Fn(&Shared) -> &AtomicU64>(Arc<Shared>, F);

impl<F: Fn(&Shared) -> &AtomicU64> Running<F> {
    fn new(shared: &Arc<Shared>, counter: F) -> Self {
        counter(shared).fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(shared), counter)
    }
}

impl<F: Fn(&Shared) -> &AtomicU64> Drop for Running<F> {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts every call by its pattern; the two handlers of `twice` count themselves.
struct Counting;

impl Interceptor for Counting {
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        let key = request.pattern().as_str().unwrap_or(request.pattern().text()).to_owned();
        if let Some(shared) = request.state::<Shared>()
            && key != "twice"
        {
            shared.count(&key);
        }
        #[cfg(feature = "rabbitmq")]
        if request.state::<Shared>().is_some_and(|shared| shared.acknowledges) {
            return Box::pin(acknowledged(request, next));
        }
        Box::pin(next.run(request))
    }
}

/// Acknowledges when the handler has ended, however it did.
#[cfg(feature = "rabbitmq")]
async fn acknowledged(request: Request, next: Next<'_>) -> HandlerResult {
    let message = request.clone();
    let result = next.run(request).await;
    if let Some(context) = message.context::<RmqContext>() {
        // Another handler of the same event may have been faster.
        let _ = context.ack();
    }
    result
}

type Answer<T> = Result<T, RpcError>;

#[derive(Deserialize)]
struct Fail {
    kind: Option<Value>,
}

#[derive(Deserialize)]
struct Slow {
    ms: u64,
}

#[derive(Deserialize)]
struct Big {
    n: usize,
}

fn cmd(name: &str) -> Pattern {
    Pattern::parse(&json!({ "cmd": name }).to_string())
}

fn total(numbers: &[f64]) -> f64 {
    numbers.iter().sum()
}

/// The handlers of NestJS's integration suite and the issue's own, for every transporter.
fn handlers() -> Vec<HandlerGroup> {
    vec![
        message(cmd("sum"), async |Data(numbers): Data<Vec<f64>>| Answer::Ok(total(&numbers))),
        message(cmd("asyncSum"), async |Data(numbers): Data<Vec<f64>>| {
            tokio::task::yield_now().await;
            Answer::Ok(total(&numbers))
        }),
        message(cmd("streamSum"), async |Data(numbers): Data<Vec<f64>>| {
            Answer::Ok(Streaming(stream::iter([total(&numbers)])))
        }),
        message(cmd("streaming"), async |Data(items): Data<Vec<Value>>| {
            Answer::Ok(Streaming(stream::iter(items)))
        }),
        message(cmd("concurrent"), concurrent),
        message("echo", async |payload: martlet::Payload| Answer::Ok(Reply::Value(payload))),
        message("metadata", async |request: Request| {
            Answer::Ok(match request.raw_metadata() {
                Some(metadata) => Reply::Value(metadata.clone()),
                None => Value::Null.into_reply(request.format())?,
            })
        }),
        message("pattern", async |request: Request| Answer::Ok(address(&request))),
        message("headers", async |request: Request| Answer::Ok(headers(&request))),
        message("delivery", async |request: Request| Answer::Ok(delivery(&request))),
        message("record-builder-duplex", async |payload: martlet::Payload, request: Request| {
            let mut reply =
                json!({ "data": payload.to_value().unwrap_or_default(), "headers": headers(&request) });
            if let (Value::Object(reply), Value::Object(delivery)) = (&mut reply, delivery(&request)) {
                reply.extend(delivery);
            }
            Answer::Ok(reply)
        }),
        message("whoami", async |shared: State<Shared>| Answer::Ok(shared.name.clone())),
        message("fail", fail),
        message("slow", async |State(shared): State<Shared>, Data(slow): Data<Slow>| {
            let _running = Running::new(&shared, |shared| &shared.slow_running);
            tokio::time::sleep(Duration::from_millis(slow.ms)).await;
            Answer::Ok(slow.ms)
        }),
        message("slowRunning", async |shared: State<Shared>| {
            Answer::Ok(shared.slow_running.load(Ordering::Relaxed))
        }),
        message("never", async || std::future::pending::<Answer<()>>().await),
        message("infinite", async |State(shared): State<Shared>| Answer::Ok(Streaming(infinite(shared)))),
        message("infiniteActive", async |shared: State<Shared>| {
            Answer::Ok(shared.infinite_active.load(Ordering::Relaxed))
        }),
        message("emptyStream", async || Answer::Ok(Streaming(stream::empty::<Value>()))),
        message("nullValue", async || Answer::Ok(Value::Null)),
        message("undefinedValue", async || Answer::Ok(())),
        message("big", async |Data(big): Data<Big>| Answer::Ok("x".repeat(big.n))),
        message("length", async |Data(text): Data<String>| {
            Answer::Ok(json!({ "units": text.encode_utf16().count(), "bytes": text.len() }))
        }),
        message("unicode", async |Data(text): Data<String>| Answer::Ok(format!("😀{text}é"))),
        event("notification", async |shared: State<Shared>, Data(data): Data<Value>| {
            *lock(&shared.last_notification) = Some(data);
            shared.notifications.fetch_add(1, Ordering::Relaxed);
            Answer::Ok(())
        }),
        message("notifications", async |shared: State<Shared>| {
            Answer::Ok(shared.notifications.load(Ordering::Relaxed))
        }),
        message("lastNotification", async |shared: State<Shared>| {
            Answer::Ok(lock(&shared.last_notification).clone())
        }),
        event("twice", async |shared: State<Shared>| {
            shared.count("twice#1");
            Answer::Ok("first")
        }),
        event("twice", async |shared: State<Shared>| {
            shared.count("twice#2");
            Answer::Ok("second")
        }),
        event("eventAnswer", async || Answer::Ok("answered")),
        message("messageAsEvent", async || Answer::Ok("nobody reads this")),
        event("failingEvent", async || Answer::<()>::Err(RpcError::message("boom"))),
        message("calls", async |shared: State<Shared>, Data(key): Data<String>| {
            Answer::Ok(lock(&shared.calls).get(&key).copied().unwrap_or_default())
        }),
        message("onlyTcp", async || Answer::Ok("tcp")).transport(TransportId::TCP),
        message("onlyRedis", async || Answer::Ok("redis")).transport(TransportId::REDIS),
        message("onlyNats", async || Answer::Ok("nats")).transport(TransportId::NATS),
        message("onlyMqtt", async || Answer::Ok("mqtt")).transport(TransportId::MQTT),
        message("onlyRmq", async || Answer::Ok("rmq")).transport(TransportId::RMQ),
        message("exception", async || {
            Answer::Ok(TryStreaming(stream::iter([Answer::<()>::Err(RpcError::message("test"))])))
        }),
        message("subjects", async |shared: State<Shared>| Answer::Ok(lock(&shared.subjects).clone())),
        // What NestJS's own suites call on several transports.
        message("broadcast", broadcast),
        message("ping", async |request: Request| Answer::Ok(address(&request))),
    ]
}

/// Several services answer one request with 1 each and do not end.
async fn broadcast() -> Answer<Streaming<impl Stream<Item = i32>>> {
    Ok(Streaming(stream::iter([1]).chain(stream::pending())))
}

/// Notes where an event came by.
async fn noted(shared: State<Shared>, request: Request) -> Answer<()> {
    lock(&shared.subjects).push(address(&request));
    Ok(())
}

/// Those with wildcards, as each broker writes them: the separator of words, one word, the rest.
fn wildcard_handlers() -> Vec<HandlerGroup> {
    let brokers = [
        (TransportId::NATS, ".", "*", ">"),
        (TransportId::REDIS, ".", "*", "*"),
        (TransportId::RMQ, ".", "*", "#"),
        (TransportId::MQTT, "/", "+", "#"),
    ];
    let mut groups = Vec::new();
    for (id, separator, one, rest) in brokers {
        let wild = |words: &[&str]| words.join(separator);
        let of_broker = [
            message(wild(&["time", "us", one]), async |request: Request| Answer::Ok(address(&request))),
            message(wild(&["wild", rest]), async |request: Request| Answer::Ok(address(&request))),
            event(wild(&["wildEvent", one]), noted),
            message(wild(&["math", one]), async |Data(numbers): Data<Vec<f64>>| Answer::Ok(total(&numbers))),
            message(wild(&["async", one]), async |Data(numbers): Data<Vec<f64>>| {
                tokio::task::yield_now().await;
                Answer::Ok(total(&numbers))
            }),
            message(wild(&["stream", one]), async |Data(numbers): Data<Vec<f64>>| {
                Answer::Ok(Streaming(stream::iter([total(&numbers)])))
            }),
            message(wild(&["streaming", one]), async |Data(items): Data<Vec<Value>>| {
                Answer::Ok(Streaming(stream::iter(items)))
            }),
            message(wild(&["broadcast", one]), broadcast),
            message(wild(&["wildcard", one, one]), async |request: Request| Answer::Ok(address(&request))),
        ];
        groups.extend(of_broker.map(|group| group.transport(id)));
    }
    groups
}

/// Those that only one broker can have.
fn broker_handlers() -> Vec<HandlerGroup> {
    let whoami = async |shared: State<Shared>| Answer::Ok(shared.name.clone());
    let mqtt = [
        message("$share/lab/shared/+", whoami),
        event("$share/lab/sharedEvent/+", noted),
        event("qosEvent", async |shared: State<Shared>, request: Request| {
            lock(&shared.subjects).push(delivery(&request)["qos"].to_string());
            Answer::Ok(())
        })
        .extra("qos", 1),
        // NestJS's own MQTT suite.
        event("wildcard-event/#", noted),
        message("wildcard-message/#", async |request: Request| Answer::Ok(address(&request))),
        message("wildcard-message2/+/test", async |request: Request| Answer::Ok(address(&request))),
        event("$share/test-group/shared-wildcard-event/+", noted),
        message("$share/test-group/shared-wildcard-message/+", async |request: Request| {
            Answer::Ok(address(&request))
        }),
    ];
    let queued = message("queued", whoami).extra("queue", "lab").transport(TransportId::NATS);
    mqtt.map(|group| group.transport(TransportId::MQTT)).into_iter().chain([queued]).collect()
}

async fn concurrent(
    shared: State<Shared>,
    request: Request,
    Data(rows): Data<Vec<Vec<f64>>>,
) -> Result<bool, Unexpected> {
    let client = shared.own_client(request.transport().id)?;
    let sums = rows.iter().map(|row| client.send::<f64>(cmd("sum"), row));
    let sums = futures::future::try_join_all(sums).await?;
    Ok(sums.iter().zip(&rows).all(|(sum, row)| *sum == total(row)))
}

async fn fail(Data(data): Data<Option<Fail>>) -> Answer<Reply> {
    let kind = data.and_then(|data| data.kind);
    match kind.as_ref().and_then(Value::as_str) {
        Some("message") => Err(RpcError::message("boom")),
        Some("object") => Err(RpcError::json(json!({ "code": 42, "message": "m" }))),
        Some("unexpected" | "string" | "http") => Err(RpcError::unexpected("a secret of the server")),
        Some("panic") => panic!("a secret of the server"),
        Some("stream") => {
            let items = [Ok(1), Ok(2), Err(RpcError::message("boom"))];
            TryStreaming(stream::iter(items)).into_reply(martlet::Format::Json)
        }
        _ => {
            let kind = kind.map_or_else(|| "undefined".to_owned(), |kind| kind.to_string());
            Err(RpcError::message(format!("unknown kind {kind}")))
        }
    }
}

/// 0, 1, 2, … every 10 ms without end.
fn infinite(shared: Arc<Shared>) -> impl Stream<Item = u64> {
    let running = Running::new(&shared, |shared| &shared.infinite_active);
    stream::unfold((0, running), async |(number, running)| {
        tokio::time::sleep(Duration::from_millis(10)).await;
        Some((number, (number + 1, running)))
    })
}

/// The pattern as it came: with brokers the concrete subject, channel, topic or routing key.
fn address(request: &Request) -> String {
    #[cfg(feature = "nats")]
    if let Some(context) = request.context::<NatsContext>() {
        return context.subject().to_owned();
    }
    #[cfg(feature = "redis")]
    if let Some(context) = request.context::<RedisContext>() {
        return context.channel().to_owned();
    }
    #[cfg(feature = "rabbitmq")]
    if let Some(context) = request.context::<RmqContext>() {
        return context.pattern();
    }
    #[cfg(feature = "mqtt")]
    if let Some(context) = request.context::<MqttContext>() {
        return context.topic().to_owned();
    }
    request.pattern().as_str().unwrap_or(request.pattern().text()).to_owned()
}

/// The headers, on MQTT 5 the user properties, as `{name: [values]}`; null without any.
fn headers(request: &Request) -> Value {
    let mut members = serde_json::Map::new();
    let mut add = |name: &str, value: Value| {
        let values = members.entry(name).or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(values) = values {
            match value {
                Value::Array(several) => values.extend(several),
                value => values.push(value),
            }
        }
    };
    #[cfg(feature = "nats")]
    if let Some(context) = request.context::<NatsContext>() {
        context.headers().iter().for_each(|(name, value)| add(name, Value::from(value)));
    }
    #[cfg(feature = "rabbitmq")]
    if let Some(context) = request.context::<RmqContext>() {
        context.properties().headers.into_iter().for_each(|(name, value)| add(&name, value));
    }
    #[cfg(feature = "mqtt")]
    if let Some(context) = request.context::<MqttContext>() {
        let properties = context.properties();
        properties.user_properties.iter().for_each(|(name, value)| add(name, Value::from(value)));
    }
    // Only brokers have headers.
    let _ = (request, &mut add);
    if members.is_empty() { Value::Null } else { Value::Object(members) }
}

/// What else the broker told of the message; null where it tells nothing.
fn delivery(request: &Request) -> Value {
    #[cfg(feature = "rabbitmq")]
    if let Some(context) = request.context::<RmqContext>() {
        let properties = context.properties();
        return json!({
            "exchange": context.exchange(), "routingKey": context.routing_key(),
            "redelivered": context.redelivered(), "deliveryMode": properties.delivery_mode,
            "priority": properties.priority, "expiration": properties.expiration,
            "contentType": properties.content_type, "contentEncoding": properties.content_encoding,
            "messageId": properties.message_id, "timestamp": properties.timestamp, "type": properties.kind,
            "appId": properties.app_id, "userId": properties.user_id,
        });
    }
    #[cfg(feature = "mqtt")]
    if let Some(context) = request.context::<MqttContext>() {
        return json!({
            "qos": context.qos().as_u8(), "retain": context.retain(), "dup": context.dup(),
            "properties": { "contentType": context.properties().content_type },
        });
    }
    let _ = request;
    Value::Null
}

/// How a client reaches this server: a broker as the server does, TCP at the port that it really has.
fn own_address(address: Transport, server: Transport) -> Transport {
    let client = server.for_clients();
    ["host", "port"].into_iter().fold(client, |client, name| {
        if client.kind() != TransportKind::Tcp {
            return client;
        }
        match address.options().get(name) {
            Some(value) => client.with(name, value.clone()),
            None => client,
        }
    })
}

struct Arguments {
    name: String,
    transports: Vec<Transport>,
}

fn arguments() -> Result<Arguments, String> {
    let mut name = std::process::id().to_string();
    let mut transports = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--name" {
            name = arguments.next().ok_or("--name needs a value")?;
        } else {
            transports.push(Transport::from_url(&argument).map_err(|error| error.to_string())?);
        }
    }
    if transports.is_empty() {
        return Err(
            "usage: interop_service [--name NAME] URL [URL …], such as tcp://127.0.0.1:3000".to_owned()
        );
    }
    Ok(Arguments { name, transports })
}

async fn serve(Arguments { name, transports }: Arguments) -> Result<(), (u8, String)> {
    let own: Arc<Mutex<HashMap<u16, Transport>>> = Arc::default();
    let option = |transport: &Transport, name: &str| transport.options().get(name).map(Value::to_string);
    let acknowledges = transports.iter().any(|transport| {
        transport.kind() == TransportKind::Rmq
            && option(transport, "noAck")
                .is_some_and(|no_ack| no_ack.contains("false") || no_ack.contains('0'))
            && !transport.options().contains_key("onFailure")
    });
    let mut service = Microservice::new()
        .name("interop")
        .state(Shared { name, own: Arc::clone(&own), acknowledges, ..Shared::default() })
        .interceptor(Arc::new(Counting))
        .on(|happened| eprintln!("{happened}"));
    for group in handlers().into_iter().chain(wildcard_handlers()).chain(broker_handlers()) {
        service = service.handlers(group);
    }
    for transport in &transports {
        service = service.server(transport.clone().into_server().map_err(|error| (2, error.to_string()))?);
    }
    let service = service.start().await.map_err(|error| (1, error.to_string()))?;
    // Whoever reads "ready" may send a signal at once.
    let shutdown = shutdown_signal();
    for (server, transport) in service.servers().iter().zip(transports) {
        let url = server.url();
        // A port 0 has become a real one. The service calls itself without the options of servers.
        if let Ok(address) = Transport::from_url(&url) {
            lock(&own).entry(server.info().id.0).or_insert_with(|| own_address(address, transport));
        }
        println!("ready {url}");
    }
    service.run_until(shutdown).await.map_err(|error| (1, error.to_string()))?;
    Ok(())
}

#[actix::main]
async fn main() -> ExitCode {
    let done = match arguments() {
        Ok(arguments) => serve(arguments).await,
        Err(error) => Err((2, error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, error)) => {
            eprintln!("error: {error}");
            ExitCode::from(code)
        }
    }
}
