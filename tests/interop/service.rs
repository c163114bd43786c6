// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our service: the handlers of the NestJS peer (`peer/routes.mjs`), on Martlet.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream::{self, StreamExt};
use martlet::mqtt::MqttContext;
use martlet::nats::NatsContext;
use martlet::rabbitmq::RmqContext;
use martlet::redis::RedisContext;
use martlet::{
    Client, ClientName, ClientProxy, Data, HandlerGroup, Metadata, Microservice, Pattern, Payload, Request,
    RpcError, RunningService, Server, ServiceEvent, State, Streaming, TransportId, TryStreaming, event,
    message,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::pair::Place;
use crate::wire::{Transport, port};

/// What the handlers count and remember.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) notifications: AtomicU64,
    pub(crate) last: Mutex<Option<Payload>>,
    pub(crate) subjects: Mutex<Vec<String>>,
    pub(crate) twice: [AtomicU64; 2],
    pub(crate) message_as_event: AtomicU64,
    pub(crate) slow_begun: AtomicU64,
    pub(crate) slow_running: AtomicU64,
    pub(crate) infinite_running: AtomicU64,
    /// Metadata of the last request to `metadata`, raw.
    pub(crate) metadata: Mutex<Option<String>>,
    pub(crate) queued: AtomicU64,
}

/// Our service, running, with what it reported.
pub(crate) struct Service {
    pub(crate) running: RunningService,
    pub(crate) seen: Arc<Seen>,
    events: Arc<Mutex<Vec<ServiceEvent>>>,
}

impl Service {
    /// Starts it; `itself` is how it calls itself.
    pub(crate) async fn start(
        name: &str,
        transport: Transport,
        server: Server,
        itself: Option<ClientProxy>,
    ) -> Self {
        Self::with(name, transport, server, itself, Vec::new()).await
    }

    /// Starts it with further handlers.
    pub(crate) async fn with(
        name: &str,
        transport: Transport,
        server: Server,
        itself: Option<ClientProxy>,
        more: Vec<HandlerGroup>,
    ) -> Self {
        let seen = Arc::new(Seen::default());
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let mut service = Microservice::new()
            .arbiters(2)
            .state(Arc::clone(&seen))
            .state(Name(name.to_owned()))
            .on(move |event| sink.lock().unwrap().push(event.clone()))
            .server(server);
        if let Some(itself) = itself {
            service = service.client(Itself::NAME, itself);
        }
        for group in handlers(transport).into_iter().chain(more) {
            service = service.handlers(group);
        }
        Self { running: service.start().await.unwrap(), seen, events }
    }

    /// The port it listens on.
    pub(crate) fn port(&self) -> u16 {
        port(&self.running.url())
    }

    /// The names of what it reported since the last look.
    pub(crate) fn take_events(&self) -> Vec<&'static str> {
        self.events.lock().unwrap().drain(..).map(|event| event.name()).collect()
    }

    pub(crate) async fn stop(&self) {
        self.running.stop(Duration::from_secs(5)).await;
    }
}

/// The argument by which this binary becomes a service of its own, so that it can be killed.
pub(crate) const SERVE: &str = "--serve";

/// Serves until stdin is closed. The arguments are those of [`Process::start`].
pub(crate) fn serve(arguments: &[String]) -> ExitCode {
    let [transport, url, queue] = arguments else { return ExitCode::FAILURE };
    let transport = Transport::all().find(|it| it.wire().name == transport).unwrap();
    let place = Place { url: url.clone(), queue: queue.clone(), ..Place::new(transport, None) };
    std::thread::spawn(|| {
        // Whoever started it holds its stdin.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    actix_rt::System::new().block_on(async {
        let service = Service::start("process", transport, place.server(), None).await;
        println!("{}", service.running.url());
        std::future::pending::<()>().await;
    });
    ExitCode::SUCCESS
}

/// Our service in a process of its own, which is killed when dropped.
pub(crate) struct Process {
    pub(crate) url: String,
    child: Child,
}

