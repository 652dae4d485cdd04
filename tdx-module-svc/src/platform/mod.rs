//! The platform: from settings to the core, from the core to the wire.
//!
//! A profile gives every value. A platform file replaces what it names, and flags replace what
//! they name. Whether the result can be is the core's question, asked before the service listens.

mod describe;
mod file;
mod flags;
mod word;

use std::path::PathBuf;

use tdx_module::PlatformConfig;

use crate::config::{Config, Profile};

pub(crate) use describe::describe;
pub use flags::{AreaFlag, FeaturesFlag, HkidRange, PlatformFlags, TdmrFlag};

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
    /// Longer than any platform.
    #[error("platform file {} is longer than the limit of {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
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
    /// A reserved area without a TDMR around it.
    #[error("--reserved {base:#x}+{size:#x}: no TDMR holds its first byte")]
    NoTdmr {
        /// First byte.
        base: u64,
        /// Bytes.
        size: u64,
    },
}

/// Replaces what the text of a platform file names. Whether it is one.
pub(crate) fn apply_text(text: &str, platform: &mut PlatformConfig) -> bool {
    toml::from_str::<file::PlatformFile>(text).is_ok_and(|file| {
        file.apply(platform);
        true
    })
}

/// The platform that the settings describe.
pub(crate) fn resolve(config: &Config) -> Result<PlatformConfig, PlatformFileError> {
    let mut platform = match config.profile {
        Profile::Roomy => PlatformConfig::roomy(),
        Profile::Conformance => PlatformConfig::conformance(),
    };
    if let Some(path) = &config.platform {
        file::read(path)?.apply(&mut platform);
    }
    config.machine.apply(&mut platform)?;
    if let Some(release) = config.release {
        platform.release = release;
    }
    Ok(platform)
}

#[cfg(test)]
mod tests {
    use tdx_defs::Hpa;
    use tdx_module::{Features, Release, Tdmr};

    use super::*;

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

    /// The example of the documentation, by file and by flags.
    #[test]
    fn the_documented_file_and_the_documented_flags_are_the_same_platform() {
        use clap::Parser as _;

        #[derive(Debug, clap::Parser)]
        struct Args {
            #[command(flatten)]
            config: Config,
        }
        let documented = include_str!("../../../docs/configuration.md");
        let block = |start: &str| {
            let (_, text) = documented.split_once(start).unwrap();
            text.split_once("```").unwrap().0
        };
        let by_file = resolve_file(block("```toml\n")).unwrap();
        let line = block("```sh\n").replace('\\', " ");
        let args = Args::try_parse_from(line.split_whitespace()).unwrap();
        assert_eq!(resolve(&args.config).unwrap(), by_file);
        assert_eq!(by_file.validate(), Ok(()));
        assert_ne!(by_file, PlatformConfig::roomy());
    }

    /// Each key of a file stands in the first column of the table of the documentation.
    #[test]
    fn every_key_is_documented() {
        let documented = include_str!("../../../docs/configuration.md");
        let error = resolve_file("no_such_key = 1").unwrap_err();
        let known = std::error::Error::source(&error).unwrap().to_string();
        let (_, keys) = known.split_once("expected one of ").unwrap();
        let keys: Vec<&str> = keys.split('`').skip(1).step_by(2).collect();
        assert!(keys.len() > 10, "{known}");
        for key in keys {
            let column = format!("`{key}`");
            let is_row = |line: &str| {
                let first = line
                    .strip_prefix("| ")
                    .and_then(|rest| rest.split(" | ").next());
                first.is_some_and(|first| first.contains(&column))
            };
            assert!(documented.lines().any(is_row), "{key}");
        }
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
