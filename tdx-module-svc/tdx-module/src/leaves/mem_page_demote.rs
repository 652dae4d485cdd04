//! TDH.MEM.PAGE.DEMOTE: splits a 2 MiB or 1 GiB page into 512 smaller ones.
//!
//! Source: TDX module source, tdh_mem_page_demote.c. RCX level 1 or 2 and GPA, RDX TDR with
//! L2_SEPT_ADD_MODE in bit 0, R8 page for the new table, R9 to R11 pages for tables of L2 VMs;
//! outputs: entry details in RCX and RDX on a Secure EPT error; R9 to R11 with bit 63 set where a
//! page was not needed.
//!
//! Model: no page is mapped for an L2 VM, so a page for an L2 table becomes a table without entries.

use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, OperandId, PageType};

use crate::checks::{
    OpStateLock, Running, SeptOperand, Taken, busy, inconsistent, invalid, l2_operand,
    optional_page,
};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::{PageSize, PamtEntry};
use crate::sept::{ENTRIES, SeptState, Slot};

/// RDX bit 0: pages for L2 tables may be left unused.
const L2_SEPT_ADD_MODE: u64 = 1;
const RDX_USED: u64 = 0x000F_FFFF_FFFF_F001;
/// Bit 63 of a page operand: it was not needed the last time.
const NOT_NEEDED: u64 = 1 << 63;

pub(crate) fn mem_page_demote(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (rcx, rdx) = (std::mem::take(&mut regs.rcx), std::mem::take(&mut regs.rdx));
    let module = cx.module;
    if rdx & !RDX_USED != 0 {
        return Err(invalid(OperandId::RDX));
    }
    let td = cx.lock_tdr(rdx & !L2_SEPT_ADD_MODE, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_PAGE_DEMOTE, OpStateLock::Shared)?;
    let operand = SeptOperand::decode(rcx, 1, 2)?;
    let tree = running.tree(LockMode::Shared);
    let held = tree.hold_entry(operand)?;
    held.check_allows(Leaf::MEM_PAGE_DEMOTE)?;
    let old = held.value();
    // A page that was accepted in part is split as one that was not accepted at all.
    let first = old.page_at(operand.level);
    let large = module.entry_behind(old, operand.level)?;
    running.check_tracked(&held, large)?;
    let table_page = module.lock_free_page(regs.r8, OperandId::R8)?;
    let mut l2 = Vec::new();
    if rdx & L2_SEPT_ADD_MODE == 0 {
        for (vm, page) in lock_l2_pages(cx, &running, regs)? {
            let check = u32::try_from(l2.len()).unwrap_or(0);
            if module.conditions.interrupt_pending(check) {
                return Err(restart(rcx, rdx));
            }
            l2.push((vm, running.walk_l2(vm, operand)?.slot, page));
        }
    }
    // Release 1.5.34 looks for an interrupt only when there is L2 work to do.
    let looks = running.is_1_5_05() || running.config.num_l2_vms > 0;
    let check = u32::try_from(l2.len()).unwrap_or(0);
    if looks && module.conditions.interrupt_pending(check) {
        return Err(restart(rcx, rdx));
    }
    let _large = large
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::RCX))?;

    let size = PageSize::of_level(operand.level).ok_or_else(inconsistent)?;
    let child = size.smaller().ok_or_else(inconsistent)?;
    split_metadata(cx, first, child, large, td.tdr());
    let table = td
        .sept()
        .prepare_child(held.slot())
        .ok_or_else(inconsistent)?;
    let state = old.state().unblocked();
    for (page, index) in pages_of(first, child).zip(0..ENTRIES) {
        Slot::at(table, index, operand.level - 1).write_alone(module.format.entry(state, page));
    }
    // The new table's BEPOCH keeps whatever it was.
    table_page
        .entry
        .assign_keeping_bepoch(PageType::EPT, td.tdr());
    td.add_children(1);
    cx.count_used(PageType::EPT, 1);
    if rdx & L2_SEPT_ADD_MODE != 0 {
        mark_not_needed(&running, regs);
    }
    let mut link = module.format.entry(SeptState::NL_MAPPED, table_page.hpa);
    for (vm, slot, page) in l2 {
        let sept = td.l2_sept(vm).ok_or_else(inconsistent)?;
        sept.prepare_child(slot).ok_or_else(inconsistent)?;
        slot.write_alone(module.format.entry(SeptState::NL_MAPPED, page.hpa));
        link = link.with_alias(vm);
        page.entry.assign_keeping_bepoch(PageType::EPT, td.tdr());
        td.add_children(1);
        cx.count_used(PageType::EPT, 1);
    }
    held.commit(link);
    Ok(())
}

/// Pages for L2 tables that were not needed, as the outputs R9 to R11 name them.
fn mark_not_needed(running: &Running<'_>, regs: &mut Regs) {
    let pages = [&mut regs.r9, &mut regs.r10, &mut regs.r11];
    for page in pages.into_iter().take(running.config.num_l2_vms.into()) {
        if optional_page(*page).is_some() {
            *page |= NOT_NEEDED;
        }
    }
}

/// Stopped before anything was done: RCX and RDX as they came.
pub(super) fn restart(rcx: u64, rdx: u64) -> Fail {
    Fail {
        status: Status::INTERRUPTED_RESTARTABLE,
        details: Some([rcx, rdx]),
    }
}

/// The 512 pages of size `child` from `first` on.
pub(super) fn pages_of(first: Hpa, child: PageSize) -> impl Iterator<Item = Hpa> {
    (0..ENTRIES as u64).map(move |page| Hpa::new(first.get() + page * child.bytes()))
}

/// The large metadata entry gives way to 512 smaller ones.
fn split_metadata(cx: &Cx<'_>, first: Hpa, child: PageSize, large: &PamtEntry, tdr: Hpa) {
    let content = large.has_content();
    for page in pages_of(first, child) {
        if let Some(entry) = cx.module.pamt.entry(page, child) {
            entry.assign(PageType::REG, tdr);
            entry.set_content(content);
        }
    }
    large.free();
}

/// The pages for tables of L2 VMs: they have to be free.
fn lock_l2_pages<'m>(
    cx: &Cx<'m>,
    running: &Running<'_>,
    regs: &mut Regs,
) -> Result<Vec<(u8, Taken<'m>)>, Fail> {
    let mut pages = Vec::new();
    for vm in running.l2_vms() {
        if let Some(page) = optional_page(*regs.l2_page(vm)) {
            let page = cx
                .module
                .lock_free_page(page & !NOT_NEEDED, l2_operand(vm))?;
            pages.push((vm, page));
        }
    }
    Ok(pages)
}
