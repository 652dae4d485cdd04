//! TDH.MEM.RANGE.UNBLOCK: makes a blocked entry usable again.
//!
//! Source: TDX module source, tdh_mem_range_unblock.c. RCX level and GPA, RDX TDR; outputs: entry
//! details in RCX and RDX on an error.

use tdx_defs::{Leaf, OperandId};

use crate::checks::{OpStateLock, SeptOperand};
use crate::dispatch::{Cx, Outcome, Run};
use crate::locks::LockMode;
use crate::sept::SeptState;

pub(crate) fn mem_range_unblock(cx: &Cx<'_>, run: &mut Run<'_>) -> Outcome {
    let td = cx.lock_tdr(run.take_tdr(), OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_RANGE_UNBLOCK, OpStateLock::Shared)?;
    let tree = running.tree(LockMode::Exclusive);
    run.each(|regs| {
        let rcx = std::mem::take(&mut regs.rcx);
        let operand = SeptOperand::decode(rcx, 0, running.config.root_level)?;
        let held = tree.hold_entry(operand)?;
        held.check_allows(Leaf::MEM_RANGE_UNBLOCK)?;
        let old = held.value();
        running.check_tracked(&held, cx.module.entry_behind(old, operand.level)?)?;

        let usable = cx.module.format.entry(old.state().unblocked(), old.page());
        running.change_l2(cx.module, old, operand, SeptState::unblocked)?;
        held.commit(usable.with_aliases_of(old));
        Ok(())
    })
}
