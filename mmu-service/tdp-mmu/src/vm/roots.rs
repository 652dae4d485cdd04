//! What concerns whole roots: the fast zap, the end of the host process, the NX mitigation, and
//! frames that lose write access for good.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `kvm_mmu_zap_all_fast()`, `kvm_mmu_zap_all()`,
//! `kvm_recover_nx_huge_pages()`, `kvm_mmu_slot_gfn_write_protect()`; tdp_mmu.c,
//! `kvm_tdp_mmu_zap_invalidated_roots()`. None of them touches the mirror root: the private tables behind
//! it cannot be rebuilt, and private memory has no dirty log.

use tdx_defs::{Gfn, Gpa, Level};

use super::{RootInfo, Vm};
use crate::counts::Counts;
use crate::error::VmError;
use crate::ledger::Note;
use crate::mmu::lock::WriteGuard;
use crate::mmu::roots::{Filter, RootTypes};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::trace::Event;

impl Vm {
    /// kvm_mmu_zap_all_fast: the direct root is invalidated and emptied; each vCPU loads a new one
    /// before it faults again.
    pub fn zap_all_fast(&self) -> Result<(), VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        self.zap_fast();
        Ok(())
    }

    /// The caller holds slots_lock.
    pub(super) fn zap_fast(&self) {
        let obsolete = {
            let _held = self.mmu.lock.write();
            let valid_gen = self.valid_gen.fetch_xor(1, Ordering::Relaxed);
            self.mmu.tracer.emit(|| Event::ZapAllFast {
                mmu_valid_gen: valid_gen,
                // Counts shadow pages; a TDP MMU has none.
                used_pages: 0,
            });
            self.mmu.invalidate_roots(RootTypes::DIRECT)
        };
        // kvm_tdp_mmu_zap_invalidated_roots. New roots flush when they are loaded.
        let mut held = self.mmu.lock.read(0);
        for root in obsolete {
            held = self.mmu.zap_root_shared(held, root);
            self.mmu.put_root(root);
        }
        drop(held);
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

    /// kvm_zap_gfn_range: the shared mappings of a range of frames go. `gpa` and `size` are bytes,
    /// page aligned, without the SHARED bit.
    pub fn zap_range(&self, gpa: u64, size: u64) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let gfns = self.page_range(("gpa", "size"), gpa, size)?;
        let mut seam = self.seam(0);
        let zapped = self.zap_ranges(&mut seam, &[gfns], Filter::SHARED, || {});
        let counts = self.finish(seam);
        zapped?;
        Ok(counts)
    }

    /// Whether huge leaves may be executable from now on (kvm.nx_huge_pages). Existing mappings
    /// go when that changes.
    pub fn set_nx_huge_pages(&self, on: bool) -> Result<(), VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        self.note(Note::Settings {
            nx_huge_pages: on,
            exit_hypercall: self.exits_hypercall(),
        })?;
        if self.nx_huge_pages.swap(on, Ordering::AcqRel) != on {
            self.zap_fast();
        }
        Ok(())
    }

    /// kvm_recover_nx_huge_pages: takes away at most `most` of the tables that stand where the
    /// mitigation forbids a huge page, oldest first; the next access that is no fetch makes the
    /// huge page. Returns how many went.
    pub fn recover_nx_huge_pages(&self, most: u32) -> Result<(u32, Counts), VmError> {
        self.alive()?;
        let mut seam = self.seam(0);
        let mut zapped = 0;
        {
            let held = self.mmu.lock.read(0);
            let _rcu = crossbeam_epoch::pin();
            for _ in 0..most {
                let Some(table) = self.mmu.next_nx() else {
                    break;
                };
                let gfn = self.mmu.arena.header(table).gfn();
                // With a dirty log the page would come back small; the end of the log recovers it.
                let logged = self.slots.find(gfn).is_some_and(|slot| slot.log.is_on());
                if !logged {
                    zapped += u32::from(self.mmu.zap_table_shared(table));
                }
            }
            drop(held);
        }
        seam.counts.flushes += u64::from(zapped != 0);
        Ok((zapped, self.finish(seam)))
    }

    /// Somebody wants to see every write of a shared frame (or no longer): it is mapped without
    /// write access, and writes are emulated (kvm_write_track_add_gfn).
    pub fn track_writes(&self, gpa: u64, on: bool) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let gfn = Gpa::new(gpa).frame();
        let slot = self.slots.find(gfn);
        if slot.is_none_or(|slot| slot.gmem.is_some()) {
            let reason = "no memory slot without guest_memfd covers the address";
            return Err(VmError::invalid("gpa", reason));
        }
        let mut seam = self.seam(0);
        let held = self.mmu.lock.write();
        self.tracked.set(gfn, on);
        if on && self.protect(&held, gfn) {
            seam.counts.flushes += 1;
        }
        drop(held);
        Ok(self.finish(seam))
    }

    /// kvm_mmu_slot_gfn_write_protect: the leaf of a shared frame loses write access for good.
    /// Whether there was one that had it; then the caller's flush follows.
    pub fn write_protect_gfn(&self, gpa: u64) -> Result<(bool, Counts), VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let mut seam = self.seam(0);
        let held = self.mmu.lock.write();
        let protected = self.protect(&held, Gpa::new(gpa).frame());
        drop(held);
        seam.counts.flushes += u64::from(protected);
        Ok((protected, self.finish(seam)))
    }

    fn protect(&self, held: &WriteGuard<'_>, gfn: Gfn) -> bool {
        // A walk for a frame above the guest's memory would be a bug of ours.
        if gfn.get() >= self.mmu.layout.gfn_limit() {
            return false;
        }
        let mut protected = false;
        for root in self.mmu.roots(RootTypes::DIRECT) {
            protected |= self.mmu.write_protect_gfn(held, root, gfn, Level::L4K);
        }
        protected
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