impl Process {
    pub(crate) fn start(place: &Place) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([SERVE, place.wire().name, &place.url, &place.queue])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { url: line.trim().to_owned(), child }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Name(String);

pub(crate) struct Itself;

impl ClientName for Itself {
    const NAME: &'static str = "itself";
}

pub(crate) fn cmd(name: &str) -> Pattern {
    Pattern::from_json(&json!({ "cmd": name })).unwrap()
}

type Shared = State<Arc<Seen>>;

#[derive(Deserialize)]
struct Fail {
    kind: String,
}

#[derive(Deserialize)]
struct Slow {
    ms: u64,
}

#[derive(Deserialize)]
struct Big {
    n: usize,
}

fn sum(numbers: &[i64]) -> i64 {
    numbers.iter().sum()
}

/// Every handler that the transport has.
fn handlers(transport: Transport) -> Vec<HandlerGroup> {
    let mut all = sums();
    all.extend(values());
    all.extend(failures());
    all.extend(slow_ones());
    all.extend(events());
    all.extend(of_the_transport(transport));
    all
}

fn sums() -> Vec<HandlerGroup> {
    vec![
        message(cmd("sum"), |Data(numbers): Data<Vec<i64>>| async move { Ok::<_, RpcError>(sum(&numbers)) }),
        message(cmd("asyncSum"), |Data(numbers): Data<Vec<i64>>| async move {
            tokio::task::yield_now().await;
            Ok::<_, RpcError>(sum(&numbers))
        }),
        message(cmd("streamSum"), |Data(numbers): Data<Vec<i64>>| async move {
            Ok::<_, RpcError>(Streaming(stream::iter([sum(&numbers)])))
        }),
        message(cmd("streaming"), |Data(items): Data<Vec<Value>>| async move {
            Ok::<_, RpcError>(Streaming(stream::iter(items)))
        }),
        message(cmd("concurrent"), |Data(rows): Data<Vec<Vec<i64>>>, client: Client<Itself>| async move {
            let calls = rows.iter().map(|row| client.send::<i64>(cmd("sum"), row));
            let sums = futures::future::try_join_all(calls).await?;
            Ok::<_, RpcError>(rows.iter().zip(sums).all(|(row, total)| total == sum(row)))
        }),
        // The same pattern as a NestJS service writes with other spaces and key order.
        message(Pattern::parse(r#"{"nested": {"z": true, "y": [1, "k"]}, "b": 1, "a": "x"}"#), || async {
            Ok::<_, RpcError>("nested")
        }),
        message(42, || async { Ok::<_, RpcError>("number") }),
    ]
}

fn values() -> Vec<HandlerGroup> {
    vec![
        message("echo", |data: Payload| async move { Ok::<_, RpcError>(data) }),
        message("metadata", |request: Request, State(seen): Shared| async move {
            let raw = request.raw_metadata().map(|raw| String::from_utf8_lossy(raw.bytes()).into_owned());
            *seen.metadata.lock().unwrap() = raw;
            let metadata: Metadata = request.metadata();
            let map: Map<String, Value> =
                metadata.iter().map(|(key, value)| (key.to_owned(), json!(value))).collect();
            Ok::<_, RpcError>(if map.is_empty() { Value::Null } else { Value::Object(map) })
        }),
        message("whoami", |State(name): State<Name>| async move { Ok::<_, RpcError>(name.0.clone()) }),
        message("undefinedItem", || async {
            Ok::<_, RpcError>(Streaming(stream::iter([Some(1), None, Some(3)])))
        }),
        message("emptyStream", || async { Ok::<_, RpcError>(Streaming(stream::empty::<u8>())) }),
        message("nullValue", || async { Ok::<_, RpcError>(Value::Null) }),
        message("undefinedValue", || async { Ok::<_, RpcError>(()) }),
        message("big", |Data(big): Data<Big>| async move { Ok::<_, RpcError>("x".repeat(big.n)) }),
        message("length", |Data(text): Data<String>| async move {
            Ok::<_, RpcError>(json!({ "units": text.encode_utf16().count(), "bytes": text.len() }))
        }),
        message("unicode", |Data(text): Data<String>| async move { Ok::<_, RpcError>(format!("😀{text}é")) }),
        message("headers", |request: Request| async move { Ok::<_, RpcError>(headers(&request)) }),
        message("delivery", |request: Request| async move { Ok::<_, RpcError>(delivery(&request)) }),
        message("pattern", |request: Request| async move { Ok::<_, RpcError>(address(&request)) }),
        message("onlyTcp", || async { Ok::<_, RpcError>("tcp") }).transport(TransportId::TCP),
        message("onlyNats", || async { Ok::<_, RpcError>("nats") }).transport(TransportId::NATS),
        message("onlyRedis", || async { Ok::<_, RpcError>("redis") }).transport(TransportId::REDIS),
        message("onlyRmq", || async { Ok::<_, RpcError>("rmq") }).transport(TransportId::RMQ),
        message("onlyMqtt", || async { Ok::<_, RpcError>("mqtt") }).transport(TransportId::MQTT),
    ]
}

/// The error that a NestJS handler would throw as an `Error`.
#[derive(Debug, thiserror::Error)]
#[error("a secret of the server")]
struct Secret;

fn failures() -> Vec<HandlerGroup> {
    let fail = message("fail", |Data(fail): Data<Fail>| async move {
        match fail.kind.as_str() {
            "message" => Err(RpcError::message("boom")),
            "object" => Err(RpcError::json(json!({ "code": 42, "message": "m" }))),
            "array" => Err(RpcError::json(json!(["a", 1]))),
            "unexpected" => Err(RpcError::unexpected(Secret)),
            "panic" => panic!("a secret of the server"),
            "stream" => {
                let items = [Ok(1), Ok(2), Err(RpcError::message("boom"))];
                martlet::reply::IntoReply::into_reply(
                    TryStreaming(stream::iter(items)),
                    martlet::Format::Json,
                )
            }
            other => Err(RpcError::message(format!("unknown kind {other}"))),
        }
    });
    vec![fail]
}

/// Counts up for as long as it lives.
struct Running(Arc<Seen>, fn(&Seen) -> &AtomicU64);

impl Running {
    fn new(seen: Arc<Seen>, counter: fn(&Seen) -> &AtomicU64) -> Self {
        counter(&seen).fetch_add(1, Ordering::SeqCst);
        Self(seen, counter)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Ordering::SeqCst);
    }
}

