//! TDH.PHYMEM.PAGE.WBINVD: writes back and invalidates the cache lines of a free page under a key
//! id, before the page is used again.
//!
//! Source: TDX module source, tdh_phymem_page_wbinvd.c. RCX page with key id. Caches are not
//! simulated, so only the checks remain.

use tdx_defs::{OperandId, PageType};

use crate::checks::{SamePages, invalid};
use crate::dispatch::{Cx, Outcome, Run};

pub(crate) fn phymem_page_wbinvd(cx: &Cx<'_>, run: &mut Run<'_>) -> Outcome {
    let module = cx.module;
    let mut pages = SamePages::new(module);
    run.each_as_it_is(|regs| {
        let page = module
            .host_address(regs.rcx)
            .ok_or(invalid(OperandId::RCX))?;
        pages.check(page, OperandId::RCX, PageType::NDA)
    })
}
