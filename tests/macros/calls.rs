// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the generated handlers answer, over TCP.
#![cfg(feature = "tcp")]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures::stream::{self, LocalBoxStream, Stream, StreamExt};
use martlet::tcp::{TcpClient, TcpServer};
use martlet::{
    CallError, ClientProxy, Controller, Data, HandlerDef, Metadata, Microservice, Outcome, Record, Reply,
    Request, RpcError, Streaming, controller,
};
use serde_json::{Value, json};

#[derive(Default)]
struct Shop {
    log: RefCell<Vec<String>>,
}

type ShopResult<T> = Result<T, RpcError>;

#[controller]
impl Shop {
    #[message_pattern("ready")]
    fn ready(&self, #[payload] numbers: Vec<i64>) -> i64 {
        numbers.iter().sum()
    }

    #[message_pattern("property")]
    fn property(&self, #[payload("a")] a: i64, #[payload("b")] b: Option<i64>) -> ShopResult<i64> {
        a.checked_div(b.unwrap_or(1)).ok_or_else(|| RpcError::message("cannot divide by zero"))
    }

    #[message_pattern("waits")]
    async fn waits(&self, Data(name): Data<String>, _metadata: Metadata) -> String {
        tokio::task::yield_now().await;
        format!("{name}!")
    }

    #[message_pattern("extracts")]
    fn extracts(&self, pattern: martlet::Pattern, #[payload] name: String) -> String {
        format!("{pattern} {name}")
    }

    #[message_pattern("unit")]
    fn unit(&self) -> Result<(), &'static str> {
        Err("never")?;
        Ok(())
    }

    #[message_pattern("record")]
    fn record(&self) -> Record<u8> {
        Record::new(1).header("k", "v")
    }

    #[message_pattern("reply")]
    async fn reply(&self) -> Reply {
        Reply::Empty
    }

    #[message_pattern("borrows")]
    fn borrows(&self, #[payload] to: u64) -> impl Stream<Item = String> {
        self.log.borrow_mut().push("borrowed".to_owned());
        stream::iter(0..to).then(async |n| {
            tokio::time::sleep(Duration::from_millis(1)).await;
            format!("{n} of {}", self.log.borrow().len())
        })
    }

    #[message_pattern("fails in the stream")]
    async fn fails_in_the_stream(&self) -> impl Stream<Item = Result<u8, &'static str>> + use<> {
        stream::iter([Ok(1), Err("stop"), Ok(2)])
    }

    #[message_pattern("fails before the stream")]
    async fn fails_before_the_stream(&self, #[payload] ok: bool) -> ShopResult<impl Stream<Item = u8>> {
        if ok { Ok(stream::iter([1, 2])) } else { Err(RpcError::message("no stream")) }
    }

    #[message_pattern("boxed")]
    fn boxed(&self) -> LocalBoxStream<'static, u8> {
        stream::iter([3, 4]).boxed_local()
    }

    #[message_pattern("streaming")]
    fn streaming(&self) -> Streaming<LocalBoxStream<'static, u8>> {
        Streaming(stream::iter([5, 6]).boxed_local())
    }

    /// Which handlers have to be waited for.
    #[message_pattern("late")]
    fn late(&self, request: Request) -> Vec<String> {
        let shop = Rc::new(Shop::default());
        let is_late = |def: &HandlerDef<Shop>| {
            def.info.pattern.route().as_str() != "late"
                && !matches!((def.endpoint)(&shop).call(request.clone()), Outcome::Ready(_))
        };
        let defs = Shop::handlers().into_iter().filter(is_late);
        defs.map(|def| def.info.name.to_string()).collect()
    }

    #[event_pattern("note")]
    fn note(&self, #[payload("text")] text: String) {
        self.log.borrow_mut().push(text);
    }

    #[message_pattern("log")]
    fn log(&self) -> Vec<String> {
        self.log.borrow().clone()
    }
}

async fn with_shop(check: impl AsyncFnOnce(&ClientProxy)) {
    let service = Microservice::new()
        .on_current_arbiter()
        .controller(Shop::default)
        .server(TcpServer::bind("127.0.0.1", 0))
        .start()
        .await
        .unwrap();
    let port = service.url().rsplit(':').next().unwrap().parse().unwrap();
    let client = TcpClient::connect_to("127.0.0.1", port);
    check(&client).await;
    client.close().await;
    service.stop(Duration::from_secs(5)).await;
}

