//! TDG.VP.VMCALL: the guest calls its host, a TD exit.
//!
//! Source: TDX module source, tdg_vp_vmcall.c. RCX: mask of the registers that are passed to the
//! host and back, bits 15:0 general purpose, 31:16 XMM. RAX, RCX and RSP cannot be passed. What
//! the call is about (MapGPA, HLT, …) is between guest and host.

use tdx_defs::{CompletionStatus as Status, Gpr, Gprs, OperandId};

use super::cpu::{Cpu, Event, Leaving};
use super::step::{GuestStep, Resumed};
use super::vcpu_state::LastExit;

/// Exit reason of a TDCALL.
const TDCALL: u64 = 77;
/// RAX, RCX and RSP, and what lies above the masks.
const RESERVED: u64 = 0b1_0011 | 0xFFFF_FFFF << 32;
/// RBP, which CONFIG_FLAGS may protect.
const RBP: u64 = 1 << (Gpr::Rbp as u8);

impl Cpu<'_> {
    pub(super) fn vmcall(&self, regs: Gprs) -> Event {
        let mask = regs[Gpr::Rcx];
        let keeps_rbp = self.inside.config.keeps_rbp;
        let reserved = RESERVED | if keeps_rbp { RBP } else { 0 };
        if mask & reserved != 0 {
            let status = Status::OPERAND_INVALID.with(OperandId::RCX);
            return Ok(GuestStep::Resumed(Resumed {
                regs: Some(regs.with(Gpr::Rax, status.0)),
                ..Resumed::default()
            }));
        }
        self.inside.vcpu.guest().vmcall = regs;
        let mut host = Gprs::default().with(Gpr::Rax, TDCALL).with(Gpr::Rcx, mask);
        for register in Gpr::ALL {
            if register > Gpr::Rcx && register.is_in(mask) {
                host[register] = regs[register];
            }
        }
        Err(Leaving::with(host, LastExit::Vmcall))
    }
}
