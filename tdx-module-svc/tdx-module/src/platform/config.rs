//! Description of the simulated machine: memory, key ids, processors, module release.
//!
//! Source: TDX module ABI, TDH.SYS.CONFIG and platform enumeration. Units: addresses and sizes in
//! bytes unless a name says otherwise.
//!
//! A key id (HKID) occupies the top `hkid_bits` of a physical address below bit `maxpa`. Key ids
//! below `hkid_start` are shared, the `hkid_count` from there on are private, and one of these,
//! `global_hkid`, belongs to the module itself.

use std::ops::Range;

use tdx_defs::Hpa;

const GIB: u64 = 1 << 30;

/// Release of the TDX module whose answers are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Release {
    /// 1.5.05: present Secure EPT entries show 0x7 and 0xF7, OP_STATE errors carry no value.
    #[default]
    R1_5_05,
    /// 1.5.34: they show 0x407 and 0x4F7, OP_STATE errors carry the state.
    R1_5_34,
}

/// One TD memory region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tdmr {
    /// First byte, a multiple of 1 GiB.
    pub base: Hpa,
    /// Length, a multiple of 1 GiB.
    pub size: u64,
    /// Areas that the host does not give to TDs, ascending, 4 KiB aligned.
    pub reserved: Vec<Range<u64>>,
    /// Whether its PAMT has been initialised; otherwise TDH.SYS.TDMR.INIT has to be called.
    pub initialized: bool,
}

/// What a TD may be configured with: bits that must be one and bits that may be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Bits that have to be set.
    pub fixed1: u64,
    /// Bits that may be set.
    pub fixed0: u64,
}

impl Features {
    /// Whether `value` sets what it must and nothing that it may not.
    pub const fn allows(self, value: u64) -> bool {
        value & self.fixed1 == self.fixed1 && value & !self.fixed0 == 0
    }
}

/// The simulated platform. [`PlatformConfig::roomy`] is the default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformConfig {
    /// Release whose answers are given.
    pub release: Release,
    /// TD memory regions, ascending.
    pub tdmrs: Vec<Tdmr>,
    /// Width of the key id in a physical address, in bits.
    pub hkid_bits: u8,
    /// First private key id.
    pub hkid_start: u16,
    /// Number of private key ids, the global one included.
    pub hkid_count: u16,
    /// Private key id of the module itself.
    pub global_hkid: u16,
    /// Width of a physical address, key id included, in bits.
    pub maxpa: u8,
    /// Number of logical processors.
    pub logical_processors: u32,
    /// Number of packages; the processors are spread evenly, lowest first.
    pub packages: u32,
    /// Control pages that a TD needs without L2 VMs.
    pub tdcs_pages: u8,
    /// Control pages that a vCPU needs without L2 VMs, its root page included.
    pub tdvps_pages: u8,
    /// TD_PARAMS.ATTRIBUTES that are accepted.
    pub attributes: Features,
    /// TD_PARAMS.XFAM that is accepted.
    pub xfam: Features,
    /// Whether 5-level Secure EPT is supported.
    pub five_level: bool,
    /// Memory of the module itself, refused as host memory operand.
    pub seamrr: Range<u64>,
    /// Largest TD_PARAMS.MAX_VCPUS.
    pub max_vcpus: u16,
}

impl PlatformConfig {
    /// The platform on which the recorded conformance sequences were made: two usable TDMRs of
    /// 1 and 2 GiB, 31 key ids for TDs, four processors.
    pub fn conformance() -> Self {
        let tdmr = |base, gib: u64, reserved: Option<Range<u64>>, initialized| Tdmr {
            base: Hpa::new(base),
            size: gib * GIB,
            reserved: reserved.into_iter().collect(),
            initialized,
        };
        Self {
            release: Release::R1_5_05,
            tdmrs: vec![
                tdmr(0x4000_0000, 1, Some(0x7000_0000..0x7100_0000), true),
                tdmr(0xC000_0000, 2, None, true),
                tdmr(0x1_8000_0000, 1, None, false),
            ],
            hkid_bits: 6,
            hkid_start: 32,
            hkid_count: 32,
            global_hkid: 32,
            maxpa: 52,
            logical_processors: 4,
            packages: 1,
            tdcs_pages: 6,
            tdvps_pages: 6,
            attributes: Features {
                fixed1: 0,
                fixed0: 1 << 63 | 0b111 << 28 | 1,
            },
            xfam: Features {
                fixed1: 0x3,
                fixed0: 0x0006_DBE7,
            },
            five_level: true,
            seamrr: 0x300_0000..0x500_0000,
            max_vcpus: 576,
        }
    }

    /// The default: one TDMR of 1.5 TiB from 4 GiB on, which carries a TD of 1 TiB; 1023 key ids
    /// for TDs; 64 processors. 11 key id bits leave 2 TiB of physical addresses.
    pub fn roomy() -> Self {
        Self {
            tdmrs: vec![Tdmr {
                base: Hpa::new(4 * GIB),
                size: 1536 * GIB,
                reserved: Vec::new(),
                initialized: true,
            }],
            hkid_bits: 11,
            hkid_start: 1024,
            hkid_count: 1024,
            global_hkid: 1024,
            logical_processors: 64,
            ..Self::conformance()
        }
    }

    /// The package of a logical processor.
    pub fn package_of(&self, lp: u32) -> u32 {
        let per_package = self
            .logical_processors
            .div_ceil(self.packages.max(1))
            .max(1);
        (lp / per_package).min(self.packages.saturating_sub(1))
    }

    /// Bits of a physical address that hold the key id.
    pub fn hkid_mask(&self) -> u64 {
        ((1 << self.hkid_bits) - 1) << self.hkid_shift()
    }

    /// The key id of a physical address.
    pub fn hkid_of(&self, hpa: u64) -> u64 {
        (hpa & self.hkid_mask()) >> self.hkid_shift()
    }

    /// Whether a key id is private.
    pub fn is_private_hkid(&self, hkid: u64) -> bool {
        let start = u64::from(self.hkid_start);
        (start..start + u64::from(self.hkid_count)).contains(&hkid)
    }

    /// Number of key ids, shared and private.
    pub fn hkids(&self) -> u32 {
        1 << self.hkid_bits
    }

    fn hkid_shift(&self) -> u8 {
        self.maxpa.saturating_sub(self.hkid_bits)
    }
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self::roomy()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ids_lie_in_the_top_bits() {
        let config = PlatformConfig::conformance();
        assert_eq!(config.hkid_mask(), 0x000F_C000_0000_0000);
        assert_eq!(config.hkid_of(0x8_4000_4000_0000), 33);
        for (hkid, private) in [(0, false), (31, false), (32, true), (63, true), (64, false)] {
            assert_eq!(config.is_private_hkid(hkid), private, "{hkid}");
        }
    }

    #[test]
    fn processors_are_spread_over_packages() {
        let config = PlatformConfig {
            packages: 2,
            logical_processors: 4,
            ..PlatformConfig::roomy()
        };
        let packages: Vec<_> = (0..4).map(|lp| config.package_of(lp)).collect();
        assert_eq!(packages, [0, 0, 1, 1]);
    }
}
