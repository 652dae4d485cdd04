//! The dirty log of a slot: on, off, read, clear.
//!
//! Source: arch/x86/kvm/x86.c, `kvm_mmu_slot_apply_flags()`; mmu.c,
//! `kvm_arch_mmu_enable_log_dirty_pt_masked()`, `kvm_mmu_slot_try_split_huge_pages()`,
//! `kvm_mmu_recover_huge_pages()`; virt/kvm/kvm_main.c, `kvm_get_dirty_log_protect()`,
//! `kvm_clear_dirty_log_protect()`. Only shared memory is ever logged, so none of this reaches a
//! mirror root.

use std::sync::Arc;

use tdx_defs::{Gfn, Level};

use super::{DirtyLogMode, Vm};
use crate::counts::Counts;
use crate::error::VmError;
use crate::memory::dirty::DirtyBits;
use crate::memory::slots::Slot;
use crate::mmu::arena::TableId;
use crate::mmu::lock::{ReadGuard, WriteGuard};
use crate::mmu::roots::RootTypes;
use crate::mmu::spte;
use crate::sync::lock;
use crate::tdx::seam::Seam;

/// Pages of one word of a bitmap.
const WORD: u64 = 64;

impl Vm {
    /// KVM_GET_DIRTY_LOG: one bit a page, 64 pages a word, page 0 lowest. In mode `Protect` what
    /// is returned is cleared, and its pages are protected again.
    pub fn get_dirty_log(&self, slot_id: u32) -> Result<(Vec<u64>, Counts), VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let (slot, bits) = self.dirty_bits(slot_id)?;
        if self.config.dirty_log != DirtyLogMode::Protect {
            return Ok((bits.copy(), Counts::default()));
        }
        let mut seam = self.seam(0);
        let words = (0..bits.words()).map(|_| u64::MAX).collect::<Vec<_>>();
        let taken = self.take_dirty(&mut seam, &slot, &bits, 0, &words);
        Ok((taken, self.finish(seam)))
    }

    /// KVM_CLEAR_DIRTY_LOG: clears the bits of `bitmap`, counted from page `first`, and protects
    /// their pages again. `first` is a multiple of 64; bits behind the slot are not allowed.
    pub fn clear_dirty_log(
        &self,
        slot_id: u32,
        first: u64,
        bitmap: &[u64],
    ) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let (slot, bits) = self.dirty_bits(slot_id)?;
        if !first.is_multiple_of(WORD) {
            let reason = format!("{first} is not a multiple of {WORD}");
            return Err(VmError::invalid("first_page", reason));
        }
        let pages = slot.gfns.end - slot.gfns.start;
        let behind = |(word, bits): (u64, &u64)| {
            let start = first.saturating_add(word * WORD);
            let left = pages.saturating_sub(start);
            *bits != 0 && left < WORD && bits >> left != 0
        };
        if first > pages || (0..).zip(bitmap).any(behind) {
            let reason = format!("the bits end behind the {pages} pages of the slot");
            return Err(VmError::invalid("bitmap", reason));
        }
        let word = usize::try_from(first / WORD).unwrap_or(usize::MAX);
        let mut seam = self.seam(0);
        self.take_dirty(&mut seam, &slot, &bits, word, bitmap);
        Ok(self.finish(seam))
    }

    fn dirty_bits(&self, slot_id: u32) -> Result<(Arc<Slot>, Arc<DirtyBits>), VmError> {
        let slot = self.slots.by_id(slot_id).ok_or(VmError::NoSlot(slot_id))?;
        let bits = slot.log.bits().ok_or(VmError::NoDirtyLog(slot_id))?;
        Ok((slot, bits))
    }

    /// Takes the bits of `wanted` out of the log, one lock for all.
    fn take_dirty(
        &self,
        seam: &mut Seam<'_>,
        slot: &Slot,
        bits: &DirtyBits,
        first_word: usize,
        wanted: &[u64],
    ) -> Vec<u64> {
        let mut taken = Vec::with_capacity(wanted.len());
        {
            let held = self.mmu.lock.write();
            let roots = self.mmu.roots(RootTypes::DIRECT);
            for (word, &wanted) in (first_word..).zip(wanted) {
                let mask = bits.take(word, wanted);
                taken.push(mask);
                if mask == 0 {
                    continue;
                }
                let first = slot.gfns.start + word as u64 * WORD;
                for &root in &roots {
                    if self.config.dirty_log == DirtyLogMode::ManualInitiallySet {
                        self.split_for_log(&held, root, first, mask);
                    }
                    self.mmu
                        .clear_masked(&held, root, first, mask, self.logged_bit());
                }
            }
        }
        if taken.iter().any(|&mask| mask != 0) {
            seam.counts.flushes += 1;
        }
        taken
    }

    /// Nothing was split or protected when a log began that says every page is dirty.
    fn split_for_log(&self, held: &WriteGuard<'_>, root: TableId, first: u64, mask: u64) {
        let start = first + u64::from(mask.trailing_zeros());
        let end = first + WORD - 1 - u64::from(mask.leading_zeros());
        if self.config.eager_page_split {
            // Without memory for tables the protection of the huge page does.
            let _ = self.mmu.split_range(held, root, start..end + 1, Level::L4K);
        }
        let huge = |gfn: u64| Gfn::new(gfn).align_down(Level::L2M.pages());
        self.mmu
            .write_protect_gfn(held, root, Gfn::new(start), Level::L2M);
        if huge(start) != huge(end) {
            self.mmu
                .write_protect_gfn(held, root, Gfn::new(end), Level::L2M);
        }
    }

    /// The bit by which writes are noticed: D with a page modification log, else W.
    fn logged_bit(&self) -> u64 {
        if self.config.pml {
            spte::DIRTY
        } else {
            spte::WRITE
        }
    }

    /// kvm_mmu_slot_apply_flags: the log of a slot has just begun or ended.
    pub(super) fn apply_log(&self, seam: &mut Seam<'_>, slot: &Slot) {
        if slot.log.is_on() {
            self.begin_log(seam, slot);
        } else {
            self.end_log(seam, slot);
        }
    }

    fn begin_log(&self, seam: &mut Seam<'_>, slot: &Slot) {
        // Faults that looked at the slot before it had a log have ended when this is through.
        drop(self.mmu.lock.write());
        if self.config.dirty_log == DirtyLogMode::ManualInitiallySet {
            return;
        }
        let gfns = || slot.gfns.clone();
        if self.config.eager_page_split {
            // Without memory for tables the faults split.
            self.on_direct_roots(|held, root| {
                self.mmu
                    .split_range_shared(held, root, gfns(), Level::L4K)
                    .0
            });
        }
        let protect = |min_level, bit| {
            self.on_direct_roots(|held, root| {
                self.mmu
                    .clear_range_shared(held, root, gfns(), min_level, bit)
            });
        };
        if self.config.pml {
            protect(Level::L4K, spte::DIRTY);
            protect(Level::L2M, spte::WRITE);
        } else {
            protect(Level::L4K, spte::WRITE);
        }
        seam.counts.flushes += 1;
    }

    /// kvm_mmu_recover_huge_pages.
    fn end_log(&self, seam: &mut Seam<'_>, slot: &Slot) {
        let nx_huge_pages = self.nx_huge_pages();
        let max_level = |gfn: Gfn| self.max_mapping_level(slot, gfn);
        let mut flush = false;
        self.on_direct_roots(|held, root| {
            let range = slot.gfns.clone();
            let (held, recovered) =
                self.mmu
                    .recover_range(held, root, range, nx_huge_pages, &max_level);
            flush |= recovered;
            held
        });
        seam.counts.flushes += u64::from(flush);
    }

    /// Runs an operation on each valid direct root, under the read side of mmu_lock, which the
    /// operation may let go in between.
    pub(super) fn on_direct_roots<'a>(
        &'a self,
        mut run: impl FnMut(ReadGuard<'a>, TableId) -> ReadGuard<'a>,
    ) {
        let mut held = self.mmu.lock.read(0);
        for root in self.mmu.roots(RootTypes::DIRECT) {
            if self.mmu.get_root(root) {
                held = run(held, root);
                self.mmu.put_root(root);
            }
        }
        drop(held);
    }

    /// Takes write access from the shared leaves of a slot, as enabling the dirty log does; writes
    /// then fault and take the fast path. Returns the flush that always follows.
    pub fn write_protect_slot(&self, slot_id: u32) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let slot = self.slots.by_id(slot_id).ok_or(VmError::NoSlot(slot_id))?;
        if slot.gmem.is_some() {
            let reason = "a slot with guest_memfd has no dirty log";
            return Err(VmError::invalid("slot_id", reason));
        }
        let gfns = || slot.gfns.clone();
        self.on_direct_roots(|held, root| {
            self.mmu
                .clear_range_shared(held, root, gfns(), Level::L4K, spte::WRITE)
        });
        let mut seam = self.seam(0);
        seam.counts.flushes += 1;
        Ok(self.finish(seam))
    }
}
