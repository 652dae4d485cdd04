//! Ids that nobody has, in every call that takes one.

use mirror_proto::mmu as wire;
use wire::write_protect_request::Target;

use super::NO_VM;
use crate::stack::{PAGE, region};
use crate::table::{Table, check, check_stream};

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
