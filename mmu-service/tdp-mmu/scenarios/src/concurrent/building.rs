//! What concerns a whole TD, beside a vCPU that is busy.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use tdp_mmu::{InitRegion, Measure, RunExit, VmError, errno};
use tdx_defs::{Gpaw, Leaf};

use super::running::{Stopped, accept, run};
use super::{PATH, all_done, calls, end, let_others_run, two_vcpus};
use crate::common::gate::Gate;
use crate::common::port::When;
use crate::common::{self, Rig, witness};

fn one_page(gfn: u64, measure: Measure) -> InitRegion {
    InitRegion {
        gpa: gfn << 12,
        size: 0x1000,
        data: vec![7; 64].into(),
        measure,
    }
}

pub(crate) fn c19_what_concerns_the_whole_td_waits_for_a_vcpu_that_runs() {
    for mode in witness::modes() {
        let (rig, vm) = two_vcpus(mode);
        let inside = Gate::default();
        let (has_left, refused) = (AtomicBool::new(false), AtomicU32::new(0));
        let in_call = || {
            inside.pass();
            has_left.store(true, Ordering::SeqCst);
        };
        let ioctls: [&(dyn Fn() -> Result<(), VmError> + Sync); 3] = [
            &|| vm.finalize().map(drop),
            &|| vm.init_vcpu(1).map(drop),
            &|| vm.init_mem_region(1, one_page(9, Measure::No)).map(drop),
        ];
        thread::scope(|scope| {
            let mut waiting = Vec::new();
            for ioctl in ioctls {
                let (inside, has_left, refused) = (&inside, &has_left, &refused);
                waiting.push(scope.spawn(move || {
                    inside.wait_for_arrival();
                    let error = ioctl().unwrap_err();
                    assert!(has_left.load(Ordering::SeqCst), "it did not wait");
                    assert_eq!(error.errno(), errno::EINVAL, "the TD runs already");
                    refused.fetch_add(1, Ordering::SeqCst);
                }));
            }
            let opener = scope.spawn(|| {
                inside.wait_for_arrival();
                let_others_run();
                inside.open();
            });
            let report = run(&vm, &mut Stopped::new(&rig, &in_call), vec![accept(1)]);
            assert_eq!(report.exit, RunExit::Done);
            opener.join().unwrap();
            waiting.into_iter().for_each(|ioctl| ioctl.join().unwrap());
        });
        assert_eq!(refused.load(Ordering::SeqCst), 3, "{mode:?}");
        end(&vm, &rig);
    }
}

/// The same before the TD runs, where the operations succeed.
pub(crate) fn c26_building_waits_for_a_vcpu_that_loads_its_roots() {
    for mode in witness::modes() {
        let rig = Rig::new();
        let vm = rig.pre(mode, Gpaw::W48);
        vm.add_vcpu().unwrap();
        vm.load_mmu(1).unwrap();
        rig.forget_calls();
        let gate = rig.port.gate(Leaf::VP_WR, None, When::Before);
        thread::scope(|scope| {
            let load = scope.spawn(|| vm.load_mmu(0));
            gate.wait_for_arrival();
            let image = scope.spawn(|| vm.init_mem_region(1, one_page(1, Measure::No)));
            let_others_run();
            assert_eq!(rig.port.take_calls(), [], "{mode:?}: nothing is added");
            gate.open();
            load.join().unwrap().unwrap();
            image.join().unwrap().unwrap();
        });
        let mut expected = all_done(&PATH);
        expected.insert(0, (Leaf::VP_WR, true));
        expected[4].0 = Leaf::MEM_PAGE_ADD;
        assert_eq!(calls(&rig), expected, "{mode:?}");
        end(&vm, &rig);
    }
}

/// Before the TD runs a removal tracks nothing.
const EARLY_REMOVAL: [Leaf; 3] = [
    Leaf::MEM_RANGE_BLOCK,
    Leaf::MEM_PAGE_REMOVE,
    Leaf::PHYMEM_PAGE_WBINVD,
];

pub(crate) fn c24_a_hole_waits_for_a_vcpu_that_is_initialised() {
    for mode in witness::modes() {
        let rig = Rig::new();
        let vm = rig.pre(mode, Gpaw::W48);
        common::map_private(&vm, 1..2);
        rig.forget_calls();
        let gate = rig.port.gate(Leaf::VP_INIT, None, When::Before);
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| vm.add_vcpu());
            gate.wait_for_arrival();
            let hole = scope.spawn(|| vm.punch_hole(0, 0x1000, 0x1000));
            let_others_run();
            assert!(!rig.port.has_called(Leaf::MEM_RANGE_BLOCK), "{mode:?}");
            gate.open();
            vcpu.join().unwrap().unwrap();
            assert_eq!(hole.join().unwrap().unwrap().1, 1, "pages freed");
        });
        let made = calls(&rig);
        assert!(
            made.iter().all(|(_, done)| *done),
            "nothing is busy: {made:?}"
        );
        let at = |leaf| made.iter().position(|call| call.0 == leaf).unwrap();
        assert!(at(Leaf::VP_INIT) < at(Leaf::MEM_RANGE_BLOCK));
        let removal: Vec<Leaf> = made
            .iter()
            .map(|call| call.0)
            .filter(|leaf| EARLY_REMOVAL.contains(leaf))
            .collect();
        assert_eq!(removal, EARLY_REMOVAL, "{mode:?}");
        end(&vm, &rig);
    }
}

pub(crate) fn c25_a_hole_waits_for_the_population_of_its_page() {
    for mode in witness::modes() {
        let rig = Rig::new();
        let vm = rig.pre(mode, Gpaw::W48);
        vm.load_mmu(0).unwrap();
        rig.forget_calls();
        let gate = rig.port.gate(Leaf::MR_EXTEND, None, When::Before);
        thread::scope(|scope| {
            let image = scope.spawn(|| vm.init_mem_region(0, one_page(1, Measure::Extend)));
            gate.wait_for_arrival();
            let hole = scope.spawn(|| vm.punch_hole(0, 0x1000, 0x1000));
            let_others_run();
            assert!(!rig.port.has_called(Leaf::MEM_RANGE_BLOCK), "{mode:?}");
            gate.open();
            image.join().unwrap().unwrap();
            assert_eq!(hole.join().unwrap().unwrap().1, 1, "pages freed");
        });
        let mut expected = all_done(&PATH[..3]);
        expected.extend(all_done(&[Leaf::MEM_PAGE_ADD]));
        expected.extend(all_done(&[Leaf::MR_EXTEND; 16]));
        expected.extend(all_done(&EARLY_REMOVAL));
        assert_eq!(calls(&rig), expected, "{mode:?}");
        end(&vm, &rig);
    }
}
