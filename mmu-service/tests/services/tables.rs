//! The direct root over the wire: ordinary VMs, dirty logs, aging, zaps, the host's changes.

use mirror_proto::mmu::{self as wire, HostChange, RetPf, Slot};
use wire::write_protect_request::Target;

use crate::stack::{MIB, PAGE, Stack};

const HVA: u64 = 0x7f00_0000_0000;
const READ: u64 = 1;
const WRITE: u64 = 2;
const EXEC: u64 = 4;

fn slot(size: u64) -> Slot {
    Slot {
        size,
        userspace_addr: HVA,
        ..Default::default()
    }
}

/// An ordinary VM with one slot from address 0.
async fn vm(stack: &mut Stack, request: wire::CreateVmRequest, slot: Slot) -> u64 {
    let vm_id = stack.ordinary(request).await;
    stack.set_slot(vm_id, slot).await.unwrap();
    vm_id
}

async fn fault(stack: &mut Stack, vm_id: u64, gpa: u64, qualification: u64) -> (RetPf, u32) {
    let fault = Some(wire::Fault {
        gpa,
        qualification,
        ..Default::default()
    });
    let request = wire::HandleFaultRequest {
        vm_id,
        vcpu_id: 0,
        fault,
        explain: false,
    };
    let answer = stack.client.handle_fault(request).await.unwrap();
    let answer = answer.into_inner();
    assert_eq!(answer.root(), wire::Root::Direct);
    assert_eq!(answer.rpcs, 0);
    (answer.ret_pf(), answer.level)
}

async fn dirty(stack: &mut Stack, vm_id: u64) -> Vec<u64> {
    let request = wire::GetDirtyLogRequest { vm_id, slot_id: 0 };
    let log = stack.client.get_dirty_log(request).await.unwrap();
    let log = log.into_inner();
    let pages: Vec<u64> = (0..log.bitmap.len() as u64 * 64)
        .filter(|page| log.bitmap[(page / 64) as usize] >> (page % 64) & 1 != 0)
        .collect();
    assert_eq!(log.dirty, pages.len() as u64);
    pages
}

async fn change(stack: &mut Stack, vm_id: u64, change: HostChange) -> wire::Counts {
    let request = wire::ChangeHostMappingRequest {
        vm_id,
        start: HVA,
        end: HVA + 2 * MIB,
        change: change.into(),
        ..Default::default()
    };
    let answer = stack.client.change_host_mapping(request).await.unwrap();
    answer.into_inner().counts.unwrap()
}

#[tokio::test]
async fn an_ordinary_vm_lives_without_the_module() {
    let mut stack = Stack::start().await;
    let huge = Slot {
        host_page_size: wire::HostPageSize::HostPageSize2m.into(),
        ..slot(4 * MIB)
    };
    let vm_id = vm(&mut stack, wire::CreateVmRequest::default(), huge).await;
    stack.assert_all_given_back().await;
    let (ret_pf, level) = fault(&mut stack, vm_id, 3 * PAGE, WRITE).await;
    assert_eq!((ret_pf, level), (RetPf::Fixed, 2));
    let info = stack.list().await.remove(0);
    assert_eq!(
        (info.kind(), info.pages_2m, info.hkid),
        (wire::VmKind::Ordinary, 1, 0)
    );
    assert_eq!(info.slots[0].host_page_size, huge.host_page_size);
    stack.destroy(vm_id).await;
    assert_eq!(stack.stats(0).await.host_pages_in_use, 0);
}

#[tokio::test]
async fn a_dirty_log_is_read_cleared_and_ended() {
    let mut stack = Stack::start().await;
    let vm_id = vm(&mut stack, wire::CreateVmRequest::default(), slot(MIB)).await;
    for page in 0..4 {
        fault(&mut stack, vm_id, page * PAGE, WRITE).await;
    }
    let log = |on| wire::SetDirtyLogRequest {
        vm_id,
        slot_id: 0,
        on,
    };
    stack.client.set_dirty_log(log(true)).await.unwrap();
    assert_eq!(dirty(&mut stack, vm_id).await, [0; 0]);
    // Write access is gone, and comes back without the lock.
    let present = WRITE | 1 << 3;
    fault(&mut stack, vm_id, 2 * PAGE, present).await;
    assert_eq!(stack.stats(vm_id).await.counts.unwrap().pf_fast, 1);
    assert_eq!(dirty(&mut stack, vm_id).await, [2]);
    assert_eq!(
        dirty(&mut stack, vm_id).await,
        [0; 0],
        "reading has cleared it"
    );
    stack.client.set_dirty_log(log(false)).await.unwrap();
    assert!(!stack.list().await[0].slots[0].log_dirty);

    let manual = wire::CreateVmRequest {
        dirty_log: wire::DirtyLogMode::Manual.into(),
        ..Default::default()
    };
    let logged = Slot {
        log_dirty: true,
        ..slot(MIB)
    };
    let vm_id = vm(&mut stack, manual, logged).await;
    fault(&mut stack, vm_id, 70 * PAGE, WRITE).await;
    for _ in 0..2 {
        assert_eq!(dirty(&mut stack, vm_id).await, [70]);
    }
    let clear = wire::ClearDirtyLogRequest {
        vm_id,
        slot_id: 0,
        first_page: 64,
        bitmap: vec![1 << 6],
        num_pages: 64,
    };
    stack.client.clear_dirty_log(clear).await.unwrap();
    assert_eq!(dirty(&mut stack, vm_id).await, [0; 0]);
}

