//! Whether a platform description makes sense. Checked once, so that no leaf has to ask again.
//!
//! Source: TDX module ABI, TDH.SYS.CONFIG, checks of TDMR_INFO and key ids.

use std::ops::Range;

use tdx_defs::Hpa;

use super::config::{Features, PlatformConfig, Tdmr};

const GIB: u64 = 1 << 30;
const MAX_TDMRS: usize = 64;
const MAX_RESERVED: usize = 16;
/// Owner fields of the PAMT hold bits 51:12.
const MAX_PA_BITS: u8 = 52;
/// The package bitmaps have 32 bits.
const MAX_PACKAGES: u32 = 32;
/// Shared holders of a lock word, all processors together.
const MAX_LPS: u32 = 4096;
/// Key ids of 15 bits.
const MAX_HKID: u64 = 0x7FFF;
/// TDCX pages in a TDR, less three roots of L2 trees.
const MAX_TDCS_PAGES: u8 = 6;
/// TDVPS pages of a vCPU.
const MAX_TDVPS_PAGES: u8 = 15;

/// A platform that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// A number outside its limits.
    #[error("{field} is {value}, it must be {min} to {max}")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Lowest legal value.
        min: u64,
        /// Highest legal value.
        max: u64,
    },
    /// Base or size of a TDMR is no multiple of 1 GiB, or the size is zero.
    #[error("tdmrs[{index}] at {base} of {size:#x} bytes is not a whole number of GiB")]
    UnalignedTdmr {
        /// Which one.
        index: usize,
        /// Its base.
        base: Hpa,
        /// Its size in bytes.
        size: u64,
    },
    /// A TDMR reaches addresses that the key id bits take.
    #[error("tdmrs[{index}] ends at {end:#x}, addresses without a key id end at {limit:#x}")]
    TdmrTooHigh {
        /// Which one.
        index: usize,
        /// Its end.
        end: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// TDMRs overlap or do not ascend.
    #[error("tdmrs[{index}] begins before the end of the one before it")]
    UnorderedTdmr {
        /// Which one.
        index: usize,
    },
    /// A reserved area is misaligned, empty, outside its TDMR or out of order.
    #[error("reserved area {area} of tdmrs[{index}] is misaligned, outside it or out of order")]
    BadReserved {
        /// Which TDMR.
        index: usize,
        /// Which area.
        area: usize,
    },
    /// The global key id is not private.
    #[error("global_hkid {hkid} is not one of the private key ids {start} to {end}")]
    GlobalHkidNotPrivate {
        /// The key id.
        hkid: u16,
        /// First private one.
        start: u16,
        /// Last private one.
        end: u32,
    },
    /// The processors cannot be spread so that each package has one.
    #[error(
        "packages is {packages}, {logical_processors} logical processors in equal shares leave \
         package {empty} empty"
    )]
    EmptyPackage {
        /// Number of packages.
        packages: u32,
        /// Number of processors.
        logical_processors: u32,
        /// The first package without a processor.
        empty: u32,
    },
    /// Bits that must be one are not among those that may be one.
    #[error("{field}.fixed1 {fixed1:#x} has bits that {field}.fixed0 {fixed0:#x} has not")]
    Features {
        /// Name of the field.
        field: &'static str,
        /// Bits that must be one.
        fixed1: u64,
        /// Bits that may be one.
        fixed0: u64,
    },
    /// The module's own memory is misaligned, too high or in a TDMR.
    #[error("seamrr {start:#x} to {end:#x} {problem}")]
    Seamrr {
        /// First byte.
        start: u64,
        /// The byte behind the last one.
        end: u64,
        /// What is wrong, with the limit.
        problem: String,
    },
    /// The private key ids do not fit the key id bits.
    #[error("private key ids end at {end}, hkid_bits gives {limit} of them")]
    TooManyHkids {
        /// One past the last private key id.
        end: u32,
        /// Number of key ids.
        limit: u32,
    },
}