fn slow_ones() -> Vec<HandlerGroup> {
    vec![
        message("slow", |Data(slow): Data<Slow>, State(seen): Shared| async move {
            seen.slow_begun.fetch_add(1, Ordering::SeqCst);
            let _running = Running::new(Arc::clone(&seen), |seen| &seen.slow_running);
            tokio::time::sleep(Duration::from_millis(slow.ms)).await;
            Ok::<_, RpcError>(slow.ms)
        }),
        message("never", std::future::pending::<Result<(), RpcError>>),
        message("infinite", |State(seen): Shared| async move {
            let running = Running::new(Arc::clone(&seen), |seen| &seen.infinite_running);
            let numbers = stream::unfold((0_u64, running), |(next, running)| async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                Some((next, (next + 1, running)))
            });
            Ok::<_, RpcError>(Streaming(numbers.boxed_local()))
        }),
    ]
}

fn events() -> Vec<HandlerGroup> {
    vec![
        event("notification", |data: Payload, State(seen): Shared| async move {
            *seen.last.lock().unwrap() = Some(data);
            seen.notifications.fetch_add(1, Ordering::SeqCst);
            Ok::<_, RpcError>(())
        }),
        message("notifications", |State(seen): Shared| async move {
            Ok::<_, RpcError>(seen.notifications.load(Ordering::SeqCst))
        }),
        event("twice", |State(seen): Shared| async move {
            seen.twice[0].fetch_add(1, Ordering::SeqCst);
            Ok::<_, RpcError>("first")
        }),
        event("twice", |State(seen): Shared| async move {
            seen.twice[1].fetch_add(1, Ordering::SeqCst);
            Ok::<_, RpcError>("second")
        }),
        event("eventAnswer", || async { Ok::<_, RpcError>("answered") }),
        message("messageAsEvent", |State(seen): Shared| async move {
            seen.message_as_event.fetch_add(1, Ordering::SeqCst);
            Ok::<_, RpcError>("nobody reads this")
        }),
        event("failingEvent", || async { Err::<(), _>(RpcError::message("boom")) }),
        event(Pattern::parse(r#"{"type":"created","v":1}"#), |State(seen): Shared| async move {
            seen.notifications.fetch_add(1, Ordering::SeqCst);
            Ok::<_, RpcError>(())
        }),
    ]
}

