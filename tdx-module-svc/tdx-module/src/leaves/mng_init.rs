//! TDH.MNG.INIT: configures a TD from TD_PARAMS.
//!
//! Source: TDX module source, tdh_mng_init.c. RCX TDR, RDX TD_PARAMS. Output: RCX names the CPUID
//! leaf of a CPUID error and is 0 otherwise.
//!
//! Model: CPUID values and event filters are accepted as given. The real module judges them by the
//! processor's own CPUID, which is not simulated.

use std::ops::{Range, RangeInclusive};

use tdx_defs::{
    CompletionStatus as Status, Leaf, OperandId, TD_PARAMS_SIZE, TdAttributes, TdParams,
};

use crate::Module;
use crate::checks::{inconsistent, invalid};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::LockMode;
use crate::platform::Release;
use crate::td::{Td, TdConfig};

const MAX_L2_VMS: u8 = 3;
/// Multiples of 25 MHz.
const TSC_FREQUENCIES: RangeInclusive<u16> = 4..=400;
/// IA32_TSC_ADJUST.
const TSC_ADJUST_MSR: u32 = 0x3B;
/// CONFIG_FLAGS.GPAW.
const GPAW: u64 = 1;
/// CONFIG_FLAGS.NO_RBP_MOD.
const NO_RBP_MOD: u64 = 1 << 2;
/// EPTP bits 5:3 are the walk length less one, bits 2:0 the memory type.
const EPTP_4_LEVEL: u64 = 0x1E;
const EPTP_5_LEVEL: u64 = 0x26;
/// RCX bit 0 announces event filters.
const EVENT_FILTERS: u64 = 1;

pub(crate) fn mng_init(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let tdr = std::mem::take(&mut regs.rcx);
    let module = cx.module;
    let td = cx.lock_tdr(tdr & !EVENT_FILTERS, OperandId::RCX, LockMode::Exclusive)?;
    td.check_usable(module.config.tdcs_pages)?;
    td.check_op_state(Leaf::MNG_INIT)?;
    let params = module.check_host_memory(regs.rdx, TD_PARAMS_SIZE as u64, OperandId::RDX)?;
    let mut bytes = [0; TD_PARAMS_SIZE];
    module.read_host_page(params, &mut bytes);
    let params = TdParams::from_bytes(&bytes).map_err(|_| inconsistent())?;

    td.initialize(check_params(module, &td, &params)?);
    Ok(())
}

/// Checks the fields in the module's order.
fn check_params(module: &Module, td: &Td, params: &TdParams) -> Result<TdConfig, Fail> {
    let config = &module.config;
    let attributes = TdAttributes::from_bits_retain(params.attributes());
    if !config.attributes.allows(attributes.bits()) || !is_consistent(attributes, params) {
        return Err(invalid(OperandId::ATTRIBUTES));
    }
    if !config.xfam.allows(params.xfam()) {
        return Err(invalid(OperandId::XFAM));
    }
    if !(1..=config.max_vcpus).contains(&params.max_vcpus()) {
        return Err(invalid(OperandId::MAX_VCPUS));
    }
    if params.num_l2_vms() > MAX_L2_VMS {
        return Err(invalid(OperandId::NUM_L2_VMS));
    }
    if td.num_tdcx() < config.tdcs_pages + params.num_l2_vms() {
        return Err(Status::TDCS_NOT_ALLOCATED.into());
    }
    check_reserved(params, 20..24)?;
    let flags = params.config_flags();
    if flags & !allowed_config_flags(config.release) != 0 {
        return Err(invalid(OperandId::EXEC_CONTROLS));
    }
    let wide_gpa = flags & GPAW != 0;
    let eptp = params.eptp_controls();
    let root_level = match eptp {
        EPTP_4_LEVEL if !wide_gpa => 3,
        EPTP_5_LEVEL if config.five_level => 4,
        _ => return Err(invalid(OperandId::EPTP_CONTROLS)),
    };
    if !TSC_FREQUENCIES.contains(&params.tsc_frequency()) {
        return Err(invalid(OperandId::TSC_FREQUENCY));
    }
    check_tsc_adjust(module)?;
    if params.msr_config_ctls() > 1 {
        return Err(invalid(OperandId::RDX));
    }
    check_reserved(params, 42..80)?;
    check_reserved(params, 232..256)?;
    Ok(TdConfig {
        attributes,
        xfam: params.xfam(),
        max_vcpus: params.max_vcpus(),
        num_l2_vms: params.num_l2_vms(),
        wide_gpa,
        keeps_rbp: flags & NO_RBP_MOD != 0,
        config_flags: flags,
        tsc_frequency: params.tsc_frequency(),
        eptp: eptp | td.root_page().get(),
        root_level,
    })
}

/// A migratable TD can neither be debugged nor profiled, and has no L2 VMs.
fn is_consistent(attributes: TdAttributes, params: &TdParams) -> bool {
    let migratable = attributes.contains(TdAttributes::MIGRATABLE);
    let excluded = attributes.intersects(TdAttributes::DEBUG | TdAttributes::PERFMON);
    !migratable || !(excluded || params.num_l2_vms() > 0)
}

/// Bits of CONFIG_FLAGS that a release knows.
fn allowed_config_flags(release: Release) -> u64 {
    match release {
        Release::R1_5_05 => 0b111,
        Release::R1_5_34 => 0b1001_1111,
    }
}

fn check_reserved(params: &TdParams, area: Range<usize>) -> Outcome {
    match params.as_bytes().get(area) {
        Some(bytes) if bytes.iter().all(|byte| *byte == 0) => Ok(()),
        _ => Err(invalid(OperandId::RDX)),
    }
}

/// Whether the time-stamp adjustment is still that of the module's initialisation.
pub(super) fn check_tsc_adjust(module: &Module) -> Outcome {
    if module.conditions.tsc_adjust() != 0 {
        return Err(Status::INCONSISTENT_MSR.with_details(TSC_ADJUST_MSR).into());
    }
    Ok(())
}
