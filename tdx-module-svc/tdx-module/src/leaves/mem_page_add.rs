//! TDH.MEM.PAGE.ADD: copies a page of the initial image into the TD and maps it.
//!
//! Source: TDX module source, tdh_mem_page_add.c. RCX level 0 and GPA, RDX TDR, R8 page, R9 source
//! in host memory; outputs: entry details in RCX and RDX on a Secure EPT error. The GPA is
//! measured, the content only by TDH.MR.EXTEND.

use tdx_defs::{CompletionStatus as Status, Leaf, OperandId, PAGE_SIZE, PageType};

use crate::checks::{OpStateLock, SeptOperand, with_details};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::sept::SeptState;

pub(crate) fn mem_page_add(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (rcx, rdx) = (std::mem::take(&mut regs.rcx), std::mem::take(&mut regs.rdx));
    let module = cx.module;
    let td = cx.lock_tdr(rdx, OperandId::RDX, LockMode::Exclusive)?;
    let running = td.check_state(cx, Leaf::MEM_PAGE_ADD, OpStateLock::None)?;
    let operand = SeptOperand::decode(rcx, 0, 0)?;
    running.check_gpa(operand.gpa)?;
    // The exclusive TDR stands for SEPT_TREE and for the entry's lock.
    let walk = running.walk_to(operand)?;
    if !walk.value.state().allows(Leaf::MEM_PAGE_ADD) {
        let status = Status::EPT_ENTRY_STATE_INCORRECT.with(OperandId::RCX);
        return Err(with_details(status, walk.value, operand.level));
    }
    let source = module.check_host_memory(regs.r9, PAGE_SIZE, OperandId::R9)?;
    let page = module.lock_free_page(regs.r8, OperandId::R8)?;

    let content = module.host_page(source);
    walk.slot
        .write_alone(module.format.entry(SeptState::MAPPED, page.hpa));
    cx.give_page(&page, PageType::REG, PageSize::Small, &td);
    if content.is_some_and(|content| module.private.fill(page.hpa.frame(), content)) {
        page.entry.set_content(true);
    }
    td.measurement().page_added(operand.gpa);
    Ok(())
}
