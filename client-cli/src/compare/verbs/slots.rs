//! KVM_SET_USER_MEMORY_REGION: where a recorded slot lies, and what the host has behind it.

use mirror_proto::mmu::{HostPageSize, SetUserMemoryRegionRequest, Slot};

use super::{Context, Done};
use crate::compare::service::call;
use crate::compare::settings::{GUEST_MEMFD, LOG_DIRTY, READ_ONLY, slot_flags};
use crate::compare::stimuli::{self, KnownSlot};
use crate::error::Error;

pub(super) async fn set_region(context: Context<'_>) -> Result<Done, Error> {
    let Context {
        vm,
        host,
        settings,
        at,
        step,
    } = context;
    let id = number!(step, "slot", "slot_id", "id");
    let gpa = number!(step, "gpa", "guest_phys_addr");
    let size = number!(step, "size", "memory_size", "len");
    let hva = number!(step, "hva", "userspace_addr", "addr");
    let flags = readable!(slot_flags(step));
    if flags & !(LOG_DIRTY | READ_ONLY | GUEST_MEMFD) != 0 {
        return Ok(Done::skip(format!(
            "flags {flags:#x} have no counterpart in the model"
        )));
    }
    let Some(slot_id) = u32::try_from(id).ok().filter(|id| *id < 1 << 15) else {
        return Ok(Done::skip(format!(
            "slot {id:#x} is in another address space"
        )));
    };
    let note = step.field("note").unwrap_or("");
    let page_size =
        noted_page_size(note).unwrap_or_else(|| settings.largest(at, gpa >> 12, size >> 12));
    let slot = Slot {
        slot_id,
        gpa,
        size,
        userspace_addr: hva,
        read_only: flags & READ_ONLY != 0,
        log_dirty: flags & LOG_DIRTY != 0,
        host_page_size: page_size.into(),
        demand_zero: note.contains("not-populated") || note.contains("unpopulated"),
        guest_memfd: flags & GUEST_MEMFD != 0,
    };
    let message = SetUserMemoryRegionRequest {
        vm_id: vm.vm_id,
        slot: Some(slot),
    };
    let answer = call!(
        vm.client,
        "SetUserMemoryRegion",
        set_user_memory_region,
        message
    )?;
    if answer.is_ok() {
        let known = KnownSlot {
            gpa,
            size,
            hva,
            log_dirty: slot.log_dirty,
            guest_memfd: slot.guest_memfd,
        };
        match size {
            0 => host.slots.remove(&id),
            _ => host.slots.insert(id, known),
        };
    }
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(Done::of(answer).with(effects))
}

/// What a note says of the host's pages.
fn noted_page_size(note: &str) -> Option<HostPageSize> {
    let says = |words: &[&str]| words.iter().any(|word| note.contains(word));
    if says(&["noTHP", "no-THP", "4K"]) {
        Some(HostPageSize::HostPageSize4k)
    } else if says(&["1G"]) {
        Some(HostPageSize::HostPageSize1g)
    } else if says(&["THP", "2M"]) {
        Some(HostPageSize::HostPageSize2m)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_name_the_pages_of_the_host() {
        for (note, size) in [
            (
                "2M-backed(THP),populated",
                Some(HostPageSize::HostPageSize2m),
            ),
            (
                "THP,populated,congruent",
                Some(HostPageSize::HostPageSize2m),
            ),
            ("4K-backed,populated", Some(HostPageSize::HostPageSize4k)),
            ("hugetlb-1G", Some(HostPageSize::HostPageSize1g)),
            ("MOVE", None),
        ] {
            assert_eq!(noted_page_size(note), size, "{note}");
        }
    }
}
