// SPDX-License-Identifier: MIT OR Apache-2.0
//! Interceptors: their order, and the ready-made ones.

use std::sync::Arc;
use std::time::Duration;

use futures::future::LocalBoxFuture;
use futures::stream;
use martlet_core::interceptor::{catch_and_map, concurrency_limit, guard, pipe, timeout};
use martlet_core::{
    Data, HandlerResult, Interceptor, Next, Payload, Reply, Request, RpcError, TryStreaming, message,
};
use parking_lot::Mutex;

use super::{Harness, Names, Stage, ok, small};

type Log = Arc<Mutex<Vec<String>>>;

struct Mark(&'static str, Log);

impl Interceptor for Mark {
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            self.1.lock().push(format!("+{}", self.0));
            let result = next.run(request).await;
            self.1.lock().push(format!("-{}", self.0));
            result
        })
    }
}

/// Server's own, then the service's, then the group's; inside out on the way back.
pub async fn interceptors_run_from_global_to_handler<H: Harness>(mut harness: H) {
    let names = Names::new();
    let log = Log::default();
    let mark = |name| Arc::new(Mark(name, Arc::clone(&log))) as Arc<dyn Interceptor>;
    let inside = Arc::clone(&log);
    let group = message(names.of("run"), move || {
        inside.lock().push("handler".to_owned());
        async { ok(1) }
    });
    let server = harness.server(Default::default()).interceptor(mark("server"));
    let service = small()
        .interceptor(mark("first"))
        .interceptor(mark("second"))
        .handlers(group.interceptor(mark("group")))
        .server(server)
        .start()
        .await
        .unwrap();
    let options = harness.client_options();
    let client = harness.client(&service.url(), options);
    client.send::<u64>(names.of("run"), 1).await.unwrap();
    let expected =
        ["+server", "+first", "+second", "+group", "handler", "-group", "-second", "-first", "-server"];
    assert_eq!(*log.lock(), expected);
    client.close().await;
    service.stop(Duration::from_secs(5)).await;
}

fn text(error: martlet_core::CallError) -> String {
    error.remote().unwrap_or_else(|| panic!("a remote error expected: {error}")).message().unwrap()
}

/// `Ok(false)` is NestJS's `Forbidden resource`; an error is answered as it is; the handler does not run.
pub async fn a_guard_refuses<H: Harness>(harness: H) {
    let names = Names::new();
    let check = guard(|request: Request| async move {
        match request.data::<String>().unwrap_or_default().as_str() {
            "friend" => Ok(true),
            "broken" => Err(RpcError::message("no idea")),
            _ => Ok(false),
        }
    });
    let group = message(names.of("secret"), || async { ok("secret") }).interceptor(check);
    let stage = Stage::new(harness, small().handlers(group)).await;
    let call = |who: &'static str| stage.client.send::<String>(names.of("secret"), who);
    assert_eq!(call("friend").await.unwrap(), "secret");
    assert_eq!(text(call("stranger").await.unwrap_err()), "Forbidden resource");
    assert_eq!(text(call("broken").await.unwrap_err()), "no idea");
    stage.end().await;
}

/// A pipe changes or refuses the payload before the handler reads it.
pub async fn a_pipe_changes_the_payload<H: Harness>(harness: H) {
    let names = Names::new();
    let double = pipe(|request: &mut Request| {
        let number: i64 = request.data().map_err(|_| RpcError::message("a number, please"))?;
        request.set_payload(Payload::encode(request.format(), &(number * 2))?);
        Ok(())
    });
    let group = message(names.of("echo"), |Data(number): Data<i64>| async move { ok(number) });
    let stage = Stage::new(harness, small().handlers(group.interceptor(double))).await;
    assert_eq!(stage.client.send::<i64>(names.of("echo"), 21).await.unwrap(), 42);
    let refused = stage.client.send::<i64>(names.of("echo"), "x").await.unwrap_err();
    assert_eq!(text(refused), "a number, please");
    stage.end().await;
}

/// A filter makes another error, or a value, of an error; also of one inside a stream.
pub async fn a_filter_maps_errors<H: Harness>(harness: H) {
    let names = Names::new();
    let map = || {
        catch_and_map(|error: RpcError| match error.to_string().as_str() {
            "rescue" => Ok(Reply::Value(Payload::encode(martlet_core::Format::Json, "rescued")?)),
            other => Err(RpcError::message(format!("mapped {other}"))),
        })
    };
    let fail =
        message(
            names.of("fail"),
            |Data(text): Data<String>| async move { Err::<(), _>(RpcError::message(text)) },
        );
    let stream = message(names.of("stream"), || async {
        ok(TryStreaming(stream::iter([Ok("item"), Err(RpcError::message("inside"))])))
    });
    let stage =
        Stage::new(harness, small().handlers(fail.interceptor(map())).handlers(stream.interceptor(map())))
            .await;
    let failed = stage.client.send::<String>(names.of("fail"), "boom").await.unwrap_err();
    assert_eq!(text(failed), "mapped boom");
    if stage.harness.features().format == martlet_core::Format::Json {
        assert_eq!(stage.client.send::<String>(names.of("fail"), "rescue").await.unwrap(), "rescued");
    }
    let failed = stage.client.send::<String>(names.of("stream"), 1).stream().collect_all().await.unwrap_err();
    assert_eq!(text(failed), "mapped inside");
    stage.end().await;
}

/// The ready-made timeout drops a slow handler; the ready-made limit refuses one too many.
pub async fn a_timeout_and_a_concurrency_limit_answer_errors<H: Harness>(harness: H) {
    let names = Names::new();
    let sleeper = || {
        |Data(millis): Data<u64>| async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            ok(millis)
        }
    };
    let service = small()
        .handlers(message(names.of("hasty"), sleeper()).interceptor(timeout(Duration::from_millis(100))))
        .handlers(message(names.of("narrow"), sleeper()).interceptor(concurrency_limit(2)));
    let stage = Stage::new(harness, service).await;
    assert_eq!(stage.client.send::<u64>(names.of("hasty"), 1).await.unwrap(), 1);
    let late = stage.client.send::<u64>(names.of("hasty"), 60_000).await.unwrap_err();
    assert!(late.remote().is_some(), "{late}");
    let calls = (0..5).map(|_| stage.client.send::<u64>(names.of("narrow"), 200));
    let results = futures::future::join_all(calls).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 2);
    for refused in results.into_iter().filter_map(Result::err) {
        assert_eq!(text(refused), "Too many requests");
    }
    assert_eq!(stage.client.send::<u64>(names.of("narrow"), 1).await.unwrap(), 1, "places are given back");
    stage.end().await;
}
