//! Whether a platform description makes sense. Checked once, so that no leaf has to ask again.
//!
//! Source: TDX module ABI, TDH.SYS.CONFIG, checks of TDMR_INFO and key ids.

use tdx_defs::Hpa;

use super::config::{PlatformConfig, Tdmr};

const GIB: u64 = 1 << 30;
const MAX_TDMRS: usize = 64;
const MAX_RESERVED: usize = 16;
/// Owner fields of the PAMT hold bits 51:12.
const MAX_PA_BITS: u8 = 52;
/// The package bitmaps have 32 bits.
const MAX_PACKAGES: u32 = 32;
/// Shared holders of a lock word, all processors together.
const MAX_LPS: u32 = 4096;
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
        self.validate_hkids()?;
        let mut previous_end = 0;
        for (index, tdmr) in self.tdmrs.iter().enumerate() {
            previous_end = self.validate_tdmr(index, tdmr, previous_end)?;
        }
        Ok(())
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
        let limit = 1 << (self.maxpa - self.hkid_bits);
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
    fn impossible_platforms_are_refused() {
        type Change = fn(&mut PlatformConfig);
        let cases: [(&str, Change); 9] = [
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
        ];
        for (case, change) in cases {
            let mut config = PlatformConfig::conformance();
            change(&mut config);
            assert!(config.validate().is_err(), "{case}");
        }
    }
}
