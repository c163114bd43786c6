// SPDX-License-Identifier: MIT OR Apache-2.0
//! A nats-server of the test's own, on a free port; a missing nats-server is a failure.

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use martlet_testkit::broker::free_port;

pub(crate) struct Broker {
    child: Option<Child>,
    pub(crate) port: u16,
    arguments: Vec<String>,
    directory: PathBuf,
}

fn program() -> PathBuf {
    let in_path = std::env::var_os("PATH").into_iter().flat_map(|path| {
        std::env::split_paths(&path).map(|directory| directory.join("nats-server")).collect::<Vec<_>>()
    });
    let known = ["/usr/sbin/nats-server", "/usr/local/bin/nats-server"].map(PathBuf::from);
    in_path
        .chain(known)
        .find(|candidate| candidate.is_file())
        .expect("nats-server must be installed (Debian: apt-get install nats-server)")
}

impl Broker {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        Self::configured("", arguments)
    }

    /// With a configuration file, in which `$DIR` is the broker's own directory.
    pub(crate) fn configured(config: &str, arguments: &[&str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("martlet-nats-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut arguments: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
        if !config.is_empty() {
            let path = directory.join("nats.conf");
            std::fs::write(&path, config.replace("$DIR", directory.to_str().unwrap())).unwrap();
            arguments.extend(["-c".to_owned(), path.to_str().unwrap().to_owned()]);
        }
        let port = free_port().unwrap();
        let mut broker = Self { child: None, port, arguments, directory };
        broker.restart();
        broker
    }

    /// Replaces its configuration file; it holds when the broker is started again.
    pub(crate) fn reconfigure(&self, config: &str) {
        std::fs::write(self.directory.join("nats.conf"), config).unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Starts it (anew) and waits until it listens.
    pub(crate) fn restart(&mut self) {
        self.stop();
        let mut child = Command::new(program())
            .args(["-a", "127.0.0.1", "-p", &self.port.to_string()])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(child.try_wait().unwrap().is_none(), "nats-server ended: {:?}", self.arguments);
            assert!(begin.elapsed() < Duration::from_secs(30), "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child = Some(child);
    }

    /// Kills it, as a crash would.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop();
        // Left behind at worst: a directory with a configuration file.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
