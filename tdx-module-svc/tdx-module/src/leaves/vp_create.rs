//! TDH.VP.CREATE: makes a page the root page (TDVPR) of a new vCPU.
//!
//! Source: TDX module source, tdh_vp_create.c. RCX page, RDX TDR.

use tdx_defs::{Leaf, OperandId, PageType};

use crate::checks::OpStateLock;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::td::Vcpu;

pub(crate) fn vp_create(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let td = cx.lock_tdr(regs.rdx, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::VP_CREATE, OpStateLock::Shared)?;
    let page = cx.module.lock_free_page(regs.rcx, OperandId::RCX)?;

    cx.module.vcpus.insert(page.hpa, Vcpu::new());
    cx.give_page(&page, PageType::TDVPR, PageSize::Small, running.td);
    Ok(())
}
