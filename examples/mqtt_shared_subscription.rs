// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two services behind an MQTT broker share the requests of a topic, a wildcard tells which sensor spoke, and a retained
//! event reaches a service that starts later. Needs a broker at `MQTT_URL`, or at mqtt://127.0.0.1:1883.
//!
//! ```text
//! $ cargo run --example mqtt_shared_subscription --features mqtt
//! 200 requests, 200 served: both had their share
//! sensors/kitchen/temperature says 21.5 (kept: true)
//! ada stops: … requests answered, 0 abandoned
//! 100 requests more: {"grace": 100}
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use futures::future::try_join_all;
use martlet::RunningService;
use martlet::mqtt::{
    MqttClient, MqttClientOptions, MqttContext, MqttQos, MqttRecordBuilder, MqttServer, MqttServerOptions,
};
use martlet::prelude::*;
use tokio::sync::mpsc;

const GRACE: Duration = Duration::from_secs(5);

/// Answers with its name.
async fn service(name: &'static str, url: &str) -> Result<RunningService, Box<dyn Error>> {
    // Subscribed as `$share/workers/example/work`; callers use the plain topic.
    let server = MqttServer::new(MqttServerOptions::new().url(url).shared_group("workers"));
    let work = message("example/work", move || async move { Ok::<_, RpcError>(name) });
    Ok(Microservice::new().name(name).handlers(work).server(server).start().await?)
}

/// How many requests each service has answered.
async fn work(client: &ClientProxy, requests: usize) -> Result<BTreeMap<String, u64>, CallError> {
    let mut shares = BTreeMap::new();
    for name in try_join_all((0..requests).map(|_| client.send::<String>("example/work", ()))).await? {
        *shares.entry(name).or_default() += 1;
    }
    Ok(shares)
}

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("MQTT_URL").unwrap_or_else(|_| "mqtt://127.0.0.1:1883".to_owned());
    let client = MqttClient::new(MqttClientOptions::new().url(&url));
    let (ada, grace) = (service("ada", &url).await?, service("grace", &url).await?);

    let shares = work(&client, 200).await?;
    let (served, both) = (shares.values().sum::<u64>(), shares.len() == 2);
    println!("200 requests, {served} served: {}", if both { "both had their share" } else { "one had all" });

    // The broker keeps it for whoever subscribes later.
    let reading = MqttRecordBuilder::new(21.5).set_retain(true).set_qos(MqttQos::AtLeastOnce).build();
    client.emit("sensors/kitchen/temperature", reading).await?;
    let (told, mut heard) = mpsc::channel(1);
    let sensors =
        event("sensors/+/temperature", move |Ctx(from): Ctx<MqttContext>, Data(degrees): Data<f64>| {
            let told = told.clone();
            async move {
                let line = format!("{} says {degrees} (kept: {})", from.topic(), from.retain());
                // The program may have heard enough.
                let _ = told.send(line).await;
                Ok::<_, RpcError>(())
            }
        });
    let server = MqttServer::new(MqttServerOptions::new().url(&url));
    let late = Microservice::new().name("late").handlers(sensors).server(server).start().await?;
    println!("{}", heard.recv().await.ok_or("the service has gone")?);

    // In order: it unsubscribes, answers what the broker has already given it, and closes.
    let report = ada.stop(GRACE).await;
    println!("ada stops: {} requests answered, {} abandoned", report.done(), report.abandoned().count());
    println!("100 requests more: {:?}", work(&client, 100).await?);

    // An empty retained message would clear it; here the broker's next restart does.
    client.close().await;
    late.stop(GRACE).await;
    grace.stop(GRACE).await;
    Ok(())
}
