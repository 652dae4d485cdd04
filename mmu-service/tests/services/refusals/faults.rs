//! Faults that cannot be.

use mirror_proto::mmu as wire;

use crate::table::{Table, check};

#[tokio::test]
async fn faults_that_cannot_be_are_refused() {
    let mut table = Table::new(true).await;
    let vm_id = table.vm;
    let request = wire::HandleFaultRequest {
        vm_id,
        vcpu_id: 0,
        fault: None,
        ..Default::default()
    };
    check!(
        table,
        "missing",
        handle_fault,
        request,
        InvalidArgument,
        Some("fault")
    );
    let fault = Some(wire::Fault {
        gpa: 1 << 52,
        qualification: 2,
        ..Default::default()
    });
    let request = wire::HandleFaultRequest {
        vm_id,
        vcpu_id: 0,
        fault,
        ..Default::default()
    };
    check!(
        table,
        "too wide",
        handle_fault,
        request,
        InvalidArgument,
        Some("gpa")
    );
}
