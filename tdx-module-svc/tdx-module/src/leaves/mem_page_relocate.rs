//! TDH.MEM.PAGE.RELOCATE: moves a blocked 4 KiB page to another physical page and unblocks it.
//!
//! Source: TDX module source, tdh_mem_page_relocate.c. RCX level 0 and GPA, RDX TDR, R8 new page;
//! outputs: RCX the old page, or entry details in RCX and RDX.

use tdx_defs::{CompletionStatus as Status, Leaf, OperandId, PageType};

use crate::checks::{OpStateLock, SeptOperand, busy, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

pub(crate) fn mem_page_relocate(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (rcx, rdx) = (std::mem::take(&mut regs.rcx), std::mem::take(&mut regs.rdx));
    let module = cx.module;
    let td = cx.lock_tdr(rdx, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_PAGE_RELOCATE, OpStateLock::Shared)?;
    let operand = SeptOperand::decode(rcx, 0, 0)?;
    let tree = running.tree(LockMode::Shared);
    let held = tree.hold_entry(operand)?;
    if !held.value().is_leaf() {
        return Err(held.fail(Status::EPT_ENTRY_STATE_INCORRECT));
    }
    held.check_allows(Leaf::MEM_PAGE_RELOCATE)?;
    let old = held.value();
    if regs.r8 == old.page().get() {
        return Err(invalid(OperandId::R8));
    }
    let from = module.entry_behind(old, operand.level)?;
    let _from = from
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::RCX))?;
    running.check_tracked(&held, from)?;
    let page = module.lock_free_page(regs.r8, OperandId::R8)?;

    page.entry.assign(PageType::REG, td.tdr());
    if let Some(content) = module.private.take(old.page().frame()) {
        module.private.put(page.hpa.frame(), content);
        page.entry.set_content(true);
    }
    held.commit(module.format.entry(old.state().unblocked(), page.hpa));
    from.free();
    regs.rcx = old.page().get();
    Ok(())
}
