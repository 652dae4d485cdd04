//! TDH.MEM.SEPT.ADD: links a new Secure EPT page.
//!
//! Source: TDX module source, tdh_mem_sept_add.c. RCX level of the entry that will point to the
//! page, and GPA; RDX TDR with ALLOW_EXISTING in bit 0; R8 page; version 1: R9 to R11 pages for
//! the trees of L2 VMs. Outputs: entry details in RCX and RDX on a Secure EPT error; version 1: R8
//! to R11 all-ones where a page was used (or none given), with bit 63 set where it was not needed.

use tdx_defs::{ALL_ONES_HPA, CompletionStatus as Status, Leaf, OperandId, PageType};

use crate::checks::{
    HeldEntry, L2_VMS, OpStateLock, Running, SeptOperand, Taken, inconsistent, invalid, l2_fail,
    l2_operand, optional_page,
};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::sept::{SeptState, Slot};

/// RDX bit 0.
const ALLOW_EXISTING: u64 = 1;
/// RDX bits that carry the TDR or ALLOW_EXISTING.
const RDX_USED: u64 = 0x000F_FFFF_FFFF_F001;
/// Bit 63 of a page operand: it was not needed the last time.
const NOT_NEEDED: u64 = 1 << 63;

pub(crate) fn mem_sept_add(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let original = (regs.rcx, regs.rdx);
    let (rcx, rdx) = (std::mem::take(&mut regs.rcx), std::mem::take(&mut regs.rdx));
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
    }
    if regs.version == 1 {
        forget_marks(regs);
    }
    if rdx & !RDX_USED != 0 {
        return Err(invalid(OperandId::RDX));
    }
    let allow_existing = rdx & ALLOW_EXISTING != 0;
    let td = cx.lock_tdr(rdx & !ALLOW_EXISTING, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_SEPT_ADD, OpStateLock::Shared)?;
    let operand = SeptOperand::decode(rcx, 1, running.config.root_level)?;
    let tree = running.tree(LockMode::Shared);
    let held = tree.hold_entry(operand)?;
    held.check_allows(Leaf::MEM_SEPT_ADD)?;

    // What the registers are going to say, also when a later check fails.
    let mut marked = *regs;
    let checked = check_pages(cx, &running, &held, operand, allow_existing, &mut marked);
    if regs.version == 1 {
        *regs = marked;
    }
    let Pages { own, l2 } = checked?;

    let mut entry = held.value();
    let mut added = own.is_some();
    if let Some(page) = own {
        let sept = running.td.sept();
        sept.prepare_child(held.slot()).ok_or_else(inconsistent)?;
        entry = cx.module.format.entry(SeptState::NL_MAPPED, page.hpa);
        cx.give_page(&page, PageType::EPT, PageSize::Small, running.td);
        if regs.version == 1 {
            regs.r8 = ALL_ONES_HPA;
        }
    }
    for (check, (vm, slot, page)) in (0..).zip(l2) {
        // Once something has been done, an interrupt ends the call, which is then made again.
        if added && cx.module.conditions.interrupt_pending(check) {
            held.commit(entry);
            return Err(resume(original));
        }
        let sept = running.td.l2_sept(vm).ok_or_else(inconsistent)?;
        sept.prepare_child(slot).ok_or_else(inconsistent)?;
        slot.write_alone(cx.module.format.entry(SeptState::NL_MAPPED, page.hpa));
        entry = entry.with_alias(vm);
        cx.give_page(&page, PageType::EPT, PageSize::Small, running.td);
        *regs.l2_page(vm) = ALL_ONES_HPA;
        added = true;
    }
    if added {
        held.commit(entry);
    }
    Ok(())
}

/// The pages that are going to be linked: in the TD's own tree, and in those of L2 VMs.
struct Pages<'m> {
    own: Option<Taken<'m>>,
    l2: Vec<(u8, Slot<'m>, Taken<'m>)>,
}

/// Checks the page operands and marks those that are not needed.
fn check_pages<'m>(
    cx: &Cx<'m>,
    running: &Running<'m>,
    held: &HeldEntry<'_>,
    operand: SeptOperand,
    allow_existing: bool,
    regs: &mut Regs,
) -> Result<Pages<'m>, Fail> {
    let linked = held.value().state() == SeptState::NL_MAPPED;
    let own = match optional_page(regs.r8) {
        None if regs.version == 0 => return Err(invalid(OperandId::R8)),
        None if linked => None,
        Some(page) if linked && allow_existing => {
            regs.r8 = page | NOT_NEEDED;
            None
        }
        Some(page) if !linked => {
            let page = cx
                .module
                .lock_free_page(page & !NOT_NEEDED, OperandId::R8)?;
            Some(page)
        }
        _ => return Err(held.fail(Status::EPT_ENTRY_STATE_INCORRECT)),
    };
    let mut l2 = Vec::new();
    if regs.version == 0 {
        return Ok(Pages { own, l2 });
    }
    for vm in L2_VMS {
        let Some(page) = optional_page(*regs.l2_page(vm)) else {
            continue;
        };
        if !running.l2_vms().contains(&vm) {
            return Err(invalid(l2_operand(vm)));
        }
        let walk = running.walk_l2(vm, operand)?;
        if walk.value.state() == SeptState::FREE {
            let page = cx.module.lock_free_page(page, l2_operand(vm))?;
            l2.push((vm, walk.slot, page));
        } else if allow_existing {
            *regs.l2_page(vm) = page | NOT_NEEDED;
        } else {
            return Err(l2_fail(Status::L2_SEPT_ENTRY_NOT_FREE, vm, &walk));
        }
    }
    Ok(Pages { own, l2 })
}

/// Takes away the marks that an earlier call left in the page operands.
fn forget_marks(regs: &mut Regs) {
    let pages = [&mut regs.r8, &mut regs.r9, &mut regs.r10, &mut regs.r11];
    for page in pages {
        if *page != ALL_ONES_HPA {
            *page &= !NOT_NEEDED;
        }
    }
}

/// Stopped between two pages: RCX and RDX as they came.
fn resume((rcx, rdx): (u64, u64)) -> Fail {
    Fail {
        status: Status::INTERRUPTED_RESUMABLE,
        details: Some([rcx, rdx]),
    }
}
