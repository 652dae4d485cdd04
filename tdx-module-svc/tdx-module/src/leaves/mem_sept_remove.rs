//! TDH.MEM.SEPT.REMOVE: unlinks an empty Secure EPT page.
//!
//! Source: TDX module source, tdh_mem_sept_remove.c. RCX level and GPA, RDX TDR; outputs RCX the
//! page, or entry details in RCX and RDX; version 1: R9 to R11 removed pages of L2 VMs.

use std::sync::atomic::Ordering;

use tdx_defs::{ALL_ONES_HPA, CompletionStatus as Status, Leaf, OperandId, PageType};

use crate::checks::{L2Tables, OpStateLock, SeptOperand, busy, inconsistent, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::sept::SeptEntry;

pub(crate) fn mem_sept_remove(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (rcx, rdx) = (std::mem::take(&mut regs.rcx), std::mem::take(&mut regs.rdx));
    if regs.version > 0 {
        (regs.r9, regs.r10, regs.r11) = (ALL_ONES_HPA, ALL_ONES_HPA, ALL_ONES_HPA);
    }
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
    }
    let td = cx.lock_tdr(rdx, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_SEPT_REMOVE, OpStateLock::Shared)?;
    let operand = SeptOperand::decode(rcx, 1, running.config.root_level)?;
    let tree = running.tree(LockMode::Exclusive);
    let held = tree.hold_entry(operand)?;
    held.check_allows(Leaf::MEM_SEPT_REMOVE)?;
    let page = held.value().page();
    let entry = cx.module.entry_behind(held.value(), operand.level)?;
    let _page = entry
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::RCX))?;
    running.check_tracked(&held, entry)?;
    let sept = running.td.sept();
    let table = sept.child(held.slot()).ok_or_else(inconsistent)?;
    let vacant = |word: u64| SeptEntry(word).state().is_vacant();
    if !table
        .entries()
        .iter()
        .all(|entry| vacant(entry.load(Ordering::Relaxed)))
    {
        return Err(held.fail(Status::EPT_PAGE_NOT_FREE));
    }

    let l2_tables = L2Tables::lock(cx.module, &running, held.value(), operand)?;

    let slot = held.slot();
    cx.count_freed(PageType::EPT, l2_tables.len());
    l2_tables.remove(&running, regs);
    held.commit(SeptEntry::FREE);
    sept.drop_child(slot);
    entry.free();
    td.remove_children(1);
    cx.count_freed(PageType::EPT, 1);
    regs.rcx = page.get();
    Ok(())
}
