//! TDH.MR.FINALIZE: completes the measurement; the TD can run.
//!
//! Source: TDX module source, tdh_mr_finalize.c. RCX TDR.

use tdx_defs::{CompletionStatus as Status, Leaf, OperandId};

use crate::checks::OpStateLock;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

pub(crate) fn mr_finalize(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Exclusive)?;
    let _running = td.check_state(cx, Leaf::MR_FINALIZE, OpStateLock::None)?;
    if td.num_vcpus() == 0 {
        return Err(Status::NO_VCPUS.into());
    }
    td.finalize();
    Ok(())
}
