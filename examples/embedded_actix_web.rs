// SPDX-License-Identifier: MIT OR Apache-2.0
//! One process, two faces: an actix-web server whose endpoint calls a handler of the service beside it.
//!
//! ```text
//! $ cargo run --example embedded_actix_web
//! GET /sum/1/2: HTTP/1.1 200 OK 3
//! GET /sum/1/9223372036854775807: HTTP/1.1 502 Bad Gateway the sum is too large
//! 1. HTTP has stopped
//! 2. the client is closed
//! 3. the service has stopped: 2 requests answered, 0 abandoned
//! ```

use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use actix_web::{App, HttpResponse, HttpServer, get, web};
use martlet::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn sum(Data((a, b)): Data<(i64, i64)>) -> Result<i64, RpcError> {
    a.checked_add(b).ok_or_else(|| RpcError::message("the sum is too large"))
}

/// The client is a handle: cloned into every worker of actix-web, one connection behind it.
#[get("/sum/{a}/{b}")]
async fn get_sum(client: web::Data<ClientProxy>, numbers: web::Path<(i64, i64)>) -> HttpResponse {
    match client.send::<i64>("sum", numbers.into_inner()).await {
        Ok(sum) => HttpResponse::Ok().body(sum.to_string()),
        Err(CallError::Remote(error)) => {
            HttpResponse::BadGateway().body(error.message().unwrap_or_else(|| error.to_string()))
        }
        Err(error) => HttpResponse::ServiceUnavailable().body(error.to_string()),
    }
}

/// What a browser does, without one: the status line and the body.
async fn get(address: SocketAddr, path: &str) -> Result<(), Box<dyn Error>> {
    let mut socket = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut response = String::new();
    socket.read_to_string(&mut response).await?;
    let status = response.lines().next().unwrap_or_default();
    let body = response.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    println!("GET {path}: {status} {body}");
    Ok(())
}

#[actix_web::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // actix-web has its own workers, so the service does with the thread it is started on.
    let service = Microservice::new()
        .on_current_arbiter()
        .handlers(message("sum", sum))
        .server(TcpServer::bind("127.0.0.1", 0))
        .start()
        .await?;
    let client = Transport::from_url(&service.url())?.into_client()?;

    let data = web::Data::new(client.clone());
    let http = HttpServer::new(move || App::new().app_data(data.clone()).service(get_sum))
        .workers(2)
        // One owner of signals: this program, which says in which order things stop.
        .disable_signals()
        .bind(("127.0.0.1", 0))?;
    let address = http.addrs().first().copied().ok_or("HTTP is bound to nothing")?;
    let http = http.run();
    let http_handle = http.handle();
    let http = actix::spawn(http);

    get(address, "/sum/1/2").await?;
    get(address, &format!("/sum/1/{}", i64::MAX)).await?;

    // From the outside in: those who ask stop before those who answer.
    http_handle.stop(true).await;
    http.await??;
    println!("1. HTTP has stopped");
    client.close().await;
    println!("2. the client is closed");
    let report = service.stop(Duration::from_secs(5)).await;
    let (done, abandoned) = (report.done(), report.abandoned().count());
    println!("3. the service has stopped: {done} requests answered, {abandoned} abandoned");
    Ok(())
}
