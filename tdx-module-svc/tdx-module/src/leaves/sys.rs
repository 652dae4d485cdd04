//! Leaves of the module's own life. The model starts in SYS_READY, where TDH.SYS.TDMR.INIT has
//! work to do and those that lead there have none left.
//!
//! Source: TDX module source, tdh_sys_*.c.

use tdx_defs::{CompletionStatus as Status, OperandId};

use crate::checks::{busy, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::pamt::InitStep;

/// TDH.SYS.TDMR.INIT: initialises the PAMT of the next 4 MiB of a TDMR. RCX base of the TDMR;
/// output RDX end of what is usable.
pub(crate) fn sys_tdmr_init(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    regs.rdx = 0;
    match cx.module.pamt.initialize_step(regs.rcx) {
        InitStep::NoTdmr => Err(invalid(OperandId::RCX)),
        InitStep::Busy => Err(busy(OperandId::RCX)),
        InitStep::Done => Err(Status::TDMR_ALREADY_INITIALIZED.into()),
        InitStep::Next(end) => {
            regs.rdx = end.get();
            Ok(())
        }
    }
}

/// TDH.SYS.INIT, long done.
pub(crate) fn sys_init(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Err(Status::SYS_INIT_NOT_PENDING.into())
}

/// `TDX_SYS_LP_INIT_NOT_PENDING`
const LP_INIT_NOT_PENDING: Status = Status(0xC000_050B << 32);
/// `TDX_SYS_CONFIG_NOT_PENDING`
const CONFIG_NOT_PENDING: Status = Status(0xC000_050C << 32);
/// `TDX_SYS_KEY_CONFIG_NOT_PENDING`
const KEY_CONFIG_NOT_PENDING: Status = Status(0xC000_0507 << 32);

/// TDH.SYS.LP.INIT, done on every processor.
pub(crate) fn sys_lp_init(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Err(LP_INIT_NOT_PENDING.into())
}

/// TDH.SYS.CONFIG, long done.
pub(crate) fn sys_config(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Err(CONFIG_NOT_PENDING.into())
}

/// TDH.SYS.KEY.CONFIG, done on every package.
pub(crate) fn sys_key_config(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Err(KEY_CONFIG_NOT_PENDING.into())
}
