// SPDX-License-Identifier: MIT OR Apache-2.0
//! `examples/interop_service.rs` as a process, told by a URL what to serve.

use std::cell::RefCell;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::pair::Place;
use crate::wire::{self, End};

/// The process, which is killed when dropped.
pub(crate) struct Example {
    pub(crate) url: String,
    child: RefCell<Child>,
}

impl Example {
    /// Starts it and waits until it says that it is ready.
    pub(crate) async fn start(place: &Place, name: &str) -> Self {
        let url = url(place);
        let mut child = Command::new(binary())
            .args(["--name", name, &url])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let reading = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            lines.read_line(&mut line).map(|_| line)
        });
        let mut example = Self { url, child: RefCell::new(child) };
        let line = tokio::time::timeout(Duration::from_secs(20), reading).await;
        let line =
            line.unwrap_or_else(|_| panic!("the example is not ready: {}", example.url)).unwrap().unwrap();
        let Some(url) = line.trim().strip_prefix("ready ") else {
            panic!("the example did not start with {}: {line:?}", example.url)
        };
        example.url = url.to_owned();
        example
    }

    /// SIGTERM: it answers what is in flight and ends.
    pub(crate) fn terminate(&self) {
        let id = self.child.borrow().id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    }

    /// Its exit code, once it has ended.
    pub(crate) async fn ended(&self) -> Option<i32> {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(status) = self.child.borrow_mut().try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "the example did not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        // It may be gone already.
        let mut child = self.child.borrow_mut();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The place as a URL whose query has the options of a server, groups with a dot.
fn url(place: &Place) -> String {
    fn add(query: &mut Vec<String>, prefix: &str, value: &Value) {
        match value {
            Value::Object(members) => {
                for (name, value) in members {
                    let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                    add(query, &name, value);
                }
            }
            Value::String(text) => query.push(format!("{prefix}={text}")),
            value => query.push(format!("{prefix}={value}")),
        }
    }
    let mut query = Vec::new();
    if !place.queue.is_empty() {
        query.push(format!("queue={}", place.queue));
    }
    let mut options = place.wire().options(End::OurServer);
    wire::lay_over(&mut options, place.options.clone());
    add(&mut query, "", &options);
    match query.is_empty() {
        true => place.url.clone(),
        false => format!("{}?{}", place.url, query.join("&")),
    }
}

fn binary() -> PathBuf {
    profile().join("examples/interop_service")
}

/// `target/debug`.
fn profile() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().to_owned()
}

/// Builds it, unless it is newer than every source: a test of one target alone does not.
pub(crate) fn build() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = changed(&binary());
    let mut folders = vec![root.join("src"), root.join("examples")];
    let crates = std::fs::read_dir(root.join("actors")).unwrap().flatten();
    folders.extend(crates.map(|entry| entry.path().join("src")));
    if built.is_some_and(|built| folders.iter().all(|folder| is_older(folder, built))) {
        return;
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--all-features", "--example", "interop_service"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo.arg("--target-dir").arg(profile().parent().unwrap()).current_dir(root);
    assert!(cargo.status().unwrap().success(), "cannot build examples/interop_service.rs");
}

fn changed(file: &Path) -> Option<SystemTime> {
    file.metadata().and_then(|it| it.modified()).ok()
}

fn is_older(folder: &Path, than: SystemTime) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return true };
    entries.flatten().map(|entry| entry.path()).all(|path| match path.is_dir() {
        true => is_older(&path, than),
        false => changed(&path).is_none_or(|changed| changed < than),
    })
}
