// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests, events, records, exchanges, wildcards.

use crate::world::{GRACE, client, serve, server_options, shared_broker, streaming, sum, unique};

#[actix::test]
async fn a_call_is_answered() {
    let broker = shared_broker();
    let queue = unique("sum");
    let (service, _) = serve(server_options(&broker, &queue), [sum(), streaming()]).await;
    let client = client(&broker, &queue);
    let sum: i64 = client.send("sum", [1, 2, 3]).await.unwrap();
    assert_eq!(sum, 6);
    let items: Vec<i64> = client.send("stream", [1, 2, 3]).stream().collect_all().await.unwrap();
    assert_eq!(items, [1, 2, 3]);
    client.close().await;
    assert!(service.stop(GRACE).await.clean);
}

#[actix::test]
async fn timing_probe() {
    let broker = shared_broker();
    let queue = unique("probe");
    let (service, _) = serve(server_options(&broker, &queue), [sum()]).await;
    for _ in 0..5 {
        let client = client(&broker, &queue);
        let t = std::time::Instant::now();
        client.connect().await.unwrap();
        let c = t.elapsed();
        let _: i64 = client.send("sum", [1]).await.unwrap();
        let d = t.elapsed();
        for _ in 0..100 {
            let _: i64 = client.send("sum", [1]).await.unwrap();
        }
        eprintln!("connect {c:?} first {:?} per call {:?}", d - c, (t.elapsed() - d) / 100);
        client.close().await;
    }
    service.stop(GRACE).await;
}
