// SPDX-License-Identifier: MIT OR Apache-2.0
//! The derive macros.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actix::prelude::*;
use martlet::supervise::{Child, ChildSpec};
use martlet::{EventBus, RpcError, Supervised};
use serde::Serialize;

const CODE: u32 = 409;

#[derive(Debug, thiserror::Error, RpcError)]
enum OrderError {
    #[error("order {0} is closed")]
    Closed(u32),
    #[error("no order {id}")]
    #[rpc(code = "NOT_FOUND")]
    Missing { id: u32 },
    #[error("taken")]
    #[rpc(code = CODE)]
    Taken,
    #[error("the password is hunter2")]
    #[rpc(unexpected)]
    Database(#[from] std::io::Error),
}

#[derive(Debug, Serialize, thiserror::Error, RpcError)]
#[serde(tag = "kind", rename_all = "camelCase")]
#[rpc(json)]
enum JsonError {
    #[error("too large")]
    TooLarge { limit: u32 },
    #[error("plain")]
    #[rpc(code = 1)]
    Plain,
}

#[derive(Debug, Serialize, thiserror::Error, RpcError)]
#[error("of {limit}")]
#[rpc(json)]
struct JsonStruct<T: Serialize> {
    limit: T,
}

#[derive(Debug, thiserror::Error, RpcError)]
enum Never {}

fn wire(error: impl Into<RpcError>) -> String {
    error.into().to_json()
}

#[test]
fn an_error_crosses_the_wire_as_its_attribute_says() {
    assert_eq!(wire(OrderError::Closed(7)), r#"{"status":"error","message":"order 7 is closed"}"#);
    assert_eq!(
        wire(OrderError::Missing { id: 7 }),
        r#"{"status":"error","message":"no order 7","code":"NOT_FOUND"}"#
    );
    assert_eq!(wire(OrderError::Taken), r#"{"status":"error","message":"taken","code":409}"#);
    assert_eq!(wire(JsonError::TooLarge { limit: 3 }), r#"{"kind":"tooLarge","limit":3}"#);
    assert_eq!(wire(JsonError::Plain), r#"{"status":"error","message":"plain","code":1}"#);
    assert_eq!(wire(JsonStruct { limit: [1, 2] }), r#"{"limit":[1,2]}"#);
    let _: fn(Never) -> RpcError = RpcError::from;
}

#[test]
fn an_unexpected_error_keeps_its_text_from_callers_and_its_source_for_us() {
    let error = RpcError::from(OrderError::from(std::io::Error::other("disk")));
    assert_eq!(error.to_json(), r#"{"status":"error","message":"Internal server error"}"#);
    assert!(error.is_unexpected());
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "the password is hunter2");
}

#[derive(Supervised)]
struct Counter {
    built: u64,
    seen: u64,
}

impl Actor for Counter {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "(u64, u64)")]
struct Count;

#[derive(Message)]
#[rtype(result = "()")]
struct Fail;

impl Handler<Count> for Counter {
    type Result = MessageResult<Count>;
    fn handle(&mut self, _: Count, _: &mut Self::Context) -> Self::Result {
        self.seen += 1;
        MessageResult((self.built, self.seen))
    }
}

impl Handler<Fail> for Counter {
    type Result = ();
    fn handle(&mut self, _: Fail, _: &mut Self::Context) {
        panic!("as asked");
    }
}

#[actix::test]
async fn a_derived_supervised_actor_restarts_with_a_fresh_state() {
    let builds = Arc::new(AtomicU64::new(0));
    let spec = ChildSpec::new(move || Counter { built: builds.fetch_add(1, Ordering::Relaxed) + 1, seen: 0 });
    let address = spec.start(Child::root("counter", "actor"), EventBus::default(), |_| {});
    assert_eq!(address.send(Count).await.unwrap(), (1, 1));
    assert_eq!(address.send(Count).await.unwrap(), (1, 2));
    assert!(address.send(Fail).await.is_err());
    let counted = tokio::time::timeout(Duration::from_secs(5), address.send(Count)).await.unwrap();
    assert_eq!(counted.unwrap(), (2, 1));
}
