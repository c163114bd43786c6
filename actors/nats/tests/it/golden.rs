// SPDX-License-Identifier: MIT OR Apache-2.0
//! The golden exchanges through a real broker, both ways: what NestJS clients sent is answered with the bytes that
//! NestJS answered with; our client sends what theirs sent, and makes of NestJS's replies what theirs made of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::{HeaderMap, Message, Subscriber};
use futures::{FutureExt, StreamExt};
use martlet_core::payload::EncodeError;
use martlet_core::reply::IntoRecord;
use martlet_core::{
    CallError, Ctx, Data, Format, HandlerGroup, Headers, Metadata, Pattern, Payload, RpcError,
    RunningService, message,
};
use martlet_nats::{NatsClient, NatsContext};
use martlet_testkit::conformance::quiet_deliberate_panics;
use martlet_testkit::nest::{NestApp, exchanges};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::broker::Broker;
use crate::world::{GRACE, client_options, serve, server_options, until};

const VECTORS: &str = include_str!("../vectors/nats.json");
const NEST_12: [&str; 3] = [
    include_str!("../vectors/nest12-nats-request-metadata.json"),
    include_str!("../vectors/nest12-nats-request-metadata-and-headers.json"),
    include_str!("../vectors/nest12-nats-event-metadata.json"),
];

/// Exchanges that are not answered as NestJS answers them, beside those of every transport: NestJS sends the record
/// that a handler returns, here its headers are headers and its data is the value (NATS-12); and a packet without
/// data has null here.
const DIFFERENT: [&str; 2] = ["handler_returns_record", "record_undefined_data"];

/// The members of a packet, as they were written.
#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    pattern: &'a RawValue,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    metadata: Option<Metadata>,
}

/// Data as it was written, with headers.
struct AsWritten(Payload, Headers);

impl IntoRecord for AsWritten {
    fn into_record(self, _: Format) -> Result<(Payload, Headers), EncodeError> {
        Ok((self.0, self.1))
    }
}

/// The header lines of a vector: the block of a message, or an object.
fn header_lines(vector: &Value) -> Vec<(String, String)> {
    match &vector["headers"] {
        Value::String(block) => {
            let lines = block.lines().skip(1).filter_map(|line| line.split_once(": "));
            lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        }
        Value::Object(map) => {
            map.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect()
        }
        _ => Vec::new(),
    }
}

fn sorted(mut lines: Vec<(String, String)>) -> Vec<(String, String)> {
    lines.sort();
    lines
}

/// A message of a NestJS client, with a reply subject if it is a request.
async fn publish(raw: &async_nats::Client, vector: &Value, reply: Option<String>) {
    let subject = vector["subject"].as_str().unwrap().to_owned();
    let payload = vector["raw"].as_str().unwrap().to_owned().into();
    let mut headers = HeaderMap::new();
    for (name, value) in header_lines(vector) {
        headers.append(name, value);
    }
    match (reply, headers.is_empty()) {
        (Some(reply), true) => raw.publish_with_reply(subject, reply, payload).await.unwrap(),
        (Some(reply), false) => {
            raw.publish_with_reply_and_headers(subject, reply, headers, payload).await.unwrap();
        }
        (None, true) => raw.publish(subject, payload).await.unwrap(),
        (None, false) => raw.publish_with_headers(subject, headers, payload).await.unwrap(),
    }
}

/// What of the application is of NATS alone.
fn of_nats(app: &NestApp) -> Vec<HandlerGroup> {
    let echo = message("h.echo", |Ctx(context): Ctx<NatsContext>, Data(data): Data<Value>| {
        let mut headers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, value) in context.headers().iter() {
            headers.entry(name).or_default().push(value);
        }
        let headers = if headers.is_empty() { Value::Null } else { json!(headers) };
        Ok::<_, RpcError>(json!({"d": data, "subject": context.subject(), "headers": headers}))
    });
    vec![
        echo,
        message("nw.*", || Ok::<_, RpcError>("star")),
        message("ng.>", || Ok::<_, RpcError>("gt")),
        app.notes("new.*.x"),
        app.notes("qe"),
    ]
}

async fn service(broker: &Broker, app: &NestApp) -> RunningService {
    quiet_deliberate_panics();
    let groups = app.handlers().into_iter().chain(of_nats(app));
    let groups = groups.map(|group| group.supervision(|supervision| supervision.poison_after = 0));
    serve(server_options(broker), groups).await.0
}

