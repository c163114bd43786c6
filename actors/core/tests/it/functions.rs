// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers from functions: every kind of function, called.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::{self, LocalBoxStream, Stream};
use martlet_core::{
    CallError, ClientProxy, Data, HandlerGroup, Metadata, Microservice, Pattern, Record, RpcError, Streaming,
    TryStreaming, event, message,
};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryServer};
use serde_json::{Value, json};

use crate::support::{eventually, log, ms, ok, real};

/// An error that is a value too: of a stream of results with it, nobody can tell which is meant.
#[derive(Debug, serde::Serialize)]
struct Both;

impl From<Both> for RpcError {
    fn from(_: Both) -> Self {
        Self::message("both")
    }
}

async fn with(groups: Vec<HandlerGroup>, test: impl AsyncFnOnce(&ClientProxy)) {
    let network = MemoryNetwork::new();
    let mut service = Microservice::new().on_current_arbiter().server(MemoryServer::new(&network));
    for group in groups {
        service = service.handlers(group);
    }
    let service = service.start().await.unwrap();
    let client = MemoryClient::new(&network);
    test(&client).await;
    assert_eq!(client.occupied(), 0);
    client.close().await;
    let report = service.stop(ms(1000)).await;
    assert!(report.clean, "{report:?}");
}

/// The values of a call, and the message of the error that ends it.
async fn call(client: &ClientProxy, pattern: &str, data: Value) -> (Vec<Value>, Option<String>) {
    let mut replies = client.send::<Value>(Pattern::from(pattern), data).stream();
    let mut values = Vec::new();
    while let Some(reply) = replies.next().await {
        match reply {
            Ok(value) => values.push(value),
            Err(CallError::Remote(error)) => return (values, error.message()),
            Err(other) => panic!("{pattern}: {other:?}"),
        }
    }
    (values, None)
}

fn half(Data(number): Data<i64>) -> Result<i64, RpcError> {
    if number % 2 == 0 { Ok(number / 2) } else { Err(RpcError::message("odd")) }
}

fn count(Data(to): Data<u64>) -> impl Stream<Item = u64> {
    stream::iter(1..=to)
}

fn count_until(Data(to): Data<u64>) -> impl Stream<Item = Result<u64, RpcError>> {
    stream::iter(1..=to).map(|number| if number < 3 { Ok(number) } else { Err(RpcError::message("three")) })
}

fn count_if(Data(to): Data<u64>) -> Result<impl Stream<Item = u64>, RpcError> {
    if to < 10 { Ok(stream::iter(1..=to)) } else { Err("too far".into()) }
}

async fn count_later(Data(to): Data<u64>) -> impl Stream<Item = u64> {
    tokio::task::yield_now().await;
    stream::iter(1..=to)
}

async fn count_if_later(Data(to): Data<u64>) -> Result<LocalBoxStream<'static, Result<u64, Both>>, String> {
    tokio::task::yield_now().await;
    if to == 0 {
        return Err("nothing".to_owned());
    }
    Ok(stream::iter((1..=to).map(|number| if number < 3 { Ok(number) } else { Err(Both) })).boxed_local())
}

fn boxed(Data(number): Data<u64>) -> BoxFuture<'static, Result<u64, RpcError>> {
    Box::pin(async move { Ok(number) })
}

#[test]
fn a_sync_function_is_a_handler() {
    real(async {
        let many = |_: Data<u8>, metadata: Metadata, Data(value): Data<Value>, _: Pattern| {
            ok(json!([metadata.get("k").is_some(), value]))
        };
        let groups = vec![
            message("half", half),
            message("many", many),
            message("nothing", || ()),
            message("none", || ok(())),
            message("record", |Data(value): Data<Value>| ok(Record::new(value))),
            message("serializable error", || Err::<u64, Both>(Both)),
            message("panics", |Data(number): Data<u64>| {
                assert!(number != 1, "deliberate panic");
                ok(number)
            }),
        ];
        with(groups, async |client| {
            assert_eq!(call(client, "half", json!(8)).await, (vec![json!(4)], None));
            assert_eq!(call(client, "half", json!(7)).await, (vec![], Some("odd".to_owned())));
            assert_eq!(call(client, "many", json!(1)).await, (vec![json!([false, 1])], None));
            assert_eq!(call(client, "nothing", json!(1)).await, (vec![], None));
            assert_eq!(call(client, "none", json!(1)).await, (vec![], None));
            assert_eq!(call(client, "record", json!("r")).await, (vec![json!("r")], None));
            assert_eq!(call(client, "serializable error", json!(1)).await, (vec![], Some("both".to_owned())));
            let internal = Some("Internal server error".to_owned());
            assert_eq!(call(client, "panics", json!(1)).await, (vec![], internal));
            assert_eq!(call(client, "panics", json!(2)).await, (vec![json!(2)], None));
            let (values, error) = call(client, "half", json!("text")).await;
            assert!(values.is_empty() && error.unwrap().starts_with("Bad payload"));
        })
        .await;
    });
}

