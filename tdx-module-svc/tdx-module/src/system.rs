//! The module as a whole: its state, and the metadata fields that describe it.
//!
//! Source: TDX module source, tdx_vmm_dispatcher.c for the states; global_sys_fields_lookup.c and
//! Linux, arch/x86/virt/vmx/tdx/tdx_global_metadata.c, for the fields.
//!
//! Model: convertible memory is not described, so each TDMR counts as one convertible range, and
//! there is no CPUID configuration.

use std::sync::atomic::{AtomicU8, Ordering};

use tdx_defs::{CompletionStatus as Status, Leaf};

use crate::platform::{PlatformConfig, Release};

/// State of the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SystemState {
    /// Before TDH.SYS.INIT.
    InitPending = 0,
    /// Before TDH.SYS.CONFIG.
    InitDone = 1,
    /// Before the last TDH.SYS.KEY.CONFIG.
    ConfigDone = 2,
    /// TDs can be built.
    Ready = 3,
    /// After TDH.SYS.LP.SHUTDOWN.
    Shutdown = 4,
}

/// Leaves that exist before SYS_READY.
const BEFORE_READY: [Leaf; 8] = [
    Leaf::SYS_INFO,
    Leaf::SYS_RD,
    Leaf::SYS_RDALL,
    Leaf::SYS_INIT,
    Leaf::SYS_LP_INIT,
    Leaf::SYS_CONFIG,
    Leaf::SYS_KEY_CONFIG,
    Leaf::SYS_LP_SHUTDOWN,
];

#[derive(Debug)]
pub(crate) struct System {
    state: AtomicU8,
}

impl System {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU8::new(SystemState::Ready as u8),
        }
    }

    pub(crate) fn set(&self, state: SystemState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// Whether the state allows a leaf.
    pub(crate) fn check(&self, leaf: Leaf) -> Result<(), Status> {
        let state = self.state.load(Ordering::Relaxed);
        if state == SystemState::Ready as u8 {
            return Ok(());
        }
        if state == SystemState::Shutdown as u8 {
            return if leaf == Leaf::SYS_LP_SHUTDOWN {
                Ok(())
            } else {
                Err(Status::SYS_SHUTDOWN)
            };
        }
        if BEFORE_READY.contains(&leaf) {
            Ok(())
        } else {
            Err(Status::SYS_NOT_READY)
        }
    }
}

/// Bytes of a PAMT entry.
pub(crate) const PAMT_ENTRY: u64 = 16;
/// TDMRs, and reserved areas in one.
pub(crate) const MAX_TDMRS: u64 = 64;
pub(crate) const MAX_RESERVED: u64 = 16;
/// Intel.
pub(crate) const VENDOR: u64 = 0x8086;
/// Convertible ranges that can be described.
pub(crate) const MAX_CMRS: usize = 32;
/// TDX_FEATURES0 bit 18: NO_RBP_MOD can be chosen.
const NO_RBP_MOD: u64 = 1 << 18;
const PAGE: u64 = tdx_defs::PAGE_SIZE;

/// Version of a release: major, minor, update.
pub(crate) fn version(release: Release) -> [u64; 3] {
    match release {
        Release::R1_5_05 => [1, 5, 5],
        Release::R1_5_34 => [1, 5, 34],
    }
}

/// The fields of the module by id, in the order in which TDH.SYS.RD goes through them.
pub(crate) fn fields(config: &PlatformConfig) -> Vec<(u64, u64)> {
    let [major, minor, update] = version(config.release);
    let cmrs = config.tdmrs.iter().take(MAX_CMRS);
    let mut fields = vec![
        (0x0800_0002_0000_0000, VENDOR),
        (0x0800_0001_0000_0003, minor),
        (0x0800_0001_0000_0004, major),
        (0x0800_0001_0000_0005, update),
        (0x0800_0001_0000_0006, 0),
        (0x0A00_0002_0000_0000, 0),
        (0x0A00_0000_0000_0001, 1),
        (0x0A00_0003_0000_0008, NO_RBP_MOD),
        (0x9000_0001_0000_0000, cmrs.len() as u64),
    ];
    let numbered = (0u64..).zip(cmrs);
    fields.extend(
        numbered
            .clone()
            .map(|(number, cmr)| (0x9000_0003_0000_0080 + number, cmr.base.get())),
    );
    fields.extend(numbered.map(|(number, cmr)| (0x9000_0003_0000_0100 + number, cmr.size)));
    fields.extend([
        (0x9100_0001_0000_0008, MAX_TDMRS),
        (0x9100_0001_0000_0009, MAX_RESERVED),
        (0x9100_0001_0000_0010, PAMT_ENTRY),
        (0x9100_0001_0000_0011, PAMT_ENTRY),
        (0x9100_0001_0000_0012, PAMT_ENTRY),
        (0x9800_0001_0000_0000, PAGE),
        (0x9800_0001_0000_0100, u64::from(config.tdcs_pages) * PAGE),
        (0x9800_0001_0000_0101, PAGE),
        (0x9800_0001_0000_0200, u64::from(config.tdvps_pages) * PAGE),
        (0x9800_0001_0000_0201, 3 * PAGE),
        (0x1900_0003_0000_0000, config.attributes.fixed0),
        (0x1900_0003_0000_0001, config.attributes.fixed1),
        (0x1900_0003_0000_0002, config.xfam.fixed0),
        (0x1900_0003_0000_0003, config.xfam.fixed1),
        (0x9900_0001_0000_0004, 0),
        (0x9900_0001_0000_0008, config.max_vcpus.into()),
    ]);
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_allows_its_leaves() {
        let system = System::new();
        for (state, leaf, expected) in [
            (SystemState::Ready, Leaf::MNG_CREATE, Ok(())),
            (
                SystemState::InitDone,
                Leaf::MNG_CREATE,
                Err(Status::SYS_NOT_READY),
            ),
            (SystemState::InitDone, Leaf::SYS_RD, Ok(())),
            (
                SystemState::Shutdown,
                Leaf::SYS_RD,
                Err(Status::SYS_SHUTDOWN),
            ),
            (SystemState::Shutdown, Leaf::SYS_LP_SHUTDOWN, Ok(())),
        ] {
            system.set(state);
            assert_eq!(system.check(leaf), expected, "{state:?} {leaf}");
        }
    }

    #[test]
    fn field_ids_are_distinct() {
        let fields = fields(&PlatformConfig::conformance());
        let mut ids: Vec<_> = fields.iter().map(|field| field.0).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), fields.len());
    }
}
