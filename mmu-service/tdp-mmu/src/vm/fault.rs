//! EPT violations: one, or many of one vCPU.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_vcpu_pre_run()`, `tdx_handle_ept_violation()`.

use std::sync::Arc;

use tdx_defs::{Gfn, Pfn, Visibility};

use super::faulting::Faulting;
use super::vcpu::{Run, Vcpu};
use super::wanted::Mapping;
use super::{Fault, FaultOutcome, FaultReport, FaultsReport, RetPf, Vm};
use crate::error::VmError;
use crate::mmu::arena::TableId;
use crate::mmu::role::RootKind;
use crate::sync::{MutexGuard, lock};
use crate::tdx::lifecycle::out_of_memory;
use crate::tdx::seam::Seam;
use crate::tdx::td::TdState;

impl Vm {
    /// One fault, with the calls that it took.
    pub fn handle_fault(&self, vcpu_id: u32, fault: Fault) -> Result<FaultReport, VmError> {
        let vcpu = self.vcpu(vcpu_id)?;
        let mut run = lock(&vcpu.run);
        let roots = self.enter(&vcpu, &mut run)?;
        let wanted = self.wanted(0, fault)?;
        self.trace_fault(vcpu_id, fault, &wanted);
        let root = match wanted.visibility {
            Visibility::Private => RootKind::Mirror,
            Visibility::Shared => RootKind::Direct,
        };
        let mut faulting = Faulting::new(self, &vcpu, roots, self.seam(vcpu.lp).traced());
        faulting.push(wanted);
        faulting.finish();
        let ended = faulting.ended.pop();
        let mut seam = leave(&mut run, faulting);
        let Some(ended) = ended else {
            // Every pushed access ends in finish().
            return Err(VmError::Dead {
                reason: "the fault was lost".into(),
            });
        };
        let level = ended.level();
        let ret_pf = ended.result?;
        Ok(FaultReport {
            ret_pf,
            root,
            level: matches!(ret_pf, RetPf::Fixed | RetPf::Spurious).then_some(level),
            pfn: ended
                .at
                .map(Mapping::pfn)
                .or_else(|| self.mapped_pfn(roots, wanted.gfn, root)),
            seamcalls: seam.take_trace(),
            counts: seam.counts,
        })
    }

    /// A batch of faults of one vCPU, in order.
    pub fn handle_faults(&self, vcpu_id: u32, faults: &[Fault]) -> Result<FaultsReport, VmError> {
        let vcpu = self.vcpu(vcpu_id)?;
        let mut run = lock(&vcpu.run);
        let roots = self.enter(&vcpu, &mut run)?;
        let mut report = FaultsReport::default();
        let mut faulting = Faulting::new(self, &vcpu, roots, self.seam(vcpu.lp));
        for (index, &fault) in faults.iter().enumerate() {
            match self.wanted(index, fault) {
                Ok(wanted) => {
                    self.trace_fault(vcpu_id, fault, &wanted);
                    faulting.push(wanted);
                }
                Err(error) => report.add(index, Err(error)),
            }
        }
        faulting.finish();
        for ended in std::mem::take(&mut faulting.ended) {
            report.add(ended.index, ended.result);
        }
        report.counts = leave(&mut run, faulting).counts;
        Ok(report)
    }

    /// What must hold before a vCPU can fault, and the roots it faults on.
    pub(super) fn enter(
        &self,
        vcpu: &Arc<Vcpu>,
        run: &mut MutexGuard<'_, Run>,
    ) -> Result<Roots, VmError> {
        self.alive()?;
        self.needs("KVM_RUN", TdState::Runnable)?;
        self.initialized(vcpu, run, "KVM_RUN")?;
        self.roots_of(vcpu, run)
    }

    /// The vCPU's direct and mirror root, loaded if they are not.
    pub(super) fn roots_of(
        &self,
        vcpu: &Vcpu,
        run: &mut MutexGuard<'_, Run>,
    ) -> Result<Roots, VmError> {
        self.reload(vcpu, run)?;
        run.root
            .map(|direct| Roots {
                direct,
                mirror: run.mirror_root,
            })
            .ok_or_else(|| out_of_memory(&self.host))
    }

    fn mapped_pfn(&self, roots: Roots, gfn: Gfn, root: RootKind) -> Option<Pfn> {
        let _rcu = crossbeam_epoch::pin();
        let root = match root {
            RootKind::Direct => roots.direct,
            RootKind::Mirror => roots.mirror?,
        };
        let step = self.mmu.last(root, gfn)?;
        let first = self.mmu.leaf_pfn(&step)?;
        Some(first.offset(gfn.get() % step.level.pages()))
    }
}

/// The roots that a vCPU has loaded; an ordinary VM has no mirror root.
#[derive(Debug, Clone, Copy)]
pub(super) struct Roots {
    pub(super) direct: TableId,
    pub(super) mirror: Option<TableId>,
}

/// Ends the faults of an operation: what they did goes to the vCPU.
fn leave<'a>(run: &mut MutexGuard<'_, Run>, faulting: Faulting<'a>) -> Seam<'a> {
    let seam = faulting.into_seam();
    run.counts += &seam.counts;
    seam
}

impl FaultsReport {
    fn add(&mut self, index: usize, result: Result<RetPf, VmError>) {
        match result {
            Ok(RetPf::Fixed) => self.fixed += 1,
            Ok(RetPf::Spurious) => self.spurious += 1,
            result => {
                self.others_count += 1;
                if self.others.len() < Self::MAX_OTHERS {
                    let index = u32::try_from(index).unwrap_or(u32::MAX);
                    self.others.push(FaultOutcome { index, result });
                }
            }
        }
    }
}
