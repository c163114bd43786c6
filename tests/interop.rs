// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interop lab: unmodified NestJS 10, 11 and 12 against Martlet, both ways, over TCP, NATS, Redis, RabbitMQ and
//! MQTT.
//!
//! ```text
//! tests/interop/setup.sh                                           # once: brokers, npm packages
//! cargo test --all-features --test interop                        # all, and docs/compatibility.md is compared
//! cargo test --all-features --test interop -- tcp::nest12         # those whose name contains the text
//! UPDATE_COMPATIBILITY=1 cargo test --all-features --test interop # writes docs/compatibility.md
//! INTEROP_SABOTAGE=1 cargo test --all-features --test interop sum # NestJS adds wrongly: this must fail
//! ```
//!
//! The peers of one version, transport and direction are started once and shared by its tests, which run
//! one after the other; after each test its NestJS process must have logged no more than the test says.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::LocalBoxFuture;

#[path = "interop/brokers.rs"]
mod brokers;
#[path = "interop/example.rs"]
mod example;
#[path = "interop/failures.rs"]
mod failures;
#[path = "interop/garbage.rs"]
mod garbage;
#[path = "interop/matrix.rs"]
mod matrix;
#[path = "interop/mqtt.rs"]
mod mqtt;
#[path = "interop/pair.rs"]
mod pair;
#[path = "interop/peer.rs"]
mod peer;
#[path = "interop/rabbitmq.rs"]
mod rabbitmq;
#[path = "interop/records.rs"]
mod records;
#[path = "interop/service.rs"]
mod service;
#[path = "interop/to_example.rs"]
mod to_example;
#[path = "interop/to_martlet.rs"]
mod to_martlet;
#[path = "interop/to_nest.rs"]
mod to_nest;
#[path = "interop/vectors.rs"]
mod vectors;
#[path = "interop/wire.rs"]
mod wire;

use brokers::Brokers;
use martlet::TransportId;
use pair::Pair;
use wire::Transport;

const VERSIONS: [u32; 3] = [10, 11, 12];
/// How long one test may take. RabbitMQ needs some of it to start, on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::enum_variant_names, reason = "the names of the tests have the whole phrase")]
enum Direction {
    ToMartlet,
    /// `examples/interop_service.rs`, in a process of its own.
    ToExample,
    ToNest,
}

impl Direction {
    const ALL: [Self; 3] = [Self::ToMartlet, Self::ToExample, Self::ToNest];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ToMartlet => "to_martlet",
            Self::ToExample => "to_example",
            Self::ToNest => "to_nest",
        })
    }
}

/// Where a behaviour exists.
type Applies = fn(u32, Transport) -> bool;
type Body = for<'a> fn(&'a Pair) -> LocalBoxFuture<'a, ()>;

fn everywhere(_: u32, _: Transport) -> bool {
    true
}

fn on_tcp(_: u32, transport: Transport) -> bool {
    transport == Transport::Tcp
}

fn on_nats(_: u32, transport: Transport) -> bool {
    transport == Transport::Nats
}

fn with_broker(_: u32, transport: Transport) -> bool {
    transport.wire().broker.is_some()
}

fn with_headers(_: u32, transport: Transport) -> bool {
    transport.wire().headers
}

fn with_wildcards(_: u32, transport: Transport) -> bool {
    transport.wire().wildcards.is_some()
}

/// Handlers `only…`, for one transport each.
const TRANSPORT_FILTERS: [(&str, TransportId); 5] = [
    ("Tcp", TransportId::TCP),
    ("Nats", TransportId::NATS),
    ("Redis", TransportId::REDIS),
    ("Rmq", TransportId::RMQ),
    ("Mqtt", TransportId::MQTT),
];

/// Something that must work in one direction, with every version and transport that has it.
struct Behaviour {
    /// Its row in the matrix.
    title: &'static str,
    /// The function that tests it.
    function: &'static str,
    applies: Applies,
    body: Body,
}

/// `LIST: "title" [where it applies] function,` …
macro_rules! behaviours {
    ($list:ident: $($title:literal [$applies:path] $function:ident,)*) => {
        pub(crate) const $list: &[crate::Behaviour] = &[$(crate::Behaviour {
            title: $title,
            function: stringify!($function),
            applies: $applies,
            body: |pair| Box::pin($function(pair)),
        }),*];
    };
}
use behaviours;

/// One test: a behaviour with one version over one transport.
#[derive(Clone, Copy)]
struct Test {
    transport: Transport,
    version: u32,
    direction: Direction,
    behaviour: &'static str,
    function: &'static str,
    body: Body,
}

impl Test {
    fn name(&self) -> String {
        format!("{}::nest{}::{}::{}", self.transport, self.version, self.direction, self.function)
    }
}

fn all_tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for transport in Transport::all() {
        for version in VERSIONS.into_iter().filter(|version| *version >= transport.wire().since) {
            for direction in Direction::ALL {
                let lists: &[&[Behaviour]] = match direction {
                    Direction::ToMartlet => &[
                        to_martlet::ALL,
                        records::TO_MARTLET,
                        rabbitmq::TO_MARTLET,
                        mqtt::TO_MARTLET,
                        garbage::TO_MARTLET,
                        failures::TO_MARTLET,
                    ],
                    Direction::ToExample => &[to_example::ALL],
                    Direction::ToNest => &[
                        to_nest::ALL,
                        records::TO_NEST,
                        rabbitmq::TO_NEST,
                        mqtt::TO_NEST,
                        garbage::TO_NEST,
                        failures::TO_NEST,
                    ],
                };
                for it in lists.iter().copied().flatten().filter(|it| (it.applies)(version, transport)) {
                    tests.push(Test {
                        transport,
                        version,
                        direction,
                        behaviour: it.title,
                        function: it.function,
                        body: it.body,
                    });
                }
            }
        }
    }
    tests
}

