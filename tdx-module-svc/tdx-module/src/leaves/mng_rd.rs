//! TDH.MNG.RD: reads a metadata field of the TD.
//!
//! Source: TDX module source, tdh_mng_rd_wr.c. RCX TDR, RDX field id; output R8 value.
//!
//! Model: every field that exists here is readable, of a production TD, too. Version 1 is accepted
//! and leaves RDX alone, as there is no list of fields to go through.

use tdx_defs::{CompletionStatus as Status, Leaf, OperandId};

use crate::checks::{OpStateLock, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

pub(crate) fn mng_rd(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    regs.r8 = 0;
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
    }
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MNG_RD, OpStateLock::Shared)?;
    regs.r8 = running
        .td
        .read_field(regs.rdx)
        .ok_or(Status::METADATA_FIELD_ID_INCORRECT)?;
    Ok(())
}
