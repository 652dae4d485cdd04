//! Operations in the wrong state, and looks at what is not there.

use mirror_proto::mmu as wire;

use crate::stack::PAGE;
use crate::table::{Table, check, check_stream};

#[tokio::test]
async fn operations_in_the_wrong_state_are_refused() {
    let mut table = Table::new(true).await;
    let vm_id = table.vm;
    let request = wire::InitMemRegionRequest {
        vm_id,
        size: PAGE,
        ..Default::default()
    };
    check!(
        table,
        "image after finalize",
        init_mem_region,
        request,
        FailedPrecondition,
        None
    );
    let request = wire::FinalizeVmRequest { vm_id, hw_error: 0 };
    check!(
        table,
        "finalize twice",
        finalize_vm,
        request,
        FailedPrecondition,
        None
    );

    let mut table = Table::new(false).await;
    let vm_id = table.vm;
    let request = wire::PreFaultMemoryRequest {
        vm_id,
        vcpu_id: 0,
        gpa: 0,
        size: PAGE,
    };
    check_stream!(
        table,
        "prefault before",
        pre_fault_memory,
        request,
        FailedPrecondition,
        None
    );
}

#[tokio::test]
async fn looking_takes_known_roots_and_levels_only() {
    let mut table = Table::new(true).await;
    let vm_id = table.vm;
    for (case, root, min_level, field) in [
        ("root", 3, 1, "root"),
        ("root", -1, 1, "root"),
        ("level", 0, 6, "min_level"),
    ] {
        let request = wire::DumpTreeRequest {
            vm_id,
            root,
            min_level,
        };
        check_stream!(
            table,
            case,
            dump_tree,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    let request = wire::GetWalkRequest {
        vm_id,
        gpa: 1 << 52,
        module: false,
    };
    check!(
        table,
        "walk",
        get_walk,
        request,
        InvalidArgument,
        Some("gpa")
    );
}

#[tokio::test]
async fn an_error_on_the_way_in_is_refused() {
    let mut table = Table::new(false).await;
    let (vm_id, vcpu_id, hw_error) = (table.vm, 0, 1 << 63);
    let field = Some("hw_error");
    let request = wire::InitVmRequest { vm_id, hw_error };
    check!(table, "init", init_vm, request, InvalidArgument, field);
    let request = wire::InitVcpuRequest {
        vm_id,
        vcpu_id,
        hw_error,
    };
    check!(table, "vcpu", init_vcpu, request, InvalidArgument, field);
    let request = wire::InitMemRegionRequest {
        vm_id,
        size: PAGE,
        hw_error,
        ..Default::default()
    };
    check!(
        table,
        "image",
        init_mem_region,
        request,
        InvalidArgument,
        field
    );
    let request = wire::FinalizeVmRequest { vm_id, hw_error };
    check!(
        table,
        "finalize",
        finalize_vm,
        request,
        InvalidArgument,
        field
    );
}
