//! TDH.VP.FLUSH: ends the association of a vCPU with the processor that executes.
//!
//! Source: TDX module source, tdh_vp_flush.c. RCX TDVPR. Neither FATAL nor OP_STATE is looked at.

use tdx_defs::{CompletionStatus as Status, Hpa, OperandId, PageType};

use super::vp_init::pages_needed;
use crate::LpId;
use crate::checks::inconsistent;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::Lifecycle;

pub(crate) fn vp_flush(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let module = cx.module;
    let mode = LockMode::Exclusive;
    let root = module.lock_page(regs.rcx, OperandId::RCX, mode, PageType::TDVPR)?;
    let owner = root.entry().ok_or_else(inconsistent)?.owner();
    let td = cx.lock_owner(owner, LockMode::Shared)?;
    if td.lifecycle() != Lifecycle::KeysConfigured {
        return Err(Status::TD_KEYS_NOT_CONFIGURED.into());
    }
    let vcpu = module
        .vcpus
        .get(Hpa::new(regs.rcx))
        .ok_or_else(inconsistent)?;
    let num_l2_vms = td.config().map_or(0, |config| config.num_l2_vms);
    if vcpu.pages() < pages_needed(module.config.tdvps_pages, num_l2_vms) {
        return Err(Status::TDCX_NUM_INCORRECT.into());
    }
    if !vcpu.disassociate(cx.lp) {
        return Err(Status::VCPU_NOT_ASSOCIATED.into());
    }
    if let Some(mut processor) = module.processors.lock(LpId(cx.lp)) {
        processor.flush(module, td.tdr());
    }
    td.remove_associated();
    Ok(())
}
