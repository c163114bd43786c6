// SPDX-License-Identifier: MIT OR Apache-2.0
//! One NestJS process and its Martlet counterpart, shared by the tests of a direction.

use std::time::Duration;

use martlet::tcp::{TcpClient, TcpServer};
use martlet::{ClientProxy, Server};

use crate::peer::{Broker, Peer};
use crate::service::Service;
use crate::{Body, Direction, Transport};

/// Where the two ends meet.
#[derive(Clone)]
pub(crate) enum Place {
    Tcp(u16),
    Nats(String),
}

impl Place {
    /// The arguments by which a NestJS peer finds it.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let words: Vec<String> = match self {
            Self::Tcp(port) => vec!["--transport".into(), "tcp".into(), "--port".into(), port.to_string()],
            Self::Nats(url) => vec!["--transport".into(), "nats".into(), "--nats".into(), url.clone()],
        };
        words
    }

    /// A client of ours, with the default options.
    pub(crate) fn client(&self) -> ClientProxy {
        match self {
            Self::Tcp(port) => TcpClient::connect_to("127.0.0.1", *port),
            Self::Nats(url) => nats::client(url),
        }
    }

    /// A server of ours, with the default options.
    pub(crate) fn server(&self) -> Server {
        match self {
            Self::Tcp(port) => TcpServer::bind("127.0.0.1", *port).into(),
            Self::Nats(url) => nats::server(url, None),
        }
    }

    pub(crate) async fn nest(&self, version: u32, role: &str, more: &[&str]) -> Peer {
        let mut words = self.arguments();
        words.extend(more.iter().map(|word| (*word).to_owned()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Peer::start(version, role, &words).await
    }
}

pub(crate) mod nats {
    use std::time::Duration;

    use martlet::nats::{NatsClient, NatsClientOptions, NatsServer, NatsServerOptions};
    use martlet::{ClientProxy, Server};

    pub(crate) fn client(url: &str) -> ClientProxy {
        let quick = Duration::from_millis(100);
        NatsClient::new(NatsClientOptions::new().servers([url]).reconnect_time_wait(quick))
    }

    pub(crate) fn server(url: &str, queue: Option<&str>) -> Server {
        let quick = Duration::from_millis(100);
        let mut options =
            NatsServerOptions::new().servers([url]).reconnect_time_wait(quick).max_reconnect_attempts(-1);
        if let Some(queue) = queue {
            options = options.queue(queue);
        }
        NatsServer::new(options)
    }
}

/// The two ends of one direction.
pub(crate) struct Pair {
    pub(crate) version: u32,
    pub(crate) transport: Transport,
    /// The NestJS client or server.
    pub(crate) nest: Peer,
    pub(crate) place: Place,
    service: Option<Service>,
    client: Option<ClientProxy>,
    /// Lives as long as those that use it.
    _broker: Option<Broker>,
}

impl Pair {
    pub(crate) async fn start(version: u32, transport: Transport, direction: Direction) -> Self {
        let broker = match transport {
            Transport::Tcp => None,
            Transport::Nats => Some(Broker::start().await),
        };
        let mut place = match &broker {
            None => Place::Tcp(0),
            Some(broker) => Place::Nats(broker.url()),
        };
        let (mut service, mut client) = (None, None);
        let nest = match direction {
            Direction::ToMartlet => {
                let (at, ours) = start_service("ours", &place).await;
                place = at;
                service = Some(ours);
                place.nest(version, "client", &[]).await
            }
            Direction::ToNest => {
                let mut words = vec!["--name", "nest"];
                if std::env::var_os("INTEROP_SABOTAGE").is_some() {
                    words.push("--sabotage");
                }
                let nest = place.nest(version, "server", &words).await;
                if transport == Transport::Tcp {
                    place = Place::Tcp(nest.port);
                }
                client = Some(place.client());
                nest
            }
        };
        Self { version, transport, nest, place, service, client, _broker: broker }
    }

    /// Runs a test; the NestJS process must not have been disturbed more than the test says itself.
    pub(crate) async fn run(&self, body: Body) {
        body(self).await;
        self.nest.expect_errors(0).await;
        if let Some(client) = &self.client {
            crate::peer::eventually("the client to have nothing pending", || async {
                (client.pending(), client.occupied()) == (0, 0)
            })
            .await;
        }
    }

    pub(crate) fn ours(&self) -> &Service {
        self.service.as_ref().unwrap()
    }

    pub(crate) fn client(&self) -> &ClientProxy {
        self.client.as_ref().unwrap()
    }

    pub(crate) fn on_nats(&self) -> bool {
        self.transport == Transport::Nats
    }

    /// A place of the same kind for peers of a test's own, with the broker that it needs.
    pub(crate) async fn elsewhere(&self) -> (Place, Option<Broker>) {
        match self.transport {
            Transport::Tcp => (Place::Tcp(0), None),
            Transport::Nats => {
                let broker = Broker::start().await;
                (Place::Nats(broker.url()), Some(broker))
            }
        }
    }

    /// Stops both ends, the NestJS process first: what it left running is not waited for.
    pub(crate) async fn stop(&self) {
        self.nest.kill();
        if let Some(client) = &self.client {
            client.close().await;
        }
        if let Some(service) = &self.service {
            let report = service.running.stop(Duration::from_secs(1)).await;
            // `never` and `infinite` have no end; everything else has.
            let left: Vec<_> =
                report.abandoned().filter(|it| !["never", "infinite"].contains(&&*it.route)).collect();
            assert!(left.is_empty(), "abandoned: {left:?}");
        }
    }
}

/// A service of ours, and where it can be found.
pub(crate) async fn start_service(name: &str, place: &Place) -> (Place, Service) {
    match place {
        Place::Tcp(port) => {
            // It calls itself, so it must know its port.
            let port = if *port == 0 { free_port() } else { *port };
            let place = Place::Tcp(port);
            let service = Service::start(name, place.server(), Some(place.client())).await;
            (place, service)
        }
        Place::Nats(_) => (place.clone(), Service::start(name, place.server(), Some(place.client())).await),
    }
}

/// A port that is free now.
pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
