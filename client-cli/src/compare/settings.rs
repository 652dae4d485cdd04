//! What must be known of a recording before its VM is made: the settings of the host and the VM
//! that KVM was run with. Some are said by a step, some only show in what KVM did.

use mirror_proto::mmu::{DirtyLogMode, HostPageSize};

use super::arguments::{flags, number};
use super::recording::Step;
use super::spte::{Format, Kind};
use crate::trace::hex;

/// KVM_CAP_DISABLE_QUIRKS and KVM_CAP_DISABLE_QUIRKS2.
pub(super) const CAP_QUIRKS: [u64; 2] = [116, 213];
/// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
pub(super) const CAP_MANUAL_LOG: u64 = 168;
/// KVM_X86_QUIRK_SLOT_ZAP_ALL.
const QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;
/// KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_GUEST_MEMFD.
pub(super) const LOG_DIRTY: u64 = 1 << 0;
pub(super) const READ_ONLY: u64 = 1 << 1;
pub(super) const GUEST_MEMFD: u64 = 1 << 2;
const FLAGS: [(&str, u64); 5] = [
    ("LOG_DIRTY_PAGES", LOG_DIRTY),
    ("LOG_DIRTY", LOG_DIRTY),
    ("READONLY", READ_ONLY),
    ("READ_ONLY", READ_ONLY),
    ("GUEST_MEMFD", GUEST_MEMFD),
];
/// Requests for huge pages that are looked at for one slot.
const MAX_REQUESTS: usize = 1 << 16;

/// The settings of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) format: Format,
    pub(super) gpaw: u32,
    pub(super) dirty_log: DirtyLogMode,
    pub(super) slot_zap_all: bool,
    pub(super) eager_page_split: bool,
    pub(super) nx_huge_pages: bool,
    /// Whether the host looks at accessed bits.
    pub(super) ages: bool,
    /// Step, frame and level of faults that asked for a huge page.
    huge_requests: Vec<(usize, u64, u64)>,
}

fn word<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split_whitespace()
        .skip_while(|word| *word != key)
        .nth(1)
}

fn hex_word(text: &str, key: &str) -> Option<u64> {
    hex("", word(text, key)?).ok()
}

impl Settings {
    /// Of the VM whose steps these are.
    pub(super) fn of(steps: &[Step]) -> Self {
        let mut settings = Self {
            format: format(steps),
            gpaw: 48,
            dirty_log: DirtyLogMode::Protect,
            slot_zap_all: true,
            eager_page_split: true,
            nx_huge_pages: false,
            ages: false,
            huge_requests: Vec::new(),
        };
        let mut huge_leaf_seen = false;
        for (at, step) in steps.iter().enumerate() {
            settings.say(step);
            for line in &step.lines {
                match &*line.name {
                    "kvm_mmu_get_page" if line.text.contains(" l5 ") => settings.gpaw = 52,
                    "kvm_age_hva" | "kvm_test_age_hva" => settings.ages = true,
                    "kvm_mmu_spte_requested" => {
                        if let (Some(gfn), Some(level)) =
                            (hex_word(&line.text, "gfn"), hex_word(&line.text, "level"))
                            && level > 1
                        {
                            settings.huge_requests.push((at, gfn, level));
                        }
                    }
                    // The first huge leaf tells whether they are executable.
                    "kvm_mmu_set_spte" if !huge_leaf_seen => {
                        if let (Some(spte), Some(level)) =
                            (hex_word(&line.text, "spte"), hex_word(&line.text, "level"))
                            && level > 1
                            && let Kind::Leaf(rights) = settings.format.decode(spte, level).kind
                        {
                            huge_leaf_seen = true;
                            settings.nx_huge_pages = !rights.exec;
                        }
                    }
                    _ => {}
                }
            }
            if step.verb().starts_with("SET_USER_MEMORY_REGION")
                && slot_flags(step).is_ok_and(|flags| flags & LOG_DIRTY != 0)
                && step
                    .lines
                    .iter()
                    .any(|line| settings.protects_a_huge_leaf(line))
            {
                // Otherwise there would have been no huge leaf left to protect.
                settings.eager_page_split = false;
            }
        }
        settings
    }

    /// What a step says outright.
    fn say(&mut self, step: &Step) {
        let cap = capability(step).unwrap_or(0);
        let arg = step.number(&["arg0", "args0", "arg"]).unwrap_or(0);
        if step.verb() == "ENABLE_CAP" && step.outcome.is_none_or(|outcome| outcome.rc >= 0) {
            if CAP_QUIRKS.contains(&cap) && arg & QUIRK_SLOT_ZAP_ALL != 0 {
                self.slot_zap_all = false;
            }
            if cap == CAP_MANUAL_LOG {
                self.dirty_log = match arg & 3 {
                    0 => DirtyLogMode::Protect,
                    1 => DirtyLogMode::Manual,
                    _ => DirtyLogMode::ManualInitiallySet,
                };
            }
        }
        if let Some(eager) = parameter(step, "eager_page_split") {
            self.eager_page_split = eager;
        }
    }

    fn protects_a_huge_leaf(&self, line: &super::Line) -> bool {
        let entry = |key, level| Some(self.format.decode(hex_word(&line.text, key)?, level).kind);
        let level = hex_word(&line.text, "level").unwrap_or(1);
        let both = || Some((entry("old_spte", level)?, entry("new_spte", level)?));
        line.name == "kvm_tdp_mmu_spte_changed"
            && level > 1
            && matches!(both(), Some((Kind::Leaf(old), Kind::Leaf(new))) if old.write && !new.write)
    }

