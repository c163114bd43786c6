// SPDX-License-Identifier: MIT OR Apache-2.0
//! `martlet listen`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use martlet::microservice::shutdown_signal;
use martlet::reply::Reply;
use martlet::{
    MessageKind, Microservice, Pattern, Payload, Request, RpcError, ServiceEvent, Transport, TransportKind,
    event, message,
};
use serde_json::value::RawValue;
use tokio::sync::Notify;

use super::output::Output;
use super::{Failure, input};

const EXAMPLES: &str = "\
Examples:
  martlet listen tcp://0.0.0.0:3000 '{\"cmd\":\"sum\"}' --reply 6   stand in for a service
  martlet listen tcp://0.0.0.0:3000 echo --echo
  martlet listen nats://localhost:4222 'orders.>'              watch; requests are not answered
  martlet listen nats://localhost:4222?queue=workers jobs --reply @done.json --count 1
  martlet listen 'redis://localhost?wildcards=true' 'orders.*'
  martlet listen 'mqtt://localhost?protocolVersion=5' 'sensors/+/on'
  martlet listen tcp://0.0.0.0:3000 user.created --events | jq .data

Into a pipe, each message is one line of JSON: kind, pattern, data, and metadata, headers, from where there
are any. A TCP service sees what is sent to its own address only; NATS, Redis and MQTT bring what is
published. On RabbitMQ, what is listened to is taken out of its queue: a service there does not get it.

Exit codes: 0 ended by --count or by SIGINT or SIGTERM, 2 usage, 5 could not start, 7 other.";

/// Serve patterns: print what arrives, and answer it if told.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ListenArgs {
    /// Where to serve: tcp://HOST:PORT (port 0 takes a free one), nats://HOST, redis://HOST,
    /// amqp://HOST?queue=NAME, mqtt://HOST ….
    url: String,
    /// The patterns: texts, or JSON such as '{"cmd":"sum"}'; with the wildcards that the broker has.
    #[arg(required = true)]
    pattern: Vec<String>,
    /// Answer every request with this: JSON, or `@FILE`. Without an answer, callers wait.
    #[arg(long, short = 'r', value_name = "JSON", group = "answer")]
    reply: Option<String>,
    /// Answer every request with its own data.
    #[arg(long, group = "answer")]
    echo: bool,
    /// Answer every request with this error: JSON, or `@FILE`.
    #[arg(long, value_name = "JSON", group = "answer")]
    fail: Option<String>,
    /// Register as event handlers, beside others; requests are not answered.
    #[arg(long, short = 'e', conflicts_with = "answer")]
    events: bool,
    /// End after so many messages.
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

enum Answer {
    None,
    Echo,
    Value(Payload),
    Error(RpcError),
}

struct Listening {
    out: Output,
    answer: Answer,
    count: Option<u64>,
    seen: AtomicU64,
    enough: Notify,
}

pub(super) async fn listen(args: ListenArgs, out: Output) -> Result<(), Failure> {
    let mut transport = Transport::from_url(&args.url)?.for_servers();
    // Whoever types a command wants to hear that the broker is not there; NestJS's services wait for it.
    if transport.kind() == TransportKind::Mqtt && !transport.options().contains_key("maxConnectionAttempts") {
        transport = transport.with("maxConnectionAttempts", 1);
    }
    let answer = match (&args.reply, &args.fail) {
        (Some(reply), _) => Answer::Value(input::data(Some(reply), false)?),
        (_, Some(fail)) => {
            let error = input::data(Some(fail), false)?;
            let value = error.to_value().map_err(|error| Failure::usage(error.to_string()))?;
            Answer::Error(RpcError::json(value))
        }
        _ if args.echo => Answer::Echo,
        _ => Answer::None,
    };
    // Requests that wait in vain must not hold the end up.
    let grace = if matches!(answer, Answer::None) { Duration::ZERO } else { Duration::from_secs(5) };
    let listening = Arc::new(Listening {
        out: out.clone(),
        answer,
        count: args.count,
        seen: AtomicU64::new(0),
        enough: Notify::new(),
    });
    let noting = out.clone();
    let mut service = Microservice::new()
        .name("listen")
        .on_current_arbiter()
        .server(transport.into_server()?)
        .on(move |happened| note(&noting, happened));
    let mut patterns = Vec::<Pattern>::new();
    for text in &args.pattern {
        let pattern = input::pattern(text)?;
        if patterns.iter().any(|other| other.route() == pattern.route()) {
            return Err(Failure::usage(format!("pattern {text} is given twice")));
        }
        patterns.push(pattern.clone());
        let listening = Arc::clone(&listening);
        let handler = move |request: Request| {
            let listening = Arc::clone(&listening);
            async move { listening.take(request).await }
        };
        service =
            service.handlers(if args.events { event(pattern, handler) } else { message(pattern, handler) });
    }
    let service = service.start().await?;
    out.note(&format!("listening on {} for {}", service.url(), args.pattern.join(", ")));
    let ended = async {
        tokio::select! {
            signal = shutdown_signal() => signal,
            () = listening.enough.notified() => "--count",
        }
    };
    tokio::pin!(ended);
    let ended = ended.await;
    service.stop(grace).await;
    let seen = listening.seen.load(Ordering::Relaxed);
    if ended != "--count" {
        out.note(&format!("{seen} message{} (ended by {ended})", if seen == 1 { "" } else { "s" }));
    }
    Ok(())
}

