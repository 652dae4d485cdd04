//! TDH.MEM.PAGE.PROMOTE: merges 512 pages into one of the next size.
//!
//! Source: TDX module source, tdh_mem_page_promote.c. RCX level 1 or 2 of the result and GPA, RDX
//! TDR; outputs: RCX the freed Secure EPT page, or entry details in RCX and RDX; version 1: R9 to
//! R11 freed pages of L2 VMs.
//!
//! Model: SEPT_TREE is taken exclusively, as from release 1.5.06 on. Release 1.5.05 shares it and
//! locks each child entry instead, which leaves other processors a way into the freed table.

use tdx_defs::{ALL_ONES_HPA, CompletionStatus as Status, Leaf, OperandId, PageType};

use super::mem_page_demote::{pages_of, restart};
use crate::checks::{HeldEntry, OpStateLock, Running, SeptOperand, busy, inconsistent, invalid};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::{PageSize, PamtEntry};
use crate::sept::{ENTRIES, SeptEntry, SeptState, Slot, Table};

pub(crate) fn mem_page_promote(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (rcx, rdx) = (std::mem::take(&mut regs.rcx), std::mem::take(&mut regs.rdx));
    let module = cx.module;
    if regs.version > 0 {
        (regs.r9, regs.r10, regs.r11) = (ALL_ONES_HPA, ALL_ONES_HPA, ALL_ONES_HPA);
    }
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
    }
    let td = cx.lock_tdr(rdx, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_PAGE_PROMOTE, OpStateLock::Shared)?;
    let operand = SeptOperand::decode(rcx, 1, 2)?;
    let tree = running.tree(LockMode::Exclusive);
    let held = tree.hold_entry(operand)?;
    held.check_allows(Leaf::MEM_PAGE_PROMOTE)?;
    let table_page = held.value().page();
    let table_entry = module.entry_behind(held.value(), operand.level)?;
    let _table = table_entry
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::RCX))?;
    running.check_tracked(&held, table_entry)?;
    let size = PageSize::of_level(operand.level).ok_or_else(inconsistent)?;
    let child = size.smaller().ok_or_else(inconsistent)?;
    let table = td.sept().child(held.slot()).ok_or_else(inconsistent)?;
    let first = check_mergeable(&running, &held, table, child)?;
    if module.conditions.interrupt_pending(0) {
        return Err(restart(rcx, rdx));
    }
    let large = module
        .pamt
        .entry(first.page(), size)
        .ok_or_else(inconsistent)?;
    let _large = large
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::RCX))?;

    merge_metadata(cx, first, child, large, td.tdr());
    let slot = held.slot();
    held.commit(module.format.entry(first.state(), first.page()));
    td.sept().drop_child(slot);
    table_entry.free();
    td.remove_children(1);
    cx.count_freed(PageType::EPT, 1);
    regs.rcx = table_page.get();
    Ok(())
}

/// Whether the 512 entries make one large page: all mapped or all pending, physically contiguous,
/// aligned and unlocked. Answers the first.
fn check_mergeable(
    running: &Running<'_>,
    held: &HeldEntry<'_>,
    table: &Table,
    child: PageSize,
) -> Result<SeptEntry, Fail> {
    let refused = || held.fail(Status::EPT_INVALID_PROMOTE_CONDITIONS);
    let read = |index| Slot::at(table, index, held.slot().level - 1).read();
    let first = read(0);
    let whole = ENTRIES as u64 * child.bytes();
    let usable = [SeptState::MAPPED, SeptState::PENDING].contains(&first.state());
    if !usable || !first.page().is_aligned(whole) {
        return Err(refused());
    }
    for index in 0..ENTRIES {
        let entry = read(index);
        // Release 1.5.05 takes the lock of each child, later ones compare it with the rest.
        if entry.is_locked() && running.is_1_5_05() {
            return Err(held.fail(Status::OPERAND_BUSY));
        }
        let expected = first.merge_view() + index as u64 * child.bytes();
        if entry.is_locked() || entry.merge_view() != expected {
            return Err(refused());
        }
    }
    Ok(first)
}

/// The large metadata entry takes the place of 512 smaller ones. Its BEPOCH keeps its old value.
fn merge_metadata(
    cx: &Cx<'_>,
    first: SeptEntry,
    child: PageSize,
    large: &PamtEntry,
    tdr: tdx_defs::Hpa,
) {
    let mut content = false;
    for page in pages_of(first.page(), child) {
        if let Some(entry) = cx.module.pamt.entry(page, child) {
            content |= entry.has_content();
            entry.free();
        }
    }
    large.assign_keeping_bepoch(PageType::REG, tdr);
    large.set_content(content);
}
