//! Requests that cannot be: wrong ids, wrong states, numbers that stand for nothing.

use mirror_proto::mmu as wire;
use tonic::Code;

use crate::stack::{self, PAGE, Stack, field_of, region};
use crate::table::{Table, check, check_stream};

const NO_VM: u64 = 999;

#[tokio::test]
async fn a_vm_that_cannot_be_is_not_created() {
    let mut table = Table::new(true).await;
    let empty = wire::CreateVmRequest::default();
    for (case, request, field) in [
        (
            "width 50",
            wire::CreateVmRequest {
                gpaw: 50,
                ..empty.clone()
            },
            "gpaw",
        ),
        (
            "mode 3",
            wire::CreateVmRequest {
                mode: 3,
                ..empty.clone()
            },
            "mode",
        ),
        (
            "mode -1",
            wire::CreateVmRequest {
                mode: -1,
                ..empty.clone()
            },
            "mode",
        ),
        (
            "577 vCPUs",
            wire::CreateVmRequest {
                max_vcpus: 577,
                ..empty.clone()
            },
            "max_vcpus",
        ),
        (
            "label",
            wire::CreateVmRequest {
                label: "x".repeat(65),
                ..empty.clone()
            },
            "label",
        ),
        (
            "reserved attributes",
            wire::CreateVmRequest {
                attributes: Some(1 << 5),
                ..empty.clone()
            },
            "attributes",
        ),
        (
            "XFAM of no processor",
            wire::CreateVmRequest {
                xfam: 1 << 40,
                ..empty.clone()
            },
            "xfam",
        ),
    ] {
        check!(
            table,
            case,
            create_vm,
            request,
            InvalidArgument,
            Some(field)
        );
    }
}

#[tokio::test]
async fn ids_that_nobody_has_are_not_found() {
    let mut table = Table::new(true).await;
    for vm_id in [0, NO_VM, u64::MAX] {
        let vm = Some("vm_id");
        check!(
            table,
            "destroy",
            destroy_vm,
            wire::DestroyVmRequest { vm_id, mode: 0 },
            NotFound,
            vm
        );
        check!(
            table,
            "vcpu",
            create_vcpu,
            wire::CreateVcpuRequest {
                vm_id,
                create_only: false,
            },
            NotFound,
            vm
        );
        check!(
            table,
            "slot",
            set_user_memory_region,
            region(vm_id, 0, PAGE),
            NotFound,
            vm
        );
        let request = wire::SetMemoryAttributesRequest {
            vm_id,
            size: PAGE,
            ..Default::default()
        };
        check!(
            table,
            "attributes",
            set_memory_attributes,
            request,
            NotFound,
            vm
        );
        let request = wire::InitMemRegionRequest {
            vm_id,
            size: PAGE,
            ..Default::default()
        };
        check!(table, "image", init_mem_region, request, NotFound, vm);
        check!(
            table,
            "finalize",
            finalize_vm,
            wire::FinalizeVmRequest { vm_id, hw_error: 0 },
            NotFound,
            vm
        );
        let fault = Some(wire::Fault {
            gpa: 0,
            qualification: 2,
            ..Default::default()
        });
        let request = wire::HandleFaultRequest {
            vm_id,
            vcpu_id: 0,
            fault,
            ..Default::default()
        };
        check!(table, "fault", handle_fault, request, NotFound, vm);
        let request = wire::PreFaultMemoryRequest {
            vm_id,
            size: PAGE,
            ..Default::default()
        };
        check_stream!(table, "prefault", pre_fault_memory, request, NotFound, vm);
        let request = wire::PunchHoleRequest {
            vm_id,
            slot_id: 1,
            offset: 0,
            size: PAGE,
        };
        check!(table, "hole", punch_hole, request, NotFound, vm);
        let request = wire::UnmapHvaRequest {
            vm_id,
            start: 0,
            end: PAGE,
        };
        check!(table, "notifier", unmap_hva, request, NotFound, vm);
        let request = wire::GetWalkRequest {
            vm_id,
            gpa: 0,
            module: false,
        };
        check!(table, "walk", get_walk, request, NotFound, vm);
        let request = wire::DumpTreeRequest {
            vm_id,
            root: 0,
            min_level: 1,
        };
        check_stream!(table, "tree", dump_tree, request, NotFound, vm);
        check_stream!(
            table,
            "audit",
            audit,
            wire::AuditRequest { vm_id },
            NotFound,
            vm
        );
        if vm_id != 0 {
            check!(
                table,
                "stats",
                get_stats,
                wire::GetStatsRequest { vm_id },
                NotFound,
                vm
            );
        }
    }
    let vm_id = table.vm;
    let fault = Some(wire::Fault {
        gpa: 0,
        qualification: 2,
        ..Default::default()
    });
    for vcpu_id in [1, u32::MAX] {
        let request = wire::HandleFaultRequest {
            vm_id,
            vcpu_id,
            fault,
            ..Default::default()
        };
        check!(
            table,
            "vCPU of a fault",
            handle_fault,
            request,
            NotFound,
            Some("vcpu_id")
        );
        let request = wire::PreFaultMemoryRequest {
            vm_id,
            vcpu_id,
            gpa: 0,
            size: PAGE,
        };
        check_stream!(
            table,
            "vCPU",
            pre_fault_memory,
            request,
            NotFound,
            Some("vcpu_id")
        );
    }
    let request = wire::PunchHoleRequest {
        vm_id,
        slot_id: 7,
        offset: 0,
        size: PAGE,
    };
    check!(
        table,
        "slot of a hole",
        punch_hole,
        request,
        NotFound,
        Some("slot_id")
    );
}

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

#[tokio::test]
async fn i19_an_error_on_the_way_in_is_refused() {
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

#[tokio::test]
async fn creation_and_initialisation_can_be_two_steps() {
    let mut stack = Stack::start().await;
    let request = wire::CreateVmRequest {
        create_only: true,
        ..Default::default()
    };
    let created = stack.client.create_vm(request).await.unwrap().into_inner();
    let vm_id = created.vm_id;
    assert_eq!((created.hkid, created.tdr), (0, 0));
    let vcpu = wire::CreateVcpuRequest {
        vm_id,
        create_only: true,
    };
    let early = stack.client.create_vcpu(vcpu).await.unwrap_err();
    assert_eq!(early.code(), tonic::Code::FailedPrecondition);
    let init = wire::InitVmRequest { vm_id, hw_error: 0 };
    let td = stack.client.init_vm(init).await.unwrap().into_inner();
    assert_ne!((td.hkid, td.tdr), (0, 0));
    let again = stack.client.init_vm(init).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::FailedPrecondition);
    stack.client.create_vcpu(vcpu).await.unwrap();
    let init = wire::InitVcpuRequest {
        vm_id,
        vcpu_id: 0,
        hw_error: 0,
    };
    let made = stack.client.init_vcpu(init).await.unwrap().into_inner();
    let names: Vec<_> = made
        .counts
        .unwrap()
        .seamcalls
        .into_iter()
        .map(|c| c.name)
        .collect();
    assert!(names.contains(&"TDH.VP.INIT".to_owned()), "{names:?}");
    let again = stack.client.init_vcpu(init).await.unwrap_err();
    assert_eq!(field_of(&again).as_deref(), Some("vcpu_id"));
}
