// SPDX-License-Identifier: MIT OR Apache-2.0
//! actix actors as handlers: by their group, by the address of one that runs already, and routed by another actor.

use std::sync::{Arc, OnceLock};

use actix::Supervised;
use actix::prelude::{
    Actor, ActorContext, ActorFutureExt, Context, Handler, Message, ResponseActFuture, ResponseFuture,
    WrapFuture,
};
use martlet_core::{
    ActorGroup, CallError, ClientProxy, HandlerGroup, HandlerKind, Microservice, RegistrationId, Registry,
    Request, RpcError, RunningService, StartError, event_to, message_to,
};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::support::{end, eventually, log, ms, paused, real};

// === an actor that writes down what it is told ===

/// An event.
#[derive(Deserialize, Message)]
#[rtype(result = "()")]
struct Note {
    text: String,
}

/// A request: how many notes there are.
#[derive(Deserialize, Message)]
#[rtype(result = "Result<usize, RpcError>")]
struct Count;

/// What is made of a whole request.
#[derive(Message)]
#[rtype(result = "Result<String, RpcError>")]
struct Letter {
    to: String,
    from: String,
    text: String,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Retire;

struct Clerk {
    tells: mpsc::Sender<String>,
    notes: usize,
}

impl Clerk {
    fn new(tells: &mpsc::Sender<String>) -> Self {
        Self { tells: tells.clone(), notes: 0 }
    }

    fn write(&mut self, text: &str) {
        self.notes += 1;
        self.tells.try_send(format!("{text}, {}", self.notes)).unwrap();
    }
}

impl Drop for Clerk {
    fn drop(&mut self) {
        // Nobody may be listening any more.
        let _ = self.tells.try_send("gone".to_owned());
    }
}

impl Actor for Clerk {
    type Context = Context<Self>;
}

impl Supervised for Clerk {}

impl Handler<Note> for Clerk {
    type Result = ();

    fn handle(&mut self, Note { text }: Note, _: &mut Context<Self>) {
        self.write(&text);
    }
}

impl Handler<Count> for Clerk {
    type Result = Result<usize, RpcError>;

    fn handle(&mut self, _: Count, _: &mut Context<Self>) -> Self::Result {
        Ok(self.notes)
    }
}

impl Handler<Letter> for Clerk {
    type Result = Result<String, RpcError>;

    fn handle(&mut self, letter: Letter, _: &mut Context<Self>) -> Self::Result {
        self.write(&letter.text);
        Ok(format!("{} for {} is taken", letter.to, letter.from))
    }
}

impl Handler<Retire> for Clerk {
    type Result = ();

    fn handle(&mut self, _: Retire, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}

/// What was told to the clerks, in order.
struct Heard(mpsc::Receiver<String>);

impl Heard {
    fn new() -> (mpsc::Sender<String>, Self) {
        let (tells, hears) = mpsc::channel(1024);
        (tells, Self(hears))
    }

    async fn next(&mut self) -> String {
        self.0.recv().await.unwrap()
    }

