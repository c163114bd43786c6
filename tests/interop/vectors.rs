// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was captured from NestJS, replayed against our live servers; and Martlet with Martlet.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::LocalBoxFuture;
use futures::stream::{self, StreamExt};
use martlet::tcp::{TcpServer, TcpServerOptions};
use martlet::{
    Data, Format, HandlerGroup, Microservice, Pattern, Payload, Record, Request, RpcError, RunningService,
    Server, Streaming, TransportId, TryStreaming, event, message,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::brokers::{Broker, Brokers, Kind};
use crate::pair::{Place, start_service};
use crate::peer::eventually;
use crate::wire::Transport;

type Named = (&'static str, fn(Rc<Brokers>) -> LocalBoxFuture<'static, ()>);

/// Tests that belong to no pair.
pub(crate) fn all() -> Vec<Named> {
    vec![
        ("golden::tcp_exchanges", |_| Box::pin(exchanges())),
        ("golden::tcp_hand_made_input", |_| Box::pin(hand_made_input())),
        ("golden::redis_exchanges", |brokers| {
            Box::pin(exchanges_by_broker(brokers, Transport::Redis, REDIS))
        }),
        ("golden::rmq_exchanges", |brokers| Box::pin(exchanges_by_broker(brokers, Transport::Rmq, RABBITMQ))),
        ("golden::mqtt_exchanges", |brokers| Box::pin(exchanges_by_broker(brokers, Transport::Mqtt, MQTT))),
        ("martlet::tcp::dropped_call_cancels_the_handler", |_| Box::pin(dropped(Transport::Tcp, None))),
        ("martlet::nats::dropped_call_cancels_the_handler", |_| {
            Box::pin(dropped(Transport::Nats, Some(Kind::Nats)))
        }),
        ("martlet::redis::dropped_call_cancels_the_handler", |_| {
            Box::pin(dropped(Transport::Redis, Some(Kind::Redis)))
        }),
        ("martlet::mqtt::dropped_call_cancels_the_handler", |_| {
            Box::pin(dropped(Transport::Mqtt, Some(Kind::Mosquitto)))
        }),
    ]
}

async fn dropped(transport: Transport, kind: Option<Kind>) {
    let broker = match kind {
        Some(kind) => Some(Broker::start(kind).await),
        None => None,
    };
    let place = Place::new(transport, broker);
    let (place, service) = start_service("ours", &place).await;
    let client = place.client();
    // Over TCP the first exchange tells the ends that both are Martlet.
    assert_eq!(client.send::<i64>("echo", 1).await.unwrap(), 1);
    let mut infinite = client.send::<u64>("infinite", 1).stream();
    assert_eq!(infinite.next().await.unwrap().unwrap(), 0);
    let slow = client.send::<u64>("slow", json!({ "ms": 60_000 }));
    assert!(tokio::time::timeout(Duration::from_millis(100), slow).await.is_err());
    drop(infinite);
    let running =
        || [&service.seen.infinite_running, &service.seen.slow_running].map(|it| it.load(Ordering::SeqCst));
    assert_eq!(service.seen.slow_begun.load(Ordering::SeqCst), 1);
    eventually("the handlers to be cancelled", || async { running() == [0, 0] }).await;
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
    service.stop().await;
}

// === golden data ===

const TCP: &[u8] = include_bytes!("../../actors/tcp/tests/vectors/tcp.json");
const REDIS: &[u8] = include_bytes!("../../actors/redis/tests/vectors/redis.json");
const RABBITMQ: &[u8] = include_bytes!("../../actors/rabbitmq/tests/vectors/rabbitmq.json");
const MQTT: &[u8] = include_bytes!("../../actors/mqtt/tests/vectors/mqtt.json");

fn golden(text: &'static [u8]) -> Value {
    // The files hold lone surrogates, which only our own decoder takes.
    Payload::new(Format::Json, Bytes::from_static(text)).to_value().unwrap()
}

/// The captured exchanges by name, each with its messages in order.
fn by_exchange(golden: &Value) -> Vec<(&str, Vec<&Value>)> {
    let mut all: Vec<(&str, Vec<&Value>)> = Vec::new();
    for vector in golden["vectors"].as_array().unwrap() {
        let name = vector.get("exchange_name").unwrap_or(&vector["exchange"]).as_str().unwrap();
        match all.last_mut() {
            Some((last, messages)) if *last == name => messages.push(vector),
            _ => all.push((name, vec![vector])),
        }
    }
    all
}

/// The handlers of the service that was captured.
async fn captured_service(server: impl Into<Server>) -> (RunningService, Arc<AtomicU64>) {
    let counter = Arc::new(AtomicU64::new(0));
    let mut service = Microservice::new().arbiters(1).server(server.into());
    for group in constants().into_iter().chain(streams()).chain(errors()).chain(rest(&counter)) {
        service = service.handlers(group);
    }
    (service.start().await.unwrap(), counter)
}

fn answer(pattern: &str, value: Value) -> HandlerGroup {
    message(pattern, move || {
        let value = value.clone();
        async move { Ok::<_, RpcError>(value) }
    })
}

fn constants() -> Vec<HandlerGroup> {
    let nested = Pattern::parse(r#"{"a":"x","b":1,"nested":{"y":[1,"k"],"z":true}}"#);
    vec![
        message("sum", |Data(numbers): Data<Vec<i64>>| async move {
            Ok::<_, RpcError>(numbers.iter().sum::<i64>())
        }),
        message(crate::service::cmd("sum"), |Data(numbers): Data<Vec<i64>>| async move {
            Ok::<_, RpcError>(numbers.iter().sum::<i64>())
        }),
        message(nested, || async { Ok::<_, RpcError>("nested-ok") }),
        message(42, || async { Ok::<_, RpcError>("num-ok") }),
        answer("multi_a", json!("multi")),
        answer("multi_b", json!("multi")),
        // NestJS hands `undefined` back when no data came.
        message("echo", |request: Request| async move {
            let payload = request.payload();
            Ok::<_, RpcError>(payload)
        }),
        message("echo_async", |data: Payload| async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok::<_, RpcError>(data)
        }),
        answer("ret_null", Value::Null),
        message("ret_undef", || async { Ok::<_, RpcError>(()) }),
        message("ret_promise_undef", || async {
            tokio::task::yield_now().await;
            Ok::<_, RpcError>(())
        }),
        answer("ret_zero", json!(0)),
        answer("ret_false", json!(false)),
        answer("ret_empty_str", json!("")),
        answer("ret_date", json!("1970-01-01T00:00:00.000Z")),
        answer("ret_nan", json!(f64::NAN)),
        answer("ret_map", json!({})),
        message("only_tcp", || async { Ok::<_, RpcError>("tcp-only") }).transport(TransportId::TCP),
        message("only_nats", || async { Ok::<_, RpcError>("nats-only") }).transport(TransportId::NATS),
    ]
}

fn ticks(pattern: &'static str, items: Vec<Value>) -> HandlerGroup {
    message(pattern, move || {
        let items = items.clone();
        async move {
            Ok::<_, RpcError>(Streaming(stream::iter(items).then(|item| async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                item
            })))
        }
    })
}

