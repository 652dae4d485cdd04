//! The Secure EPT entry that a call is about: operand, walk, lock, state, TLB tracking.
//!
//! Source: TDX module source, helpers.c `check_gpa_validity`, sept_manager.c.

use std::cell::{Cell, OnceCell};

use tdx_defs::{CompletionStatus as Status, Gpa, Leaf, OperandId, PAGE_SIZE};

use super::{Running, busy, inconsistent, invalid, with_details};
use crate::dispatch::Fail;
use crate::locks::{LockGuard, LockMode};
use crate::pamt::{PageSize, PamtEntry};
use crate::platform::Release;
use crate::sept::{EntryLock, SeptEntry, Slot, Table, Walk};

/// RCX of most Secure EPT leaves: level in bits 2:0, GPA in bits 51:12.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SeptOperand {
    pub(crate) gpa: Gpa,
    pub(crate) level: u8,
}

impl SeptOperand {
    /// GPA-LEVEL: reserved bits, level and alignment, one status for all three.
    pub(crate) fn decode(rcx: u64, min: u8, max: u8) -> Result<Self, Fail> {
        const RESERVED: u64 = 0xFFF0_0000_0000_0FF8;
        let level = (rcx & 0b111) as u8;
        let gpa = Gpa::new(rcx & !0b111);
        let in_range = (min..=max).contains(&level);
        if rcx & RESERVED != 0 || !in_range || !gpa.is_aligned(level_bytes(level)) {
            return Err(invalid(OperandId::RCX));
        }
        Ok(Self { gpa, level })
    }
}

/// Bytes that an entry of a level (0 to 4) covers.
fn level_bytes(level: u8) -> u64 {
    PAGE_SIZE << (9 * u32::from(level))
}

impl<'t> Running<'t> {
    /// Whether release 1.5.05 answers.
    pub(crate) fn is_1_5_05(&self) -> bool {
        self.release == Release::R1_5_05
    }

    /// The release that answers.
    pub(crate) fn release(&self) -> Release {
        self.release
    }

    /// GPA-VALID: private, and within the TD's address width.
    pub(crate) fn check_gpa(&self, gpa: Gpa) -> Result<(), Fail> {
        if gpa.get() & self.not_private != 0 {
            return Err(invalid(OperandId::RCX));
        }
        Ok(())
    }

    /// SEPT_TREE.
    pub(crate) fn lock_tree(&self, mode: LockMode) -> Result<LockGuard<'t>, Fail> {
        self.td
            .sept_lock
            .try_lock(mode)
            .map_err(|_| busy(OperandId::SEPT_TREE))
    }

    /// The walk towards an entry, wherever it ends. The caller holds SEPT_TREE or the TDR.
    pub(crate) fn walk_towards(&self, gpa: Gpa, level: u8) -> Result<Walk<'t>, Fail> {
        self.td
            .sept()
            .walk(self.config.root_level, gpa, level)
            .ok_or_else(inconsistent)
    }

    /// The walk to an entry; stopping before it is an error.
    pub(crate) fn walk_to(&self, operand: SeptOperand) -> Result<Walk<'t>, Fail> {
        let walk = self.walk_towards(operand.gpa, operand.level)?;
        if walk.slot.level != operand.level {
            let status = Status::EPT_WALK_FAILED.with(OperandId::RCX);
            return Err(with_details(status, walk.value, walk.slot.level));
        }
        Ok(walk)
    }

    /// ENTRY-LOCK.
    pub(crate) fn lock_entry(&self, walk: Walk<'t>) -> Result<EntryLock<'t>, Fail> {
        let status = Status::OPERAND_BUSY.with(OperandId::RCX);
        walk.slot
            .try_lock()
            .ok_or_else(|| with_details(status, walk.value, walk.slot.level))
    }

    /// SEPT_TREE, to be taken when the first entry is asked for.
    pub(crate) fn tree(&self, mode: LockMode) -> Tree<'_, 't> {
        Tree {
            running: self,
            mode,
            guard: OnceCell::new(),
            recent: Cell::new(None),
        }
    }

    /// TRACK: a present entry has to be blocked first, and nobody may still use it.
    pub(crate) fn check_tracked(&self, held: &HeldEntry<'_>, page: &PamtEntry) -> Result<(), Fail> {
        let state = held.value().state();
        if !state.needs_tlb_tracking() || !self.op_state.needs_tlb_tracking() {
            return Ok(());
        }
        if !state.is_blocked() {
            return Err(held.fail(Status::GPA_RANGE_NOT_BLOCKED));
        }
        self.check_epoch(page)
    }

    /// The second half of TRACK.
    pub(crate) fn check_epoch(&self, page: &PamtEntry) -> Result<(), Fail> {
        if self.td.epochs().is_tracked(page.bepoch()) {
            Ok(())
        } else {
            Err(Status::TLB_TRACKING_NOT_DONE.with(OperandId::RCX).into())
        }
    }
}

