//! The platform by flags of the command line, which count more than a platform file.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use tdx_defs::Hpa;
use tdx_module::{Features, PlatformConfig, Tdmr};

use super::PlatformFileError;
use super::word::parse_word;

/// What flags say about the machine; what they leave out stays as it is.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Platform, each counts more than the platform file")]
pub struct PlatformFlags {
    /// TD memory region, such as 0x40000000+1G, or with :uninitialized behind it to leave its PAMT
    /// to TDH.SYS.TDMR.INIT; may be given several times, ascending, and replaces all others
    #[arg(long, value_name = "BASE+SIZE")]
    pub tdmr: Vec<TdmrFlag>,

    /// Area of a TDMR that TDs do not get; may be given several times
    #[arg(long, value_name = "BASE+SIZE")]
    pub reserved: Vec<AreaFlag>,

    /// Bits of a physical address that hold the key id
    #[arg(long, value_name = "N")]
    pub hkid_bits: Option<u8>,

    /// Private key ids: the first and how many, such as 32+32
    #[arg(long, value_name = "START+COUNT")]
    pub hkids: Option<HkidRange>,

    /// Private key id of the module itself
    #[arg(long, value_name = "N")]
    pub global_hkid: Option<u16>,

    /// Bits of a physical address, key id included
    #[arg(long, value_name = "N")]
    pub maxpa: Option<u8>,

    /// Logical processors
    #[arg(long, value_name = "N")]
    pub logical_processors: Option<u32>,

    /// Packages that the processors are spread over
    #[arg(long, value_name = "N")]
    pub packages: Option<u32>,

    /// Control pages of a TD without L2 VMs
    #[arg(long, value_name = "N")]
    pub tdcs_pages: Option<u8>,

    /// Control pages of a vCPU without L2 VMs, its root page included
    #[arg(long, value_name = "N")]
    pub tdvps_pages: Option<u8>,

    /// TD attributes: bits that may be one, and behind a slash bits that must be one
    #[arg(long, value_name = "FIXED0[/FIXED1]")]
    pub attributes: Option<FeaturesFlag>,

    /// XFAM: bits that may be one, and behind a slash bits that must be one
    #[arg(long, value_name = "FIXED0[/FIXED1]")]
    pub xfam: Option<FeaturesFlag>,

    /// Whether 5-level Secure EPT is supported
    #[arg(long, value_name = "BOOL")]
    pub five_level: Option<bool>,

    /// Memory of the module itself, refused as host memory operand
    #[arg(long, value_name = "BASE+SIZE")]
    pub seamrr: Option<AreaFlag>,

    /// Most vCPUs of a TD
    #[arg(long, value_name = "N")]
    pub max_vcpus: Option<u16>,
}

impl PlatformFlags {
    /// Replaces what the flags name.
    pub(super) fn apply(&self, platform: &mut PlatformConfig) -> Result<(), PlatformFileError> {
        fn set<T, V: Into<T>>(field: &mut T, value: Option<V>) {
            if let Some(value) = value {
                *field = value.into();
            }
        }
        if !self.tdmr.is_empty() {
            platform.tdmrs = self.tdmr.iter().copied().map(Tdmr::from).collect();
        }
        for area in &self.reserved {
            reserve(&mut platform.tdmrs, *area)?;
        }
        set(&mut platform.hkid_bits, self.hkid_bits);
        if let Some(HkidRange { start, count }) = self.hkids {
            platform.hkid_start = start;
            platform.hkid_count = count;
        }
        set(&mut platform.global_hkid, self.global_hkid);
        set(&mut platform.maxpa, self.maxpa);
        set(&mut platform.logical_processors, self.logical_processors);
        set(&mut platform.packages, self.packages);
        set(&mut platform.tdcs_pages, self.tdcs_pages);
        set(&mut platform.tdvps_pages, self.tdvps_pages);
        set(&mut platform.attributes, self.attributes);
        set(&mut platform.xfam, self.xfam);
        set(&mut platform.five_level, self.five_level);
        set(&mut platform.seamrr, self.seamrr.map(AreaFlag::range));
        set(&mut platform.max_vcpus, self.max_vcpus);
        Ok(())
    }
}

/// Puts an area where it belongs in the order of its region.
fn reserve(tdmrs: &mut [Tdmr], area: AreaFlag) -> Result<(), PlatformFileError> {
    let holds = |tdmr: &&mut Tdmr| {
        let base = tdmr.base.get();
        base <= area.base && area.base - base < tdmr.size
    };
    let Some(tdmr) = tdmrs.iter_mut().find(holds) else {
        return Err(PlatformFileError::NoTdmr {
            base: area.base,
            size: area.size,
        });
    };
    let at = tdmr
        .reserved
        .partition_point(|other| other.start <= area.base);
    tdmr.reserved.insert(at, area.range());
    Ok(())
}

/// `BASE+SIZE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AreaFlag {
    /// First byte.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

impl AreaFlag {
    fn range(self) -> Range<u64> {
        // The parser saw to it that this fits.
        self.base..self.base.saturating_add(self.size)
    }
}

impl FromStr for AreaFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (base, size) = text
            .split_once('+')
            .ok_or_else(|| format!("{text:?} is not of the form BASE+SIZE"))?;
        let (base, size) = (parse_word(base)?, parse_word(size)?);
        if base.checked_add(size).is_none() {
            return Err(format!(
                "{base:#x}+{size:#x} ends above the limit of 64 bits"
            ));
        }
        Ok(Self { base, size })
    }
}

