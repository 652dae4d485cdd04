//! A batch that is sent again is answered again and run once.
//!
//! TDH.MNG.CREATE tells the two apart: run a second time it would find its page in use.

use std::time::Duration;

use mirror_proto::module::{Chain, EndSessionsRequest, ExecuteRequest, Seamcall};
use tdx_module_svc::config::Limits;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use crate::stream::open;
use crate::support::*;

#[tokio::test]
async fn a_number_seen_before_gets_its_recorded_answer() {
    let server = Server::start().await;
    let request = numbered("s", 1, vec![create()]);
    let first = execute(&mut server.client().await, request.clone())
        .await
        .unwrap();
    assert_success(&statuses_of(&first));

    // On another connection, by the other kind of call, over the other transport.
    let tcp = transport::connect(&server.tcp).await.unwrap();
    let mut client = Client::new(tcp);
    assert_eq!(execute(&mut client, request.clone()).await.unwrap(), first);
    let (sender, mut answers) = open(&mut client).await;
    sender.send(request.clone()).await.unwrap();
    assert_eq!(answers.next().await.unwrap().unwrap(), first);

    // Without a session it runs again, and finds the page in use.
    let again = execute(&mut client, batch(request.calls)).await.unwrap();
    assert!(statuses_of(&again)[0].is_error());
}

#[tokio::test]
async fn a_number_in_work_elsewhere_is_waited_for() {
    let server = Server::start().await;
    let (mut one, mut other) = (server.client().await, server.client().await);
    let request = numbered("s", 1, vec![create(), repeated(rdmd(PAGE), 1 << 19, 0, 0)]);
    let (first, second) = tokio::join!(
        execute(&mut one, request.clone()),
        execute(&mut other, request)
    );
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_success(&statuses_of(&first));
    assert_eq!(first, second);
}

#[tokio::test]
async fn a_batch_whose_caller_gave_up_is_recorded_all_the_same() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let request = numbered("s", 1, vec![create(), repeated(rdmd(PAGE), 1 << 19, 0, 0)]);
    let mut impatient = Request::new(request.clone());
    impatient.set_timeout(Duration::from_millis(5));
    // It may or may not have started: that is the caller's difficulty.
    let _ = client.execute(impatient).await;
    let answer = execute(&mut client, request).await.unwrap();
    assert_success(&statuses_of(&answer));
    assert_eq!(answer.results[1].completed, 1 << 19);
}

#[tokio::test]
async fn numbers_below_the_window_are_refused() {
    let server = Server::with(Limits {
        replay_window: 4,
        ..Limits::default()
    })
    .await;
    let mut client = server.client().await;
    for sequence in 1..=6 {
        execute(&mut client, numbered("s", sequence, vec![rdmd(TDR)]))
            .await
            .unwrap();
    }
    execute(&mut client, numbered("s", 3, vec![rdmd(TDR)]))
        .await
        .unwrap();
    let refusal = execute(&mut client, numbered("s", 2, vec![create()]))
        .await
        .unwrap_err();
    assert_eq!(refusal.code(), Code::FailedPrecondition);
    let info = refusal.get_details_error_info().unwrap();
    assert_eq!(info.reason, "BELOW_REPLAY_WINDOW");
    assert_eq!(info.metadata["lowest"], "3");
    assert_eq!(pages_in_use(&mut client, "PT_TDR").await, 0);
}

#[tokio::test]
async fn answers_that_nobody_acknowledges_take_no_more_than_they_may() {
    let server = Server::with(Limits {
        // Two answers of eight calls.
        max_session_replay_bytes: 1500,
        ..Limits::default()
    })
    .await;
    let mut client = server.client().await;
    let calls = || vec![rdmd(TDR); 8];
    let first = execute(&mut client, numbered("s", 1, calls()))
        .await
        .unwrap();
    execute(&mut client, numbered("s", 2, calls()))
        .await
        .unwrap();
    let mut third = numbered("s", 3, [vec![create()], calls()].concat());
    let refusal = execute(&mut client, third.clone()).await.unwrap_err();
    assert_eq!(refusal.code(), Code::ResourceExhausted);
    assert!(refusal.message().contains("of 1500 bytes"), "{refusal}");
    let details = refusal.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "REPLAY_FULL");
    assert!(details.retry_info().unwrap().retry_delay.is_some());
    assert_eq!(pages_in_use(&mut client, "PT_TDR").await, 0);
    // Nothing was dropped for it.
    let again = execute(&mut client, numbered("s", 1, calls()))
        .await
        .unwrap();
    assert_eq!(again, first);

    third.acknowledged = 1;
    let answer = execute(&mut client, third.clone()).await.unwrap();
    assert_success(&statuses_of(&answer)[..1]);
    assert_eq!(execute(&mut client, third).await.unwrap(), answer);
    let refusal = execute(&mut client, numbered("s", 1, calls()))
        .await
        .unwrap_err();
    let info = refusal.get_details_error_info().unwrap();
    assert_eq!(
        (&*info.reason, &*info.metadata["lowest"]),
        ("BELOW_REPLAY_WINDOW", "2")
    );

    let mut early = numbered("s", 4, calls());
    early.acknowledged = 4;
    let refusal = execute(&mut client, early).await.unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);
    assert!(
        refusal.message().starts_with("acknowledged: 4"),
        "{refusal}"
    );
}

