//! How many SEAMCALLs building and converting take: formulas for any range, and the numbers of
//! the sizes that people ask about.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::ops::Range;

use common::state::check_invariants;
use common::{Rig, gmem_slot};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use tdp_mmu::{Counts, Mode, Vm};
use tdx_defs::{Gpaw, Leaf};

/// Leaves that mode `batched` blocks before it tracks once.
const CHUNK: u64 = 4096;

/// A running TD with one private slot over a range.
fn vm(rig: &Rig, mode: Mode, gpaw: Gpaw, slot: &Range<u64>) -> Vm {
    rig.port.record(false);
    let vm = rig.create(mode, gpaw).unwrap();
    vm.add_vcpu().unwrap();
    vm.set_user_memory_region(gmem_slot(0, slot.start, slot.end - slot.start))
        .unwrap();
    vm.set_memory_attributes(slot.start << 12, (slot.end - slot.start) << 12, 8)
        .unwrap();
    vm.load_mmu(0).unwrap();
    vm.finalize().unwrap();
    vm
}

fn prefault(vm: &Vm, range: &Range<u64>) -> Counts {
    let (gpa, size) = (range.start << 12, (range.end - range.start) << 12);
    vm.pre_fault_memory(0, gpa, size, &mut |_| {}).unwrap()
}

fn make_shared(vm: &Vm, range: &Range<u64>) -> Counts {
    let (gpa, size) = (range.start << 12, (range.end - range.start) << 12);
    vm.set_memory_attributes(gpa, size, 0).unwrap()
}

/// Tables that a range needs in an empty tree, the root left out: for each level the distinct
/// tables that hold its entries.
fn tables(range: &Range<u64>, gpaw: Gpaw) -> u64 {
    let root_level = if gpaw == Gpaw::W48 { 4 } else { 5 };
    let at_level = |level: u32| {
        let span = 512u64.pow(level);
        (range.end - 1) / span - range.start / span + 1
    };
    (1..root_level).map(at_level).sum()
}

/// Calls of a conversion to shared in one mode: (leaf, calls).
fn removal(mode: Mode, leaves: u64) -> [(Leaf, u64); 4] {
    let tracks = if mode == Mode::Kernel {
        leaves
    } else {
        leaves.div_ceil(CHUNK)
    };
    [
        (Leaf::MEM_RANGE_BLOCK, leaves),
        (Leaf::PHYMEM_PAGE_WBINVD, leaves),
        (Leaf::MEM_PAGE_REMOVE, leaves),
        (Leaf::MEM_TRACK, tracks),
    ]
}

fn check_removal(counts: &Counts, mode: Mode, leaves: u64) {
    let calls = removal(mode, leaves);
    for (leaf, expected) in calls {
        assert_eq!(counts.seamcalls.get(leaf), expected, "{mode:?} {leaf}");
    }
    let total: u64 = calls.iter().map(|(_, calls)| calls).sum();
    assert_eq!(
        counts.seamcalls.total(),
        total,
        "{mode:?}: nothing else is called"
    );
    let kicks = if mode == Mode::Kernel {
        leaves
    } else {
        leaves.div_ceil(CHUNK)
    };
    assert_eq!(
        (counts.kicks, counts.flushes),
        (kicks, 1),
        "{mode:?} kicks and flushes"
    );
    assert_eq!(counts.pages_zapped, leaves);
}

