//! Faults by rules: each kind does what it says, and what a rule cannot say is refused.

use mirror_proto::module::fault_rule::{Action, When};
use mirror_proto::module::tdx_fault_service_client::TdxFaultServiceClient;
use mirror_proto::module::{
    ClearFaultRulesRequest, FaultCut, FaultDelay, FaultLoseReply, FaultRule, FaultStatus,
    ListFaultRulesRequest, ListFaultRulesResponse, SetFaultRulesRequest,
};
use tdx_defs::{CompletionStatus, Leaf, OperandId};
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::stream::open;
use crate::support::*;

async fn faults(server: &Server) -> TdxFaultServiceClient<Channel> {
    TdxFaultServiceClient::new(transport::connect(&server.unix).await.unwrap())
}

/// The first run of a leaf.
fn first(leaf: Leaf, action: Action) -> FaultRule {
    FaultRule {
        leaf: Some(leaf.0.into()),
        when: Some(When::Nth(1)),
        action: Some(action),
        ..FaultRule::default()
    }
}

async fn set(
    client: &mut TdxFaultServiceClient<Channel>,
    rules: Vec<FaultRule>,
) -> Result<Vec<u64>, Status> {
    let request = SetFaultRulesRequest {
        rules,
        replace: false,
    };
    let answer = client.set_fault_rules(request).await?;
    Ok(answer.into_inner().rule_ids)
}

async fn list(client: &mut TdxFaultServiceClient<Channel>) -> ListFaultRulesResponse {
    let answer = client.list_fault_rules(ListFaultRulesRequest {}).await;
    answer.unwrap().into_inner()
}

/// A server with a TD that takes memory.
async fn with_td() -> (Server, Client, TdxFaultServiceClient<Channel>) {
    let server = Server::with_faults().await;
    let mut client = server.client().await;
    assert_success(&statuses(&mut client, vec![create()]).await);
    assert_success(&statuses(&mut client, build()).await);
    assert_success(&statuses(&mut client, finalize()).await);
    let faults = faults(&server).await;
    (server, client, faults)
}

