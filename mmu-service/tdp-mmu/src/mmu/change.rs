//! Changing one entry.
//!
//! Source: `__tdp_mmu_set_spte_atomic()`, `tdp_mmu_set_spte_atomic()`, `tdp_mmu_set_spte()`,
//! `handle_changed_spte()`, `set_external_spte_present()`, `get_external_spt()`,
//! arch/x86/kvm/mmu/tdp_mmu.c.
//!
//! Under the read side of mmu_lock an entry of a mirror root goes NP → FROZEN → new, and the
//! module is called in between; under the write side it goes to NP before the module is called.
//!
//! Invariants
//! - C1  An entry of a mirror root leaves FROZEN only after the module has answered.
//! - C2  A mirror leaf is 4 KiB.
//! - C3  The change handler runs once for each change, after the new value is visible.

use tdx_defs::{Gfn, Level, Pfn};

use super::Mmu;
use super::arena::{Slot, TableId};
use super::iter::Step;
use super::lock::WriteGuard;
use super::removal::ExternalOp;
use super::spte;
use crate::bugs::Check;
use crate::sync::atomic::Ordering;
use crate::trace::Event;

/// How mmu_lock is held by whoever changes entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockMode {
    Shared,
    Exclusive,
}

/// Somebody else changed the entry first, or it may not be changed (−EBUSY).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lost;

