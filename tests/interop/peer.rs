// SPDX-License-Identifier: MIT OR Apache-2.0
//! The NestJS processes of the lab. Each is killed when its handle is dropped.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::brokers::Kind;

/// What installs everything the lab needs.
pub(crate) const SET_UP: &str = "run tests/interop/setup.sh";
const START: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(30);

fn lab() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop")
}

/// What is missing on this machine, with the command that installs it.
pub(crate) fn missing() -> Option<String> {
    for version in [10, 11, 12] {
        let folder = lab().join(format!("nest{version}/node_modules/.installed"));
        if !folder.exists() {
            return Some(format!("the NestJS {version} packages are not installed: {SET_UP}"));
        }
    }
    let path = search_path();
    for tool in ["node"].into_iter().chain(Kind::ALL.map(Kind::program)) {
        if !std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()) {
            return Some(format!("{tool} is not installed: {SET_UP}"));
        }
    }
    None
}

/// Debian installs brokers where not every user's PATH looks.
fn search_path() -> String {
    format!("{}:/usr/sbin:/usr/local/sbin", std::env::var("PATH").unwrap_or_default())
}

/// A NestJS process, driven over its stdin and stdout.
pub(crate) struct Peer {
    pub(crate) port: u16,
    name: String,
    child: Mutex<Child>,
    stdin: Mutex<Option<ChildStdin>>,
    shared: Arc<Shared>,
    serial: AtomicU64,
    /// Disturbances that have been accounted for.
    expected: Cell<[u64; 4]>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<HashMap<u64, oneshot::Sender<Value>>>,
    reports: Mutex<Vec<Value>>,
    stderr: Mutex<String>,
}

const DISTURBANCES: [&str; 4] = ["errors", "warnings", "exceptions", "rejections"];

