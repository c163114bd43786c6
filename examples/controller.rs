// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handlers as the methods of a controller, in the words of NestJS.
//!
//! ```text
//! $ cargo run --example controller
//! 1 + 2 + 3 = 6
//! 7 / 2 = 3.5
//! 7 / 0 = {"status":"error","message":"cannot divide 7 by zero","code":"DIVISION_BY_ZERO"}
//! 3 calculations
//! 0 calculations
//! ```

use std::cell::Cell;
use std::error::Error;
use std::time::Duration;

use martlet::pattern;
use martlet::prelude::*;

/// How it crosses the wire is said here, once: `?` and `Result<_, MathError>` work in every handler.
#[derive(Debug, thiserror::Error, RpcError)]
enum MathError {
    #[error("cannot divide {0} by zero")]
    #[rpc(code = "DIVISION_BY_ZERO")]
    DivisionByZero(f64),
}

/// Built once per arbiter by the factory it is registered with, and again after a panic. Its handlers run
/// concurrently on that one thread, so what changes lives in cells; nothing needs a lock.
#[derive(Default)]
struct Math {
    calculations: Cell<u64>,
}

#[controller]
impl Math {
    #[message_pattern({ "cmd": "sum" })]
    fn sum(&self, #[payload] numbers: Vec<f64>) -> f64 {
        self.count();
        numbers.iter().sum()
    }

    /// Reads two members of the payload, as `@Payload('a')` does.
    #[message_pattern({ "cmd": "divide" })]
    async fn divide(&self, #[payload("a")] a: f64, #[payload("b")] b: f64) -> Result<f64, MathError> {
        self.count();
        if b == 0.0 { Err(MathError::DivisionByZero(a)) } else { Ok(a / b) }
    }

    #[message_pattern("calculations")]
    fn calculations(&self) -> u64 {
        self.calculations.get()
    }

    #[event_pattern("reset")]
    fn reset(&self) {
        self.calculations.set(0);
    }

    /// Not a handler.
    fn count(&self) {
        self.calculations.set(self.calculations.get() + 1);
    }
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let service =
        Microservice::new().controller(Math::default).server(TcpServer::bind("127.0.0.1", 0)).start().await?;
    let client = Transport::from_url(&service.url())?.into_client()?;

    let sum: f64 = client.send(pattern!({ "cmd": "sum" }), [1, 2, 3]).await?;
    println!("1 + 2 + 3 = {sum}");

    for b in [2, 0] {
        let operands = serde_json::json!({ "a": 7, "b": b });
        match client.send::<f64>(pattern!({ "cmd": "divide" }), operands).await {
            Ok(quotient) => println!("7 / {b} = {quotient}"),
            Err(CallError::Remote(error)) => {
                println!("7 / {b} = {}", String::from_utf8_lossy(error.payload().bytes()));
            }
            Err(other) => return Err(other.into()),
        }
    }

    println!("{} calculations", client.send::<u64>("calculations", ()).await?);
    client.emit("reset", ()).await?;
    println!("{} calculations", client.send::<u64>("calculations", ()).await?);

    client.close().await;
    service.stop(Duration::from_secs(5)).await;
    Ok(())
}
