//! What concerns whole roots: the fast zap, the end of the host process, write protection.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `kvm_mmu_zap_all_fast()`, `kvm_mmu_zap_all()`,
//! `kvm_mmu_slot_remove_write_access()`; tdp_mmu.c, `kvm_tdp_mmu_zap_invalidated_roots()`,
//! `kvm_tdp_mmu_wrprot_slot()`. None of them touches the mirror root: the private tables behind
//! it cannot be rebuilt, and private memory has no dirty log.

use std::ops::ControlFlow;

use tdx_defs::Level;

use super::{RootInfo, Vm};
use crate::counts::Counts;
use crate::error::VmError;
use crate::mmu::roots::RootTypes;
use crate::mmu::spte;
use crate::sync::atomic::Ordering;
use crate::sync::lock;

impl Vm {
    /// kvm_mmu_zap_all_fast: the direct root is invalidated and emptied; each vCPU loads a new one
    /// before it faults again.
    pub fn zap_all_fast(&self) -> Result<(), VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let obsolete = {
            let _held = self.mmu.lock.write();
            self.mmu.invalidate_roots(RootTypes::DIRECT)
        };
        // Model: the kernel zaps under the read side. Nobody builds in an invalid root any more,
        // so the side is of no consequence, and here it is the write side.
        let held = self.mmu.lock.write();
        for root in obsolete {
            self.mmu.zap_root(&held, root, &mut Vec::new());
            self.mmu.put_root(root);
        }
        Ok(())
    }

    /// kvm_mmu_zap_all, when the process that owns the memory ends: every shared mapping goes, the
    /// private ones stay until the VM ends.
    pub fn release_user_memory(&self) -> Result<(), VmError> {
        self.alive()?;
        self.zap_direct();
        Ok(())
    }

    pub(super) fn zap_direct(&self) {
        let held = self.mmu.lock.write();
        for root in self.mmu.roots(RootTypes::DIRECT.with(RootTypes::INVALID)) {
            self.mmu.zap_root(&held, root, &mut Vec::new());
        }
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
        let held = self.mmu.lock.write();
        for root in self.mmu.roots(RootTypes::DIRECT) {
            self.mmu
                .visit(root, slot.gfns.clone(), Level::L4K, &mut |at| {
                    let entry = self.mmu.arena.entry(at.slot);
                    // The fast path works without mmu_lock: only bits may change here.
                    if spte::is_leaf(at.spte, at.level) {
                        entry.fetch_and(!spte::WRITE, Ordering::AcqRel);
                    }
                    ControlFlow::Continue(())
                });
        }
        drop(held);
        let mut seam = self.seam(0);
        seam.counts.flushes += 1;
        Ok(self.finish(seam))
    }

    /// The root tables, newest first, invalid ones included.
    pub fn roots(&self) -> Vec<RootInfo> {
        let _rcu = crossbeam_epoch::pin();
        let describe = |root| {
            let header = self.mmu.arena.header(root);
            RootInfo {
                root: header.role().kind(),
                role: header.role().word(),
                count: header.root_count.load(Ordering::SeqCst),
                hpa: root.hpa(),
            }
        };
        self.mmu.listed_roots().into_iter().map(describe).collect()
    }

    /// mmu_invalidate_seq: how many operations have taken mappings away so far.
    pub fn invalidate_seq(&self) -> u64 {
        self.invalidation.seq()
    }

    /// mmu_invalidate_in_progress: how many are at it.
    pub fn invalidations_in_progress(&self) -> u64 {
        self.invalidation.in_progress()
    }
}
