//! TDH.SYS.INFO: describes the module and convertible memory in host memory.
//!
//! Source: TDX module source, tdh_sys_info.c; TDSYSINFO_STRUCT and CMR_INFO. RCX buffer, RDX its
//! size, R8 array of CMR_INFO, R9 its length; outputs RDX bytes and R9 entries written.

use tdx_defs::OperandId;

use crate::checks::invalid;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::platform::PlatformConfig;
use crate::system::{MAX_CMRS, MAX_RESERVED, MAX_TDMRS, PAMT_ENTRY, VENDOR, version};

/// Bytes of TDSYSINFO_STRUCT; also its alignment.
const INFO_SIZE: usize = 1024;
/// Alignment of the array.
const CMR_ALIGNMENT: u64 = 512;

pub(crate) fn sys_info(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (size, entries) = (std::mem::take(&mut regs.rdx), std::mem::take(&mut regs.r9));
    let module = cx.module;
    let info = module.check_host_memory(regs.rcx, INFO_SIZE as u64, OperandId::RCX)?;
    if size < INFO_SIZE as u64 {
        return Err(invalid(OperandId::RDX));
    }
    let cmrs = module.check_host_memory(regs.r8, CMR_ALIGNMENT, OperandId::R8)?;
    if entries < MAX_CMRS as u64 {
        return Err(invalid(OperandId::R9));
    }

    module.write_host_memory(info, &describe(&module.config));
    let mut list = Vec::new();
    for tdmr in module.config.tdmrs.iter().take(MAX_CMRS) {
        list.extend(tdmr.base.get().to_le_bytes());
        list.extend(tdmr.size.to_le_bytes());
    }
    // Unused entries are empty ranges.
    list.resize(MAX_CMRS * 16, 0);
    module.write_host_memory(cmrs, &list);
    (regs.rdx, regs.r9) = (INFO_SIZE as u64, MAX_CMRS as u64);
    Ok(())
}

/// TDSYSINFO_STRUCT.
fn describe(config: &PlatformConfig) -> [u8; INFO_SIZE] {
    let [major, minor, _] = version(config.release);
    let page = tdx_defs::PAGE_SIZE;
    let mut info = [0; INFO_SIZE];
    let mut put = |at: usize, bytes: usize, value: u64| {
        info[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    };
    put(4, 4, VENDOR);
    put(14, 2, minor);
    put(16, 2, major);
    // TDH.SYS.RD exists.
    put(18, 1, 1);
    put(32, 2, MAX_TDMRS);
    put(34, 2, MAX_RESERVED);
    put(36, 2, PAMT_ENTRY);
    put(48, 2, u64::from(config.tdcs_pages) * page);
    put(52, 2, u64::from(config.tdvps_pages) * page);
    put(64, 8, config.attributes.fixed0);
    put(72, 8, config.attributes.fixed1);
    put(80, 8, config.xfam.fixed0);
    put(88, 8, config.xfam.fixed1);
    info
}
