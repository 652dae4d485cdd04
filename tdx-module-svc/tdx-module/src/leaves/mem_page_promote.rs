//! TDH.MEM.PAGE.PROMOTE: merges 512 pages into one of the next size.
//!
//! Source: TDX module source, tdh_mem_page_promote.c. RCX level 1 or 2 of the result and GPA, RDX
//! TDR; outputs: RCX the freed Secure EPT page, or entry details in RCX and RDX; version 1: R9 to
//! R11 freed pages of L2 VMs.
//!
//! Release 1.5.05 shares SEPT_TREE and locks each child entry instead. Another processor may still be
//! on its way into the table that is freed: it finds the entries locked, and the table is not used
//! again before somebody has held SEPT_TREE alone.

use tdx_defs::{ALL_ONES_HPA, CompletionStatus as Status, Leaf, OperandId, PageType};

use super::mem_page_demote::{pages_of, restart};
use crate::checks::{
    HeldEntry, L2Tables, OpStateLock, Running, SeptOperand, busy, inconsistent, invalid,
};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::{PageSize, PamtEntry};
use crate::sept::{ENTRIES, EntryLock, SeptEntry, SeptState, Slot, Table};

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
    let mode = if running.is_1_5_05() {
        LockMode::Shared
    } else {
        LockMode::Exclusive
    };
    let tree = running.tree(mode);
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
    let (first, children) = check_mergeable(&running, &held, table, child)?;
    // A look for an interrupt before each table of an L2 VM, and one at the end. As no page is
    // mapped for an L2 VM, its tables are free of entries.
    let l2_tables = L2Tables::lock(module, &running, held.value(), operand)?;
    let looks = u32::try_from(l2_tables.len()).unwrap_or(0);
    if (0..=looks).any(|check| module.conditions.interrupt_pending(check)) {
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
    cx.count_freed(PageType::EPT, l2_tables.len());
    l2_tables.remove(&running, regs);
    held.commit(module.format.entry(first.state(), first.page()));
    if mode == LockMode::Shared {
        children.into_iter().for_each(EntryLock::keep);
        td.sept().retire_child(slot);
    } else {
        td.sept().drop_child(slot);
    }
    table_entry.free();
    td.remove_children(1);
    cx.count_freed(PageType::EPT, 1);
    regs.rcx = table_page.get();
    Ok(())
}

/// Whether the 512 entries make one large page: all mapped or all pending, physically contiguous,
/// aligned and unlocked. Answers the first, and what was locked on the way.
fn check_mergeable<'t>(
    running: &Running<'_>,
    held: &HeldEntry<'_>,
    table: &'t Table,
    child: PageSize,
) -> Result<(SeptEntry, Vec<EntryLock<'t>>), Fail> {
    let refused = || held.fail(Status::EPT_INVALID_PROMOTE_CONDITIONS);
    let slot = |index| Slot::at(table, index, held.slot().level - 1);
    let whole = ENTRIES as u64 * child.bytes();
    let mut locks = Vec::new();
    let mut first = None;
    for index in 0..ENTRIES {
        // Release 1.5.05 takes the lock of each child, later ones compare it with the rest.
        let entry = if running.is_1_5_05() {
            let busy = || held.fail(Status::OPERAND_BUSY);
            let lock = slot(index).try_lock().ok_or_else(busy)?;
            let entry = lock.value();
            locks.push(lock);
            entry
        } else {
            slot(index).read()
        };
        // What a guest had begun to accept of a 2 MiB page does not count.
        let entry = if child == PageSize::Large {
            entry.with_accept_counter(0)
        } else {
            entry
        };
        let first = *first.get_or_insert(entry);
        let usable = [SeptState::MAPPED, SeptState::PENDING].contains(&first.state());
        if entry.is_locked() || !usable || !first.page().is_aligned(whole) {
            return Err(refused());
        }
        if entry.merge_view() != first.merge_view() + index as u64 * child.bytes() {
            return Err(refused());
        }
    }
    Ok((first.ok_or_else(inconsistent)?, locks))
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
