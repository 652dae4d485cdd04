//! How many SEAMCALLs building and converting take: formulas for any range, and the numbers of
//! the sizes that people ask about.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::ops::Range;

use common::port::Rule;
use common::state::check_invariants;
use common::{Rig, gmem_slot};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use tdp_mmu::{Counts, InitRegion, Measure, Mode, Vm};
use tdx_defs::{Gpaw, Leaf};
use tdx_module::PlatformConfig;

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

/// TDH.MEM.SEPT.ADDs since the calls were last taken: for each level the tables of that level,
/// which TDX counts from the entry that links them.
fn check_levels(rig: &Rig, range: &Range<u64>, gpaw: Gpaw) {
    let calls = rig.port.take_calls();
    let root_level = if gpaw == Gpaw::W48 { 4 } else { 5 };
    for level in 1..root_level {
        let span = 512u64.pow(level);
        let expected = (range.end - 1) / span - range.start / span + 1;
        let found = calls
            .iter()
            .filter(|call| call.leaf == Leaf::MEM_SEPT_ADD && call.rcx & 7 == u64::from(level))
            .count();
        assert_eq!(found as u64, expected, "{range:x?} level {level}");
    }
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
    rig.port.record(true);
    rig.port.take_calls();
    let built = prefault(&vm, range);
    check_levels(&rig, range, gpaw);
    rig.port.record(false);
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

/// The same range as initial image, measured or not: added, extended, and taken away again.
fn check_image(mode: Mode, gpaw: Gpaw, range: &Range<u64>, measure: Measure) {
    let rig = Rig::new();
    rig.port.record(false);
    let vm = rig.create(mode, gpaw).unwrap();
    vm.add_vcpu().unwrap();
    let (gpa, size) = (range.start << 12, (range.end - range.start) << 12);
    let leaves = range.end - range.start;
    vm.set_user_memory_region(gmem_slot(0, range.start, leaves))
        .unwrap();
    vm.set_memory_attributes(gpa, size, 8).unwrap();
    vm.load_mmu(0).unwrap();
    let region = InitRegion {
        gpa,
        size,
        data: Default::default(),
        measure,
    };
    let built = vm.init_mem_region(0, region).unwrap().seamcalls;
    let extends = if measure == Measure::Extend { 16 } else { 0 };
    assert_eq!(built.get(Leaf::MEM_SEPT_ADD), tables(range, gpaw));
    assert_eq!(built.get(Leaf::MEM_PAGE_ADD), leaves);
    assert_eq!(built.get(Leaf::MR_EXTEND), extends * leaves);
    assert_eq!(
        built.total(),
        tables(range, gpaw) + (1 + extends) * leaves,
        "{range:x?}"
    );
    let removed = make_shared(&vm, range);
    assert_eq!(removed.seamcalls.get(Leaf::MEM_TRACK), 0);
    assert_eq!(
        removed.seamcalls.total(),
        3 * leaves,
        "nothing is tracked before the TD runs"
    );
    assert_eq!((removed.kicks, removed.flushes), (0, 1));
    check_invariants(&vm, &rig);
    common::state::destroy(&vm, &rig);
}

/// Shared memory costs no call, whatever its size: one flush when something was mapped.
fn check_shared(mode: Mode, gpaw: Gpaw, range: &Range<u64>) {
    let rig = Rig::new();
    let vm = vm(&rig, mode, gpaw, range);
    make_shared(&vm, range);
    let private = |vm: &Vm| {
        let (gpa, size) = (range.start << 12, (range.end - range.start) << 12);
        vm.set_memory_attributes(gpa, size, 8).unwrap()
    };
    let unmapped = private(&vm);
    assert_eq!((unmapped.seamcalls.total(), unmapped.flushes), (0, 0));
    make_shared(&vm, range);
    let built = prefault(&vm, range);
    assert_eq!(built.seamcalls.total(), 0);
    assert_eq!(built.pages_mapped, range.end - range.start);
    let back = private(&vm);
    assert_eq!((back.seamcalls.total(), back.flushes), (0, 1));
    assert_eq!(
        (back.kicks, back.pages_zapped),
        (0, range.end - range.start)
    );
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

    #[test]
    fn an_initial_image_follows_them_too(
        range in range(),
        wide in any::<bool>(),
        kernel in any::<bool>(),
        measured in any::<bool>(),
    ) {
        let range = range.start..range.end.min(range.start + 150);
        let gpaw = if wide { Gpaw::W52 } else { Gpaw::W48 };
        let mode = if kernel { Mode::Kernel } else { Mode::Batched };
        let measure = if measured { Measure::Extend } else { Measure::No };
        check_image(mode, gpaw, &range, measure);
    }

    #[test]
    fn shared_memory_takes_no_call_for_any_range(
        range in range(),
        wide in any::<bool>(),
        kernel in any::<bool>(),
    ) {
        let gpaw = if wide { Gpaw::W52 } else { Gpaw::W48 };
        check_shared(if kernel { Mode::Kernel } else { Mode::Batched }, gpaw, &range);
    }

    #[test]
    fn a_life_takes_the_calls_of_its_phases(
        (packages, tdcs, tdvps) in (prop_oneof![Just(1u32), Just(2), Just(4)], 4u8..=6, 2u8..=6),
        vcpus in 1u32..=4,
        range in range(),
        wide in any::<bool>(),
    ) {
        let range = range.start..range.end.min(range.start + 40);
        let gpaw = if wide { Gpaw::W52 } else { Gpaw::W48 };
        check_life(&Life { packages, tdcs, tdvps, vcpus }, gpaw, &range);
    }
}

/// The platform and the size of a TD.
struct Life {
    packages: u32,
    tdcs: u8,
    tdvps: u8,
    vcpus: u32,
}

/// From KVM_TDX_INIT_VM to the last page: K packages, C TDCS pages, X TDCX pages a vCPU, V vCPUs,
/// S private tables, N leaves.
fn check_life(life: &Life, gpaw: Gpaw, range: &Range<u64>) {
    let (k, c) = (u64::from(life.packages), u64::from(life.tdcs));
    let (x, v) = (u64::from(life.tdvps) - 1, u64::from(life.vcpus));
    let rig = Rig::on(PlatformConfig {
        packages: life.packages,
        tdcs_pages: life.tdcs,
        tdvps_pages: life.tdvps,
        ..common::platform_config()
    });
    rig.port.record(false);
    let vm = rig.uninitialized(Mode::Kernel, gpaw);
    assert_eq!(vm.init().unwrap().seamcalls.total(), k + c + 4, "INIT_VM");
    for _ in 0..life.vcpus {
        let (_, counts) = vm.add_vcpu().unwrap();
        assert_eq!(counts.seamcalls.total(), x + 5, "INIT_VCPU");
    }
    for vcpu in 0..life.vcpus {
        let counts = vm.load_mmu(vcpu).unwrap();
        assert_eq!(counts.seamcalls.total(), 1, "loading the roots");
    }
    let n = range.end - range.start;
    vm.set_user_memory_region(gmem_slot(0, range.start, n))
        .unwrap();
    vm.set_memory_attributes(range.start << 12, n << 12, 8)
        .unwrap();
    let (_, counts) = vm.finalize().unwrap();
    assert_eq!(counts.seamcalls.total(), 1, "FINALIZE_VM");
    prefault(&vm, range);
    let s = tables(range, gpaw);
    let (counts, leaked) = vm.destroy().unwrap();
    assert_eq!(leaked, 0);
    for (leaf, expected) in [
        (Leaf::MEM_PAGE_REMOVE, n),
        (Leaf::VP_FLUSH, v),
        (Leaf::MNG_VPFLUSHDONE, 1),
        (Leaf::PHYMEM_CACHE_WB, k),
        (Leaf::MNG_KEY_FREEID, 1),
        (Leaf::PHYMEM_PAGE_RECLAIM, v * (x + 1) + s + c + 1),
        // Of each leaf, and of the TDR.
        (Leaf::PHYMEM_PAGE_WBINVD, n + 1),
    ] {
        assert_eq!(counts.seamcalls.get(leaf), expected, "{leaf}");
    }
    let release = v + 1 + k + 1;
    let reclaim = v * (x + 1) + s + c + 1 + 1;
    assert_eq!(counts.seamcalls.total(), 4 * n + release + reclaim);
    common::state::assert_nothing_left(&rig);
}

#[test]
fn a_leaf_takes_at_most_seven_calls_and_four_kicks() {
    for mode in [Mode::Kernel, Mode::Batched] {
        let rig = Rig::new();
        let vm = vm(&rig, mode, Gpaw::W48, &(0..16));
        prefault(&vm, &(1..2));
        for leaf in [
            Leaf::MEM_RANGE_BLOCK,
            Leaf::MEM_TRACK,
            Leaf::MEM_PAGE_REMOVE,
        ] {
            rig.port.inject(Rule::busy(leaf, 1));
        }
        let counts = make_shared(&vm, &(1..2));
        assert_eq!(counts.seamcalls.total(), 7, "{mode:?}");
        assert_eq!((counts.kicks, counts.flushes), (4, 1), "{mode:?}");
        assert_eq!(vm.bugs().reports(), []);
        check_invariants(&vm, &rig);
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
fn the_largest_row_of_the_table_is_what_the_formula_says() {
    for (pages, four) in [(262_144, 514), (1_048_576, 2053)] {
        assert_eq!(tables(&(0..pages), Gpaw::W48), four);
        assert_eq!(tables(&(0..pages), Gpaw::W52), four + 1);
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
            // Blocks with TRACK, removals and write-backs of a chunk are a message each.
            Mode::Batched => assert_eq!(removed.rpcs, 3 * 64),
        }
        check_invariants(&vm, &rig);
        common::state::destroy(&vm, &rig);
    }
}
