// SPDX-License-Identifier: MIT OR Apache-2.0
//! Globs as patterns, and where replies to them go.

use std::sync::Arc;
use std::time::Duration;

use martlet_core::{CallError, Ctx, HandlerGroup, RpcError, event, message};
use martlet_redis::{RedisClient, RedisContext};
use parking_lot::Mutex;

use crate::world::{GRACE, Peer, broker, client, client_options, serve, server_options, until};

fn says(pattern: &'static str) -> HandlerGroup {
    message(pattern, move |Ctx(context): Ctx<RedisContext>| async move {
        assert_eq!(context.pattern(), Some(pattern));
        Ok::<_, RpcError>(format!("{pattern} {}", context.channel()))
    })
}

// REDIS-12.
#[actix::test]
async fn a_glob_answers_on_the_concrete_channel() {
    let broker = broker();
    let (service, _) = serve(
        server_options(&broker).wildcards(true),
        [says("w.*"), says("h?llo"), says("h[ae]y"), says("plain")],
    )
    .await;
    let client = client(&broker);
    for (channel, reply) in [
        ("w.b", "w.* w.b"),
        ("w.b.c", "w.* w.b.c"),
        ("hello", "h?llo hello"),
        ("hay", "h[ae]y hay"),
        ("plain", "plain plain"),
        // A channel that is the text of the glob: its reply comes on a channel of both kinds.
        ("w.*", "w.* w.*"),
    ] {
        let replies = client.send::<String>(channel, 1).stream().collect_all().await.unwrap();
        assert_eq!(replies, [reply]);
    }
    for nobody in ["w", "hey!", "hllo", "hoy"] {
        let error = client.send::<String>(nobody, 1).await.unwrap_err();
        assert!(matches!(error, CallError::NoHandler { .. }), "{nobody}: {error}");
    }
    assert_eq!(client.late_replies(), 0);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn without_wildcards_a_glob_is_a_name() {
    let broker = broker();
    let group = message("w.*", async || Ok::<_, RpcError>(1));
    let (service, _) = serve(server_options(&broker), [group]).await;
    let client = client(&broker);
    assert_eq!(client.send::<i64>("w.*", 0).await.unwrap(), 1);
    assert!(matches!(client.send::<i64>("w.b", 0).await, Err(CallError::NoHandler { .. })));
    client.close().await;
    service.stop(GRACE).await;
}

// REDIS-10: NestJS's servers run the handler again, with the reply as an event.
#[actix::test]
async fn a_server_does_not_run_its_own_replies() {
    let broker = broker();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (first, second) = (Arc::clone(&seen), Arc::clone(&seen));
    let all = message("*", move |Ctx(context): Ctx<RedisContext>| {
        first.lock().push(context.channel().to_owned());
        async { Ok::<_, RpcError>(martlet_core::Streaming(futures::stream::iter([1, 2]))) }
    });
    let some = event("w.*", move |Ctx(context): Ctx<RedisContext>| {
        second.lock().push(format!("event {}", context.channel()));
        async { Ok::<_, RpcError>(()) }
    });
    let (service, reports) = serve(server_options(&broker).wildcards(true), [all, some]).await;
    let client = client(&broker);
    for _ in 0..10 {
        // Both handlers match, both answer; a caller takes the first to complete.
        let replies = client.send::<Option<i64>>("w.b", 1).stream().collect_all().await.unwrap();
        assert!(replies.contains(&Some(1)) || replies == [None] || replies.is_empty(), "{replies:?}");
    }
    // What looks like an own cancellation is none of the handlers' business, either.
    client.emit("_MARTLET.cancel.w.b", "x").await.unwrap();
    // A request on such a channel is one.
    client.emit("w.x.reply", "x").await.unwrap();
    until("the last has come", || seen.lock().contains(&"event w.x.reply".to_owned())).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut seen = seen.lock().clone();
    seen.sort();
    let mut expected = vec!["event w.b".to_owned(); 10];
    expected.push("event w.x.reply".to_owned());
    expected.extend(vec!["w.b".to_owned(); 10]);
    expected.push("w.x.reply".to_owned());
    assert_eq!(seen, expected, "{:?}", reports.all());
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

// REDIS-11: NestJS 11, and 12 before 12.1.1, answer on the channel of the glob.
#[actix::test]
async fn the_replies_of_older_wildcard_servers_are_received() {
    let broker = broker();
    let mut old = Peer::new(&broker).await;
    old.messages.psubscribe("users.*").await.unwrap();
    let (new, deaf) = (client(&broker), RedisClient::new(client_options(&broker).wildcard_replies(false)));
    for (client, heard) in [(&new, true), (&deaf, false)] {
        let call = client.send::<i64>("users.a", 1).timeout(Duration::from_millis(500));
        let answering = async {
            let (channel, body) = old.next().await;
            assert_eq!(channel, "users.a");
            let id = serde_json::from_str::<serde_json::Value>(&body).unwrap()["id"].to_string();
            old.publish("users.*.reply", format!(r#"{{"response":5,"isDisposed":true,"id":{id}}}"#)).await
        };
        let (result, receivers) = futures::join!(call, answering);
        // The glob matches this reply, too: the old server itself is one of them.
        assert_eq!(receivers, 2);
        match heard {
            true => assert_eq!(result.unwrap(), 5),
            false => assert!(matches!(result, Err(CallError::Timeout { .. })), "{result:?}"),
        }
        // Its own reply, which it would run again.
        assert_eq!(old.next().await.0, "users.*.reply");
    }
    new.close().await;
    deaf.close().await;
}

// REDIS-11: it costs nothing but that.
#[actix::test]
async fn ordinary_replies_do_not_come_twice() {
    let broker = broker();
    let mut peer = Peer::new(&broker).await;
    let client = client(&broker);
    client.connect().await.unwrap();
    for (channel, receivers) in [
        ("sum.reply", 0),
        (r#"{"cmd":"sum"}.reply"#, 0),
        ("users.*.reply", 1),
        ("users.?.reply", 1),
        ("users.[ab].reply", 1),
        (r"users\*.reply", 1),
        ("*", 0),
    ] {
        assert_eq!(peer.publish(channel, "5").await, receivers, "{channel}");
    }
    client.close().await;
}

#[actix::test]
async fn a_cancelled_call_reaches_a_glob_s_handler() {
    let broker = broker();
    let cancelled = Arc::new(Mutex::new(0));
    struct Guard(Arc<Mutex<i32>>);
    impl Drop for Guard {
        fn drop(&mut self) {
            *self.0.lock() += 1;
        }
    }
    let count = Arc::clone(&cancelled);
    let stuck = message("stuck.*", move || {
        let guard = Guard(Arc::clone(&count));
        async move {
            std::future::pending::<()>().await;
            drop(guard);
            Ok::<_, RpcError>(1)
        }
    });
    let (service, _) = serve(server_options(&broker).wildcards(true), [stuck]).await;
    let client = client(&broker);
    let call = client.send::<i64>("stuck.a", 0).timeout(Duration::from_millis(50));
    assert!(matches!(call.await, Err(CallError::Timeout { .. })));
    until("the handler was stopped", || *cancelled.lock() == 1).await;
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}
