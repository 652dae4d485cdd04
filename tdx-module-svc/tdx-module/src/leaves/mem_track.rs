//! TDH.MEM.TRACK: starts a new TLB tracking epoch.
//!
//! Source: TDX module source, tdh_mem_track.c. RCX TDR, which errors name as RCX.

use tdx_defs::{CompletionStatus as Status, Leaf, OperandId};

use crate::checks::{OpStateLock, busy};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::PreviousEpochBusy;

pub(crate) fn mem_track(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Shared)?;
    let _running = td.check_state(cx, Leaf::MEM_TRACK, OpStateLock::Shared)?;
    let epochs = td.epochs();
    let _epoch = epochs
        .lock
        .try_lock(LockMode::Exclusive)
        .map_err(|_| busy(OperandId::TD_EPOCH))?;
    epochs
        .advance()
        .map_err(|PreviousEpochBusy| Status::PREVIOUS_TLB_EPOCH_BUSY)?;
    Ok(())
}
