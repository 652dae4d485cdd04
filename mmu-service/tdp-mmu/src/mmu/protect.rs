//! Taking write access or the dirty bit from leaves, and asking which were used.
//!
//! Source: tdp_mmu.c, `wrprot_gfn_range()`, `clear_dirty_gfn_range()`, `clear_dirty_pt_masked()`,
//! `write_protect_gfn()`, `kvm_tdp_mmu_age_gfn_range()`. None of them ever meets a mirror leaf:
//! private memory has no dirty log and no host mapping.

use std::ops::{ControlFlow, Range};

use tdx_defs::{Gfn, Level};

use super::Mmu;
use super::arena::TableId;
use super::iter::{Step, Visit};
use super::lock::{ReadGuard, WriteGuard};
use super::spte;
use crate::sync::atomic::Ordering;
use crate::trace::Event;

impl Mmu {
    /// Takes `bit` from every leaf of `range` whose level is at least `min_level`: W for
    /// wrprot_gfn_range, D for clear_dirty_gfn_range.
    pub(crate) fn clear_range_shared<'a>(
        &'a self,
        held: ReadGuard<'a>,
        root: TableId,
        range: Range<u64>,
        min_level: Level,
        bit: u64,
    ) -> ReadGuard<'a> {
        self.visit_shared(held, root, range, min_level, &mut |at| {
            self.change_until_done(&at, at.gfn, |spte| {
                let set = spte::is_leaf(spte, at.level) && spte & bit != 0;
                set.then_some(spte & !bit)
            });
        })
    }

    /// clear_dirty_pt_masked: takes `bit` from the 4 KiB leaves whose frame has its bit in `mask`,
    /// counted from `first`.
    pub(crate) fn clear_masked(
        &self,
        _held: &WriteGuard<'_>,
        root: TableId,
        first: u64,
        mask: u64,
        bit: u64,
    ) {
        let range = first + u64::from(mask.trailing_zeros())..first + 64;
        self.visit(root, range, Level::L4K, &mut |at| {
            if mask >> (at.gfn.get().saturating_sub(first)) == 0 {
                return ControlFlow::Break(());
            }
            let meant = at.level == Level::L4K && mask >> (at.gfn.get() - first) & 1 != 0;
            if meant && spte::is_leaf(at.spte, at.level) && at.spte & bit != 0 {
                // The fast path and aging work without mmu_lock: only the bit may change.
                let old = self.arena.entry(at.slot).fetch_and(!bit, Ordering::AcqRel);
                self.trace_bits(&at, old, old & !bit);
            }
            ControlFlow::Continue(())
        });
    }

    /// write_protect_gfn: the leaf of a frame loses W and MMU-writable, so that the fast path
    /// cannot give write access back. Whether there was something to lose.
    pub(crate) fn write_protect_gfn(
        &self,
        held: &WriteGuard<'_>,
        root: TableId,
        gfn: Gfn,
        min_level: Level,
    ) -> bool {
        let mut protected = false;
        let range = gfn.get()..gfn.get() + 1;
        self.visit(root, range, min_level, &mut |at| {
            if !spte::is_leaf(at.spte, at.level) {
                return ControlFlow::Continue(());
            }
            let new = at.spte & !(spte::WRITE | spte::MMU_WRITABLE);
            if new != at.spte {
                let step = Step {
                    slot: at.slot,
                    level: at.level,
                    spte: at.spte,
                };
                self.set_spte(held, &step, at.gfn, new, &mut Vec::new());
                protected = true;
            }
            ControlFlow::Break(())
        });
        protected
    }

    /// kvm_tdp_mmu_age_gfn_range, without mmu_lock: whether a leaf of `range` was used. With
    /// `forget` every one loses its accessed bit, else the first answers.
    pub(crate) fn age_range(&self, root: TableId, range: Range<u64>, forget: bool) -> bool {
        let _rcu = crossbeam_epoch::pin();
        let mut young = false;
        self.visit(root, range, Level::L4K, &mut |at| {
            if !spte::is_leaf(at.spte, at.level) || at.spte & spte::ACCESSED == 0 {
                return ControlFlow::Continue(());
            }
            young = true;
            if !forget {
                return ControlFlow::Break(());
            }
            self.forget_access(&at);
            ControlFlow::Continue(())
        });
        young
    }

    /// Model: the kernel clears the bit whatever is there by now. FROZEN has the same bit, so here
    /// only a leaf loses it.
    fn forget_access(&self, at: &Visit) {
        let mut old = at.spte;
        while spte::is_leaf(old, at.level) && old & spte::ACCESSED != 0 {
            let new = old & !spte::ACCESSED;
            match self.swap(at.slot, old, new) {
                Ok(()) => return self.trace_bits(at, old, new),
                Err(found) => old = found,
            }
        }
    }

    /// Changes of single bits print their event and skip the change handler.
    fn trace_bits(&self, at: &Visit, old: u64, new: u64) {
        self.tracer.emit(|| Event::SpteChanged {
            gfn: at.gfn,
            level: at.level,
            old_spte: old,
            new_spte: new,
        });
    }

    /// What the processor does on an access that the tables allow: sets accessed, and dirty on a
    /// write. The leaf before, or `None` when the access faults.
    pub(crate) fn hardware_access(&self, root: TableId, gfn: Gfn, write: bool) -> Option<Step> {
        let _rcu = crossbeam_epoch::pin();
        loop {
            let step = self.last(root, gfn)?;
            let needed = if write { spte::WRITE } else { spte::READ };
            if !spte::is_leaf(step.spte, step.level) || step.spte & needed == 0 {
                return None;
            }
            let dirty = if write { spte::DIRTY } else { 0 };
            let new = step.spte | spte::ACCESSED | dirty;
            if self.swap(step.slot, step.spte, new).is_ok() {
                return Some(step);
            }
        }
    }
}
