//! TDH.MEM.RANGE.BLOCK: makes an entry unusable for new translations.
//!
//! Source: TDX module source, tdh_mem_range_block.c. RCX level and GPA, RDX TDR; outputs: entry
//! details in RCX and RDX on an error. Entries below a blocked link do not change.

use tdx_defs::{CompletionStatus as Status, Leaf, OperandId};

use crate::checks::{OpStateLock, SeptOperand};
use crate::dispatch::{Cx, Outcome, Run};
use crate::locks::LockMode;
use crate::sept::SeptState;

pub(crate) fn mem_range_block(cx: &Cx<'_>, run: &mut Run<'_>) -> Outcome {
    let td = cx.lock_tdr(run.take_tdr(), OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_RANGE_BLOCK, OpStateLock::Shared)?;
    let tree = running.tree(LockMode::Exclusive);
    run.each(|regs| {
        let rcx = std::mem::take(&mut regs.rcx);
        let operand = SeptOperand::decode(rcx, 0, running.config.root_level)?;
        let held = tree.hold_entry(operand)?;
        let old = held.value();
        if !old.state().allows(Leaf::MEM_RANGE_BLOCK) {
            let status = if old.state().is_blocked() {
                Status::GPA_RANGE_ALREADY_BLOCKED
            } else {
                Status::EPT_ENTRY_STATE_INCORRECT
            };
            return Err(held.fail(status));
        }
        let behind = cx.module.entry_behind(old, operand.level)?;

        let blocked = cx.module.format.entry(old.state().blocked(), old.page());
        running.change_l2(cx.module, old, operand, SeptState::blocked)?;
        held.commit(blocked.with_aliases_of(old));
        // The epoch is read once nobody can start to use the entry.
        behind.set_bepoch(running.td.epochs().current());
        Ok(())
    })
}
