//! `ExecuteStream`: pipelined, in order, ended by what cannot be answered.

use mirror_proto::module::{ExecuteRequest, ExecuteResponse, Seamcall};
use tdx_module_svc::config::Limits;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::support::*;

/// An open stream: what is sent goes out, answers come in.
pub(crate) async fn open(
    client: &mut Client,
) -> (mpsc::Sender<ExecuteRequest>, Streaming<ExecuteResponse>) {
    let (sender, requests) = mpsc::channel(1);
    let answers = client
        .execute_stream(ReceiverStream::new(requests))
        .await
        .unwrap();
    (sender, answers.into_inner())
}

#[tokio::test]
async fn pipelined_batches_run_and_are_answered_in_order() {
    let server = Server::start().await;
    let mut client = server.client().await;
    // Each batch needs the one before; more of them than the stream holds answers for.
    let mut batches = vec![create()];
    batches.extend(build());
    batches.extend((0..200).map(|page| aug(page * 0x1000, PAGE + page * 0x1000)));
    let count = batches.len();
    let requests: Vec<_> = batches
        .into_iter()
        .zip(1..)
        .map(|(call, sequence)| numbered("pipelined", sequence, vec![call]))
        .collect();

    let answers = client
        .execute_stream(tokio_stream::iter(requests))
        .await
        .unwrap()
        .into_inner();
    let answers: Vec<_> = answers.map(Result::unwrap).collect().await;
    assert_eq!(answers.len(), count);
    for (answer, sequence) in answers.iter().zip(1..) {
        assert_eq!(answer.sequence, sequence);
        assert_success(&statuses_of(answer));
    }
}

#[tokio::test]
async fn a_caller_that_does_not_read_is_not_served_without_end() {
    /// Batches, and round trips in which a service without a bound would have run them all.
    const BATCHES: u64 = 64;
    let server = Server::with(Limits {
        max_in_flight: 2,
        ..Limits::default()
    })
    .await;
    let mut client = server.client().await;
    let mut setup = vec![create()];
    setup.extend(build());
    assert_success(&statuses(&mut client, setup).await);

    // Each batch maps a page, and its answer fills a good part of the windows on the way back.
    let (sender, answers) = open(&mut client).await;
    let feeder = tokio::spawn(async move {
        for page in 0..BATCHES {
            let mut calls = vec![unknown_leaf(); 4000];
            calls.push(aug(page * 0x1000, PAGE + page * 0x1000));
            sender
                .send(ExecuteRequest {
                    sequence: page,
                    ..batch(calls)
                })
                .await
                .unwrap();
        }
    });
    for _ in 0..BATCHES * 4 {
        assert!(
            pages_in_use(&mut client, "PT_REG").await < BATCHES,
            "nothing held the module up"
        );
    }
    let answers: Vec<_> = answers.map(Result::unwrap).collect().await;
    assert!(answers.iter().map(|answer| answer.sequence).eq(0..BATCHES));
    assert_eq!(pages_in_use(&mut client, "PT_REG").await, BATCHES);
    feeder.await.unwrap();
}

/// A call that is answered with the registers it came with.
fn unknown_leaf() -> Seamcall {
    let all = u64::MAX;
    Seamcall {
        leaf: 63,
        rcx: all,
        rdx: all,
        r8: all,
        r9: all,
        ..Seamcall::default()
    }
}

#[tokio::test]
async fn a_malformed_batch_ends_the_stream_and_not_those_before_it() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let requests = [
        numbered("s", 1, vec![create()]),
        ExecuteRequest {
            lp: 4,
            ..numbered("s", 2, build())
        },
        numbered("s", 3, vec![rdmd(TDR)]),
    ];
    let mut answers = client
        .execute_stream(tokio_stream::iter(requests))
        .await
        .unwrap()
        .into_inner();
    assert_success(&statuses_of(&answers.next().await.unwrap().unwrap()));
    let refusal = answers.next().await.unwrap().unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);
    assert!(
        refusal.message().starts_with("lp: "),
        "{}",
        refusal.message()
    );
    assert!(answers.next().await.is_none());
    assert_eq!(pages_in_use(&mut client, "PT_TDCX").await, 0);
}

#[tokio::test]
async fn what_is_read_while_a_long_batch_runs_is_answered_behind_it() {
    const PAGES: u64 = 10;
    let server = Server::start().await;
    let mut client = server.client().await;
    // Long enough for a thread of its own.
    let measured = |first: u64| {
        (first..first + PAGES)
            .flat_map(|page| {
                let gpa = page * 0x1000;
                [add(gpa, PAGE + page * 0x1000), extend(gpa)]
            })
            .collect()
    };
    let requests = [
        numbered("s", 1, vec![create()]),
        numbered("s", 2, build()),
        numbered("s", 3, measured(0)),
        numbered("s", 4, measured(PAGES)),
        ExecuteRequest {
            lp: 4,
            ..numbered("s", 5, measured(2 * PAGES))
        },
        numbered("s", 6, measured(3 * PAGES)),
    ];
    let mut answers = client
        .execute_stream(tokio_stream::iter(requests))
        .await
        .unwrap()
        .into_inner();
    for sequence in 1..=4 {
        let answer = answers.next().await.unwrap().unwrap();
        assert_eq!(answer.sequence, sequence);
        assert_success(&statuses_of(&answer));
    }
    let refusal = answers.next().await.unwrap().unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);
    assert!(answers.next().await.is_none());
    assert_eq!(pages_in_use(&mut client, "PT_REG").await, 2 * PAGES);
}

#[tokio::test]
async fn streams_run_beside_each_other() {
    let server = Server::start().await;
    let mut first = server.client().await;
    let mut second = server.client().await;
    let (to_first, mut from_first) = open(&mut first).await;
    let (to_second, mut from_second) = open(&mut second).await;
    // The first stream is busy with a long batch while the second one asks.
    to_first
        .send(batch(vec![create(), repeated(rdmd(PAGE), 1 << 19, 0, 0)]))
        .await
        .unwrap();
    to_second.send(batch(vec![rdmd(PAGE)])).await.unwrap();
    assert_success(&statuses_of(&from_second.next().await.unwrap().unwrap()));
    assert_eq!(
        from_first.next().await.unwrap().unwrap().results[1].completed,
        1 << 19
    );
}
