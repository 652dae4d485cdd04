//! The whole state of a module, for audits, for tests, and for a service that compares it with the
//! state at the end of a recorded sequence.
//!
//! | recorded section | here |
//! |---|---|
//! | `tds`, `mrtd` | [`Module::inspect_tds`] |
//! | `sept` | [`Module::inspect_sept`], of every TD whose keys are configured |
//! | `pamt` | [`Module::inspect_pamt`] |
//!
//! Nothing here takes a lock of the module. While calls run beside it, each value is one that the
//! module had, but they need not belong together.

use tdx_defs::{Gpa, Hpa};

use crate::measure::DIGEST_SIZE;
use crate::pamt::PageInfo;
use crate::sept::{ENTRIES, SeptState, Slot, Table};
use crate::td::{Lifecycle, OpState, Td};
use crate::{Module, checks};

/// State of a TD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TdInfo {
    /// Its root page.
    pub tdr: Hpa,
    /// TDR.LIFECYCLE_STATE.
    pub lifecycle: Lifecycle,
    /// TDR.FATAL.
    pub is_fatal: bool,
    /// Its key id.
    pub hkid: u16,
    /// Control pages.
    pub num_tdcx: u8,
    /// Pages that it owns, in 4 KiB units.
    pub children: u64,
    /// TDCS.OP_STATE.
    pub op_state: OpState,
    /// TDCS.TD_EPOCH.
    pub td_epoch: u64,
    /// vCPUs inside since an even and since an odd epoch.
    pub epoch_refcount: [u16; 2],
    /// vCPU indices taken.
    pub num_vcpus: u32,
    /// vCPUs on a logical processor.
    pub num_assoc_vcpus: u32,
    /// MRTD, once final.
    pub mrtd: Option<[u8; DIGEST_SIZE]>,
    /// The run-time measurements.
    pub rtmrs: [[u8; DIGEST_SIZE]; 4],
}

/// A Secure EPT entry that is not free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeptInfo {
    /// First address that it maps.
    pub gpa: Gpa,
    /// Level as the module counts.
    pub level: u8,
    /// Its state.
    pub state: SeptState,
    /// The page or the table behind it.
    pub page: Hpa,
    /// RCX as TDH.MEM.SEPT.RD would show it.
    pub rcx: u64,
    /// RDX as TDH.MEM.SEPT.RD would show it.
    pub rdx: u64,
}

impl Module {
    /// Every TD whose root page is not reclaimed, ascending by it.
    pub fn inspect_tds(&self) -> Vec<TdInfo> {
        self.tds.all().iter().map(|td| describe(td)).collect()
    }

    /// Every Secure EPT entry of a TD that is not free, parents before children, ascending by
    /// address; empty when there is no such TD.
    pub fn inspect_sept(&self, tdr: Hpa) -> Vec<SeptInfo> {
        let mut entries = Vec::new();
        if let Some(td) = self.tds.get(tdr)
            && let (Some(config), Some(root)) = (td.config(), td.sept().root())
        {
            list(&td, root, Gpa::new(0), config.root_level, &mut entries);
        }
        entries
    }

    /// Calls `visit` for every page that is neither free nor reserved.
    pub fn inspect_pamt(&self, visit: impl FnMut(PageInfo)) {
        self.pamt.for_each_used(visit);
    }
}

fn describe(td: &Td) -> TdInfo {
    TdInfo {
        tdr: td.tdr(),
        lifecycle: td.lifecycle(),
        is_fatal: td.is_fatal(),
        hkid: td.hkid(),
        num_tdcx: td.num_tdcx(),
        children: td.children(),
        op_state: td.op_state(),
        td_epoch: td.epochs().current(),
        epoch_refcount: td.epochs().refcount(),
        num_vcpus: td.num_vcpus(),
        num_assoc_vcpus: td.num_assoc_vcpus(),
        mrtd: td.measurement().mrtd(),
        rtmrs: td.rtmrs().values(),
    }
}

fn list(td: &Td, table: &Table, base: Gpa, level: u8, into: &mut Vec<SeptInfo>) {
    let span = tdx_defs::PAGE_SIZE << (9 * u32::from(level));
    for (index, number) in (0..ENTRIES).zip(0u64..) {
        let slot = Slot::at(table, index, level);
        let value = slot.read();
        let state = value.state();
        if state == SeptState::FREE {
            continue;
        }
        let gpa = Gpa::new(base.get() + number * span);
        let [rcx, rdx] = checks::details(value, level);
        into.push(SeptInfo {
            gpa,
            level,
            state,
            page: value.page(),
            rcx,
            rdx,
        });
        if state.is_non_leaf()
            && let Some(below) = td.sept().child(slot)
            && level > 0
        {
            list(td, below, gpa, level - 1, into);
        }
    }
}
