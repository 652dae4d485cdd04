//! The lockless fast path of the direct root.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `fast_page_fault()`, `fast_pf_fix_direct_spte()`. A leaf that
//! only lost its W bit to the dirty log gets it back by one compare-and-swap, without mmu_lock.
//! The caller holds an epoch, so a table that is removed meanwhile is not reused.

use tdx_defs::{Gfn, Level};

use super::Mmu;
use super::arena::TableId;
use super::iter::Step;
use super::spte::{self, Access};

/// Tries of the fast path before the slow one takes over.
const FAST_TRIES: u32 = 5;

/// What the fast path came to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fast {
    /// Write access is back; the page has to be logged.
    Fixed(Step),
    /// The access is allowed.
    Spurious(Step),
    /// The slow path has to look (RET_PF_INVALID). The entry that was found last.
    Invalid(Option<Step>),
}

impl Mmu {
    /// fast_page_fault for a present write fault. `logged` says whether the slot has a dirty log.
    pub(crate) fn fast_page_fault(
        &self,
        root: TableId,
        gfn: Gfn,
        access: Access,
        logged: bool,
    ) -> Fast {
        let mut found = None;
        for _ in 0..FAST_TRIES {
            found = self.last(root, gfn);
            let Some(step) = found else { break };
            if !spte::is_leaf(step.spte, step.level) {
                break;
            }
            if access.allowed_by(step.spte) {
                return Fast::Spurious(step);
            }
            // A huge leaf of a logged slot must be split, which takes the lock.
            let fixable = access.write
                && step.spte & spte::MMU_WRITABLE != 0
                && !(step.level > Level::L4K && logged);
            if !fixable {
                break;
            }
            let new = step.spte | spte::WRITE;
            if self.swap(step.slot, step.spte, new).is_ok() {
                return Fast::Fixed(step);
            }
        }
        Fast::Invalid(found)
    }

    /// Undoes what the fast path did to a leaf, unless the leaf is another one by now.
    pub(crate) fn take_write_back(&self, step: &Step) {
        let mut found = self.read(step.slot);
        while spte::is_leaf(found, step.level) && found & spte::WRITE != 0 {
            match self.swap(step.slot, found, found & !spte::WRITE) {
                Ok(()) => return,
                Err(other) => found = other,
            }
        }
    }
}
