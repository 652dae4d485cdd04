//! Answers and calls that are lost, one for every call of a TD's life: each outcome is looked up,
//! and the life goes on. Only what nobody can look up ends the VM, with a reason.
#![cfg(not(feature = "shuttle"))]

mod common;

use common::port::{Effect, Rule};
use common::state::{self, check_invariants};
use common::{Rig, gmem_slot, private};
use tdp_mmu::{InitRegion, Measure, Mode, Vm, VmConfig, VmError};
use tdx_defs::{Gpaw, Leaf};

const PAGE: u64 = 4096;

/// From KVM_TDX_INIT_VM to the last zap.
fn live(vm: &Vm) -> Result<(), VmError> {
    vm.init()?;
    vm.add_vcpu()?;
    vm.set_user_memory_region(gmem_slot(0, 0, 0x400))?;
    vm.set_memory_attributes(0, 0x400 * PAGE, 8)?;
    for (first, measure) in [(0, Measure::No), (2, Measure::Extend)] {
        let region = InitRegion {
            gpa: first * PAGE,
            size: 2 * PAGE,
            data: vec![7; 100].into(),
            measure,
        };
        vm.init_mem_region(0, region)?;
    }
    vm.finalize()?;
    for gfn in [0x200, 0x201] {
        vm.handle_fault(0, private(gfn))?;
    }
    vm.pre_fault_memory(0, 8 * PAGE, 6 * PAGE, &mut |_| {})?;
    vm.set_memory_attributes(9 * PAGE, 4 * PAGE, 0)?;
    vm.punch_hole(0, 0, PAGE)?;
    Ok(())
}

/// What an operation may come to that lost `leaf`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// As if nothing had been lost.
    Unnoticed,
    /// KVM_TDX_INIT_VM fails and is undone.
    NoTd,
    /// Nobody can tell what MRTD or the vCPU is: the VM is dead, and can be taken down.
    Dead,
}

const LEAVES: &[(Leaf, End)] = &[
    (Leaf::MNG_CREATE, End::NoTd),
    (Leaf::MNG_KEY_CONFIG, End::NoTd),
    (Leaf::MNG_ADDCX, End::NoTd),
    (Leaf::MNG_INIT, End::NoTd),
    (Leaf::VP_CREATE, End::Dead),
    (Leaf::VP_ADDCX, End::Dead),
    (Leaf::VP_INIT, End::Dead),
    (Leaf::VP_WR, End::Dead),
    (Leaf::MEM_SEPT_ADD, End::Unnoticed),
    (Leaf::MEM_PAGE_ADD, End::Unnoticed),
    (Leaf::MR_EXTEND, End::Dead),
    (Leaf::MR_FINALIZE, End::Unnoticed),
    (Leaf::MEM_PAGE_AUG, End::Unnoticed),
    (Leaf::MEM_RANGE_BLOCK, End::Unnoticed),
    (Leaf::MEM_TRACK, End::Unnoticed),
    (Leaf::MEM_PAGE_REMOVE, End::Unnoticed),
    (Leaf::PHYMEM_PAGE_WBINVD, End::Unnoticed),
    (Leaf::VP_FLUSH, End::Unnoticed),
    (Leaf::MNG_VPFLUSHDONE, End::Unnoticed),
    (Leaf::PHYMEM_CACHE_WB, End::Unnoticed),
    (Leaf::MNG_KEY_FREEID, End::Unnoticed),
    (Leaf::PHYMEM_PAGE_RECLAIM, End::Unnoticed),
];

#[test]
fn no_outcome_is_guessed() {
    for &(leaf, end) in LEAVES {
        for mode in [Mode::Kernel, Mode::Batched] {
            for effect in [Effect::LoseAnswer, Effect::LoseCall] {
                for skip in 0..3 {
                    lose(leaf, end, mode, effect, skip);
                }
            }
        }
    }
}

fn lose(leaf: Leaf, end: End, mode: Mode, effect: Effect, skip: u32) {
    let case = format!("{leaf} {mode:?} {effect:?}, {skip} pass");
    let rig = Rig::new();
    let vm = rig.uninitialized(mode, Gpaw::W48);
    rig.port.inject(Rule {
        skip,
        ..Rule::next(leaf, effect)
    });
    let outcome = live(&vm);
    let reason = vm.bugs().reason();
    if outcome.is_ok() {
        // Not met, met at the end only, or looked up.
        assert_eq!(reason, None, "{case}");
        check_invariants_but_calls(&vm, &case);
    } else {
        let unsettled = match end {
            End::Unnoticed => {
                // A measured image may have been under way.
                let reason = reason.clone().unwrap_or_default();
                reason.contains("measurement is unknown")
            }
            End::NoTd => reason.is_none() && vm.info().state == "uninitialized",
            End::Dead => reason.is_some(),
        };
        assert!(unsettled, "{case}: {outcome:?}, {reason:?}");
    }
    let destroyed = vm.destroy();
    if end == End::Dead && leaf != Leaf::MR_EXTEND {
        // The module may hold pages of a vCPU of which nobody knows.
        return;
    }
    assert_eq!(destroyed.unwrap().1, 0, "{case}: {:?}", vm.bugs().reports());
    rig.port.clear_rules();
    state::assert_nothing_left(&rig);
    if end == End::NoTd && outcome.is_err() {
        // Key id and pages are free again.
        let new = rig.empty_with(VmConfig {
            mode,
            ..VmConfig::default()
        });
        state::destroy(&new, &rig);
    }
}

fn check_invariants_but_calls(vm: &Vm, case: &str) {
    let audit = vm.audit(&mut |_, _| {}).unwrap();
    let found = (audit.mismatches, audit.frozen);
    assert_eq!(found, (0, 0), "{case}: {:#?}", audit.first_mismatches);
}

#[test]
fn a_life_in_which_nothing_is_lost_meets_every_call() {
    for mode in [Mode::Kernel, Mode::Batched] {
        let rig = Rig::new();
        let vm = rig.uninitialized(mode, Gpaw::W48);
        live(&vm).unwrap();
        check_invariants(&vm, &rig);
        state::destroy(&vm, &rig);
        for &(leaf, _) in LEAVES {
            assert_ne!(rig.port.succeeded(leaf), 0, "{leaf} {mode:?}");
        }
    }
}
