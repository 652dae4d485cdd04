//! TDH.VP.RD: reads a metadata field of a vCPU.
//!
//! Source: TDX module ABI, TDH.VP.RD. RCX TDVPR, RDX field id; output R8 value.
//!
//! Model: the association of the vCPU is not looked at; version 1 is accepted and leaves RDX alone.

use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, OperandId, PageType};

use crate::checks::{OpStateLock, inconsistent, invalid};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::FieldError;

pub(crate) fn vp_rd(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    regs.r8 = 0;
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
    }
    let module = cx.module;
    let mode = LockMode::Shared;
    let root = module.lock_page(regs.rcx, OperandId::RCX, mode, PageType::TDVPR)?;
    let owner = root.entry().ok_or_else(inconsistent)?.owner();
    let td = cx.lock_owner(owner, LockMode::Shared)?;
    let _running = td.check_state(cx, Leaf::VP_RD, OpStateLock::Shared)?;
    let vcpu = module
        .vcpus
        .get(Hpa::new(regs.rcx))
        .ok_or_else(inconsistent)?;
    regs.r8 = vcpu.read_field(regs.rdx).map_err(field_fail)?;
    Ok(())
}

/// The status of a field that cannot be accessed.
pub(super) fn field_fail(error: FieldError) -> Fail {
    match error {
        FieldError::Unknown => Status::METADATA_FIELD_ID_INCORRECT.into(),
        FieldError::NotReadable => Status::METADATA_FIELD_NOT_READABLE.into(),
        FieldError::NotWritable => Status::METADATA_FIELD_NOT_WRITABLE.into(),
        FieldError::NotValid => Status::METADATA_FIELD_VALUE_NOT_VALID.into(),
    }
}
