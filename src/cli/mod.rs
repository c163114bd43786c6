// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `martlet` understands, and what it ends with.

mod bench;
mod call;
mod input;
mod json;
mod listen;
mod output;
#[allow(dead_code, unreachable_pub)]
mod report;

use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use martlet::{CallError, ClientProxy, ConfigError, StartError, Transport, TransportKind};

use self::output::{Colour, Layout, Output};

/// Talks to NestJS and Martlet microservices.
#[derive(Parser)]
#[command(name = "martlet", version, propagate_version = true, after_long_help = EXIT_CODES, after_help = SEE_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// When to use colours; NO_COLOR turns them off too.
    #[arg(long, value_enum, default_value_t = Colour::Auto, global = true, value_name = "WHEN")]
    color: Colour,
    /// How to print JSON: pretty on a terminal and compact into a pipe, unless told.
    #[arg(long, value_enum, default_value_t = Layout::Auto, global = true, value_name = "FORM")]
    format: Layout,
}

const SEE_HELP: &str =
    "`martlet help COMMAND` has examples; `martlet --help` has the URLs and the exit codes.";

const EXIT_CODES: &str = "\
URLs:
  tcp://localhost:3000                        NestJS's TCP transport
  tcps://example.com:3000?ca=ca.pem           the same with TLS
  nats://user:pass@a:4222,b:4222              NATS, one or more brokers; tls:// with TLS
  redis://user:pass@localhost:6379/0          Redis, a database; rediss:// with TLS
  amqp://user:pass@a:5672/vhost?queue=orders  RabbitMQ, one or more brokers; amqps:// with TLS
  mqtt://localhost:1883?protocolVersion=5     MQTT; mqtts:// with TLS, ws:// and wss:// with a path
  …?maxBufferSize=1000&tlsOptions.key=k.pem   options, by the names NestJS gives them

Exit codes:
  0  done: the reply, the event, the run without failures
  1  the handler answered with an error; in a bench: calls failed or replies were wrong
  2  the command line is wrong: URL, option, pattern or data
  3  no handler for the pattern
  4  no reply in time (the handler may have run), or, of an event, no confirmation
  5  not sent or not started: no connection, or the address is taken
  6  the connection was lost after sending (the handler may have run)
  7  anything else, such as a reply that cannot be read";

#[derive(Subcommand)]
enum Command {
    /// Send a request and print the reply.
    Send(call::SendArgs),
    /// Send an event, which nobody answers.
    Emit(call::EmitArgs),
    /// Serve patterns: print what arrives, and answer it if told.
    Listen(listen::ListenArgs),
    /// Measure throughput and latency; every reply is checked.
    Bench(bench::BenchArgs),
    /// Print a script that completes commands and options in a shell.
    #[command(
        after_help = "Example:\n  martlet completions bash > ~/.local/share/bash-completion/completions/martlet"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Where to and what for.
#[derive(Args)]
struct Target {
    /// The service: tcp://HOST:PORT, nats://HOST, redis://HOST, amqp://HOST?queue=NAME, mqtt://HOST … (`martlet
    /// --help` has more).
    url: String,
    /// The pattern: a text, or JSON such as '{"cmd":"sum"}'.
    pattern: String,
}

/// What the tool ends with when it does not succeed.
#[derive(Debug)]
struct Failure {
    code: u8,
    text: String,
    /// JSON that belongs to the text.
    value: Option<String>,
}

const REMOTE: u8 = 1;
const USAGE: u8 = 2;
const NO_HANDLER: u8 = 3;
const TIMEOUT: u8 = 4;
const NOT_SENT: u8 = 5;
const LOST: u8 = 6;
const OTHER: u8 = 7;

impl Failure {
    fn new(code: u8, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), value: None }
    }

    fn usage(text: impl Into<String>) -> Self {
        Self::new(USAGE, text)
    }

    /// The outcome of a call in the words of someone who can do something about it.
    fn of_call(error: &CallError, transport: &Transport, pattern: &str) -> Self {
        match error {
            CallError::Remote(remote) => Self {
                code: REMOTE,
                text: "the handler answered with an error".to_owned(),
                value: Some(String::from_utf8_lossy(remote.payload().bytes()).into_owned()),
            },
            CallError::NoHandler { .. } => {
                let hint = match pattern.starts_with(['{', '[']) {
                    true => "an object pattern matches only with all its members, and no others",
                    false => "if the service has {cmd: …} there, write '{\"cmd\":\"…\"}'",
                };
                let text = format!("no handler for pattern {pattern} at {transport}: {hint}");
                Self::new(NO_HANDLER, text)
            }
            CallError::Timeout { after } => Self::new(
                TIMEOUT,
                format!(
                    "no reply from {transport} within {after:?}: the handler may still run; --timeout waits longer"
                ),
            ),
            CallError::NotSent { cause } => Self::new(NOT_SENT, format!("not sent to {transport}: {cause}")),
            CallError::Lost { cause } => {
                let text = format!(
                    "connection to {transport} lost before the reply: {cause}: the handler may have run"
                );
                Self::new(LOST, text)
            }
            CallError::Decode(cause) => Self::new(OTHER, format!("cannot read the reply: {cause}")),
            CallError::Encode(cause) => Self::usage(format!("cannot send this: {cause}")),
            other => Self::new(OTHER, other.to_string()),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let code = if matches!(error, StartError::Transport { .. }) { NOT_SENT } else { USAGE };
        Self::new(code, error.to_string())
    }
}

