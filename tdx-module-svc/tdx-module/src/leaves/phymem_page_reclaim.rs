//! TDH.PHYMEM.PAGE.RECLAIM: takes a page back from a TD that was torn down.
//!
//! Source: TDX module source, tdh_phymem_page_reclaim.c. RCX page; outputs as for PAGE.RDMD, shown
//! as soon as the page is known to be in use. Pages come in any order, the TDR last.

use tdx_defs::{CompletionStatus as Status, Hpa, OperandId, PageType};

use super::phymem_page_rdmd::{clear_outputs, show};
use crate::checks::{inconsistent, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::{PamtEntry, Want};
use crate::td::Lifecycle;

pub(crate) fn phymem_page_reclaim(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let hpa = clear_outputs(regs);
    let page = cx
        .module
        .lock_any_page(hpa, OperandId::RCX, LockMode::Exclusive, Want::Look)?;
    let page_type = page.page_type();
    let entry = page
        .entry()
        .filter(|_| ![PageType::NDA, PageType::RSVD].contains(&page_type));
    let Some(entry) = entry else {
        return Err(Status::PAGE_METADATA_INCORRECT.with(OperandId::RCX).into());
    };
    show(&page, regs);
    if !hpa.is_multiple_of(page.size().bytes()) {
        return Err(invalid(OperandId::RCX));
    }
    let hpa = Hpa::new(hpa);
    if page_type == PageType::TDR {
        return reclaim_tdr(cx, hpa, entry);
    }
    let td = cx.lock_owner(entry.owner(), LockMode::Shared)?;
    if td.lifecycle() != Lifecycle::Teardown {
        return Err(Status::LIFECYCLE_STATE_INCORRECT.into());
    }

    if page_type == PageType::TDVPR {
        cx.module.vcpus.remove(hpa);
    }
    cx.module.forget_contents(hpa, page.size(), entry);
    entry.free();
    td.remove_children(page.size().pages());
    cx.count_freed(page_type, page.size().pages());
    Ok(())
}

fn reclaim_tdr(cx: &Cx<'_>, hpa: Hpa, entry: &PamtEntry) -> Outcome {
    let td = cx.module.tds.get(hpa).ok_or_else(inconsistent)?;
    if td.lifecycle() != Lifecycle::Teardown {
        return Err(Status::LIFECYCLE_STATE_INCORRECT.into());
    }
    if td.children() != 0 {
        return Err(Status::TD_ASSOCIATED_PAGES_EXIST.into());
    }
    td.retire();
    cx.module.tds.remove(hpa);
    entry.free();
    cx.count_freed(PageType::TDR, 1);
    Ok(())
}