impl Peer {
    /// Starts `nestNN/peer.mjs ROLE ARGS…` and waits until it is ready.
    pub(crate) async fn start(version: u32, role: &str, args: &[&str]) -> Self {
        let script = lab().join(format!("nest{version}/peer.mjs"));
        let mut child = Command::new("node")
            .arg(script)
            .arg(role)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start node: {error}; {SET_UP}"));
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let shared = Arc::new(Shared::default());
        let (ready, is_ready) = oneshot::channel();
        let reading = Arc::clone(&shared);
        std::thread::spawn(move || reading.read_lines(BufReader::new(stdout), ready));
        let errors = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut text = String::new();
            // What could be read stays in the text.
            let _ = stderr.read_to_string(&mut text);
            *errors.stderr.lock().unwrap() = text;
        });
        let mut peer = Self {
            port: 0,
            name: format!("nest{version} {role}"),
            child: Mutex::new(child),
            stdin: Mutex::new(stdin),
            shared,
            serial: AtomicU64::new(0),
            expected: Cell::default(),
        };
        let line = match tokio::time::timeout(START, is_ready).await {
            Ok(Ok(line)) => line,
            Ok(Err(_)) => {
                panic!("{} ended while starting: {}", peer.name, peer.shared.stderr.lock().unwrap())
            }
            Err(_) => panic!("{} was not ready within {START:?}", peer.name),
        };
        assert_eq!(line["ready"], true, "{} did not start: {line}", peer.name);
        peer.port = line["port"].as_u64().unwrap_or(0) as u16;
        peer
    }

    /// Runs a command; its answer, or a panic after 30 seconds.
    pub(crate) async fn call(&self, cmd: &str, fields: Value) -> Value {
        self.begin(cmd, fields).await
    }

    /// Sends a command at once; the answer can be awaited later.
    pub(crate) fn begin(&self, cmd: &str, fields: Value) -> impl Future<Output = Value> + use<> {
        let id = self.serial.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.shared.waiting.lock().unwrap().insert(id, sender);
        let mut command: Map<String, Value> = match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        command.insert("id".to_owned(), json!(id));
        command.insert("cmd".to_owned(), json!(cmd));
        self.write(&Value::Object(command).to_string());
        let what = format!("{} {cmd}", self.name);
        async move {
            match tokio::time::timeout(ANSWER, receiver).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => panic!("{what}: the process ended before its answer"),
                Err(_) => panic!("{what}: no answer within {ANSWER:?}"),
            }
        }
    }

    fn write(&self, line: &str) {
        let mut stdin = self.stdin.lock().unwrap();
        // A peer that is gone shows in the missing answer.
        let _ = stdin.as_mut().map(|stdin| writeln!(stdin, "{line}"));
    }

    /// `send` with default options.
    pub(crate) async fn send(&self, pattern: Value, data: Value) -> Sent {
        self.send_with(pattern, data, json!({})).await
    }

    pub(crate) async fn send_with(&self, pattern: Value, data: Value, more: Value) -> Sent {
        self.begin_send(pattern, data, more).await
    }

    pub(crate) fn begin_send(
        &self,
        pattern: Value,
        data: Value,
        more: Value,
    ) -> impl Future<Output = Sent> + use<> {
        let answer = self.begin("send", fields(pattern, data, more));
        async move { Sent(answer.await) }
    }

    /// Keeps the address of the replies to a pattern subscribed, for calls that begin together: see "The reply
    /// address" in README.md.
    pub(crate) async fn hold(&self, pattern: Value) {
        let held = self.call("hold", json!({ "pattern": pattern })).await;
        assert_eq!(held["error"], Value::Null, "{held}");
    }

    /// Publishes bytes as they are, with the driver of NestJS.
    pub(crate) async fn raw(&self, command: Value) -> Value {
        let published = self.call("raw", command).await;
        assert_eq!(published["error"], Value::Null, "{published}");
        published
    }

    pub(crate) async fn emit(&self, pattern: Value, data: Value) -> Sent {
        self.emit_with(pattern, data, json!({})).await
    }

    pub(crate) async fn emit_with(&self, pattern: Value, data: Value, more: Value) -> Sent {
        Sent(self.call("emit", fields(pattern, data, more)).await)
    }

    pub(crate) async fn stats(&self) -> Value {
        self.call("stats", json!({})).await
    }

    /// Checks that since the last check exactly this many log lines of level `error` were written, and no
    /// warning, exception or rejection happened.
    pub(crate) async fn expect_errors(&self, errors: u64) {
        let stats = self.stats().await;
        let now = DISTURBANCES.map(|name| stats[name].as_u64().unwrap());
        let before = self.expected.replace(now);
        let new: Vec<u64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
        assert_eq!(new, [errors, 0, 0, 0], "{DISTURBANCES:?} of {}: {:#?}", self.name, self.tail());
    }

    /// Accounts for whatever has been logged so far.
    pub(crate) async fn forgive(&self) {
        let stats = self.stats().await;
        self.expected.set(DISTURBANCES.map(|name| stats[name].as_u64().unwrap()));
    }

    fn tail(&self) -> Vec<String> {
        let reports = self.shared.reports.lock().unwrap();
        reports.iter().rev().take(5).map(Value::to_string).collect()
    }

    /// Ends the process at once, as a crash does, and waits until it is gone.
    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        // It may be gone already.
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn fields(pattern: Value, data: Value, more: Value) -> Value {
    let mut fields = json!({ "pattern": pattern, "data": data });
    if let (Value::Object(fields), Value::Object(more)) = (&mut fields, more) {
        fields.extend(more);
    }
    fields
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Shared {
    fn read_lines(&self, lines: impl BufRead, ready: oneshot::Sender<Value>) {
        let mut ready = Some(ready);
        for line in lines.lines().map_while(Result::ok) {
            let Ok(line) = serde_json::from_str::<Value>(&line) else { continue };
            if line.get("ready").is_some() {
                // Whoever started the peer may have stopped waiting.
                let _ = ready.take().map(|ready| ready.send(line));
            } else if let Some(id) = line.get("id") {
                let waiting = id.as_u64().and_then(|id| self.waiting.lock().unwrap().remove(&id));
                let _ = waiting.map(|waiting| waiting.send(line));
            } else {
                self.reports.lock().unwrap().push(line);
            }
        }
        // Whoever still waits hears that the process is gone.
        self.waiting.lock().unwrap().clear();
    }
}

/// What a NestJS client observed of one `send` or `emit`.
#[derive(Debug)]
pub(crate) struct Sent(pub(crate) Value);

impl Sent {
    /// Exactly these items, then completion.
    #[track_caller]
    pub(crate) fn completes(&self, items: Value) {
        assert_eq!((&self.0["items"], &self.0["completed"]), (&items, &json!(true)), "{}", self.shown());
    }

    /// No item, and this error.
    #[track_caller]
    pub(crate) fn fails(&self, error: Value) {
        self.fails_after(json!([]), error);
    }

    #[track_caller]
    pub(crate) fn fails_after(&self, items: Value, error: Value) {
        let seen = (&self.0["items"], &self.0["failed"], &self.0["error"]);
        assert_eq!(seen, (&items, &json!(true), &error), "{}", self.shown());
    }

    /// Neither item nor end, within the time that was given.
    #[track_caller]
    pub(crate) fn timed_out(&self) {
        assert_eq!((&self.0["items"], &self.0["timedOut"]), (&json!([]), &json!(true)), "{}", self.shown());
    }

    /// The text of the error that ended it.
    #[track_caller]
    pub(crate) fn error_text(&self) -> String {
        assert_eq!(self.0["failed"], true, "{}", self.shown());
        match &self.0["error"] {
            Value::String(text) => text.clone(),
            error => error["message"].as_str().unwrap_or_default().to_owned(),
        }
    }

    fn shown(&self) -> String {
        self.0.to_string().chars().take(500).collect()
    }
}

/// Waits until `probe` holds, for ten seconds at most.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, probe: impl Fn() -> F) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !probe().await {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
