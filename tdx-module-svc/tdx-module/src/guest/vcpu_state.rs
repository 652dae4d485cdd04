//! What a vCPU keeps of its guest between events and between entries.
//!
//! Source: TDX module source, TDVPS: VCPU_EPOCH, LAST_TD_EXIT, VE_INFO, the list of suspicious
//! addresses, and the guest's registers after TDG.VP.VMCALL.

use tdx_defs::{Gpa, Gprs};

use super::ops::AccessKind;
use super::zero_step::ZeroStep;

/// TDVPS.LAST_TD_EXIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum LastExit {
    /// Something that happened to the guest, or no exit yet.
    #[default]
    AsyncFault,
    /// A guest call that is to be made again.
    AsyncTrap,
    /// TDG.VP.VMCALL.
    Vmcall,
}

/// VE_INFO, until the guest fetches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VeInfo {
    pub(super) reason: u32,
    pub(super) qualification: u64,
    /// Model: guest linear addresses are not simulated; this is the GPA of the access.
    pub(super) gla: u64,
    pub(super) gpa: u64,
    pub(super) instruction: u64,
}

/// The guest side of a vCPU.
#[derive(Debug, Default)]
pub(crate) struct GuestState {
    pub(crate) vcpu_epoch: u64,
    pub(crate) last_exit: LastExit,
    pub(super) ve_info: Option<VeInfo>,
    /// Registers of the guest at its TDG.VP.VMCALL; RCX says which ones the host passes back.
    pub(super) vmcall: Gprs,
    pub(super) zero_step: ZeroStep,
    /// The access that faulted last: made again, it is the same instruction.
    pub(super) faulted: Option<(AccessKind, Gpa)>,
}

impl GuestState {
    /// The guest's registers when it goes on after TDG.VP.VMCALL with what the host passes.
    pub(crate) fn after_vmcall(&self, host: &Gprs) -> Gprs {
        use tdx_defs::Gpr;
        let mask = self.vmcall[Gpr::Rcx];
        let mut regs = self.vmcall.with(Gpr::Rax, 0);
        for register in Gpr::ALL {
            if register > Gpr::Rcx && register != Gpr::Rsp && register.is_in(mask) {
                regs[register] = host[register];
            }
        }
        regs
    }

    /// Addresses that the zero-step defence wants to be usable before the next entry.
    pub(crate) fn suspects(&self) -> &[Gpa] {
        self.zero_step.suspects()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tdx_defs::Gpr;

    #[test]
    fn the_host_passes_back_the_registers_that_the_guest_chose() {
        let vmcall = Gprs::default()
            .with(Gpr::Rcx, 0xC00)
            .with(Gpr::R10, 1)
            .with(Gpr::R12, 2);
        let state = GuestState {
            vmcall,
            ..GuestState::default()
        };
        let host = Gprs::default()
            .with(Gpr::R10, 7)
            .with(Gpr::R11, 8)
            .with(Gpr::R12, 9);
        let regs = state.after_vmcall(&host);
        assert_eq!(
            [Gpr::Rax, Gpr::Rcx, Gpr::R10, Gpr::R11, Gpr::R12].map(|r| regs[r]),
            [0, 0xC00, 7, 8, 2]
        );
    }
}
