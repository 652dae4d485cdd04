//! The end of a VM: everything goes back, in the order that the module demands.
//!
//! Source: arch/x86/kvm/x86.c, `kvm_arch_pre_destroy_vm()`, `kvm_arch_destroy_vm()`;
//! arch/x86/kvm/vmx/tdx.c, `tdx_mmu_release_hkid()`, `tdx_vcpu_free()`, `tdx_vm_destroy()`;
//! mmu.c, `kvm_mmu_uninit_tdp_mmu()`.
//!
//! Private leaves go first, with the key id still assigned; then the key id; then vCPU pages,
//! tables (children before parents), control pages and the TDR.

use std::sync::Arc;

use tdx_defs::Pfn;

use super::vcpu::{Run, Vcpu};
use super::{Mode, Vm};
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::ledger::Note;
use crate::mmu::arena::Arena;
use crate::mmu::roots::{Filter, RootTypes};
use crate::seam::SeamError;
use crate::sync::atomic::Ordering;
use crate::sync::{MutexGuard, lock};
use crate::tdx::lifecycle;
use crate::tdx::seam::Seam;

impl Vm {
    /// Ends the VM. Also for a bugged one; a second call has nothing left to do. Returns how many
    /// pages never came back.
    pub fn destroy(&self) -> Result<(Counts, u64), VmError> {
        self.destroy_in(self.config.mode)
    }

    /// The same in a propagation mode of its own: the end of a VM in mode `kernel` takes four
    /// messages a page, which not everybody wants to wait for.
    pub fn destroy_in(&self, mode: Mode) -> Result<(Counts, u64), VmError> {
        if self.destroyed.swap(true, Ordering::AcqRel) {
            return Ok((Counts::default(), self.leaked.load(Ordering::Relaxed)));
        }
        let slots = lock(&self.slots_lock);
        if let Err(error) = self.note(Note::Going) {
            // A process that comes after this one finds a VM with less memory.
            tracing::warn!(%error, "the end of a VM is not written down");
        }
        let vcpus = self.vcpus.load_full();
        let mut runs: Vec<_> = vcpus.iter().map(|vcpu| lock(&vcpu.run)).collect();
        let mut seam = Seam::new(&*self.port, mode, 0);
        let torn = self.tear_down(&mut seam, &vcpus, &mut runs);
        self.free_tables(&mut seam, torn.is_err());
        if torn.is_ok() && self.is_td() {
            self.free_control_pages(&mut seam);
        }
        for page in self.mmu.drain_external() {
            self.host.memory.free_page(page);
        }
        for slot in self.slots.all().iter() {
            self.note_leaks(slot);
        }
        self.slots.clear();
        self.check_end();
        Arena::collect_deferred();
        drop((runs, slots));
        let counts = self.finish(seam);
        match torn {
            Ok(()) => Ok((counts, self.leaked.load(Ordering::Relaxed))),
            // The TD is gone with its module: nothing is held any more.
            Err(SeamError::Restarted { .. }) => Ok((counts, 0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves, key id, vCPUs.
    fn tear_down(
        &self,
        seam: &mut Seam<'_>,
        vcpus: &[Arc<Vcpu>],
        runs: &mut [MutexGuard<'_, Run>],
    ) -> Result<(), SeamError> {
        for slot in self.slots.all().iter().filter(|slot| slot.gmem.is_some()) {
            self.zap_ranges(
                seam,
                std::slice::from_ref(&slot.gfns),
                Filter::PRIVATE,
                || {},
            )?;
        }
        if !self.is_td() {
            self.zap_direct();
            runs.iter_mut().for_each(|run| self.put_roots(run));
            return Ok(());
        }
        let associated: Vec<(Pfn, u32)> = vcpus
            .iter()
            .zip(runs.iter())
            .filter(|(_, run)| run.is_initialized())
            .map(|(vcpu, run)| (run.tdvpr(), vcpu.lp))
            .collect();
        if self.td.hkid().is_some() {
            lifecycle::release_hkid(&self.host, seam, &self.td, &self.mmu.bugs, &associated)?;
            // Whatever TDH.VP.FLUSH answered (tdx_disassociate_vp).
            runs.iter_mut().for_each(|run| run.is_associated = false);
        }
        // mmu notifier release: user memory goes with its process.
        self.zap_direct();
        for run in runs {
            self.put_roots(run);
            let mut pages = std::mem::take(&mut run.pages);
            if run.is_associated {
                self.mmu.bugs.bug(Check::B35, || {
                    format!(
                        "vCPU with TDVPR {:?} freed before it was flushed",
                        pages.first()
                    )
                });
            }
            if run.is_associated || self.td.hkid().is_some() {
                self.leaked.fetch_add(pages.len() as u64, Ordering::Relaxed);
                continue;
            }
            // TDCX pages, then the TDVPR.
            if !pages.is_empty() {
                pages.rotate_left(1);
            }
            let leaked = lifecycle::reclaim_pages(&self.host, seam, &pages)?;
            self.leaked.fetch_add(leaked, Ordering::Relaxed);
        }
        Ok(())
    }

    /// kvm_mmu_uninit_tdp_mmu.
    fn free_tables(&self, seam: &mut Seam<'_>, torn: bool) {
        let held = self.mmu.lock.write();
        for root in self.mmu.invalidate_roots(RootTypes::VALID) {
            self.mmu.check_scheduled(root);
            let mut ops = Vec::new();
            self.mmu.zap_root(&held, root, &mut ops);
            if !torn {
                let _ = self.carry_out(&held, seam, &ops);
            }
            self.mmu.put_root(root);
        }
    }

    fn free_control_pages(&self, seam: &mut Seam<'_>) {
        let leaked = if self.td.tdr() == Pfn::default() {
            // It never became a TD.
            return;
        } else if self.td.hkid().is_some() {
            Ok(lock(&self.td.tdcs).len() as u64 + 1)
        } else {
            lifecycle::reclaim_control_pages(&self.host, seam, &self.td)
        };
        let leaked = leaked.unwrap_or_else(|error| {
            self.mmu.bugs.kill(Check::Unsettled, || error.to_string());
            1
        });
        self.leaked.fetch_add(leaked, Ordering::Relaxed);
    }

    /// B26.
    fn check_end(&self) {
        let pages: u64 = self.mmu.pages().iter().sum();
        let roots = self.mmu.listed_roots().len();
        if pages != 0 || roots != 0 {
            self.mmu.bugs.warn(Check::B26, || {
                format!("{pages} pages and {roots} roots are left")
            });
        }
    }
}