impl fmt::Display for AreaFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.base, self.size)
    }
}

/// `BASE+SIZE[:uninitialized]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TdmrFlag {
    /// Where it is.
    pub area: AreaFlag,
    /// Whether its PAMT is there from the start.
    pub initialized: bool,
}

impl FromStr for TdmrFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (area, initialized) = match text.split_once(':') {
            None => (text, true),
            Some((area, "uninitialized")) => (area, false),
            Some((_, word)) => return Err(format!("{word:?} is not \"uninitialized\"")),
        };
        Ok(Self {
            area: area.parse()?,
            initialized,
        })
    }
}

impl From<TdmrFlag> for Tdmr {
    fn from(flag: TdmrFlag) -> Self {
        Self {
            base: Hpa::new(flag.area.base),
            size: flag.area.size,
            reserved: Vec::new(),
            initialized: flag.initialized,
        }
    }
}

/// `START+COUNT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HkidRange {
    /// First private key id.
    pub start: u16,
    /// How many.
    pub count: u16,
}

impl FromStr for HkidRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (start, count) = text
            .split_once('+')
            .ok_or_else(|| format!("{text:?} is not of the form START+COUNT"))?;
        let id = |text: &str| {
            let word = parse_word(text)?;
            u16::try_from(word).map_err(|_| format!("{word} is above the limit of {}", u16::MAX))
        };
        Ok(Self {
            start: id(start)?,
            count: id(count)?,
        })
    }
}

/// `FIXED0[/FIXED1]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeaturesFlag(pub Features);

impl FromStr for FeaturesFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (fixed0, fixed1) = text.split_once('/').unwrap_or((text, "0"));
        Ok(Self(Features {
            fixed0: parse_word(fixed0)?,
            fixed1: parse_word(fixed1)?,
        }))
    }
}

impl From<FeaturesFlag> for Features {
    fn from(flag: FeaturesFlag) -> Self {
        flag.0
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Args {
        #[command(flatten)]
        flags: PlatformFlags,
    }

    fn platform(line: &str) -> Result<PlatformConfig, String> {
        let args = std::iter::once("svc").chain(line.split_whitespace());
        let flags = Args::try_parse_from(args).map_err(|error| error.to_string())?;
        let mut platform = PlatformConfig::conformance();
        flags
            .flags
            .apply(&mut platform)
            .map_err(|error| error.to_string())?;
        Ok(platform)
    }

    #[test]
    fn no_flag_changes_nothing() {
        assert_eq!(platform("").unwrap(), PlatformConfig::conformance());
    }

    #[test]
    fn flags_replace_what_they_name_and_nothing_else() {
        let line = "--tdmr 0x40000000+2G --tdmr 6G+1G:uninitialized --reserved 0x60000000+16M \
                    --reserved 0x50000000+4K --hkid-bits 7 --hkids 64+64 --global-hkid 65 \
                    --maxpa 48 --logical-processors 8 --packages 2 --tdcs-pages 5 \
                    --tdvps-pages 7 --attributes 0x10000001/1 --xfam 7/3 --five-level false \
                    --seamrr 16M+1M --max-vcpus 9";
        let tdmr = |base, size, reserved, initialized| Tdmr {
            base: Hpa::new(base),
            size,
            reserved,
            initialized,
        };
        let expected = PlatformConfig {
            release: tdx_module::Release::R1_5_05,
            tdmrs: vec![
                tdmr(
                    1 << 30,
                    2 << 30,
                    vec![0x5000_0000..0x5000_1000, 0x6000_0000..0x6100_0000],
                    true,
                ),
                tdmr(6 << 30, 1 << 30, vec![], false),
            ],
            hkid_bits: 7,
            hkid_start: 64,
            hkid_count: 64,
            global_hkid: 65,
            maxpa: 48,
            logical_processors: 8,
            packages: 2,
            tdcs_pages: 5,
            tdvps_pages: 7,
            attributes: Features {
                fixed0: 0x1000_0001,
                fixed1: 1,
            },
            xfam: Features {
                fixed0: 7,
                fixed1: 3,
            },
            five_level: false,
            seamrr: 0x100_0000..0x110_0000,
            max_vcpus: 9,
        };
        assert_eq!(platform(line).unwrap(), expected);
        assert_eq!(expected.validate(), Ok(()));
    }

    #[test]
    fn malformed_flags_are_refused_with_what_is_wrong() {
        for (line, want) in [
            ("--tdmr 0x40000000", "not of the form BASE+SIZE"),
            ("--tdmr 1G+1G:later", "\"later\" is not \"uninitialized\""),
            ("--tdmr 1G+x", "\"x\" is no 64-bit number"),
            (
                "--seamrr 0xfffffffffffff000+8K",
                "ends above the limit of 64 bits",
            ),
            (
                "--reserved 0+4K",
                "--reserved 0x0+0x1000: no TDMR holds its first byte",
            ),
            ("--hkids 32", "not of the form START+COUNT"),
            ("--hkids 32+65536", "65536 is above the limit of 65535"),
            ("--attributes 1/y", "\"y\" is no 64-bit number"),
            ("--maxpa 256", "256 is not in 0..=255"),
            ("--five-level maybe", "invalid value 'maybe'"),
        ] {
            let error = platform(line).unwrap_err();
            assert!(error.contains(want), "{line}: {error}");
        }
    }
}
