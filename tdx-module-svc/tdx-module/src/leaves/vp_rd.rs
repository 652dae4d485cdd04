//! TDH.VP.RD: reads a metadata field of a vCPU.
//!
//! Source: TDX module ABI, TDH.VP.RD. RCX TDVPR, RDX field id; output R8 value. Version 1: output
//! RDX next field id, all-ones after the last; RDX all-ones asks for the first.
//!
//! Model: the association of the vCPU is not looked at.

use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, OperandId, PageType};

use super::sys_rd::{FIRST_FIELD, NO_FIELD};
use crate::checks::{OpStateLock, inconsistent, invalid};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::{FieldError, Vcpu};

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
    let id = regs.rdx;
    let wanted = (id != NO_FIELD).then_some(id);
    if regs.version == 1 {
        regs.rdx = Vcpu::next_field(wanted).unwrap_or(NO_FIELD);
        if wanted.is_none() {
            return Err(FIRST_FIELD.into());
        }
    }
    regs.r8 = vcpu.read_field(id).map_err(field_fail)?;
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
