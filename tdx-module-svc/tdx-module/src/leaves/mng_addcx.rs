//! TDH.MNG.ADDCX: adds a page to the TD's control structure.
//!
//! Source: TDX module source, tdh_mng_add_cx.c. RCX page, RDX TDR.

use tdx_defs::{CompletionStatus as Status, OperandId, PageType};

use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::td::{Lifecycle, OpState};

/// Control pages that a TDR can name.
const MAX_TDCX: u8 = 9;

pub(crate) fn mng_addcx(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let td = cx.lock_tdr(regs.rdx, OperandId::RDX, LockMode::Exclusive)?;
    if td.is_fatal() {
        return Err(Status::TD_FATAL.into());
    }
    if td.lifecycle() != Lifecycle::KeysConfigured {
        return Err(Status::TD_KEYS_NOT_CONFIGURED.into());
    }
    let pages = td.num_tdcx();
    if pages >= MAX_TDCX {
        return Err(Status::TDCX_NUM_INCORRECT.into());
    }
    let page = cx.module.lock_free_page(regs.rcx, OperandId::RCX)?;
    let base = cx.module.config.tdcs_pages;
    // Before there are enough pages for a TDCS, there is no OP_STATE. No value is added here.
    if pages >= base && td.op_state() != OpState::Uninitialized {
        return Err(Status::OP_STATE_INCORRECT.into());
    }
    // The page that completes the TDCS draws the migration key, which nothing uses here.
    if pages + 1 == base && !cx.module.conditions.has_entropy() {
        return Err(Status::RND_NO_ENTROPY.into());
    }

    td.add_tdcx(page.hpa);
    cx.give_page(&page, PageType::TDCX, PageSize::Small, &td);
    Ok(())
}
