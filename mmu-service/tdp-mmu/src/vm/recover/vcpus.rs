//! The vCPUs of a VM that comes back.
//!
//! The module does not let a vCPU go before the TD is torn down, so one that was being made is
//! finished. How far it got shows in PAMT (TDVPR, TDCX pages) and in what TDH.VP.INIT answers.

use tdx_defs::{Leaf, PageType, Pfn};

use super::{Recovery, is_done_already, note_or_warn};
use crate::bugs::Check;
use crate::error::VmError;
use crate::ledger::{Note, VmRecord};
use crate::sync::lock;
use crate::tdx::calls;
use crate::tdx::lifecycle::vcpu_settings;
use crate::tdx::seam::{Seam, Verdict};
use crate::vm::Vm;
use crate::vm::map_gpa::Vmcall;

impl Recovery {
    /// vCPUs without the module's pages: of an ordinary VM, or of one whose TD is gone.
    pub(super) fn restore_plain_vcpus(&self, vm: &Vm, record: &VmRecord) -> Result<(), VmError> {
        for _ in record.vcpus.values().filter(|vcpu| vcpu.created) {
            vm.publish_vcpu(vm.new_vcpu()?);
        }
        Ok(())
    }

    /// The vCPUs of a TD, each as far as it can be made.
    pub(super) fn restore_vcpus(
        &self,
        seam: &mut Seam<'_>,
        vm: &Vm,
        record: &VmRecord,
    ) -> Result<(), VmError> {
        let tdr = vm.td.tdr();
        for (&vcpu_id, known) in &record.vcpus {
            let has_root = known
                .pages
                .first()
                .is_some_and(|&tdvpr| self.pages.is_owned(tdvpr, PageType::TDVPR, tdr));
            if !has_root && !known.pages.is_empty() {
                note_or_warn(vm, Note::NoVcpuPages { vcpu_id });
            }
            if !has_root && !known.created {
                continue;
            }
            let vcpu = vm.new_vcpu()?;
            if has_root {
                self.finish_vcpu(seam, vm, (vcpu_id, vcpu.lp), &known.pages)?;
                let mut run = lock(&vcpu.run);
                run.became_known(known.pages.clone());
                run.vmcall = vm.td.is_runnable().then_some(Vmcall::Lost);
            }
            vm.publish_vcpu(vcpu);
            if !known.created {
                note_or_warn(vm, Note::Vcpu { vcpu_id });
            }
        }
        Ok(())
    }

    /// What is left of TDH.VP.ADDCX and TDH.VP.INIT, and the fields that KVM sets.
    fn finish_vcpu(
        &self,
        seam: &mut Seam<'_>,
        vm: &Vm,
        (vcpu_id, lp): (u32, u32),
        pages: &[Pfn],
    ) -> Result<(), VmError> {
        if vm.td.is_runnable() {
            // All vCPUs were complete when the TD was finalised.
            return Ok(());
        }
        let (tdvpr, tdr) = (pages[0], vm.td.tdr());
        let missing = |page: &&Pfn| !self.pages.is_owned(**page, PageType::TDCX, tdr);
        let mut steps: Vec<_> = pages[1..]
            .iter()
            .filter(missing)
            .map(|&page| calls::vp_addcx(tdvpr, page).on(lp))
            .collect();
        for &page in pages[1..].iter().filter(missing) {
            // It was free a moment ago.
            vm.host.memory.take_page(page);
        }
        steps.push(calls::vp_init(tdvpr, 0, vcpu_id).on(lp));
        steps.extend(vcpu_settings(tdvpr).map(|step| step.on(lp)));
        let mut failed = None;
        let mut busy = 0;
        seam.script(&steps, &mut |_, at, result| {
            let (leaf, status) = (steps[at].leaf, result.status());
            if status.is_busy() && busy < super::BUSY_TRIES {
                busy += 1;
                return Verdict::Again;
            }
            if is_done_already(leaf, status) || !status.is_error() {
                return Verdict::Next;
            }
            failed = Some((leaf, status));
            Verdict::Stop
        })?;
        if let Some((leaf, status)) = failed {
            let leaf: Leaf = leaf;
            vm.mmu.bugs.kill(Check::Unsettled, || {
                format!("vCPU {vcpu_id} cannot be finished, {leaf} answers {status}")
            });
        }
        Ok(())
    }
}