fn at_once(pattern: &'static str, items: Vec<Value>) -> HandlerGroup {
    message(pattern, move || {
        let items = items.clone();
        async move { Ok::<_, RpcError>(Streaming(stream::iter(items))) }
    })
}

fn streams() -> Vec<HandlerGroup> {
    vec![
        at_once("stream_sync", vec![json!(1), json!(2), json!(3)]),
        ticks("stream_async", vec![json!(0), json!(1), json!(2)]),
        at_once("stream_obj", vec![json!({ "a": 1 }), json!({ "a": 2 }), json!({ "a": 3 })]),
        at_once("stream_one", vec![json!("only")]),
        ticks("stream_one_async", vec![json!("only")]),
        at_once("stream_empty", vec![]),
        ticks("stream_empty_late", vec![]),
        at_once("stream_null", vec![Value::Null]),
        at_once("promise_obs", vec![json!("p1"), json!("p2")]),
        at_once("wrapped", vec![json!({ "data": 1 }), json!({ "data": 2 })]),
        ticks("stream_forever", (0..).take(1000).map(|i| json!(i)).collect()),
        message("stream_late_complete2", || async {
            let last = stream::once(async {
                tokio::time::sleep(Duration::from_millis(30)).await;
            });
            let items = stream::iter([json!("v")]).chain(last.filter_map(|()| async { None }));
            Ok::<_, RpcError>(Streaming(items.boxed_local()))
        }),
        message("stream_err", || async {
            let items = [Ok(1), Ok(2), Err(RpcError::message("late boom"))];
            Ok::<_, RpcError>(TryStreaming(stream::iter(items)))
        }),
        message("stream_err_async", || async {
            let error = RpcError::json(json!({ "code": 7, "message": "late obj" }));
            let items = stream::iter([Ok(1), Err(error)]).then(|item| async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                item
            });
            Ok::<_, RpcError>(TryStreaming(items))
        }),
    ]
}

