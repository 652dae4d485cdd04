//! TDH.VP.ENTER: enters the guest of a vCPU.
//!
//! Source: TDX module source, tdh_vp_enter.c; helpers.c `adjust_tlb_tracking_state`;
//! td_exit_stepping.c `td_entry_stepping_filter`. RCX TDVPR, bit 52 host recoverability hint, bit
//! 53 resume L1. Outputs: those of the TD exit. A failure after the association leaves the vCPU
//! associated.
//!
//! Model: the time-stamp counter never runs backwards, and CPUID is never limited.

use tdx_defs::{CompletionStatus as Status, Gpa, Gpr, Gprs, Hpa, Leaf, OperandId, PageType};

use super::mng_init::check_tsc_adjust;
use super::vp_init::pages_needed;
use crate::LpId;
use crate::checks::{LockedTd, OpStateLock, Running, busy, inconsistent, invalid};
use crate::conditions::HOST_VECTOR;
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::guest::{EPT_VIOLATION, GuestOp, GuestState, Inside, LastExit, interrupt_exit};
use crate::locks::LockMode;
use crate::platform::Release;
use crate::td::{Association, Vcpu};

/// RCX bits 51:12.
const TDVPR: u64 = 0x000F_FFFF_FFFF_F000;
/// RCX bit 52: a guest call that ended in a trap-like exit is to be told so.
const HOST_RECOVERABILITY_HINT: u64 = 1 << 52;
/// RCX bit 53: leave an L2 VM.
const RESUME_L1: u64 = 1 << 53;
/// Exit qualification of the exit that the zero-step defence emulates: a write.
const EMULATED_QUALIFICATION: u64 = 1 << 1;

/// TDH.VP.ENTER by a host that brings no guest.
///
/// Model: guest code does not run here, so a vCPU that enters is sent out at once by an interrupt
/// of the host.
pub(crate) fn vp_enter(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    enter(cx, regs, &Gprs::default())?;
    let interrupt = GuestOp::ExternalInterrupt {
        vector: HOST_VECTOR,
    };
    // If somebody else has interrupted the guest already, this call ends in the same way.
    let _ = cx.module.guest(LpId(cx.lp), &interrupt);
    let exit = interrupt_exit(HOST_VECTOR);
    regs.set_outputs(&exit);
    Err(Status(exit[Gpr::Rax]).into())
}

/// Enters a guest. Answers its registers if it left by TDG.VP.VMCALL and is now answered with
/// `host`.
pub(crate) fn enter(cx: &Cx<'_>, regs: &mut Regs, host: &Gprs) -> Result<Option<Gprs>, Fail> {
    let rcx = regs.rcx;
    let module = cx.module;
    if rcx & !(TDVPR | HOST_RECOVERABILITY_HINT | RESUME_L1) != 0 {
        return Err(invalid(OperandId::RCX));
    }
    let tdvpr = rcx & TDVPR;
    let root = module.lock_page(tdvpr, OperandId::RCX, LockMode::Shared, PageType::TDVPR)?;
    let owner = root.entry().ok_or_else(inconsistent)?.owner();
    let td = cx.lock_owner(owner, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::VP_ENTER, OpStateLock::Shared)?;
    let vcpu = module.vcpus.get(Hpa::new(tdvpr)).ok_or_else(inconsistent)?;
    if vcpu.pages() < pages_needed(module.config.tdvps_pages, running.config.num_l2_vms) {
        return Err(Status::TDCX_NUM_INCORRECT.into());
    }
    // From here to the entry nobody else uses this processor.
    let mut processor = module
        .processors
        .lock(LpId(cx.lp))
        .ok_or_else(|| busy(OperandId::TDVPR))?;
    if processor.is_inside() {
        return Err(busy(OperandId::TDVPR));
    }
    let is_new = associate(&running, &vcpu, cx.lp)?;
    let mut guest = vcpu.guest();
    let trapped = guest.last_exit == LastExit::AsyncTrap;
    if rcx & RESUME_L1 != 0 || (rcx & HOST_RECOVERABILITY_HINT != 0 && !trapped) {
        return Err(invalid(OperandId::RCX));
    }
    check_tsc_adjust(module)?;
    let epoch = {
        let _epoch = td
            .epochs()
            .lock
            .try_lock(LockMode::Shared)
            .map_err(|_| busy(OperandId::TD_EPOCH))?;
        td.epochs().enter()
    };
    if epoch != guest.vcpu_epoch {
        // A vCPU that is new here has no translations: they went with its last association.
        if !is_new {
            processor.flush(module, td.tdr());
        }
        guest.vcpu_epoch = epoch;
    }
    if let Err(fail) = check_zero_step(&running, &guest, regs) {
        td.epochs().leave(epoch);
        return Err(fail);
    }

    let vmcall = (guest.last_exit == LastExit::Vmcall).then(|| guest.after_vmcall(host));
    drop(guest);
    let inside = Inside {
        td: module.tds.get(owner).ok_or_else(inconsistent)?,
        config: running.config.clone(),
        vcpu,
        tdvpr: Hpa::new(tdvpr),
        platform_maxpa: running.platform_maxpa,
    };
    processor.enter(module, inside);
    drop(running);
    keep_locks(td, root);
    Ok(vmcall)
}

/// The vCPU is ready and belongs to this processor, or to none. Answers whether it is new here.
fn associate(running: &Running<'_>, vcpu: &Vcpu, lp: u32) -> Result<bool, Fail> {
    match vcpu.associate(lp) {
        Association::NotReady(state) => {
            // Recorded answers of release 1.5.05 have no state in the low half; the source of
            // later releases adds it.
            let details = if running.is_1_5_05() { 0 } else { state };
            Err(Status::VCPU_STATE_INCORRECT.with_details(details).into())
        }
        Association::Elsewhere => Err(Status::VCPU_ASSOCIATED.into()),
        Association::Here => Ok(false),
        Association::New => {
            running.td.add_associated();
            Ok(true)
        }
    }
}

/// While faults at one place are suspicious, none of their addresses may still fault.
fn check_zero_step(running: &Running<'_>, guest: &GuestState, regs: &mut Regs) -> Outcome {
    if guest.suspects().is_empty() {
        return Ok(());
    }
    // Release 1.5.05 takes the tree alone, which a page in flight is enough to prevent.
    let mode = match running.release() {
        Release::R1_5_05 => LockMode::Exclusive,
        Release::R1_5_34 => LockMode::Shared,
    };
    let _tree = running.lock_tree(mode)?;
    for gpa in guest.suspects() {
        if still_faults(running, *gpa)? {
            regs.set_outputs(
                &Gprs::default()
                    .with(Gpr::Rcx, EMULATED_QUALIFICATION)
                    .with(Gpr::R8, gpa.frame().base().get()),
            );
            return Err(Status::SUCCESS.with_details(EPT_VIOLATION).into());
        }
    }
    Ok(())
}

/// Whether an access of any kind would fault.
fn still_faults(running: &Running<'_>, gpa: Gpa) -> Result<bool, Fail> {
    let walk = running.walk_towards(gpa, 0)?;
    Ok(!(walk.value.has_rights() && walk.value.is_leaf()))
}

/// TDR and TDVPR stay locked until the TD exit.
fn keep_locks(td: LockedTd<'_>, root: crate::pamt::PageLock<'_>) {
    td.keep_lock();
    root.keep();
}
