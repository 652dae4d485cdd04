//! Building on the direct root, and the lockless fast path.
//!
//! Source: `kvm_tdp_mmu_map()`, `tdp_mmu_map_handle_target_level()`, tdp_mmu.c;
//! `page_fault_can_be_fast()`, `fast_page_fault()`, `fast_pf_fix_direct_spte()`, mmu.c.
//! Neither ever touches a mirror root.
//!
//! Model: leaves are 4 KiB for now; larger ones come with the host's mapping sizes.

use tdx_defs::Gfn;

use super::Mmu;
use super::arena::TableId;
use super::iter::Step;
use super::spte::{self, Access};

/// Tries of the fast path before the slow one takes over.
const FAST_TRIES: u32 = 5;

/// What an install on the direct root came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installed {
    Fixed,
    Spurious,
    Retry,
    NoMemory,
}

impl Mmu {
    /// Installs `new` (a 4 KiB leaf or an MMIO SPTE) for `gfn`. The caller holds mmu_lock.
    pub(crate) fn map_direct(
        &self,
        root: TableId,
        gfn: Gfn,
        new: u64,
        access: Access,
        prefetch: bool,
    ) -> Installed {
        if !self.walkable(gfn) {
            return Installed::Retry;
        }
        let root_bits = self.root_bits(root);
        let mut table = root;
        let mut level = self.arena.level(root);
        loop {
            let slot = self.slot(table, level, gfn, root_bits);
            let step = Step {
                slot,
                level,
                spte: self.read(slot),
            };
            if step.spte == spte::FROZEN {
                return Installed::Retry;
            }
            let Some(child) = level.child() else {
                return self.install(&step, gfn, new, access, prefetch);
            };
            let linked = if spte::is_present(step.spte) {
                TableId::linked_by(step.spte)
            } else {
                match self.link_direct(&step, gfn) {
                    Ok(linked) => Some(linked),
                    Err(installed) => return installed,
                }
            };
            match linked {
                Some(linked) => (level, table) = (child, linked),
                None => return Installed::Retry,
            }
        }
    }

    /// tdp_mmu_link_sp for a direct entry.
    fn link_direct(&self, step: &Step, gfn: Gfn) -> Result<TableId, Installed> {
        let base = gfn.align_down(step.level.pages());
        let role = self.arena.header(step.slot.table).role().child();
        let table = self
            .arena
            .alloc(role, base, None)
            .ok_or(Installed::NoMemory)?;
        let new = spte::nonleaf(table.hpa());
        match self.set_direct_atomic(step, base, new, &mut Vec::new()) {
            Ok(()) => Ok(table),
            Err(_) => {
                self.arena.free(table);
                Err(Installed::Retry)
            }
        }
    }

    /// tdp_mmu_map_handle_target_level.
    fn install(
        &self,
        step: &Step,
        gfn: Gfn,
        new: u64,
        access: Access,
        prefetch: bool,
    ) -> Installed {
        let present = spte::is_present(step.spte);
        if present && (prefetch || access.allowed_by(step.spte)) || step.spte == new {
            return Installed::Spurious;
        }
        match self.set_direct_atomic(step, gfn, new, &mut Vec::new()) {
            Ok(()) => Installed::Fixed,
            Err(_) => Installed::Retry,
        }
    }

    /// fast_page_fault for a present write fault on the direct root, without mmu_lock.
    /// `None` sends the fault to the slow path.
    pub(crate) fn fast_page_fault(&self, root: TableId, gfn: Gfn) -> Option<Installed> {
        let access = Access {
            write: true,
            exec: false,
        };
        for _ in 0..FAST_TRIES {
            let step = self.last(root, gfn)?;
            if !spte::is_leaf(step.spte, step.level) {
                return None;
            }
            if access.allowed_by(step.spte) {
                return Some(Installed::Spurious);
            }
            if step.spte & spte::MMU_WRITABLE == 0 {
                return None;
            }
            let new = step.spte | spte::WRITE | spte::DIRTY;
            if self.swap(step.slot, step.spte, new).is_ok() {
                return Some(Installed::Fixed);
            }
        }
        None
    }
}
