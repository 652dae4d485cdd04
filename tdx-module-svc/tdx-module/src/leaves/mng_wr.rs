//! TDH.MNG.WR: writes a metadata field of the TD.
//!
//! Source: TDX module source, tdh_mng_rd_wr.c. RCX TDR, RDX field id, R8 value, R9 mask of the bits
//! to write; output R8 previous value.

use tdx_defs::{Leaf, OperandId};

use super::vp_rd::field_fail;
use crate::checks::OpStateLock;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

pub(crate) fn mng_wr(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let value = std::mem::take(&mut regs.r8);
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MNG_WR, OpStateLock::Shared)?;
    let old = running.td.write_field(regs.rdx, value, regs.r9);
    regs.r8 = old.map_err(field_fail)?;
    Ok(())
}
