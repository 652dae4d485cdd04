//! vCPUs: creation, and loading the roots they walk.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_vcpu_precreate()`, `tdx_td_vcpu_init()`,
//! `tdx_load_mmu_pgd()`; arch/x86/kvm/mmu/mmu.c, `kvm_mmu_load()`, `kvm_mmu_unload()`,
//! `mmu_alloc_direct_roots()`.
//!
//! Invariant V1: (mirror root, direct root) of a vCPU is none/none, set/none or set/set. The
//! mirror root is put only when the vCPU goes: the module's tables behind it cannot be rebuilt.

use std::sync::Arc;

use tdx_defs::{Leaf, Level, Pfn, field};

use super::Vm;
use super::map_gpa::Vmcall;
use super::mmio::MmioCache;
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::ledger::Note;
use crate::mmu::arena::TableId;
use crate::mmu::role::RootKind;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::tdx::calls;
use crate::tdx::guest_mode::GuestMode;
use crate::tdx::lifecycle::{self, expect, out_of_memory};
use crate::tdx::td::TdState;

/// A virtual processor.
pub(crate) struct Vcpu {
    pub(crate) id: u32,
    /// Logical processor that it runs on.
    pub(crate) lp: u32,
    /// Whether it is inside the guest.
    pub(crate) mode: Arc<GuestMode>,
    /// The MMIO frame that it met last, and of which generation of slots.
    pub(crate) mmio: MmioCache,
    /// `vcpu->mutex`.
    pub(crate) run: Mutex<Run>,
}

/// What only the thread that runs the vCPU touches.
pub(crate) struct Run {
    /// TDVPR first, then the TDCX pages; none before KVM_TDX_INIT_VCPU.
    pub(crate) pages: Vec<Pfn>,
    /// Whether a logical processor may hold its state (`vcpu->cpu != -1`): from KVM_TDX_INIT_VCPU
    /// until it is flushed at the end of the VM.
    pub(crate) is_associated: bool,
    /// `mmu.root.hpa`.
    pub(crate) root: Option<TableId>,
    /// `mmu.mirror_root_hpa`.
    pub(crate) mirror_root: Option<TableId>,
    /// What its faults did.
    pub(crate) counts: Counts,
    /// A TDG.VP.VMCALL that is not answered yet.
    pub(crate) vmcall: Option<Vmcall>,
}

impl Run {
    pub(crate) fn tdvpr(&self) -> Pfn {
        self.pages.first().copied().unwrap_or_default()
    }

    /// The vCPU has been through KVM_TDX_INIT_VCPU.
    pub(crate) fn became_known(&mut self, pages: Vec<Pfn>) {
        self.pages = pages;
        self.is_associated = true;
    }

    /// Whether the vCPU has been through KVM_TDX_INIT_VCPU.
    pub(crate) fn is_initialized(&self) -> bool {
        !self.pages.is_empty()
    }
}

impl Vm {
    /// KVM_CREATE_VCPU and KVM_TDX_INIT_VCPU in one.
    pub fn add_vcpu(&self) -> Result<(u32, Counts), VmError> {
        // Both under one lock, so that no failure leaves half a vCPU behind.
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        if !self.is_td() {
            let vcpu = self.new_vcpu()?;
            let id = vcpu.id;
            self.note(Note::Vcpu { vcpu_id: id })?;
            self.publish_vcpu(vcpu);
            return Ok((id, Counts::default()));
        }
        let vcpus = self.vcpus.load_full();
        let _stopped: Vec<_> = vcpus.iter().map(|vcpu| lock(&vcpu.run)).collect();
        self.needs("KVM_TDX_INIT_VCPU", TdState::Initialized)?;
        let vcpu = self.new_vcpu()?;
        let (pages, counts) = self.init_new_vcpu(&vcpu)?;
        lock(&vcpu.run).became_known(pages);
        let id = vcpu.id;
        self.publish_vcpu(vcpu);
        // Should the note be lost: the module shows that the vCPU is there.
        if let Err(error) = self.note(Note::Vcpu { vcpu_id: id }) {
            tracing::warn!(%error, vcpu = id, "the creation of a vCPU is not written down");
        }
        Ok((id, counts))
    }

