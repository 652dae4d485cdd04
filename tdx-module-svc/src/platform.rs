//! The platform: from settings to the core, from the core to the wire.
//!
//! A platform file is TOML. Each key replaces that of the profile, a key that is not known is
//! refused. Addresses and sizes are bytes; 64-bit words may be strings (`"0x8000000000000001"`),
//! since a TOML integer has 63 bits.
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

use std::ops::Range;
use std::path::{Path, PathBuf};

use mirror_proto::module::{GetPlatformResponse, PageCount, ReservedArea, Tdmr as WireTdmr};
use serde::Deserialize;
use tdx_defs::Hpa;
use tdx_module::{Features, Module, PlatformConfig, Tdmr};

use crate::config::{Config, Limits, Profile, release_by_name, release_name};

/// A platform file that cannot be used. Whether the platform makes sense is the core's question.
#[derive(Debug, thiserror::Error)]
pub enum PlatformFileError {
    /// No such file, or not readable.
    #[error("platform file {} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, or a key or value that is not known.
    #[error("platform file {} is malformed", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// The platform that the settings describe.
pub(crate) fn resolve(config: &Config) -> Result<PlatformConfig, PlatformFileError> {
    let mut platform = match config.profile {
        Profile::Roomy => PlatformConfig::roomy(),
        Profile::Conformance => PlatformConfig::conformance(),
    };
    if let Some(path) = &config.platform {
        read(path)?.apply(&mut platform);
    }
    if let Some(release) = config.release {
        platform.release = release;
    }
    Ok(platform)
}

fn read(path: &Path) -> Result<PlatformFile, PlatformFileError> {
    let text = std::fs::read_to_string(path).map_err(|source| PlatformFileError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| PlatformFileError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// What a platform file may say; what it leaves out stays as in the profile.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PlatformFile {
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
            WordText::Text(text) => {
                let digits = text.replace('_', "");
                let word = match digits.strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16),
                    None => digits.parse(),
                };
                word.map(Self)
                    .map_err(|_| format!("{text:?} is no 64-bit number"))
            }
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
    fn apply(self, platform: &mut PlatformConfig) {
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

/// The platform, what of it is in use, and what one request may ask for.
pub(crate) fn describe(module: &Module, limits: &Limits, instance: &str) -> GetPlatformResponse {
    let config = module.config();
    let usage = module.usage();
    GetPlatformResponse {
        instance: instance.to_owned(),
        release: release_name(config.release).to_owned(),
        tdmrs: config.tdmrs.iter().map(tdmr_to_wire).collect(),
        hkid_start: config.hkid_start.into(),
        hkid_count: config.hkid_count.into(),
        global_hkid: config.global_hkid.into(),
        maxpa: config.maxpa.into(),
        hkid_bits: config.hkid_bits.into(),
        logical_processors: config.logical_processors,
        packages: config.packages,
        tdcs_pages: config.tdcs_pages.into(),
        tdvps_pages: config.tdvps_pages.into(),
        attributes_fixed0: config.attributes.fixed0,
        attributes_fixed1: config.attributes.fixed1,
        xfam_fixed0: config.xfam.fixed0,
        xfam_fixed1: config.xfam.fixed1,
        hkids_in_use: usage.hkids_in_use,
        pages: usage
            .pages
            .iter()
            .map(|(page_type, pages)| PageCount {
                page_type: page_type.0.into(),
                name: page_type.to_string(),
                pages_4k: *pages,
            })
            .collect(),
        max_calls: limits.max_calls,
        max_repeat: limits.max_repeat,
        max_message_bytes: limits.max_message_bytes,
        replay_window: limits.replay_window,
        five_level: config.five_level,
    }
}

fn tdmr_to_wire(tdmr: &Tdmr) -> WireTdmr {
    WireTdmr {
        base: tdmr.base.get(),
        size: tdmr.size,
        reserved: tdmr
            .reserved
            .iter()
            .map(|area| ReservedArea {
                base: area.start,
                size: area.end.saturating_sub(area.start),
            })
            .collect(),
        initialized: tdmr.initialized,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tdx_module::Release;

    fn resolve_file(text: &str) -> Result<PlatformConfig, PlatformFileError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        resolve(&Config {
            platform: Some(file.path().to_owned()),
            ..Config::default()
        })
    }

    #[test]
    fn a_file_replaces_what_it_names_and_nothing_else() {
        assert_eq!(resolve_file("").unwrap(), PlatformConfig::roomy());
        let platform = resolve_file(
            r#"
            release = "1.5.34"
            logical_processors = 8
            attributes = { fixed0 = "0x8000_0000_0000_0001" }

            [[tdmrs]]
            base = 0x4000_0000
            size = 0x4000_0000
            reserved = [{ base = 0x7000_0000, size = 0x100_0000 }]
            "#,
        )
        .unwrap();
        let expected = PlatformConfig {
            release: Release::R1_5_34,
            logical_processors: 8,
            attributes: Features {
                fixed0: 1 << 63 | 1,
                fixed1: 0,
            },
            tdmrs: vec![Tdmr {
                base: Hpa::new(0x4000_0000),
                size: 0x4000_0000,
                reserved: std::iter::once(0x7000_0000..0x7100_0000).collect(),
                initialized: true,
            }],
            ..PlatformConfig::roomy()
        };
        assert_eq!(platform, expected);
    }

    #[test]
    fn files_that_say_something_unknown_are_refused_with_the_word() {
        for (text, word) in [
            ("hkid_number = 3", "hkid_number"),
            ("release = \"1.4\"", "1.4"),
            ("attributes = { fixed0 = \"0xzz\" }", "0xzz"),
            ("hkid_bits = 300", "300"),
            ("[[tdmrs]]\nbase = 0", "size"),
            ("[[tdmrs]]\nbase = 0\nsize = 1\nkind = 2", "kind"),
            ("not toml", "not toml"),
        ] {
            let error = resolve_file(text).unwrap_err();
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert!(cause.contains(word), "{text}: {cause}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let config = Config {
            platform: Some("/nowhere/at/all.toml".into()),
            ..Config::default()
        };
        let error = resolve(&config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "platform file /nowhere/at/all.toml cannot be read"
        );
    }

    #[test]
    fn the_command_line_decides_the_release() {
        let config = Config {
            profile: Profile::Conformance,
            release: Some(Release::R1_5_34),
            ..Config::default()
        };
        let expected = PlatformConfig {
            release: Release::R1_5_34,
            ..PlatformConfig::conformance()
        };
        assert_eq!(resolve(&config).unwrap(), expected);
    }
}
