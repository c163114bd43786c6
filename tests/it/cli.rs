// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tool `martlet` as a process, against a service in this process.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, stream};
use martlet::prelude::*;
use martlet::reply::Reply;
use serde_json::{Value, json};

// === the service ===

/// A service on a thread of its own, stopped when dropped.
pub(crate) struct Service {
    pub(crate) url: String,
    pub(crate) events: Arc<Mutex<Vec<Value>>>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

type Answer<T> = Result<T, RpcError>;

fn handlers(events: Arc<Mutex<Vec<Value>>>) -> Vec<HandlerGroup> {
    let sum = Pattern::parse(r#"{"cmd":"sum"}"#);
    vec![
        message(sum, async |Data(numbers): Data<Vec<i64>>| Answer::Ok(numbers.iter().sum::<i64>())),
        message("echo", async |payload: martlet::Payload| Answer::Ok(Reply::Value(payload))),
        message("metadata", async |metadata: Metadata| Answer::Ok(metadata)),
        message("items", async || Answer::Ok(Streaming(stream::iter([1, 2, 3])))),
        message("endless", async || {
            let items = stream::unfold(0, async |number: u64| {
                tokio::task::yield_now().await;
                Some(("x".repeat(1000), number + 1))
            });
            Answer::Ok(Streaming(items))
        }),
        message("broken", async || {
            let items = [Ok(1), Err(RpcError::message("boom"))];
            Answer::Ok(TryStreaming(stream::iter(items)))
        }),
        message("nothing", async || Answer::Ok(())),
        message("object", async || Answer::<()>::Err(RpcError::json(json!({ "code": 42 })))),
        message("never", async || std::future::pending::<Answer<()>>().await),
        message("late", async || Answer::Ok(Streaming(stream::iter([1]).chain(stream::pending())))),
        event("noted", move |Data(data): Data<Value>| {
            events.lock().unwrap().push(data);
            async { Answer::Ok(()) }
        }),
    ]
}

impl Service {
    fn start() -> Self {
        Self::on(Transport::from_url("tcp://127.0.0.1:0").unwrap())
    }

    /// A service on any transport.
    pub(crate) fn on(transport: Transport) -> Self {
        let events = Arc::<Mutex<Vec<Value>>>::default();
        let (started, url) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let seen = Arc::clone(&events);
        let thread = std::thread::spawn(move || {
            actix::System::new().block_on(async move {
                let mut service = Microservice::new().on_current_arbiter();
                for group in handlers(seen) {
                    service = service.handlers(group);
                }
                let service = service.server(transport.into_server().unwrap()).start().await.unwrap();
                started.send(service.url()).unwrap();
                // Dropping the sender stops it too.
                let _ = stopped.await;
                service.stop(Duration::ZERO).await;
            });
        });
        let url = url.recv_timeout(Duration::from_secs(30)).expect("the service has started");
        Self { url, events, stop: Some(stop), thread: Some(thread) }
    }

    fn send(&self, arguments: &[&str]) -> Run {
        run(&[&["send", &self.url], arguments].concat())
    }

    /// Waits for exactly these events.
    #[track_caller]
    pub(crate) fn saw(&self, events: &[Value]) {
        for _ in 0..300 {
            if self.events.lock().unwrap().len() >= events.len() {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
        assert_eq!(*self.events.lock().unwrap(), events);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.take();
        self.thread.take().unwrap().join().unwrap();
    }
}

// === the tool ===

/// What a run of the tool gave.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Run {
    #[track_caller]
    pub(crate) fn printed(&self, out: &str) {
        assert_eq!((self.code, self.out.as_str(), self.err.as_str()), (0, out, ""), "{self:?}");
    }

    #[track_caller]
    pub(crate) fn failed(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is not in {self:?}");
        }
        assert!(!self.err.contains("panicked"), "{self:?}");
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_martlet"));
    command.args(arguments).env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

pub(crate) fn run(arguments: &[&str]) -> Run {
    command(arguments).output().unwrap().into()
}

/// A run on a terminal of its own, which shows stdout and stderr as one. `script` is part of every Debian and Ubuntu.
fn run_on_terminal(arguments: &[&str], no_color: &str) -> Run {
    let words = [env!("CARGO_BIN_EXE_martlet")].iter().chain(arguments);
    let line = words.map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    terminal.env("SHELL", "/bin/sh").env("NO_COLOR", no_color).stdin(Stdio::null()).output().unwrap().into()
}

/// A run that goes on; killed when dropped.
pub(crate) struct Running {
    child: Child,
    out: Option<BufReader<std::process::ChildStdout>>,
    err: BufReader<std::process::ChildStderr>,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = Some(BufReader::new(child.stdout.take().unwrap()));
        let err = BufReader::new(child.stderr.take().unwrap());
        Self { child, out, err }
    }

    /// `martlet listen` on a free port, and its URL once it listens.
    fn listen(arguments: &[&str]) -> (Self, String) {
        Self::listen_on("tcp://127.0.0.1:0", arguments)
    }

    /// `martlet listen`, and its URL once it listens.
    pub(crate) fn listen_on(url: &str, arguments: &[&str]) -> (Self, String) {
        let mut running = Self::start(&[&["listen", url], arguments].concat());
        let mut line = String::new();
        running.err.read_line(&mut line).unwrap();
        let url = line.strip_prefix("listening on ").and_then(|rest| rest.split(' ').next());
        let url = url.unwrap_or_else(|| panic!("{line:?}")).to_owned();
        (running, url)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.as_mut().unwrap().read_line(&mut line).unwrap();
        line
    }

    /// Stops reading its output for good.
    fn leave(&mut self) {
        self.out = None;
    }

    pub(crate) fn json(&mut self) -> Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    pub(crate) fn end(mut self) -> Run {
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        let (mut out, mut err) = (String::new(), String::new());
        if let Some(rest) = &mut self.out {
            rest.read_to_string(&mut out).unwrap();
        }
        self.err.read_to_string(&mut err).unwrap();
        Run { code, out, err }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port where nobody listens.
fn nobody() -> String {
    format!("tcp://{}", free_address())
}

pub(crate) fn free_address() -> std::net::SocketAddr {
    ([127, 0, 0, 1], martlet_testkit::broker::free_port().unwrap()).into()
}

// === send ===

#[test]
fn send_prints_the_reply() {
    let service = Service::start();
    service.send(&[r#"{"cmd":"sum"}"#, "[1,2,3]"]).printed("6\n");
    // Members keep their order and numbers their spelling.
    service.send(&["echo", r#" {"b": 2.50, "a": [ ]} "#]).printed("{\"b\":2.50,\"a\":[]}\n");
    service.send(&["echo"]).printed("null\n");
    service.send(&["echo", "-5"]).printed("-5\n");
    service.send(&["nothing"]).printed("");
    service.send(&["items"]).printed("1\n");
    service.send(&["items", "--stream"]).printed("1\n2\n3\n");
    service.send(&["nothing", "--stream"]).printed("");
    service.send(&["echo", "{\"a\":1}", "--format", "pretty"]).printed("{\n  \"a\": 1\n}\n");
    service.send(&["echo", "1", "--color", "always"]).printed("\u{1b}[33m1\u{1b}[0m\n");
}

#[test]
fn data_comes_from_the_command_line_stdin_or_a_file() {
    let service = Service::start();
    service.send(&["echo", "--text", "he said \"hi\""]).printed("\"he said \\\"hi\\\"\"\n");
    let file = std::env::temp_dir().join(format!("martlet-cli-{}.json", std::process::id()));
    std::fs::write(&file, "{\n  \"from\": \"file\"\n}\n").unwrap();
    let at = format!("@{}", file.display());
    let from_file = service.send(&["echo", &at]);
    let as_text = service.send(&["echo", "--text", &at]);
    std::fs::remove_file(&file).unwrap();
    from_file.printed("{\"from\":\"file\"}\n");
    as_text.printed("\"{\\n  \\\"from\\\": \\\"file\\\"\\n}\\n\"\n");
    service.send(&["echo", &at]).failed(2, &["cannot read data from file"]);

    let stdin = |text: &str| {
        let mut child = command(&["send", &service.url, "echo", "-"]);
        let mut child =
            child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        Run::from(child.wait_with_output().unwrap())
    };
    stdin("[1,\n2]\n").printed("[1,2]\n");
    stdin("nope").failed(2, &["data from stdin is not JSON", "--text"]);
}

#[test]
fn metadata_is_sent_and_headers_are_refused_where_there_are_none() {
    let service = Service::start();
    let run = service.send(&["metadata", "-m", "a=1", "--metadata", "b=x=y"]);
    let metadata: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((&metadata["a"], &metadata["b"]), (&json!("1"), &json!("x=y")), "{run:?}");
    service.send(&["metadata", "-m", "novalue"]).failed(2, &["name=value"]);
    service.send(&["echo", "--header", "a=1"]).failed(2, &["tcp has no headers", "--metadata"]);
}

#[test]
fn every_outcome_has_its_exit_code_and_says_what_to_do() {
    let service = Service::start();
    let broken = service.send(&["broken", "--stream"]);
    assert_eq!(broken.out, "1\n");
    broken.failed(1, &["the handler answered with an error: {\"status\":\"error\",\"message\":\"boom\"}"]);
    service.send(&["object"]).failed(1, &["{\"code\":42}"]);
    service.send(&["sum", "[1]"]).failed(3, &["no handler for pattern sum", "'{\"cmd\":\"…\"}'"]);
    service.send(&["never", "--timeout", "100ms"]).failed(4, &["within 100ms", "--timeout"]);
    let late = service.send(&["late", "--stream", "--timeout", "100ms"]);
    assert_eq!(late.out, "1\n");
    late.failed(4, &["within 100ms"]);
    let url = nobody();
    run(&["send", &url, "echo"]).failed(5, &["connection refused", "is the service running?", &url]);

    // A service that hangs up in the middle of a call.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}", listener.local_addr().unwrap());
    let hanging_up = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        assert!(peer.read(&mut [0; 1024]).unwrap() > 0);
    });
    run(&["send", &url, "echo"]).failed(6, &["lost before the reply", "may have run"]);
    hanging_up.join().unwrap();

    // A service that does not speak the protocol.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}", listener.local_addr().unwrap());
    let babbling = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(b"HELLO #1\r\n").unwrap();
        // Until the tool has hung up.
        while peer.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {}
    });
    run(&["send", &url, "echo", "--timeout", "5s"])
        .failed(6, &["lost before the reply", "Corrupted length value"]);
    babbling.join().unwrap();
}

#[test]
fn a_wrong_command_line_is_explained() {
    let url = nobody();
    let check = |arguments: &[&str], parts: &[&str]| run(arguments).failed(2, parts);
    check(&["send", &url, "echo", "hello"], &["data is not JSON", "hello", "--text", "'\"hello\"'"]);
    check(&["send", &url, "{cmd:sum}"], &["looks like JSON but is none", "'{\"cmd\":\"sum\"}'"]);
    check(&["send", "localhost:3000", "a"], &["bad url \"localhost:3000\"", "tcp://"]);
    let option = format!("{url}?maxBufSize=1");
    check(
        &["send", &option, "a"],
        &["unknown option maxBufSize for tcp clients: did you mean maxBufferSize?"],
    );
    check(
        &["listen", &option, "a"],
        &["unknown option maxBufSize for tcp servers: did you mean maxBufferSize?"],
    );
    check(&["send", &url, "a", "--timeout", "5 days"], &["500ms, 5s, 2m"]);
    check(&["send", &url], &["PATTERN"]);
    check(&["snd"], &["send"]);
    check(&["listen", &url, "a", "--reply", "x"], &["not JSON"]);
    check(&["listen", &url, r#"{"a":1,"b":2}"#, r#"{"b":2,"a":1}"#], &["is given twice"]);
    check(&["bench", &url, "--expect", "x"], &["not JSON"]);
}

#[test]
fn who_reads_may_leave_early() {
    let service = Service::start();
    let mut running = Running::start(&["send", &service.url, "endless", "--stream"]);
    assert_eq!(running.line().trim().len(), 1002);
    running.leave();
    let end = running.end();
    assert_eq!((end.code, end.err.as_str()), (0, ""));
}

#[test]
fn colours_and_line_breaks_are_for_terminals() {
    let service = Service::start();
    let send = ["send", &service.url, "echo", r#"{"a":["x",1]}"#];
    run(&send).printed("{\"a\":[\"x\",1]}\n");
    let shown = run_on_terminal(&send, "");
    assert_eq!(shown.code, 0, "{shown:?}");
    let plain = "{\r\n  \"a\": [\r\n    \"x\",\r\n    1\r\n  ]\r\n}\r\n";
    assert!(
        shown.out.contains("\x1b[34m\"a\"\x1b[0m") && shown.out.contains("\x1b[32m\"x\"\x1b[0m"),
        "{shown:?}"
    );
    let bare = ["\x1b[34m", "\x1b[32m", "\x1b[33m", "\x1b[0m"]
        .iter()
        .fold(shown.out, |out, code| out.replace(code, ""));
    assert_eq!(bare, plain);
    let uncoloured = run_on_terminal(&send, "1");
    assert_eq!((uncoloured.code, uncoloured.out.as_str()), (0, plain));

    let unknown = ["send", &service.url, "nobody"];
    let shown = run_on_terminal(&unknown, "");
    assert_eq!(shown.code, 3, "{shown:?}");
    assert!(shown.out.starts_with("\x1b[1;31merror:\x1b[0m"), "{shown:?}");
    let piped = run(&unknown);
    piped.failed(3, &["error:"]);
    assert!(!piped.err.contains('\x1b'), "{piped:?}");
}

// === emit ===

#[test]
fn emit_hands_the_event_over_before_it_ends() {
    let service = Service::start();
    for number in 0..20 {
        run(&["emit", &service.url, "noted", &number.to_string()]).printed("");
    }
    let all: Vec<Value> = (0..20).map(Value::from).collect();
    service.saw(&all);
    run(&["emit", &nobody(), "noted"]).failed(5, &["connection refused", "is the service running?"]);
}

/// Emits to an MQTT broker that lets its one client in or not, confirms nothing, and hangs up at the first message or
/// not.
#[cfg(feature = "mqtt")]
fn emit_to_a_mute_broker(lets_in: bool, hangs_up: bool, options: &str, qos: &str) -> Run {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("mqtt://{}?{options}", listener.local_addr().unwrap());
    let broker = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        // There is no second connection.
        drop(listener);
        let mut bytes = [0; 1024];
        assert!(peer.read(&mut bytes).unwrap() > 0, "it wants to connect");
        if lets_in {
            peer.write_all(&[0x20, 2, 0, 0]).unwrap();
        }
        // Until the tool has hung up.
        while peer.read(&mut bytes).is_ok_and(|read| read > 0) && !hangs_up {}
    });
    let run = run(&["emit", &url, "noted", "1", "--timeout", "2s", "-H", qos]);
    broker.join().unwrap();
    run
}

#[cfg(feature = "mqtt")]
#[test]
fn an_event_that_may_have_arrived_is_told_from_one_that_was_not_sent() {
    let emit = emit_to_a_mute_broker;
    let unsent = ["not sent to mqtt", "within 2s"];
    let unconfirmed = ["not confirmed by mqtt", "within 2s", "may have arrived"];
    // Each waits for its time to pass.
    std::thread::scope(|all| {
        all.spawn(|| emit(false, false, "", ":qos=1").failed(5, &unsent));
        all.spawn(|| emit(true, false, "", ":qos=1").failed(4, &unconfirmed));
        all.spawn(|| emit(true, false, "", ":qos=2").failed(4, &unconfirmed));
        all.spawn(|| emit(true, false, "", ":qos=0").printed(""));
        // The tool's limit goes before the client's.
        all.spawn(|| emit(true, false, "callTimeout=1000", ":qos=1").failed(4, &unconfirmed));
        // While the connection is made anew, what became of the event is as unknown as before.
        all.spawn(|| emit(true, true, "", ":qos=1").failed(4, &unconfirmed));
        let lost = ["connection to mqtt", "lost: ", "may have arrived"];
        all.spawn(move || emit(true, true, "reconnectPeriod=0", ":qos=1").failed(6, &lost));
    });
}

// === listen ===

#[test]
fn listen_prints_what_arrives_and_answers() {
    let (mut listening, url) =
        Running::listen(&[r#"{"cmd":"x"}"#, "y", "--reply", "{\"ok\":true}", "--count", "3"]);
    run(&["send", &url, r#"{"cmd":"x"}"#, "[1]", "-m", "k=v"]).printed("{\"ok\":true}\n");
    let seen = listening.json();
    assert_eq!((&seen["kind"], &seen["pattern"]), (&json!("request"), &json!({"cmd": "x"})));
    assert_eq!((&seen["data"], &seen["metadata"]["k"]), (&json!([1]), &json!("v")));
    assert!(seen["from"].as_str().unwrap().starts_with("127.0.0.1:"), "{seen}");
    run(&["emit", &url, "y", "2"]).printed("");
    let seen = listening.json();
    assert_eq!((&seen["kind"], &seen["pattern"], &seen["data"]), (&json!("event"), &json!("y"), &json!(2)));
    run(&["send", &url, "z"]).failed(3, &["no handler"]);
    run(&["send", &url, "y"]).printed("{\"ok\":true}\n");
    assert_eq!(listening.json()["data"], Value::Null);
    let end = listening.end();
    assert_eq!((end.code, end.out.as_str()), (0, ""), "{end:?}");
    assert!(
        end.err.contains("not listening for request \"z\"")
            || end.err.contains("not listening for request z"),
        "{end:?}"
    );
}

#[test]
fn listen_echoes_or_fails_when_told() {
    let (listening, url) = Running::listen(&["x", "--echo", "-n", "1"]);
    run(&["send", &url, "x", "{\"a\":1}"]).printed("{\"a\":1}\n");
    assert_eq!(listening.end().code, 0);
    let (listening, url) = Running::listen(&["x", "--fail", "{\"code\":7}", "-n", "1"]);
    run(&["send", &url, "x"]).failed(1, &["{\"code\":7}"]);
    assert_eq!(listening.end().code, 0);
}

#[test]
fn without_a_reply_requests_are_only_watched() {
    for extra in [&["x"][..], &["x", "--events"]] {
        let (mut listening, url) = Running::listen(extra);
        run(&["send", &url, "x", "1", "--timeout", "200ms"]).failed(4, &["within 200ms"]);
        assert_eq!(listening.json()["kind"], "request");
        let pid = listening.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let end = listening.end();
        assert_eq!(end.code, 0, "{end:?}");
        assert!(end.err.contains("1 message (ended by SIGTERM)"), "{end:?}");
    }
}

#[test]
fn an_address_that_is_taken_is_said_so() {
    let service = Service::start();
    run(&["listen", &service.url, "x"]).failed(5, &["address in use", "EADDRINUSE"]);
}

// === bench ===

fn bench(url: &str, arguments: &[&str]) -> Run {
    let short = ["--duration", "300ms", "--warmup", "50ms", "--connections", "3", "--depth", "4"];
    run(&[&["bench", url], &short[..], arguments].concat())
}

#[test]
fn bench_checks_every_reply_and_reports() {
    let service = Service::start();
    let run = bench(&service.url, &["--json", "--threads", "2"]);
    assert_eq!(run.code, 0, "{run:?}");
    let report: Value = serde_json::from_str(&run.out).unwrap();
    assert!(report["requests"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(report["failures"], json!({}));
    assert_eq!((&report["connections"], &report["depth"]), (&json!(3), &json!(4)));
    assert!(report["latency_us"]["p99"].as_f64() >= report["latency_us"]["p50"].as_f64(), "{report}");

    let run =
        bench(&service.url, &["--pattern", "echo", "--data", "{\"a\":1}", "--expect", "{ \"a\": 1.0 }"]);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.out.contains("requests") && run.out.contains("p999"), "{run:?}");
}

#[test]
fn bench_fails_when_replies_do() {
    let service = Service::start();
    bench(&service.url, &["--pattern", "echo", "--data", "1", "--expect", "2"])
        .failed(1, &["replies 1 where 2 is right"]);
    bench(&service.url, &["--pattern", "nope"]).failed(3, &["no handler"]);
    bench(&service.url, &["--pattern", "object"]).failed(1, &["{\"code\":42}"]);
    bench(&nobody(), &[]).failed(5, &["connection refused"]);
}

#[test]
fn a_wrong_reply_under_load_is_counted_and_shown() {
    // Right at first, wrong from the 50th on.
    let counter = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (started, url) = mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::spawn(move || {
        actix::System::new().block_on(async move {
            let drift = message("drift", move || {
                let calls = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                async move { Answer::Ok(if calls < 50 { 1 } else { 2 }) }
            });
            let service = Microservice::new().on_current_arbiter().handlers(drift);
            let service = service.server(TcpServer::bind("127.0.0.1", 0)).start().await.unwrap();
            started.send(service.url()).unwrap();
            let _ = stopped.await;
            service.stop(Duration::ZERO).await;
        });
    });
    let run = bench(&url.recv().unwrap(), &["--pattern", "drift", "--expect", "1", "--json"]);
    drop(stop);
    thread.join().unwrap();
    run.failed(1, &["a wrong reply: 2"]);
    let report: Value = serde_json::from_str(&run.out).unwrap();
    assert!(report["failures"]["wrong_reply"].as_u64().unwrap() > 0, "{report}");
}

// === help and completions ===

#[test]
fn every_command_has_help_with_examples() {
    for name in ["send", "emit", "listen", "bench", "completions"] {
        let run = run(&["help", name]);
        assert_eq!(run.code, 0, "{run:?}");
        assert!(run.out.contains("Example") && run.out.contains(&format!("martlet {name}")), "{run:?}");
    }
    let run = run(&["--help"]);
    assert!(run.out.contains("Exit codes:") && run.out.contains("nats://"), "{run:?}");
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let run = run(&["completions", shell]);
        assert_eq!(run.code, 0, "{run:?}");
        assert!(run.out.contains("martlet") && run.out.contains("listen"), "{shell}");
    }
}