/// SEPT_TREE and what was found under it. Once taken, the lock is held until this is dropped.
pub(crate) struct Tree<'r, 't> {
    running: &'r Running<'t>,
    mode: LockMode,
    guard: OnceCell<LockGuard<'t>>,
    /// The last table of 4 KiB entries, by GPA bits 51:21. While SEPT_TREE is held, nobody else
    /// blocks a link to it, and nobody uses it for something else: where TDH.MEM.PAGE.PROMOTE takes
    /// it out of the tree, its entries stay locked.
    recent: Cell<Option<(u64, &'t Table)>>,
}

impl<'t> Tree<'_, 't> {
    /// GPA-VALID, SEPT_TREE, WALK and ENTRY-LOCK.
    pub(crate) fn hold_entry(&self, operand: SeptOperand) -> Result<HeldEntry<'_>, Fail> {
        self.running.check_gpa(operand.gpa)?;
        if self.guard.get().is_none() {
            // Nobody else can have set the cell in between.
            let _ = self.guard.set(self.running.lock_tree(self.mode)?);
            if self.mode == LockMode::Exclusive {
                self.running.td.sept().reuse_retired();
            }
        }
        let lock = self.running.lock_entry(self.walk_to(operand)?)?;
        Ok(HeldEntry { lock })
    }

    fn walk_to(&self, operand: SeptOperand) -> Result<Walk<'t>, Fail> {
        if operand.level > 0 {
            // The caller may be about to change a link.
            self.recent.set(None);
            return self.running.walk_to(operand);
        }
        let region = operand.gpa.get() / PageSize::Large.bytes();
        if let Some((known, table)) = self.recent.get()
            && known == region
        {
            let slot = Slot::of(table, operand.gpa, 0);
            return Ok(Walk {
                slot,
                value: slot.read(),
            });
        }
        let walk = self.running.walk_to(operand)?;
        self.recent.set(Some((region, walk.slot.table())));
        Ok(walk)
    }
}

/// A Secure EPT entry that the leaf holds, under SEPT_TREE.
pub(crate) struct HeldEntry<'t> {
    lock: EntryLock<'t>,
}

impl<'t> HeldEntry<'t> {
    /// The value, read under the lock.
    pub(crate) fn value(&self) -> SeptEntry {
        self.lock.value()
    }

    /// The entry's place.
    pub(crate) fn slot(&self) -> Slot<'t> {
        self.lock.slot()
    }

    /// A status + RCX with the details of the entry.
    pub(crate) fn fail(&self, status: Status) -> Fail {
        with_details(status.with(OperandId::RCX), self.value(), self.slot().level)
    }

    /// ENTRY-STATE.
    pub(crate) fn check_allows(&self, leaf: Leaf) -> Result<(), Fail> {
        if self.value().state().allows(leaf) {
            Ok(())
        } else {
            Err(self.fail(Status::EPT_ENTRY_STATE_INCORRECT))
        }
    }

    /// Writes the entry and releases it.
    pub(crate) fn commit(self, value: SeptEntry) {
        self.lock.commit(value);
    }
}
