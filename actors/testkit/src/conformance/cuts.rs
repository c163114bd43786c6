// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cut lines: every call hears what became of it, nothing hangs, everything comes back.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use martlet_core::backoff::BackoffOptions;
use martlet_core::{
    CallError, Cancellation, ClientOptions, ConnectionStatus, Data, EmitOptions, Microservice, RpcError,
    event, message,
};

use super::calls::slow;
use super::{Harness, Names, Stage, eventually, ok, small};

/// A stage whose ends come back soon after a cut.
async fn quick<H: Harness>(
    harness: H,
    service: Microservice,
    client: impl FnOnce(&mut ClientOptions),
) -> Stage<H> {
    let pause = BackoffOptions::between(Duration::from_millis(5), Duration::from_millis(50));
    Stage::with(
        harness,
        service,
        |server| server.retry_delay = pause,
        |options| {
            options.retry_delay = pause;
            client(options);
        },
    )
    .await
}

/// A call that was sent may have run: it ends as lost, at once.
pub async fn a_cut_ends_calls_under_way_as_lost<H: Harness>(harness: H) {
    let names = Names::new();
    let running = Arc::new(AtomicUsize::new(0));
    let run = Arc::clone(&running);
    let stuck = message(names.of("stuck"), move || {
        run.fetch_add(1, Ordering::SeqCst);
        std::future::pending::<Result<(), RpcError>>()
    });
    let mut stage = Stage::new(harness, small().handlers(stuck)).await;
    let calls = futures::future::join_all((0..20).map(|_| stage.client.send::<()>(names.of("stuck"), 1)));
    let stream = stage.client.send::<()>(names.of("stuck"), 1).stream().collect_all();
    let harness = &mut stage.harness;
    let (results, streamed, ()) = futures::join!(calls, stream, async {
        eventually("all are under way", || running.load(Ordering::SeqCst) == 21).await;
        harness.cut();
    });
    for result in results {
        assert!(matches!(result, Err(CallError::Lost { .. })), "{result:?}");
    }
    assert!(matches!(streamed, Err(CallError::Lost { .. })), "{streamed:?}");
    assert_eq!(stage.client.occupied(), 0);
    stage.client.close().await;
    let report = stage.service.stop(Duration::from_millis(100)).await;
    assert_eq!(report.lost() + report.handed_back() + report.abandoned().count() as u64, 21, "{report:?}");
}

/// With nobody to take it, a call ends as not sent: its handler has certainly not run.
pub async fn a_refused_connection_ends_calls_as_not_sent<H: Harness>(harness: H) {
    let names = Names::new();
    let mut stage =
        quick(harness, small().handlers(slow(names.of("slow"))), |client| client.reconnect = false).await;
    stage.harness.set_reachable(false);
    let calls = (0..10).map(|_| stage.client.send::<u64>(names.of("slow"), 1));
    for result in futures::future::join_all(calls).await {
        let Err(error @ CallError::NotSent { .. }) = result else {
            panic!("not sent expected, got {result:?}")
        };
        assert!(error.is_not_sent());
    }
    assert!(matches!(stage.client.emit(names.of("slow"), 1).await, Err(CallError::NotSent { .. })));
    assert!(matches!(stage.client.connect().await, Err(CallError::NotSent { .. })));
    assert_eq!(stage.client.status(), Some(ConnectionStatus::Disconnected));
    stage.harness.set_reachable(true);
    back(&stage, names).await;
    stage.end().await;
}

