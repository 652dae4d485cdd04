//! The direct root at work: dirty logs, aging, zaps, write protection, and the host that changes
//! its mappings.

use std::sync::Arc;

use mirror_proto::{InvalidField, mmu as wire};
use tdp_mmu::{SlotSpec, Vm, VmError, VmKind};
use tdx_defs::{Gpa, PAGE_SIZE};
use tonic::Status;
use tracing::info_span;
use wire::write_protect_request::Target;

use crate::config::size;
use crate::convert::{counts_to_wire, host_change_from_wire, required};
use crate::shell::Shell;
use crate::status;

/// Pages of one word of a bitmap.
const WORD: u64 = 64;
/// Addresses in one TouchMemory.
const MAX_TOUCHES: u32 = 4096;
/// Room in a message beside a bitmap.
const REST_OF_MESSAGE: u64 = 16 << 10;

fn refused(field: &str, reason: impl Into<String>) -> Status {
    status::of_field(InvalidField::new(field, reason.into()))
}

fn slot_of(vm: &Vm, slot_id: u32) -> Result<SlotSpec, VmError> {
    let slots = vm.info().slots;
    let slot = slots.into_iter().find(|slot| slot.slot_id == slot_id);
    slot.ok_or(VmError::NoSlot(slot_id))
}