#[test]
fn a_function_that_returns_a_stream_is_a_handler() {
    real(async {
        let groups = vec![
            message("count", count),
            message("until", count_until),
            message("if", count_if),
            message("later", count_later),
            // Its items' error is a value too, so the function says which is meant.
            message("if later", async |data: Data<u64>| count_if_later(data).await.map(TryStreaming)),
            message("closure", |Data(to): Data<u64>| stream::iter(0..to)),
            message("wrapped", |Data(to): Data<u64>| Streaming(stream::iter(0..to))),
            message("wrapped later", async |Data(to): Data<u64>| Streaming(stream::iter(0..to))),
            message("results", || TryStreaming(stream::iter([Ok(1), Err("no".to_owned())]))),
        ];
        let numbers = |numbers: &[u64]| numbers.iter().map(|number| json!(number)).collect::<Vec<_>>();
        with(groups, async |client| {
            assert_eq!(call(client, "count", json!(3)).await, (numbers(&[1, 2, 3]), None));
            assert_eq!(call(client, "count", json!(0)).await, (vec![], None));
            let three = Some("three".to_owned());
            assert_eq!(call(client, "until", json!(5)).await, (numbers(&[1, 2]), three));
            assert_eq!(call(client, "if", json!(2)).await, (numbers(&[1, 2]), None));
            assert_eq!(call(client, "if", json!(10)).await, (vec![], Some("too far".to_owned())));
            assert_eq!(call(client, "later", json!(2)).await, (numbers(&[1, 2]), None));
            let both = Some("both".to_owned());
            assert_eq!(call(client, "if later", json!(4)).await, (numbers(&[1, 2]), both));
            assert_eq!(call(client, "if later", json!(0)).await, (vec![], Some("nothing".to_owned())));
            assert_eq!(call(client, "closure", json!(2)).await, (numbers(&[0, 1]), None));
            assert_eq!(call(client, "wrapped", json!(2)).await, (numbers(&[0, 1]), None));
            assert_eq!(call(client, "wrapped later", json!(2)).await, (numbers(&[0, 1]), None));
            assert_eq!(call(client, "results", json!(0)).await, (numbers(&[1]), Some("no".to_owned())));
        })
        .await;
    });
}

#[test]
fn async_functions_are_handlers_in_each_of_their_forms() {
    real(async {
        async fn named(Data(number): Data<u64>) -> Result<u64, RpcError> {
            Ok(number)
        }
        async fn nothing(_: Data<u64>) {}
        let groups = vec![
            message("named", named),
            message("block", |Data(number): Data<u64>| async move { ok(number) }),
            message("closure", async |Data(number): Data<u64>| ok(number)),
            message("boxed", boxed),
            message("nothing", nothing),
        ];
        with(groups, async |client| {
            for pattern in ["named", "block", "closure", "boxed"] {
                assert_eq!(call(client, pattern, json!(5)).await, (vec![json!(5)], None), "{pattern}");
            }
            assert_eq!(call(client, "nothing", json!(5)).await, (vec![], None));
        })
        .await;
    });
}

#[test]
fn events_are_handled_by_functions_of_every_kind() {
    real(async {
        let network = MemoryNetwork::new();
        let seen: [Arc<AtomicU64>; 4] = Default::default();
        let add = |at: usize| {
            let count = Arc::clone(&seen[at]);
            move |number: u64| {
                count.fetch_add(number, Ordering::Relaxed);
            }
        };
        let (sync, later, items, fails) = (add(0), add(1), add(2), add(3));
        let service = Microservice::new()
            .on_current_arbiter()
            .handlers(event("evt", move |Data(number): Data<u64>| sync(number)))
            .handlers(event("evt", move |Data(number): Data<u64>| {
                later(number);
                async { ok(()) }
            }))
            // A stream is read to its end.
            .handlers(event("evt", move |Data(number): Data<u64>| {
                let items = items.clone();
                stream::iter(0..number).inspect(move |_| items(1))
            }))
            .handlers(event("evt", move |Data(number): Data<u64>| {
                fails(number);
                Err::<(), _>(RpcError::unexpected("reported"))
            }))
            .server(MemoryServer::new(&network))
            .start()
            .await
            .unwrap();
        let log = log(service.events());
        let client = MemoryClient::new(&network);
        client.emit("evt", 5).await.unwrap();
        client.emit("evt", 2).await.unwrap();
        eventually("all have run", || seen.iter().all(|count| count.load(Ordering::Relaxed) == 7)).await;
        eventually("the errors are reported", || {
            log.lock().iter().filter(|text| text.contains("reported")).count() == 2
        })
        .await;
        client.close().await;
        service.stop(ms(1000)).await;
    });
}
