//! KVM_SET_USER_MEMORY_REGION2.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_set_memory_region()`, `kvm_invalidate_memslot()`.
//!
//! Model: slots are created and deleted, not moved or re-flagged.

use std::sync::Arc;

use tdx_defs::{PAGE_SHIFT, PAGE_SIZE};

use super::Vm;
use crate::counts::Counts;
use crate::error::VmError;
use crate::memory::attributes::PrivateBits;
use crate::memory::backing::Backing;
use crate::memory::slots::{MAX_SLOT_PAGES, MAX_SLOTS, Slot, SlotSpec};
use crate::mmu::roots::Filter;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::lock;

impl Vm {
    /// Creates a slot, or deletes it when its size is 0.
    pub fn set_user_memory_region(&self, spec: SlotSpec) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        if spec.size == 0 {
            self.delete_slot(spec.slot_id)
        } else {
            self.create_slot(spec)
        }
    }

    /// The caller holds slots_lock.
    fn create_slot(&self, spec: SlotSpec) -> Result<Counts, VmError> {
        let range = self.page_range(("slot.gpa", "slot.size"), spec.gpa, spec.size)?;
        let pages = range.end - range.start;
        if pages > MAX_SLOT_PAGES {
            let reason = format!("{pages} pages are above the limit of {MAX_SLOT_PAGES}");
            return Err(VmError::invalid("slot.size", reason));
        }
        if !spec.userspace_addr.is_multiple_of(PAGE_SIZE) {
            let reason = format!("{:#x} is not page aligned", spec.userspace_addr);
            return Err(VmError::invalid("slot.userspace_addr", reason));
        }
        if spec.userspace_addr.checked_add(spec.size).is_none() {
            return Err(VmError::invalid("slot.userspace_addr", "the range wraps"));
        }
        if spec.guest_memfd && spec.read_only {
            let reason = "a slot with guest_memfd cannot be read-only";
            return Err(VmError::invalid("slot.read_only", reason));
        }
        let table = self.slots.all();
        if table.len() >= MAX_SLOTS {
            let reason = format!("the VM has its {MAX_SLOTS} slots");
            return Err(VmError::invalid("slot.slot_id", reason));
        }
        if self.slots.by_id(spec.slot_id).is_some() {
            return Err(VmError::SlotOverlaps(spec.slot_id));
        }
        if let Some(other) = self.slots.overlapping(&range).first() {
            return Err(VmError::SlotOverlaps(other.spec.slot_id));
        }
        let bits = PrivateBits::new(pages);
        for part in lock(&self.private).within(range.clone()) {
            bits.set(part.start - range.start..part.end - range.start, true);
        }
        self.slots.insert(Slot {
            spec,
            gmem: spec
                .guest_memfd
                .then(|| Backing::new(Arc::clone(&self.host), pages)),
            user: Backing::new(Arc::clone(&self.host), pages),
            private: bits,
            gfns: range,
            going: AtomicBool::new(false),
        });
        Ok(Counts::default())
    }

    /// The caller holds slots_lock.
    fn delete_slot(&self, slot_id: u32) -> Result<Counts, VmError> {
        let slot = self.slots.by_id(slot_id).ok_or(VmError::NoSlot(slot_id))?;
        let mut seam = self.seam(0);
        // Faults retry until the slot is gone, then find none.
        slot.going.store(true, Ordering::Release);
        let zapped = self.zap_ranges(
            &mut seam,
            std::slice::from_ref(&slot.gfns),
            Filter::BOTH,
            || {},
        );
        self.note_leaks(&slot);
        self.slots.remove(slot_id);
        let counts = self.finish(seam);
        zapped?;
        Ok(counts)
    }

    /// Pages of a slot that the module kept count as leaked once the slot goes.
    pub(super) fn note_leaks(&self, slot: &Slot) {
        let leaked = slot.gmem.as_ref().map_or(0, Backing::leaked);
        self.leaked.fetch_add(leaked, Ordering::Relaxed);
    }

    /// The part of a slot that a range of host virtual addresses backs, as frames.
    pub(super) fn hva_to_gfns(slot: &Slot, start: u64, end: u64) -> Option<std::ops::Range<u64>> {
        let base = slot.spec.userspace_addr;
        let (from, to) = (start.max(base), end.min(base + slot.spec.size));
        (from < to).then(|| {
            let first = slot.gfns.start + ((from - base) >> PAGE_SHIFT);
            let last = slot.gfns.start + (to - base).div_ceil(PAGE_SIZE);
            first..last
        })
    }
}
