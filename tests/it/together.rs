// SPDX-License-Identifier: MIT OR Apache-2.0
//! Transporters of different kinds in one service, with shared handlers: what befalls one does not disturb the others.

use std::time::Duration;

use martlet::mqtt::{MqttClient, MqttClientOptions, MqttServer, MqttServerOptions};
use martlet::redis::{RedisClient, RedisClientOptions, RedisServer, RedisServerOptions};
use martlet::tcp::{TcpClient, TcpServer};
use martlet::{CallError, ClientProxy, ConnectionStatus, Data, Microservice, RpcError, message};
use martlet_testkit::broker::{Broker, BrokerCommand};
use tokio::time::{Instant, sleep, timeout};

const QUICK: Duration = Duration::from_millis(50);

/// Calls without a pause until told to stop; every call must be answered, and soon.
async fn steady(client: ClientProxy, stop: tokio::sync::watch::Receiver<bool>) -> (u64, Duration) {
    let (mut calls, mut slowest) = (0, Duration::ZERO);
    while !*stop.borrow() {
        let begin = Instant::now();
        let numbers = [calls, 1];
        let sum: u64 = client.send("sum", numbers).await.unwrap();
        assert_eq!(sum, calls + 1);
        slowest = slowest.max(begin.elapsed());
        calls += 1;
        sleep(Duration::from_millis(1)).await;
    }
    (calls, slowest)
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !holds().await {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        sleep(QUICK).await;
    }
}

#[actix::test]
async fn a_broker_that_fails_disturbs_no_other_transporter() {
    let mut redis = Broker::start(BrokerCommand::redis()).unwrap();
    let mosquitto = Broker::start(BrokerCommand::mosquitto()).unwrap();
    let service = Microservice::new()
        .on_current_arbiter()
        .handlers(message("sum", async |Data(numbers): Data<Vec<u64>>| {
            Ok::<_, RpcError>(numbers.iter().sum::<u64>())
        }))
        .server(TcpServer::bind("127.0.0.1", 0))
        .server(RedisServer::new(
            RedisServerOptions::new().url(redis.url()).retry_attempts(10_000).retry_delay(QUICK),
        ))
        .server(MqttServer::new(MqttServerOptions::new().url(mosquitto.url()).reconnect_period(QUICK)))
        .start()
        .await
        .unwrap();
    let port = service.url().rsplit(':').next().unwrap().parse().unwrap();
    let tcp = TcpClient::connect_to("127.0.0.1", port);
    let mqtt = MqttClient::new(MqttClientOptions::new().url(mosquitto.url()));
    let over_redis = RedisClient::new(
        RedisClientOptions::new()
            .url(redis.url())
            .retry_attempts(10_000)
            .retry_delay(QUICK)
            .call_timeout(Duration::from_millis(500)),
    );
    assert_eq!(over_redis.send::<u64>("sum", [1, 2]).await.unwrap(), 3);

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let others = [
        actix_rt::spawn(steady(tcp.clone(), stopped.clone())),
        actix_rt::spawn(steady(mqtt.clone(), stopped)),
    ];

    // Frozen: nobody says that it is gone.
    redis.freeze().unwrap();
    for _ in 0..3 {
        over_redis.send::<u64>("sum", [1, 2]).await.unwrap_err();
    }
    redis.thaw().unwrap();
    eventually("it answers again", async || over_redis.send::<u64>("sum", [1, 2]).await.is_ok()).await;
    // Gone, and back.
    redis.stop();
    let server = service.servers().iter().find(|server| &*server.info().name == "redis").unwrap().clone();
    eventually("its loss is seen", async || server.status() != Some(ConnectionStatus::Connected)).await;
    let gone = timeout(Duration::from_secs(5), over_redis.send::<u64>("sum", [1, 2])).await.unwrap();
    assert!(
        matches!(gone, Err(CallError::NotSent { .. } | CallError::Lost { .. } | CallError::Timeout { .. })),
        "{gone:?}"
    );
    redis.restart().unwrap();
    eventually("it is back", async || over_redis.send::<u64>("sum", [1, 2]).await.is_ok()).await;

    stop.send(true).unwrap();
    for other in others {
        let (calls, slowest) = other.await.unwrap();
        assert!(calls > 20, "{calls}");
        assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    }
    for client in [tcp, mqtt, over_redis] {
        assert_eq!((client.pending(), client.occupied()), (0, 0));
        client.close().await;
    }
    let report = service.stop(Duration::from_secs(5)).await;
    assert!(report.clean, "{report:?}");
}
