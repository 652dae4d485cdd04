//! A fault that is held inside a call of its own, or beside somebody who holds the tree.

use std::sync::Arc;
use std::thread;

use tdp_mmu::RetPf;
use tdx_defs::Leaf;
use tdx_module::LockMode;
use tdx_module::hooks::LockObject;

use super::{
    LOWEST_TABLE, PATH, REMOVAL, all_done, calls, convert, end, let_others_run, ret_pf, two_vcpus,
};
use crate::common::port::{Hook, When};
use crate::common::{self, private, witness};

pub(crate) fn c03_nobody_builds_below_an_entry_whose_table_is_on_its_way() {
    for mode in witness::modes() {
        let (rig, vm) = two_vcpus(mode);
        let gate = rig
            .port
            .gate(Leaf::MEM_SEPT_ADD, Some(LOWEST_TABLE), When::Before);
        thread::scope(|scope| {
            let first = scope.spawn(|| ret_pf(&vm, 0, 1));
            gate.wait_for_arrival();
            let pages = rig.host.pages_in_use();
            let report = vm.handle_fault(1, private(2)).unwrap();
            assert_eq!(report.ret_pf, RetPf::Retry, "{mode:?}: its budget ends");
            assert_eq!(report.seamcalls, [], "{mode:?}");
            assert_eq!(rig.host.pages_in_use(), pages, "{mode:?}: no table is made");
            gate.open();
            assert_eq!(first.join().unwrap(), Ok(RetPf::Fixed));
        });
        assert_eq!(ret_pf(&vm, 1, 2), Ok(RetPf::Fixed));
        let mut expected = all_done(&PATH);
        expected.extend(all_done(&[Leaf::MEM_PAGE_AUG]));
        assert_eq!(calls(&rig), expected, "{mode:?}");
        end(&vm, &rig);
    }
}

/// A fault whose AUG is under way, and a conversion of the same frame: the mapping is whole before
/// it is taken away.
pub(crate) fn c06_a_fault_ahead_of_a_conversion_is_mapped_and_taken_away() {
    for mode in witness::modes() {
        let (rig, vm) = two_vcpus(mode);
        let gate = rig.port.gate(Leaf::MEM_PAGE_AUG, None, When::Before);
        thread::scope(|scope| {
            let fault = scope.spawn(|| ret_pf(&vm, 0, 1));
            gate.wait_for_arrival();
            let conversion = scope.spawn(|| convert(&vm, 1, 0));
            let_others_run();
            assert!(!rig.port.has_called(Leaf::MEM_RANGE_BLOCK), "{mode:?}");
            gate.open();
            assert_eq!(fault.join().unwrap(), Ok(RetPf::Fixed));
            conversion.join().unwrap().unwrap();
        });
        let expected = [all_done(&PATH), all_done(&REMOVAL)].concat();
        assert_eq!(calls(&rig), expected, "{mode:?}");
        let error = ret_pf(&vm, 0, 1).unwrap_err();
        assert_eq!(error.memory_fault().map(|record| record.flags), Some(8));
        end(&vm, &rig);
    }
}

/// A conversion of frames 1 and 2 that is held while it takes frame 2 away.
pub(crate) fn c07_a_fault_behind_a_conversion_leaves_with_a_memory_fault() {
    for mode in witness::modes() {
        let (rig, vm) = two_vcpus(mode);
        common::map_private(&vm, 2..3);
        rig.forget_calls();
        let gate = rig.port.gate(Leaf::MEM_RANGE_BLOCK, None, When::Before);
        thread::scope(|scope| {
            let conversion = scope.spawn(|| vm.set_memory_attributes(0x1000, 0x2000, 0));
            gate.wait_for_arrival();
            // An event ends the retries, which would last as long as the conversion.
            vm.queue_event(1).unwrap();
            let report = vm.handle_fault(1, private(1)).unwrap();
            assert_eq!(report.ret_pf, RetPf::Retry, "{mode:?}");
            assert_eq!(report.seamcalls, [], "{mode:?}");
            gate.open();
            conversion.join().unwrap().unwrap();
        });
        let error = ret_pf(&vm, 1, 1).unwrap_err();
        assert_eq!(error.memory_fault().map(|record| record.flags), Some(8));
        assert_eq!(calls(&rig), all_done(&REMOVAL), "{mode:?}: frame 2 only");
        end(&vm, &rig);
    }
}

/// vCPU 0 has faulted at one place so often that its next entry checks the place under the lock of
/// the tree. While that entry is in there, SEPT.ADD and AUG of vCPU 1 are busy.
pub(crate) fn c14_a_fault_beside_the_zero_step_defence_is_busy_and_retried_in_the_host() {
    const BUSY: u32 = 3;
    for mode in witness::modes() {
        let (rig, vm) = two_vcpus(mode);
        let tree = LockObject::SeptTree { tdr: vm.info().tdr };
        assert!(rig.module.hold_lock(tree, LockMode::Exclusive));
        let module = Arc::clone(&rig.module);
        let release = move || assert!(module.release_lock(tree, LockMode::Exclusive));
        let hook = Hook::at(Leaf::MEM_SEPT_ADD, When::Answered, release);
        rig.port.hook(hook.skip(BUSY - 1));
        let report = vm.handle_fault(1, private(1)).unwrap();
        assert_eq!(report.ret_pf, RetPf::Fixed, "{mode:?}");
        assert_eq!(report.counts.pf_taken, u64::from(BUSY) + 1);
        let mut expected = vec![(Leaf::MEM_SEPT_ADD, false); BUSY as usize];
        expected.extend(all_done(&PATH));
        assert_eq!(calls(&rig), expected, "{mode:?}");
        end(&vm, &rig);
    }
}
