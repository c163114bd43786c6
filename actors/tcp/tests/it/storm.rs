// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many calls while lines are cut and the service is stopped and started again, panics by the thousand, and
//! stopping under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use martlet_core::codec::MessagePackCodec;
use martlet_core::{CallError, ClientProxy, Data, Microservice, RpcError, RunningService, message};
use martlet_tcp::{
    LengthDelimited, TcpClient, TcpClientOptions, TcpServer, TcpServerOptions, TlsClientOptions,
    TlsServerOptions,
};
use martlet_testkit::broker::free_port;
use martlet_testkit::conformance::quiet_deliberate_panics;
use martlet_testkit::relay::Relay;
use martlet_testkit::storm::{Storm, every_route_answers, stop_under_load};
use serde_json::Value;

const GRACE: Duration = Duration::from_secs(5);

fn client(port: u16, retry_attempts: u32) -> ClientProxy {
    Line::default().client(port, retry_attempts)
}

/// What both ends of a line speak.
#[derive(Default)]
struct Line {
    server: TcpServerOptions,
    client: TcpClientOptions,
}

impl Line {
    fn message_pack() -> Self {
        Self {
            server: TcpServerOptions::new().codec(MessagePackCodec).framing(LengthDelimited),
            client: TcpClientOptions::new().codec(MessagePackCodec).framing(LengthDelimited),
        }
    }

    fn tls() -> Self {
        let pair = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let (cert, key) = (pair.cert.pem(), pair.signing_key.serialize_pem());
        Self {
            server: TcpServerOptions::new().tls(TlsServerOptions::new(key, cert.as_str())),
            client: TcpClientOptions::new().tls(TlsClientOptions::new(cert)),
        }
    }

    fn client(&self, port: u16, retry_attempts: u32) -> ClientProxy {
        TcpClient::new(self.client.clone().address("127.0.0.1", port).with(|options| {
            options.retry_attempts = retry_attempts;
            options.retry_delay = Duration::from_millis(10);
            options.timeout = Duration::from_secs(5);
        }))
    }

    async fn start(&self, storm: &Storm, port: u16) -> RunningService {
        let server = TcpServer::new(self.server.clone().address("127.0.0.1", port));
        let mut service = Microservice::new().arbiters(1).server(server);
        for group in storm.handlers() {
            service = service.handlers(group);
        }
        service.start().await.unwrap()
    }
}

fn port(service: &RunningService) -> u16 {
    service.url().rsplit_once(':').unwrap().1.parse().unwrap()
}

/// So many calls, a tenth of them events, while lines are cut and the service is stopped and started again.
async fn storm(line: Line, calls: u64, restarts: u64) {
    let begin = Instant::now();
    let storm = Storm::with_events(calls);
    // It is started again where it was.
    let port = free_port().unwrap();
    let mut service = line.start(&storm, port).await;
    let relays: Vec<Relay> = (0..3).map(|_| Relay::start(port)).collect();
    // One does not wait for its connection, one has no relay between.
    let clients = [
        line.client(relays[0].port(), 500),
        line.client(relays[1].port(), 500),
        line.client(relays[2].port(), 0),
        line.client(port, 500),
    ];
    let chaos = async {
        let mut cut = 0;
        for restart in 1..=restarts {
            while storm.ended() < restart * calls / (restarts + 1) {
                let calm = storm.calm(Duration::from_millis(11 + cut as u64 * 7 % 90));
                while !calm.is_over() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                relays[[0, 1, 2, 1, 0, 2, 2][cut % 7]].cut_one(cut);
                cut += 1;
            }
            // Some stops let work finish, some do not.
            let grace = if restart % 3 == 0 { Duration::ZERO } else { GRACE };
            let report = service.stop(grace).await;
            assert!(report.clean || grace.is_zero(), "{report:?}");
            // A relay would take connections for a service that is not there.
            relays.iter().for_each(Relay::close);
            tokio::time::sleep(Duration::from_millis(restart * 13 % 100)).await;
            service = line.start(&storm, port).await;
            relays.iter().for_each(Relay::open);
        }
        cut
    };
    let (outcomes, cuts) = futures::join!(storm.run(&clients, 100), chaos);
    for client in &clients {
        every_route_answers(client).await;
        assert_eq!((client.pending(), client.occupied()), (0, 0));
        client.close().await;
    }
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
    storm.check_runs();
    let took = begin.elapsed();
    let events = storm.events_run();
    eprintln!("{outcomes:?}, {events} events ran; {restarts} restarts, {cuts} cuts; {took:.1?}");
    assert!(outcomes["value"] > calls / 2, "{outcomes:?}");
    assert!(outcomes.contains_key("lost"), "{outcomes:?}");
    assert!(events > calls / 20, "{events} events of {}", calls / 10);
    assert!(took < Duration::from_secs(120), "{took:?}");
}

