//! TDH.VP.WR: writes a metadata field of a vCPU.
//!
//! Source: TDX module ABI, TDH.VP.WR. RCX TDVPR, RDX field id, R8 value, R9 mask of the bits to
//! write; output R8 previous value.
//!
//! Model: the association of the vCPU is not looked at.

use tdx_defs::{Hpa, Leaf, OperandId, PageType};

use super::vp_rd::field_fail;
use crate::checks::{OpStateLock, inconsistent};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

pub(crate) fn vp_wr(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let value = std::mem::take(&mut regs.r8);
    let module = cx.module;
    // Exclusive, so that the value before and the value after belong together.
    let mode = LockMode::Exclusive;
    let root = module.lock_page(regs.rcx, OperandId::RCX, mode, PageType::TDVPR)?;
    let owner = root.entry().ok_or_else(inconsistent)?.owner();
    let td = cx.lock_owner(owner, LockMode::Shared)?;
    let _running = td.check_state(cx, Leaf::VP_WR, OpStateLock::Shared)?;
    let vcpu = module
        .vcpus
        .get(Hpa::new(regs.rcx))
        .ok_or_else(inconsistent)?;
    regs.r8 = vcpu
        .write_field(regs.rdx, value, regs.r9)
        .map_err(field_fail)?;
    Ok(())
}