impl Mmu {
    /// Compare and swap of one entry; what is there instead when it fails.
    pub(crate) fn swap(&self, slot: Slot, old: u64, new: u64) -> Result<(), u64> {
        self.check_ve(new);
        self.arena
            .entry(slot)
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    pub(crate) fn store(&self, slot: Slot, new: u64) {
        self.check_ve(new);
        self.arena.entry(slot).store(new, Ordering::Release);
    }

    /// is_ept_ve_possible: a value that raises #VE in a guest that does not expect it (B25).
    ///
    /// Model: KVM's debug build asks this of every value but an ordinary VM's MMIO entries. Those
    /// of a TD are there to raise #VE, so they are left out, too.
    fn check_ve(&self, new: u64) {
        if spte::may_raise_ve(new) {
            self.bugs
                .warn(Check::B25, || format!("{new:#x} does not suppress #VE"));
        }
    }

    /// tdp_mmu_set_spte_atomic for an entry of a direct root: the module never has to follow.
    pub(crate) fn set_direct_atomic(&self, step: &Step, gfn: Gfn, new: u64) -> Result<(), Lost> {
        let old = step.spte;
        if old == spte::FROZEN {
            self.bugs
                .warn(Check::B6, || format!("change of the frozen entry of {gfn}"));
            return Err(Lost);
        }
        self.swap(step.slot, old, new).map_err(|_| Lost)?;
        let mut none = Vec::new();
        self.handle_changed(
            gfn,
            step.level,
            (old, new),
            LockMode::Shared,
            false,
            &mut none,
        );
        Ok(())
    }

    /// The first half of an atomic change of a mirror entry: old → FROZEN.
    pub(crate) fn freeze(&self, step: &Step, gfn: Gfn, new: u64) -> Result<(), Lost> {
        let old = step.spte;
        if old == spte::FROZEN {
            self.bugs
                .warn(Check::B6, || format!("freeze of the frozen entry of {gfn}"));
            return Err(Lost);
        }
        if !spte::is_present(new) {
            self.bugs.bug(Check::B7, || {
                format!("atomic zap of the mirror entry of {gfn}")
            });
            return Err(Lost);
        }
        if spte::is_present(old) {
            self.bugs.bug(Check::B8, || {
                format!("atomic change of the present entry of {gfn}")
            });
        }
        self.swap(step.slot, old, spte::FROZEN).map_err(|_| Lost)
    }

    /// What the module must do before `new` may be published at an entry of `level`.
    pub(crate) fn external_op(&self, gfn: Gfn, level: Level, new: u64) -> ExternalOp {
        if spte::is_leaf(new, level) {
            return ExternalOp::SetSpte {
                gfn,
                level,
                spte: new,
            };
        }
        let external = TableId::linked_by(new).and_then(|child| {
            let header = self.arena.header(child);
            let role = header.role();
            if role.level().parent() != Some(level) || header.gfn() != gfn {
                self.bugs.warn(Check::B10, || {
                    format!(
                        "table of level {} for {} linked at level {level} for {gfn}",
                        role.level(),
                        header.gfn()
                    )
                });
            }
            header.external()
        });
        if external.is_none() {
            self.bugs.bug(Check::B9, || {
                format!("mirror table of {gfn} has no page to hand over")
            });
        }
        ExternalOp::LinkSpt {
            gfn,
            level,
            external,
        }
    }

    /// tdp_mmu_set_spte, under the write side. What the module must do is pushed to `ops`.
    pub(crate) fn set_spte(
        &self,
        held: &WriteGuard<'_>,
        step: &Step,
        gfn: Gfn,
        new: u64,
        ops: &mut Vec<ExternalOp>,
    ) {
        let _ = held;
        if step.spte == spte::FROZEN || new == spte::FROZEN {
            self.bugs.warn(Check::B12, || {
                format!("non-atomic change of a frozen entry of {gfn}")
            });
        }
        self.check_ve(new);
        let is_mirror = self.arena.header(step.slot.table).role().is_mirror();
        // The fast path changes leaves without mmu_lock, so the value found counts.
        let old = self.arena.entry(step.slot).swap(new, Ordering::AcqRel);
        self.handle_changed(
            gfn,
            step.level,
            (old, new),
            LockMode::Exclusive,
            is_mirror,
            ops,
        );
        if is_mirror {
            if spte::is_present(new) {
                self.bugs.bug(Check::B11, || {
                    format!("mirror entry of {gfn} made present by force")
                });
            }
            if spte::is_leaf(old, step.level) {
                ops.push(ExternalOp::RemoveSpte {
                    gfn,
                    level: step.level,
                    spte: old,
                });
            }
        }
    }

    /// handle_changed_spte: bookkeeping after an entry has its new value.
    pub(crate) fn handle_changed(
        &self,
        gfn: Gfn,
        level: Level,
        (old, new): (u64, u64),
        mode: LockMode,
        is_mirror: bool,
        ops: &mut Vec<ExternalOp>,
    ) {
        if old == new {
            return;
        }
        self.tracer.emit(|| Event::SpteChanged {
            gfn,
            level,
            old_spte: old,
            new_spte: new,
        });
        let (was_present, is_present) = (spte::is_present(old), spte::is_present(new));
        let (was_leaf, is_leaf) = (spte::is_leaf(old, level), spte::is_leaf(new, level));
        let pfn_changed = spte::pfn(old) != spte::pfn(new);
        if was_leaf && is_leaf && pfn_changed {
            // Model: a real host stops here (BUG); this VM is bugged instead.
            self.bugs.bug(Check::B20, || {
                format!(
                    "leaf of {gfn} changed from {} to {}",
                    spte::pfn(old),
                    spte::pfn(new)
                )
            });
        }
        if !was_present && !is_present {
            let expected = spte::is_mmio(old) || spte::is_mmio(new) || new == spte::FROZEN;
            if !expected {
                self.bugs.warn(Check::B21, || {
                    format!("entry of {gfn}: {old:#x} to {new:#x}")
                });
            }
            return;
        }
        if was_leaf != is_leaf {
            self.account_pages(level, if is_leaf { 1 } else { -1 });
        }
        let was_table = was_present && !was_leaf;
        if was_table
            && (is_leaf || !is_present || pfn_changed)
            && let Some(table) = TableId::linked_by(old)
        {
            self.remove_table(table, mode, is_mirror, ops);
        }
    }

    /// The page behind a leaf.
    pub(crate) fn leaf_pfn(&self, step: &Step) -> Option<Pfn> {
        spte::is_leaf(step.spte, step.level).then(|| spte::pfn(step.spte))
    }
}

#[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
pub(crate) mod tests;