#[tokio::test]
async fn the_host_learns_what_the_guest_used() {
    let mut stack = Stack::start().await;
    let vm_id = vm(&mut stack, wire::CreateVmRequest::default(), slot(MIB)).await;
    fault(&mut stack, vm_id, 0, READ).await;
    let age = |test| wire::AgeRangeRequest {
        vm_id,
        start: HVA,
        end: HVA + PAGE,
        test,
    };
    let touch = wire::TouchMemoryRequest {
        vm_id,
        count: 2,
        stride: PAGE,
        ..Default::default()
    };
    for (case, test, young) in [
        ("new", true, true),
        ("test does not forget", false, true),
        ("forgotten", true, false),
    ] {
        let answer = stack.client.age_range(age(test)).await.unwrap();
        assert_eq!(answer.into_inner().young, young, "{case}");
    }
    let touched = stack.client.touch_memory(touch).await.unwrap();
    assert_eq!(
        touched.into_inner().faulting,
        1,
        "the second page is not mapped"
    );
    assert!(
        stack
            .client
            .age_range(age(true))
            .await
            .unwrap()
            .into_inner()
            .young
    );
}

#[tokio::test]
async fn zaps_take_what_they_name() {
    let mut stack = Stack::start().await;
    let vm_id = vm(&mut stack, wire::CreateVmRequest::default(), slot(MIB)).await;
    stack.prefault(vm_id, 0, 8 * PAGE).await.unwrap();
    let range = wire::ZapRangeRequest {
        vm_id,
        gpa: PAGE,
        size: 3 * PAGE,
    };
    let zapped = stack.client.zap_range(range).await.unwrap().into_inner();
    assert_eq!(zapped.counts.unwrap().flushes, 1);
    assert_eq!(stack.stats(vm_id).await.pages_4k, 5);
    let request = wire::ZapAllFastRequest { vm_id };
    stack.client.zap_all_fast(request).await.unwrap();
    assert_eq!(stack.stats(vm_id).await.pages_4k, 0);
    stack.prefault(vm_id, 0, 8 * PAGE).await.unwrap();
    stack
        .client
        .zap_all(wire::ZapAllRequest { vm_id })
        .await
        .unwrap();
    assert_eq!(stack.stats(vm_id).await.pages_4k, 0);
}

#[tokio::test]
async fn write_access_goes_from_a_frame_for_good() {
    let mut stack = Stack::start().await;
    let vm_id = vm(&mut stack, wire::CreateVmRequest::default(), slot(MIB)).await;
    fault(&mut stack, vm_id, 0, WRITE).await;
    for (target, track, was_writable) in [
        (Target::Gpa(0), None, true),
        (Target::Gpa(0), None, false),
        (Target::Gpa(PAGE), Some(true), false),
        (Target::SlotId(0), None, false),
    ] {
        let request = wire::WriteProtectRequest {
            vm_id,
            target: Some(target),
            track,
        };
        let answer = stack.client.write_protect(request).await.unwrap();
        assert_eq!(answer.into_inner().was_writable, was_writable, "{target:?}");
    }
    let (ret_pf, _) = fault(&mut stack, vm_id, PAGE, WRITE).await;
    assert_eq!(ret_pf, RetPf::Emulate, "somebody sees every write");
}

#[tokio::test]
async fn the_host_changes_its_mappings() {
    let mut stack = Stack::start().await;
    let vm_id = vm(&mut stack, wire::CreateVmRequest::default(), slot(2 * MIB)).await;
    let zapped = |counts: wire::Counts| counts.pages_zapped;
    fault(&mut stack, vm_id, 0, WRITE).await;
    // Read again, shared memory is mapped without write access, and the write takes it away first.
    assert_eq!(
        zapped(change(&mut stack, vm_id, HostChange::Share).await),
        1
    );
    assert_eq!(fault(&mut stack, vm_id, 0, READ).await.0, RetPf::Fixed);
    assert_eq!(
        fault(&mut stack, vm_id, 0, WRITE | 1 << 3).await.0,
        RetPf::Retry
    );
    assert_eq!(fault(&mut stack, vm_id, 0, WRITE).await.0, RetPf::Fixed);
    assert_eq!(
        zapped(change(&mut stack, vm_id, HostChange::NoAccess).await),
        1
    );
    let refused = stack.fault(vm_id, 0, 0).await.unwrap_err();
    assert_eq!(crate::stack::reason_of(&refused).1, "14");
    assert_eq!(
        zapped(change(&mut stack, vm_id, HostChange::ReadWrite).await),
        0
    );
    assert_eq!(fault(&mut stack, vm_id, 0, WRITE).await.0, RetPf::Fixed);
}

#[tokio::test]
async fn executable_huge_pages_come_back_when_recovered() {
    let mut stack = Stack::start().await;
    let huge = Slot {
        host_page_size: wire::HostPageSize::HostPageSize2m.into(),
        ..slot(2 * MIB)
    };
    let vm_id = vm(&mut stack, wire::CreateVmRequest::default(), huge).await;
    let request = wire::SetNxHugePagesRequest { vm_id, on: true };
    stack.client.set_nx_huge_pages(request).await.unwrap();
    assert_eq!(fault(&mut stack, vm_id, 0, EXEC).await, (RetPf::Fixed, 1));
    assert_eq!(stack.stats(vm_id).await.nx_lpage_splits, 1);
    for recovered in [1, 0] {
        let request = wire::RecoverNxHugePagesRequest { vm_id, most: 8 };
        let answer = stack.client.recover_nx_huge_pages(request).await.unwrap();
        assert_eq!(answer.into_inner().recovered, recovered);
    }
    assert_eq!(fault(&mut stack, vm_id, 0, READ).await, (RetPf::Fixed, 2));
}
