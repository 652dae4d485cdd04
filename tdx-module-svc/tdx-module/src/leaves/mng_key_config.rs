//! TDH.MNG.KEY.CONFIG: programs the TD's key on the package that executes.
//!
//! Source: TDX module source, tdh_mng_key_config.c. RCX TDR.

use tdx_defs::{CompletionStatus as Status, OperandId};

use crate::checks::busy;
use crate::conditions::KeyProgramResult;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;
use crate::td::Lifecycle;

pub(crate) fn mng_key_config(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let td = cx.lock_tdr(regs.rcx, OperandId::RCX, LockMode::Exclusive)?;
    if td.is_fatal() {
        return Err(Status::TD_FATAL.into());
    }
    if td.lifecycle() != Lifecycle::HkidAssigned {
        return Err(Status::LIFECYCLE_STATE_INCORRECT.into());
    }
    let package = cx.package();
    if td.configured_packages() >> package & 1 != 0 {
        return Err(Status::KEY_CONFIGURED.into());
    }
    match cx.module.conditions.key_program() {
        KeyProgramResult::Ok => {}
        KeyProgramResult::DeviceBusy => return Err(busy(OperandId::KET)),
        KeyProgramResult::EntropyError => return Err(Status::KEY_GENERATION_FAILED.into()),
    }

    let done = td.configure_package(package);
    if done.count_ones() == cx.module.config.packages {
        td.set_lifecycle(Lifecycle::KeysConfigured);
    }
    Ok(())
}
