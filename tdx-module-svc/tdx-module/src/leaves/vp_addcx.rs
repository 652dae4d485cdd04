//! TDH.VP.ADDCX: adds a page to a vCPU's control structure.
//!
//! Source: TDX module source, tdh_vp_addcx.c. RCX page, RDX TDVPR.

use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, OperandId, PageType};

use crate::checks::{OpStateLock, inconsistent};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::PageSize;

/// Pages of a vCPU with three L2 VMs.
const MAX_TDVPS_PAGES: u8 = 15;

pub(crate) fn vp_addcx(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let module = cx.module;
    let (tdvpr, mode) = (regs.rdx, LockMode::Exclusive);
    let root = module.lock_page(tdvpr, OperandId::RDX, mode, PageType::TDVPR)?;
    let owner = root.entry().ok_or_else(inconsistent)?.owner();
    let td = cx.lock_owner(owner, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::VP_ADDCX, OpStateLock::Shared)?;
    let vcpu = module.vcpus.get(Hpa::new(tdvpr)).ok_or_else(inconsistent)?;
    if vcpu.is_initialized() {
        return Err(Status::VCPU_STATE_INCORRECT.into());
    }
    if vcpu.pages() >= MAX_TDVPS_PAGES {
        return Err(Status::TDCX_NUM_INCORRECT.into());
    }
    let page = module.lock_free_page(regs.rcx, OperandId::RCX)?;

    vcpu.add_page();
    cx.give_page(&page, PageType::TDCX, PageSize::Small, running.td);
    Ok(())
}
