//! TDH.PHYMEM.PAGE.WBINVD: writes back and invalidates the cache lines of a free page under a key
//! id, before the page is used again.
//!
//! Source: TDX module source, tdh_phymem_page_wbinvd.c. RCX page with key id. Caches are not
//! simulated, so only the checks remain.

use tdx_defs::{OperandId, PageType};

use crate::checks::invalid;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

pub(crate) fn phymem_page_wbinvd(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let module = cx.module;
    let page = module
        .host_address(regs.rcx)
        .ok_or(invalid(OperandId::RCX))?;
    let _page = module.lock_page(page.get(), OperandId::RCX, LockMode::Shared, PageType::NDA)?;
    Ok(())
}