/// A client that adds nothing of its own to what it is told to send.
fn plain_client(transport: &Transport) -> Result<ClientProxy, ConfigError> {
    match transport.kind() {
        #[cfg(feature = "tcp")]
        TransportKind::Tcp => Ok(transport.tcp_client_options()?.with(|o| o.client.propagate = false).into()),
        #[cfg(feature = "nats")]
        TransportKind::Nats => {
            let mut options = transport.nats_client_options()?;
            options.client.propagate = false;
            Ok(martlet::nats::NatsClient::new(options))
        }
        #[cfg(feature = "redis")]
        TransportKind::Redis => {
            let mut options = transport.redis_client_options()?;
            options.client.propagate = false;
            Ok(options.into())
        }
        #[cfg(feature = "rabbitmq")]
        TransportKind::Rmq => {
            let mut options = transport.rmq_client_options()?;
            options.client.propagate = false;
            Ok(options.into())
        }
        #[cfg(feature = "mqtt")]
        TransportKind::Mqtt => {
            let mut options = transport.mqtt_client_options()?;
            options.client.propagate = false;
            Ok(options.into())
        }
        _ => transport.clone().into_client(),
    }
}

/// Why messages of this transport cannot have such a header, if they cannot.
fn no_header(transport: &Transport, name: &str) -> Option<String> {
    match transport.kind() {
        TransportKind::Nats | TransportKind::Rmq => None,
        TransportKind::Mqtt => {
            let version = transport.options().get("protocolVersion");
            let is_5 = version.is_some_and(|version| version == "5" || version == 5);
            // `:qos` and the like are publish options, which every version has.
            (!is_5 && !name.starts_with(':')).then(|| {
                "mqtt 3.1.1 has no user properties: add protocolVersion=5 to the url, or use --metadata, which travels \
                 in the packet"
                    .to_owned()
            })
        }
        other => Some(format!("{} has no headers: --metadata travels in the packet", other.name())),
    }
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = Output::new(cli.color, cli.format);
    let system = actix::System::new();
    let done = system.block_on(async {
        match cli.command {
            Command::Send(args) => call::send(args, &mut out).await,
            Command::Emit(args) => call::emit(args).await,
            Command::Listen(args) => listen::listen(args, out.clone()).await,
            Command::Bench(args) => bench::bench(args, &mut out).await,
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "martlet", &mut script);
                out.raw(&script);
                Ok(())
            }
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            out.failure(&failure.text, failure.value.as_deref());
            ExitCode::from(failure.code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_defined() {
        Cli::command().debug_assert();
    }
}
