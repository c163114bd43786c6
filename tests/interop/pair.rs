// SPDX-License-Identifier: MIT OR Apache-2.0
//! One NestJS process and its Martlet counterpart, shared by the tests of a direction.

use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use martlet::{CallError, ClientProxy, Server};
use serde_json::{Value, json};

use crate::brokers::{Broker, Brokers};
use crate::example::Example;
use crate::peer::{Peer, Sent};
use crate::service::Service;
use crate::wire::{self, End, Nobody, Transport, Wildcards, Wire};
use crate::{Body, Direction};

/// Where the two ends meet, and in which way.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) transport: Transport,
    pub(crate) url: String,
    /// The queue, on RabbitMQ.
    pub(crate) queue: String,
    /// Options of this place, for every end.
    pub(crate) options: Value,
    /// Lives as long as those that use it.
    pub(crate) broker: Option<Broker>,
}

impl Place {
    pub(crate) fn new(transport: Transport, broker: Option<Broker>) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let url = broker.as_ref().map_or_else(|| "tcp://127.0.0.1:0".to_owned(), Broker::url);
        let queue = match transport.is_rmq() {
            true => format!("interop-{}", SERIAL.fetch_add(1, Ordering::Relaxed)),
            false => String::new(),
        };
        Self { transport, url, queue, options: json!({}), broker }
    }

    /// The same with further options of every end.
    pub(crate) fn with(&self, options: Value) -> Self {
        let mut place = self.clone();
        wire::lay_over(&mut place.options, options);
        place
    }

    /// The same with another queue.
    pub(crate) fn queue(&self, queue: &str) -> Self {
        Self { queue: queue.to_owned(), ..self.clone() }
    }

    /// A port of its own, where there is no broker.
    pub(crate) fn at(&self, port: u16) -> Self {
        match self.broker {
            None => Self { url: format!("tcp://127.0.0.1:{port}"), ..self.clone() },
            Some(_) => self.clone(),
        }
    }

    /// Where a service is that said this URL.
    pub(crate) fn at_url(&self, url: &str) -> Self {
        if self.broker.is_some() { self.clone() } else { self.at(wire::port(url)) }
    }

    pub(crate) fn wire(&self) -> &'static Wire {
        self.transport.wire()
    }

    /// The arguments by which a NestJS peer finds it.
    fn arguments(&self, end: End) -> Vec<String> {
        let wire = self.wire();
        let mut words = vec!["--transport".into(), wire.nest.into(), "--url".into(), self.url.clone()];
        if !self.queue.is_empty() {
            words.extend(["--queue".into(), self.queue.clone()]);
        }
        // What the peer is told by its transport's name.
        let mut options = wire.options(end);
        options.as_object_mut().unwrap().remove("protocolVersion");
        words.extend(["--options".into(), options.to_string(), "--options".into(), self.options.to_string()]);
        words
    }

    pub(crate) fn client(&self) -> ClientProxy {
        self.client_with(json!({}))
    }

    /// A client of ours, with these options over those of the place.
    pub(crate) fn client_with(&self, more: Value) -> ClientProxy {
        let mut options = self.options.clone();
        wire::lay_over(&mut options, more);
        self.wire().client(&self.url, &self.queue, options)
    }

    pub(crate) fn server(&self) -> Server {
        self.server_with(json!({}))
    }

    /// A server of ours, with these options over those of the place.
    pub(crate) fn server_with(&self, more: Value) -> Server {
        let mut options = self.options.clone();
        wire::lay_over(&mut options, more);
        self.wire().server(&self.url, &self.queue, options)
    }

    pub(crate) async fn nest(&self, version: u32, role: &str, more: &[&str]) -> Peer {
        let end = if role == "server" { End::NestServer } else { End::NestClient };
        let mut words = self.arguments(end);
        words.extend(more.iter().map(|word| (*word).to_owned()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Peer::start(version, role, &words).await
    }

    /// A NestJS server, and the place where it is.
    pub(crate) async fn nest_server(&self, version: u32, more: &[&str]) -> (Self, Peer) {
        let nest = self.nest(version, "server", more).await;
        (self.at(nest.port), nest)
    }
}

/// The two ends of one direction.
pub(crate) struct Pair {
    pub(crate) version: u32,
    pub(crate) transport: Transport,
    /// The NestJS client or server.
    pub(crate) nest: Peer,
    pub(crate) place: Place,
    pub(crate) brokers: Rc<Brokers>,
    service: Option<Service>,
    _example: Option<Example>,
    client: Option<ClientProxy>,
}

impl Pair {
    pub(crate) async fn start(
        brokers: &Rc<Brokers>,
        version: u32,
        transport: Transport,
        direction: Direction,
    ) -> Self {
        let broker = match transport.wire().broker {
            Some(kind) => Some(brokers.elsewhere(kind).await),
            None => None,
        };
        let mut place = Place::new(transport, broker);
        let (mut service, mut example, mut client) = (None, None, None);
        let nest = match direction {
            Direction::ToMartlet => {
                let (at, ours) = start_service("ours", &place).await;
                place = at;
                service = Some(ours);
                place.nest(version, "client", &[]).await
            }
            Direction::ToExample => {
                let running = Example::start(&place, "example").await;
                place = place.at_url(&running.url);
                example = Some(running);
                place.nest(version, "client", &[]).await
            }
            Direction::ToNest => {
                let mut words = vec!["--name", "nest"];
                if std::env::var_os("INTEROP_SABOTAGE").is_some() {
                    words.push("--sabotage");
                }
                let (at, nest) = place.nest_server(version, &words).await;
                place = at;
                client = Some(place.client());
                nest
            }
        };
        Self {
            version,
            transport,
            nest,
            place,
            brokers: Rc::clone(brokers),
            service,
            _example: example,
            client,
        }
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

    pub(crate) fn wire(&self) -> &'static Wire {
        self.transport.wire()
    }

    /// How wildcards are written here.
    pub(crate) fn wild(&self) -> &'static Wildcards {
        self.wire().wildcards.as_ref().expect("the test is for transports with wildcards")
    }

    /// Our service, which the NestJS client calls.
    pub(crate) fn ours(&self) -> &Service {
        self.service.as_ref().expect("the test is of the direction to Martlet")
    }

    /// Our client, which calls the NestJS service.
    pub(crate) fn client(&self) -> &ClientProxy {
        self.client.as_ref().expect("the test is of the direction to NestJS")
    }

    /// A place where nobody is yet.
    pub(crate) async fn elsewhere(&self) -> Place {
        let broker = match self.wire().broker {
            Some(kind) => Some(self.brokers.elsewhere(kind).await),
            None => None,
        };
        Place::new(self.transport, broker)
    }

    /// A place whose broker may be restarted.
    pub(crate) async fn restartable(&self) -> (Place, Broker) {
        let kind = self.wire().broker.expect("the test is for transports with a broker");
        let broker = self.brokers.own(kind).await;
        (Place::new(self.transport, Some(broker.clone())), broker)
    }

    /// The NestJS client calls what nobody handles.
    pub(crate) async fn nest_is_not_answered(&self, pattern: &str) {
        let sent = self.nest.send_with(json!(pattern), json!(1), json!({ "timeout": 250 })).await;
        is_not_answered(self.wire().nobody[0], pattern, &sent);
    }

    /// Our client calls what nobody handles.
    pub(crate) async fn we_are_not_answered(&self, pattern: &str) {
        let call = self.client().send::<Value>(pattern, 1).timeout(Duration::from_millis(250));
        self.nobody_answered(pattern, &call.await.unwrap_err());
    }

    /// What our client says of a request that nobody handles.
    #[track_caller]
    pub(crate) fn nobody_answered(&self, expected: &str, error: &CallError) {
        match self.wire().nobody[1] {
            Nobody::Silence => assert!(matches!(error, CallError::Timeout { .. }), "{error:?}"),
            Nobody::Answered | Nobody::Refused => {
                assert!(
                    matches!(error, CallError::NoHandler { pattern } if pattern == expected),
                    "{error:?}"
                );
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
            // `never`, `infinite` and `broadcast` have no end; everything else has.
            let endless = ["never", "infinite", "broadcast"];
            let left: Vec<_> = report
                .abandoned()
                .filter(|it| !endless.iter().any(|name| it.route.starts_with(name)))
                .collect();
            assert!(left.is_empty(), "abandoned: {left:?}");
        }
    }
}

/// What a NestJS client observes of a request that nobody handles.
#[track_caller]
pub(crate) fn is_not_answered(nobody: Nobody, pattern: &str, sent: &Sent) {
    match nobody {
        Nobody::Answered => {
            sent.fails(json!("There is no matching message handler defined in the remote service."));
        }
        Nobody::Refused => {
            let text =
                format!("Empty response. There are no subscribers listening to that message (\"{pattern}\")");
            assert_eq!(sent.error_text(), text);
        }
        Nobody::Silence => sent.timed_out(),
    }
}

/// A service of ours, and where it can be found.
pub(crate) async fn start_service(name: &str, place: &Place) -> (Place, Service) {
    // It calls itself, so it must know its port.
    let place = match place.broker {
        None if wire::port(&place.url) == 0 => place.at(free_port()),
        _ => place.clone(),
    };
    let service = Service::start(name, place.transport, place.server(), Some(place.client())).await;
    (place, service)
}

/// A port that is free now.
pub(crate) fn free_port() -> u16 {
    martlet_testkit::broker::free_port().unwrap()
}