#[tokio::test]
async fn there_is_no_such_service_unless_asked_for() {
    let server = Server::start().await;
    let refusal = set(&mut faults(&server).await, vec![]).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_busy_answer_comes_instead_of_a_run_and_leaves_the_runs_before_it() {
    let (_server, mut client, mut faults) = with_td().await;
    let rule = FaultRule {
        gpa: 0x2000,
        gpa_end: 0x3000,
        ..first(Leaf::MEM_PAGE_AUG, Action::Status(FaultStatus { rax: 0 }))
    };
    set(&mut faults, vec![rule]).await.unwrap();
    let run = vec![repeated(aug(0, PAGE), 4, 0x1000, 0x1000)];
    let answer = execute(&mut client, batch(run)).await.unwrap();
    let busy = CompletionStatus::OPERAND_BUSY.with(OperandId::RCX);
    assert_eq!(statuses_of(&answer), [busy]);
    assert_eq!(answer.results[0].completed, 2);
    assert_eq!(pages_in_use(&mut client, "PT_REG").await, 2);
    // It fires once: the rest of the run works.
    let rest = vec![repeated(aug(0x2000, PAGE + 0x2000), 2, 0x1000, 0x1000)];
    assert_success(&statuses(&mut client, rest).await);
    let listed = list(&mut faults).await;
    assert_eq!((listed.rules[0].fired, listed.rules[0].matched), (1, 2));
    assert_eq!(listed.totals.unwrap().statuses, 1);
}

#[tokio::test]
async fn a_lost_reply_is_recorded_and_a_cut_has_run_nothing() {
    for (action, ran) in [
        (Action::LoseReply(FaultLoseReply {}), 1),
        (Action::Cut(FaultCut {}), 0),
    ] {
        let (_server, mut client, mut faults) = with_td().await;
        set(&mut faults, vec![first(Leaf::MEM_PAGE_AUG, action)])
            .await
            .unwrap();
        let request = numbered("s", 1, vec![aug(0, PAGE)]);
        let (sender, mut answers) = open(&mut client).await;
        sender.send(request.clone()).await.unwrap();
        let lost = answers.next().await.unwrap().unwrap_err();
        assert_eq!(lost.code(), Code::Unavailable, "{action:?}");
        let reason = lost.get_details_error_info().unwrap().reason;
        assert_eq!(reason, "INJECTED_FAULT", "{action:?}");
        assert!(answers.next().await.is_none(), "the stream is over");
        assert_eq!(pages_in_use(&mut client, "PT_REG").await, ran, "{action:?}");
        // Sent again, it is answered, and has run once.
        let answer = execute(&mut client, request).await.unwrap();
        assert_success(&statuses_of(&answer));
        assert_eq!(pages_in_use(&mut client, "PT_REG").await, 1, "{action:?}");
    }
}

#[tokio::test]
async fn a_delayed_batch_waits_and_then_runs() {
    let (_server, mut client, mut faults) = with_td().await;
    let delay = Action::Delay(FaultDelay { ms: 30 });
    set(&mut faults, vec![first(Leaf::MEM_PAGE_AUG, delay)])
        .await
        .unwrap();
    let asked = tokio::time::Instant::now();
    assert_success(&statuses(&mut client, vec![aug(0, PAGE)]).await);
    assert!(asked.elapsed().as_millis() >= 30);
    assert_eq!(list(&mut faults).await.totals.unwrap().delays, 1);
}

#[tokio::test]
async fn a_rule_that_cannot_be_is_refused_with_its_field_and_none_is_set() {
    let server = Server::with_faults().await;
    let mut faults = faults(&server).await;
    let good = first(Leaf::MEM_PAGE_AUG, Action::Cut(FaultCut {}));
    let not_busy = CompletionStatus::EPT_WALK_FAILED.0;
    for (rule, field) in [
        (
            FaultRule {
                leaf: Some(1 << 16),
                ..good
            },
            "leaf",
        ),
        (
            FaultRule {
                gpa: 0x2000,
                gpa_end: 0x2000,
                ..good
            },
            "gpa_end",
        ),
        (FaultRule { when: None, ..good }, "nth"),
        (
            FaultRule {
                when: Some(When::Nth(0)),
                ..good
            },
            "nth",
        ),
        (
            FaultRule {
                when: Some(When::PerMillion(1_000_001)),
                ..good
            },
            "per_million",
        ),
        (
            FaultRule {
                action: None,
                ..good
            },
            "action",
        ),
        (
            first(Leaf::MEM_TRACK, Action::Delay(FaultDelay { ms: 10_001 })),
            "delay.ms",
        ),
        (
            first(
                Leaf::MEM_TRACK,
                Action::Status(FaultStatus { rax: not_busy }),
            ),
            "status.rax",
        ),
        (
            first(Leaf::SYS_INFO, Action::Status(FaultStatus { rax: 0 })),
            "status.rax",
        ),
    ] {
        let refusal = set(&mut faults, vec![good, rule]).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument, "{field}");
        let violations = refusal.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, format!("rules[1].{field}"));
    }
    assert!(list(&mut faults).await.rules.is_empty());

    let refusal = set(&mut faults, vec![good; 65]).await.unwrap_err();
    assert!(refusal.message().contains("the limit is 64"), "{refusal}");
    let ids = set(&mut faults, vec![good; 64]).await.unwrap();
    assert!(set(&mut faults, vec![good]).await.is_err());
    let request = ClearFaultRulesRequest {
        rule_ids: ids[..1].to_vec(),
    };
    let cleared = faults.clear_fault_rules(request).await.unwrap();
    assert_eq!(cleared.into_inner().cleared, 1);
    set(&mut faults, vec![good]).await.unwrap();
    assert_eq!(list(&mut faults).await.rules.len(), 64);
}