#[actix::test]
async fn a_hundred_thousand_calls_survive_cuts_and_ten_restarts_of_the_service() {
    storm(Line::default(), 100_000, 10).await;
}

#[actix::test]
async fn a_storm_in_message_pack_is_survived() {
    storm(Line::message_pack(), 30_000, 4).await;
}

#[actix::test]
async fn a_storm_over_tls_is_survived() {
    storm(Line::tls(), 30_000, 4).await;
}

/// Half of them panic over payloads that are all different, half over one payload with the rule for poisonous
/// messages off.
#[actix::test]
async fn twenty_thousand_panics_are_each_answered() {
    const PANICS: u64 = 20_000;
    quiet_deliberate_panics();
    let runs = Arc::new(AtomicU64::new(0));
    let panics = |pattern: &str| {
        let runs = Arc::clone(&runs);
        message(pattern, move |Data(number): Data<u64>| {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            async move {
                if run.is_multiple_of(2) {
                    tokio::task::yield_now().await;
                }
                if number > 0 {
                    panic!("deliberate panic {number}");
                }
                Ok::<_, RpcError>(number)
            }
        })
    };
    let service = Microservice::new()
        .arbiters(2)
        .handlers(panics("varied"))
        .handlers(panics("same").supervision(|supervision| supervision.poison_after = 0))
        .server(TcpServer::bind("127.0.0.1", 0))
        .start()
        .await
        .unwrap();
    let clients = [client(port(&service), 0), client(port(&service), 0)];
    let internal = serde_json::json!({"status": "error", "message": "Internal server error"});
    let answered = stream::iter(0..PANICS)
        .map(|number| {
            let client = &clients[number as usize / 2 % 2];
            let (pattern, data) = if number % 2 == 0 { ("varied", number + 1) } else { ("same", 1) };
            client.send::<u64>(pattern, data)
        })
        .buffer_unordered(256)
        .filter(|result| {
            let expected = match result {
                Err(CallError::Remote(error)) => error.decode::<Value>().unwrap() == internal,
                other => panic!("{other:?}"),
            };
            std::future::ready(expected)
        })
        .count()
        .await;
    assert_eq!((answered as u64, runs.load(Ordering::Relaxed)), (PANICS, PANICS));
    for client in &clients {
        for pattern in ["varied", "same"] {
            assert_eq!(client.send::<u64>(pattern, 0).await.unwrap(), 0);
        }
        assert_eq!((client.pending(), client.occupied()), (0, 0));
        client.close().await;
    }
    let report = service.stop(GRACE).await;
    assert!(report.clean, "{report:?}");
    assert_eq!(report.done(), PANICS + 4);
}

#[actix::test]
async fn what_a_stopping_service_handled_reaches_its_callers() {
    stop_under_load(
        || TcpServer::bind("127.0.0.1", 0).into(),
        |service| client(port(service), 0),
        // On its way when the service closed, or after that.
        |error| matches!(error, CallError::Lost { .. } | CallError::NotSent { .. }),
    )
    .await;
}
