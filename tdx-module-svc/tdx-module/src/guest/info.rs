//! TDG.VP.INFO and TDG.VP.VEINFO.GET: what the guest learns about itself and about its last #VE.
//!
//! Source: TDX module source, tdg_vp_info.c and tdg_vp_veinfo_get.c.

use tdx_defs::{CompletionStatus as Status, Gpr, Gprs};

use super::cpu::Cpu;

impl Cpu<'_> {
    /// Outputs: RCX width of an address, RDX ATTRIBUTES, R8 vCPUs now and at most, R9 index of
    /// this one, R10 bit 0: TDG.SYS.RD exists.
    pub(super) fn vp_info(&self, regs: &mut Gprs) -> Result<(), Status> {
        let (td, config) = (&self.inside.td, &self.inside.config);
        regs[Gpr::Rcx] = config.gpa_width().into();
        regs[Gpr::Rdx] = config.attributes.bits();
        regs[Gpr::R8] = u64::from(td.num_vcpus()) | u64::from(config.max_vcpus) << 32;
        regs[Gpr::R9] = self.inside.vcpu.index().into();
        // Model: TDG.SYS.RD does not exist here.
        (regs[Gpr::R10], regs[Gpr::R11]) = (0, 0);
        Ok(())
    }

    /// Outputs: RCX exit reason, RDX exit qualification, R8 linear address, R9 GPA, R10
    /// instruction. The information is given once.
    pub(super) fn veinfo_get(&self, regs: &mut Gprs) -> Result<(), Status> {
        const OUTPUTS: [Gpr; 5] = [Gpr::Rcx, Gpr::Rdx, Gpr::R8, Gpr::R9, Gpr::R10];
        let info = self.inside.vcpu.guest().ve_info.take();
        let values = info.map_or([0; 5], |info| {
            [
                info.reason.into(),
                info.qualification,
                info.gla,
                info.gpa,
                info.instruction,
            ]
        });
        for (register, value) in OUTPUTS.into_iter().zip(values) {
            regs[register] = value;
        }
        info.map(|_| ()).ok_or(Status::NO_VALID_VE_INFO)
    }
}
