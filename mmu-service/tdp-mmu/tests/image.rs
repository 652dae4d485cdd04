//! The initial image in chains of messages: whatever stops one of them, pages and chunks reach MRTD
//! in KVM's order.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::cell::RefCell;
use std::collections::VecDeque;

use bytes::Bytes;
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
            data: data.into(),
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

/// Regions that cover all frames: parts of a message, whole ones, several.
fn regions(measure: Measure) -> VecDeque<InitRegion> {
    let size = (FRAMES.end - FRAMES.start) * PAGE;
    let data: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    let data = Bytes::from(data);
    let mut start = 0;
    let pages = [64, 1, 130, FRAMES.end - FRAMES.start - 195];
    let region = |pages| {
        let at = [start, start + pages * PAGE].map(|at| usize::try_from(at).unwrap());
        let gpa = FRAMES.start * PAGE + start;
        start += pages * PAGE;
        InitRegion {
            gpa,
            size: pages * PAGE,
            data: data.slice(at[0]..at[1]),
            measure,
        }
    };
    pages.map(region).into()
}

#[test]
fn regions_behind_each_other_are_measured_as_one_whenever_they_are_at_hand() {
    let (calls, mrtd) = expected();
    let busy = Effect::Answer(CompletionStatus::OPERAND_BUSY);
    type AtHand = fn(usize) -> bool;
    let late: [(&str, AtHand, _); 3] = [
        ("all at once", |_| true, 1..=1),
        ("each second time", |asked| asked % 2 == 0, 1..=4),
        ("never", |_| false, 4..=4),
    ];
    for mode in [Mode::Kernel, Mode::Batched] {
        for (case, at_hand, expected) in late.clone() {
            for skip in [
                None,
                Some(0),
                Some(63),
                Some(64),
                Some(65),
                Some(194),
                Some(195),
            ] {
                let rig = Rig::new();
                rig.port.take_chains();
                let vm = started(&rig, mode);
                if let Some(skip) = skip {
                    rig.port.inject(Rule {
                        skip,
                        ..Rule::next(Leaf::MEM_PAGE_ADD, busy)
                    });
                }
                let queue = RefCell::new(regions(Measure::Extend));
                let mut asked = 0;
                let mut calls_made = 0;
                let next = || queue.borrow_mut().pop_front();
                while let Some(first) = next() {
                    calls_made += 1;
                    vm.init_mem_regions(0, first, &mut |measure| {
                        assert_eq!(measure, Measure::Extend);
                        asked += 1;
                        if at_hand(asked) { next() } else { None }
                    })
                    .unwrap();
                }
                assert!(expected.contains(&calls_made), "{case}: {calls_made}");
                assert_eq!(measured(&rig), calls, "{mode:?}, {case}, {skip:?}");
                check_invariants(&vm, &rig);
                assert_eq!(vm.finalize().unwrap().0, mrtd, "{mode:?}, {case}, {skip:?}");
                state::destroy(&vm, &rig);
            }
        }
    }
}

#[test]
fn a_region_that_cannot_be_ends_the_call_and_those_before_it_are_added() {
    type Harm = fn(&mut InitRegion);
    let broken: [(&str, Harm); 4] = [
        ("gpa", |region| region.gpa += 1),
        ("data", |region| region.size = PAGE),
        ("gpa", |region| region.gpa = 0),
        ("measure", |region| region.measure = Measure::No),
    ];
    for (field, harm) in broken {
        let rig = Rig::new();
        rig.port.take_chains();
        let vm = started(&rig, Mode::Batched);
        let mut queue = regions(Measure::Extend);
        harm(&mut queue[2]);
        let first = queue.pop_front().unwrap();
        let refusal = vm.init_mem_regions(0, first, &mut |_| queue.pop_front());
        let refusal = refusal.unwrap_err().to_string();
        assert!(refusal.contains(field), "{field}: {refusal}");
        assert_eq!(queue.len(), 1, "nothing is taken behind it");
        let added = measured(&rig)
            .iter()
            .filter(|(leaf, _)| *leaf == Leaf::MEM_PAGE_ADD)
            .count();
        assert_eq!(added, 65, "{field}");
        check_invariants(&vm, &rig);
        state::destroy(&vm, &rig);
    }
}

#[test]
fn extending_takes_the_regions_behind_the_first_too() {
    let add_then_extend = |rig: &Rig| {
        let vm = started(rig, Mode::Batched);
        for measure in [Measure::No, Measure::ExtendOnly] {
            let mut queue = regions(measure);
            let first = queue.pop_front().unwrap();
            vm.init_mem_regions(0, first, &mut |_| queue.pop_front())
                .unwrap();
            assert!(queue.is_empty());
        }
        vm
    };
    let rig = Rig::new();
    let vm = add_then_extend(&rig);
    let extended = measured(&rig)
        .into_iter()
        .filter(|(leaf, _)| *leaf == Leaf::MR_EXTEND);
    let chunks = FRAMES.flat_map(|gfn| (0..16).map(move |chunk| gfn * PAGE + chunk * 256));
    assert!(extended.map(|(_, gpa)| gpa).eq(chunks));
    state::destroy(&vm, &rig);
}

#[test]
fn the_locks_are_given_up_after_sixteen_mebibytes() {
    const PAGES: u64 = 4096;
    let rig = Rig::new();
    let vm = rig.create(Mode::Batched, Gpaw::W48).unwrap();
    vm.add_vcpu().unwrap();
    vm.set_user_memory_region(gmem_slot(0, 0, 2 * PAGES))
        .unwrap();
    vm.set_memory_attributes(0, 2 * PAGES * PAGE, 8).unwrap();
    let region = |page: u64, pages: u64| InitRegion {
        gpa: page * PAGE,
        size: pages * PAGE,
        data: Bytes::new(),
        measure: Measure::No,
    };
    let mut at = PAGES - 1;
    vm.init_mem_regions(0, region(0, at), &mut |_| {
        at += 1;
        Some(region(at - 1, 1))
    })
    .unwrap();
    assert_eq!(at, PAGES);
    state::destroy(&vm, &rig);
}
