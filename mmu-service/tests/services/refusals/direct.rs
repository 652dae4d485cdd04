//! Work on the direct root that cannot be.

use mirror_proto::mmu as wire;
use wire::write_protect_request::Target;

use crate::stack::{self, PAGE};
use crate::table::{Table, check, check_stream};

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
                log_dirty: true,
                ..slot
            },
            "slot.log_dirty",
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
