// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every form a macro takes has a twin without macros; both make the same handlers.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream};
use martlet::function::endpoint;
use martlet::interceptor::{guard, timeout};
use martlet::{
    Controller, Data, Endpoint, HandlerDef, HandlerInfo, HandlerKind, Interceptor, Interceptors, Metadata,
    Pattern, Request, RpcError, Streaming, TransportId, controller, pattern,
};
use serde_json::{Map, Value, json};

const RENAMED: &str = "renamed";
const CUSTOM: TransportId = TransportId::custom(2000);

struct Macros;

#[controller(name = "twin", interceptors = [timeout(Duration::from_secs(5))])]
impl Macros {
    #[message_pattern("text")]
    fn text(&self) {}

    #[message_pattern(7)]
    fn number(&self) -> u32 {
        self.helper()
    }

    fn helper(&self) -> u32 {
        7
    }

    #[message_pattern({ "v": 2, "cmd": { "name": "object" } })]
    async fn object(&self, Data(numbers): Data<Vec<i64>>) -> Result<i64, RpcError> {
        Ok(numbers.iter().sum())
    }

    #[message_pattern(cmd = "short", v = 2, transport = TCP, queue = "workers", concurrency = 3)]
    async fn short(&self, #[payload("name")] name: String, _metadata: Metadata) -> String {
        name
    }

    #[martlet::message_pattern("first")]
    #[message_pattern(RENAMED, transport = CUSTOM)]
    #[event_pattern({ "event": "third" })]
    fn several(&self, #[payload] to: u64) -> impl Stream<Item = u64> {
        stream::iter(0..to)
    }

    #[event_pattern(
        "options",
        extras = { "queue": "loses", "qos": [1, { "deep": true }] },
        queue = "wins",
        transport = TransportId::NATS,
        concurrency = 0 + 0,
        interceptors = [guard(|_| async { Ok(true) }), Arc::new(Plain)],
    )]
    async fn options(&self) {}

    #[cfg(any())]
    #[message_pattern("never")]
    fn never(&self, nothing: NoSuchType) {}
}

struct Plain;

impl Interceptor for Plain {
    fn intercept<'a>(
        &'a self,
        request: Request,
        next: martlet::Next<'a>,
    ) -> futures::future::LocalBoxFuture<'a, martlet::HandlerResult> {
        Box::pin(next.run(request))
    }
}

struct ByHand;

impl ByHand {
    fn def(
        name: &str,
        kind: HandlerKind,
        pattern: impl Into<Pattern>,
        change: impl FnOnce(&mut HandlerInfo, &mut Interceptors),
        endpoint: fn(&Rc<Self>) -> Box<dyn Endpoint>,
    ) -> HandlerDef<Self> {
        let mut info = HandlerInfo::new(format!("Macros::{name}"), kind, pattern);
        let mut interceptors = Interceptors::new();
        change(&mut info, &mut interceptors);
        HandlerDef { info, interceptors, endpoint }
    }
}

fn extras(value: Value) -> Arc<Map<String, Value>> {
    Arc::new(value.as_object().unwrap().clone())
}

