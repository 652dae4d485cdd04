//! TDH.MEM.PAGE.REMOVE: takes a page away from a TD.
//!
//! Source: TDX module source, tdh_mem_page_remove.c. RCX level 0 to 2 and GPA, RDX TDR; outputs:
//! RCX the page, or entry details in RCX and RDX.
//!
//! Model: the contents go with the page. In the real machine they stay in memory, where no TD can
//! read them any more: TDH.MEM.PAGE.ADD and the guest's acceptance overwrite a page that comes back.

use tdx_defs::{CompletionStatus as Status, Leaf, OperandId, PageType};

use crate::checks::{OpStateLock, Running, SeptOperand, Tree, busy, inconsistent};
use crate::dispatch::{Cx, Fail, Outcome, Regs, Run};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::sept::SeptEntry;

pub(crate) fn mem_page_remove(cx: &Cx<'_>, run: &mut Run<'_>) -> Outcome {
    let td = cx.lock_tdr(run.take_tdr(), OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_PAGE_REMOVE, OpStateLock::Shared)?;
    let tree = running.tree(LockMode::Shared);
    let mut taken = 0;
    let outcome = run.each(|regs| {
        taken += remove(cx, &running, &tree, regs)?.pages();
        Ok(())
    });
    td.remove_children(taken);
    cx.count_freed(PageType::REG, taken);
    outcome
}

/// One page; answers its size.
fn remove(
    cx: &Cx<'_>,
    running: &Running<'_>,
    tree: &Tree<'_, '_>,
    regs: &mut Regs,
) -> Result<PageSize, Fail> {
    let operand = SeptOperand::decode(std::mem::take(&mut regs.rcx), 0, 2)?;
    let held = tree.hold_entry(operand)?;
    if !held.value().is_leaf() {
        return Err(held.fail(Status::EPT_ENTRY_STATE_INCORRECT));
    }
    held.check_allows(Leaf::MEM_PAGE_REMOVE)?;
    let page = held.value().page_at(operand.level);
    let size = PageSize::of_level(operand.level).ok_or_else(inconsistent)?;
    let entry = cx.module.entry_behind(held.value(), operand.level)?;
    let _page = entry
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::RCX))?;
    running.check_tracked(&held, entry)?;

    held.commit(SeptEntry::FREE);
    cx.module.forget_contents(page, size, entry);
    entry.free();
    regs.rcx = page.get();
    Ok(size)
}
