//! What is above a limit is refused, and the service goes on.

use mirror_proto::mmu::{self as wire, Mode};
use mirror_proto::module::fault_rule::{Action, When};
use mirror_proto::module::tdx_fault_service_client::TdxFaultServiceClient;
use mirror_proto::module::{FaultDelay, FaultRule, ListFaultRulesRequest, SetFaultRulesRequest};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::stack::{MIB, PATIENCE, Stack, field_of, reason_of};
use crate::table::SIZE;

#[tokio::test]
async fn a_batch_above_the_limit_ends_its_stream() {
    let mut stack = Stack::with_options(&["--max-faults", "2"]).await;
    let vm_id = stack.running_vm(Mode::Batched, 1, SIZE).await;
    let (send, batches) = tokio::sync::mpsc::channel(4);
    for (tag, count) in [(1, 2), (2, 3)] {
        let faults = vec![
            wire::Fault {
                gpa: 0,
                qualification: 2,
                ..Default::default()
            };
            count
        ];
        let batch = wire::HandleFaultsRequest {
            vm_id,
            vcpu_id: 0,
            faults,
            tag,
            ..Default::default()
        };
        send.send(batch).await.unwrap();
    }
    let answers = stack
        .client
        .handle_faults(ReceiverStream::new(batches))
        .await
        .unwrap();
    let mut answers = answers.into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().tag, 1);
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(field_of(&status).as_deref(), Some("faults"));
    assert!(status.message().contains("limit is 2"), "{status}");
}

#[tokio::test]
async fn vms_above_the_limit_are_refused_until_one_goes() {
    let mut stack = Stack::with_options(&["--max-vms", "1"]).await;
    let request = wire::CreateVmRequest::default();
    let first = stack
        .client
        .create_vm(request.clone())
        .await
        .unwrap()
        .into_inner()
        .vm_id;
    let status = stack.client.create_vm(request.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert_eq!(reason_of(&status), ("EXHAUSTED".into(), "12".into()));
    stack.destroy(first).await;
    let second = stack
        .client
        .create_vm(request)
        .await
        .unwrap()
        .into_inner()
        .vm_id;
    assert_ne!(first, second, "ids are not used again");
}

#[tokio::test]
async fn messages_above_the_limit_are_refused() {
    let mut stack = Stack::with_options(&["--max-message", "65536"]).await;
    let vm_id = stack.vm(Mode::Batched, 1, SIZE).await;
    let request = wire::InitMemRegionRequest {
        vm_id,
        size: MIB,
        data: vec![7; 1 << 20].into(),
        ..Default::default()
    };
    let status = stack.client.init_mem_region(request).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    stack.assert_clean(vm_id).await;
}

#[tokio::test]
async fn a_vm_that_uses_its_share_up_leaves_places_for_another() {
    let mut stack = Stack::with_options(&["--max-vm-operations", "1"]).await;
    let greedy = stack.running_vm(Mode::Batched, 1, SIZE).await;
    let other = stack.running_vm(Mode::Batched, 1, SIZE).await;
    let url = stack.module_address().to_string();
    let mut faults = TdxFaultServiceClient::new(transport::connect(&url).await.unwrap());
    let hold = FaultRule {
        leaf: Some(tdx_defs::Leaf::MEM_PAGE_AUG.0.into()),
        when: Some(When::Nth(1)),
        action: Some(Action::Delay(FaultDelay { ms: 2000 })),
        ..FaultRule::default()
    };
    let rules = SetFaultRulesRequest {
        rules: vec![hold],
        replace: true,
    };
    faults.set_fault_rules(rules).await.unwrap();

    let touch = |vm_id| wire::HandleFaultRequest {
        vm_id,
        fault: Some(wire::Fault::default()),
        ..Default::default()
    };
    let mut client = stack.client.clone();
    let held = tokio::spawn(async move { client.handle_fault(touch(greedy)).await });
    // It is inside when its call has reached the module.
    let reached = async {
        loop {
            let list = faults.list_fault_rules(ListFaultRulesRequest {}).await;
            if list.unwrap().into_inner().rules[0].fired == 1 {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap();

    let walk = |vm_id| wire::GetWalkRequest {
        vm_id,
        ..Default::default()
    };
    let status = stack.client.handle_fault(touch(greedy)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert_eq!(reason_of(&status), ("OVERLOADED".into(), "11".into()));
    assert!(status.message().contains("the limit of one VM"), "{status}");
    let retry = status.get_details_retry_info().unwrap();
    assert!(retry.retry_delay.is_some());
    stack.client.get_walk(walk(other)).await.unwrap();

    held.await.unwrap().unwrap();
    // Its place is free again.
    stack.client.handle_fault(touch(greedy)).await.unwrap();
    for vm_id in [greedy, other] {
        stack.destroy(vm_id).await;
    }
}
