//! TDH.PHYMEM.PAGE.RDMD: reads the metadata of a page.
//!
//! Source: TDX module source, tdh_phymem_page_rdmd.c. RCX page; outputs RCX type, RDX owner, R8
//! size, R9 BEPOCH of private and Secure EPT pages, R10 and R11 zero. A freed page may still show
//! its old owner.

use tdx_defs::{OperandId, PageType};

use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::{PageLock, Want};

pub(crate) fn phymem_page_rdmd(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let hpa = clear_outputs(regs);
    let page = cx
        .module
        .lock_any_page(hpa, OperandId::RCX, LockMode::Shared, Want::Look)?;
    show(&page, regs);
    let has_epoch = [PageType::REG, PageType::EPT].contains(&page.page_type());
    if let Some(entry) = page.entry().filter(|_| has_epoch) {
        regs.r9 = entry.bepoch();
    }
    Ok(())
}

/// Zeroes the outputs and answers RCX as it was.
pub(super) fn clear_outputs(regs: &mut Regs) -> u64 {
    let hpa = regs.rcx;
    *regs = Regs {
        rcx: 0,
        rdx: 0,
        r8: 0,
        r9: 0,
        r10: 0,
        r11: 0,
        ..*regs
    };
    hpa
}

/// Type, owner and size of a page.
pub(super) fn show(page: &PageLock<'_>, regs: &mut Regs) {
    regs.rcx = page.page_type().0.into();
    regs.rdx = page.entry().map_or(0, |entry| entry.owner().get());
    regs.r8 = page.size().number();
}
