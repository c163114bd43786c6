// SPDX-License-Identifier: MIT OR Apache-2.0
//! Real brokers under control: started on a free port, restarted, frozen, killed when dropped.
//!
//! # Examples
//!
//! ```no_run
//! use martlet_testkit::broker::{Broker, BrokerCommand};
//!
//! let mut broker = Broker::start(BrokerCommand::nats())?;
//! println!("{}", broker.url());
//! broker.restart()?;
//! # Ok::<_, martlet_testkit::broker::BrokerError>(())
//! ```

use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::net::TcpSocket;

/// How long a broker may take to accept connections.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Why a broker could not be controlled.
#[derive(Debug)]
#[non_exhaustive]
pub enum BrokerError {
    /// Its program is not on this machine.
    Missing {
        /// The program.
        program: String,
        /// What to do about it.
        install: String,
    },
    /// It ended, or did not accept connections in time.
    NotReady {
        /// The program.
        program: String,
        /// What happened instead.
        reason: String,
    },
    /// The operating system refused.
    Io(std::io::Error),
}

impl fmt::Display for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { program, install } => write!(
                f,
                "{program} is neither in PATH nor in /usr/sbin or /usr/local/sbin: install it with `{install}`"
            ),
            Self::NotReady { program, reason } => write!(f, "{program} is not ready: {reason}"),
            Self::Io(error) => write!(f, "cannot control the broker: {error}"),
        }
    }
}

impl std::error::Error for BrokerError {}

impl From<std::io::Error> for BrokerError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// A port of 127.0.0.1 that is free, and below those that systems give to connections and to whoever asks for any port. So it
/// is still free in a moment, or after a restart, although other tests go on.
///
/// # Errors
///
/// When none is found.
pub fn free_port() -> std::io::Result<u16> {
    let mut taken = None;
    for _ in 0..100 {
        let port = rand::random_range(10_000..32_768);
        // It does not listen: a process that another thread is starting has a copy for a moment, which would be in the way.
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        match socket.bind(SocketAddr::from(([127, 0, 0, 1], port))) {
            Ok(()) => return Ok(port),
            Err(error) => taken = Some(error),
        }
    }
    Err(taken.unwrap_or_else(|| std::io::Error::other("no port was tried")))
}

/// How a broker is started: its program, and its arguments for a port.
pub struct BrokerCommand {
    program: String,
    scheme: String,
    install: String,
    arguments: Box<dyn Fn(u16) -> Vec<String> + Send + Sync>,
    /// Whether the arguments are those of a shell that becomes the broker.
    by_shell: bool,
    /// What it answers when it is ready; nothing: it is ready when it accepts connections.
    greeting: &'static [u8],
    ready_within: Duration,
}

impl fmt::Debug for BrokerCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BrokerCommand").field("program", &self.program).finish_non_exhaustive()
    }
}

