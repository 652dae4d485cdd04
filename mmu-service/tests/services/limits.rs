//! What is above a limit is refused, and the service goes on.

use mirror_proto::mmu::{self as wire, Mode};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::stack::{MIB, Stack, field_of, reason_of};
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
        data: vec![7; 1 << 20],
        ..Default::default()
    };
    let status = stack.client.init_mem_region(request).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    stack.assert_clean(vm_id).await;
}
