//! TDH.MEM.PAGE.DEMOTE: splits a 2 MiB or 1 GiB page into 512 smaller ones.
//!
//! Source: TDX module source, tdh_mem_page_demote.c. RCX level 1 or 2 and GPA, RDX TDR with
//! L2_SEPT_ADD_MODE in bit 0, R8 page for the new table, R9 to R11 pages for tables of L2 VMs;
//! outputs: entry details in RCX and RDX on a Secure EPT error; R9 to R11 with bit 63 set where a
//! page was not needed.
//!
//! Model: no page is mapped for an L2 VM, so a page for an L2 table is only ever looked at: its
//! tree has no table below the root.

use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, OperandId, PageType};

use crate::checks::{
    OpStateLock, Running, SeptOperand, busy, inconsistent, invalid, optional_page,
};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::{PageSize, PamtEntry};
use crate::sept::{ENTRIES, Slot};

/// RDX bit 0: pages for L2 tables may be left unused.
const L2_SEPT_ADD_MODE: u64 = 1;
const RDX_USED: u64 = 0x000F_FFFF_FFFF_F001;
/// Bit 63 of a page operand: it was not needed the last time.
const NOT_NEEDED: u64 = 1 << 63;
/// Public state of a free entry of an L2 tree.
const L2_FREE: u64 = 64;

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
    if rdx & L2_SEPT_ADD_MODE == 0 {
        check_l2_pages(cx, &running, regs)?;
    }
    // Release 1.5.34 looks for an interrupt only when there is L2 work to do.
    let looks = running.is_1_5_05() || running.config.num_l2_vms > 0;
    if looks && module.conditions.interrupt_pending(0) {
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
    let link = module
        .format
        .entry(crate::sept::SeptState::NL_MAPPED, table_page.hpa);
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

/// A page for the table of an L2 VM: it has to be free, and the VM's tree has to reach its place.
fn check_l2_pages(cx: &Cx<'_>, running: &Running<'_>, regs: &Regs) -> Outcome {
    let pages = [
        (1, regs.r9, OperandId::R9),
        (2, regs.r10, OperandId::R10),
        (3, regs.r11, OperandId::R11),
    ];
    for (vm, page, operand) in pages {
        let Some(page) = optional_page(page) else {
            continue;
        };
        if vm > u32::from(running.config.num_l2_vms) {
            continue;
        }
        cx.module.lock_free_page(page & !NOT_NEEDED, operand)?;
        let level = running.config.root_level;
        let status = Status::L2_SEPT_WALK_FAILED.with_details(vm << 16 | u32::from(level));
        let rdx = u64::from(vm) << 16 | L2_FREE << 8 | u64::from(level);
        return Err(Fail {
            status,
            details: Some([1 << 63, rdx]),
        });
    }
    Ok(())
}