fn fails(pattern: &'static str, error: RpcError) -> HandlerGroup {
    message(pattern, move || {
        let error = error.clone();
        async move { Err::<(), _>(error) }
    })
}

#[derive(serde::Serialize)]
struct Extra {
    code: u32,
    message: &'static str,
    extra: Value,
}

fn errors() -> Vec<HandlerGroup> {
    let unexpected = || RpcError::unexpected("a secret");
    let extra = Extra { code: 42, message: "obj boom", extra: json!({ "a": [1] }) };
    vec![
        fails("err_rpc_string", RpcError::message("boom")),
        fails("err_rpc_object", RpcError::json(extra)),
        fails("err_rpc_array", RpcError::json(json!(["a", 1]))),
        fails("err_rpc_number", RpcError::json(5)),
        fails("err_rpc_null", RpcError::json(Value::Null)),
        fails("err_rpc_empty", RpcError::message("")),
        fails("err_rpc_error", RpcError::json(json!({}))),
        fails("err_generic", unexpected()),
        fails("err_async", RpcError::message("async boom")),
        fails("err_http", unexpected()),
        fails("err_string", unexpected()),
        fails("err_obj", unexpected()),
        fails("err_obs_raw", unexpected()),
        fails("err_obs_generic", unexpected()),
        fails("guarded", RpcError::forbidden()),
        fails("scoped_err", RpcError::message("scoped boom")),
        fails("filtered", RpcError::json(json!({ "code": "CUSTOM", "msg": "to-filter" }))),
        fails("filter_base", RpcError::message("via base")),
        fails("filter_base_nomatch", unexpected()),
        fails("validate_default", unexpected()),
    ]
}

