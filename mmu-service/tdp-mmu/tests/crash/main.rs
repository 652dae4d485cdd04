//! The host's process dies at any moment, and another one takes its place.
//!
//! A workload is cut before each of its steps in turn: every call that changes the module's state
//! and every note that is written down. Then the VMs are made again from the module and the notes.
//! Each must be as the module has it, work on, and go without leaving a page behind.
#![cfg(not(feature = "shuttle"))]

#[path = "../common/mod.rs"]
mod common;
mod world;

use std::collections::BTreeMap;

use common::guest::Guest;
use common::{gmem_slot, private};
use tdp_mmu::{
    GuestOp, GuestStep, InitRegion, Measure, Mode, RetPf, RunRequest, Vm, VmConfig, VmError, VmKind,
};
use tdx_defs::{Gpa, TdxLevel};
use world::{Process, World, lock};

const PAGE: u64 = 4096;

fn config(mode: Mode) -> VmConfig {
    VmConfig {
        mode,
        ..VmConfig::default()
    }
}

/// Every kind of operation on a TD, from its creation to its end.
fn workload(process: &Process, mode: Mode) -> Result<(), VmError> {
    let vm = process.create(1, config(mode))?;
    vm.add_vcpu()?;
    vm.create_vcpu()?;
    vm.init_vcpu(1)?;
    vm.set_user_memory_region(gmem_slot(0, 0, 0x400))?;
    vm.set_user_memory_region(gmem_slot(1, 0x4_0010, 0x220))?;
    vm.set_memory_attributes(0, 0x400 * PAGE, 8)?;
    vm.set_memory_attributes(0x4_0010 * PAGE, 0x220 * PAGE, 8)?;
    for (first, measure) in [(0, Measure::Extend), (2, Measure::No)] {
        let region = InitRegion {
            gpa: first * PAGE,
            size: 2 * PAGE,
            data: vec![7; 100].into(),
            measure,
        };
        vm.init_mem_region(0, region)?;
    }
    vm.finalize()?;
    // A chain, more pages of one table, and another slot.
    for gfn in [0x200, 0x4_0012, 0x201] {
        vm.handle_fault(0, private(gfn))?;
    }
    vm.pre_fault_memory(0, 8 * PAGE, 6 * PAGE, &mut |_| {})?;
    // A second VM beside it, so that pages and keys must be kept apart.
    let other = process.create(2, config(mode))?;
    other.add_vcpu()?;
    other.set_user_memory_region(gmem_slot(0, 0, 0x200))?;
    other.set_memory_attributes(0, 0x200 * PAGE, 8)?;
    other.finalize()?;
    other.handle_fault(0, private(3))?;
    // Away, and back again.
    vm.set_memory_attributes(9 * PAGE, 4 * PAGE, 0)?;
    vm.set_memory_attributes(10 * PAGE, PAGE, 8)?;
    vm.handle_fault(0, private(10))?;
    vm.punch_hole(0, 2 * PAGE, 2 * PAGE)?;
    vm.zap_gfn_range(0x200 * PAGE, PAGE)?;
    vm.handle_fault(0, private(0x200))?;
    let mut gone = gmem_slot(1, 0x4_0010, 0x220);
    gone.size = 0;
    vm.set_user_memory_region(gone)?;
    vm.set_nx_huge_pages(true)?;
    vm.set_exit_hypercall(false)?;
    process.destroy(1, &vm)?;
    process.destroy(2, &other)?;
    Ok(())
}

/// What must hold of a VM that came back.
fn check(vm: &Vm, when: &str) {
    let audit = vm.audit(&mut |_, _| {}).unwrap();
    assert_eq!(
        (audit.mismatches, audit.frozen),
        (0, 0),
        "{when}: {:#?}",
        audit.first_mismatches
    );
    let info = vm.info();
    assert_eq!(info.pages_4k, audit.leaves, "{when}");
}

/// It works on, as far as it was built.
fn use_it(vm: &Vm, when: &str) {
    if vm.info().state != "runnable" || vm.info().slots.is_empty() {
        return;
    }
    vm.set_memory_attributes(0, 0x100 * PAGE, 8).unwrap();
    for gfn in [0, 0x40, 0x41] {
        let report = vm.handle_fault(0, private(gfn)).unwrap();
        let good = [RetPf::Fixed, RetPf::Spurious].contains(&report.ret_pf);
        assert!(good, "{when}: gfn {gfn:#x} {report:?}");
    }
    vm.set_memory_attributes(0x41 * PAGE, PAGE, 0).unwrap();
    check(vm, when);
}

