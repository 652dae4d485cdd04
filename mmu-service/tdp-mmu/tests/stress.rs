//! Real threads on one VM: vCPUs fault while others convert, punch and protect. Afterwards the
//! audit is clean and the counts are exact.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::port::Rule;
use common::state::{self, check_invariants};
use common::{Rig, gmem_slot};
use tdp_mmu::{Fault, Mode, RetPf, Vm, VmError, errno};
use tdx_defs::{Gpaw, Leaf};

const VCPUS: u32 = 3;
/// Frames that are faulted on and converted: four leaf tables.
const PAGES: u64 = 2048;
const ROUNDS: u64 = 200;

fn world(mode: Mode) -> (Rig, Vm) {
    let rig = Rig::new();
    rig.port.record(false);
    let vm = rig.create(mode, Gpaw::W48).unwrap();
    for _ in 0..VCPUS {
        vm.add_vcpu().unwrap();
    }
    vm.set_user_memory_region(gmem_slot(0, 0, PAGES)).unwrap();
    vm.set_memory_attributes(0, PAGES << 12, 8).unwrap();
    vm.finalize().unwrap();
    (rig, vm)
}

/// Pseudo-random frames, different for each vCPU.
fn frames(vcpu: u32) -> impl Iterator<Item = u64> {
    let mut state = 0x9E37_79B9_7F4A_7C15 ^ u64::from(vcpu + 1);
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % PAGES
    })
}

/// Faults on random frames until told to stop; a frame of the other kind is a memory fault.
fn run_vcpu(vm: &Vm, vcpu: u32, stop: &AtomicBool) -> u64 {
    let shared_bit = common::shared_bit(vm);
    let mut fixed = 0;
    let mut frames = frames(vcpu);
    while !stop.load(Ordering::SeqCst) {
        let faults: Vec<Fault> = frames
            .by_ref()
            .take(64)
            .map(|gfn| {
                let bit = if gfn % 3 == 0 { shared_bit } else { 0 };
                Fault {
                    gpa: gfn << 12 | bit,
                    qualification: 2,
                    ..Fault::default()
                }
            })
            .collect();
        let report = vm.handle_faults(vcpu, &faults).unwrap();
        fixed += u64::from(report.fixed);
        for other in report.others {
            match other.result {
                Err(VmError::MemoryFault {
                    errno: errno::EFAULT,
                    ..
                })
                | Ok(RetPf::Retry) => {}
                result => panic!("{result:?}"),
            }
        }
    }
    fixed
}

/// Conversions of overlapping ranges there and back, with a hole now and then.
fn run_host(vm: &Vm) {
    for round in 0..ROUNDS {
        let first = round * 97 % (PAGES - 700);
        let (gpa, size) = (first << 12, 600 << 12);
        vm.set_memory_attributes(gpa, size, 0).unwrap();
        if round % 4 == 1 {
            vm.punch_hole(0, gpa, 700 << 12).unwrap();
        }
        if round % 4 == 2 {
            vm.zap_all_fast().unwrap();
        }
        vm.set_memory_attributes(gpa, size, 8).unwrap();
        if round % 8 == 3 {
            vm.audit(&mut |_, _| {})
                .map(|report| assert_eq!(report.mismatches, 0))
                .unwrap();
        }
    }
}

#[test]
fn vcpus_fault_while_the_host_converts_and_every_count_is_exact() {
    for mode in [Mode::Kernel, Mode::Batched] {
        let (rig, vm) = world(mode);
        let stop = AtomicBool::new(false);
        let fixed = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for vcpu in 0..VCPUS {
                let (vm, stop, fixed) = (&vm, &stop, &fixed);
                scope.spawn(move || {
                    fixed.fetch_add(run_vcpu(vm, vcpu, stop), Ordering::SeqCst);
                });
            }
            run_host(&vm);
            stop.store(true, Ordering::SeqCst);
        });
        assert!(!vm.bugs().is_dead(), "{mode:?}: {:?}", vm.bugs().reports());
        let counts = vm.stats().counts;
        assert_eq!(counts.pf_fixed, fixed.into_inner(), "{mode:?}");
        assert_eq!(counts.pages_mapped, counts.pf_fixed);
        for leaf in [
            Leaf::MEM_PAGE_AUG,
            Leaf::MEM_SEPT_ADD,
            Leaf::MEM_PAGE_REMOVE,
        ] {
            let made = rig.port.succeeded(leaf);
            assert!(
                counts.seamcalls.get(leaf) >= made,
                "{mode:?} {leaf}: every call is counted"
            );
        }
        check_invariants(&vm, &rig);
        state::destroy(&vm, &rig);
    }
}

#[test]
fn two_vcpus_that_race_over_the_same_pages_never_add_a_call() {
    for mode in [Mode::Kernel, Mode::Batched] {
        let (rig, vm) = world(mode);
        let fixed: u64 = std::thread::scope(|scope| {
            let vcpus = (0..VCPUS).map(|vcpu| {
                let vm = &vm;
                scope.spawn(move || {
                    let faults: Vec<Fault> = (0..PAGES).map(common::private).collect();
                    let report = vm.handle_faults(vcpu, &faults).unwrap();
                    assert_eq!(u64::from(report.fixed + report.spurious), PAGES);
                    u64::from(report.fixed)
                })
            });
            let vcpus: Vec<_> = vcpus.collect();
            vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).sum()
        });
        assert_eq!(fixed, PAGES, "{mode:?}: each page is fixed once");
        let counts = vm.stats().counts.seamcalls;
        assert_eq!(
            counts.get(Leaf::MEM_PAGE_AUG),
            rig.port.succeeded(Leaf::MEM_PAGE_AUG)
        );
        assert_eq!(rig.port.succeeded(Leaf::MEM_PAGE_AUG), PAGES);
        assert_eq!(rig.port.succeeded(Leaf::MEM_SEPT_ADD), 6);
        check_invariants(&vm, &rig);
        state::destroy(&vm, &rig);
    }
}

#[test]
fn a_conversion_lets_faults_in_and_still_takes_each_page_once() {
    for mode in [Mode::Kernel, Mode::Batched] {
        let (rig, vm) = world(mode);
        rig.port.inject(Rule::busy(Leaf::MEM_PAGE_AUG, 5));
        vm.pre_fault_memory(0, 0, PAGES << 12, &mut |_| {}).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (vm, done) = (&vm, &done);
            let faults = scope.spawn(move || {
                let mut spurious = 0;
                while !done.load(Ordering::SeqCst) {
                    let answer = vm.handle_fault(1, common::private(PAGES - 1)).unwrap();
                    assert_eq!(answer.ret_pf, RetPf::Spurious);
                    spurious += 1;
                }
                spurious
            });
            vm.set_memory_attributes(0, (PAGES - 1) << 12, 0).unwrap();
            done.store(true, Ordering::SeqCst);
            let answered: u64 = faults.join().unwrap();
            assert_eq!(vm.stats().counts.pf_spurious, answered);
        });
        assert_eq!(
            rig.port.succeeded(Leaf::MEM_PAGE_REMOVE),
            PAGES - 1,
            "{mode:?}"
        );
        assert_eq!(rig.port.succeeded(Leaf::MEM_RANGE_BLOCK), PAGES - 1);
        assert_eq!(vm.info().pages_4k, 1);
        check_invariants(&vm, &rig);
        state::destroy(&vm, &rig);
    }
}
