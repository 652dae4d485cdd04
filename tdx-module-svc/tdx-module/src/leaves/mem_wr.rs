//! TDH.MEM.WR: writes 8 bytes of a debuggable TD's private memory.
//!
//! Source: TDX module source, tdh_mem_rd_wr.c. RCX GPA, RDX TDR, R8 value; outputs R8 the bytes
//! before, entry details in RCX and RDX on a Secure EPT error.

use tdx_defs::{Gpa, Leaf, OperandId};

use super::mem_rd::DebugTarget;
use crate::checks::{OpStateLock, check_integrity};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

pub(crate) fn mem_wr(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (gpa, rdx) = (
        Gpa::new(std::mem::take(&mut regs.rcx)),
        std::mem::take(&mut regs.rdx),
    );
    let value = std::mem::take(&mut regs.r8);
    let td = cx.lock_tdr(rdx, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_WR, OpStateLock::Shared)?;
    let target = DebugTarget::find(&running, Leaf::MEM_WR, gpa)?;
    let entry = cx
        .module
        .entry_behind(target.entry.value(), target.entry.slot().level)?;

    regs.r8 = target.read(cx)?;
    entry.set_content(true);
    let written = cx.module.private.write(target.hpa, &value.to_le_bytes());
    check_integrity(target.td, written)
}