#[tokio::test]
async fn one_number_for_two_batches_is_refused() {
    let server = Server::start().await;
    let mut client = server.client().await;
    execute(&mut client, numbered("s", 1, vec![rdmd(TDR)]))
        .await
        .unwrap();
    let refusal = execute(&mut client, numbered("s", 1, vec![create()]))
        .await
        .unwrap_err();
    assert_eq!(refusal.code(), Code::AlreadyExists);
    assert_eq!(
        refusal.get_details_error_info().unwrap().reason,
        "SEQUENCE_REUSED"
    );
    assert_eq!(pages_in_use(&mut client, "PT_TDR").await, 0);
    // Another session counts for itself.
    let other = execute(&mut client, numbered("other", 1, vec![create()]))
        .await
        .unwrap();
    assert_success(&statuses_of(&other));
}

#[tokio::test]
async fn a_session_of_an_earlier_instance_is_not_known() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let request = ExecuteRequest {
        sequence: 8,
        ..numbered("s", 8, vec![create()])
    };
    let refusal = execute(&mut client, request).await.unwrap_err();
    assert_eq!(refusal.code(), Code::NotFound);
    let info = refusal.get_details_error_info().unwrap();
    assert_eq!(info.reason, "UNKNOWN_SESSION");
    assert_eq!(
        info.metadata["instance"],
        platform(&mut client).await.instance
    );
    assert_eq!(pages_in_use(&mut client, "PT_TDR").await, 0);
}

#[tokio::test]
async fn the_sessions_of_a_caller_that_is_gone_end_for_good() {
    let server = Server::start().await;
    let (mut gone, mut next) = (server.client().await, server.client().await);
    let long = repeated(rdmd(PAGE), 1 << 19, 0, 0);
    let (sender, mut answers) = open(&mut gone).await;
    let first = numbered("caller-1-s0", 1, vec![create(), long]);
    sender.send(first).await.unwrap();
    let beside = numbered("caller-2-s0", 1, vec![rdmd(PAGE)]);
    execute(&mut next, beside).await.unwrap();

    let end = |prefix: &str| EndSessionsRequest {
        prefix: prefix.to_owned(),
    };
    let ended = next.end_sessions(end("caller-1-")).await.unwrap();
    let ended = ended.into_inner();
    assert_eq!(ended.instance, platform(&mut next).await.instance);
    // Whether its first batch had arrived by then or came too late: it runs now or never.
    let made = pages_in_use(&mut next, "PT_TDR").await;
    assert_eq!(made, u64::from(ended.sessions), "{ended:?}");
    let late = numbered("caller-1-s0", 2, vec![create()]);
    let _ = sender.send(late).await;
    let refusal = loop {
        match answers.next().await.unwrap() {
            Ok(answer) => assert_eq!(answer.sequence, 1),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!(refusal.code(), Code::NotFound);
    let info = refusal.get_details_error_info().unwrap();
    assert_eq!(info.reason, "UNKNOWN_SESSION");
    let new = execute(&mut gone, numbered("caller-1-s1", 1, vec![create()])).await;
    assert_eq!(new.unwrap_err().code(), Code::NotFound);
    assert_eq!(pages_in_use(&mut next, "PT_TDR").await, made);
    let beside = numbered("caller-2-s0", 2, vec![rdmd(PAGE)]);
    execute(&mut next, beside).await.unwrap();

    for prefix in ["", "caller", &*"x".repeat(65)] {
        let refusal = next.end_sessions(end(prefix)).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument, "{prefix}");
    }
}

#[tokio::test]
async fn a_link_runs_behind_a_whole_one_and_a_broken_chain_runs_nothing() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let link = |sequence, id, link, calls| ExecuteRequest {
        chain: Some(Chain { id, link }),
        ..numbered("s", sequence, calls)
    };
    let reads = |count| vec![rdmd(PAGE); count];
    let bad = || vec![rdmd(PAGE), unknown(), rdmd(PAGE)];
    let mut requests = Vec::new();
    let mut expected = Vec::new();
    for (id, at, calls, ran) in [
        (7, 0, reads(2), 2),
        (7, 1, reads(3), 3),
        // One that is left out breaks the chain for those behind it, wherever they say they are.
        (7, 3, reads(1), 0),
        (7, 2, bad(), 3),
        (7, 3, reads(1), 0),
        (7, 4, reads(1), 0),
        (8, 1, reads(1), 0),
        (8, 0, reads(1), 1),
        (8, 1, reads(1), 1),
    ] {
        let sequence = requests.len() as u64 + 1;
        requests.push(link(sequence, id, at, calls));
        expected.push(ran);
    }
    // Twice: an answer that is told again is the same.
    for _ in 0..2 {
        let answers = client.execute_stream(tokio_stream::iter(requests.clone()));
        let answers = answers.await.unwrap().into_inner();
        let ran: Vec<usize> = answers
            .map(|answer| answer.unwrap().results.len())
            .collect()
            .await;
        assert_eq!(ran, expected);
    }
    let alone = ExecuteRequest {
        chain: Some(Chain { id: 1, link: 0 }),
        ..batch(reads(1))
    };
    let refusal = execute(&mut client, alone).await.unwrap_err();
    assert!(refusal.message().starts_with("chain: "), "{refusal}");
}

/// A call that ends with an error.
fn unknown() -> Seamcall {
    Seamcall {
        leaf: 63,
        ..Seamcall::default()
    }
}
