//! Two sides at once, one of them held in the middle of a call: what the other one may do
//! meanwhile, and the calls that both make, in order.

pub(crate) mod building;
pub(crate) mod faults;
pub(crate) mod running;

use std::thread;

use tdp_mmu::{Mode, RetPf, Vm, VmError};
use tdx_defs::{Gpaw, Leaf};
use tdx_module::Violations;

use crate::common::port::Call;
use crate::common::state::{self, check_invariants};
use crate::common::{Rig, private};

/// TDH.MEM.SEPT.ADD of the lowest table for frame 0.
pub(super) const LOWEST_TABLE: u64 = 1;

/// Leaf, and whether the module did it.
pub(super) fn calls(rig: &Rig) -> Vec<(Leaf, bool)> {
    let made = rig.look_at_calls();
    made.iter()
        .map(|Call { leaf, status, .. }| (*leaf, status.is_success()))
        .collect()
}

pub(super) fn all_done(leaves: &[Leaf]) -> Vec<(Leaf, bool)> {
    leaves.iter().map(|&leaf| (leaf, true)).collect()
}

pub(super) const PATH: [Leaf; 4] = [
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_PAGE_AUG,
];
pub(super) const REMOVAL: [Leaf; 4] = [
    Leaf::MEM_RANGE_BLOCK,
    Leaf::MEM_TRACK,
    Leaf::MEM_PAGE_REMOVE,
    Leaf::PHYMEM_PAGE_WBINVD,
];

/// Lets threads that could go on do so; those that wait for the caller stay where they are.
pub(super) fn let_others_run() {
    for _ in 0..200 {
        thread::yield_now();
    }
}

/// E4 with a second vCPU, nothing recorded yet.
pub(super) fn two_vcpus(mode: Mode) -> (Rig, Vm) {
    let rig = Rig::new();
    let vm = rig.pre(mode, Gpaw::W48);
    vm.add_vcpu().unwrap();
    for vcpu in 0..2 {
        vm.load_mmu(vcpu).unwrap();
    }
    vm.finalize().unwrap();
    rig.forget_calls();
    (rig, vm)
}

pub(super) fn ret_pf(vm: &Vm, vcpu: u32, gfn: u64) -> Result<RetPf, VmError> {
    vm.handle_fault(vcpu, private(gfn))
        .map(|report| report.ret_pf)
}

pub(super) fn convert(vm: &Vm, gfn: u64, attributes: u64) -> Result<(), VmError> {
    vm.set_memory_attributes(gfn << 12, 0x1000, attributes)
        .map(drop)
}

pub(super) fn end(vm: &Vm, rig: &Rig) {
    assert_eq!(vm.bugs().reports(), []);
    assert_eq!(rig.module.violations(), Violations::default());
    check_invariants(vm, rig);
    state::destroy(vm, rig);
}
