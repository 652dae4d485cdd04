//! TDH.MNG.RD: reads a metadata field of the TD.
//!
//! Source: TDX module source, tdh_mng_rd_wr.c. RCX TDR, RDX field id; output R8 value. Version 1:
//! output RDX next field id, all-ones after the last; RDX all-ones asks for the first.

use tdx_defs::{Leaf, OperandId};

use super::sys_rd::{FIRST_FIELD, NO_FIELD};
use super::vp_rd::field_fail;
use crate::checks::{OpStateLock, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::next_field;

pub(crate) fn mng_rd(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    regs.r8 = 0;
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
    }
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MNG_RD, OpStateLock::Shared)?;
    let id = regs.rdx;
    let wanted = (id != NO_FIELD).then_some(id);
    if regs.version == 1 {
        regs.rdx = next_field(wanted).unwrap_or(NO_FIELD);
        if wanted.is_none() {
            return Err(FIRST_FIELD.into());
        }
    }
    let value = running.td.read_field(running.config, id);
    regs.r8 = value.map_err(field_fail)?;
    Ok(())
}
