//! TDG.MEM.PAGE.ATTR.RD and TDG.MEM.PAGE.ATTR.WR: how a page is mapped, and its attributes for
//! L2 VMs.
//!
//! Source: TDX module source, tdg_mem_page_attr_rd.c and tdg_mem_page_attr_wr.c. RD: RCX GPA. WR:
//! RCX level 0 to 2 and GPA, RDX attributes, R8 mask and flags, 16 bits for each VM. Outputs: RCX
//! address, level and pending in bit 62; RDX attributes; both 0 on an error.
//!
//! Model: no page is mapped for an L2 VM, so attributes are zero and none can be given.

use tdx_defs::{CompletionStatus as Status, Gpa, Gpr, Gprs, OperandId, PAGE_SIZE};

use super::cpu::{Cpu, Leave};
use super::violation::Extended;
use crate::checks::SeptOperand;
use crate::sept::{SeptEntry, SeptState};

/// RCX bit 62: the page is pending.
const PENDING: u64 = 1 << 62;
/// Attribute bits of the L1 VM, which has none.
const VM_0: u64 = 0xFFFF;
/// TDCALL leaves in the table of states.
const READ: u8 = b'r';
const WRITE: u8 = b'w';

type Outcome = Result<Result<(), Status>, Leave>;

impl Cpu<'_> {
    pub(super) fn attributes_read(&self, regs: &mut Gprs) -> Outcome {
        let gpa = Gpa::new(regs[Gpr::Rcx]);
        (regs[Gpr::Rcx], regs[Gpr::Rdx]) = (0, 0);
        let config = &self.inside.config;
        if !self.inside.is_private(gpa) {
            return Ok(Err(Status::OPERAND_INVALID.with(OperandId::RCX)));
        }
        let Some(walk) = self.inside.td.sept().walk(config.root_level, gpa, 0) else {
            return Ok(Err(Status::TD_FATAL));
        };
        let Some(held) = walk.slot.try_lock_for_guest() else {
            return Ok(Err(Status::OPERAND_BUSY.with(OperandId::RCX)));
        };
        if !held.value().state().allows_guest(READ) {
            // The access is one that reads.
            return Err(Self::plain_exit(gpa, 1));
        }
        regs[Gpr::Rcx] = mapping(gpa, walk.slot.level, held.value());
        Ok(Ok(()))
    }

    pub(super) fn attributes_write(&self, regs: &mut Gprs) -> Outcome {
        let [rcx, attributes, flags] = [Gpr::Rcx, Gpr::Rdx, Gpr::R8].map(|r| regs[r]);
        (regs[Gpr::Rcx], regs[Gpr::Rdx]) = (0, 0);
        let invalid = |operand| Ok(Err(Status::OPERAND_INVALID.with(operand)));
        let config = &self.inside.config;
        for vm in 0..4u32 {
            let of_vm = VM_0 << (16 * vm);
            // The L1 VM has no attributes; those of other VMs are not modelled.
            if attributes & of_vm != 0 {
                return invalid(OperandId::RDX);
            }
            let exists = vm > 0 && vm <= u32::from(config.num_l2_vms);
            if !exists && flags & of_vm != 0 {
                return invalid(OperandId::R8);
            }
        }
        let Ok(operand) = SeptOperand::decode(rcx, 0, 2) else {
            return invalid(OperandId::RCX);
        };
        let gpa = operand.gpa;
        if !self.inside.is_private(gpa) {
            return invalid(OperandId::RCX);
        }
        let sept = self.inside.td.sept();
        let Some(walk) = sept.walk(config.root_level, gpa, operand.level) else {
            return Ok(Err(Status::TD_FATAL));
        };
        let exit =
            |entry| Self::details_exit(gpa, operand.level, &walk, entry, Extended::AttributesWrite);
        if walk.slot.level != operand.level {
            return Err(exit(walk.value));
        }
        let Some(held) = walk.slot.try_lock_for_guest() else {
            return Ok(Err(Status::OPERAND_BUSY.with(OperandId::RCX)));
        };
        let entry = held.value();
        if !entry.is_leaf() && entry.state() != SeptState::FREE {
            let level = u32::from(walk.slot.level);
            return Ok(Err(Status::PAGE_SIZE_MISMATCH.with_details(level)));
        }
        if !entry.state().allows_guest(WRITE) {
            return Err(exit(entry));
        }
        regs[Gpr::Rcx] = mapping(gpa, walk.slot.level, entry);
        Ok(Ok(()))
    }
}

/// RCX: where the page begins, its level, and whether it is pending.
fn mapping(gpa: Gpa, level: u8, entry: SeptEntry) -> u64 {
    let size = PAGE_SIZE << (9 * u32::from(level));
    let pending = if entry.state().is_pending() {
        PENDING
    } else {
        0
    };
    gpa.get() & !(size - 1) | u64::from(level) | pending
}