impl Controller for ByHand {
    fn name() -> &'static str {
        "twin"
    }

    fn interceptors() -> Interceptors {
        vec![timeout(Duration::from_secs(5))]
    }

    fn handlers() -> Vec<HandlerDef<Self>> {
        use HandlerKind::{Event, Message};
        let several: fn(&Rc<Self>) -> Box<dyn Endpoint> = |_| {
            endpoint(async |request| Ok::<_, RpcError>(Streaming(stream::iter(0..request.data::<u64>()?))))
        };
        let empty: fn(&Rc<Self>) -> Box<dyn Endpoint> = |_| endpoint(async |_| Ok::<_, RpcError>(()));
        vec![
            Self::def("text", Message, "text", |_, _| {}, empty),
            Self::def("number", Message, 7, |_, _| {}, empty),
            Self::def(
                "object",
                Message,
                Pattern::from_json(&json!({ "v": 2, "cmd": { "name": "object" } })).unwrap(),
                |_, _| {},
                empty,
            ),
            Self::def(
                "short",
                Message,
                Pattern::from_json(&json!({ "cmd": "short", "v": 2 })).unwrap(),
                |info, _| {
                    info.transport = Some(TransportId::TCP);
                    info.extras = extras(json!({ "queue": "workers" }));
                    info.concurrency = Some(3);
                },
                empty,
            ),
            Self::def("several", Message, "first", |_, _| {}, several),
            Self::def("several", Message, "renamed", |info, _| info.transport = Some(CUSTOM), several),
            Self::def(
                "several",
                Event,
                Pattern::from_json(&json!({ "event": "third" })).unwrap(),
                |_, _| {},
                several,
            ),
            Self::def(
                "options",
                Event,
                "options",
                |info, interceptors| {
                    info.transport = Some(TransportId::NATS);
                    info.extras = extras(json!({ "queue": "wins", "qos": [1, { "deep": true }] }));
                    info.concurrency = Some(1);
                    interceptors.push(guard(|_| async { Ok(true) }));
                    interceptors.push(Arc::new(Plain));
                },
                empty,
            ),
        ]
    }
}

/// Everything of a handler that can be compared.
fn shape<C: Controller>() -> Vec<String> {
    let defs = C::handlers();
    let shape = |def: &HandlerDef<C>| {
        let info = &def.info;
        format!(
            "{} {:?} {} {} {:?} {} {:?} {}",
            info.name,
            info.kind,
            info.pattern.text(),
            info.pattern.route(),
            info.transport,
            Value::Object((*info.extras).clone()),
            info.concurrency,
            def.interceptors.len(),
        )
    };
    defs.iter().map(shape).collect()
}

#[test]
fn macros_make_the_handlers_that_are_written_by_hand() {
    assert_eq!(shape::<Macros>(), shape::<ByHand>());
    assert_eq!(Macros::name(), ByHand::name());
    assert_eq!(Macros::interceptors().len(), ByHand::interceptors().len());
}

#[test]
fn a_group_lists_the_same_handlers_either_way() {
    let list = |group: martlet::HandlerGroup| {
        let one = |info: &HandlerInfo| (info.name.clone(), info.kind, info.pattern.route().clone());
        group.handlers().map(one).collect::<Vec<_>>()
    };
    let macros = list(martlet::HandlerGroup::controller(|| Macros));
    assert_eq!(macros, list(martlet::HandlerGroup::controller(|| ByHand)));
    assert_eq!(macros.len(), 8);
}

struct Placed;

#[controller]
impl Placed {
    #[message_pattern("a")]
    #[message_pattern("b")]
    fn place(&self) -> u32 {
        line!()
    }
}

#[test]
fn a_handlers_place_is_its_pattern_attribute() {
    let line = Placed.place();
    let places: Vec<_> = Placed::handlers().iter().map(|def| def.info.location).collect();
    assert_eq!([places[0].line() + 3, places[1].line() + 2], [line, line]);
    assert!(places.iter().all(|place| place.file() == file!()));
    assert_eq!(Placed::name(), "Placed");
}

#[test]
fn pattern_reads_json_tokens_and_anything_that_is_a_pattern() {
    let cmd = "sum";
    let object = pattern!({ "cmd": cmd, "nested": { "list": [1, null, true] } });
    let same = json!({ "cmd": "sum", "nested": { "list": [1, null, true] } });
    assert_eq!(object.text(), Pattern::from_json(&same).unwrap().text());
    assert_eq!(pattern!("sum"), Pattern::from("sum"));
    assert_eq!(pattern!(-3), Pattern::from(-3));
    assert_eq!(pattern!(String::from(cmd)), Pattern::from("sum"));
    assert_eq!(pattern!({}).route().as_str(), "{}");
}