/// A process after the last one: everything is there, works, and goes. Answers how many blocked
/// leaves it gave back.
fn take_over(world: &World, when: &str) -> u64 {
    let may_be_dead: BTreeMap<u64, bool> = {
        let store = lock(&world.store);
        let vms = store.vms.iter();
        vms.map(|(&id, vm)| (id, vm.measuring)).collect()
    };
    let process = world.process(u64::MAX);
    let vms = process
        .recover()
        .unwrap_or_else(|error| panic!("{when}: {error}"));
    for (id, vm) in &vms {
        let when = format!("{when}, VM {id}");
        let reason = vm.bugs().reason();
        assert!(may_be_dead[id] || reason.is_none(), "{when}: {reason:?}");
        if vm.info().kind == VmKind::Td && vm.info().hkid.is_some() {
            check(vm, &when);
        }
        if !vm.bugs().is_dead() {
            use_it(vm, &when);
        }
    }
    for (id, vm) in &vms {
        let leaked = process.destroy(*id, vm).unwrap();
        assert_eq!(leaked, 0, "{when}, VM {id}: {:?}", vm.bugs().reports());
    }
    drop(vms);
    world.assert_nothing_left(&process, when);
    process.unblocked.into_inner()
}

/// The workload in a process of so many steps. Whether it came to its end.
fn run(world: &World, mode: Mode, steps: u64) -> bool {
    let process = world.process(steps);
    let outcome = workload(&process, mode);
    assert!(process.is_dead() || outcome.is_ok(), "{outcome:?}");
    !process.is_dead()
}

#[test]
fn a_process_may_die_before_any_of_its_steps() {
    for mode in [Mode::Batched, Mode::Kernel] {
        let mut steps = 0;
        let mut unblocked = 0;
        loop {
            let world = World::new();
            let is_through = run(&world, mode, steps);
            unblocked += take_over(&world, &format!("{mode:?}, dead after {steps} steps"));
            if is_through {
                break;
            }
            steps += 1;
        }
        assert!(steps > 200, "{mode:?}: {steps} steps");
        assert_ne!(unblocked, 0, "{mode:?}: no removal was cut in two");
    }
}

#[test]
fn the_one_that_takes_over_may_die_as_well() {
    for mode in [Mode::Batched, Mode::Kernel] {
        // Coprime to whatever repeats in the workload, and other moments for each mode.
        let mut steps = u64::from(mode == Mode::Kernel);
        loop {
            let mut is_through = true;
            for second in 0.. {
                let world = World::new();
                is_through = run(&world, mode, steps);
                let successor = world.process(second);
                let recovered = successor.recover();
                let when = format!("{mode:?}, dead after {steps} steps and then {second}");
                assert!(successor.is_dead() || recovered.is_ok(), "{when}");
                let is_recovered = !successor.is_dead();
                drop(recovered);
                take_over(&world, &when);
                if is_recovered {
                    break;
                }
            }
            if is_through {
                break;
            }
            steps += 7;
        }
    }
}

#[test]
fn private_memory_outlives_the_process() {
    let world = World::new();
    let first = world.process(u64::MAX);
    let vm = first.create(1, config(Mode::Batched)).unwrap();
    vm.add_vcpu().unwrap();
    vm.set_user_memory_region(gmem_slot(0, 0, 0x400)).unwrap();
    vm.set_memory_attributes(0, 0x400 * PAGE, 8).unwrap();
    vm.finalize().unwrap();
    let mrtd = vm.info().mrtd;
    let mut guest = Guest::new(&world.module);
    let gpa = Gpa::new(0x201 * PAGE + 8);
    let level = TdxLevel::new(0).unwrap();
    let data = b"still here".to_vec();
    let ops = vec![
        GuestOp::Accept {
            gpa: Gpa::new(0x201 * PAGE),
            level,
        },
        GuestOp::Write {
            gpa,
            data: data.clone(),
        },
    ];
    vm.run_vcpu(0, &mut guest, &RunRequest { ops, answer: 0 })
        .unwrap();
    // No destructor of a process that was killed runs.
    std::mem::forget(vm);

    let second = world.process(u64::MAX);
    let vms = second.recover().unwrap();
    let vm = &vms[&1];
    assert_eq!(vm.info().mrtd, mrtd);
    let ops = vec![GuestOp::Read {
        gpa,
        len: data.len(),
    }];
    let ran = vm
        .run_vcpu(0, &mut guest, &RunRequest { ops, answer: 0 })
        .unwrap();
    let [GuestStep::Resumed(read)] = &ran.done[..] else {
        panic!("{ran:?}");
    };
    assert_eq!(read.data, data);
    assert_eq!(second.destroy(1, vm).unwrap(), 0);
    world.assert_nothing_left(&second, "at the end");
}