    /// The largest page that a fault asked for in a range of frames, from a step on.
    pub(super) fn largest(&self, from: usize, first: u64, pages: u64) -> HostPageSize {
        let requests = self.huge_requests.iter().filter(|(at, ..)| *at >= from);
        let inside = requests
            .take(MAX_REQUESTS)
            .filter(|(_, gfn, _)| gfn.checked_sub(first).is_some_and(|offset| offset < pages));
        page_size(inside.map(|(.., level)| *level).max().unwrap_or(1))
    }
}

/// The capability of a step, by number or by name.
pub(super) fn capability(step: &Step) -> Result<u64, String> {
    let named = step.field("cap").map(str::to_ascii_uppercase);
    let named = named.unwrap_or_else(|| step.words());
    match named.strip_prefix("KVM_CAP_").unwrap_or(&named) {
        "DISABLE_QUIRKS" => Ok(CAP_QUIRKS[0]),
        "DISABLE_QUIRKS2" => Ok(CAP_QUIRKS[1]),
        "MANUAL_DIRTY_LOG_PROTECT2" => Ok(CAP_MANUAL_LOG),
        _ => step.number(&["cap"]),
    }
}

/// Flags of a slot, by number or by name.
pub(super) fn slot_flags(step: &Step) -> Result<u64, String> {
    let given = step.field("flags").unwrap_or("0");
    flags(given, &FLAGS).ok_or_else(|| format!("flags: {given:.40} are not known"))
}

/// The page of a leaf of a level.
pub(super) fn page_size(level: u64) -> HostPageSize {
    match level {
        0 | 1 => HostPageSize::HostPageSize4k,
        2 => HostPageSize::HostPageSize2m,
        _ => HostPageSize::HostPageSize1g,
    }
}

/// The value that a step gives to a module parameter: `NAME=VALUE`, or `name=NAME value=VALUE`.
pub(super) fn parameter(step: &Step, name: &str) -> Option<bool> {
    let named = ["name", "param", "path", "parameter"].iter().any(|key| {
        step.field(key)
            .is_some_and(|given| given.rsplit('/').next() == Some(name))
    });
    let value = match step.field(name) {
        Some(value) => value,
        None if named => step.field("value").or_else(|| step.field("val"))?,
        None => return None,
    };
    match value.to_ascii_lowercase().as_str() {
        "y" | "on" | "force" | "true" => Some(true),
        "n" | "off" | "never" | "false" => Some(false),
        other => number(other).map(|value| value != 0),
    }
}

/// The form of the entries, from the first table that is linked.
fn format(steps: &[Step]) -> Format {
    let lines = steps.iter().flat_map(|step| &step.lines);
    let tables = lines
        .filter(|line| line.name == "kvm_tdp_mmu_spte_changed")
        .filter_map(|line| {
            let (level, spte) = (
                hex_word(&line.text, "level")?,
                hex_word(&line.text, "new_spte")?,
            );
            let is_table = Format::Npt.decode(spte, level).kind == Kind::Table;
            is_table.then_some(spte)
        });
    tables.map(Format::of_table).next().unwrap_or(Format::Npt)
}

#[cfg(test)]
mod tests {
    use super::super::Recording;
    use super::*;

    fn of(text: &str) -> Settings {
        Settings::of(&Recording::read(text.as_bytes()).unwrap().steps)
    }

    #[test]
    fn steps_say_the_settings_and_events_show_them() {
        let plain = of("STEP 1 BEGIN CREATE_VM vcpus=1\n");
        assert_eq!((plain.format, plain.gpaw), (Format::Npt, 48));
        assert!(plain.slot_zap_all && plain.eager_page_split && !plain.nx_huge_pages);
        let said = of(
            "STEP 1 BEGIN ENABLE_CAP cap=213 arg0=0x80\nSTEP 1 END rc=0 errno=0\n\
            STEP 2 BEGIN ENABLE_CAP cap=168 arg0=0x3\nSTEP 2 END rc=0 errno=0\n\
            STEP 3 BEGIN SET_PARAM name=eager_page_split value=N\n",
        );
        assert_eq!(said.dirty_log, DirtyLogMode::ManualInitiallySet);
        assert!(!said.slot_zap_all && !said.eager_page_split);
        let refused = of("STEP 1 BEGIN ENABLE_CAP cap=213 arg0=0x80\nSTEP 1 END rc=-1 errno=22\n");
        assert!(refused.slot_zap_all);
        let shown = of("STEP 1 BEGIN ACCESS\n\
            kvm_mmu_get_page: sp gen 0 gfn 0 l5 8-byte q0 direct wux nxe ad root 0 sync new\n\
            kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 5 old_spte 0 new_spte 600000146cd2907\n\
            kvm_mmu_spte_requested: gfn 205 pfn 5 level 2\n\
            kvm_mmu_set_spte: gfn 200 spte 600000148000bb3 (rw-u) level 2 at 0\n\
            kvm_age_hva: mmu notifier age hva: 0x1 -- 0x2\n\
            STEP 2 BEGIN SET_USER_MEMORY_REGION flags=0x1\n\
            kvm_tdp_mmu_spte_changed: as id 0 gfn 200 level 2 old_spte 600000148000bb3 new_spte 600000148000bb1\n");
        assert_eq!((shown.format, shown.gpaw), (Format::Ept, 52));
        assert!(shown.ages && shown.nx_huge_pages && !shown.eager_page_split);
        assert_eq!(shown.largest(0, 0x200, 0x200), HostPageSize::HostPageSize2m);
        assert_eq!(shown.largest(0, 0x400, 0x200), HostPageSize::HostPageSize4k);
        assert_eq!(shown.largest(1, 0x200, 0x200), HostPageSize::HostPageSize4k);
    }
}