/// Those with wildcards, as they are written there, and those of one transport alone.
fn of_the_transport(transport: Transport) -> Vec<HandlerGroup> {
    let mut all = Vec::new();
    if let Some(wild) = &transport.wire().wildcards {
        let at = |words: &[&str]| wild.join(words);
        let here = |request: Request| async move { Ok::<_, RpcError>(address(&request)) };
        all.extend([
            message(at(&["time", "us", wild.one]), here),
            message(at(&["wild", wild.rest]), here),
            event(at(&["wildEvent", wild.one]), collect),
            message(at(&["math", wild.one]), |Data(numbers): Data<Vec<i64>>| async move {
                Ok::<_, RpcError>(sum(&numbers))
            }),
            message(at(&["async", wild.one]), |Data(numbers): Data<Vec<i64>>| async move {
                tokio::task::yield_now().await;
                Ok::<_, RpcError>(sum(&numbers))
            }),
            message(at(&["stream", wild.one]), |Data(numbers): Data<Vec<i64>>| async move {
                Ok::<_, RpcError>(Streaming(stream::iter([sum(&numbers)])))
            }),
            message(at(&["streaming", wild.one]), |Data(items): Data<Vec<Value>>| async move {
                Ok::<_, RpcError>(Streaming(stream::iter(items)))
            }),
        ]);
    }
    all.push(message("broadcast.test", || async {
        Ok::<_, RpcError>(Streaming(stream::iter([1]).chain(stream::pending())))
    }));
    if transport == Transport::Nats {
        all.extend([
            message("answerHeaders", || async {
                Ok::<_, RpcError>(martlet::Record::new("with headers").header("x-reply", "yes"))
            }),
            message("queued", |State(name): State<Name>| async move { Ok::<_, RpcError>(name.0.clone()) })
                .extra("queue", "lab"),
            event("queuedEvent", |State(seen): Shared| async move {
                seen.queued.fetch_add(1, Ordering::SeqCst);
                Ok::<_, RpcError>(())
            })
            .extra("queue", "lab"),
        ]);
    }
    if transport.is_mqtt() {
        all.extend([
            message("$share/lab/shared/+", |State(name): State<Name>| async move {
                Ok::<_, RpcError>(name.0.clone())
            }),
            event("$share/lab/sharedEvent/+", collect),
            event("qosEvent", |request: Request, State(seen): Shared| async move {
                seen.subjects.lock().unwrap().push(delivery(&request)["qos"].to_string());
                Ok::<_, RpcError>(())
            })
            .extra("qos", 1),
        ]);
    }
    all
}

async fn collect(request: Request, State(seen): Shared) -> Result<(), RpcError> {
    seen.subjects.lock().unwrap().push(address(&request));
    Ok(())
}

/// Where the request was sent to, without wildcards.
fn address(request: &Request) -> String {
    if let Some(context) = request.context::<NatsContext>() {
        context.subject().to_owned()
    } else if let Some(context) = request.context::<RedisContext>() {
        context.channel().to_owned()
    } else if let Some(context) = request.context::<RmqContext>() {
        context.pattern()
    } else if let Some(context) = request.context::<MqttContext>() {
        context.topic().to_owned()
    } else {
        request.pattern().as_str().unwrap_or(request.pattern().text()).to_owned()
    }
}

/// The headers as `{name: [values]}`; null without any.
fn headers(request: &Request) -> Value {
    let mut map = Map::new();
    let mut add = |name: &str, value: Value| {
        let values = map.entry(name).or_insert_with(|| json!([]));
        let values = values.as_array_mut().unwrap();
        // An AMQP header may be a list.
        match value {
            Value::Array(several) => values.extend(several),
            value => values.push(value),
        }
    };
    if let Some(context) = request.context::<NatsContext>() {
        context.headers().iter().for_each(|(name, value)| add(name, json!(value)));
    } else if let Some(context) = request.context::<RmqContext>() {
        context.properties().headers.into_iter().for_each(|(name, value)| add(&name, value));
    } else if let Some(context) = request.context::<MqttContext>() {
        context.properties().user_properties.iter().for_each(|(name, value)| add(name, json!(value)));
    }
    if map.is_empty() { Value::Null } else { Value::Object(map) }
}

/// What else the broker told of the message: as `delivery` in `peer/transports.mjs`.
fn delivery(request: &Request) -> Value {
    if let Some(context) = request.context::<RmqContext>() {
        let it = context.properties();
        return json!({
            "exchange": context.exchange(), "routingKey": context.routing_key(),
            "redelivered": context.redelivered(), "deliveryMode": it.delivery_mode, "priority": it.priority,
            "expiration": it.expiration, "contentType": it.content_type,
            "contentEncoding": it.content_encoding, "messageId": it.message_id, "timestamp": it.timestamp,
            "type": it.kind, "appId": it.app_id, "userId": it.user_id,
        });
    }
    match request.context::<MqttContext>() {
        Some(context) => json!({
            "qos": context.qos().as_u8(), "retain": context.retain(), "dup": context.dup(),
            "properties": { "contentType": context.properties().content_type },
        }),
        None => Value::Null,
    }
}
