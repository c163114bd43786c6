// SPDX-License-Identifier: MIT OR Apache-2.0
//! Redis, RabbitMQ and MQTT with their raw drivers: a responder, a load and a publisher, each written once over
//! what the three have in common.

mod mqtt;
mod rabbitmq;
mod redis;

use std::time::{Duration, Instant};

use crate::report::Report;
use crate::service::{self, COUNTED, Calls, NOTED, Reply, SUM, Service};
use crate::window::Window;
use crate::{Error, Result, process};

/// A connection that receives messages and sends others.
trait Link: Sized {
    type Message;
    /// Connects to receive what is sent to these routes.
    async fn serve(place: &Place, routes: &[&str]) -> Result<Self>;
    /// Connects to receive the replies of these routes.
    async fn call(place: &Place, routes: &[&str]) -> Result<Self>;
    /// The next message; what was sent before goes out first.
    async fn receive(&mut self) -> Result<Self::Message>;
    fn body(message: &Self::Message) -> &[u8];
    /// The id, where it is beside the packet.
    fn id(_message: &Self::Message) -> Option<&str> {
        None
    }
    async fn reply(&mut self, to: &Self::Message, packet: Vec<u8>) -> Result<()>;
    /// Sends a request, or an event, which has no id.
    async fn send(&mut self, route: &str, id: Option<&str>, packet: Vec<u8>) -> Result<()>;
}

/// A connection that publishes events.
trait Publisher: Sized {
    async fn open(place: &Place) -> Result<Self>;
    /// Publishes all at once; done when the broker has them, or the socket where it does not say.
    async fn publish(&mut self, packets: Vec<Vec<u8>>) -> Result<()>;
}

/// `scheme://host:port[?queue=NAME]`.
#[derive(Debug)]
struct Place {
    scheme: String,
    host: String,
    port: u16,
    queue: String,
}

/// The most messages that a queue keeps which nobody consumes.
const MAX_LENGTH: i32 = 10_000;

impl Place {
    fn parse(url: &str) -> Result<Self> {
        let wrong = || Error::from(format!("{url} is not SCHEME://HOST:PORT[?queue=NAME]"));
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, port) = address.trim_end_matches('/').split_once(':').ok_or_else(wrong)?;
        let queue = query.split('&').find_map(|pair| pair.strip_prefix("queue=")).unwrap_or_default();
        Ok(Self {
            scheme: scheme.to_owned(),
            host: host.to_owned(),
            port: port.parse()?,
            queue: queue.to_owned(),
        })
    }

    fn unknown<T>(&self) -> Result<T> {
        Err(format!("unknown scheme {}: known are redis, amqp and mqtt", self.scheme).into())
    }
}

/// Answers sums and counts events until the connection ends.
pub async fn respond(url: &str) -> Result<()> {
    let place = Place::parse(url)?;
    match place.scheme.as_str() {
        "redis" => respond_over::<redis::Redis>(&place).await,
        "amqp" => respond_over::<rabbitmq::Rabbit>(&place).await,
        "mqtt" => respond_over::<mqtt::Mqtt>(&place).await,
        _ => place.unknown(),
    }
}

async fn respond_over<L: Link>(place: &Place) -> Result<()> {
    let mut link = L::serve(place, &[SUM, NOTED, COUNTED]).await?;
    let service = Service::of_broker(place.scheme == "amqp");
    process::say_ready(&place.scheme)?;
    loop {
        let message = link.receive().await?;
        let mut reply = Vec::new();
        service.answer(L::body(&message), &mut reply)?;
        if !reply.is_empty() {
            link.reply(&message, reply).await?;
        }
    }
}

/// What [`load`] sends.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Calls in flight.
    pub depth: usize,
    /// Events in front of each call, which are then what is counted.
    pub events: usize,
}

/// Calls a responder and checks every reply, and that every event was handled.
pub async fn load(url: &str, plan: Plan, warmup: Duration, window: &Window) -> Result<Report> {
    let place = Place::parse(url)?;
    let load = async {
        match place.scheme.as_str() {
            "redis" => load_over::<redis::Redis>(&place, plan, window).await,
            "amqp" => load_over::<rabbitmq::Rabbit>(&place, plan, window).await,
            "mqtt" => load_over::<mqtt::Mqtt>(&place, plan, window).await,
            _ => place.unknown(),
        }
    };
    let report = window.measure(warmup, load).await?;
    Ok(Report { target: url.to_owned(), connections: 1, depth: plan.depth, ..report })
}

async fn load_over<L: Link>(place: &Place, plan: Plan, window: &Window) -> Result<()> {
    let mut link = L::call(place, &[SUM, COUNTED]).await?;
    let mut calls = Calls::new()?;
    let mut sent = 0;
    for _ in 0..plan.depth {
        sent += begin(&mut link, &mut calls, plan).await?;
    }
    while !calls.is_empty() {
        let message = link.receive().await?;
        let mut reply: Reply<'_> = service::parse(L::body(&message))?;
        if let Some(id) = L::id(&message) {
            reply.id = id;
        }
        let now = Instant::now();
        window.count_many(plan.events.max(1) as u64, now - calls.end(&reply)?)?;
        if window.is_sending() {
            sent += begin(&mut link, &mut calls, plan).await?;
        }
    }
    if sent > 0 { check_count(&mut link, sent).await } else { Ok(()) }
}

/// Sends a call with its events in front, and tells how many these are.
async fn begin<L: Link>(link: &mut L, calls: &mut Calls, plan: Plan) -> Result<usize> {
    for _ in 0..plan.events {
        link.send(NOTED, None, calls.event()?).await?;
    }
    let call = calls.begin(Instant::now())?;
    link.send(SUM, Some(call.id), call.packet.to_vec()).await?;
    Ok(plan.events)
}

/// Asks until every event was handled; they need not have been when a later call is answered.
async fn check_count<L: Link>(link: &mut L, sent: usize) -> Result<()> {
    let mut counted = String::new();
    for turn in 0..100 {
        let id = format!("counted.{turn}");
        let packet = format!(r#"{{"pattern":"{COUNTED}","data":null,"id":"{id}"}}"#);
        link.send(COUNTED, Some(&id), packet.into_bytes()).await?;
        let message = link.receive().await?;
        let reply: Reply<'_> = service::parse(L::body(&message))?;
        counted = reply.response.map(|value| value.get().to_owned()).unwrap_or_default();
        if counted == sent.to_string() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(format!("{sent} events were sent and {counted} handled").into())
}

/// Publishes events, `depth` at a time.
pub async fn publish(url: &str, depth: usize, warmup: Duration, window: &Window) -> Result<Report> {
    let place = Place::parse(url)?;
    let load = async {
        match place.scheme.as_str() {
            "redis" => publish_over::<redis::RedisPublisher>(&place, depth, window).await,
            "amqp" => publish_over::<rabbitmq::RabbitPublisher>(&place, depth, window).await,
            "mqtt" => publish_over::<mqtt::MqttPublisher>(&place, depth, window).await,
            _ => place.unknown(),
        }
    };
    let report = window.measure(warmup, load).await?;
    Ok(Report { target: url.to_owned(), connections: 1, depth, ..report })
}

async fn publish_over<P: Publisher>(place: &Place, depth: usize, window: &Window) -> Result<()> {
    let mut publisher = P::open(place).await?;
    let mut calls = Calls::new()?;
    while window.is_sending() {
        let sent = Instant::now();
        let packets = (0..depth).map(|_| calls.event()).collect::<Result<Vec<_>>>()?;
        publisher.publish(packets).await?;
        window.count_many(depth as u64, sent.elapsed())?;
    }
    Ok(())
}