/// Waits until calls are answered again.
async fn back<H: Harness>(stage: &Stage<H>, names: Names) {
    for _ in 0..1000 {
        let call = stage.client.send::<u64>(names.of("slow"), 0).timeout(Duration::from_secs(1));
        if call.await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("calls are answered again");
}

/// A call declared idempotent survives the cut of its line; one that is not ends.
pub async fn an_idempotent_call_is_sent_again<H: Harness>(harness: H) {
    let names = Names::new();
    let running = Arc::new(AtomicUsize::new(0));
    let run = Arc::clone(&running);
    let third = message(names.of("third"), move |Data(number): Data<u64>| {
        let before = run.fetch_add(1, Ordering::SeqCst);
        async move {
            if before < 2 {
                std::future::pending::<()>().await;
            }
            ok(number)
        }
    });
    let mut stage = quick(harness, small().handlers(third), |client| {
        client.retry_attempts = 20;
    })
    .await;
    // Where nobody says that nobody is there, the call may be lost before the server is back.
    let features = stage.harness.features();
    let limit = Duration::from_secs(if features.says_nobody { 30 } else { 3 });
    let call = stage.client.send::<u64>(names.of("third"), 5).idempotent().timeout(limit);
    let (harness, server) = (&mut stage.harness, stage.service.servers().remove(0));
    let cutting = async {
        for cut in 1..=2 {
            eventually("it is under way", || running.load(Ordering::SeqCst) >= cut).await;
            harness.cut();
            eventually("the server is back", || server.status() == Some(ConnectionStatus::Connected)).await;
        }
        std::future::pending::<()>().await;
    };
    let result = tokio::select! {
        result = call => result,
        () = cutting => unreachable!("it cuts until the call has ended"),
    };
    match result {
        Ok(reply) => assert_eq!(reply, 5),
        // A broker that lost the server's subscription for a moment reports that nobody is there.
        Err(CallError::NoHandler { .. }) if features.subscribes => {}
        Err(CallError::Timeout { .. }) if !features.says_nobody => {}
        Err(other) => panic!("{other}"),
    }
    assert_eq!(stage.client.occupied(), 0);
    stage.client.close().await;
    stage.service.stop(Duration::from_millis(50)).await;
}

/// With `reconnect` the line is made anew at once, and the status stream tells every step.
pub async fn a_client_reconnects_and_its_status_says_so<H: Harness>(harness: H) {
    use ConnectionStatus::{Closed, Connected, Connecting, Reconnecting};
    let names = Names::new();
    let mut stage = quick(harness, small().handlers(slow(names.of("slow"))), |client| {
        client.reconnect = true;
        client.retry_attempts = 100;
    })
    .await;
    let mut status = stage.client.status_stream();
    stage.client.connect().await.unwrap();
    assert_eq!(status.next().await, Some(Connecting));
    assert_eq!(status.next().await, Some(Connected));
    for _ in 0..3 {
        stage.harness.cut();
        assert_eq!(status.next().await, Some(Reconnecting));
        assert_eq!(status.next().await, Some(Connected));
        back(&stage, names).await;
    }
    stage.end().await;
    assert_eq!(status.next().await, Some(Closed));
}

/// `retry_attempts`: a call waits for a server that is not there yet.
pub async fn retries_reach_a_server_that_comes_late<H: Harness>(harness: H) {
    let names = Names::new();
    let mut stage = quick(harness, small().handlers(slow(names.of("slow"))), |client| {
        client.retry_attempts = 100;
    })
    .await;
    let features = stage.harness.features();
    stage.harness.set_reachable(false);
    let limit = Duration::from_secs(if features.says_nobody { 30 } else { 3 });
    let call = stage.client.send::<u64>(names.of("slow"), 1).timeout(limit);
    let harness = &mut stage.harness;
    let (result, ()) = futures::join!(call, async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        harness.set_reachable(true);
    });
    match result {
        Ok(reply) => assert_eq!(reply, 1),
        Err(CallError::NoHandler { .. }) if features.subscribes => {}
        Err(CallError::Timeout { .. }) if !features.says_nobody => {}
        Err(other) => panic!("{other}"),
    }
    back(&stage, names).await;
    stage.end().await;
}

/// An event that waits for a connection waits as long as it is told, not as long as the client's other calls.
pub async fn an_event_has_a_timeout_of_its_own<H: Harness>(harness: H) {
    let names = Names::new();
    let mut stage = quick(harness, small().handlers(slow(names.of("slow"))), |client| {
        client.timeout = Some(Duration::from_millis(300));
        client.reconnect = true;
        client.retry_attempts = 100_000;
    })
    .await;
    stage.harness.set_reachable(false);
    let emit = |options: EmitOptions| stage.client.emit_with(names.of("evt"), 1, options);
    let limit = Duration::from_millis(20);
    let (own, others, none) = futures::join!(
        emit(EmitOptions::new().timeout(limit)),
        emit(EmitOptions::new()),
        tokio::time::timeout(Duration::from_millis(600), emit(EmitOptions::new().no_timeout())),
    );
    assert!(matches!(own, Err(CallError::Timeout { after }) if after == limit), "{own:?}");
    let clients = Duration::from_millis(300);
    assert!(matches!(others, Err(CallError::Timeout { after }) if after == clients), "{others:?}");
    assert!(none.is_err(), "{none:?}");
    stage.harness.set_reachable(true);
    back(&stage, names).await;
    stage.end().await;
}

