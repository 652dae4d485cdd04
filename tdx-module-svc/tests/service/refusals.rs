//! Requests that are refused: by name of the field, before anything ran.

use mirror_proto::module::{ExecuteRequest, Seamcall};
use tdx_module_svc::config::Limits;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::support::*;

#[tokio::test]
async fn each_bad_field_is_named_and_nothing_has_run() {
    let limits = Limits {
        max_calls: 3,
        max_repeat: 100,
        ..Limits::default()
    };
    let server = Server::with(limits).await;
    let mut client = server.client().await;
    // A call that would leave a trace is in front of each bad one.
    let behind_create = |bad: Seamcall| batch(vec![create(), bad]);
    for (request, field) in [
        (
            ExecuteRequest {
                session: "s".repeat(65),
                ..numbered("", 1, vec![create()])
            },
            "session",
        ),
        (numbered("s", 0, vec![create()]), "sequence"),
        (
            ExecuteRequest {
                lp: 4,
                ..batch(vec![create()])
            },
            "lp",
        ),
        (batch(vec![create(); 4]), "calls"),
        (
            batch(vec![
                create(),
                repeated(rdmd(PAGE), 60, 0, 0),
                repeated(rdmd(PAGE), 60, 0, 0),
            ]),
            "calls",
        ),
        (
            behind_create(repeated(rdmd(PAGE), 0, 0, 0)),
            "calls[1].repeat.count",
        ),
        (
            behind_create(repeated(rdmd(PAGE), 101, 0, 0)),
            "calls[1].repeat.count",
        ),
        (
            behind_create(Seamcall {
                leaf: 0x1_0000,
                ..rdmd(PAGE)
            }),
            "calls[1].leaf",
        ),
        (
            behind_create(Seamcall {
                version: 0x100,
                ..rdmd(PAGE)
            }),
            "calls[1].version",
        ),
        (
            behind_create(Seamcall {
                data: vec![0; (2 << 20) + 1].into(),
                ..rdmd(PAGE)
            }),
            "calls[1].data",
        ),
    ] {
        let refusal = execute(&mut client, request).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument, "{field}: {refusal}");
        let violations = refusal.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
        assert_eq!(
            refusal.message(),
            format!("{field}: {}", violations[0].description)
        );
        assert_eq!(pages_in_use(&mut client, "PT_TDR").await, 0, "{field}");
    }
    assert_success(&statuses(&mut client, vec![create()]).await);
}

#[tokio::test]
async fn a_message_above_the_limit_is_refused_by_size() {
    let server = Server::with(Limits {
        max_message_bytes: 1 << 20,
        ..Limits::default()
    })
    .await;
    let mut client = server.client().await;
    let large = Seamcall {
        data: vec![0; 1 << 20].into(),
        ..create()
    };
    let refusal = execute(&mut client, batch(vec![large])).await.unwrap_err();
    assert_eq!(refusal.code(), Code::OutOfRange);
    assert!(
        refusal.message().contains("1048576"),
        "{}",
        refusal.message()
    );
    assert_eq!(pages_in_use(&mut client, "PT_TDR").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_above_the_limit_are_told_when_to_come_back() {
    let server = Server::with(Limits {
        max_concurrent_requests: 1,
        ..Limits::default()
    })
    .await;
    let mut client = server.client().await;
    let mut busy = server.client().await;
    let request = batch(vec![repeated(rdmd(PAGE), 1 << 20, 0, 0)]);
    let long = tokio::spawn(async move {
        // The requests below may be in its way, too.
        loop {
            match execute(&mut busy, request.clone()).await {
                Err(status) if status.code() == Code::ResourceExhausted => {}
                other => return other,
            }
        }
    });
    let mut refused = None;
    while refused.is_none() && !long.is_finished() {
        refused = execute(&mut client, batch(vec![rdmd(PAGE)])).await.err();
    }
    let refusal = refused.expect("the long batch was in nobody's way");
    assert_eq!(refusal.code(), Code::ResourceExhausted);
    assert!(
        refusal
            .get_details_retry_info()
            .unwrap()
            .retry_delay
            .is_some()
    );
    // Health is asked in spite of the load.
    transport::healthcheck(&server.unix).await.unwrap();
    assert_eq!(long.await.unwrap().unwrap().results[0].completed, 1 << 20);
}