    /// Nothing more has been told.
    fn is_all(&mut self) -> bool {
        self.0.try_recv().is_err()
    }
}

fn note(text: &str) -> serde_json::Value {
    serde_json::json!({ "text": text })
}

fn remote(result: Result<impl std::fmt::Debug, CallError>) -> String {
    match result {
        Err(CallError::Remote(error)) => error.message().unwrap(),
        other => panic!("a remote error expected, got {other:?}"),
    }
}

async fn serve(service: Microservice) -> (RunningService, ClientProxy) {
    let network = MemoryNetwork::new();
    let service = service.server(MemoryServer::new(&network)).start().await.unwrap();
    (service, MemoryClient::new(&network))
}

#[test]
fn a_group_routes_events_and_messages_to_one_actor() {
    paused(async {
        let (tells, mut heard) = Heard::new();
        let group =
            ActorGroup::new(move || Clerk::new(&tells)).event::<Note>("noted").message::<Count>("count");
        let (service, client) = serve(Microservice::new().on_current_arbiter().handlers(group.build())).await;
        let log = log(service.events());
        for text in ["a", "b"] {
            client.emit("noted", note(text)).await.unwrap();
        }
        assert_eq!([heard.next().await, heard.next().await], ["a, 1", "b, 2"]);
        assert_eq!(client.send::<usize>("count", ()).await.unwrap(), 2, "it is the same actor");
        // What is no note does not reach it; the next one does.
        client.emit("noted", 7).await.unwrap();
        client.emit("noted", note("c")).await.unwrap();
        assert_eq!(heard.next().await, "c, 3");
        assert_eq!(client.send::<usize>("count", ()).await.unwrap(), 3);
        let reports = service.handler_reports().await.unwrap();
        let reports: Vec<_> = reports
            .iter()
            .map(|report| (&*report.name, &*report.route, report.kind, report.handled, report.failed))
            .collect();
        let expected = [
            ("Clerk::Note", "noted", HandlerKind::Event, 4, 1),
            ("Clerk::Count", "count", HandlerKind::Message, 2, 0),
        ];
        assert_eq!(reports, expected);
        assert!(log.lock().is_empty(), "{:?}", log.lock());
        end(client, service).await;
        assert_eq!(heard.next().await, "gone");
    });
}

#[test]
fn an_actors_message_can_be_made_of_the_whole_request_or_be_refused() {
    paused(async {
        let (tells, mut heard) = Heard::new();
        let letter = |request: &Request| {
            let metadata = request.metadata();
            let from = metadata.get("from").ok_or_else(|| RpcError::message("who are you?"))?;
            let text = request.data::<String>().map_err(|_| RpcError::message("write it down"))?;
            Ok(Letter { to: request.route().to_string(), from: from.to_owned(), text })
        };
        let group = ActorGroup::new(move || Clerk::new(&tells))
            .message_with("sales", letter)
            .message_with("support", letter)
            .message::<Count>("count")
            .build();
        let (service, client) = serve(Microservice::new().on_current_arbiter().handlers(group)).await;
        let send = |to: &'static str, text: &'static str| client.send::<String>(to, text);
        assert_eq!(send("sales", "hello").metadata("from", "ann").await.unwrap(), "sales for ann is taken");
        assert_eq!(
            send("support", "help").metadata("from", "bob").await.unwrap(),
            "support for bob is taken"
        );
        assert_eq!([heard.next().await, heard.next().await], ["hello, 1", "help, 2"]);
        // Refused in the words of whoever makes the message; the actor does not hear of it.
        assert_eq!(remote(send("sales", "hello").await), "who are you?");
        let number = client.send::<String>("sales", 7).metadata("from", "ann");
        assert_eq!(remote(number.await), "write it down");
        assert_eq!(client.send::<usize>("count", ()).await.unwrap(), 2);
        assert!(heard.is_all());
        end(client, service).await;
    });
}

#[test]
fn an_actor_that_runs_already_is_reached_from_every_arbiter() {
    real(async {
        let (tells, mut heard) = Heard::new();
        let clerk = Clerk::new(&tells).start();
        let network = MemoryNetwork::new();
        let service = Microservice::new()
            .arbiters(2)
            .handlers(event_to::<Note>("noted", clerk.clone().recipient()))
            .handlers(message_to::<Count>("count", clerk.clone().recipient()))
            .server(MemoryServer::new(&network))
            .start()
            .await
            .unwrap();
        // Connections are placed in turn; there is one actor and one count.
        for round in 1..=4 {
            let client = MemoryClient::new(&network);
            client.emit("noted", note("x")).await.unwrap();
            assert_eq!(heard.next().await, format!("x, {round}"));
            assert_eq!(client.send::<usize>("count", ()).await.unwrap(), round);
            assert_eq!(clerk.send(Count).await.unwrap().unwrap(), round);
            let unread = client.send::<usize>("count", "what").await;
            assert!(remote(unread).starts_with("Bad payload: "));
            client.close().await;
        }
        service.stop(ms(1000)).await;
        // It is not the service's: it goes on.
        assert_eq!(clerk.send(Count).await.unwrap().unwrap(), 4);
    });
}

#[test]
fn an_actor_that_runs_already_can_be_unrouted_and_can_stop() {
    paused(async {
        let (tells, mut heard) = Heard::new();
        let clerk = Clerk::new(&tells).start();
        let count = message_to::<Count>("count", clerk.clone().recipient());
        let (service, client) = serve(Microservice::new().on_current_arbiter().handlers(count)).await;
        let log = log(service.events());
        // An event has as many listeners as there are.
        let (tells, mut other_heard) = Heard::new();
        let other = Clerk::new(&tells).start();
        let both = [&clerk, &other].map(|clerk| event_to::<Note>("noted", clerk.clone().recipient()));
        let noted = service.registry().register(both.to_vec()).await.unwrap();
        client.emit("noted", note("a")).await.unwrap();
        assert_eq!([heard.next().await, other_heard.next().await], ["a, 1", "a, 1"]);

        assert!(service.registry().unregister(noted).await.unwrap());
        client.emit("noted", note("b")).await.unwrap();
        assert_eq!(client.send::<usize>("count", ()).await.unwrap(), 1);
        assert!(log.lock().iter().any(|text| text.starts_with("no_event_handler")), "{:?}", log.lock());
        clerk.send(Note { text: "c".to_owned() }).await.unwrap();
        assert_eq!(heard.next().await, "c, 2", "it is unrouted, not stopped");

        log.lock().clear();
        clerk.send(Retire).await.unwrap();
        assert_eq!(heard.next().await, "gone");
        assert_eq!(remote(client.send::<usize>("count", ()).await), "Internal server error");
        let told = log.lock().join("\n");
        assert!(told.starts_with("unexpected_error: ") && told.contains("count"), "{told}");
        end(client, service).await;
    });
}

// === an actor that routes others, and itself ===

#[derive(Deserialize, Message)]
#[rtype(result = "Result<String, RpcError>")]
struct Open {
    name: String,
}

#[derive(Deserialize, Message)]
#[rtype(result = "Result<bool, RpcError>")]
struct Close;

/// Unroutes the manager itself, with the future that the actor polls, or with one of its own.
#[derive(Deserialize, Message)]
#[rtype(result = "Result<bool, RpcError>")]
struct Leave;

#[derive(Deserialize, Message)]
#[rtype(result = "Result<bool, RpcError>")]
struct LeaveAlone;

struct Manager {
    registry: Registry,
    tells: mpsc::Sender<String>,
    open: Option<RegistrationId>,
    own: Arc<OnceLock<RegistrationId>>,
}

impl Actor for Manager {
    type Context = Context<Self>;
}

impl Supervised for Manager {}

impl Handler<Open> for Manager {
    type Result = ResponseActFuture<Self, Result<String, RpcError>>;

