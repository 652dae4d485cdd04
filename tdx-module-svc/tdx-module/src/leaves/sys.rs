//! Leaves of the module's own life. The model starts in SYS_READY, where TDH.SYS.TDMR.INIT has
//! work to do and those that lead there have none left.
//!
//! Source: TDX module source, tdh_sys_*.c.

use tdx_defs::{CompletionStatus as Status, OperandId};

use crate::checks::{busy, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::pamt::InitStep;
use crate::system::SystemState;

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

/// TDH.SYS.LP.INIT, done on every processor.
pub(crate) fn sys_lp_init(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Err(Status::SYS_LP_INIT_NOT_PENDING.into())
}

/// TDH.SYS.CONFIG, long done.
pub(crate) fn sys_config(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Err(Status::SYS_CONFIG_NOT_PENDING.into())
}

/// TDH.SYS.KEY.CONFIG, done on every package.
pub(crate) fn sys_key_config(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Err(Status::SYS_KEY_CONFIG_NOT_PENDING.into())
}

/// TDH.SYS.LP.SHUTDOWN: the module ends; it answers nothing else from now on.
pub(crate) fn sys_lp_shutdown(cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    cx.module.system.set(SystemState::Shutdown);
    Ok(())
}
