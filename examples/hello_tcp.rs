// SPDX-License-Identifier: MIT OR Apache-2.0
//! A service and a client in one program: the README's first example.
//!
//! ```text
//! $ cargo run --example hello_tcp
//! 1 + 2 + 3 = 6
//! stopped: 1 request answered, 0 abandoned
//! ```

use std::error::Error;
use std::time::Duration;

use martlet::tcp::{TcpClient, TcpServer};
use martlet::{Data, Microservice, RpcError, message, pattern};

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let cmd = pattern!({ "cmd": "sum" });
    let sum = message(cmd.clone(), |Data(numbers): Data<Vec<i64>>| async move {
        Ok::<_, RpcError>(numbers.iter().sum::<i64>())
    });
    let service = Microservice::new().handlers(sum).server(TcpServer::bind("127.0.0.1", 0)).start().await?;

    let port = service.url().rsplit(':').next().unwrap_or_default().parse()?;
    let client = TcpClient::connect_to("127.0.0.1", port);
    let total: i64 = client.send(cmd, [1, 2, 3]).await?;
    println!("1 + 2 + 3 = {total}");

    client.close().await;
    let report = service.stop(Duration::from_secs(5)).await;
    println!("stopped: {} request answered, {} abandoned", report.done(), report.abandoned().count());
    Ok(())
}