#[actix::test]
async fn what_nestjs_answered_is_answered_byte_for_byte() {
    let broker = Broker::start();
    let service = service(&broker, &NestApp::new()).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let (mut replies, mut errors) = (0, 0);
    for exchange in exchanges(VECTORS).iter().filter(|exchange| !exchange.is_event) {
        if exchange.is_different() || DIFFERENT.contains(&&*exchange.name) {
            continue;
        }
        let name = &exchange.name;
        let inbox = raw.new_inbox();
        let mut answers = raw.subscribe(inbox.clone()).await.unwrap();
        publish(&raw, &exchange.request, Some(inbox)).await;
        for expected in &exchange.replies {
            let answer = tokio::time::timeout(Duration::from_secs(5), answers.next()).await;
            let answer = answer.unwrap_or_else(|_| panic!("{name} is not answered")).unwrap();
            let answered = std::str::from_utf8(&answer.payload).unwrap();
            if exchange.request["subject"] == "h.echo" {
                // The driver does not keep the order of headers, nor do the members of this answer.
                let value = |text| serde_json::from_str::<Value>(text).unwrap();
                assert_eq!(value(answered), value(expected), "{name}");
            } else {
                assert_eq!(answered, expected, "{name}");
            }
            assert!(answer.headers.is_none(), "{name}");
            replies += 1;
            errors += usize::from(answered.contains(r#""err":"#));
        }
        if exchange.replies.is_empty() {
            // Nobody is subscribed, says the broker.
            let answer = tokio::time::timeout(Duration::from_secs(5), answers.next()).await.unwrap().unwrap();
            assert_eq!(answer.status, Some(async_nats::StatusCode::NO_RESPONDERS), "{name}");
        }
        // A round trip behind the last answer: nothing comes after it.
        let probe = r#"{"pattern":"sum","data":[1],"id":"p"}"#;
        raw.request("sum", probe.into()).await.unwrap();
        let more = answers.next().now_or_never();
        assert!(more.is_none(), "{name}: {more:?}");
    }
    let all = exchanges(VECTORS);
    let golden = all.iter().flat_map(|exchange| &exchange.replies);
    assert_eq!(errors, golden.filter(|reply| reply.contains(r#""err":"#)).count());
    assert!(errors >= 24 && replies >= 95, "{errors} errors of {replies} replies");
    service.stop(GRACE).await;
}

#[actix::test]
async fn events_of_nestjs_reach_their_handlers() {
    let broker = Broker::start();
    let app = NestApp::new();
    let service = service(&broker, &app).await;
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let mut expected = Vec::new();
    let of_12 = serde_json::from_str::<Value>(NEST_12[2]).unwrap();
    let exchanges = exchanges(VECTORS);
    let events = exchanges.iter().filter(|exchange| exchange.is_event).map(|exchange| &exchange.request);
    for event in events.chain([&of_12]) {
        publish(&raw, event, None).await;
        let handled = match event["subject"].as_str().unwrap() {
            subject if subject.starts_with("new.") => "new.*.x",
            subject @ ("evt" | "evt_err" | "evt_obs" | "qe" | r#"{"type":"created","v":1}"#) => subject,
            _ => continue,
        };
        expected.push((handled.to_owned(), event["data"].clone()));
    }
    assert!(expected.len() >= 9, "{expected:?}");
    let seen = RefCell::new(Vec::new());
    until("all were seen", || {
        seen.borrow_mut().extend(app.take_events());
        seen.borrow().len() >= expected.len()
    })
    .await;
    // Each pattern has a handler of its own, and those do not wait for each other.
    let by_text = |mut events: Vec<(String, Value)>| {
        events.sort_by_key(|(pattern, data)| format!("{pattern} {data}"));
        events
    };
    assert_eq!(by_text(seen.into_inner()), by_text(expected));
    service.stop(GRACE).await;
}

/// The next message that a client of ours published for somebody else.
async fn captured(everything: &mut Subscriber) -> Message {
    loop {
        let next = tokio::time::timeout(Duration::from_secs(5), everything.next()).await;
        let message = next.expect("it is published").unwrap();
        if !message.subject.starts_with("_INBOX") {
            return message;
        }
    }
}

/// Compares a message of our client with what a NestJS client sent in its place; the id of ours.
fn check_bytes(name: &str, message: &Message, vector: &Value, is_event: bool) -> String {
    let golden = vector["raw"].as_str().unwrap();
    let sent = std::str::from_utf8(&message.payload).unwrap();
    let id = match is_event {
        true => String::new(),
        false => sent.rsplit_once(r#""id":""#).unwrap().1.split_once('"').unwrap().0.to_owned(),
    };
    if is_event {
        assert_eq!(sent, golden, "{name}");
    } else {
        let (before, _) = golden.rsplit_once(r#""id":""#).unwrap();
        assert_eq!(sent, format!(r#"{before}"id":"{id}"}}"#), "{name}");
    }
    assert_eq!(message.subject.as_str(), vector["subject"], "{name}");
    assert_eq!(message.reply.is_some(), !is_event, "{name}");
    let headers = message.headers.iter().flat_map(HeaderMap::iter);
    let headers = headers.flat_map(|(name, values)| {
        values.iter().map(move |value| (name.to_string(), value.as_str().to_owned()))
    });
    assert_eq!(sorted(headers.collect()), sorted(header_lines(vector)), "{name}");
    id
}

#[actix::test]
async fn what_nestjs_clients_sent_is_sent_byte_for_byte_and_their_replies_mean_the_same() {
    let broker = Broker::start();
    let raw = async_nats::connect(broker.url()).await.unwrap();
    let mut everything = raw.subscribe(">").await.unwrap();
    raw.flush().await.unwrap();
    // What Martlet adds of its own (deadline, trace, cancellations) is off.
    let mut options = client_options(&broker).cancellation(false);
    options.client.propagate = false;
    let client = NatsClient::new(options);
    let (mut sent, mut compared) = (0, 0);
    let of_12 = NEST_12.map(|text| serde_json::from_str::<Value>(text).unwrap());
    let of_11 = exchanges(VECTORS);
    let of_11 = of_11.iter().map(|exchange| (&exchange.request, exchange.is_event, Some(exchange)));
    let of_12 = of_12.iter().map(|vector| (vector, vector["pattern"] == "v12.user.created", None));
    for (vector, is_event, exchange) in of_11.chain(of_12) {
        let name = vector["name"].as_str().unwrap();
        let body: Body<'_> = serde_json::from_str(vector["raw"].as_str().unwrap()).unwrap();
        // A client of ours always sends data.
        let Some(data) = body.data else { continue };
        let data = Payload::new(Format::Json, data.get().as_bytes().to_vec());
        let pattern = match serde_json::from_str::<Value>(body.pattern.get()).unwrap() {
            Value::String(text) => Pattern::from(text),
            _ => Pattern::parse(body.pattern.get()),
        };
        let record = AsWritten(data, header_lines(vector).into_iter().collect());
        let metadata = body.metadata.unwrap_or_default();
        sent += 1;
        if is_event {
            client.emit_with(pattern, record, metadata).await.unwrap();
            check_bytes(name, &captured(&mut everything).await, vector, true);
            continue;
        }
        let mut call = client.send::<Value>(pattern, record);
        for (key, value) in metadata.iter() {
            call = call.metadata(key, value);
        }
        let mut replies = call.stream();
        let answer = async {
            let message = captured(&mut everything).await;
            let id = check_bytes(name, &message, vector, false);
            let golden = exchange.map(|exchange| (exchange, exchange.id().to_owned()));
            for reply in golden.iter().flat_map(|(exchange, _)| &exchange.replies) {
                let (_, golden_id) = golden.as_ref().unwrap();
                let reply = reply.replace(golden_id, &id);
                raw.publish(message.reply.clone().unwrap(), reply.into()).await.unwrap();
            }
        };
        let ends = exchange
            .filter(|exchange| !exchange.replies.is_empty() && exchange.name != "stream_cancelled_by_client");
        let Some(exchange) = ends else {
            // Its call is dropped: there is nothing to make anything of.
            futures::select_biased! {
                () = answer.fuse() => {}
                reply = replies.next().fuse() => panic!("{name}: {reply:?}"),
            }
            continue;
        };
        let outcome = async {
            let (mut next, mut error) = (Vec::new(), Value::Null);
            while let Some(reply) = replies.next().await {
                match reply {
                    Ok(value) => next.push(value),
                    Err(CallError::Remote(remote)) => error = remote.payload().to_value().unwrap(),
                    Err(other) => panic!("{name}: {other:?}"),
                }
            }
            (next, error)
        };
        let ((next, error), ()) = futures::join!(outcome, answer);
        let observed = match exchange.name.as_str() {
            // An item without a value ends NestJS's call with the packet itself as a value; here it is null.
            "stream_undefined_middle" => json!([1, null, 3]),
            _ => exchange.observed["next"].clone(),
        };
        assert_eq!(Value::from(next), observed, "{name}");
        assert_eq!(error, exchange.observed["error"], "{name}");
        compared += 1;
    }
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    assert!(sent >= 115 && compared >= 90, "{sent} sent, {compared} compared");
    client.close().await;
}
