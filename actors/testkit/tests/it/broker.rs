// SPDX-License-Identifier: MIT OR Apache-2.0
//! A real broker process, on a free port.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use martlet_testkit::broker::{Broker, BrokerCommand, BrokerError};

/// Speaks to a NATS server: reads its greeting, asks PING, and says whether PONG came in time.
fn pong(broker: &Broker, patience: Duration) -> bool {
    let Ok(mut stream) = TcpStream::connect(broker.address()) else { return false };
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    if lines.read_line(&mut line).is_err() || !line.starts_with("INFO ") {
        return false;
    }
    stream.write_all(b"CONNECT {\"verbose\":false}\r\nPING\r\n").unwrap();
    line.clear();
    lines.read_line(&mut line).is_ok() && line.starts_with("PONG")
}

#[test]
fn a_broker_is_started_frozen_restarted_and_killed() {
    let patience = Duration::from_secs(5);
    let mut broker = Broker::start(BrokerCommand::nats()).unwrap();
    let other = Broker::start(BrokerCommand::nats()).unwrap();
    assert_ne!(broker.port(), other.port());
    assert_eq!(broker.url(), format!("nats://127.0.0.1:{}", broker.port()));
    assert!(pong(&broker, patience) && pong(&other, patience));

    broker.freeze().unwrap();
    assert!(broker.is_running());
    assert!(!pong(&broker, Duration::from_millis(200)), "a frozen broker answers nobody");
    assert!(pong(&other, patience));
    broker.thaw().unwrap();
    assert!(pong(&broker, patience));

    let port = broker.port();
    broker.restart().unwrap();
    assert_eq!(broker.port(), port);
    assert!(pong(&broker, patience));
    broker.stop();
    assert!(!broker.is_running() && !pong(&broker, patience));
    assert!(matches!(broker.freeze(), Err(BrokerError::NotReady { .. })));
    broker.resume().unwrap();
    assert!(pong(&broker, patience));

    // A frozen one is killed, too.
    other.freeze().unwrap();
    let address = other.address();
    drop(other);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_missing_broker_says_what_to_install() {
    let command = BrokerCommand::new("no-such-broker", "none", "apt-get install no-such", |_| Vec::new());
    let error = Broker::start(command).unwrap_err();
    assert!(matches!(error, BrokerError::Missing { .. }));
    let text = error.to_string();
    assert!(text.contains("no-such-broker") && text.contains("apt-get install no-such"), "{text}");
}

#[test]
fn a_broker_that_ends_at_once_is_not_ready() {
    let command = BrokerCommand::new("nats-server", "nats", "", |_| vec!["--no-such-flag".to_owned()]);
    let error = Broker::start(command).unwrap_err();
    assert!(matches!(error, BrokerError::NotReady { .. }), "{error}");
}
