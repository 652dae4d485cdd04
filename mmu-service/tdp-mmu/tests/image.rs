//! The initial image in chains of messages: whatever stops one of them, pages and chunks reach MRTD
//! in KVM's order.
#![cfg(not(feature = "shuttle"))]

mod common;

use common::port::{Effect, Rule};
use common::state::{self, check_invariants};
use common::{Rig, gmem_slot};
use tdp_mmu::{InitRegion, Measure, Mode, Vm, VmError};
use tdx_defs::{CompletionStatus, Gpaw, Leaf};

const PAGE: u64 = 4096;
/// More than one table, and more than two messages in the first.
const FRAMES: std::ops::Range<u64> = 0x100..0x260;

/// A TD that takes its image, which lies in all frames.
fn started(rig: &Rig, mode: Mode) -> Vm {
    let vm = rig.create(mode, Gpaw::W48).unwrap();
    vm.add_vcpu().unwrap();
    let (gpa, size) = (FRAMES.start * PAGE, (FRAMES.end - FRAMES.start) * PAGE);
    vm.set_user_memory_region(gmem_slot(0, FRAMES.start, FRAMES.end - FRAMES.start))
        .unwrap();
    vm.set_memory_attributes(gpa, size, 8).unwrap();
    rig.port.take_calls();
    rig.port.take_batches();
    vm
}

fn add(vm: &Vm) -> Result<(), VmError> {
    let size = (FRAMES.end - FRAMES.start) * PAGE;
    let data: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    vm.init_mem_region(
        0,
        InitRegion {
            gpa: FRAMES.start * PAGE,
            size,
            data: &data,
            measure: Measure::Extend,
        },
    )
    .map(drop)
}

/// RCX of the PAGE.ADDs and MR.EXTENDs that succeeded, in order.
fn measured(rig: &Rig) -> Vec<(Leaf, u64)> {
    let calls = rig.port.take_calls().into_iter();
    calls
        .filter(|call| call.status.is_success())
        .filter(|call| [Leaf::MEM_PAGE_ADD, Leaf::MR_EXTEND].contains(&call.leaf))
        .map(|call| (call.leaf, call.rcx))
        .collect()
}

fn expected() -> (Vec<(Leaf, u64)>, [u8; 48]) {
    let rig = Rig::new();
    let vm = started(&rig, Mode::Kernel);
    add(&vm).unwrap();
    let calls = measured(&rig);
    let mrtd = vm.finalize().unwrap().0;
    state::destroy(&vm, &rig);
    (calls, mrtd)
}

#[test]
fn chains_add_and_measure_as_the_kernel_does_whatever_stops_them() {
    let (calls, mrtd) = expected();
    let pages = u32::try_from(FRAMES.end - FRAMES.start).unwrap();
    let busy = Effect::Answer(CompletionStatus::OPERAND_BUSY);
    let mut cases = vec![None];
    for skip in [0, 1, 63, 64, 65, 127, 128, 200, pages - 1] {
        cases.push(Some((Leaf::MEM_PAGE_ADD, skip, busy)));
    }
    for skip in [0, 1, 2, 3] {
        cases.push(Some((Leaf::MEM_SEPT_ADD, skip, busy)));
    }
    for case in cases {
        let rig = Rig::new();
        rig.port.take_chains();
        let vm = started(&rig, Mode::Batched);
        if let Some((leaf, skip, effect)) = case {
            rig.port.inject(Rule {
                skip,
                ..Rule::next(leaf, effect)
            });
        }
        add(&vm).unwrap();
        assert_eq!(rig.port.clear_rules(), 0, "{case:?} was met");
        assert_eq!(measured(&rig), calls, "{case:?}");
        check_invariants(&vm, &rig);
        assert_eq!(vm.finalize().unwrap().0, mrtd, "{case:?}");
        state::destroy(&vm, &rig);
    }
}

#[test]
fn nothing_is_measured_behind_a_call_that_fails_for_good() {
    for (leaf, skip, effect) in [
        (
            Leaf::MR_EXTEND,
            100,
            Effect::Answer(CompletionStatus::OPERAND_BUSY),
        ),
        (
            Leaf::MEM_PAGE_ADD,
            70,
            Effect::Answer(CompletionStatus::OPERAND_INVALID),
        ),
        (Leaf::MEM_PAGE_ADD, 10, Effect::LoseCall),
        (Leaf::MEM_PAGE_ADD, 10, Effect::LoseAnswer),
    ] {
        let (calls, _) = expected();
        let rig = Rig::new();
        rig.port.take_chains();
        let vm = started(&rig, Mode::Batched);
        rig.port.inject(Rule {
            skip,
            ..Rule::next(leaf, effect)
        });
        add(&vm).unwrap_err();
        let got = measured(&rig);
        assert!(calls.starts_with(&got), "{leaf} {effect:?}");
        assert!(got.len() < calls.len());
        // Whatever was on its way is settled: the TD can be taken down.
        state::destroy(&vm, &rig);
    }
}

#[test]
fn a_chain_sends_ahead_and_needs_no_message_more() {
    let rig = Rig::new();
    let vm = started(&rig, Mode::Batched);
    add(&vm).unwrap();
    let alone = rig.port.take_batches();
    state::destroy(&vm, &rig);

    let rig = Rig::new();
    rig.port.take_chains();
    let vm = started(&rig, Mode::Batched);
    add(&vm).unwrap();
    assert_eq!(rig.port.take_batches(), alone);
    state::destroy(&vm, &rig);
}
