// SPDX-License-Identifier: MIT OR Apache-2.0
//! Baseline of the TCP server: one thread, one task per connection, nothing between socket and sum.
//!
//! Each round reads what there is, answers every whole frame into one buffer and writes it once.

use std::sync::Arc;

use clap::Parser;
use martlet_bench::service::Service;
use martlet_bench::{Result, frame, process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Serve sums over TCP with a hand-written loop.
#[derive(Parser)]
struct Options {
    /// Port to listen on, 0 for any.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Routes to register.
    #[arg(long, default_value_t = 10)]
    routes: u32,
}

fn main() -> Result<()> {
    let options = Options::parse();
    process::on_one_thread(async {
        tokio::select! {
            ended = listen(options) => ended,
            ended = process::terminated() => ended,
        }
    })
}

async fn listen(options: Options) -> Result<()> {
    let service = Arc::new(Service::new(options.routes));
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], options.port).into())?;
    let listener = socket.listen(4096)?;
    process::say_ready(&listener.local_addr()?.port().to_string())?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let service = service.clone();
        // A peer that breaks the protocol or goes away costs its connection, as with NestJS.
        tokio::spawn(async move { serve(stream, &service).await });
    }
}

async fn serve(mut stream: TcpStream, service: &Service) -> Result<()> {
    let mut input = Vec::with_capacity(16 * 1024);
    let mut output = Vec::new();
    let mut reply = Vec::new();
    while stream.read_buf(&mut input).await? > 0 {
        let mut rest = input.as_slice();
        while let Some(packet) = frame::next(&mut rest)? {
            reply.clear();
            service.answer(packet, &mut reply)?;
            if !reply.is_empty() {
                frame::push(&mut output, &reply);
            }
        }
        let used = input.len() - rest.len();
        input.drain(..used);
        if !output.is_empty() {
            stream.write_all(&output).await?;
            output.clear();
        }
    }
    Ok(())
}
