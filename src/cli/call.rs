// SPDX-License-Identifier: MIT OR Apache-2.0
//! `martlet send` and `martlet emit`.

use std::time::Duration;

use clap::Args;
use futures::{FutureExt, Stream, StreamExt};
use martlet::reply::Record;
use martlet::{CallError, ClientProxy, ConnectionStatus, EmitOptions, Metadata, Pattern, Payload, Transport};
use serde_json::value::RawValue;

use super::output::Output;
use super::{Failure, Target, input, no_header, plain_client};

const SEND_EXAMPLES: &str = "\
Examples:
  martlet send tcp://localhost:3000 '{\"cmd\":\"sum\"}' '[1,2,3]'
  martlet send tcp://localhost:3000 greet --text hello       a text, without quotes
  martlet send tcp://localhost:3000 import @orders.json      data from a file
  jq .order big.json | martlet send tcp://localhost:3000 import -
  martlet send nats://localhost:4222 time.us.east --header tenant=acme --timeout 2s
  martlet send 'amqp://localhost?queue=orders' '{\"cmd\":\"sum\"}' '[1,2,3]'
  martlet send tcp://localhost:3000 ticks --stream           every reply, as it comes

Exit codes: 0 replied, 1 the handler answered an error, 2 usage, 3 no handler, 4 timeout, 5 not sent,
6 connection lost after sending, 7 other.";

const EMIT_EXAMPLES: &str = "\
Examples:
  martlet emit tcp://localhost:3000 user.created '{\"id\":7}'
  martlet emit nats://localhost:4222 user.created @user.json --header tenant=acme
  martlet emit mqtt://localhost sensors/7/on --header :qos=1

Exit codes: 0 confirmed by the broker (Redis, RabbitMQ, MQTT with :qos=1 or 2), elsewhere handed to
the connection, 2 usage, 4 not confirmed in time, 5 not sent, 6 connection lost, 7 other. With 4 and 6
the event may have arrived.";

/// What is sent.
#[derive(Args)]
struct Message {
    #[command(flatten)]
    target: Target,
    /// The data: JSON, `-` for stdin, `@FILE` for a file. Default: null.
    #[arg(allow_negative_numbers = true)]
    data: Option<String>,
    /// The data is a plain text, not JSON.
    #[arg(long, short = 't', requires = "data")]
    text: bool,
    /// Packet metadata, which NestJS 12 handlers read with ctx.getMetadata(). Repeatable.
    #[arg(long, short = 'm', value_name = "NAME=VALUE", value_parser = input::pair)]
    metadata: Vec<(String, String)>,
    /// A header (NATS, RabbitMQ) or user property (MQTT 5). `amqp.priority` and the like are RabbitMQ's
    /// properties, `:qos` and `:retain` MQTT's publish options. Repeatable.
    #[arg(long, short = 'H', value_name = "NAME=VALUE", value_parser = input::pair)]
    header: Vec<(String, String)>,
}

/// Send a request and print the reply.
#[derive(Args)]
#[command(after_help = SEND_EXAMPLES)]
pub(super) struct SendArgs {
    #[command(flatten)]
    message: Message,
    /// How long to wait for a reply (each reply, with --stream): 500ms, 5s, 2m. 0 waits for ever.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = input::duration)]
    timeout: Duration,
    /// Print every reply as it comes, until the handler completes. Without it, the first is taken.
    #[arg(long, short = 's')]
    stream: bool,
}

/// Send an event, which nobody answers.
#[derive(Args)]
#[command(after_help = EMIT_EXAMPLES)]
pub(super) struct EmitArgs {
    #[command(flatten)]
    message: Message,
    /// How long connecting, writing and the broker's confirmation may take: 500ms, 5s, 2m. 0 waits for ever.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = input::duration)]
    timeout: Duration,
}

struct Prepared {
    transport: Transport,
    client: ClientProxy,
    pattern: Pattern,
    record: Record<Box<RawValue>>,
    metadata: Metadata,
}

impl Message {
    fn prepare(&self) -> Result<Prepared, Failure> {
        let transport = Transport::from_url(&self.target.url)?.for_clients();
        let client = plain_client(&transport)?;
        let pattern = input::pattern(&self.target.pattern)?;
        if let Some(why) = self.header.iter().find_map(|(name, _)| no_header(&transport, name)) {
            return Err(Failure::usage(why));
        }
        let data = raw(&input::data(self.data.as_deref(), self.text)?)?;
        let mut record = Record::new(data);
        for (name, value) in &self.header {
            record = record.header(name, value);
        }
        let metadata = self.metadata.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        Ok(Prepared { transport, client, pattern, record, metadata })
    }
}

fn raw(data: &Payload) -> Result<Box<RawValue>, Failure> {
    let text = String::from_utf8_lossy(data.bytes()).into_owned();
    RawValue::from_string(text).map_err(|error| Failure::usage(format!("data is not JSON: {error}")))
}

pub(super) async fn send(args: SendArgs, out: &mut Output) -> Result<(), Failure> {
    let Prepared { transport, client, pattern, record, metadata } = args.message.prepare()?;
    let mut call = client.send::<Box<RawValue>>(pattern, record);
    for (name, value) in metadata.iter() {
        call = call.metadata(name, value);
    }
    call = if args.timeout.is_zero() { call.no_timeout() } else { call.timeout(args.timeout) };
    let mut replies = call.stream();
    let mut done = Ok(());
    while let Some(reply) = replies.next().await {
        match reply {
            Ok(value) => out.value(value.get()),
            Err(error) => done = Err(Failure::of_call(&error, &transport, &args.message.target.pattern)),
        }
        if !args.stream {
            break;
        }
    }
    drop(replies);
    client.close().await;
    done
}

pub(super) async fn emit(args: EmitArgs) -> Result<(), Failure> {
    let Prepared { transport, client, pattern, record, metadata } = args.message.prepare()?;
    let mut statuses = client.status_stream();
    let options = EmitOptions::new().metadata(metadata);
    let options = if args.timeout.is_zero() { options.no_timeout() } else { options.timeout(args.timeout) };
    let done = client.emit_with(pattern, record, options).await.map_err(|error| match error {
        // A session takes what waits for it in its first turn. Where nobody confirms, the event has ended then; so, once
        // there was a connection, it is the confirmation that is missing.
        CallError::Timeout { after } if was_connected(&mut statuses) => {
            let text = format!("not confirmed by {transport} within {after:?}: the event may have arrived");
            Failure::new(super::TIMEOUT, text)
        }
        CallError::Timeout { after } => {
            Failure::new(super::NOT_SENT, format!("not sent to {transport} within {after:?}"))
        }
        CallError::Lost { cause } => {
            let text = format!("connection to {transport} lost: {cause}: the event may have arrived");
            Failure::new(super::LOST, text)
        }
        error => Failure::of_call(&error, &transport, &args.message.target.pattern),
    });
    client.close().await;
    done
}

/// Whether there has been a connection so far.
fn was_connected(statuses: &mut (impl Stream<Item = ConnectionStatus> + Unpin)) -> bool {
    std::iter::from_fn(|| statuses.next().now_or_never().flatten())
        .any(|status| status == ConnectionStatus::Connected)
}
