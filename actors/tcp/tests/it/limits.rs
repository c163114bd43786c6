// SPDX-License-Identifier: MIT OR Apache-2.0

//! Options and bounds: each holds, and each is reported when it is hit.

use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::{CallError, SessionErrorKind, StartError};
use martlet_tcp::{TcpClient, TcpClientOptions, TcpListening, TcpServerOptions};
use martlet_testkit::broker::free_port;
use tokio::io::AsyncWriteExt;

use crate::support::{Service, frame, sum, within};

#[actix::test]
async fn port_zero_takes_a_free_port_and_says_so() {
    let service = Service::with(|_| {}).await;
    assert_ne!(service.port(), 0);
    assert_eq!(service.running.url(), format!("tcp://127.0.0.1:{}", service.port()));
    let server = &service.running.servers()[0];
    let listening = server.unwrap::<TcpListening>().unwrap();
    assert_eq!(listening.addresses, [format!("127.0.0.1:{}", service.port()).parse().unwrap()]);
    let sockets = listening.listeners();
    assert_eq!(
        sockets.iter().map(|socket| socket.local_addr().unwrap()).collect::<Vec<_>>(),
        listening.addresses
    );
    drop(sockets);
    service.stop().await;
    assert!(listening.listeners().is_empty());
}

#[actix::test]
async fn ipv6() {
    let service = Service::with(|it| it.host = "::1".to_owned()).await;
    assert_eq!(service.running.url(), format!("tcp://[::1]:{}", service.port()));
    let client = TcpClient::connect_to("::1", service.port());
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop().await;
}

#[actix::test]
async fn localhost_is_every_address_it_stands_for() {
    let service = Service::with(|it| it.host = "localhost".to_owned()).await;
    let server = &service.running.servers()[0];
    let addresses = &server.unwrap::<TcpListening>().unwrap().addresses;
    let resolved: std::collections::BTreeSet<_> =
        tokio::net::lookup_host(("localhost", service.port())).await.unwrap().collect();
    assert_eq!(addresses.iter().copied().collect::<std::collections::BTreeSet<_>>(), resolved);
    for address in addresses {
        let client = TcpClient::connect_to(address.ip().to_string(), service.port());
        assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3, "{address}");
        client.close().await;
    }
    let client = TcpClient::connect_to("localhost", service.port());
    assert_eq!(client.send::<i64>("sum", [1, 2]).await.unwrap(), 3);
    client.close().await;
    service.stop().await;
}

/// With Nagle's algorithm on, a reply in two writes waits for the peer's delayed acknowledgement, 40 ms.
#[actix::test]
async fn small_packets_go_out_at_once() {
    let service = Service::with(|_| {}).await;
    let client = TcpClient::connect_to("127.0.0.1", service.port());
    client.connect().await.unwrap();
    let mut quickest = Duration::MAX;
    for _ in 0..50 {
        let started = Instant::now();
        let items: Vec<_> = client.send::<u64>("infinite", 1).stream().take(2).collect().await;
        assert!(items.into_iter().map(Result::unwrap).eq(0..2));
        quickest = quickest.min(started.elapsed());
    }
    // Two items are 10 ms apart by themselves; with Nagle each round takes 40 ms more.
    assert!(quickest < Duration::from_millis(40), "{quickest:?}");
    client.close().await;
    service.stop().await;
}

#[actix::test]
async fn a_port_in_use_is_a_clear_error() {
    let port = free_port().unwrap();
    let service = Service::with(|it| it.port = port).await;
    let again = Service::try_start(TcpServerOptions::new().address("127.0.0.1", port)).await;
    let Err(StartError::Transport { transport, cause }) = again else { panic!("it started") };
    assert_eq!((&*transport, cause.kind()), ("tcp", SessionErrorKind::Fatal));
    let told = format!(
        "address in use: 127.0.0.1:{port} (EADDRINUSE): another program listens there; take another port"
    );
    assert_eq!(cause.to_string(), told);
    service.stop().await;
    // The port is free at once.
    let again = Service::try_start(TcpServerOptions::new().address("127.0.0.1", port)).await.unwrap();
    again.serves_others().await;
    again.stop().await;
}

