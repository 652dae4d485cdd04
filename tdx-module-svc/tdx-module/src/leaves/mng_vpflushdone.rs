//! TDH.MNG.VPFLUSHDONE: no vCPU of the TD is left on any processor; none will enter again.
//!
//! Source: TDX module source, tdh_mng_vpflushdone.c. RCX TDR. FATAL is not checked, so that a
//! fatal TD can be torn down.

use tdx_defs::{CompletionStatus as Status, OperandId};

use crate::checks::busy;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::Lifecycle;

pub(crate) fn mng_vpflushdone(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Exclusive)?;
    let kot = &cx.module.kot;
    let _kot = kot
        .lock
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::KOT))?;
    if !matches!(
        td.lifecycle(),
        Lifecycle::KeysConfigured | Lifecycle::HkidAssigned
    ) {
        return Err(Status::LIFECYCLE_STATE_INCORRECT.into());
    }
    if td.op_state().is_initialized() && td.num_assoc_vcpus() != 0 {
        return Err(Status::FLUSHVP_NOT_DONE.into());
    }

    // One bit for each package; validation bounds their number by the width of the bitmap.
    kot.flush(
        td.hkid(),
        u32::MAX >> (u32::BITS - cx.module.config.packages),
    );
    td.set_lifecycle(Lifecycle::Blocked);
    Ok(())
}
