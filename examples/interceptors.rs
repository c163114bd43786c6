// SPDX-License-Identifier: MIT OR Apache-2.0
//! Code around handlers: what NestJS calls guards, pipes, filters and interceptors, and the order in which they run.
//!
//! ```text
//! $ cargo run --example interceptors
//! +service +group handler -group -service
//! a stranger: Forbidden resource
//! trimmed by the pipe: hello ada
//! refused by the pipe: a name, please
//! mapped by the filter: try again later (the table is locked)
//! too slow: Timeout: no result within 50ms
//!  INFO rpc{otel.kind="server" rpc.system="nestjs" rpc.method=traced network.transport=tcp}: inside of the span
//! ```

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::LocalBoxFuture;
use martlet::interceptor::{Next, catch_and_map, guard, pipe, timeout, trace_span};
use martlet::prelude::*;
use martlet::{HandlerResult, Interceptor, Payload, Request};

/// What ran, in order.
#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Log {
    fn add(&self, line: impl Into<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line.into());
    }

    fn take(&self) -> String {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).join(" ")
    }
}

/// An interceptor by hand: before, then everything further in, then after.
struct Mark(&'static str);

impl Interceptor for Mark {
    fn intercept<'a>(&'a self, request: Request, next: Next<'a>) -> LocalBoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            let log = request.state::<Log>();
            if let Some(log) = &log {
                log.add(format!("+{}", self.0));
            }
            let result = next.run(request).await;
            if let Some(log) = &log {
                log.add(format!("-{}", self.0));
            }
            result
        })
    }
}

/// A guard decides: `Ok(false)` is NestJS's "Forbidden resource", an error is answered as it is.
fn knows_the_word() -> Arc<dyn Interceptor> {
    guard(|request: Request| async move { Ok(request.metadata().get("word") == Some("sesame")) })
}

/// A pipe validates and changes what the handler will read.
fn trimmed() -> Arc<dyn Interceptor> {
    pipe(|request: &mut Request| {
        let name: String = request.data()?;
        match name.trim() {
            "" => Err(RpcError::message("a name, please")),
            name => {
                let trimmed = Payload::encode(request.format(), name)?;
                request.set_payload(trimmed);
                Ok(())
            }
        }
    })
}

/// A filter maps errors: to others, or to a value.
fn polite() -> Arc<dyn Interceptor> {
    catch_and_map(|error| Err(RpcError::message(format!("try again later ({error})"))))
}

fn handlers() -> Vec<HandlerGroup> {
    let hello = async |Data(name): Data<String>| Ok::<_, RpcError>(format!("hello {name}"));
    vec![
        message("ordered", async |log: State<Log>| {
            log.add("handler");
            Ok::<_, RpcError>(())
        })
        .interceptor(Arc::new(Mark("group"))),
        message("guarded", hello).interceptor(knows_the_word()),
        message("piped", hello).interceptor(trimmed()),
        message("filtered", async || Err::<(), _>(RpcError::message("the table is locked")))
            .interceptor(polite()),
        message("slow", async || {
            std::future::pending::<()>().await;
            Ok::<_, RpcError>(())
        })
        .interceptor(timeout(Duration::from_millis(50))),
        message("traced", async || {
            tracing::info!("inside of the span");
            Ok::<_, RpcError>(())
        })
        .interceptor(trace_span()),
    ]
}

/// The text of the error that a handler answers.
async fn refusal(call: martlet::Call<String>) -> Result<String, Box<dyn Error>> {
    match call.await {
        Err(CallError::Remote(error)) => Ok(error.message().unwrap_or_default()),
        Err(other) => Err(other.into()),
        Ok(value) => Err(format!("an error expected, got {value}").into()),
    }
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().without_time().with_target(false).with_ansi(false).init();

    let service =
        Microservice::new().on_current_arbiter().state(Log::default()).interceptor(Arc::new(Mark("service")));
    let service = handlers().into_iter().fold(service, Microservice::handlers);
    let service = service
        .handlers(message("log", async |log: State<Log>| Ok::<_, RpcError>(log.take())))
        .server(TcpServer::bind("127.0.0.1", 0))
        .start()
        .await?;
    let client = Transport::from_url(&service.url())?.into_client()?;

    client.send::<()>("ordered", ()).await?;
    let log: String = client.send("log", ()).await?;
    println!("{}", log.trim_end_matches(" +service"));

    println!("a stranger: {}", refusal(client.send("guarded", "eve")).await?);
    client.send::<String>("guarded", "ada").metadata("word", "sesame").await?;
    println!("trimmed by the pipe: {}", client.send::<String>("piped", "  ada ").await?);
    println!("refused by the pipe: {}", refusal(client.send("piped", "   ")).await?);
    println!("mapped by the filter: {}", refusal(client.send("filtered", ())).await?);
    println!("too slow: {}", refusal(client.send("slow", ())).await?);
    client.send::<()>("traced", ()).await?;

    client.close().await;
    service.stop(Duration::from_secs(5)).await;
    Ok(())
}
