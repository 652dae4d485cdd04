//! What a real KVM did, event by event, against what this model does.
//!
//! The recordings are tracefs output of Linux 6.18 on AMD nested paging, without time stamps:
//! steps of the program that drove the VM, then the events. Pages, table addresses and the bits
//! that the two formats spell differently are left out of the comparison; everything else has to
//! be there, in this order.
#![cfg(not(feature = "shuttle"))]

#[path = "../common/mod.rs"]
mod common;

use std::collections::BTreeMap;

use common::{Rig, platform_config, platform_of};
use tdp_mmu::{
    Event, Fault, Host, HostChange, HostPageSize, Mode, SlotSpec, Vm, VmConfig, VmError, VmKind,
};
use tdx_defs::Gpaw;

const RECORDINGS: [(&str, &str); 4] = [
    ("sample", include_str!("sample.txt")),
    ("notifier4k", include_str!("notifier4k.txt")),
    ("memslots_noquirk", include_str!("memslots_noquirk.txt")),
    ("prefault", include_str!("prefault.txt")),
];

struct Step<'a> {
    title: &'a str,
    fields: BTreeMap<&'a str, &'a str>,
    lines: Vec<&'a str>,
    result: i32,
    stat: BTreeMap<&'a str, &'a str>,
}

fn fields(text: &str) -> BTreeMap<&str, &str> {
    text.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect()
}

fn steps(text: &str) -> Vec<Step<'_>> {
    let mut steps: Vec<Step<'_>> = Vec::new();
    for line in text.lines() {
        let rest = line
            .strip_prefix("STEP ")
            .and_then(|rest| rest.split_once(' '))
            .map(|(_, rest)| rest);
        let last = steps.last_mut();
        match (rest, last) {
            (Some(rest), _) if rest.starts_with("BEGIN ") => steps.push(Step {
                title: &rest["BEGIN ".len()..],
                fields: fields(rest),
                lines: Vec::new(),
                result: 0,
                stat: BTreeMap::new(),
            }),
            (Some(rest), Some(step)) if rest.starts_with("END ") => {
                let errno = fields(rest)["errno"];
                step.result = errno.parse().unwrap();
            }
            (Some(rest), Some(step)) if rest.starts_with("STAT ") => step.stat = fields(rest),
            (_, Some(step)) => step.lines.push(line),
            (_, None) => panic!("{line} stands before the first step"),
        }
    }
    steps
}

fn hex(text: &str) -> u64 {
    let digits = text.trim_start_matches("0x");
    u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{text} is no number"))
}

/// The words of an event that both formats share.
fn essence(line: &str) -> String {
    let (name, text) = line.split_once(": ").unwrap();
    let word = |key: &str| {
        let mut words = text.split_whitespace().skip_while(|word| *word != key);
        words.nth(1).unwrap_or_else(|| panic!("{key} in {line}"))
    };
    match name {
        "kvm_page_fault" => format!("fault {:x}", hex(word("address"))),
        "kvm_tdp_mmu_spte_changed" => format!(
            "changed {} l{} {} {}",
            word("gfn"),
            word("level"),
            kind(hex(word("old_spte")), word("level")),
            kind(hex(word("new_spte")), word("level"))
        ),
        "kvm_mmu_spte_requested" => format!("requested {} l{}", word("gfn"), word("level")),
        "kvm_mmu_set_spte" => {
            let rights = text.split(['(', ')']).nth(1).unwrap();
            format!("set {} l{} {rights}", word("gfn"), word("level"))
        }
        "fast_page_fault" => format!(
            "fast {} {} spurious {} fixed {}",
            word("gva"),
            // Both set the bit for "user" at will.
            word("error_code").replace("|U", ""),
            word("spurious"),
            word("fixed")
        ),
        "mark_mmio_spte" => format!("mmio {} gen {}", word("gfn"), word("gen")),
        "check_mmio_spte" => format!(
            "check kvm_gen {} spte-gen {} valid {}",
            word("kvm_gen"),
            word("spte-gen"),
            word("valid")
        ),
        "kvm_mmu_split_huge_page" => format!("split {} l{}", word("gfn"), word("level")),
        // The text is the same in both, to the letter.
        "kvm_mmu_get_page" | "kvm_mmu_prepare_zap_page" | "kvm_unmap_hva_range" => {
            line.trim_end_matches('\0').to_owned()
        }
        _ => panic!("{line} is not known"),
    }
}

/// What an entry is; bit 11, bit 7 and bit 1 mean the same in both formats.
fn kind(spte: u64, level: &str) -> &'static str {
    const NP: u64 = 1 << 63;
    let leaf = level == "1" || spte & 1 << 7 != 0;
    match spte {
        NP => "np",
        spte if spte == NP | 0x5A0 => "frozen",
        spte if spte & 1 << 11 == 0 => "mmio",
        spte if leaf && spte & 2 != 0 => "leaf",
        _ if leaf => "protected",
        _ => "table",
    }
}

struct Player {
    vm: Vm,
}