async fn one(client: &ClientProxy, pattern: &str, data: Value) -> Result<Value, String> {
    client.send::<Value>(pattern, data).await.map_err(text)
}

async fn all(client: &ClientProxy, pattern: &str, data: Value) -> Result<Vec<Value>, String> {
    client.send::<Value>(pattern, data).stream().collect_all().await.map_err(text)
}

fn text(error: CallError) -> String {
    match error {
        CallError::Remote(remote) => remote.to_string(),
        other => panic!("not a remote error: {other}"),
    }
}

#[actix::test]
async fn arguments_are_read_and_values_are_answered() {
    with_shop(async |client| {
        assert_eq!(one(client, "ready", json!([1, 2, 3])).await, Ok(json!(6)));
        assert_eq!(one(client, "property", json!({ "a": 6, "b": 3 })).await, Ok(json!(2)));
        assert_eq!(one(client, "property", json!({ "a": 6 })).await, Ok(json!(6)));
        assert_eq!(one(client, "waits", json!("Ann")).await, Ok(json!("Ann!")));
        assert_eq!(one(client, "extracts", json!("Ann")).await, Ok(json!("extracts Ann")));
        assert_eq!(one(client, "record", json!(null)).await, Ok(json!(1)));
        assert_eq!(all(client, "reply", json!(null)).await, Ok(vec![]));
    })
    .await;
}

#[actix::test]
async fn a_method_that_need_not_wait_has_answered_when_it_is_called() {
    with_shop(async |client| {
        assert_eq!(one(client, "late", json!("Ann")).await, Ok(json!(["Shop::waits"])));
    })
    .await;
}

#[actix::test]
async fn errors_of_arguments_and_of_handlers_are_answered() {
    with_shop(async |client| {
        let zero = one(client, "property", json!({ "a": 6, "b": 0 })).await.unwrap_err();
        assert!(zero.contains("cannot divide by zero"), "{zero}");
        for (pattern, data) in [("ready", json!("text")), ("property", json!({ "a": "text" }))] {
            let bad = one(client, pattern, data).await.unwrap_err();
            assert!(bad.contains("Bad payload"), "{bad}");
        }
        let refused = one(client, "unit", json!(null)).await.unwrap_err();
        assert!(refused.contains("never"), "{refused}");
    })
    .await;
}

#[actix::test]
async fn a_stream_is_a_reply_per_item_and_may_borrow_its_controller() {
    with_shop(async |client| {
        let items = all(client, "borrows", json!(3)).await;
        assert_eq!(items, Ok(vec![json!("0 of 1"), json!("1 of 1"), json!("2 of 1")]));
        assert_eq!(all(client, "borrows", json!(0)).await, Ok(vec![]));
        assert_eq!(all(client, "boxed", json!(null)).await, Ok(vec![json!(3), json!(4)]));
        assert_eq!(all(client, "streaming", json!(null)).await, Ok(vec![json!(5), json!(6)]));
    })
    .await;
}

#[actix::test]
async fn an_error_ends_a_stream_or_comes_instead_of_it() {
    with_shop(async |client| {
        let mut items = client.send::<u8>("fails in the stream", json!(null)).stream();
        assert_eq!(items.next().await.unwrap().unwrap(), 1);
        let stop = text(items.next().await.unwrap().unwrap_err());
        assert!(stop.contains("stop"), "{stop}");
        assert!(items.next().await.is_none());
        let pattern = "fails before the stream";
        assert_eq!(all(client, pattern, json!(true)).await, Ok(vec![json!(1), json!(2)]));
        let none = all(client, pattern, json!(false)).await.unwrap_err();
        assert!(none.contains("no stream"), "{none}");
    })
    .await;
}

#[actix::test]
async fn an_event_reaches_its_method() {
    with_shop(async |client| {
        client.emit("note", json!({ "text": "heard" })).await.unwrap();
        let heard = async {
            while one(client, "log", json!(null)).await != Ok(json!(["heard"])) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), heard).await.unwrap();
    })
    .await;
}
