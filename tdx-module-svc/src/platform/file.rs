//! The platform file: what a TOML file may say about the machine.
//!
//! Each key replaces that of the profile, a key that is not known is refused. Addresses and sizes
//! are bytes; 64-bit words may be strings (`"0x8000000000000001"`, `"1G"`), since a TOML integer
//! has 63 bits.
//!
//! ```toml
//! release = "1.5.34"
//! logical_processors = 8
//! attributes = { fixed0 = "0x8000000070000001", fixed1 = 0 }
//!
//! [[tdmrs]]
//! base = 0x4000_0000
//! size = 0x4000_0000
//! reserved = [{ base = 0x7000_0000, size = 0x100_0000 }]
//! ```

use std::io::Read as _;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use tdx_defs::Hpa;
use tdx_module::{Features, PlatformConfig, Tdmr};

use super::PlatformFileError;
use super::word::parse_word;
use crate::config::release_by_name;

/// Largest file, in bytes. A platform has a few dozen lines.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Reads and parses a file.
pub(super) fn read(path: &Path) -> Result<PlatformFile, PlatformFileError> {
    let failed = |source| PlatformFileError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
        .map_err(failed)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(PlatformFileError::TooLarge {
            path: path.to_owned(),
            limit: MAX_FILE_BYTES,
        });
    }
    toml::from_str(&text).map_err(|source| PlatformFileError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// What a platform file may say; what it leaves out stays as in the profile.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PlatformFile {
    release: Option<ReleaseName>,
    tdmrs: Option<Vec<TdmrTable>>,
    hkid_bits: Option<u8>,
    hkid_start: Option<u16>,
    hkid_count: Option<u16>,
    global_hkid: Option<u16>,
    maxpa: Option<u8>,
    logical_processors: Option<u32>,
    packages: Option<u32>,
    tdcs_pages: Option<u8>,
    tdvps_pages: Option<u8>,
    attributes: Option<FeatureTable>,
    xfam: Option<FeatureTable>,
    five_level: Option<bool>,
    seamrr: Option<Area>,
    max_vcpus: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TdmrTable {
    base: Word,
    size: Word,
    #[serde(default)]
    reserved: Vec<Area>,
    #[serde(default = "initialized_by_default")]
    initialized: bool,
}

fn initialized_by_default() -> bool {
    true
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Area {
    base: Word,
    size: Word,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct FeatureTable {
    fixed0: Word,
    #[serde(default)]
    fixed1: Word,
}

/// A release by its name.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct ReleaseName(tdx_module::Release);

impl TryFrom<String> for ReleaseName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        release_by_name(&name)
            .map(Self)
            .ok_or_else(|| format!("release {name:?} is not known, there are 1.5.05 and 1.5.34"))
    }
}

/// A 64-bit number, as an integer or as a string.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(try_from = "WordText")]
struct Word(u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum WordText {
    Integer(u64),
    Text(String),
}

impl TryFrom<WordText> for Word {
    type Error = String;

    fn try_from(text: WordText) -> Result<Self, String> {
        match text {
            WordText::Integer(word) => Ok(Self(word)),
            WordText::Text(text) => parse_word(&text).map(Self),
        }
    }
}

impl From<Area> for Range<u64> {
    fn from(area: Area) -> Self {
        area.base.0..area.base.0.saturating_add(area.size.0)
    }
}

impl From<FeatureTable> for Features {
    fn from(table: FeatureTable) -> Self {
        Self {
            fixed0: table.fixed0.0,
            fixed1: table.fixed1.0,
        }
    }
}

impl From<TdmrTable> for Tdmr {
    fn from(table: TdmrTable) -> Self {
        Self {
            base: Hpa::new(table.base.0),
            size: table.size.0,
            reserved: table.reserved.into_iter().map(Range::from).collect(),
            initialized: table.initialized,
        }
    }
}

impl PlatformFile {
    /// Replaces what the file names.
    pub(super) fn apply(self, platform: &mut PlatformConfig) {
        fn set<T, V: Into<T>>(field: &mut T, value: Option<V>) {
            if let Some(value) = value {
                *field = value.into();
            }
        }
        set(&mut platform.release, self.release.map(|name| name.0));
        if let Some(tdmrs) = self.tdmrs {
            platform.tdmrs = tdmrs.into_iter().map(Tdmr::from).collect();
        }
        set(&mut platform.hkid_bits, self.hkid_bits);
        set(&mut platform.hkid_start, self.hkid_start);
        set(&mut platform.hkid_count, self.hkid_count);
        set(&mut platform.global_hkid, self.global_hkid);
        set(&mut platform.maxpa, self.maxpa);
        set(&mut platform.logical_processors, self.logical_processors);
        set(&mut platform.packages, self.packages);
        set(&mut platform.tdcs_pages, self.tdcs_pages);
        set(&mut platform.tdvps_pages, self.tdvps_pages);
        set(&mut platform.attributes, self.attributes);
        set(&mut platform.xfam, self.xfam);
        set(&mut platform.five_level, self.five_level);
        set(&mut platform.seamrr, self.seamrr);
        set(&mut platform.max_vcpus, self.max_vcpus);
    }
}
