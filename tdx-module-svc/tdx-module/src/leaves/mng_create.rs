//! TDH.MNG.CREATE: makes a page the root page (TDR) of a new TD and gives it a key id.
//!
//! Source: TDX module source, tdh_mng_create.c. RCX page, RDX bits 15:0 key id.

use tdx_defs::{CompletionStatus as Status, Hpa, OperandId, PageType};

use crate::checks::{busy, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::{HkidState, Td};

pub(crate) fn mng_create(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let module = cx.module;
    let hkid = u16::try_from(regs.rdx).map_err(|_| invalid(OperandId::RDX))?;
    if !module.config.is_private_hkid(hkid.into()) {
        return Err(invalid(OperandId::RDX));
    }
    let page = module.lock_free_page(regs.rcx, OperandId::RCX)?;
    let _kot = module
        .kot
        .lock
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::KOT))?;
    if !module.kot.is(hkid, HkidState::Free) {
        return Err(Status::HKID_NOT_FREE.into());
    }
    // TD_UUID is drawn here. Nothing shows it, so it is not kept.
    if !module.conditions.has_entropy() {
        return Err(Status::RND_NO_ENTROPY.into());
    }

    module.kot.set(hkid, HkidState::Assigned);
    module.tds.insert(page.hpa, Td::new(page.hpa, hkid));
    page.entry.assign(PageType::TDR, Hpa::new(0));
    cx.count_used(PageType::TDR, 1);
    Ok(())
}