    fn handle(&mut self, Open { name }: Open, _: &mut Context<Self>) -> Self::Result {
        let (registry, tells) = (self.registry.clone(), self.tells.clone());
        let clerk = ActorGroup::new(move || Clerk::new(&tells))
            .event::<Note>(name.as_str())
            .message::<Count>(format!("{name}.count"));
        let clerk = clerk.build().singleton();
        let register = async move { registry.register(vec![clerk]).await };
        Box::pin(register.into_actor(self).map(move |registered, manager, _| match registered {
            Ok(id) => {
                manager.open = Some(id);
                Ok(name)
            }
            Err(StartError::DuplicateHandler { pattern, .. }) => {
                Err(RpcError::message(format!("{pattern} is taken")))
            }
            Err(other) => Err(RpcError::unexpected(other)),
        }))
    }
}

impl Handler<Close> for Manager {
    type Result = ResponseFuture<Result<bool, RpcError>>;

    fn handle(&mut self, _: Close, _: &mut Context<Self>) -> Self::Result {
        let (registry, open) = (self.registry.clone(), self.open);
        Box::pin(async move {
            let Some(id) = open else { return Ok(false) };
            registry.unregister(id).await.map_err(RpcError::unexpected)
        })
    }
}

impl Handler<Leave> for Manager {
    type Result = ResponseActFuture<Self, Result<bool, RpcError>>;

