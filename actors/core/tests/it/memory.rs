// SPDX-License-Identifier: MIT OR Apache-2.0
//! The first words: a service and a client on the in-memory transporter.

use std::time::Duration;

use martlet_core::{CallError, ConnectionStatus, Data, Microservice, RpcError, message};
use martlet_testkit::memory::{MemoryClient, MemoryNetwork, MemoryOptions, MemoryServer};

fn check_sum(network: &MemoryNetwork) {
    actix_rt::System::new().block_on(async {
        let service = Microservice::new()
            .arbiters(2)
            .handlers(message("sum", |Data(numbers): Data<Vec<i64>>| async move {
                Ok::<_, RpcError>(numbers.iter().sum::<i64>())
            }))
            .server(MemoryServer::new(network))
            .start()
            .await
            .unwrap();
        assert_eq!(service.url(), network.url());
        let client = MemoryClient::new(network);
        assert_eq!(client.send::<i64>("sum", [1, 2, 3]).await.unwrap(), 6);
        assert!(matches!(client.send::<i64>("none", 1).await, Err(CallError::NoHandler { .. })));
        assert_eq!(client.status(), Some(ConnectionStatus::Connected));
        client.close().await;
        assert_eq!(client.occupied(), 0);
        let report = service.stop(Duration::from_secs(1)).await;
        assert!(report.clean, "{report:?}");
        assert_eq!(report.done(), 1);
    });
}

#[test]
fn a_service_answers_a_client_between_peers() {
    check_sum(&MemoryNetwork::new());
}

#[test]
fn a_service_answers_a_client_through_a_broker() {
    check_sum(&MemoryNetwork::broker());
    check_sum(&MemoryNetwork::with({
        let mut options = MemoryOptions::broker();
        options.settles = true;
        options
    }));
}
