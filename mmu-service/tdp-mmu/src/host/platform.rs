//! What a host knows about its TDX module.
//!
//! Source: Linux, arch/x86/virt/vmx/tdx/tdx.c, `struct tdx_sys_info` and TDMR construction.

/// A physical memory range that the module manages (a TDMR).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryRange {
    /// Bytes.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Parts that hold no TD memory: base and size in bytes.
    pub reserved: Vec<(u64, u64)>,
}

/// The module's platform as the host needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Initialised TDMRs, ascending.
    pub tdmrs: Vec<MemoryRange>,
    /// First private key id.
    pub hkid_start: u32,
    /// Private key ids.
    pub hkid_count: u32,
    /// The module's own key id, one of the private ones.
    pub global_hkid: u32,
    /// Physical address width in bits, key id bits included.
    pub maxpa: u32,
    /// Bits of the key id at the top of a physical address.
    pub hkid_bits: u32,
    /// Logical processors.
    pub logical_processors: u32,
    /// Packages.
    pub packages: u32,
    /// TDCX pages of a TD.
    pub tdcs_pages: u32,
    /// Pages of a vCPU's control structure, the TDVPR included.
    pub tdvps_pages: u32,
    /// Attribute bits that may be set.
    pub attributes_fixed0: u64,
    /// Attribute bits that must be set.
    pub attributes_fixed1: u64,
    /// XFAM bits that may be set.
    pub xfam_fixed0: u64,
    /// XFAM bits that must be set.
    pub xfam_fixed1: u64,
    /// Whether Secure EPT may have five levels.
    pub five_level: bool,
}

/// A platform that no host could run on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("platform.{field}: {reason}")]
pub struct HostError {
    field: &'static str,
    reason: String,
}

const GIB: u64 = 1 << 30;

impl Platform {
    /// Where the key id begins in a physical address.
    pub fn hkid_shift(&self) -> u32 {
        self.maxpa - self.hkid_bits
    }

    /// The logical processor that makes a package's call, for packages of equal size.
    pub(crate) fn package_lp(&self, package: u32) -> u32 {
        package * (self.logical_processors / self.packages).max(1)
    }

    pub(crate) fn check(&self) -> Result<(), HostError> {
        let bad = |field, reason: &str| {
            Err(HostError {
                field,
                reason: reason.to_owned(),
            })
        };
        if !(36..=52).contains(&self.maxpa) {
            return bad("maxpa", &format!("{} is outside 36..=52", self.maxpa));
        }
        if self.hkid_bits == 0 || self.hkid_bits > 15 {
            return bad(
                "hkid_bits",
                &format!("{} is outside 1..=15", self.hkid_bits),
            );
        }
        if self.hkid_count < 2 {
            return bad(
                "hkid_count",
                "a TD needs a private key id beside the global one",
            );
        }
        if self.packages == 0 || self.packages > self.logical_processors {
            return bad(
                "packages",
                "needs at least one, and a logical processor in each",
            );
        }
        if !(1..=64).contains(&self.tdcs_pages) || !(1..=64).contains(&self.tdvps_pages) {
            return bad("tdcs_pages", "control structures take 1 to 64 pages");
        }
        let mut end = 0;
        for range in &self.tdmrs {
            if range.base % GIB != 0 || range.size % GIB != 0 || range.size == 0 {
                return bad("tdmrs", "base and size are multiples of 1 GiB");
            }
            let limit = range.base.checked_add(range.size);
            if range.base < end || limit.is_none_or(|limit| limit > 1 << self.hkid_shift()) {
                return bad("tdmrs", "ranges ascend and lie below the key id bits");
            }
            end = range.base + range.size;
        }
        if self.tdmrs.is_empty() {
            return bad("tdmrs", "a host needs memory");
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two 4 GiB TDMRs with a hole, as small as tests can use.
    pub(crate) fn small() -> Platform {
        Platform {
            tdmrs: vec![
                MemoryRange {
                    base: 4 * GIB,
                    size: 4 * GIB,
                    reserved: vec![(4 * GIB, 1 << 21)],
                },
                MemoryRange {
                    base: 12 * GIB,
                    size: 4 * GIB,
                    reserved: vec![],
                },
            ],
            hkid_start: 32,
            hkid_count: 32,
            global_hkid: 32,
            maxpa: 52,
            hkid_bits: 6,
            logical_processors: 4,
            packages: 1,
            tdcs_pages: 6,
            tdvps_pages: 6,
            attributes_fixed0: 1 << 28 | 1,
            attributes_fixed1: 0,
            xfam_fixed0: 0x6_DBE7,
            xfam_fixed1: 3,
            five_level: true,
        }
    }

    #[test]
    fn impossible_platforms_are_refused_by_field() {
        assert!(small().check().is_ok());
        for (field, spoil) in [
            ("maxpa", (|p| p.maxpa = 60) as fn(&mut Platform)),
            ("hkid_bits", |p| p.hkid_bits = 0),
            ("hkid_count", |p| p.hkid_count = 1),
            ("packages", |p| p.packages = 9),
            ("tdmrs", |p| p.tdmrs.swap(0, 1)),
            ("tdmrs", |p| p.tdmrs[0].size = 5),
            ("tdmrs", |p| p.tdmrs.clear()),
            ("tdcs_pages", |p| p.tdvps_pages = 0),
        ] {
            let mut platform = small();
            spoil(&mut platform);
            assert_eq!(platform.check().unwrap_err().field, field);
        }
    }
}
