//! TDH.VP.INIT: initialises a vCPU and associates it with the processor that executes.
//!
//! Source: TDX module source, tdh_vp_init.c. RCX TDVPR, RDX initial RCX and R8 of the guest,
//! version 1: R8 virtual x2APIC id.
//!
//! The vCPU index is taken before the last checks: a call that fails afterwards uses it up.

use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, OperandId, PageType};

use super::mng_init::check_tsc_adjust;
use crate::checks::{OpStateLock, inconsistent, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

/// Pages that each L2 VM adds to a vCPU.
const PAGES_PER_L2_VM: u8 = 3;

pub(crate) fn vp_init(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let module = cx.module;
    if regs.version > 1 {
        return Err(invalid(OperandId::RAX));
    }
    let names_apic_id = regs.version == 1;
    let mode = LockMode::Exclusive;
    let root = module.lock_page(regs.rcx, OperandId::RCX, mode, PageType::TDVPR)?;
    let owner = root.entry().ok_or_else(inconsistent)?.owner();
    // Version 1 compares the id with those of all vCPUs and keeps everybody out meanwhile.
    let td_mode = if names_apic_id {
        LockMode::Exclusive
    } else {
        LockMode::Shared
    };
    let td = cx.lock_owner(owner, td_mode)?;
    let running = td.check_state(cx, Leaf::VP_INIT, OpStateLock::Shared)?;
    let vcpu = module
        .vcpus
        .get(Hpa::new(regs.rcx))
        .ok_or_else(inconsistent)?;
    if vcpu.pages() < pages_needed(module.config.tdvps_pages, running.config.num_l2_vms) {
        return Err(Status::TDCX_NUM_INCORRECT.into());
    }
    if vcpu.is_initialized() {
        return Err(Status::VCPU_STATE_INCORRECT.into());
    }
    let index = td
        .take_vcpu_index(running.config.max_vcpus)
        .ok_or(Status::MAX_VCPUS_EXCEEDED)?;
    let apic_id = if names_apic_id {
        u32::try_from(regs.r8).map_err(|_| invalid(OperandId::R8))?
    } else {
        index
    };
    if !td.claim_x2apic_id(apic_id, names_apic_id) {
        return Err(Status::X2APIC_ID_NOT_UNIQUE.with_details(apic_id).into());
    }
    check_tsc_adjust(module)?;

    vcpu.initialize(cx.lp, index, apic_id, regs.rdx);
    td.add_associated();
    Ok(())
}

/// Pages of a complete vCPU, its root included.
pub(super) fn pages_needed(base: u8, num_l2_vms: u8) -> u8 {
    base + PAGES_PER_L2_VM * num_l2_vms
}