/// Builds a range, takes it away, builds it again: counts of each.
fn check_range(mode: Mode, gpaw: Gpaw, range: &Range<u64>) {
    let rig = Rig::new();
    let vm = vm(&rig, mode, gpaw, range);
    let leaves = range.end - range.start;
    let built = prefault(&vm, range);
    assert_eq!(
        built.seamcalls.get(Leaf::MEM_SEPT_ADD),
        tables(range, gpaw),
        "{range:x?}"
    );
    assert_eq!(built.seamcalls.get(Leaf::MEM_PAGE_AUG), leaves);
    assert_eq!(built.seamcalls.total(), tables(range, gpaw) + leaves);
    check_removal(&make_shared(&vm, range), mode, leaves);
    let (gpa, size) = (range.start << 12, leaves << 12);
    let back = vm.set_memory_attributes(gpa, size, 8).unwrap();
    assert_eq!(back.seamcalls.total(), 0, "to private costs nothing");
    let again = prefault(&vm, range);
    assert_eq!(again.seamcalls.total(), leaves, "tables stay");
    check_invariants(&vm, &rig);
    common::state::destroy(&vm, &rig);
}

/// Ranges near the places where one more table is needed.
fn range() -> impl Strategy<Value = Range<u64>> {
    let edge = prop_oneof![
        Just(0u64),
        Just(512),
        Just(512 * 512),
        Just(512 * 512 * 512),
        (0u64..1 << 34).prop_map(|gfn| gfn / 512 * 512),
    ];
    (edge, 0u64..600, 1u64..1400).prop_map(|(edge, before, pages)| {
        let start = edge.saturating_sub(before);
        start..start + pages
    })
}

fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct("tests/formulas.proptest-regressions");
    ProptestConfig {
        failure_persistence: Some(Box::new(file)),
        ..ProptestConfig::with_cases(48)
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn calls_follow_the_formulas_for_any_range(
        range in range(),
        wide in any::<bool>(),
        kernel in any::<bool>(),
    ) {
        let gpaw = if wide { Gpaw::W52 } else { Gpaw::W48 };
        check_range(if kernel { Mode::Kernel } else { Mode::Batched }, gpaw, &range);
    }
}

#[test]
fn building_takes_the_calls_of_the_table() {
    for (pages, first, four, five) in [
        (1, 0, 3, 4),
        (2, 511, 4, 5),
        (512, 0, 3, 4),
        (512, 1, 4, 5),
        (513, 0, 4, 5),
        (4096, 0, 10, 11),
        (65_536, 0, 130, 131),
    ] {
        for (gpaw, expected) in [(Gpaw::W48, four), (Gpaw::W52, five)] {
            let range = first..first + pages;
            let rig = Rig::new();
            let vm = vm(&rig, Mode::Batched, gpaw, &range);
            let counts = prefault(&vm, &range);
            let case = format!("{pages} pages from {first:#x}, {gpaw:?}");
            assert_eq!(counts.seamcalls.get(Leaf::MEM_SEPT_ADD), expected, "{case}");
            assert_eq!(counts.seamcalls.total(), expected + pages, "{case}");
        }
    }
}

#[test]
fn a_gibibyte_is_built_and_converted_with_the_exact_numbers_in_both_modes() {
    let range = 0..262_144;
    for mode in [Mode::Kernel, Mode::Batched] {
        let rig = Rig::new();
        let vm = vm(&rig, mode, Gpaw::W48, &range);
        let built = prefault(&vm, &range);
        assert_eq!(built.seamcalls.get(Leaf::MEM_SEPT_ADD), 514, "{mode:?}");
        assert_eq!(built.seamcalls.get(Leaf::MEM_PAGE_AUG), 262_144, "{mode:?}");
        let messages = if mode == Mode::Kernel {
            262_658..=262_658
        } else {
            64..=68
        };
        assert!(
            messages.contains(&built.rpcs),
            "{mode:?}: {} messages",
            built.rpcs
        );
        let removed = make_shared(&vm, &range);
        check_removal(&removed, mode, 262_144);
        match mode {
            Mode::Kernel => {
                assert_eq!(removed.seamcalls.total(), 4 * 262_144);
                assert_eq!(removed.rpcs, 4 * 262_144);
            }
            // Block, track, remove and write-back of a chunk are a message each.
            Mode::Batched => assert_eq!(removed.rpcs, 4 * 64),
        }
        check_invariants(&vm, &rig);
        common::state::destroy(&vm, &rig);
    }
}
