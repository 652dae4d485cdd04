//! A TD's life over `Execute`, and what a batch does about calls that fail.

use mirror_proto::module::Seamcall;
use tdx_defs::{CompletionStatus, OperandId, PageType};

use crate::support::*;

#[tokio::test]
async fn a_td_is_built_grows_and_shrinks_over_the_wire() {
    let server = Server::start().await;
    let mut client = server.client().await;

    assert_success(&statuses(&mut client, vec![create()]).await);
    assert_success(&statuses(&mut client, build()).await);
    assert_success(&statuses(&mut client, vec![add(0, PAGE)]).await);
    assert_success(&statuses(&mut client, finalize()).await);

    let grow = repeated(aug(0x1000, PAGE + 0x1000), 16, 0x1000, 0x1000);
    let answer = execute(&mut client, batch(vec![grow])).await.unwrap();
    assert_eq!(
        (answer.results[0].rax, answer.results[0].completed),
        (0, 16)
    );
    assert_eq!(pages_in_use(&mut client, "PT_REG").await, 17);

    let shrink = vec![
        repeated(block(0x1000), 16, 0x1000, 0),
        track(),
        repeated(remove(0x1000), 16, 0x1000, 0),
    ];
    assert_success(&statuses(&mut client, shrink).await);
    assert_eq!(pages_in_use(&mut client, "PT_REG").await, 1);
    assert_eq!(platform(&mut client).await.hkids_in_use, 1);
}

#[tokio::test]
async fn the_platform_is_described_with_its_limits() {
    let server = Server::start().await;
    let platform = platform(&mut server.client().await).await;
    assert_eq!(platform.release, "1.5.05");
    assert_eq!(
        (
            platform.hkid_start,
            platform.hkid_count,
            platform.global_hkid
        ),
        (32, 32, 32)
    );
    assert_eq!(
        (
            platform.logical_processors,
            platform.maxpa,
            platform.hkid_bits
        ),
        (4, 52, 6)
    );
    assert_eq!(platform.tdmrs.len(), 3);
    assert_eq!(platform.tdmrs[0].reserved[0].base, 0x7000_0000);
    assert_eq!(platform.tdmrs[0].reserved[0].size, 0x100_0000);
    assert_eq!((platform.max_calls, platform.max_repeat), (4096, 1 << 20));
    assert_eq!(platform.hkids_in_use, 0);
    assert!(
        platform.pages.iter().all(|count| count.pages_4k == 0),
        "{:?}",
        platform.pages
    );
    assert!(!platform.instance.is_empty());
}

#[tokio::test]
async fn an_unknown_leaf_is_an_answer_and_no_error() {
    let server = Server::start().await;
    let mut client = server.client().await;
    for leaf in [46, 63, 0xFFFF] {
        let answer = statuses(
            &mut client,
            vec![Seamcall {
                leaf,
                ..Seamcall::default()
            }],
        )
        .await;
        assert_eq!(
            answer,
            [CompletionStatus::OPERAND_INVALID.with(OperandId::RAX)],
            "{leaf}"
        );
    }
}

#[tokio::test]
async fn stop_on_error_leaves_out_what_is_behind_an_error() {
    let server = Server::start().await;
    let mut client = server.client().await;
    assert_success(&statuses(&mut client, vec![create()]).await);
    // Creating it again is an error; key configuration would succeed.
    for (stop_on_error, answers) in [(true, 1), (false, 2)] {
        let mut calls = vec![create()];
        calls.extend(build().into_iter().take(1));
        let mut request = batch(calls);
        request.stop_on_error = stop_on_error;
        let answer = execute(&mut client, request).await.unwrap();
        assert_eq!(
            answer.results.len(),
            answers,
            "stop_on_error {stop_on_error}"
        );
    }
}

#[tokio::test]
async fn an_early_end_without_an_error_stops_a_repeat_and_not_the_batch() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let mut calls = vec![create()];
    calls.extend(build());
    calls.push(repeated(aug(0, PAGE), 4, 0x1000, 0x1000));
    calls.push(block(0x2000));
    assert_success(&statuses(&mut client, calls).await);

    let mut request = batch(vec![repeated(block(0), 4, 0x1000, 0), track()]);
    request.stop_on_error = true;
    let answer = execute(&mut client, request).await.unwrap();
    let [blocked, tracked] = &answer.results[..] else {
        panic!("{answer:?}")
    };
    let status = CompletionStatus(blocked.rax);
    assert!(
        status.is(CompletionStatus::GPA_RANGE_ALREADY_BLOCKED),
        "{status}"
    );
    assert_eq!((blocked.completed, tracked.rax), (2, 0));
}

#[tokio::test]
async fn a_repeat_that_fails_half_way_says_how_far_it_came() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let mut calls = vec![create()];
    calls.extend(build());
    calls.push(aug(0x3000, PAGE));
    assert_success(&statuses(&mut client, calls).await);

    let mut request = batch(vec![
        repeated(aug(0, PAGE + 0x1000), 8, 0x1000, 0x1000),
        rdmd(PAGE + 0x1000),
    ]);
    request.stop_on_error = true;
    let answer = execute(&mut client, request).await.unwrap();
    let [run] = &answer.results[..] else {
        panic!("{answer:?}")
    };
    assert!(CompletionStatus(run.rax).is_error());
    assert_eq!(run.completed, 3);
    let pages = statuses(&mut client, vec![rdmd(PAGE + 0x3000)]).await;
    assert_success(&pages);
    assert_eq!(pages_in_use(&mut client, "PT_REG").await, 4);
}

#[tokio::test]
async fn registers_come_back_as_the_leaf_left_them() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let answer = execute(&mut client, batch(vec![create(), rdmd(TDR)]))
        .await
        .unwrap();
    assert_eq!(answer.results[1].rcx, u64::from(PageType::TDR.0));
}