/// What happens beside the messages that were asked for.
fn note(out: &Output, happened: &ServiceEvent) {
    match happened {
        ServiceEvent::NoMessageHandler { pattern, .. } => {
            out.note(&format!("not listening for request {pattern}: its caller was told so"));
        }
        ServiceEvent::NoEventHandler { pattern, .. } => {
            out.note(&format!("not listening for event {pattern}: dropped"));
        }
        ServiceEvent::Abandoned { .. } => {}
        other => out.note(&other.to_string()),
    }
}

impl Listening {
    async fn take(&self, request: Request) -> Result<Reply, RpcError> {
        let seen = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        if self.count.is_none_or(|count| seen <= count) {
            self.print(&request);
        }
        if self.count == Some(seen) {
            self.enough.notify_one();
        }
        match &self.answer {
            Answer::Value(payload) => Ok(Reply::Value(payload.clone())),
            Answer::Echo => Ok(Reply::Value(request.payload())),
            Answer::Error(error) => Err(error.clone()),
            Answer::None if request.kind() == MessageKind::Event => Ok(Reply::Empty),
            Answer::None => {
                // An answer, even an empty one, would get in the way of the service that is really asked.
                request.cancellation().cancelled().await;
                std::future::pending().await
            }
        }
    }

    fn print(&self, request: &Request) {
        let arrived = Arrived::of(request);
        if self.out.for_people() {
            let mut heading = format!("{} {}", arrived.kind, arrived.pattern);
            if let Some(from) = &arrived.from {
                heading.push_str(&format!(" from {from}"));
            }
            let mut text = self.out.heading(&heading);
            for (name, value) in [("metadata", &arrived.metadata), ("headers", &arrived.headers)] {
                if let Some(value) = value {
                    text.push_str(&format!("\n{name} {}", self.out.laid_out(value)));
                }
            }
            text.push_str(&format!("\n{}\n", self.out.laid_out(&arrived.data)));
            self.out.line(&text);
        } else {
            self.out.value(&arrived.json());
        }
    }
}

/// One message in parts that are JSON text, `kind` and `from` excepted.
struct Arrived {
    kind: &'static str,
    pattern: String,
    data: String,
    metadata: Option<String>,
    headers: Option<String>,
    from: Option<String>,
}

impl Arrived {
    fn of(request: &Request) -> Self {
        let kind = match request.kind() {
            MessageKind::Request => "request",
            MessageKind::Event => "event",
        };
        let text = |payload: &Payload| {
            let payload = payload.transcode(martlet::Format::Json).unwrap_or_else(|_| payload.clone());
            String::from_utf8_lossy(payload.bytes()).into_owned()
        };
        let pattern = match request.raw_pattern() {
            Some(raw) => text(&Payload::new(request.format(), bytes::Bytes::copy_from_slice(raw))),
            None => quoted(request.pattern().text()),
        };
        let metadata = request.raw_metadata().filter(|metadata| !metadata.is_null()).map(text);
        let mut arrived =
            Self { kind, pattern, data: text(&request.payload()), metadata, headers: None, from: None };
        arrived.add_context(request);
        arrived
    }

    fn add_context(&mut self, request: &Request) {
        #[cfg(feature = "tcp")]
        if let Some(context) = request.context::<martlet::tcp::TcpContext>() {
            self.from = Some(context.remote_addr.to_string());
        }
        #[cfg(feature = "nats")]
        if let Some(context) = request.context::<martlet::nats::NatsContext>() {
            self.pattern = quoted(context.subject());
            self.headers = lines(context.headers());
        }
        #[cfg(feature = "redis")]
        if let Some(context) = request.context::<martlet::redis::RedisContext>() {
            self.pattern = quoted(context.channel());
        }
        #[cfg(feature = "rabbitmq")]
        if let Some(context) = request.context::<martlet::rabbitmq::RmqContext>() {
            let pattern = context.pattern();
            self.pattern = if pattern.starts_with('{') { pattern } else { quoted(&pattern) };
            let headers = context.properties().headers;
            self.headers = (!headers.is_empty()).then(|| serde_json::Value::Object(headers).to_string());
        }
        #[cfg(feature = "mqtt")]
        if let Some(context) = request.context::<martlet::mqtt::MqttContext>() {
            self.pattern = quoted(context.topic());
            self.headers = lines(&context.properties().user_properties);
        }
        let _ = request;
    }

    fn json(&self) -> String {
        let mut text =
            format!("{{\"kind\":\"{}\",\"pattern\":{},\"data\":{}", self.kind, self.pattern, self.data);
        for (name, value) in [("metadata", &self.metadata), ("headers", &self.headers)] {
            if let Some(value) = value {
                text.push_str(&format!(",\"{name}\":{value}"));
            }
        }
        if let Some(from) = &self.from {
            text.push_str(&format!(",\"from\":{}", quoted(from)));
        }
        text.push('}');
        text
    }
}

/// Headers as an object; those that are repeated have a list.
#[cfg(any(feature = "nats", feature = "mqtt"))]
fn lines(headers: &martlet::Headers) -> Option<String> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in headers.iter() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let members: Vec<String> = names
        .iter()
        .map(|name| {
            let values: Vec<_> = headers.get_all(name).map(quoted).collect();
            let value = if values.len() == 1 { values.concat() } else { format!("[{}]", values.join(",")) };
            format!("{}:{value}", quoted(name))
        })
        .collect();
    (!members.is_empty()).then(|| format!("{{{}}}", members.join(",")))
}

/// A text as JSON.
fn quoted(text: &str) -> String {
    serde_json::value::to_raw_value(text)
        .map_or_else(|_| "null".to_owned(), |raw: Box<RawValue>| raw.get().to_owned())
}