/// Where the main thread panicked last.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [serve, arguments @ ..] = &arguments[..]
        && serve == service::SERVE
    {
        return service::serve(arguments);
    }
    let exact = arguments.iter().any(|argument| argument == "--exact");
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let wanted = |name: &str| {
        filters.is_empty()
            || filters.iter().any(|filter| if exact { name == *filter } else { name.contains(*filter) })
    };
    let tests = all_tests();
    let golden = vectors::all();
    if arguments.iter().any(|argument| argument == "--list") {
        for name in tests.iter().map(Test::name).chain(golden.iter().map(|(name, _)| (*name).to_owned())) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let main_thread = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        // Handlers of ours panic on their own threads, on purpose.
        if std::thread::current().id() == main_thread {
            *PANIC.lock().unwrap() = Some(info.to_string());
        }
    }));
    let selected: Vec<Test> = tests.iter().copied().filter(|test| wanted(&test.name())).collect();
    let golden: Vec<_> = golden.into_iter().filter(|(name, _)| wanted(name)).collect();
    println!("\nrunning {} tests", selected.len() + golden.len());
    let mut run = Run::default();
    if let Some(missing) = peer::missing() {
        run.failed.push(("setup".to_owned(), missing));
        return run.close(0);
    }
    if selected.iter().any(|test| test.direction == Direction::ToExample) {
        example::build();
    }
    actix_rt::System::new().block_on(async {
        let brokers = Rc::new(Brokers::default());
        for (name, body) in golden {
            run.one(name.to_owned(), body(Rc::clone(&brokers))).await;
        }
        run_pairs(&mut run, &brokers, &selected).await;
    });
    let filtered_out = all_tests().len() + vectors::all().len() - run.passed.len() - run.failed.len();
    if filtered_out == 0 && run.failed.is_empty() {
        let page = matrix::render(&selected);
        if std::env::var_os("UPDATE_COMPATIBILITY").is_some() {
            std::fs::write(matrix::path(), page).unwrap();
            println!("wrote {}", matrix::path().display());
        } else if std::fs::read_to_string(matrix::path()).unwrap_or_default() != page {
            let reason = "differs from what ran: run again with UPDATE_COMPATIBILITY=1 and commit it";
            run.failed.push(("docs/compatibility.md".to_owned(), reason.to_owned()));
        }
    } else {
        println!("docs/compatibility.md was not compared: not every test ran and passed");
    }
    run.close(filtered_out)
}

/// Runs the tests of each pair on the same peers.
async fn run_pairs(run: &mut Run, brokers: &Rc<Brokers>, tests: &[Test]) {
    let same = |one: &Test, other: &Test| {
        (one.transport, one.version, one.direction) == (other.transport, other.version, other.direction)
    };
    for tests in tests.chunk_by(same) {
        let (transport, version, direction) = (tests[0].transport, tests[0].version, tests[0].direction);
        let started = guarded(Pair::start(brokers, version, transport, direction)).await;
        let pair = match started {
            Ok(pair) => pair,
            Err(reason) => {
                run.failed.extend(tests.iter().map(|test| (test.name(), reason.clone())));
                continue;
            }
        };
        for test in tests {
            run.one(test.name(), pair.run(test.body)).await;
        }
        if let Err(reason) = guarded(pair.stop()).await {
            run.failed.push((format!("{transport}::nest{version}::{direction}::stop"), reason));
        }
    }
}

/// The value, or why there is none: a panic's text, or that it took too long.
async fn guarded<T>(body: impl Future<Output = T>) -> Result<T, String> {
    match tokio::time::timeout(LIMIT, AssertUnwindSafe(body).catch_unwind()).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(_)) => Err(PANIC.lock().unwrap().take().unwrap_or_default()),
        Err(_) => Err(format!("took longer than {LIMIT:?}")),
    }
}

#[derive(Default)]
struct Run {
    passed: Vec<String>,
    failed: Vec<(String, String)>,
    started: Option<Instant>,
}

impl Run {
    async fn one(&mut self, name: String, body: impl Future<Output = ()>) {
        let started = Instant::now();
        self.started.get_or_insert(started);
        let result = guarded(body).await;
        let shown = if result.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {shown} ({} ms)", started.elapsed().as_millis());
        if let Err(reason) = &result {
            println!("{reason}");
        }
        match result {
            Ok(()) => self.passed.push(name),
            Err(reason) => self.failed.push((name, reason)),
        }
    }

    /// Prints what cargo's own harness prints at the end.
    fn close(self, filtered_out: usize) -> ExitCode {
        if !self.failed.is_empty() {
            println!("\nfailures:");
            for (name, reason) in &self.failed {
                println!("\n---- {name} ----\n{reason}");
            }
        }
        let ok = self.failed.is_empty() && !self.passed.is_empty();
        println!(
            "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {filtered_out} filtered out; \
             finished in {:.2}s\n",
            if ok { "ok" } else { "FAILED" },
            self.passed.len(),
            self.failed.len(),
            self.started.map_or(0.0, |started| started.elapsed().as_secs_f64()),
        );
        if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