    /// KVM_CREATE_VCPU: a vCPU that the module does not know yet.
    pub fn create_vcpu(&self) -> Result<u32, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let state = self.td.state();
        if self.is_td() && state != TdState::Initialized {
            let state = state.name();
            return Err(VmError::NoTd { state });
        }
        let vcpu = self.new_vcpu()?;
        let id = vcpu.id;
        self.note(Note::Vcpu { vcpu_id: id })?;
        self.publish_vcpu(vcpu);
        Ok(id)
    }

    /// KVM_TDX_INIT_VCPU.
    pub fn init_vcpu(&self, vcpu_id: u32) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        let vcpus = self.vcpus.load_full();
        let mut stopped: Vec<_> = vcpus.iter().map(|vcpu| lock(&vcpu.run)).collect();
        let (Some(vcpu), Some(run)) = (
            vcpus.get(vcpu_id as usize),
            stopped.get_mut(vcpu_id as usize),
        ) else {
            return Err(VmError::NoVcpu(vcpu_id));
        };
        self.needs("KVM_TDX_INIT_VCPU", TdState::Initialized)?;
        if run.is_initialized() {
            return Err(VmError::VcpuInitialized(vcpu_id));
        }
        let (pages, counts) = self.init_new_vcpu(vcpu)?;
        run.became_known(pages);
        Ok(counts)
    }

    pub(crate) fn new_vcpu(&self) -> Result<Vcpu, VmError> {
        let vcpus = self.vcpus.load();
        if vcpus.len() >= usize::from(self.config.max_vcpus) {
            let reason = format!("the VM has its {} vCPUs", self.config.max_vcpus);
            return Err(VmError::invalid("max_vcpus", reason));
        }
        let id = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
        let run = Run {
            pages: Vec::new(),
            is_associated: false,
            root: None,
            mirror_root: None,
            counts: Counts::default(),
            vmcall: None,
        };
        Ok(Vcpu {
            id,
            lp: id % self.host.platform().logical_processors,
            mode: self.td.modes.add(),
            mmio: MmioCache::default(),
            run: Mutex::new(run),
        })
    }

    pub(crate) fn publish_vcpu(&self, vcpu: Vcpu) {
        let mut longer = (*self.vcpus.load_full()).clone();
        longer.push(Arc::new(vcpu));
        self.vcpus.store(Arc::new(longer));
    }

    /// tdx_td_vcpu_init: the pages that the module has now. The caller holds slots_lock and the
    /// mutexes of all vCPUs.
    fn init_new_vcpu(&self, vcpu: &Vcpu) -> Result<(Vec<Pfn>, Counts), VmError> {
        let pages = self
            .host
            .memory
            .pages(self.host.platform().tdvps_pages)
            .ok_or_else(|| out_of_memory(&self.host))?;
        let vcpu_id = vcpu.id;
        let free = |pages: &[Pfn]| {
            pages
                .iter()
                .for_each(|&page| self.host.memory.free_page(page));
        };
        let announced = Note::VcpuPages {
            vcpu_id,
            pages: pages.clone(),
        };
        if let Err(error) = self.note(announced) {
            free(&pages);
            return Err(error.into());
        }
        let mut seam = self.seam(vcpu.lp);
        let made = {
            let _held = self.mmu.lock.write();
            lifecycle::init_vcpu(&mut seam, self.td.tdr(), &pages, vcpu.id)
        };
        let (taken, failed) = match made {
            Ok(made) => made,
            Err(error) => {
                // What the module holds now is unknown: the pages stay out of use.
                self.mmu.bugs.kill(Check::Unsettled, || error.to_string());
                return Err(error.into());
            }
        };
        if let Some((leaf, result)) = failed {
            let (held, unused) = pages.split_at(taken);
            free(unused);
            if held.is_empty() {
                // Should the note be lost: the module shows that it has none of the pages.
                let _ = self.note(Note::NoVcpuPages { vcpu_id });
            } else {
                self.leaked
                    .fetch_add(held.len() as u64, super::Ordering::Relaxed);
                self.mmu.bugs.bug(Check::Seamcall, || {
                    format!("SEAMCALL {leaf} failed: {}", result.status())
                });
            }
            self.finish(seam);
            return Err(expect(leaf, &result)
                .err()
                .unwrap_or(VmError::NoVcpu(vcpu.id)));
        }
        Ok((pages, self.finish(seam)))
    }

    /// kvm_mmu_load: makes or reuses the mirror root, then the direct root, and tells the module
    /// where the shared tables are.
    pub fn load_mmu(&self, vcpu_id: u32) -> Result<Counts, VmError> {
        let vcpu = self.vcpu(vcpu_id)?;
        let mut run = lock(&vcpu.run);
        self.alive()?;
        self.initialized(&vcpu, &run, "loading its roots")?;
        self.reload(&vcpu, &mut run)
    }

    /// EINVAL for a vCPU that the module does not know.
    pub(super) fn initialized(
        &self,
        vcpu: &Vcpu,
        run: &Run,
        operation: &'static str,
    ) -> Result<(), VmError> {
        if run.is_initialized() || !self.is_td() {
            return Ok(());
        }
        let vcpu_id = vcpu.id;
        Err(VmError::VcpuNotInitialized { vcpu_id, operation })
    }

    /// kvm_mmu_reload: nothing to do while a valid direct root is loaded. A root that was
    /// invalidated is put first (KVM_REQ_MMU_FREE_OBSOLETE_ROOTS); the mirror root never is.
    pub(super) fn reload(
        &self,
        vcpu: &Vcpu,
        run: &mut MutexGuard<'_, Run>,
    ) -> Result<Counts, VmError> {
        // The vCPU's own reference keeps its root: whether it is obsolete can be read without
        // mmu_lock, and a vCPU whose roots are loaded enters while others hold the write side.
        if run.root.is_some_and(|root| !self.mmu.is_obsolete(root)) {
            return Ok(Counts::default());
        }
        {
            let _held = self.mmu.lock.read(vcpu.id);
            // Obsolete.
            self.unload(run);
            if run.mirror_root.is_none() && self.is_td() {
                run.mirror_root = self.mmu.alloc_root(RootKind::Mirror);
            }
            if run.mirror_root.is_some() || !self.is_td() {
                run.root = self.mmu.alloc_root(RootKind::Direct);
            }
        }
        let Some(root) = run.root else {
            return Err(out_of_memory(&self.host));
        };
        let mut seam = self.seam(vcpu.lp);
        if self.is_td() && self.check_root_level(self.mmu.arena.level(root)) {
            let pointer = calls::vp_wr(
                run.tdvpr(),
                field::SHARED_EPT_POINTER,
                root.hpa().get(),
                u64::MAX,
            );
            let result = seam.call(&pointer)?;
            if expect(Leaf::VP_WR, &result).is_err() {
                self.mmu.bugs.bug(Check::Seamcall, || {
                    format!("SEAMCALL {} failed: {}", Leaf::VP_WR, result.status())
                });
            }
        }
        run.counts += &seam.counts;
        Ok(seam.counts)
    }

    /// B32: the SHARED bit that the root level implies must be the VM's.
    pub(crate) fn check_root_level(&self, level: Level) -> bool {
        let fits = level == self.mmu.layout.root_level();
        if !fits {
            self.mmu.bugs.bug(Check::B32, || {
                format!(
                    "root of level {level}, SHARED bit {}",
                    self.mmu.layout.shared_bit()
                )
            });
        }
        fits
    }

    /// kvm_mmu_unload: puts the direct root, never the mirror root.
    pub fn unload_mmu(&self, vcpu_id: u32) -> Result<(), VmError> {
        let vcpu = self.vcpu(vcpu_id)?;
        let mut run = lock(&vcpu.run);
        self.unload(&mut run);
        Ok(())
    }

    /// The vCPU goes: kvm_mmu_unload puts its direct root, kvm_mmu_destroy the mirror root.
    pub(super) fn put_roots(&self, run: &mut Run) {
        self.unload(run);
        if let Some(root) = run.mirror_root.take() {
            self.mmu.put_root(root);
        }
    }

    pub(super) fn unload(&self, run: &mut Run) {
        if let Some(root) = run.root.take() {
            self.mmu.put_root(root);
        }
    }
}
