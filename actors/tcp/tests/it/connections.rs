// SPDX-License-Identifier: MIT OR Apache-2.0

//! The client's connection: lazy, one for all clones, made anew at the next call; and other framings.

use std::time::{Duration, Instant};

use futures::StreamExt;
use martlet_core::codec::MessagePackCodec;
use martlet_core::{CallError, ConnectionStatus, Microservice};
use martlet_tcp::{LengthDelimited, TcpClient, TcpClientOptions, TcpServer, TcpServerOptions};
use martlet_testkit::broker::free_port;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::{Raw, Service, frame, within};

#[actix::test]
async fn a_refused_connection_is_not_sent() {
    let port = free_port().unwrap();
    let client = TcpClient::connect_to("127.0.0.1", port);
    assert_eq!(client.status(), None);
    for _ in 0..2 {
        let error = client.send::<i64>("sum", [1]).await.unwrap_err();
        assert!(matches!(&error, CallError::NotSent { .. }) && error.is_not_sent(), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&format!("127.0.0.1:{port}")) && text.contains("ECONNREFUSED"), "{text}");
    }
    let error = client.emit("event", 1).await.unwrap_err();
    assert!(matches!(&error, CallError::NotSent { .. }), "{error:?}");
    let error = client.connect().await.unwrap_err();
    assert!(matches!(&error, CallError::NotSent { .. }), "{error:?}");
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    client.close().await;
}

#[actix::test]
async fn retries_wait_for_a_service_that_is_late() {
    let port = free_port().unwrap();
    let options = TcpClientOptions::new().address("127.0.0.1", port).with(|it| {
        it.retry_attempts = 50;
        it.retry_delay = Duration::from_millis(20);
    });
    let client = TcpClient::new(options);
    let late = async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        Service::try_start(TcpServerOptions::new().address("127.0.0.1", port)).await.unwrap()
    };
    let (answer, service) = futures::join!(client.send::<i64>("sum", [1, 2]), late);
    assert_eq!(answer.unwrap(), 3);
    client.close().await;
    service.stop().await;
}

#[actix::test]
async fn a_close_fails_everything_pending_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = TcpClient::connect_to("127.0.0.1", port);
    let calls = futures::future::join_all((0..100).map(|_| client.send::<i64>("sum", [1])));
    let closing = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut requests = Vec::new();
        while requests.iter().filter(|byte| **byte == b'#').count() < 100 {
            socket.read_buf(&mut requests).await.unwrap();
        }
        Instant::now()
    };
    let (outcomes, closed) = within(async { futures::join!(calls, closing) }).await.unwrap();
    assert!(closed.elapsed() < Duration::from_secs(2), "{:?}", closed.elapsed());
    assert!(outcomes.iter().all(|it| matches!(it, Err(CallError::Lost { .. }))), "{outcomes:?}");
    assert_eq!((client.pending(), client.occupied()), (0, 0));
    assert_eq!(client.status(), Some(ConnectionStatus::Disconnected));

    // The next call connects anew.
    let answering = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let n = socket.read(&mut request).await.unwrap();
        let request: serde_json::Value =
            serde_json::from_slice(request[..n].splitn(2, |byte| *byte == b'#').nth(1).unwrap()).unwrap();
        let reply = format!(r#"{{"response":7,"isDisposed":true,"id":{}}}"#, request["id"]);
        socket.write_all(format!("{}#{reply}", reply.len()).as_bytes()).await.unwrap();
        socket
    };
    let (answer, _socket) = futures::join!(client.send::<i64>("sum", [1]), answering);
    assert_eq!(answer.unwrap(), 7);
    client.close().await;
}

