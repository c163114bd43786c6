// SPDX-License-Identifier: MIT OR Apache-2.0
//! What crosses the broker, seen by a peer that speaks plain Redis.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use martlet_core::{CallError, Ctx, Data, Metadata, Pattern, RpcError, event, message};
use martlet_redis::{RedisClient, RedisContext, RedisUnwrapped};
use parking_lot::Mutex;

use crate::world::{
    GRACE, Peer, broker, client, client_options, serve, server_options, slow, streaming, sum, until,
};

// REDIS-2, REDIS-3, REDIS-4, REDIS-7.
#[actix::test]
async fn a_request_is_answered_on_its_channel_s_reply_channel() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker), [sum(), streaming()]).await;
    let mut peer = Peer::listening(&broker, &["sum.reply", "stream.reply"]).await;
    assert_eq!(peer.publish("sum", r#"{"pattern":"sum","data":[1,2,3],"id":"a"}"#).await, 1);
    let reply = |channel: &str, body: &str| (channel.to_owned(), body.to_owned());
    assert_eq!(peer.next().await, reply("sum.reply", r#"{"response":6,"isDisposed":true,"id":"a"}"#));
    // The channel routes, whatever the packet says; any id comes back as it is.
    peer.publish("sum", r#"{"pattern":"other","data":[4],"id":null}"#).await;
    assert_eq!(peer.next().await.1, r#"{"response":4,"isDisposed":true,"id":null}"#);
    peer.publish("stream", r#"{"data":[1,2],"id":7}"#).await;
    assert_eq!(peer.next().await, reply("stream.reply", r#"{"response":1,"id":7}"#));
    assert_eq!(peer.next().await.1, r#"{"response":2,"isDisposed":true,"id":7}"#);
    peer.publish("sum", r#"{"data":"no numbers","id":"b"}"#).await;
    let (_, error) = peer.next().await;
    assert!(error.starts_with(r#"{"err":{"status":"error","message":"#), "{error}");
    peer.publish("sum", r#"{"data":[1]}"#).await;
    peer.hears_nothing().await;
    service.stop(GRACE).await;
}

// REDIS-2, REDIS-8: subscribed before published, as NestJS; the packet is NestJS's.
#[actix::test]
async fn a_client_subscribes_the_reply_channel_before_it_publishes() {
    let broker = broker();
    let client = client(&broker);
    let mut peer = Peer::listening(&broker, &[r#"{"cmd":"sum"}"#, "evt"]).await;
    let call = client.send::<i64>(Pattern::parse(r#"{"cmd":"sum"}"#), [1, 2]).no_timeout();
    let answering = async {
        let (channel, body) = peer.next().await;
        assert_eq!(peer.subscribers(r#"{"cmd":"sum"}.reply"#).await, 1);
        let id = body.strip_prefix(r#"{"pattern":{"cmd":"sum"},"data":[1,2],"id":""#).unwrap();
        let id = id.strip_suffix(r#""}"#).unwrap().to_owned();
        assert_eq!(id.len(), 21);
        // Another caller's reply, rubbish, then ours, and ours again.
        let reply = format!("{channel}.reply");
        peer.publish(&reply, r#"{"response":1,"isDisposed":true,"id":"somebody else"}"#).await;
        peer.publish(&reply, format!(r#"{{"response":3,"isDisposed":true,"id":"{id}"}}"#)).await;
        peer.publish(&reply, format!(r#"{{"response":4,"isDisposed":true,"id":"{id}"}}"#)).await;
    };
    let (result, ()) = futures::join!(call, answering);
    assert_eq!(result.unwrap(), 3);
    client.emit("evt", "x").await.unwrap();
    assert_eq!(peer.next().await.1, r#"{"pattern":"evt","data":"x"}"#);
    let mut metadata = Metadata::new();
    metadata.insert("tenant", "acme");
    client.emit_with("evt", 1, metadata).await.unwrap();
    assert_eq!(peer.next().await.1, r#"{"pattern":"evt","data":1,"metadata":{"tenant":"acme"}}"#);
    // REDIS-9: it stays subscribed.
    assert_eq!(peer.subscribers(r#"{"cmd":"sum"}.reply"#).await, 1);
    until("the second reply was late", || client.late_replies() == 1).await;
    client.close().await;
}

// REDIS-8: the defect of NestJS's client, where the first reply unsubscribes the others.
#[actix::test]
async fn concurrent_first_calls_all_get_their_replies() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker), [sum(), slow()]).await;
    for _ in 0..5 {
        let clients = [client(&broker), client(&broker)];
        let calls = (0..200u64).map(|number| {
            let client = &clients[number as usize % 2];
            async move {
                if number % 3 == 0 {
                    assert_eq!(client.send::<u64>("slow", number % 7).await.unwrap(), number % 7);
                } else {
                    assert_eq!(client.send::<u64>("sum", [number, 1]).await.unwrap(), number + 1);
                }
            }
        });
        join_all(calls).await;
        for client in clients {
            assert_eq!((client.pending(), client.late_replies()), (0, 0));
            client.close().await;
        }
    }
    service.stop(GRACE).await;
}

// REDIS-9: the bound of the reply channels.
#[actix::test]
async fn idle_reply_channels_are_unsubscribed_beyond_their_number() {
    let broker = broker();
    let (service, _) =
        serve(server_options(&broker).wildcards(true), [message("item.*", async || Ok::<_, RpcError>(1))])
            .await;
    let client = RedisClient::new(client_options(&broker).max_reply_channels(3));
    for number in 0..10 {
        assert_eq!(client.send::<i64>(format!("item.{number}"), 0).await.unwrap(), 1);
    }
    let mut peer = Peer::new(&broker).await;
    for (number, expected) in [(0, 0), (6, 0), (7, 1), (9, 1)] {
        assert_eq!(peer.subscribers(&format!("item.{number}.reply")).await, expected, "{number}");
    }
    assert_eq!(client.send::<i64>("item.0", 0).await.unwrap(), 1);
    client.close().await;
    service.stop(GRACE).await;
}

// REDIS-13: NestJS waits for ever.
#[actix::test]
async fn a_request_that_nobody_receives_ends_at_once() {
    let broker = broker();
    let client = client(&broker);
    let error = client.send::<i64>("nobody", 1).await.unwrap_err();
    assert!(matches!(error, CallError::NoHandler { .. }), "{error}");
    let waiting = RedisClient::new(client_options(&broker).receiver_count(false));
    let error = waiting.send::<i64>("nobody", 1).timeout(Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error}");
    assert_eq!((client.occupied(), waiting.occupied()), (0, 0));
    client.close().await;
    waiting.close().await;
}

// REDIS-14.
#[actix::test]
async fn a_stream_that_nobody_receives_is_cancelled() {
    let broker = broker();
    let ended = Arc::new(Mutex::new(false));
    struct Guard(Arc<Mutex<bool>>);
    impl Drop for Guard {
        fn drop(&mut self) {
            *self.0.lock() = true;
        }
    }
    let flag = Arc::clone(&ended);
    let forever = message("forever", move || {
        let guard = Guard(Arc::clone(&flag));
        async move {
            let items = futures::stream::unfold((0u64, guard), |(number, guard)| async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                Some((number, (number + 1, guard)))
            });
            Ok::<_, RpcError>(martlet_core::Streaming(items))
        }
    });
    let (service, _) = serve(server_options(&broker), [forever]).await;
    let mut peer = Peer::listening(&broker, &["forever.reply"]).await;
    peer.publish("forever", r#"{"data":1,"id":"a"}"#).await;
    assert_eq!(peer.next().await.1, r#"{"response":0,"id":"a"}"#);
    assert!(!*ended.lock());
    peer.messages.unsubscribe("forever.reply").await.unwrap();
    until("the stream has ended", || *ended.lock()).await;
    assert!(service.stop(GRACE).await.clean);
}

// REDIS-15.
#[actix::test]
async fn every_service_that_serves_a_channel_gets_every_message() {
    let broker = broker();
    let counts = [Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0))];
    let mut services = Vec::new();
    for count in &counts {
        let count = Arc::clone(count);
        let group = message("who", move || {
            *count.lock() += 1;
            async { Ok::<_, RpcError>(1) }
        });
        services.push(serve(server_options(&broker), [group]).await.0);
    }
    let client = client(&broker);
    for _ in 0..20 {
        assert_eq!(client.send::<Vec<i64>>("who", 0).await.err().map(|error| error.kind()), Some("decode"));
        assert_eq!(client.send::<i64>("who", 0).stream().collect_all().await.unwrap(), [1]);
    }
    until("both have run", || *counts[0].lock() == 40 && *counts[1].lock() == 40).await;
    client.close().await;
    for service in services {
        assert!(service.stop(GRACE).await.clean);
    }
}

// REDIS-5, REDIS-6, and what else can come.
#[actix::test]
async fn foreign_and_bad_messages_disturb_nobody() {
    let broker = broker();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let any = event("evt", move |Data(data): Data<serde_json::Value>| {
        sink.lock().push(data.to_string());
        async { Ok::<_, RpcError>(()) }
    });
    let options = server_options(&broker).max_payload_bytes(1000);
    let (service, reports) = serve(options, [any, sum()]).await;
    let mut peer = Peer::listening(&broker, &["sum.reply"]).await;
    for body in ["hello", r#"{"a":1}"#, "5", "null", "", r#"{"data":7}"#, r#"{"id":"n","foo":1}"#] {
        peer.publish("evt", body).await;
    }
    let expected =
        [r#""hello""#, r#"{"a":1}"#, "5", "null", r#""""#, "7", r#"{"foo":1,"id":"n"}"#].map(str::to_owned);
    until("all are handled", || seen.lock().len() == expected.len()).await;
    assert_eq!(*seen.lock(), expected);
    peer.publish("evt", b"\xff\xfe").await;
    peer.publish("evt", vec![b'x'; 1001]).await;
    peer.publish("evt", vec![b'x'; 5_000_000]).await;
    peer.publish("sum", r#"{"data":[1],"id":"a""#).await;
    peer.publish("sum", r#"{"data":[1],"id":"a"}"#).await;
    assert_eq!(peer.next().await.1, r#"{"response":1,"isDisposed":true,"id":"a"}"#);
    assert!(reports.contain("message on evt: the body is neither JSON nor text"), "{:?}", reports.all());
    assert!(reports.contain("a body of 1001 bytes exceeds maxPayloadBytes, 1000"), "{:?}", reports.all());
    assert!(reports.contain("a body of 5000000 bytes exceeds maxPayloadBytes, 1000"), "{:?}", reports.all());
    assert_eq!(seen.lock().len(), expected.len());
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn bad_replies_are_reported_and_end_no_call() {
    let broker = broker();
    let client = RedisClient::new(client_options(&broker).max_payload_bytes(200));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    client.events().on(move |event| sink.lock().push(event.to_string()));
    let mut peer = Peer::listening(&broker, &["ask"]).await;
    let call = client.send::<i64>("ask", 1);
    let answering = async {
        let (_, body) = peer.next().await;
        let id = serde_json::from_str::<serde_json::Value>(&body).unwrap()["id"].to_string();
        for bad in [
            "not JSON",
            "5",
            "{}",
            r#"{"response":1}"#,
            r#"{"response":1,"id":7}"#,
            r#"{"response":1,"id":"x"}"#,
        ] {
            peer.publish("ask.reply", bad).await;
        }
        peer.publish("ask.reply", vec![b' '; 1000]).await;
        peer.publish("ask.reply", b"\xff").await;
        peer.publish("ask.reply", format!(r#"{{"response":2,"isDisposed":true,"id":{id}}}"#)).await;
    };
    let (result, ()) = futures::join!(call, answering);
    assert_eq!(result.unwrap(), 2);
    let seen = seen.lock().clone();
    for text in ["a reply: malformed packet", "a reply has no id", "ask.reply: a body of 1000 bytes exceeds"]
    {
        assert!(seen.iter().any(|event| event.contains(text)), "{text}: {seen:?}");
    }
    client.close().await;
    assert_eq!(client.occupied(), 0);
}

#[actix::test]
async fn messages_beyond_the_bound_are_refused_where_they_are_made() {
    let broker = broker();
    let big = message("big", async |Data(size): Data<usize>| Ok::<_, RpcError>("x".repeat(size)));
    let (service, reports) = serve(server_options(&broker).max_payload_bytes(1000), [big]).await;
    let client = RedisClient::new(client_options(&broker).max_payload_bytes(2000));
    assert_eq!(client.send::<String>("big", 900).await.unwrap().len(), 900);
    let error = client.send::<String>("big", 1000).await.unwrap_err();
    assert!(matches!(error, CallError::Remote(_)), "{error}");
    assert!(reports.contain("exceeds maxPayloadBytes, 1000"), "{:?}", reports.all());
    let error = client.send::<String>("big", "x".repeat(2000)).await.unwrap_err();
    assert!(
        matches!(error, CallError::Encode(_)) && error.to_string().contains("maxPayloadBytes"),
        "{error}"
    );
    let error = client.emit("c".repeat(70_000), 1).await.unwrap_err();
    assert!(error.to_string().contains("a channel of 70000 bytes"), "{error}");
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn a_handler_sees_the_channel() {
    let broker = broker();
    let context = message("where", async |Ctx(context): Ctx<RedisContext>| {
        Ok::<_, RpcError>((context.channel().to_owned(), context.pattern().map(str::to_owned)))
    });
    let (service, _) = serve(server_options(&broker), [context]).await;
    let client = client(&broker);
    let seen: (String, Option<String>) = client.send("where", 0).await.unwrap();
    assert_eq!(seen, ("where".to_owned(), None));
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn unwrap_gives_the_publisher_and_the_subscriber() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker).connection_name("server"), [sum()]).await;
    let client = client(&broker);
    client.connect().await.unwrap();
    let server = service.servers()[0].unwrap::<RedisUnwrapped>().unwrap();
    let own = client.unwrap::<RedisUnwrapped>().unwrap();
    for connections in [&server, &own] {
        let (publisher, subscriber) = &**connections;
        let mut connection = publisher.get().await.unwrap();
        let pong: String = redis::cmd("PING").query_async(&mut connection).await.unwrap();
        assert_eq!(pong, "PONG");
        assert!(subscriber.client_id() > 0);
        assert_eq!(subscriber.peer_addr().port(), broker.port());
        assert_eq!((subscriber.dropped(), subscriber.waiting()), (0, 0));
        let list: String = redis::cmd("CLIENT")
            .arg("LIST")
            .arg("TYPE")
            .arg("pubsub")
            .query_async(&mut connection)
            .await
            .unwrap();
        let line = list.lines().find(|line| line.starts_with(&format!("id={} ", subscriber.client_id())));
        assert!(line.unwrap().contains(&format!("addr={} ", subscriber.local_addr())), "{list}");
    }
    let mut connection = server.0.get().await.unwrap();
    let list: String = redis::cmd("CLIENT").arg("LIST").query_async(&mut connection).await.unwrap();
    assert_eq!(list.matches(" name=server ").count(), 2, "{list}");
    client.close().await;
    service.stop(GRACE).await;
    drop((connection, server, own));
    // Nothing stays connected (but the peer that asks), neither what the application had from the pools.
    let mut peer = Peer::new(&broker).await;
    let mut left = usize::MAX;
    for _ in 0..200 {
        let list: String = redis::cmd("CLIENT").arg("LIST").query_async(&mut peer.commands).await.unwrap();
        left = list.lines().count();
        if left <= 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(left <= 2, "{left}");
}

#[actix::test]
async fn a_database_is_selected_and_changes_no_channel() {
    let broker = broker();
    let (service, _) = serve(server_options(&broker).url(format!("{}/3", broker.url())), [sum()]).await;
    let client = client(&broker);
    assert_eq!(client.send::<i64>("sum", [1]).await.unwrap(), 1);
    let server = service.servers()[0].unwrap::<RedisUnwrapped>().unwrap();
    let mut connection = server.0.get().await.unwrap();
    let list: String = redis::cmd("CLIENT").arg("LIST").query_async(&mut connection).await.unwrap();
    assert!(list.matches(" db=3 ").count() >= 2, "{list}");
    client.close().await;
    service.stop(GRACE).await;
}

#[actix::test]
async fn both_sides_from_options_alone() {
    let broker = broker();
    let server: martlet_core::Server = server_options(&broker).into();
    let service = martlet_core::Microservice::new().handlers(sum()).server(server).start().await.unwrap();
    let client: martlet_core::ClientProxy = client_options(&broker).into();
    assert_eq!(client.send::<i64>("sum", [2, 3]).await.unwrap(), 5);
    assert_eq!(service.url(), broker.url());
    client.close().await;
    service.stop(GRACE).await;
}