impl BrokerCommand {
    /// A broker in the foreground, which listens on 127.0.0.1 and the port it is given. `install` is the
    /// command that installs it.
    pub fn new(
        program: impl Into<String>,
        scheme: impl Into<String>,
        install: impl Into<String>,
        arguments: impl Fn(u16) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            program: program.into(),
            scheme: scheme.into(),
            install: install.into(),
            arguments: Box::new(arguments),
            by_shell: false,
            greeting: b"",
            ready_within: READY_WITHIN,
        }
    }

    /// A NATS server.
    pub fn nats() -> Self {
        Self::nats_with(&[])
    }

    /// A NATS server with further arguments (`--tls`, `-c file`).
    pub fn nats_with(more: &[&str]) -> Self {
        let more: Vec<String> = more.iter().map(|argument| (*argument).to_owned()).collect();
        Self::new("nats-server", "nats", "apt-get install nats-server", move |port| {
            let mut arguments =
                vec!["-a".to_owned(), "127.0.0.1".to_owned(), "-p".to_owned(), port.to_string()];
            arguments.extend(more.iter().cloned());
            arguments
        })
    }

    fn is_answered_at(&self, port: u16) -> std::io::Result<bool> {
        let mut connection = TcpStream::connect(("127.0.0.1", port))?;
        if self.greeting.is_empty() {
            return Ok(true);
        }
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        connection.write_all(self.greeting)?;
        // A method of AMQP, or an alert of TLS; another program may have taken the port.
        let mut answer = [0];
        Ok(connection.read(&mut answer)? > 0 && matches!(answer[0], 1 | 21))
    }

    /// A RabbitMQ node of its own: name, folders, ports and `epmd`, nothing of which outlives it.
    pub fn rabbitmq() -> Self {
        Self::rabbitmq_with("", "")
    }

    /// A RabbitMQ node with further lines of `rabbitmq.conf` (in which `$PORT` is its port), and with definitions
    /// in JSON (users, vhosts, permissions), if not empty; they replace the default user and vhost.
    pub fn rabbitmq_with(config: &str, definitions: &str) -> Self {
        let node = NodeFolder::new();
        let (config, definitions) = (config.to_owned(), definitions.to_owned());
        let mut command =
            Self::new("rabbitmq-server", "amqp", "apt-get install rabbitmq-server", move |port| {
                node.write(port, &config, &definitions);
                let free = || free_port().unwrap_or_default().to_string();
                let folder = node.0.to_string_lossy().into_owned();
                let values = [folder, port.to_string(), free(), free()];
                ["-c".to_owned(), START_RABBITMQ.to_owned(), "rabbitmq".to_owned()]
                    .into_iter()
                    .chain(values)
                    .collect()
            });
        command.by_shell = true;
        // It hangs up on those who come before it has begun altogether.
        command.greeting = b"AMQP\0\0\x09\x01";
        command.ready_within = Duration::from_secs(60);
        command
    }

    /// A Redis server that keeps nothing on disk.
    pub fn redis() -> Self {
        Self::redis_with(&[])
    }

    /// A Redis server with further arguments (`--requirepass`, `secret`).
    pub fn redis_with(more: &[&str]) -> Self {
        let more: Vec<String> = more.iter().map(|argument| (*argument).to_owned()).collect();
        Self::new("redis-server", "redis", "apt-get install redis-server", move |port| {
            let port = port.to_string();
            let own = ["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no"];
            own.into_iter().map(str::to_owned).chain(more.iter().cloned()).collect()
        })
    }

    /// A mosquitto that anybody may use and that queues without bound.
    pub fn mosquitto() -> Self {
        Self::mosquitto_with("")
    }

    /// A mosquitto with further lines of `mosquitto.conf`, in which `$DIR` is a folder of its own: they come after
    /// those of its only listener.
    pub fn mosquitto_with(config: &str) -> Self {
        let folder = MosquittoFolder::new();
        let config = config.replace("$DIR", &folder.0.to_string_lossy());
        Self::new("mosquitto", "mqtt", "apt-get install mosquitto", move |port| {
            vec!["-c".to_owned(), folder.write(port, &config)]
        })
    }

    fn path(&self) -> Result<PathBuf, BrokerError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
        std::env::split_paths(&path)
            .chain(more)
            .map(|folder| folder.join(&self.program))
            .find(|file| file.is_file())
            .ok_or_else(|| BrokerError::Missing {
                program: self.program.clone(),
                install: self.install.clone(),
            })
    }
}

/// Becomes a RabbitMQ node, given its folder, its port, and the ports for distribution and `epmd`. The latter ends
/// with its parent, which is the node.
const START_RABBITMQ: &str = r#"
export HOME="$1" RABBITMQ_HOME="$1" RABBITMQ_MNESIA_BASE="$1/mnesia" RABBITMQ_LOG_BASE="$1/log" RABBITMQ_LOGS="$1/log/node.log"
export RABBITMQ_CONFIG_FILE="$1/rabbitmq" RABBITMQ_CONF_ENV_FILE=/dev/null RABBITMQ_ENABLED_PLUGINS_FILE="$1/plugins"
export RABBITMQ_NODENAME="martlet$2@localhost" RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT="$2"
export RABBITMQ_DIST_PORT="$3" ERL_EPMD_PORT="$4" ERL_EPMD_ADDRESS=127.0.0.1 RUNNING_UNDER_SYSTEMD=1
export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+S 1:1 +A 2 +sbwt none +sbwtdcpu none +sbwtdio none"
setpriv --pdeathsig KILL epmd -port "$4" -address 127.0.0.1 &
exec /usr/lib/rabbitmq/bin/rabbitmq-server
"#;