/// Short replies are taken many at a time: they overtake nothing, least of all within a stream.
#[actix::test]
async fn replies_that_arrive_together_reach_their_calls_in_their_order() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpClient::connect_to("127.0.0.1", listener.local_addr().unwrap().port());
    let long = "a long text that shares the frame ".repeat(3);
    let stream = client.send::<String>("stream", 0).stream().collect_all();
    let calls = futures::future::join_all((0..300).map(|number| client.send::<String>("call", number)));
    let answering = async {
        let (socket, _) = listener.accept().await.unwrap();
        let mut peer = Raw(socket);
        let (mut replies, mut of_stream) = (String::new(), String::new());
        for _ in 0..301 {
            let request: serde_json::Value = serde_json::from_str(&peer.frame().await).unwrap();
            let id = &request["id"];
            let number = &request["data"];
            if request["pattern"] == "stream" {
                of_stream = id.to_string();
                continue;
            }
            if number.as_u64().unwrap().is_multiple_of(50) {
                replies += &frame(&format!(r#"{{"response":"item {number}","id":{of_stream}}}"#));
            }
            let value = if number.as_u64().unwrap().is_multiple_of(3) {
                format!("{long}{number}")
            } else {
                number.to_string()
            };
            replies += &frame(&format!(r#"{{"response":"{value}","isDisposed":true,"id":{id}}}"#));
        }
        replies += &frame(&format!(r#"{{"response":"last","isDisposed":true,"id":{of_stream}}}"#));
        peer.send(&replies).await;
        peer
    };
    let (items, answers, _peer) = within(async { futures::join!(stream, calls, answering) }).await.unwrap();
    let expected = ["item 0", "item 50", "item 100", "item 150", "item 200", "item 250", "last"];
    assert_eq!(items.unwrap(), expected);
    for (number, answer) in answers.into_iter().enumerate() {
        let expected = if number % 3 == 0 { format!("{long}{number}") } else { number.to_string() };
        assert_eq!(answer.unwrap(), expected);
    }
    assert_eq!((client.pending(), client.occupied(), client.late_replies()), (0, 0, 0));
    client.close().await;
}

#[actix::test]
async fn clones_share_one_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpClient::connect_to("127.0.0.1", listener.local_addr().unwrap().port());
    let limit = Duration::from_millis(100);
    let calls = (0..10).map(|_| {
        let client = client.clone();
        async move { client.send::<i64>("sum", [1]).timeout(limit).await.unwrap_err().kind() }
    });
    let accepting = async {
        let accepted = listener.accept().await.unwrap();
        let second = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
        assert!(second.is_err(), "a second connection");
        accepted
    };
    let (outcomes, _socket) = futures::join!(futures::future::join_all(calls), accepting);
    assert_eq!(outcomes, ["timeout"; 10]);
    client.close().await;
}

#[actix::test]
async fn the_status_tells_every_change() {
    let service = Service::with(|_| {}).await;
    let client = TcpClient::connect_to("127.0.0.1", service.port());
    let statuses = client.status_stream();
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    service.stop().await;
    let seen: Vec<_> = within(statuses.take(3).collect()).await.unwrap();
    use ConnectionStatus::{Connected, Connecting, Disconnected};
    assert_eq!(seen, [Connecting, Connected, Disconnected]);
    client.close().await;
}

/// What a server that is not a NestJS service says ends the connection, with the reason.
#[actix::test]
async fn a_server_that_speaks_something_else() {
    for greeting in ["HTTP/1.1 400 Bad Request\r\n\r\n#", "SSH-2.0-OpenSSH_9.9\r\n#", "5#{bad}", "0#"] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpClient::connect_to("127.0.0.1", listener.local_addr().unwrap().port());
        let talking = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            // Only once the request is here.
            let mut request = [0; 16];
            socket.read_exact(&mut request).await.unwrap();
            socket.write_all(greeting.as_bytes()).await.unwrap();
            socket
        };
        let call = within(async { futures::join!(client.send::<i64>("sum", [1]), talking) });
        let (outcome, _socket) = call.await.unwrap_or_else(|| panic!("no outcome after {greeting:?}"));
        assert!(matches!(&outcome, Err(CallError::Lost { .. })), "{greeting:?}: {outcome:?}");
        client.close().await;
    }
}

#[actix::test]
async fn messagepack_with_length_delimited_frames() {
    let options = TcpServerOptions::new().codec(MessagePackCodec).framing(LengthDelimited);
    let service = Service::try_start(options.address("127.0.0.1", 0)).await.unwrap();
    let options = TcpClientOptions::new().address("127.0.0.1", service.port());
    let client = TcpClient::new(options.codec(MessagePackCodec).framing(LengthDelimited));
    assert_eq!(client.send::<i64>("sum", [1, 2, 3]).await.unwrap(), 6);
    let value = serde_json::json!({ "a": [1, "ż😀", null, 1.5], "b": { "c": true } });
    assert_eq!(client.send::<serde_json::Value>("echo", &value).await.unwrap(), value);
    let items: Vec<_> = client.send::<u64>("infinite", 1).stream().take(3).collect().await;
    assert!(items.into_iter().map(Result::unwrap).eq(0..3));
    let error = client.send::<i64>("nobody.there", 1).await.unwrap_err();
    assert!(matches!(error, CallError::NoHandler { .. }), "{error:?}");
    let error = client.send::<i64>("sum", "no numbers").await.unwrap_err();
    assert!(error.remote().unwrap().message().unwrap().starts_with("Bad payload"), "{error:?}");
    let calls = (0..1000_i64).map(|i| client.send::<i64>("sum", [i, 1]));
    let sums = futures::future::try_join_all(calls).await.unwrap();
    assert!(sums.into_iter().eq(1..=1000));
    // Dropped calls are cancelled there, too.
    use std::sync::atomic::Ordering;
    crate::support::eventually("no stream", || service.running_streams.load(Ordering::SeqCst) == 0).await;
    client.close().await;
    service.stop().await;
}

#[actix::test]
async fn a_codec_that_does_not_fit_the_framing_is_refused_at_start() {
    let reason = "which framing nest cannot carry: use LengthDelimited";
    let server = TcpServer::new(TcpServerOptions::new().address("127.0.0.1", 0).codec(MessagePackCodec));
    let error = Microservice::new().on_current_arbiter().server(server).start().await.unwrap_err();
    assert!(error.to_string().contains(reason), "{error}");
    let options = TcpClientOptions::new().address("127.0.0.1", 1).codec(MessagePackCodec);
    let error = TcpClient::new(options).send::<i64>("sum", [1]).await.unwrap_err();
    assert!(matches!(&error, CallError::NotSent { .. }), "{error}");
    assert!(error.to_string().contains(reason), "{error}");
}

/// What a stopping service has read is answered; what it has not read has not run.
#[actix::test]
async fn a_stopping_service_answers_what_it_took() {
    use std::sync::atomic::Ordering;
    for round in 0..5 {
        let service = Service::with(|_| {}).await;
        let (mut read, mut write) = service.raw().await.0.into_split();
        let writing = async {
            for i in 0.. {
                // Ends when the service has closed.
                if write.write_all(crate::support::sum(&i.to_string(), &[i]).as_bytes()).await.is_err() {
                    break;
                }
            }
        };
        let reading = async {
            let mut replies = Vec::new();
            // A reset ends it as a close does.
            while matches!(read.read_buf(&mut replies).await, Ok(n) if n > 0) {}
            replies.iter().filter(|byte| **byte == b'#').count() as u64
        };
        let stopping = async {
            crate::support::eventually("load", || service.handled.load(Ordering::SeqCst) > 100 * round).await;
            service.running.stop(Duration::from_secs(5)).await
        };
        let ((), replies, report) =
            within(async { futures::join!(writing, reading, stopping) }).await.expect("an end");
        assert!(report.clean, "{report:?}");
        assert_eq!(
            (replies, report.done()),
            (service.handled.load(Ordering::SeqCst), replies),
            "round {round}"
        );
    }
}
