// SPDX-License-Identifier: MIT OR Apache-2.0
//! Orders on a RabbitMQ queue, acknowledged by what becomes of them: one that fails is tried again in this process,
//! one that fails every time goes to the dead letters, which another service looks at; one is refused by its handler
//! itself. Needs a broker at `RABBITMQ_URL`, or at amqp://127.0.0.1:5672.
//!
//! ```text
//! $ cargo run --example rmq_acknowledgement --features rabbitmq
//! the broker has all orders
//! order 1: booked at attempt 1
//! order 2: booked at attempt 3
//! order 13: dead letter, after 4 attempts
//! order 0: dead letter, after 1 attempts
//! orders left in the queue: 0
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use martlet::FailurePolicy;
use martlet::prelude::*;
use martlet::rabbitmq::{
    RmqClient, RmqClientOptions, RmqContext, RmqQueueOptions, RmqRecordBuilder, RmqServer, RmqServerOptions,
};
use tokio::sync::mpsc;

const GRACE: Duration = Duration::from_secs(5);

/// How often each order was tried.
type Attempts = Arc<Mutex<BTreeMap<u64, u32>>>;

#[actix::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("RABBITMQ_URL").unwrap_or_else(|_| "amqp://127.0.0.1:5672".to_owned());
    // Both queues go with this program; yours would be durable, which is the default.
    let passing = || RmqQueueOptions::new().durable(false).auto_delete(true);
    // By the default exchange, a message goes to the queue that its routing key names.
    let orders = || passing().dead_letter_exchange("").dead_letter_routing_key("example.dead");

    let (lines, mut printed) = mpsc::unbounded_channel();
    let attempts = Attempts::default();
    let tried = Arc::clone(&attempts);
    let said = lines.clone();
    let dead = event("order.placed", move |Data(order): Data<u64>| {
        let attempts = tried.lock().expect("nobody panics").get(&order).copied().unwrap_or_default();
        // Nobody reads any more when the program ends.
        let _ = said.send(format!("order {order}: dead letter, after {attempts} attempts"));
        async { Ok::<_, RpcError>(()) }
    });
    let dead_letters = Microservice::new()
        .name("dead-letters")
        .handlers(dead)
        .server(RmqServer::new(
            RmqServerOptions::new().urls([&url]).queue("example.dead").queue_options(passing()),
        ))
        .start()
        .await?;

    let tried = Arc::clone(&attempts);
    let book = event("order.placed", move |Data(order): Data<u64>, Ctx(context): Ctx<RmqContext>| {
        let attempt = {
            let mut attempts = tried.lock().expect("nobody panics");
            let attempt = attempts.entry(order).or_insert(0);
            *attempt += 1;
            *attempt
        };
        let lines = lines.clone();
        async move {
            match order {
                // What a handler settles by itself is not settled again.
                0 => context.reject(false).map_err(RpcError::unexpected)?,
                13 => return Err(RpcError::message("this one never works")),
                2 if attempt < 3 => return Err(RpcError::message("not yet")),
                _ => {
                    let _ = lines.send(format!("order {order}: booked at attempt {attempt}"));
                }
            }
            Ok(())
        }
    });
    let policy = FailurePolicy::retry(3).every(Duration::from_millis(20));
    let booking = Microservice::new()
        .name("booking")
        .handlers(book)
        .server(RmqServer::new(
            RmqServerOptions::new()
                .urls([&url])
                .queue("example.orders")
                .queue_options(orders())
                .no_ack(false)
                .on_failure(policy),
        ))
        .start()
        .await?;

    let client =
        RmqClient::new(RmqClientOptions::new().urls([&url]).queue("example.orders").queue_options(orders()));
    let mut shown = Vec::new();
    for order in [1, 2, 13, 0] {
        let record = RmqRecordBuilder::new(order).set_header("x-shop", "example").build();
        // Done when the broker has confirmed it.
        client.emit("order.placed", record).await?;
        if order == 0 {
            println!("the broker has all orders");
        }
    }
    while shown.len() < 4 {
        shown.push(printed.recv().await.ok_or("a service is gone")?);
    }
    // They are worked on concurrently.
    for order in ["order 1:", "order 2:", "order 13:", "order 0:"] {
        shown.iter().filter(|line| line.starts_with(order)).for_each(|line| println!("{line}"));
    }
    let report = booking.stop(GRACE).await;
    println!("orders left in the queue: {}", report.handed_back());
    client.close().await;
    dead_letters.stop(GRACE).await;
    Ok(())
}
