// SPDX-License-Identifier: MIT OR Apache-2.0
//! Listening sockets that fail: bound again after the pause, as often as allowed; then the service stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::FutureExt;
use martlet_core::backoff::BackoffOptions;
use martlet_core::supervise::ChildState;
use martlet_core::transport::{Accept, Listen};
use martlet_core::{
    CallError, ClientProxy, ConnectionStatus, Data, Microservice, RunningService, Server, ServerOptions,
    ServiceReport, SessionError, StartError, TransportInfo, message,
};
use martlet_testkit::memory::{MemoryBound, MemoryClient, MemoryListen, MemoryNetwork, MemoryPeer};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::support::{log, ms, ok, paused};

/// What is done to a listener, and what it did.
#[derive(Default)]
struct Socket {
    /// Ends what is bound now.
    fail: Notify,
    /// Binding fails.
    taken: AtomicBool,
    /// When it was tried to bind it.
    bound: Mutex<Vec<Instant>>,
}

/// Listens in memory; accepting and binding fail when told to.
struct Fragile {
    inner: MemoryListen,
    socket: Arc<Socket>,
}

struct FragileBound {
    inner: MemoryBound,
    socket: Arc<Socket>,
}

impl Listen for Fragile {
    type Bound = FragileBound;

    fn info(&self) -> TransportInfo {
        self.inner.info()
    }

    async fn bind(&self) -> Result<FragileBound, SessionError> {
        self.socket.bound.lock().push(Instant::now());
        if self.socket.taken.load(Ordering::SeqCst) {
            return Err(SessionError::fatal("the address is taken"));
        }
        // It refuses a second listener: the failed one must be gone by now.
        Ok(FragileBound { inner: self.inner.bind().await?, socket: Arc::clone(&self.socket) })
    }
}

impl Accept for FragileBound {
    type Peer = MemoryPeer;

    fn local_url(&self) -> String {
        self.inner.local_url()
    }

    async fn accept(&mut self) -> Result<MemoryPeer, SessionError> {
        tokio::select! {
            peer = self.inner.accept() => peer,
            () = self.socket.fail.notified() => Err(SessionError::lost("the socket failed")),
        }
    }
}

fn server(network: &MemoryNetwork, socket: &Arc<Socket>, attempts: Option<u32>) -> Server {
    let mut options = ServerOptions::default();
    options.retry_attempts = attempts;
    options.retry_delay = BackoffOptions::fixed(ms(100));
    Server::listen(Fragile { inner: MemoryListen::new(network), socket: Arc::clone(socket) }, options)
}

