//! TDH.MEM.SEPT.ADD: links a new Secure EPT page.
//!
//! Source: TDX module source, tdh_mem_sept_add.c. RCX level of the entry that will point to the
//! page, and GPA; RDX TDR with ALLOW_EXISTING in bit 0; R8 page; version 1: R9 to R11 pages for
//! the trees of L2 VMs. Outputs: entry details in RCX and RDX on a Secure EPT error; version 1: R8
//! to R11 all-ones where a page was used (or none given), with bit 63 set where it was not needed.
//!
//! Model: the trees of L2 VMs stay empty. A page for one is refused as if the VM did not exist.

use tdx_defs::{ALL_ONES_HPA, CompletionStatus as Status, Leaf, OperandId, PageType};

use crate::checks::{OpStateLock, SeptOperand, inconsistent, invalid, optional_page};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::sept::SeptState;

/// RDX bit 0.
const ALLOW_EXISTING: u64 = 1;
/// RDX bits that carry the TDR or ALLOW_EXISTING.
const RDX_USED: u64 = 0x000F_FFFF_FFFF_F001;
/// Bit 63 of a page operand: it was not needed the last time.
const NOT_NEEDED: u64 = 1 << 63;

pub(crate) fn mem_sept_add(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (rcx, rdx) = (std::mem::take(&mut regs.rcx), std::mem::take(&mut regs.rdx));
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
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

    let linked = held.value().state() == SeptState::NL_MAPPED;
    let page = match optional_page(regs.r8) {
        None if regs.version == 0 => return Err(invalid(OperandId::R8)),
        None if linked => None,
        Some(_) if linked && allow_existing => None,
        Some(page) if !linked => {
            let page = cx
                .module
                .lock_free_page(page & !NOT_NEEDED, OperandId::R8)?;
            Some(page)
        }
        _ => return Err(held.fail(Status::EPT_ENTRY_STATE_INCORRECT)),
    };
    if regs.version == 1 {
        check_l2_pages(regs)?;
    }

    let used = page.is_some();
    if let Some(page) = page {
        let sept = running.td.sept();
        sept.prepare_child(held.slot()).ok_or_else(inconsistent)?;
        let link = cx.module.format.entry(SeptState::NL_MAPPED, page.hpa);
        held.commit(link);
        cx.give_page(&page, PageType::EPT, PageSize::Small, running.td);
    }
    if regs.version == 1 && regs.r8 != ALL_ONES_HPA {
        regs.r8 = if used {
            ALL_ONES_HPA
        } else {
            regs.r8 | NOT_NEEDED
        };
    }
    Ok(())
}

fn check_l2_pages(regs: &Regs) -> Outcome {
    let pages = [
        (regs.r9, OperandId::R9),
        (regs.r10, OperandId::R10),
        (regs.r11, OperandId::R11),
    ];
    match pages
        .into_iter()
        .find(|(page, _)| optional_page(*page).is_some())
    {
        Some((_, operand)) => Err(invalid(operand)),
        None => Ok(()),
    }
}