impl Player {
    fn new(steps: &[Step<'_>]) -> Self {
        let host = Host::new(platform_of(&platform_config())).unwrap();
        let config = VmConfig {
            kind: VmKind::Ordinary,
            slot_zap_all: !steps
                .iter()
                .any(|step| step.title.starts_with("ENABLE_CAP cap=213")),
            ..VmConfig::default()
        };
        let vm = Vm::create_ordinary(host, config).unwrap();
        vm.trace(1 << 16);
        Self { vm }
    }

    fn play(&self, step: &Step<'_>) -> Result<(), VmError> {
        let get = |key: &str| hex(step.fields[key]);
        let vm = &self.vm;
        let name = step.title.split_whitespace().next().unwrap();
        match name {
            "CREATE_VM" | "ENABLE_CAP" => {}
            "CREATE_VCPU" => {
                vm.add_vcpu()?;
            }
            "SET_USER_MEMORY_REGION" => {
                let note = step.fields.get("note").copied().unwrap_or("");
                let huge = note.contains("THP");
                vm.set_user_memory_region(SlotSpec {
                    slot_id: u32::try_from(get("slot")).unwrap(),
                    gpa: get("gpa"),
                    size: get("size"),
                    userspace_addr: get("hva"),
                    log_dirty: get("flags") & 1 != 0,
                    read_only: get("flags") & 2 != 0,
                    host_page_size: match huge {
                        true => HostPageSize::Size2M,
                        false => HostPageSize::Size4K,
                    },
                    demand_zero: note.contains("not-populated"),
                    ..SlotSpec::default()
                })?;
            }
            "ACCESS" => return self.access(step),
            "GET_DIRTY_LOG" => {
                let (bits, _) = vm.get_dirty_log(u32::try_from(get("slot")).unwrap())?;
                let pages: Vec<String> = (0..bits.len() * 64)
                    .filter(|page| bits[page / 64] >> (page % 64) & 1 != 0)
                    .map(|page| format!("{page:x}"))
                    .collect();
                let dirty = step.lines.iter().find(|line| line.starts_with("DIRTY "));
                let listed = dirty.map_or("", |line| fields(line)["pages"]);
                assert_eq!(pages.join(","), listed, "{}", step.title);
            }
            "PRE_FAULT_MEMORY" => {
                let mut done = 0;
                let (gpa, size) = (get("gpa"), get("size"));
                let result = vm.pre_fault_memory(0, gpa, size, &mut |bytes| done = bytes);
                let line = step
                    .lines
                    .iter()
                    .find(|line| line.starts_with("PRE_FAULT "));
                let left = fields(line.unwrap());
                assert_eq!(hex(left["left_size"]), size - done, "{}", step.title);
                result?;
            }
            "MADVISE" | "MPROTECT" | "MUNMAP" => {
                let change = match step.title {
                    title if title.starts_with("MADVISE DONTNEED") => HostChange::DropToZero,
                    title if title.starts_with("MPROTECT READ|WRITE") => HostChange::ReadWrite,
                    title if title.starts_with("MPROTECT READ") => HostChange::ReadOnly,
                    _ => HostChange::NoAccess,
                };
                self.notify(step)?;
                vm.set_host_mapping(get("hva"), get("hva") + get("len"), change)?;
            }
            "VM_DESTROY" => {
                self.notify(step)?;
                vm.destroy()?;
            }
            _ => panic!("{} is no known step", step.title),
        }
        Ok(())
    }

    /// The notifier ranges that the host's memory management chose.
    fn notify(&self, step: &Step<'_>) -> Result<(), VmError> {
        let ranges = step.lines.iter().filter_map(|line| {
            let text = line.strip_prefix("kvm_unmap_hva_range: mmu notifier unmap range: ")?;
            text.split_once(" -- ")
        });
        for (start, end) in ranges {
            self.vm.notify_unmap(hex(start), hex(end))?;
        }
        Ok(())
    }

    fn access(&self, step: &Step<'_>) -> Result<(), VmError> {
        let faults = step
            .lines
            .iter()
            .filter(|line| line.starts_with("kvm_page_fault"));
        for line in faults {
            let mut words = line
                .split_whitespace()
                .skip_while(|word| *word != "address");
            let gpa = hex(words.nth(1).unwrap());
            let code = hex(words.nth(1).unwrap());
            self.vm.handle_fault(0, Fault::from_error_code(gpa, code))?;
        }
        Ok(())
    }

    fn stat(&self, name: &str) -> u64 {
        let stats = self.vm.stats();
        match name {
            "pages_4k" => stats.pages_4k,
            "pages_2m" => stats.pages_2m,
            "pages_1g" => stats.pages_1g,
            "pf_taken" => stats.counts.pf_taken,
            "pf_fixed" => stats.counts.pf_fixed,
            "pf_fast" => stats.counts.pf_fast,
            "pf_spurious" => stats.counts.pf_spurious,
            "pf_emulate" => stats.counts.pf_emulate,
            "pf_mmio_spte_created" => stats.counts.pf_mmio_spte_created,
            "remote_tlb_flush_requests" => stats.remote_tlb_flush_requests,
            "nx_lpage_splits" => stats.nx_lpage_splits,
            _ => panic!("{name} is not modelled"),
        }
    }
}

/// Statistics of what lies outside the model.
const OUTSIDE: [&str; 5] = [
    "remote_tlb_flush",
    "mmu_shadow_zapped",
    "mmu_cache_miss",
    "mmio_exits",
    "tlb_flush",
];

#[test]
fn recordings_of_a_real_kvm_are_played_event_by_event() {
    for (recording, text) in RECORDINGS {
        let steps = steps(text);
        let player = Player::new(&steps);
        let mut compared = 0;
        for (at, step) in steps.iter().enumerate() {
            let place = format!("{recording}, step {} {}", at + 1, step.title);
            let result = player.play(step).map_or_else(|error| error.errno(), |()| 0);
            assert_eq!(result, step.result, "{place}");
            let (events, lost) = player.vm.take_events();
            assert_eq!(lost, 0);
            compared += compare(&place, step, &events);
            for (name, value) in step.stat.iter().filter(|(name, _)| !OUTSIDE.contains(name)) {
                assert_eq!(player.stat(name).to_string(), *value, "{place}: {name}");
            }
        }
        let lines = text
            .lines()
            .filter(|line| line.starts_with(char::is_lowercase));
        assert_eq!(compared, lines.count(), "{recording}");
    }
}

/// How many events there were.
fn compare(place: &str, step: &Step<'_>, events: &[Event]) -> usize {
    let found: Vec<String> = events
        .iter()
        .map(|event| essence(&format!("{}: {event}", event.name())))
        .collect();
    let recorded: Vec<String> = step
        .lines
        .iter()
        .filter(|line| line.contains(": ") && line.starts_with(char::is_lowercase))
        .map(|line| essence(line))
        .collect();
    for (at, pair) in recorded.iter().zip(&found).enumerate() {
        assert_eq!(pair.1, pair.0, "{place}: event {at}");
    }
    assert_eq!(found.len(), recorded.len(), "{place}: {found:#?}");
    found.len()
}

#[test]
fn an_ordinary_vm_needs_no_module_and_gives_everything_back() {
    let rig = Rig::new();
    let vm = Vm::create_ordinary(rig.host.clone(), VmConfig::default()).unwrap();
    vm.add_vcpu().unwrap();
    vm.set_user_memory_region(common::user_slot(0, 0, 512))
        .unwrap();
    let fault = Fault {
        gpa: 0x1000,
        qualification: 4,
        ..Fault::default()
    };
    vm.handle_fault(0, fault).unwrap();
    assert_eq!((vm.info().kind, vm.info().pages_4k), (VmKind::Ordinary, 1));
    assert_eq!(
        vm.set_memory_attributes(0, 0x1000, 8).unwrap_err().errno(),
        22
    );
    vm.destroy().unwrap();
    assert_eq!(rig.port.take_calls(), []);
    assert_eq!(rig.host.pages_in_use(), 0);
}

#[test]
fn a_private_fault_prints_what_a_td_host_prints() {
    for mode in [Mode::Kernel, Mode::Batched] {
        let rig = Rig::new();
        let vm = rig.empty(mode, Gpaw::W48);
        vm.trace(64);
        vm.handle_fault(0, common::private(1)).unwrap();
        let walk = vm.walk(0x1000, false).unwrap();
        let entries: Vec<u64> = walk.entries.iter().map(|entry| entry.spte).collect();
        let [l3, l2, l1, leaf] = entries[..] else {
            panic!("{entries:x?}");
        };
        let (pfn, table) = (walk.entries[3].hpa >> 12, walk.entries[2].hpa);
        let expected = format!(
            "kvm_page_fault: vcpu 0 rip 0x0 address 0x0000000000001000 error_code 0x2
kvm_mmu_spte_requested: gfn 1 pfn {pfn:x} level 1
kvm_mmu_get_page: sp gen 0 gfn 0 l3 8-byte q0 direct wux nxe ad root 0 sync new
kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 4 old_spte 8000000000000000 new_spte {l3:x}
kvm_mmu_get_page: sp gen 0 gfn 0 l2 8-byte q0 direct wux nxe ad root 0 sync new
kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 3 old_spte 8000000000000000 new_spte {l2:x}
kvm_mmu_get_page: sp gen 0 gfn 0 l1 8-byte q0 direct wux nxe ad root 0 sync new
kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 2 old_spte 8000000000000000 new_spte {l1:x}
kvm_tdp_mmu_spte_changed: as id 0 gfn 1 level 1 old_spte 8000000000000000 new_spte {leaf:x}
kvm_mmu_set_spte: gfn 1 spte {leaf:x} (rwxu) level 1 at {:x}",
            table + 8
        );
        let (events, _) = vm.take_events();
        let found: Vec<String> = events
            .iter()
            .map(|event| format!("{}: {event}", event.name()))
            .collect();
        assert_eq!(found.join("\n"), expected, "{mode:?}");
        assert_eq!(leaf & 0xFFF, 0xB37);
    }
}
