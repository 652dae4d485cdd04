//! vCPUs: creation, and loading the roots they walk.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_vcpu_create()`, `tdx_td_vcpu_init()`,
//! `tdx_load_mmu_pgd()`; arch/x86/kvm/mmu/mmu.c, `kvm_mmu_load()`, `kvm_mmu_unload()`,
//! `mmu_alloc_direct_roots()`.
//!
//! Invariant V1: (mirror root, direct root) of a vCPU is none/none, set/none or set/set. The
//! mirror root is put only when the vCPU goes: the module's tables behind it cannot be rebuilt.

use std::sync::Arc;

use tdx_defs::{Leaf, Level, Pfn, field};

use super::Vm;
use super::mmio::MmioCache;
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::mmu::arena::TableId;
use crate::mmu::role::RootKind;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::tdx::calls;
use crate::tdx::lifecycle::{self, expect, out_of_memory};
use crate::tdx::td::TdState;

/// A virtual processor.
pub(crate) struct Vcpu {
    pub(crate) id: u32,
    /// Logical processor that it runs on.
    pub(crate) lp: u32,
    /// The MMIO frame that it met last, and of which generation of slots.
    pub(crate) mmio: MmioCache,
    /// `vcpu->mutex`.
    pub(crate) run: Mutex<Run>,
}

/// What only the thread that runs the vCPU touches.
pub(crate) struct Run {
    /// TDVPR first, then the TDCX pages.
    pub(crate) pages: Vec<Pfn>,
    /// `mmu.root.hpa`.
    pub(crate) root: Option<TableId>,
    /// `mmu.mirror_root_hpa`.
    pub(crate) mirror_root: Option<TableId>,
    /// What its faults did.
    pub(crate) counts: Counts,
}

impl Run {
    pub(crate) fn tdvpr(&self) -> Pfn {
        self.pages.first().copied().unwrap_or_default()
    }
}

impl Vm {
    /// KVM_CREATE_VCPU and KVM_TDX_INIT_VCPU.
    pub fn create_vcpu(&self) -> Result<(u32, Counts), VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        if self.is_td() {
            self.needs("KVM_TDX_INIT_VCPU", TdState::Initialized)?;
        }
        let vcpus = self.vcpus.load_full();
        if vcpus.len() >= usize::from(self.config.max_vcpus) {
            let reason = format!("the VM has its {} vCPUs", self.config.max_vcpus);
            return Err(VmError::invalid("max_vcpus", reason));
        }
        let id = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
        let platform = self.host.platform();
        let lp = id % platform.logical_processors;
        if !self.is_td() {
            self.add_vcpu(&vcpus, id, lp, Vec::new());
            return Ok((id, Counts::default()));
        }
        let pages = self
            .host
            .memory
            .pages(platform.tdvps_pages)
            .ok_or_else(|| out_of_memory(&self.host))?;
        let mut seam = self.seam(lp);
        let made = {
            let _held = self.mmu.lock.write();
            lifecycle::init_vcpu(&mut seam, self.td.tdr, &pages, id)
        };
        let (taken, failed) = match made {
            Ok(made) => made,
            Err(error) => {
                // What the module holds now is unknown: the pages stay out of use.
                self.mmu.bugs.kill(|| error.to_string());
                return Err(error.into());
            }
        };
        if let Some((leaf, result)) = failed {
            let (held, unused) = pages.split_at(taken);
            unused
                .iter()
                .for_each(|&page| self.host.memory.free_page(page));
            if !held.is_empty() {
                self.leaked
                    .fetch_add(held.len() as u64, super::Ordering::Relaxed);
                self.mmu.bugs.bug(Check::Seamcall, || {
                    format!("SEAMCALL {leaf} failed: {}", result.status())
                });
            }
            self.finish(seam);
            return Err(expect(leaf, &result).err().unwrap_or(VmError::NoVcpu(id)));
        }
        self.add_vcpu(&vcpus, id, lp, pages);
        Ok((id, self.finish(seam)))
    }

    /// The caller holds slots_lock.
    fn add_vcpu(&self, vcpus: &[Arc<Vcpu>], id: u32, lp: u32, pages: Vec<Pfn>) {
        let run = Run {
            pages,
            root: None,
            mirror_root: None,
            counts: Counts::default(),
        };
        let mut longer = vcpus.to_vec();
        longer.push(Arc::new(Vcpu {
            id,
            lp,
            mmio: MmioCache::default(),
            run: Mutex::new(run),
        }));
        self.vcpus.store(Arc::new(longer));
    }

    /// kvm_mmu_load: makes or reuses the mirror root, then the direct root, and tells the module
    /// where the shared tables are.
    pub fn load_mmu(&self, vcpu_id: u32) -> Result<Counts, VmError> {
        let vcpu = self.vcpu(vcpu_id)?;
        let mut run = lock(&vcpu.run);
        self.alive()?;
        self.reload(&vcpu, &mut run)
    }

    /// kvm_mmu_reload: nothing to do while a valid direct root is loaded. A root that was
    /// invalidated is put first (KVM_REQ_MMU_FREE_OBSOLETE_ROOTS); the mirror root never is.
    pub(super) fn reload(
        &self,
        vcpu: &Vcpu,
        run: &mut MutexGuard<'_, Run>,
    ) -> Result<Counts, VmError> {
        {
            let _held = self.mmu.lock.read(vcpu.id);
            match run.root {
                Some(root) if self.mmu.is_obsolete(root) => self.unload(run),
                Some(_) => return Ok(Counts::default()),
                None => {}
            }
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
