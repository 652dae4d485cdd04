//! The platform file as a fuzzer sees it: text in, a machine or a refusal out.
//!
//! What holds for every input
//! - X1  Nothing panics, also when a module is started on what the file describes.
//! - X2  Whether the machine is possible is said before the module starts: one that
//!   `PlatformConfig::validate` accepts starts, and one that it refuses does not.

use tdx_module::{Module, PlatformConfig};

use crate::platform;

/// Reads a platform file on top of each profile, and starts a module on what it says.
///
/// # Panics
///
/// When the reader or the module does something that it must not do, see the module.
pub fn fuzz_platform(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    for profile in [PlatformConfig::roomy(), PlatformConfig::conformance()] {
        let mut config = profile;
        if !platform::apply_text(text, &mut config) {
            return;
        }
        let verdict = config.validate();
        match (Module::new(config), verdict) {
            (Ok(_), Ok(())) => {}
            (Err(refusal), Err(verdict)) => assert_eq!(refusal, verdict, "X2"),
            (module, verdict) => panic!("X2: {:?} but {verdict:?}", module.err()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAMPLE: &str = r#"
release = "1.5.34"
hkid_bits = 6
hkid_start = 32
hkid_count = 8
global_hkid = 33
maxpa = 52
logical_processors = 8
packages = 2
tdcs_pages = 9
tdvps_pages = 6
attributes = { fixed0 = "0x8000000070000001", fixed1 = 0 }
xfam = { fixed0 = "0x7", fixed1 = 3 }
five_level = true
seamrr = { base = "0x7f000000", size = "16M" }
max_vcpus = 64

[[tdmrs]]
base = 0x4000_0000
size = 0x4000_0000
reserved = [{ base = 0x7000_0000, size = 0x100_0000 }]

[[tdmrs]]
base = "4G"
size = "1G"
initialized = false
"#;

    #[test]
    fn the_sample_is_read() {
        let mut config = PlatformConfig::roomy();
        assert!(platform::apply_text(SAMPLE, &mut config));
        assert_eq!(config.tdmrs.len(), 2);
        fuzz_platform(SAMPLE.as_bytes());
    }

    #[test]
    fn kept_files_pass() {
        super::super::tests::each_kept("platform", fuzz_platform);
    }

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            any::<u64>(),
            0..64u64,
            (0..64u32, 0..3u64).prop_map(|(bit, by)| (1u64 << bit).wrapping_sub(1) + by),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Numbers of the sample replaced by others: what is read is a machine or is refused.
        #[test]
        fn other_numbers_are_a_machine_or_a_refusal(
            changes in prop::collection::vec((any::<prop::sample::Index>(), number()), 1..4),
        ) {
            let mut lines: Vec<String> = SAMPLE.lines().map(str::to_owned).collect();
            for (at, value) in changes {
                let at = at.index(lines.len());
                if let Some((key, _)) = lines[at].clone().split_once(" = ")
                    && !lines[at].contains('{')
                {
                    lines[at] = format!("{key} = \"{value:#x}\"");
                    if !["base", "size"].contains(&key) {
                        lines[at] = format!("{key} = {}", value >> 1);
                    }
                }
            }
            fuzz_platform(lines.join("\n").as_bytes());
        }

        #[test]
        fn damaged_text_is_a_machine_or_a_refusal(
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0x20..0x7fu8), 1..8),
        ) {
            let mut bytes = SAMPLE.as_bytes().to_vec();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            fuzz_platform(&bytes);
        }
    }
}
