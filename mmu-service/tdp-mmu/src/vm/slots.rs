//! KVM_SET_USER_MEMORY_REGION2.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_set_memory_region()`, `kvm_invalidate_memslot()`;
//! arch/x86/kvm/mmu/mmu.c, `kvm_arch_flush_shadow_memslot()`, `kvm_mmu_invalidate_mmio_sptes()`.

use std::ops::Range;
use std::sync::Arc;

use tdx_defs::{PAGE_SHIFT, PAGE_SIZE};

use super::{DirtyLogMode, Vm};
use crate::counts::Counts;
use crate::error::VmError;
use crate::ledger::Note;
use crate::memory::attributes::PrivateBits;
use crate::memory::backing::Backing;
use crate::memory::dirty::DirtyLog;
use crate::memory::slots::{MAX_SLOT_PAGES, MAX_SLOTS, Slot, SlotSpec};
use crate::memory::user::UserMemory;
use crate::mmu::roots::Filter;
use crate::seam::SeamError;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::lock;
use crate::tdx::seam::Seam;

impl Vm {
    /// Creates a slot, or deletes it when its size is 0. Of a slot that is there, the address may
    /// change, or whether it logs dirty pages.
    pub fn set_user_memory_region(&self, spec: SlotSpec) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        if spec.size == 0 {
            self.delete_slot(spec.slot_id)
        } else {
            let range = self.check_slot(&spec)?;
            match self.slots.by_id(spec.slot_id) {
                None => self.create_slot(spec, range),
                Some(old) => self.change_slot(&old, spec, range),
            }
        }
    }

    /// What does not depend on other slots; the frames of the slot.
    fn check_slot(&self, spec: &SlotSpec) -> Result<Range<u64>, VmError> {
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
        if spec.guest_memfd {
            for (set, field, what) in [
                (spec.read_only, "slot.read_only", "be read-only"),
                (spec.log_dirty, "slot.log_dirty", "log dirty pages"),
            ] {
                if set {
                    let reason = format!("a slot with guest_memfd cannot {what}");
                    return Err(VmError::invalid(field, reason));
                }
            }
        }
        Ok(range)
    }

    /// The caller holds slots_lock.
    fn create_slot(&self, spec: SlotSpec, range: Range<u64>) -> Result<Counts, VmError> {
        if self.slots.all().len() >= MAX_SLOTS {
            let reason = format!("the VM has its {MAX_SLOTS} slots");
            return Err(VmError::invalid("slot.slot_id", reason));
        }
        self.check_overlap(&spec, &range)?;
        self.note(Note::Slot(spec))?;
        let wrapped = self.slots.insert(self.new_slot(spec, range));
        self.after_swap(wrapped);
        Ok(Counts::default())
    }

    /// A slot with nothing behind it yet.
    pub(crate) fn new_slot(&self, spec: SlotSpec, range: Range<u64>) -> Slot {
        let pages = range.end - range.start;
        let host = || Arc::clone(&self.host);
        let log = DirtyLog::default();
        if spec.log_dirty {
            log.enable(
                pages,
                self.config.dirty_log == DirtyLogMode::ManualInitiallySet,
            );
        }
        Slot {
            spec,
            gmem: spec.guest_memfd.then(|| Backing::new(host(), pages)),
            user: Arc::new(UserMemory::new(
                host(),
                spec.userspace_addr >> PAGE_SHIFT,
                pages,
                spec.host_page_size,
                spec.demand_zero,
            )),
            log: Arc::new(log),
            private: self.private_bits(&range),
            gfns: range,
            going: AtomicBool::new(false),
        }
    }

    fn check_overlap(&self, spec: &SlotSpec, range: &Range<u64>) -> Result<(), VmError> {
        let others = self.slots.overlapping(range);
        let other = others.iter().find(|slot| slot.spec.slot_id != spec.slot_id);
        other.map_or(Ok(()), |slot| Err(VmError::SlotOverlaps(slot.spec.slot_id)))
    }

    fn private_bits(&self, range: &Range<u64>) -> PrivateBits {
        let bits = PrivateBits::new(range.end - range.start);
        for part in lock(&self.private).within(range.clone()) {
            bits.set(part.start - range.start..part.end - range.start, true);
        }
        bits
    }

    /// KVM_MR_MOVE and KVM_MR_FLAGS_ONLY. The caller holds slots_lock.
    fn change_slot(
        &self,
        old: &Arc<Slot>,
        spec: SlotSpec,
        range: Range<u64>,
    ) -> Result<Counts, VmError> {
        let fixed = [
            (old.spec.guest_memfd || spec.guest_memfd, "slot.guest_memfd"),
            (old.spec.size != spec.size, "slot.size"),
            (
                old.spec.userspace_addr != spec.userspace_addr,
                "slot.userspace_addr",
            ),
            (old.spec.read_only != spec.read_only, "slot.read_only"),
        ];
        if let Some((_, field)) = fixed.into_iter().find(|(differs, _)| *differs) {
            let reason = format!("slot {} is there and cannot change this", spec.slot_id);
            return Err(VmError::invalid(field, reason));
        }
        let moved = range != old.gfns;
        let toggled = old.spec.log_dirty != spec.log_dirty;
        if !moved && !toggled {
            return Ok(Counts::default());
        }
        if moved {
            self.check_overlap(&spec, &range)?;
        }
        let mut seam = self.seam(0);
        if moved {
            self.zap_slot(&mut seam, old)?;
        }
        if toggled && spec.log_dirty {
            let all_set = self.config.dirty_log == DirtyLogMode::ManualInitiallySet;
            old.log.enable(range.end - range.start, all_set);
        }
        let spec = SlotSpec {
            // The memory is the one that was there.
            host_page_size: old.spec.host_page_size,
            demand_zero: old.spec.demand_zero,
            ..spec
        };
        let kept = self.note(Note::Slot(spec));
        if let Err(error) = kept {
            old.going.store(false, Ordering::Release);
            return Err(error.into());
        }
        let slot = Slot {
            spec,
            gmem: None,
            user: Arc::clone(&old.user),
            log: Arc::clone(&old.log),
            private: self.private_bits(&range),
            gfns: range,
            going: AtomicBool::new(false),
        };
        let wrapped = self.slots.replace(slot, moved);
        if toggled && !spec.log_dirty {
            old.log.disable();
        }
        self.after_swap(wrapped);
        // kvm_mmu_slot_apply_flags: nothing to do for a read-only slot, or one that moved.
        if let Some(slot) = self.slots.by_id(spec.slot_id)
            && toggled
            && !moved
            && !spec.read_only
        {
            self.apply_log(&mut seam, &slot);
        }
        Ok(self.finish(seam))
    }

    /// kvm_arch_memslots_updated: MMIO entries of an older generation must not look valid.
    fn after_swap(&self, wrapped: bool) {
        if wrapped {
            self.zap_fast();
        }
    }

    /// kvm_arch_flush_shadow_memslot of a slot that goes or moves: faults retry until it is gone.
    fn zap_slot(&self, seam: &mut Seam<'_>, slot: &Slot) -> Result<(), SeamError> {
        slot.going.store(true, Ordering::Release);
        if !self.is_td() && self.config.slot_zap_all {
            self.zap_fast();
            return Ok(());
        }
        let gfns = std::slice::from_ref(&slot.gfns);
        self.zap_ranges(seam, gfns, Filter::BOTH, || {})
    }

    /// The caller holds slots_lock.
    fn delete_slot(&self, slot_id: u32) -> Result<Counts, VmError> {
        let slot = self.slots.by_id(slot_id).ok_or(VmError::NoSlot(slot_id))?;
        let mut seam = self.seam(0);
        let zapped = self.zap_slot(&mut seam, &slot);
        if let Err(error) = self.note(Note::NoSlot(slot_id)) {
            // It stays, empty.
            slot.going.store(false, Ordering::Release);
            self.finish(seam);
            return Err(error.into());
        }
        self.note_leaks(&slot);
        let wrapped = self.slots.remove(slot_id);
        self.after_swap(wrapped);
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
    pub(super) fn hva_to_gfns(slot: &Slot, start: u64, end: u64) -> Option<Range<u64>> {
        let base = slot.spec.userspace_addr;
        let (from, to) = (start.max(base), end.min(base + slot.spec.size));
        (from < to).then(|| {
            let first = slot.gfns.start + ((from - base) >> PAGE_SHIFT);
            let last = slot.gfns.start + (to - base).div_ceil(PAGE_SIZE);
            first..last
        })
    }
}