/// A TD with pages in two slots, whose process is gone.
fn leave_behind(world: &World) {
    let process = world.process(u64::MAX);
    let vm = process.create(1, config(Mode::Batched)).unwrap();
    vm.add_vcpu().unwrap();
    for (slot_id, first) in [(0, 0), (1, 0x1000)] {
        vm.set_user_memory_region(gmem_slot(slot_id, first, 0x200))
            .unwrap();
        vm.set_memory_attributes(first * PAGE, 0x200 * PAGE, 8)
            .unwrap();
    }
    vm.finalize().unwrap();
    for gfn in [0, 1, 0x1000, 0x1001, 0x1002] {
        vm.handle_fault(0, private(gfn)).unwrap();
    }
    std::mem::forget(vm);
}

#[test]
fn pages_that_the_guest_must_not_have_are_taken_away() {
    for (case, spoil, removed) in [
        (
            "a shared frame",
            (|vm| vm.private = BTreeMap::from([(1, 0x200), (0x1000, 0x1200)]))
                as fn(&mut tdp_mmu::VmRecord),
            1,
        ),
        (
            "a slot that is not there",
            |vm| {
                vm.slots.remove(&1);
            },
            3,
        ),
        (
            "another slot in its place",
            |vm| {
                vm.slots.insert(1, gmem_slot(1, 0xFFF, 0x200));
            },
            3,
        ),
    ] {
        let world = World::new();
        leave_behind(&world);
        spoil(lock(&world.store).vms.get_mut(&1).unwrap());
        let process = world.process(u64::MAX);
        let vms = process.recover().unwrap();
        let vm = &vms[&1];
        assert_eq!(vm.bugs().reason(), None, "{case}");
        check(vm, case);
        let took = process.removed.load(std::sync::atomic::Ordering::SeqCst);
        assert_eq!(took, removed, "{case}");
        assert_eq!(vm.info().pages_4k, 5 - removed, "{case}");
        use_it(vm, case);
        assert_eq!(process.destroy(1, vm).unwrap(), 0, "{case}");
        drop(vms);
        world.assert_nothing_left(&process, case);
    }
}

#[test]
fn what_cannot_be_made_again_is_dead_and_the_others_serve() {
    let world = World::new();
    leave_behind(&world);
    {
        let mut store = lock(&world.store);
        let record = store.vms[&1].clone();
        // No address of a slot.
        let broken = record.slots[&0];
        store.vms.get_mut(&1).unwrap().slots.insert(
            0,
            tdp_mmu::SlotSpec {
                gpa: broken.gpa + 1,
                ..broken
            },
        );
    }
    let process = world.process(u64::MAX);
    let other = {
        let vms = process.recover().unwrap();
        let reason = vms[&1].bugs().reason().unwrap();
        assert!(reason.contains("cannot be made again"), "{reason}");
        let vm = process.create(2, config(Mode::Batched)).unwrap();
        vm.add_vcpu().unwrap();
        vm.set_user_memory_region(gmem_slot(0, 0, 0x200)).unwrap();
        vm.set_memory_attributes(0, 0x200 * PAGE, 8).unwrap();
        vm.finalize().unwrap();
        for gfn in 0..0x200 {
            vm.handle_fault(0, private(gfn)).unwrap();
        }
        std::mem::forget(vms);
        vm
    };
    check(&other, "beside a dead one");
    assert_eq!(process.destroy(2, &other).unwrap(), 0);
}
