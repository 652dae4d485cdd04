//! TDH.MEM.PAGE.AUG: gives a page to a TD; the guest has to accept it.
//!
//! Source: TDX module source, tdh_mem_page_aug.c. RCX level 0 or 1 and GPA, RDX TDR, R8 page;
//! outputs: entry details in RCX and RDX on a Secure EPT error. The page is neither touched nor
//! measured.

use tdx_defs::{Hpa, Leaf, OperandId, PageType};

use crate::checks::{FreePages, OpStateLock, SeptOperand, Tree};
use crate::dispatch::{Cx, Fail, Outcome, Regs, Run};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::sept::SeptState;
use crate::td::Td;

pub(crate) fn mem_page_aug(cx: &Cx<'_>, run: &mut Run<'_>) -> Outcome {
    let td = cx.lock_tdr(run.take_tdr(), OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_PAGE_AUG, OpStateLock::Shared)?;
    let tree = running.tree(LockMode::Shared);
    let mut free = FreePages::new(cx.module);
    let mut given = 0;
    let outcome = run.each(|regs| {
        given += aug(cx, running.td, &tree, &mut free, regs)?.pages();
        Ok(())
    });
    td.add_children(given);
    cx.count_used(PageType::REG, given);
    outcome
}

/// One page; answers its size.
fn aug<'m>(
    cx: &Cx<'m>,
    td: &Td,
    tree: &Tree<'_, '_>,
    free: &mut FreePages<'m>,
    regs: &mut Regs,
) -> Result<PageSize, Fail> {
    let operand = SeptOperand::decode(std::mem::take(&mut regs.rcx), 0, 1)?;
    let held = tree.hold_entry(operand)?;
    held.check_allows(Leaf::MEM_PAGE_AUG)?;
    // Metadata before the entry: who sees the entry sees its owner.
    let (page, size) = if operand.level == 0 {
        let page = free.lock(regs.r8, OperandId::R8)?;
        page.assign_and_release(PageType::REG, td.tdr());
        (Hpa::new(regs.r8), PageSize::Small)
    } else {
        // A range that this run still holds must not be in its own way.
        free.let_go();
        let range = cx.module.lock_free_range(regs.r8, OperandId::R8)?;
        range.entry.assign(PageType::REG, td.tdr());
        (range.hpa, PageSize::Large)
    };
    held.commit(cx.module.format.entry(SeptState::PENDING, page));
    Ok(size)
}
