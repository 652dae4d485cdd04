//! TDH.MEM.SEPT.RD: shows a Secure EPT entry.
//!
//! Source: TDX module source, tdh_mem_sept_rd.c. RCX level and GPA, RDX TDR with
//! READ_L2_ATTRIBUTES in bit 0; outputs RCX entry, RDX level and state, R8 L2 attributes.
//!
//! Model: no page is mapped for an L2 VM, so the attributes are zero.

use tdx_defs::{Leaf, OperandId, TdAttributes};

use crate::checks::{OpStateLock, SeptOperand, details, invalid};
use crate::dispatch::{Cx, Outcome, Run};
use crate::locks::LockMode;

const READ_L2_ATTRIBUTES: u64 = 1;

pub(crate) fn mem_sept_rd(cx: &Cx<'_>, run: &mut Run<'_>) -> Outcome {
    let rdx = run.take_tdr();
    let l2_attributes = rdx & READ_L2_ATTRIBUTES != 0;
    let td = cx.lock_tdr(rdx & !READ_L2_ATTRIBUTES, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_SEPT_RD, OpStateLock::Shared)?;
    if l2_attributes && !running.config.attributes.contains(TdAttributes::DEBUG) {
        return Err(invalid(OperandId::RDX));
    }
    let tree = running.tree(LockMode::Shared);
    run.each(|regs| {
        let rcx = std::mem::take(&mut regs.rcx);
        let operand = SeptOperand::decode(rcx, 0, running.config.root_level)?;
        let held = tree.hold_entry(operand)?;
        [regs.rcx, regs.rdx] = details(held.value(), operand.level);
        if l2_attributes {
            regs.r8 = 0;
        }
        Ok(())
    })
}