/// Cuts at random moments under load: each call has one outcome, no slot stays, the service serves on.
pub async fn a_storm_of_cuts_gives_every_call_one_outcome<H: Harness>(harness: H) {
    const CALLS: u64 = 3000;
    let names = Names::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let run = Arc::clone(&ran);
    let echo = message(names.of("echo"), move |Data(number): Data<u64>| {
        run.fetch_add(1, Ordering::Relaxed);
        async move {
            if number % 2 == 0 {
                tokio::time::sleep(Duration::from_millis(number % 5)).await;
            }
            ok(number)
        }
    });
    let service = Microservice::new().arbiters(2).handlers(echo).handlers(slow(names.of("slow")));
    let mut stage = quick(harness, service, |client| {
        client.reconnect = true;
        client.retry_attempts = 3;
        client.timeout = Some(Duration::from_secs(2));
    })
    .await;
    let client = stage.client.clone();
    let (answered, failed) = (Cell::new(0), Cell::new(0));
    let over = || answered.get() + failed.get() == CALLS;
    let calls = stream::iter(0..CALLS)
        .map(|number| {
            let call = client.send::<u64>(names.of("echo"), number);
            if number % 3 == 0 { call.idempotent() } else { call }
        })
        .map(async |call| match call.await {
            Ok(_) => answered.set(answered.get() + 1),
            Err(
                CallError::Lost { .. }
                | CallError::NotSent { .. }
                | CallError::NoHandler { .. }
                | CallError::Timeout { .. },
            ) => {
                failed.set(failed.get() + 1);
                // Calls that fail at once do not use up the storm while nothing is there.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(other) => panic!("unexpected outcome {other}"),
        })
        .buffer_unordered(50)
        .collect::<Vec<()>>();
    let harness = &mut stage.harness;
    let cutting = async {
        let mut cuts = 0;
        while !over() {
            // Between two cuts some calls are answered, however slow the machine is.
            let (before, begin) = (answered.get(), Instant::now());
            let pause = Duration::from_millis(20 + cuts % 7);
            while !over() && begin.elapsed() < Duration::from_secs(1) {
                if begin.elapsed() >= pause && answered.get() >= before + 50 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            harness.cut();
            cuts += 1;
        }
        cuts
    };
    let (ends, cuts) = futures::join!(calls, cutting);
    let (answered, failed) = (answered.get(), failed.get());
    assert_eq!((answered + failed, ends.len() as u64), (CALLS, CALLS));
    assert!(cuts > 1 && answered > CALLS / 10, "{cuts} cuts, {answered} answered");
    assert_eq!(stage.client.occupied(), 0);
    back(&stage, names).await;
    eventually("nothing runs any more", || stage.client.pending() == 0).await;
    stage.end().await;
}

/// A handler's token tells when its caller's connection is cut.
pub async fn a_cut_cancels_the_handlers_work<H: Harness>(harness: H) {
    let names = Names::new();
    let (told, mut tell) = tokio::sync::mpsc::unbounded_channel();
    let group = message(names.of("works"), move |token: Cancellation| {
        let told = told.clone();
        async move {
            told.send("begun").unwrap();
            token.cancelled().await;
            told.send("cancelled").unwrap();
            ok(())
        }
    });
    let mut stage = Stage::new(harness, small().handlers(group)).await;
    let call = stage.client.send::<()>(names.of("works"), 1);
    let harness = &mut stage.harness;
    let (result, ()) = futures::join!(call, async {
        assert_eq!(tell.recv().await, Some("begun"));
        harness.cut();
        assert_eq!(tell.recv().await, Some("cancelled"));
    });
    assert!(matches!(result, Err(CallError::Lost { .. })), "{result:?}");
    stage.client.close().await;
    stage.service.stop(Duration::from_millis(100)).await;
}

/// Events that are awaited while lines are cut: each is sent, not sent or lost, none is left over, and what was not sent
/// does not run. A transporter may carry an event over to the next session, but not for ever.
pub async fn events_over_cuts_have_one_outcome_each<H: Harness>(harness: H) {
    const EVENTS: usize = 1000;
    let names = Names::new();
    let ran: Arc<Vec<AtomicUsize>> = Arc::new((0..EVENTS).map(|_| AtomicUsize::new(0)).collect());
    let note = Arc::clone(&ran);
    let noted = event(names.of("noted"), move |Data(number): Data<usize>| {
        note[number].fetch_add(1, Ordering::SeqCst);
    });
    let mut stage = quick(harness, small().handlers(noted).handlers(slow(names.of("slow"))), |client| {
        client.reconnect = true;
        client.retry_attempts = 100;
    })
    .await;
    back(&stage, names).await;
    let ended = AtomicUsize::new(0);
    let emitting = stream::iter(0..EVENTS)
        .map(|number| {
            let (event, ended) = (stage.client.emit(names.of("noted"), number), &ended);
            async move {
                let result = event.await;
                ended.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
                (number, result)
            }
        })
        .buffer_unordered(50)
        .collect::<Vec<_>>();
    let harness = &mut stage.harness;
    let (results, ()) = futures::join!(emitting, async {
        for cut in 1..=5 {
            eventually("events end", || ended.load(Ordering::SeqCst) >= cut * EVENTS / 6).await;
            harness.cut();
        }
    });
    back(&stage, names).await;
    assert!(results.iter().any(|(_, result)| result.is_ok()));
    for (number, result) in results {
        match result {
            Ok(()) | Err(CallError::Lost { .. }) => {}
            Err(error) if error.is_not_sent() => {
                assert_eq!(ran[number].load(Ordering::SeqCst), 0, "{number}: {error}");
            }
            Err(other) => panic!("{number}: {other:?}"),
        }
    }
    stage.end().await;
}