fn rest(counter: &Arc<AtomicU64>) -> Vec<HandlerGroup> {
    let count = |pattern: Pattern| {
        let counter = Arc::clone(counter);
        event(pattern, move |Data(_): Data<Value>| {
            let counter = Arc::clone(&counter);
            async move {
                counter.fetch_add(1, Ordering::SeqCst);
                Ok::<_, RpcError>("ignored")
            }
        })
    };
    vec![
        count(Pattern::from("evt")),
        event("evt", || async { Ok::<_, RpcError>(()) }),
        count(Pattern::parse(r#"{"type":"created","v":1}"#)),
        answer("dual", json!("m")),
        count(Pattern::from("dual")),
        answer("dual2", json!("m2")),
        count(Pattern::from("dual2")),
        answer("filter_recover", json!("recovered-observable")),
        answer("filter_plain", json!("recovered-plain")),
        answer("order", json!("ordered")),
        answer("dupmsg", json!("second")),
        message("ret_record", || async { Ok::<_, RpcError>(Record::new(1)) }),
    ]
}

/// Captured exchanges whose replies come from what the captured service alone has, each with the reason.
const NOT_OURS: &[(&str, &str)] = &[
    ("return_buffer", "a Node.js Buffer"),
    ("stream_undefined_item", "undefined, which Rust does not have"),
    ("stream_undefined_middle", "undefined, which Rust does not have"),
    ("error_rpc_undefined", "undefined, which Rust does not have"),
    ("validation_rpc_factory", "class-validator"),
    ("validation_ok", "class-validator"),
    ("no_param_decorators", "the shape of a JavaScript call"),
    ("context", "names of JavaScript classes"),
    ("request_scoped", "names of JavaScript classes"),
];

async fn exchanges() {
    let (service, counter) =
        captured_service(TcpServer::new(TcpServerOptions::new().address("127.0.0.1", 0))).await;
    let port: u16 = service.url().rsplit(':').next().unwrap().parse().unwrap();
    let golden = golden(TCP);
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let all: Vec<(&str, Vec<u8>, Vec<u8>)> = by_exchange(&golden)
        .into_iter()
        .map(|(name, messages)| {
            let of = |sent: bool| {
                let those = messages.iter().filter(|it| (it["direction"] == "client->server") == sent);
                those.flat_map(|it| it["raw"].as_str().unwrap().bytes()).collect()
            };
            (name, of(true), of(false))
        })
        .collect();
    assert!(all.len() > 90, "{} exchanges", all.len());
    let mut events = 0;
    for (name, sent, expected) in &all {
        if NOT_OURS.iter().any(|(other, _)| other == name) {
            continue;
        }
        socket.write_all(sent).await.unwrap();
        let received = read_exactly(&mut socket, expected.len()).await;
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(shown(&received), shown(expected), "{name}");
        events += u64::from(expected.is_empty());
        if *name == "stream_cancelled_by_client" {
            // The stream goes on: a fresh connection for what follows.
            socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        }
    }
    // Nothing more came than what NestJS sent.
    let mut more = [0; 64];
    assert!(tokio::time::timeout(Duration::from_millis(50), socket.read(&mut more)).await.is_err());
    assert!(events > 0 && counter.load(Ordering::SeqCst) > 4, "{events} {counter:?}");
    service.stop(Duration::from_millis(200)).await;
}

/// The same by a broker: a NestJS client publishes what was captured and collects what comes back.
async fn exchanges_by_broker(brokers: Rc<Brokers>, transport: Transport, vectors: &'static [u8]) {
    let broker = brokers.elsewhere(transport.wire().broker.unwrap()).await;
    let place = Place::new(transport, Some(broker));
    let (service, counter) = captured_service(place.server()).await;
    let nest = place.nest(12, "client", &[]).await;
    let (golden, known) = (golden(vectors), golden(TCP));
    let known: Vec<&str> = by_exchange(&known).into_iter().map(|(name, _)| name).collect();
    let mut published = Vec::new();
    for (name, messages) in by_exchange(&golden) {
        let ours = known.contains(&name) && NOT_OURS.iter().all(|(other, _)| *other != name);
        // Its stream was left in the middle.
        if !ours || name == "stream_cancelled_by_client" {
            continue;
        }
        let [request, replies @ ..] = &messages[..] else { panic!("{name} is empty") };
        let raw = |message: &Value| message["raw"].as_str().unwrap().to_owned();
        let packet = Payload::new(Format::Json, raw(request).into_bytes()).to_value().unwrap();
        let id = packet["id"].as_str().unwrap_or_default().to_owned();
        let text = raw(request);
        let command = match transport {
            Transport::Redis => {
                let channel = request["channel"].as_str().unwrap();
                json!({ "address": channel, "listen": format!("{channel}.reply") })
            }
            Transport::Mqtt => {
                let topic = request["topic"].as_str().unwrap();
                json!({ "address": topic, "listen": format!("{topic}/reply") })
            }
            _ => json!({
                "address": place.queue, "listen": id,
                "properties": { "correlationId": id, "replyTo": request["properties"]["replyTo"] },
            }),
        };
        let mut command = command;
        crate::wire::lay_over(&mut command, json!({ "text": text, "wait": 2000 }));
        let expected: Vec<String> = replies.iter().map(|reply| raw(reply)).collect();
        published.push((name, id, expected, nest.begin("raw", command)));
    }
    assert!(published.len() > 80, "{} exchanges", published.len());
    let mut events = 0;
    for (name, id, expected, answer) in published {
        let answer = answer.await;
        let mut received: Vec<&str> =
            answer["replies"].as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
        if transport != Transport::Rmq {
            // Others have the same reply address.
            received.retain(|reply| !id.is_empty() && reply.contains(&id));
        }
        if transport == Transport::Rmq && expected.iter().any(|reply| reply.contains(r#""status":"error"}"#))
        {
            // There alone NestJS writes `err` before `status`.
            let values = |texts: Vec<&str>| -> Vec<Value> {
                texts.into_iter().map(|text| serde_json::from_str(text).unwrap()).collect()
            };
            let expected = expected.iter().map(String::as_str).collect();
            assert_eq!(values(received), values(expected), "{name}");
            continue;
        }
        assert_eq!(received, expected, "{name}");
        events += u64::from(expected.is_empty());
    }
    assert!(events > 0 && counter.load(Ordering::SeqCst) > 4, "{events} {counter:?}");
    service.stop(Duration::from_millis(200)).await;
}

async fn read_exactly(socket: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut received = vec![0; length];
    let mut got = 0;
    let reading = async {
        while got < length {
            match socket.read(&mut received[got..]).await.unwrap() {
                0 => break,
                n => got += n,
            }
        }
    };
    // What is missing shows in the comparison.
    let _ = tokio::time::timeout(Duration::from_secs(2), reading).await;
    received.truncate(got);
    received
}

/// Where we differ from a NestJS server on purpose: we answer what we owe before we close, refuse a declared length
/// above the limit at once, do not count coalesced frames together, and answer `{"response":null}` where NestJS
/// gives its handler `undefined` and echoes that.
fn ours_instead() -> HashMap<&'static str, (&'static str, bool)> {
    HashMap::from([
        ("raw_good_then_bad", (r#"41#{"response":3,"isDisposed":true,"id":"a"}"#, true)),
        ("raw_client_half_close", (r#"46#{"response":"slow","isDisposed":true,"id":"1"}"#, true)),
        ("maxbuf_huge_declared_length", ("", true)),
        ("raw_no_data", (r#"44#{"response":null,"isDisposed":true,"id":"a"}"#, false)),
    ])
}

async fn hand_made_input() {
    let golden = golden(TCP);
    let special = ours_instead();
    let mut checked = 0;
    for case in golden["raw_client_to_nest_server"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        if ["raw_bigint_response", "raw_dispose_mid_stream_fin", "raw_data_null_undefined"].contains(&name) {
            // A BigInt; and a stream that is cut off, where we go on until the stream has ended.
            continue;
        }
        let options = TcpServerOptions::new().address("127.0.0.1", 0).with(|options| {
            if name.starts_with("maxbuf") {
                options.max_buffer_size = 100;
            }
            if name.starts_with("incomplete") {
                options.incomplete_message_timeout = Duration::from_millis(150);
            }
        });
        let (service, _) = captured_service(TcpServer::new(options)).await;
        let port: u16 = service.url().rsplit(':').next().unwrap().parse().unwrap();
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        socket.set_nodelay(true).unwrap();
        for piece in case["sent"].as_array().unwrap() {
            // A server that has had enough resets the line; the reading shows it.
            let _ = socket.write_all(&bytes(piece)).await;
            if case["sent"].as_array().unwrap().len() > 1 {
                let pause = if name == "incomplete_timeout_refresh" { 80 } else { 1 };
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
        if name.contains("half_close") {
            socket.shutdown().await.unwrap();
        }
        let golden_closes = case["connection"] != "stays-open";
        let (expected, closes) = match special.get(name) {
            Some((text, closes)) => (text.as_bytes().to_vec(), *closes),
            None if name == "maxbuf_exceeded_by_coalesced_small_frames" => {
                (r#"41#{"response":1,"isDisposed":true,"id":"a"}"#.repeat(4).into_bytes(), false)
            }
            None => (bytes(&case["received"]), golden_closes),
        };
        let mut received = Vec::new();
        let wait = Duration::from_millis(if closes { 2000 } else { 120 });
        let closed = tokio::time::timeout(wait, socket.read_to_end(&mut received)).await.is_ok();
        let shown = (String::from_utf8_lossy(&received), closed);
        assert_eq!(shown, (String::from_utf8_lossy(&expected), closes), "{name}");
        drop(socket);
        service.stop(Duration::from_millis(200)).await;
        checked += 1;
    }
    assert!(checked > 50, "{checked} cases");
}

fn bytes(message: &Value) -> Vec<u8> {
    match message["raw"].as_str() {
        Some(text) => text.as_bytes().to_vec(),
        None => base64(message["raw_base64"].as_str().unwrap()),
    }
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |byte: &u8| DIGITS.iter().position(|it| it == byte).unwrap() as u32;
    let mut bytes = Vec::new();
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = group.iter().fold(0, |bits, byte| bits << 6 | digit(byte));
        let bits = bits << (6 * (4 - group.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    bytes
}