/// A service that echoes after so many milliseconds, and what it ends with.
struct Stage {
    network: MemoryNetwork,
    socket: Arc<Socket>,
    service: RunningService,
    run: JoinHandle<ServiceReport>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Stage {
    async fn start(attempts: Option<u32>) -> Self {
        let (network, socket) = (MemoryNetwork::new(), Arc::new(Socket::default()));
        let echo = message("echo", |Data(millis): Data<u64>| async move {
            tokio::time::sleep(ms(millis)).await;
            ok(millis)
        });
        let service = Microservice::new()
            .on_current_arbiter()
            .grace_period(ms(1000))
            .handlers(echo)
            .server(server(&network, &socket, attempts))
            .start()
            .await
            .unwrap();
        let (running, log) = (service.clone(), log(service.events()));
        let run =
            actix_rt::spawn(
                async move { running.run_until(std::future::pending::<String>()).await.unwrap() },
            );
        Self { network, socket, service, run, log }
    }

    fn client(&self) -> ClientProxy {
        MemoryClient::new(&self.network)
    }

    async fn reaches(&self, wanted: ConnectionStatus) {
        assert!(self.service.servers()[0].status_cell().wait_for(wanted).await);
    }

    /// The listening socket fails now.
    async fn fail(&self) {
        self.socket.fail.notify_one();
        self.reaches(ConnectionStatus::Disconnected).await;
    }

    fn bound(&self) -> usize {
        self.socket.bound.lock().len()
    }

    fn listener(&self) -> (ChildState, u64, Option<String>) {
        let tree = self.service.tree();
        let listener = tree.find("memory").unwrap();
        (listener.state, listener.restarts, listener.last_cause.clone())
    }
}

#[test]
fn a_listening_socket_that_fails_is_bound_again_after_the_pause() {
    paused(async {
        let stage = Stage::start(Some(2)).await;
        let old = stage.client();
        assert_eq!(old.send::<u64>("echo", 0).await.unwrap(), 0);
        assert_eq!(stage.listener(), (ChildState::Running, 0, None));

        let failed = Instant::now();
        let under_way = old.send::<u64>("echo", 50);
        let (under_way, ()) = futures::join!(under_way, stage.fail());
        assert_eq!(under_way.unwrap(), 50, "who is connected is not disturbed");
        let cause = Some("the socket failed".to_owned());
        assert_eq!(stage.listener(), (ChildState::Restarting, 0, cause.clone()));
        assert_eq!(*stage.log.lock(), ["session: memory session ended: the socket failed"]);

        tokio::time::sleep_until(failed + ms(99)).await;
        assert_eq!(old.send::<u64>("echo", 0).await.unwrap(), 0);
        let new = stage.client();
        let refused = new.send::<u64>("echo", 0).await;
        assert!(matches!(refused, Err(CallError::NotSent { .. })), "nobody listens: {refused:?}");
        assert_eq!(stage.bound(), 1);

        stage.reaches(ConnectionStatus::Connected).await;
        let pause = stage.socket.bound.lock()[1] - failed;
        assert!(pause >= ms(100) && pause <= ms(102), "{pause:?}");
        assert_eq!(stage.listener(), (ChildState::Running, 1, cause));
        assert_eq!(new.send::<u64>("echo", 0).await.unwrap(), 0);
        assert_eq!(old.send::<u64>("echo", 0).await.unwrap(), 0);

        assert!(!stage.run.is_finished(), "the service goes on");
        old.close().await;
        new.close().await;
        let report = stage.service.stop(ms(1000)).await;
        assert!(report.clean, "{report:?}");
        assert_eq!(stage.bound(), 2);
    });
}

#[test]
fn a_listening_socket_is_bound_again_as_often_as_allowed_then_the_service_reports_and_stops() {
    for (attempts, allowed) in [(None, 0), (Some(0), 0), (Some(1), 1), (Some(3), 3)] {
        paused(async move {
            let mut stage = Stage::start(attempts).await;
            for again in 1..=allowed {
                stage.fail().await;
                stage.reaches(ConnectionStatus::Connected).await;
                // Over the server's life, however long it works in between.
                tokio::time::sleep(ms(100_000)).await;
                assert_eq!((stage.bound(), stage.listener().1), (again + 1, again as u64));
            }
            assert!(!stage.run.is_finished());
            let began = Instant::now();
            stage.fail().await;
            let report = (&mut stage.run).await.unwrap();
            assert!(began.elapsed() < ms(100), "without one more pause: {:?}", began.elapsed());
            assert_eq!((report.clean, &*report.cause), (false, "memory: the socket failed"));
            assert_eq!(stage.bound(), allowed + 1);
            let ended = stage.service.servers()[0].status();
            assert_eq!(ended, Some(ConnectionStatus::Disconnected));
            let cause = Some("the socket failed".to_owned());
            assert_eq!(stage.listener(), (ChildState::Failed, allowed as u64, cause));
            let mut expected = vec!["session: memory session ended: the socket failed"; allowed + 1];
            expected.push("gave_up: memory gave up: the socket failed");
            assert_eq!(*stage.log.lock(), expected);
        });
    }
}

#[test]
fn an_attempt_to_bind_that_fails_counts_as_one_and_the_next_comes_after_the_pause() {
    paused(async {
        let mut stage = Stage::start(Some(3)).await;
        stage.socket.taken.store(true, Ordering::SeqCst);
        let failed = Instant::now();
        stage.fail().await;
        let report = (&mut stage.run).await.unwrap();
        assert_eq!((report.clean, &*report.cause), (false, "memory: the address is taken"));
        let after: Vec<_> =
            stage.socket.bound.lock()[1..].iter().map(|at| (*at - failed).as_millis()).collect();
        assert_eq!(after.len(), 3);
        for (after, expected) in after.into_iter().zip([100, 200, 300]) {
            assert!((expected..expected + 5).contains(&after), "{after} ms for {expected} ms");
        }

        // One that succeeds in time ends it.
        let stage = Stage::start(Some(3)).await;
        stage.socket.taken.store(true, Ordering::SeqCst);
        stage.fail().await;
        tokio::time::sleep(ms(250)).await;
        stage.socket.taken.store(false, Ordering::SeqCst);
        stage.reaches(ConnectionStatus::Connected).await;
        assert_eq!(stage.bound(), 4);
        let client = stage.client();
        assert_eq!(client.send::<u64>("echo", 0).await.unwrap(), 0);
        client.close().await;
        assert!(stage.service.stop(ms(1000)).await.clean);
    });
}

#[test]
fn a_first_bind_that_fails_is_a_start_error_at_once_whatever_is_allowed() {
    paused(async {
        let socket = Arc::new(Socket::default());
        socket.taken.store(true, Ordering::SeqCst);
        let server = server(&MemoryNetwork::new(), &socket, Some(5));
        let began = Instant::now();
        let started = Microservice::new().on_current_arbiter().server(server).start().await;
        match started {
            Err(StartError::Transport { cause, .. }) => assert_eq!(cause.to_string(), "the address is taken"),
            other => panic!("a start error expected, got {other:?}"),
        }
        assert!(began.elapsed() < ms(100), "{:?}", began.elapsed());
        assert_eq!(socket.bound.lock().len(), 1);
    });
}

#[test]
fn a_service_that_stops_during_the_pause_binds_no_more_and_drains_its_peers() {
    paused(async {
        let stage = Stage::start(Some(5)).await;
        let client = stage.client();
        assert_eq!(client.send::<u64>("echo", 0).await.unwrap(), 0);
        let call = client.send::<u64>("echo", 50);
        let (reply, report) = futures::join!(call, async {
            stage.fail().await;
            stage.service.stop(ms(1000)).await
        });
        assert_eq!(reply.unwrap(), 50);
        assert!(report.clean, "{report:?}");
        assert_eq!(stage.service.servers()[0].status(), Some(ConnectionStatus::Closed));
        tokio::time::sleep(ms(1000)).await;
        assert_eq!(stage.bound(), 1);
        client.close().await;
    });
}

#[test]
fn a_service_whose_listener_gave_up_still_drains_its_peers() {
    paused(async {
        let mut stage = Stage::start(None).await;
        let client = stage.client();
        assert_eq!(client.send::<u64>("echo", 0).await.unwrap(), 0);
        let (begun, call) = (Instant::now(), client.send::<u64>("echo", 500));
        let (reply, report) = futures::join!(call, async {
            stage.fail().await;
            (&mut stage.run).await.unwrap()
        });
        assert_eq!(reply.unwrap(), 500, "it was taken before");
        assert!(begun.elapsed() < ms(1000), "{:?}", begun.elapsed());
        assert_eq!((report.cause.as_str(), report.done()), ("memory: the socket failed", 2));
        assert_eq!(client.status_cell().wait_for(ConnectionStatus::Disconnected).now_or_never(), Some(true));
        client.close().await;

        // What cannot be finished in time is abandoned and reported.
        let mut stage = Stage::start(None).await;
        let client = stage.client();
        assert_eq!(client.send::<u64>("echo", 0).await.unwrap(), 0);
        let call = client.send::<u64>("echo", 5000);
        let (reply, report) = futures::join!(call, async {
            stage.fail().await;
            (&mut stage.run).await.unwrap()
        });
        assert!(reply.is_err(), "{reply:?}");
        assert_eq!(report.abandoned().count(), 1, "{report:?}");
        client.close().await;
    });
}