impl PlatformConfig {
    /// Checks every limit that the module relies on.
    pub fn validate(&self) -> Result<(), PlatformError> {
        let range = |field, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(PlatformError::OutOfRange {
                    field,
                    value,
                    min,
                    max,
                })
            }
        };
        range("maxpa", self.maxpa.into(), 36, MAX_PA_BITS.into())?;
        range("hkid_bits", self.hkid_bits.into(), 1, 15)?;
        range("tdmrs", self.tdmrs.len() as u64, 1, MAX_TDMRS as u64)?;
        range(
            "logical_processors",
            self.logical_processors.into(),
            1,
            MAX_LPS.into(),
        )?;
        range("packages", self.packages.into(), 1, MAX_PACKAGES.into())?;
        range(
            "tdcs_pages",
            self.tdcs_pages.into(),
            4,
            MAX_TDCS_PAGES.into(),
        )?;
        range(
            "tdvps_pages",
            self.tdvps_pages.into(),
            1,
            MAX_TDVPS_PAGES.into(),
        )?;
        range("max_vcpus", self.max_vcpus.into(), 1, u16::MAX.into())?;
        self.validate_packages()?;
        for (field, features) in [("attributes", self.attributes), ("xfam", self.xfam)] {
            let Features { fixed1, fixed0 } = features;
            if !features.allows(fixed1) {
                return Err(PlatformError::Features {
                    field,
                    fixed1,
                    fixed0,
                });
            }
        }
        range("hkid_start", self.hkid_start.into(), 1, MAX_HKID)?;
        // One is the module's own.
        range("hkid_count", self.hkid_count.into(), 2, MAX_HKID)?;
        self.validate_hkids()?;
        let mut previous_end = 0;
        for (index, tdmr) in self.tdmrs.iter().enumerate() {
            previous_end = self.validate_tdmr(index, tdmr, previous_end)?;
        }
        self.validate_seamrr()
    }

    /// A key is configured once for each package, on one of its processors.
    fn validate_packages(&self) -> Result<(), PlatformError> {
        let used = self.package_of(self.logical_processors - 1) + 1;
        if used < self.packages {
            return Err(PlatformError::EmptyPackage {
                packages: self.packages,
                logical_processors: self.logical_processors,
                empty: used,
            });
        }
        Ok(())
    }

    /// The module's memory may be empty; otherwise it is whole pages outside of every region.
    fn validate_seamrr(&self) -> Result<(), PlatformError> {
        let Range { start, end } = self.seamrr;
        let limit = self.plain_limit();
        let inside = |tdmr: &Tdmr| {
            let base = tdmr.base.get();
            start < base.saturating_add(tdmr.size) && base < end
        };
        let problem = if start > end {
            "ends before it begins".to_owned()
        } else if !(start | end).is_multiple_of(tdx_defs::PAGE_SIZE) {
            format!("is not a multiple of {:#x}", tdx_defs::PAGE_SIZE)
        } else if end > limit {
            format!("ends above {limit:#x}, where addresses without a key id end")
        } else if let Some(index) = self.tdmrs.iter().position(inside).filter(|_| start < end) {
            format!("overlaps tdmrs[{index}]")
        } else {
            return Ok(());
        };
        Err(PlatformError::Seamrr {
            start,
            end,
            problem,
        })
    }

    /// The end of physical addresses without a key id.
    fn plain_limit(&self) -> u64 {
        1 << (self.maxpa - self.hkid_bits)
    }

    fn validate_hkids(&self) -> Result<(), PlatformError> {
        let end = u32::from(self.hkid_start) + u32::from(self.hkid_count);
        if end > self.hkids() {
            return Err(PlatformError::TooManyHkids {
                end,
                limit: self.hkids(),
            });
        }
        if !self.is_private_hkid(self.global_hkid.into()) {
            return Err(PlatformError::GlobalHkidNotPrivate {
                hkid: self.global_hkid,
                start: self.hkid_start,
                end: end.saturating_sub(1),
            });
        }
        Ok(())
    }

    /// Answers the end of the region.
    fn validate_tdmr(&self, index: usize, tdmr: &Tdmr, floor: u64) -> Result<u64, PlatformError> {
        let base = tdmr.base.get();
        if !base.is_multiple_of(GIB) || !tdmr.size.is_multiple_of(GIB) || tdmr.size == 0 {
            return Err(PlatformError::UnalignedTdmr {
                index,
                base: tdmr.base,
                size: tdmr.size,
            });
        }
        if base < floor {
            return Err(PlatformError::UnorderedTdmr { index });
        }
        let limit = self.plain_limit();
        let end = base.saturating_add(tdmr.size);
        if end > limit {
            return Err(PlatformError::TdmrTooHigh { index, end, limit });
        }
        if tdmr.reserved.len() > MAX_RESERVED {
            return Err(PlatformError::BadReserved {
                index,
                area: MAX_RESERVED,
            });
        }
        let mut previous = base;
        for (area, reserved) in tdmr.reserved.iter().enumerate() {
            let aligned = (reserved.start | reserved.end).is_multiple_of(tdx_defs::PAGE_SIZE);
            if !aligned || reserved.is_empty() || reserved.start < previous || reserved.end > end {
                return Err(PlatformError::BadReserved { index, area });
            }
            previous = reserved.end;
        }
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_profiles_are_valid() {
        PlatformConfig::conformance().validate().unwrap();
        PlatformConfig::roomy().validate().unwrap();
    }

    #[test]
    fn a_platform_may_lack_seamrr_and_spread_its_processors_unevenly() {
        let config = PlatformConfig {
            seamrr: 0..0,
            logical_processors: 5,
            packages: 3,
            ..PlatformConfig::conformance()
        };
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn the_default_carries_a_td_of_one_tib() {
        let platform = PlatformConfig::roomy();
        let free: u64 = platform.tdmrs.iter().map(|tdmr| tdmr.size).sum();
        let pages = (1u64 << 40) / tdx_defs::PAGE_SIZE;
        // Tables of 4 KiB entries, and those above them.
        let tables = pages / 512 + pages / (512 * 512) + 2;
        let control = 64 * u64::from(platform.tdvps_pages) + u64::from(platform.tdcs_pages) + 1;
        assert!((pages + tables + control) * tdx_defs::PAGE_SIZE < free);
    }

    #[test]
    fn impossible_platforms_are_refused() {
        type Change = fn(&mut PlatformConfig);
        let cases: [(&str, Change); 19] = [
            ("no memory", |c| c.tdmrs.clear()),
            ("odd base", |c| c.tdmrs[0].base = Hpa::new(0x1000)),
            ("empty region", |c| c.tdmrs[0].size = 0),
            ("overlap", |c| c.tdmrs[1].base = Hpa::new(0x4000_0000)),
            ("above the key id bits", |c| {
                c.tdmrs[2].base = Hpa::new(1 << 46)
            }),
            ("reserved outside", |c| c.tdmrs[0].reserved.push(0..0x1000)),
            ("shared global key id", |c| c.global_hkid = 5),
            ("too many key ids", |c| c.hkid_count = 64),
            ("no processor", |c| c.logical_processors = 0),
            ("no shared key id", |c| c.hkid_start = 0),
            ("no key id for a TD", |c| c.hkid_count = 1),
            ("more packages than processors", |c| c.packages = 5),
            ("a package without a processor", |c| c.packages = 3),
            ("attributes that must and may not", |c| {
                c.attributes.fixed1 = 2
            }),
            ("XFAM that must and may not", |c| c.xfam.fixed1 = 1 << 63),
            ("SEAMRR in a region", |c| {
                c.seamrr = 0x7FFF_F000..0x8000_0000
            }),
            ("odd SEAMRR", |c| c.seamrr = 0x1000..0x1800),
            ("SEAMRR upside down", |c| {
                (c.seamrr.start, c.seamrr.end) = (0x2000, 0x1000)
            }),
            ("SEAMRR above the key id bits", |c| {
                c.seamrr = 1 << 46..(1 << 46) + 0x1000
            }),
        ];
        for (case, change) in cases {
            let mut config = PlatformConfig::conformance();
            change(&mut config);
            assert!(config.validate().is_err(), "{case}");
        }
    }
}
