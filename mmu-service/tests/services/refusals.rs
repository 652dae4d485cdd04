//! Requests that cannot be: wrong ids, wrong states, numbers that stand for nothing.

use mirror_proto::mmu as wire;
use tonic::Code;
use wire::write_protect_request::Target;

use crate::stack::{self, PAGE, Stack, field_of, region};
use crate::table::{Table, check, check_stream};

const NO_VM: u64 = 999;

#[tokio::test]
async fn a_vm_that_cannot_be_is_not_created() {
    let mut table = Table::new(true).await;
    let empty = wire::CreateVmRequest::default();
    let ordinary = wire::CreateVmRequest {
        kind: wire::VmKind::Ordinary.into(),
        ..Default::default()
    };
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
            "kind 3",
            wire::CreateVmRequest {
                kind: 3,
                ..empty.clone()
            },
            "kind",
        ),
        (
            "dirty log 4",
            wire::CreateVmRequest {
                dirty_log: 4,
                ..empty.clone()
            },
            "dirty_log",
        ),
        (
            "PML of a TD",
            wire::CreateVmRequest {
                pml: true,
                ..empty.clone()
            },
            "pml",
        ),
        (
            "a quirk of a TD",
            wire::CreateVmRequest {
                slot_zap_all: Some(true),
                ..empty.clone()
            },
            "slot_zap_all",
        ),
        (
            "attributes of an ordinary VM",
            wire::CreateVmRequest {
                attributes: Some(0),
                ..ordinary.clone()
            },
            "attributes",
        ),
        (
            "XFAM of an ordinary VM",
            wire::CreateVmRequest {
                xfam: 3,
                ..ordinary.clone()
            },
            "xfam",
        ),
        (
            "two steps of an ordinary VM",
            wire::CreateVmRequest {
                create_only: true,
                ..ordinary.clone()
            },
            "create_only",
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
        let slot_id = 0;
        let request = wire::SetDirtyLogRequest {
            vm_id,
            slot_id,
            on: true,
        };
        check!(table, "log on", set_dirty_log, request, NotFound, vm);
        let request = wire::GetDirtyLogRequest { vm_id, slot_id };
        check!(table, "log", get_dirty_log, request, NotFound, vm);
        let request = wire::ClearDirtyLogRequest {
            vm_id,
            ..Default::default()
        };
        check!(table, "clear", clear_dirty_log, request, NotFound, vm);
        let request = wire::AgeRangeRequest {
            vm_id,
            start: 0,
            end: PAGE,
            test: false,
        };
        check!(table, "age", age_range, request, NotFound, vm);
        let request = wire::TouchMemoryRequest {
            vm_id,
            ..Default::default()
        };
        check!(table, "touch", touch_memory, request, NotFound, vm);
        let request = wire::ZapAllFastRequest { vm_id };
        check!(table, "zap fast", zap_all_fast, request, NotFound, vm);
        let request = wire::ZapAllRequest { vm_id };
        check!(table, "zap all", zap_all, request, NotFound, vm);
        let request = wire::ZapRangeRequest {
            vm_id,
            gpa: 0,
            size: PAGE,
        };
        check!(table, "zap", zap_range, request, NotFound, vm);
        let request = wire::WriteProtectRequest {
            vm_id,
            target: Some(Target::Gpa(0)),
            track: None,
        };
        check!(table, "protect", write_protect, request, NotFound, vm);
        let request = wire::ChangeHostMappingRequest {
            vm_id,
            start: 0,
            end: PAGE,
            ..Default::default()
        };
        check!(table, "host", change_host_mapping, request, NotFound, vm);
        let request = wire::SetNxHugePagesRequest { vm_id, on: true };
        check!(table, "NX", set_nx_huge_pages, request, NotFound, vm);
        let request = wire::RecoverNxHugePagesRequest { vm_id, most: 1 };
        check!(
            table,
            "recovery",
            recover_nx_huge_pages,
            request,
            NotFound,
            vm
        );
        let request = wire::WatchEventsRequest { vm_id, buffer: 0 };
        check_stream!(table, "events", watch_events, request, NotFound, vm);
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
async fn work_on_the_direct_root_that_cannot_be_is_refused() {
    let mut table = Table::ordinary().await;
    let vm_id = table.vm;
    let hva = 0x7f00_0000_0000;
    let quiet = wire::GetDirtyLogRequest { vm_id, slot_id: 0 };
    check!(
        table,
        "no log",
        get_dirty_log,
        quiet,
        FailedPrecondition,
        Some("slot_id")
    );
    let nobody = wire::GetDirtyLogRequest { vm_id, slot_id: 9 };
    check!(
        table,
        "no slot",
        get_dirty_log,
        nobody,
        NotFound,
        Some("slot_id")
    );
    let request = wire::SetDirtyLogRequest {
        vm_id,
        slot_id: 9,
        on: true,
    };
    check!(
        table,
        "no slot",
        set_dirty_log,
        request,
        NotFound,
        Some("slot_id")
    );
    for (case, first_page, bitmap, field) in [
        ("first page", 1, vec![1], "first_page"),
        ("behind the slot", 2048, vec![1], "bitmap"),
        ("across the end", 1984, vec![1, 1], "bitmap"),
        ("far behind", u64::MAX - 63, vec![1], "bitmap"),
    ] {
        let request = wire::ClearDirtyLogRequest {
            vm_id,
            slot_id: 1,
            first_page,
            bitmap,
            num_pages: 0,
        };
        check!(
            table,
            case,
            clear_dirty_log,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    for (first_page, num_pages, words) in [(0, 65, 1), (1984, 65, 1), (0, 64, 2), (64, u64::MAX, 1)]
    {
        let request = wire::ClearDirtyLogRequest {
            vm_id,
            slot_id: 1,
            first_page,
            bitmap: vec![0; words],
            num_pages,
        };
        let field = Some("num_pages");
        check!(
            table,
            "pages",
            clear_dirty_log,
            request,
            InvalidArgument,
            field
        );
    }
    for (start, end, test, field) in [
        (hva + 1, hva + PAGE, false, "start"),
        (hva, hva + 1, false, "end"),
        (hva, hva, false, "end"),
        (hva, hva + 2 * PAGE, true, "end"),
        (u64::MAX, 0, true, "end"),
    ] {
        let request = wire::AgeRangeRequest {
            vm_id,
            start,
            end,
            test,
        };
        check!(
            table,
            "age",
            age_range,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    for (gpa, count, stride, field) in [
        (0, 4097, PAGE, "count"),
        (PAGE, 2, u64::MAX, "stride"),
        (0, 4096, u64::MAX / 4, "stride"),
        (1 << 48, 1, 0, "gpa"),
        (0, 2, 1 << 48, "gpa"),
    ] {
        let request = wire::TouchMemoryRequest {
            vm_id,
            gpa,
            count,
            stride,
            write: true,
        };
        check!(
            table,
            "touch",
            touch_memory,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    for (gpa, size, field) in [
        (1, PAGE, "gpa"),
        (0, 0, "size"),
        (0, PAGE + 1, "size"),
        (1 << 48, PAGE, "gpa"),
        (PAGE, 1 << 48, "size"),
    ] {
        let request = wire::ZapRangeRequest { vm_id, gpa, size };
        check!(
            table,
            "zap",
            zap_range,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    for (case, target, track, field) in [
        ("nothing", None, None, "target"),
        ("unaligned", Some(Target::Gpa(1)), None, "gpa"),
        ("a slot", Some(Target::SlotId(0)), Some(true), "track"),
        ("no slot", Some(Target::Gpa(1 << 40)), Some(true), "gpa"),
    ] {
        let request = wire::WriteProtectRequest {
            vm_id,
            target,
            track,
        };
        check!(
            table,
            case,
            write_protect,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    let good = wire::ChangeHostMappingRequest {
        vm_id,
        start: hva,
        end: hva + PAGE,
        change: wire::HostChange::Drop.into(),
        page_size: 0,
        silent: false,
    };
    for (request, field) in [
        (
            wire::ChangeHostMappingRequest { change: 99, ..good },
            "change",
        ),
        (
            wire::ChangeHostMappingRequest { change: 6, ..good },
            "page_size",
        ),
        (
            wire::ChangeHostMappingRequest {
                page_size: 2,
                ..good
            },
            "page_size",
        ),
        (
            wire::ChangeHostMappingRequest {
                change: 0,
                silent: true,
                ..good
            },
            "silent",
        ),
        (wire::ChangeHostMappingRequest { start: 5, ..good }, "start"),
        (wire::ChangeHostMappingRequest { end: 0, ..good }, "end"),
    ] {
        check!(
            table,
            field,
            change_host_mapping,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    let request = wire::RecoverNxHugePagesRequest { vm_id, most: 0 };
    check!(
        table,
        "none",
        recover_nx_huge_pages,
        request,
        InvalidArgument,
        Some("most")
    );
    let request = wire::WatchEventsRequest {
        vm_id,
        buffer: (1 << 20) + 1,
    };
    check_stream!(
        table,
        "buffer",
        watch_events,
        request,
        InvalidArgument,
        Some("buffer")
    );
    let slot = wire::Slot {
        slot_id: 5,
        gpa: 2 << 30,
        size: PAGE,
        userspace_addr: hva + (2 << 30),
        ..Default::default()
    };
    for (slot, field) in [
        (
            wire::Slot {
                host_page_size: 4,
                ..slot
            },
            "slot.host_page_size",
        ),
        (
            wire::Slot {
                guest_memfd: true,
                ..slot
            },
            "slot.guest_memfd",
        ),
    ] {
        let slot = Some(slot);
        let request = wire::SetUserMemoryRegionRequest { vm_id, slot };
        check!(
            table,
            field,
            set_user_memory_region,
            request,
            InvalidArgument,
            Some(field)
        );
    }
}

#[tokio::test]
async fn private_memory_is_not_touched_from_the_direct_root() {
    let mut table = Table::new(true).await;
    let vm_id = table.vm;
    for (gpa, stride, field) in [(0, 0, "gpa"), (stack::SHARED - PAGE, PAGE, "stride")] {
        let request = wire::TouchMemoryRequest {
            vm_id,
            gpa,
            count: 2,
            stride,
            write: false,
        };
        check!(
            table,
            "touch",
            touch_memory,
            request,
            InvalidArgument,
            Some(field)
        );
    }
    let request = wire::ZapRangeRequest {
        vm_id,
        gpa: stack::SHARED,
        size: PAGE,
    };
    check!(
        table,
        "zap",
        zap_range,
        request,
        InvalidArgument,
        Some("gpa")
    );
    let request = wire::SetDirtyLogRequest {
        vm_id,
        slot_id: 1,
        on: true,
    };
    let field = Some("slot.log_dirty");
    check!(table, "log", set_dirty_log, request, InvalidArgument, field);
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