pub(super) async fn set_dirty_log(
    shell: &Arc<Shell>,
    request: wire::SetDirtyLogRequest,
) -> Result<wire::SetDirtyLogResponse, Status> {
    let wire::SetDirtyLogRequest { vm_id, slot_id, on } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!("set_dirty_log", kvm.vm = vm_id, kvm.slot = slot_id, on);
    let counts = shell
        .operate(&entry, span, move |vm| {
            let slot = slot_of(vm, slot_id)?;
            vm.set_user_memory_region(SlotSpec {
                log_dirty: on,
                ..slot
            })
        })
        .await?;
    Ok(wire::SetDirtyLogResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn get_dirty_log(
    shell: &Arc<Shell>,
    request: wire::GetDirtyLogRequest,
) -> Result<wire::GetDirtyLogResponse, Status> {
    let wire::GetDirtyLogRequest { vm_id, slot_id } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!("get_dirty_log", kvm.vm = vm_id, kvm.slot = slot_id);
    // Before the log is taken: an answer that cannot be sent must not cost its bits.
    let most = u64::from(shell.limits.max_message).saturating_sub(REST_OF_MESSAGE);
    let (bitmap, counts) = shell
        .operate(&entry, span, move |vm| {
            let bytes = slot_of(vm, slot_id)?.size.div_ceil(PAGE_SIZE).div_ceil(8);
            if bytes > most {
                let reason = format!("a bitmap of {bytes} bytes is above the limit of {most}");
                return Err(VmError::Invalid {
                    field: "slot_id",
                    reason,
                });
            }
            vm.get_dirty_log(slot_id)
        })
        .await?;
    let dirty = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
    Ok(wire::GetDirtyLogResponse {
        bitmap,
        dirty,
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn clear_dirty_log(
    shell: &Arc<Shell>,
    request: wire::ClearDirtyLogRequest,
) -> Result<wire::ClearDirtyLogResponse, Status> {
    let wire::ClearDirtyLogRequest {
        vm_id,
        slot_id,
        first_page,
        bitmap,
        num_pages,
    } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "clear_dirty_log",
        kvm.vm = vm_id,
        kvm.slot = slot_id,
        kvm.first_page = first_page
    );
    let counts = shell
        .operate(&entry, span, move |vm| {
            if num_pages != 0 {
                let pages = slot_of(vm, slot_id)?.size / PAGE_SIZE;
                check_pages(first_page, num_pages, pages, bitmap.len())?;
            }
            vm.clear_dirty_log(slot_id, first_page, &bitmap)
        })
        .await?;
    Ok(wire::ClearDirtyLogResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

/// What kvm_clear_dirty_log_protect asks of a number of pages.
fn check_pages(first: u64, num: u64, pages: u64, words: usize) -> Result<(), VmError> {
    let left = pages.saturating_sub(first);
    let reason = if num > left {
        format!("{num} pages from {first} on end behind the {pages} pages of the slot")
    } else if num < left && !num.is_multiple_of(WORD) {
        format!("{num} is neither a multiple of {WORD} nor the rest of the slot")
    } else if words as u64 > num.div_ceil(WORD) {
        format!("{num} pages have fewer words than the {words} of the bitmap")
    } else {
        return Ok(());
    };
    Err(VmError::Invalid {
        field: "num_pages",
        reason,
    })
}

pub(super) async fn age_range(
    shell: &Arc<Shell>,
    request: wire::AgeRangeRequest,
) -> Result<wire::AgeRangeResponse, Status> {
    let wire::AgeRangeRequest {
        vm_id,
        start,
        end,
        test,
    } = request;
    if test && start.checked_add(PAGE_SIZE) != Some(end) {
        let reason = format!("{end:#x}: a test looks at one page, {start:#x} + {PAGE_SIZE:#x}");
        return Err(refused("end", reason));
    }
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "age_range",
        kvm.vm = vm_id,
        kvm.start = start,
        kvm.end = end,
        test
    );
    let young = shell
        .operate(&entry, span, move |vm| match test {
            true => vm.test_age_hva(start),
            false => vm.age_hva(start, end),
        })
        .await?;
    Ok(wire::AgeRangeResponse { young })
}

pub(super) async fn touch_memory(
    shell: &Arc<Shell>,
    request: wire::TouchMemoryRequest,
) -> Result<wire::TouchMemoryResponse, Status> {
    let wire::TouchMemoryRequest {
        vm_id,
        gpa,
        count,
        stride,
        write,
    } = request;
    if count > MAX_TOUCHES {
        let reason = format!("{count} addresses, the limit is {MAX_TOUCHES}");
        return Err(refused("count", reason));
    }
    let count = u64::from(count.max(1));
    let last = stride
        .checked_mul(count - 1)
        .and_then(|far| gpa.checked_add(far));
    if last.is_none() {
        let reason = format!("{count} addresses {stride:#x} apart end above 64 bits");
        return Err(refused("stride", reason));
    }
    let entry = shell.live_vm(vm_id)?;
    let side = |gpa| entry.layout.split(Gpa::new(gpa)).1;
    let is_td = entry.vm.info().kind == VmKind::Td;
    if is_td && last.is_some_and(|last| side(gpa) != side(last)) {
        let reason = format!("{count} addresses {stride:#x} apart leave private memory");
        return Err(refused("stride", reason));
    }
    let span = info_span!(
        "touch_memory",
        kvm.vm = vm_id,
        kvm.gpa = gpa,
        count,
        stride,
        write
    );
    let faulting = shell
        .operate(&entry, span, move |vm| {
            // All or nothing: with both ends, every address between them is shared.
            let mut faulting = 0;
            for at in [count - 1].into_iter().chain(0..count - 1) {
                faulting += u32::from(!vm.access(gpa + at * stride, write)?);
            }
            Ok(faulting)
        })
        .await?;
    Ok(wire::TouchMemoryResponse { faulting })
}

pub(super) async fn zap_all_fast(
    shell: &Arc<Shell>,
    request: wire::ZapAllFastRequest,
) -> Result<wire::ZapAllFastResponse, Status> {
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!("zap_all_fast", kvm.vm = entry.id);
    shell.operate(&entry, span, Vm::zap_all_fast).await?;
    Ok(wire::ZapAllFastResponse {})
}

pub(super) async fn zap_all(
    shell: &Arc<Shell>,
    request: wire::ZapAllRequest,
) -> Result<wire::ZapAllResponse, Status> {
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!("zap_all", kvm.vm = entry.id);
    shell.operate(&entry, span, Vm::release_user_memory).await?;
    Ok(wire::ZapAllResponse {})
}

pub(super) async fn zap_range(
    shell: &Arc<Shell>,
    request: wire::ZapRangeRequest,
) -> Result<wire::ZapRangeResponse, Status> {
    let wire::ZapRangeRequest { vm_id, gpa, size } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!("zap_range", kvm.vm = vm_id, kvm.gpa = gpa, kvm.size = size);
    let counts = shell
        .operate(&entry, span, move |vm| vm.zap_range(gpa, size))
        .await?;
    Ok(wire::ZapRangeResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn write_protect(
    shell: &Arc<Shell>,
    request: wire::WriteProtectRequest,
) -> Result<wire::WriteProtectResponse, Status> {
    let target = required(request.target, "target").map_err(status::of_field)?;
    let track = request.track;
    if matches!(target, Target::SlotId(_)) && track.is_some() {
        return Err(refused("track", "goes with a frame, not with a slot"));
    }
    if let Target::Gpa(gpa) = target
        && !gpa.is_multiple_of(PAGE_SIZE)
    {
        return Err(refused("gpa", format!("{gpa:#x} is not page aligned")));
    }
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!("write_protect", kvm.vm = entry.id, ?target, track);
    let (was_writable, counts) = shell
        .operate(&entry, span, move |vm| match (target, track) {
            (Target::SlotId(slot_id), _) => {
                vm.write_protect_slot(slot_id).map(|counts| (false, counts))
            }
            (Target::Gpa(gpa), None) => vm.write_protect_gfn(gpa),
            (Target::Gpa(gpa), Some(on)) => {
                let counts = vm.track_writes(gpa, on)?;
                Ok((on && counts.flushes != 0, counts))
            }
        })
        .await?;
    Ok(wire::WriteProtectResponse {
        was_writable,
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn change_host_mapping(
    shell: &Arc<Shell>,
    request: wire::ChangeHostMappingRequest,
) -> Result<wire::ChangeHostMappingResponse, Status> {
    let wire::ChangeHostMappingRequest {
        vm_id,
        start,
        end,
        change,
        page_size,
        silent,
    } = request;
    let change = host_change_from_wire(change, page_size).map_err(status::of_field)?;
    if change.is_none() && silent {
        return Err(refused(
            "silent",
            "without a change there is only the notifier",
        ));
    }
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "change_host_mapping",
        kvm.vm = vm_id,
        kvm.start = start,
        kvm.end = end,
        ?change,
        silent
    );
    let counts = shell
        .operate(&entry, span, move |vm| match (change, silent) {
            (None, _) => vm.notify_unmap(start, end),
            (Some(change), false) => vm.change_host_mapping(start, end, change),
            (Some(change), true) => vm
                .set_host_mapping(start, end, change)
                .map(|()| tdp_mmu::Counts::default()),
        })
        .await?;
    Ok(wire::ChangeHostMappingResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn set_nx_huge_pages(
    shell: &Arc<Shell>,
    request: wire::SetNxHugePagesRequest,
) -> Result<wire::SetNxHugePagesResponse, Status> {
    let wire::SetNxHugePagesRequest { vm_id, on } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!("set_nx_huge_pages", kvm.vm = vm_id, on);
    shell
        .operate(&entry, span, move |vm| vm.set_nx_huge_pages(on))
        .await?;
    Ok(wire::SetNxHugePagesResponse {})
}

pub(super) async fn recover_nx_huge_pages(
    shell: &Arc<Shell>,
    request: wire::RecoverNxHugePagesRequest,
) -> Result<wire::RecoverNxHugePagesResponse, Status> {
    let wire::RecoverNxHugePagesRequest { vm_id, most } = request;
    // The core goes through its list once, so that any number is bounded by it.
    if size(most) == 0 {
        return Err(refused("most", "0 is below 1"));
    }
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!("recover_nx_huge_pages", kvm.vm = vm_id, most);
    let (recovered, counts) = shell
        .operate(&entry, span, move |vm| vm.recover_nx_huge_pages(most))
        .await?;
    Ok(wire::RecoverNxHugePagesResponse {
        recovered,
        counts: Some(counts_to_wire(&counts)),
    })
}