#[actix::test]
async fn a_host_that_does_not_exist_is_a_clear_error() {
    let started = Service::try_start(TcpServerOptions::new().address("no.such.host.invalid", 0)).await;
    let Err(error) = started else { panic!("it started") };
    let text = error.to_string();
    assert!(text.contains(r#"host "no.such.host.invalid" cannot be resolved"#), "{text}");
    let client = TcpClient::connect_to("no.such.host.invalid", 1);
    let error = client.send::<i64>("sum", [1]).await.unwrap_err();
    assert!(matches!(&error, CallError::NotSent { .. }), "{error}");
    assert!(error.to_string().contains("no.such.host.invalid:1"), "{error}");
    client.close().await;
}

#[actix::test]
async fn max_buffer_size() {
    let service = Service::with(|it| it.max_buffer_size = 100).await;
    // 86 units and 3 of prefix are within it; emoji count two each.
    for data in ["x".repeat(50), "😀".repeat(25)] {
        let mut raw = service.raw().await;
        raw.send(&frame(&format!(r#"{{"pattern":"echo","data":"{data}","id":"a"}}"#))).await;
        assert_eq!(raw.frame().await, format!(r#"{{"response":"{data}","isDisposed":true,"id":"a"}}"#));
        // Frames in one segment are counted one by one.
        raw.send(&sum("b", &[1]).repeat(10)).await;
        for _ in 0..10 {
            assert_eq!(raw.frame().await, r#"{"response":1,"isDisposed":true,"id":"b"}"#);
        }
    }
    let mut raw = service.raw().await;
    raw.send(&frame(&format!(r#"{{"pattern":"echo","data":"{}","id":"a"}}"#, "x".repeat(80)))).await;
    assert_eq!(raw.rest().await, "");
    service.reports(&["bad_input", "The invalid received message from tcp server", "100"]).await;
    // The declared length alone is enough.
    let mut raw = service.raw().await;
    raw.send("999999999#{").await;
    assert_eq!(raw.rest().await, "");
    service.reports(&["bad_input", "1000000009", "100"]).await;
    service.stop().await;
}

#[actix::test]
async fn max_send_buffer_size() {
    let service = Service::with(|it| it.max_send_buffer_size = 1_000_000).await;
    let mut raw = service.raw().await;
    // Above the kernel's buffers and the bound together.
    raw.send(&frame(r#"{"pattern":"big","data":20000000,"id":"a"}"#)).await;
    service.reports(&["session", "maxSendBufferSize", "1000000"]).await;
    let received = raw.rest().await;
    assert!(received.len() < 20_000_000);
    service.serves_others().await;
    service.stop().await;
}

#[actix::test]
async fn max_connections() {
    let service = Service::with(|it| it.max_connections = 2).await;
    let (mut one, mut two) = (service.raw().await, service.raw().await);
    for raw in [&mut one, &mut two] {
        raw.send(&sum("a", &[1])).await;
        assert_eq!(raw.frame().await, r#"{"response":1,"isDisposed":true,"id":"a"}"#);
    }
    let mut three = service.raw().await;
    assert_eq!(three.rest().await, "");
    service.reports(&["bound_hit", "max_connections", "2"]).await;
    // A place that becomes free is taken.
    drop(one);
    let freed = async {
        loop {
            let mut again = service.raw().await;
            if again.0.write_all(sum("b", &[1]).as_bytes()).await.is_ok() {
                let mut first = [0];
                if matches!(tokio::io::AsyncReadExt::read(&mut again.0, &mut first).await, Ok(1)) {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(within(freed).await.is_some());
    service.stop().await;
}

#[actix::test]
async fn max_in_flight() {
    let service = Service::with(|it| it.max_in_flight = 4).await;
    let mut raw = service.raw().await;
    let slow = frame(r#"{"pattern":"slow","data":100,"id":"s"}"#);
    let started = Instant::now();
    raw.send(&slow.repeat(8)).await;
    for _ in 0..8 {
        assert_eq!(raw.frame().await, r#"{"response":100,"isDisposed":true,"id":"s"}"#);
    }
    assert!(started.elapsed() >= Duration::from_millis(195), "8 ran at once: {:?}", started.elapsed());
    service.reports(&["bound_hit", "max_in_flight", "4"]).await;
    // Bounds are per connection.
    raw.send(&slow.repeat(4)).await;
    service.serves_others().await;
    service.stop().await;
}

#[actix::test]
async fn high_water_bytes() {
    let service = Service::with(|it| it.high_water_bytes = 64 * 1024).await;
    let mut raw = service.raw().await;
    // A peer that does not read: what neither it nor the sockets take waits here.
    let echo = frame(&format!(r#"{{"pattern":"echo","data":"{}","id":"e"}}"#, "x".repeat(1 << 20)));
    let flood = async {
        for _ in 0..1000 {
            raw.send(&echo).await;
        }
    };
    tokio::select! {
        () = flood => panic!("a gigabyte was taken"),
        () = service.reports(&["bound_hit", "high_water_bytes", "65536"]) => {}
    }
    service.serves_others().await;
    service.stop().await;
}

#[actix::test]
async fn max_pending_of_a_client() {
    let service = Service::with(|_| {}).await;
    let options = TcpClientOptions::new().address("127.0.0.1", service.port()).with(|it| it.max_pending = 2);
    let client = TcpClient::new(options);
    let slow = || client.send::<u64>("slow", 100);
    let (one, two, three) = futures::join!(slow(), slow(), slow());
    assert_eq!((one.unwrap(), two.unwrap()), (100, 100));
    assert!(matches!(three, Err(CallError::Overloaded { limit: 2, .. })), "{three:?}");
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    client.close().await;
    service.stop().await;
}