    fn handle(&mut self, _: Leave, _: &mut Context<Self>) -> Self::Result {
        let (registry, own) = (self.registry.clone(), *self.own.get().unwrap());
        let unregister = async move { registry.unregister(own).await.map_err(RpcError::unexpected) };
        Box::pin(unregister.into_actor(self))
    }
}

impl Handler<LeaveAlone> for Manager {
    type Result = ResponseFuture<Result<bool, RpcError>>;

    fn handle(&mut self, _: LeaveAlone, _: &mut Context<Self>) -> Self::Result {
        let (registry, own) = (self.registry.clone(), *self.own.get().unwrap());
        Box::pin(async move { registry.unregister(own).await.map_err(RpcError::unexpected) })
    }
}

/// A service whose only handler is a manager, on whichever arbiters.
async fn managed(service: Microservice) -> (RunningService, ClientProxy, Heard) {
    let (service, client) = serve(service).await;
    let (tells, heard) = Heard::new();
    let (registry, own) = (service.registry().clone(), Arc::new(OnceLock::new()));
    let of_manager = Arc::clone(&own);
    let manager: HandlerGroup = ActorGroup::new(move || Manager {
        registry: registry.clone(),
        tells: tells.clone(),
        open: None,
        own: Arc::clone(&of_manager),
    })
    .message::<Open>("open")
    .message::<Close>("close")
    .message::<Leave>("leave")
    .message::<LeaveAlone>("leave.alone")
    .build()
    .singleton();
    own.set(service.registry().register(vec![manager]).await.unwrap()).unwrap();
    (service, client, heard)
}

async fn opens_and_closes(service: Microservice) {
    let (service, client, mut heard) = managed(service).await;
    for round in 0..3 {
        let name = format!("kiosk{round}");
        let open = || client.send::<String>("open", serde_json::json!({ "name": name }));
        let count = || client.send::<usize>(format!("{name}.count"), ());
        let unknown = count().await;
        assert!(matches!(unknown, Err(CallError::NoHandler { .. })), "{unknown:?}");
        assert_eq!(open().await.unwrap(), name);
        // By the time that it has answered.
        assert_eq!(count().await.unwrap(), 0);
        client.emit(name.as_str(), note("a")).await.unwrap();
        assert_eq!(heard.next().await, "a, 1");
        assert_eq!(remote(open().await), format!("{name}.count is taken"));
        assert_eq!(count().await.unwrap(), 1, "the first one stays");
        assert!(client.send::<bool>("close", ()).await.unwrap());
        let unrouted = count().await;
        assert!(matches!(unrouted, Err(CallError::NoHandler { .. })), "{unrouted:?}");
        assert_eq!(heard.next().await, "gone");
        assert!(!client.send::<bool>("close", ()).await.unwrap());
    }
    assert!(heard.is_all());
    end(client, service).await;
}

#[test]
fn a_running_actor_routes_another_and_unroutes_it() {
    paused(opens_and_closes(Microservice::new().on_current_arbiter()));
    real(opens_and_closes(Microservice::new().arbiters(2)));
}

#[test]
fn an_actor_that_unroutes_itself_still_answers_whoever_asked_for_it() {
    async fn leaves(service: Microservice, leave: &'static str) {
        let (service, client, _) = managed(service).await;
        assert!(service.tree().find("Manager").is_some());
        assert!(client.send::<bool>(leave, ()).await.unwrap(), "{leave}");
        for pattern in [leave, "open", "close"] {
            let left = client.send::<bool>(pattern, ()).await;
            assert!(matches!(left, Err(CallError::NoHandler { .. })), "{pattern}: {left:?}");
        }
        eventually("it has gone", || service.tree().find("Manager").is_none()).await;
        end(client, service).await;
    }
    for leave in ["leave", "leave.alone"] {
        paused(leaves(Microservice::new().on_current_arbiter(), leave));
        real(leaves(Microservice::new().arbiters(2), leave));
    }
}