/// A folder that goes with its node.
struct NodeFolder(PathBuf);

impl NodeFolder {
    fn new() -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("martlet-rabbitmq-{}-{number}", std::process::id())))
    }

    /// Writes the configuration; a failure shows when the node does not start.
    fn write(&self, port: u16, config: &str, definitions: &str) {
        let own = "log.console = false\nlog.file.level = warning\ndisk_free_limit.absolute = 1MB\n";
        let load = match definitions {
            "" => String::new(),
            _ => format!("load_definitions = {}/definitions.json\n", self.0.display()),
        };
        let _ = std::fs::create_dir_all(&self.0);
        let config = config.replace("$PORT", &port.to_string());
        let _ = std::fs::write(self.0.join("rabbitmq.conf"), format!("{own}{load}{config}\n"));
        let _ = std::fs::write(self.0.join("definitions.json"), definitions);
        let _ = std::fs::write(self.0.join("plugins"), "[].\n");
    }
}

impl Drop for NodeFolder {
    fn drop(&mut self) {
        // Left behind at worst: a folder of a few files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A folder that goes with its broker.
struct MosquittoFolder(PathBuf);

impl MosquittoFolder {
    fn new() -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("martlet-mosquitto-{}-{number}", std::process::id())))
    }

    /// Writes the configuration; a failure shows when the broker does not start.
    fn write(&self, port: u16, config: &str) -> String {
        let own = format!(
            "user root\nlistener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\npersistence false\n\
             max_queued_messages 0\n"
        );
        let path = self.0.join("mosquitto.conf");
        let _ = std::fs::create_dir_all(&self.0);
        let _ = std::fs::write(&path, format!("{own}{config}\n"));
        path.to_string_lossy().into_owned()
    }
}

impl Drop for MosquittoFolder {
    fn drop(&mut self) {
        // Left behind at worst: a folder with a configuration file.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running (or stopped) broker process. It is killed when this is dropped.
#[derive(Debug)]
pub struct Broker {
    command: BrokerCommand,
    port: u16,
    process: Option<Child>,
}

impl Broker {
    /// Starts a broker on a free port; ready when it accepts connections. Blocks the thread meanwhile.
    ///
    /// # Errors
    ///
    /// [`BrokerError::Missing`] says what to install.
    pub fn start(mut command: BrokerCommand) -> Result<Self, BrokerError> {
        command.path()?;
        let mut attempts = 0;
        loop {
            // The port may be taken between finding and using it.
            let port = free_port()?;
            let mut broker = Self { command, port, process: None };
            match broker.resume_process() {
                Ok(()) => return Ok(broker),
                Err(BrokerError::NotReady { .. }) if attempts < 3 => attempts += 1,
                Err(error) => return Err(error),
            }
            broker.stop();
            command = broker.into_command();
        }
    }

    /// Its port, the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:4222`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `nats://127.0.0.1:4222`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.command.scheme, self.address())
    }

    /// Whether its process runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| matches!(process.try_wait(), Ok(None)))
    }

    /// Kills it, as a power cut would. Its port stays its own.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Errors mean that it has ended already.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Asks it to end (SIGTERM) and waits until it has, which lets it save what it keeps; kills it after ten
    /// seconds.
    ///
    /// # Errors
    ///
    /// When the signal cannot be sent.
    pub fn shut_down(&mut self) -> Result<(), BrokerError> {
        self.signal("TERM")?;
        let until = Instant::now() + Duration::from_secs(10);
        while self.is_running() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.stop();
        Ok(())
    }

