//! Ranges, slots and images that cannot be are refused by every RPC that takes one.

use mirror_proto::mmu as wire;
use tonic::{Code, Status};

use crate::stack::{self, MIB, PAGE, PRIVATE, SHARED, field_of, reason_of};
use crate::table::{SIZE, Table, check};

#[tokio::test]
async fn slots_that_cannot_be_are_refused() {
    let mut table = Table::new(true).await;
    let vm_id = table.vm;
    let request = wire::SetUserMemoryRegionRequest { vm_id, slot: None };
    check!(
        table,
        "missing",
        set_user_memory_region,
        request,
        InvalidArgument,
        Some("slot")
    );
    let good = wire::Slot {
        slot_id: 2,
        gpa: 1 << 30,
        size: MIB,
        userspace_addr: 0x7e00_0000_0000,
        guest_memfd: true,
        ..Default::default()
    };
    for (case, slot, code) in [
        (
            "unaligned address",
            wire::Slot {
                gpa: good.gpa + 1,
                ..good
            },
            Code::InvalidArgument,
        ),
        (
            "unaligned size",
            wire::Slot {
                size: MIB + 1,
                ..good
            },
            Code::InvalidArgument,
        ),
        (
            "unaligned host address",
            wire::Slot {
                userspace_addr: good.userspace_addr + 1,
                ..good
            },
            Code::InvalidArgument,
        ),
        (
            "wraps",
            wire::Slot {
                gpa: u64::MAX - PAGE + 1,
                size: 2 * PAGE,
                ..good
            },
            Code::InvalidArgument,
        ),
        (
            "huge",
            wire::Slot {
                size: u64::MAX - PAGE + 1,
                ..good
            },
            Code::InvalidArgument,
        ),
        (
            "SHARED bit",
            wire::Slot {
                gpa: SHARED,
                ..good
            },
            Code::InvalidArgument,
        ),
        (
            "overlap",
            wire::Slot {
                gpa: SIZE - PAGE,
                ..good
            },
            Code::AlreadyExists,
        ),
        (
            "id",
            wire::Slot {
                slot_id: u32::MAX,
                ..good
            },
            Code::InvalidArgument,
        ),
    ] {
        let request = wire::SetUserMemoryRegionRequest {
            vm_id,
            slot: Some(slot),
        };
        let outcome = table
            .stack
            .client
            .set_user_memory_region(request)
            .await
            .map(drop);
        let status = outcome.expect_err(case);
        assert_eq!(status.code(), code, "{case}: {status}");
        assert!(field_of(&status).is_some(), "{case}: {status}");
        table.check_unchanged(case).await;
    }
}

/// Ranges that no operation takes.
const BAD_RANGES: [(&str, u64, u64); 7] = [
    ("unaligned address", 1, PAGE),
    ("unaligned size", 0, 1),
    ("no size", 0, 0),
    ("wraps", u64::MAX - PAGE + 1, 2 * PAGE),
    ("huge", 0, u64::MAX - PAGE + 1),
    ("SHARED bit", SHARED, PAGE),
    ("beyond the address width", 1 << 52, PAGE),
];

#[tokio::test]
async fn ranges_that_cannot_be_are_refused_by_every_rpc() {
    let mut table = Table::new(true).await;
    let vm_id = table.vm;
    for (case, gpa, size) in BAD_RANGES {
        let request = wire::SetMemoryAttributesRequest {
            vm_id,
            gpa,
            size,
            attributes: 0,
        };
        let outcome = table
            .stack
            .client
            .set_memory_attributes(request)
            .await
            .map(drop);
        check_range(&mut table, &format!("attributes, {case}"), outcome).await;

        let request = wire::PreFaultMemoryRequest {
            vm_id,
            vcpu_id: 0,
            gpa,
            size,
        };
        let answers = table.stack.client.pre_fault_memory(request).await;
        let outcome = match answers {
            Ok(answers) => stack::last(answers.into_inner()).await.map(drop),
            Err(status) => Err(status),
        };
        check_range(&mut table, &format!("prefault, {case}"), outcome).await;
    }
    for (case, offset, size) in [
        ("unaligned offset", 1, PAGE),
        ("unaligned size", 0, 1),
        ("no size", 0, 0),
        ("wraps", u64::MAX - PAGE + 1, 2 * PAGE),
    ] {
        let request = wire::PunchHoleRequest {
            vm_id,
            slot_id: 1,
            offset,
            size,
        };
        let outcome = table.stack.client.punch_hole(request).await.map(drop);
        check_range(&mut table, &format!("hole, {case}"), outcome).await;
    }
    for (case, start, end) in [
        ("unaligned start", 1, PAGE),
        ("unaligned end", 0, 1),
        ("backwards", 2 * PAGE, PAGE),
    ] {
        let request = wire::UnmapHvaRequest { vm_id, start, end };
        let outcome = table.stack.client.unmap_hva(request).await.map(drop);
        check_range(&mut table, &format!("notifier, {case}"), outcome).await;
    }
}

/// Which of the two fields of a range is blamed is the core's choice, that one is named is not.
async fn check_range(table: &mut Table, case: &str, outcome: Result<(), Status>) {
    let status = outcome.expect_err(case);
    assert_eq!(status.code(), Code::InvalidArgument, "{case}: {status}");
    assert!(field_of(&status).is_some(), "{case}: {status}");
    assert_eq!(reason_of(&status).1, "22", "{case}");
    table.check_unchanged(case).await;
}

#[tokio::test]
async fn attributes_that_do_not_exist_are_refused() {
    let mut table = Table::new(true).await;
    for attributes in [1, PRIVATE | 1, u64::MAX] {
        let request = wire::SetMemoryAttributesRequest {
            vm_id: table.vm,
            gpa: 0,
            size: PAGE,
            attributes,
        };
        let field = Some("attributes");
        check!(
            table,
            "attributes",
            set_memory_attributes,
            request,
            InvalidArgument,
            field
        );
    }
}

#[tokio::test]
async fn an_initial_image_that_cannot_be_is_refused() {
    let mut table = Table::new(false).await;
    let good = wire::InitMemRegionRequest {
        vm_id: table.vm,
        vcpu_id: 0,
        gpa: 0,
        size: PAGE,
        ..Default::default()
    };
    for (case, gpa, size) in BAD_RANGES {
        let request = wire::InitMemRegionRequest {
            gpa,
            size,
            ..good.clone()
        };
        let outcome = table.stack.client.init_mem_region(request).await.map(drop);
        check_range(&mut table, &format!("image, {case}"), outcome).await;
    }
    let request = wire::InitMemRegionRequest {
        data: vec![0; 4097].into(),
        ..good.clone()
    };
    check!(
        table,
        "too much data",
        init_mem_region,
        request,
        InvalidArgument,
        Some("data")
    );
    let request = wire::InitMemRegionRequest { vcpu_id: 9, ..good };
    check!(
        table,
        "vCPU",
        init_mem_region,
        request,
        NotFound,
        Some("vcpu_id")
    );
}
