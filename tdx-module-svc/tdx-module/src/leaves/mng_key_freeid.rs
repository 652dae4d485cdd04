//! TDH.MNG.KEY.FREEID: gives the TD's key id back.
//!
//! Source: TDX module source, tdh_mng_key_freeid.c. RCX TDR.

use tdx_defs::{CompletionStatus as Status, OperandId};

use crate::checks::busy;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::{HkidState, Lifecycle};

pub(crate) fn mng_key_freeid(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Exclusive)?;
    if td.lifecycle() != Lifecycle::Blocked {
        return Err(Status::LIFECYCLE_STATE_INCORRECT.into());
    }
    let kot = &cx.module.kot;
    let _kot = kot
        .lock
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::KOT))?;
    if kot.write_back_left(td.hkid()) != 0 {
        return Err(Status::WBCACHE_NOT_COMPLETE.into());
    }

    kot.set(td.hkid(), HkidState::Free);
    td.set_lifecycle(Lifecycle::Teardown);
    Ok(())
}