    /// Starts it again after [`stop`](Self::stop); ready when it accepts connections.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub fn resume(&mut self) -> Result<(), BrokerError> {
        if self.is_running() { Ok(()) } else { self.resume_process() }
    }

    /// Kills it and starts it again on the same port.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub fn restart(&mut self) -> Result<(), BrokerError> {
        self.stop();
        self.resume_process()
    }

    /// Stops it in its tracks (SIGSTOP): connections stay open and nothing answers.
    ///
    /// # Errors
    ///
    /// When the signal cannot be sent.
    pub fn freeze(&self) -> Result<(), BrokerError> {
        self.signal("STOP")?;
        let id = self.process.as_ref().map(Child::id).unwrap_or_default();
        // The signal is on its way; each thread stops when it sees it.
        for _ in 0..1000 {
            if all_threads_are_stopped(id) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    ///
    /// When the signal cannot be sent.
    pub fn thaw(&self) -> Result<(), BrokerError> {
        self.signal("CONT")
    }

    /// Runs a tool of the broker's (`rabbitmqctl`) in the environment that the broker was started in, and waits for it.
    /// Linux alone. Such a tool may take seconds; connections of this thread see their heartbeats meanwhile.
    ///
    /// # Errors
    ///
    /// When it cannot be run, or fails; the reason has what it said.
    pub async fn run_tool(&self, program: &str, arguments: &[&str]) -> Result<(), BrokerError> {
        let id = self.process.as_ref().map(Child::id).ok_or_else(|| self.not_ready("it is stopped"))?;
        let environment = std::fs::read(format!("/proc/{id}/environ"))?;
        let variables = environment.split(|byte| *byte == 0).filter_map(|line| {
            let line = std::str::from_utf8(line).ok()?;
            line.split_once('=')
        });
        let mut tool = Command::new(program);
        tool.args(arguments).env_clear().envs(variables);
        let running = tokio::task::spawn_blocking(move || tool.output());
        let output = running.await.map_err(std::io::Error::other)??;
        match output.status.success() {
            true => Ok(()),
            false => {
                let said = [output.stdout, output.stderr].concat();
                Err(self.not_ready(&format!("{program}: {}", String::from_utf8_lossy(&said).trim())))
            }
        }
    }

    fn signal(&self, name: &str) -> Result<(), BrokerError> {
        let Some(process) = &self.process else {
            return Err(self.not_ready("it is stopped"));
        };
        // The standard library sends no signal but SIGKILL, and unsafe code is forbidden here.
        let status = Command::new("kill").args([format!("-{name}"), process.id().to_string()]).status()?;
        if status.success() { Ok(()) } else { Err(self.not_ready("it could not be signalled")) }
    }

    fn not_ready(&self, reason: &str) -> BrokerError {
        BrokerError::NotReady { program: self.command.program.clone(), reason: reason.to_owned() }
    }

    fn resume_process(&mut self) -> Result<(), BrokerError> {
        let program = self.command.path()?;
        let process = Command::new(if self.command.by_shell { "sh".into() } else { program })
            .args((self.command.arguments)(self.port))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        self.process = Some(process);
        let until = Instant::now() + self.command.ready_within;
        while Instant::now() < until {
            if !self.is_running() {
                return Err(self.not_ready("it ended while it was starting"));
            }
            if self.command.is_answered_at(self.port).unwrap_or(false) && self.is_running() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.stop();
        let reason = format!("it accepts no connection within {:?}", self.command.ready_within);
        Err(self.not_ready(&reason))
    }

    fn into_command(mut self) -> BrokerCommand {
        self.stop();
        let nothing = BrokerCommand::new("", "", "", |_| Vec::new());
        std::mem::replace(&mut self.command, nothing)
    }
}

/// What Linux says in `/proc`; elsewhere nobody says, and a moment must do.
fn all_threads_are_stopped(process: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else {
        std::thread::sleep(Duration::from_millis(50));
        return true;
    };
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|state| state.starts_with('T'))
    })
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop();
    }
}
