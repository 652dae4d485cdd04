//! Two threads on one TD: bodies that hold under every schedule. Under shuttle schedules are
//! explored; `mmuctl scenario` plays them on real threads, again and again.

use std::sync::Arc;

use tdp_mmu::{Fault, MemoryFault, Mode, RetPf, Vm, VmError, errno};
use tdx_defs::{Gpaw, Leaf};

use super::port::Rule;
use super::state::{self, check_invariants};
use super::{Rig, gmem_slot, map_private, private};
#[cfg(feature = "shuttle")]
use shuttle::thread;
#[cfg(not(feature = "shuttle"))]
use std::thread;

/// A running TD with two vCPUs and a private slot of 16 pages.
pub(crate) struct World {
    pub(crate) rig: Arc<Rig>,
    pub(crate) vm: Arc<Vm>,
}

pub(crate) const SLOT: u64 = 16;

impl World {
    pub(crate) fn new(mode: Mode) -> Self {
        let rig = Rig::new();
        // Schedules are explored over whole messages.
        rig.port.record(cfg!(not(feature = "shuttle")));
        let vm = rig.create(mode, Gpaw::W48).unwrap();
        for vcpu in 0..2 {
            vm.add_vcpu().unwrap();
            vm.set_user_memory_region(gmem_slot(vcpu, u64::from(vcpu) << 12, SLOT))
                .unwrap();
            vm.set_memory_attributes(u64::from(vcpu) << 24, SLOT << 12, 8)
                .unwrap();
        }
        for vcpu in 0..2 {
            vm.load_mmu(vcpu).unwrap();
        }
        vm.finalize().unwrap();
        rig.forget_calls();
        Self {
            rig: Arc::new(rig),
            vm: Arc::new(vm),
        }
    }

    pub(crate) fn mapped(self, gfns: std::ops::Range<u64>) -> Self {
        map_private(&self.vm, gfns);
        self.rig.forget_calls();
        self
    }

    pub(crate) fn calls(&self, leaf: Leaf) -> u64 {
        self.rig.port.succeeded(leaf)
    }

    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Vm) -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let vm = Arc::clone(&self.vm);
        thread::spawn(move || act(&vm))
    }

    /// Quiet, clean, and everything comes back.
    pub(crate) fn end(self) {
        self.rig.look_at_calls();
        assert!(!self.vm.bugs().is_dead(), "{:?}", self.vm.bugs().reports());
        check_invariants(&self.vm, &self.rig);
        state::destroy(&self.vm, &self.rig);
    }
}

/// A vCPU that faults until it gets an answer other than RETRY.
pub(crate) fn fault(vm: &Vm, vcpu: u32, fault: Fault) -> Result<RetPf, VmError> {
    loop {
        match vm.handle_fault(vcpu, fault).map(|report| report.ret_pf) {
            Ok(RetPf::Retry) | Err(VmError::Busy { .. }) => thread::yield_now(),
            answer => return answer,
        }
    }
}

pub(crate) fn convert(vm: &Vm, gfns: std::ops::Range<u64>, attributes: u64) {
    vm.set_memory_attributes(gfns.start << 12, (gfns.end - gfns.start) << 12, attributes)
        .unwrap();
}

pub(crate) fn private_fault_exit(answer: &Result<RetPf, VmError>, gfn: u64) -> bool {
    let record = MemoryFault {
        gpa: gfn << 12,
        size: 4096,
        flags: 8,
    };
    answer
        .as_ref()
        .is_err_and(|error| error.errno() == errno::EFAULT && error.memory_fault() == Some(record))
}

pub(crate) fn c01_two_vcpus_on_one_frame_map_it_once(mode: Mode) {
    let world = World::new(mode);
    let other = world.spawn(|vm| fault(vm, 1, private(1)).unwrap());
    let mut answers = [
        fault(&world.vm, 0, private(1)).unwrap(),
        other.join().unwrap(),
    ];
    answers.sort_by_key(|ret_pf| *ret_pf == RetPf::Spurious);
    assert_eq!(answers, [RetPf::Fixed, RetPf::Spurious]);
    assert_eq!(world.calls(Leaf::MEM_SEPT_ADD), 3);
    assert_eq!(world.calls(Leaf::MEM_PAGE_AUG), 1);
    world.end();
}

pub(crate) fn c02_two_vcpus_on_two_frames_of_one_table_link_it_once(mode: Mode) {
    let world = World::new(mode);
    let other = world.spawn(|vm| fault(vm, 1, private(2)).unwrap());
    assert_eq!(fault(&world.vm, 0, private(1)).unwrap(), RetPf::Fixed);
    assert_eq!(other.join().unwrap(), RetPf::Fixed);
    assert_eq!(world.calls(Leaf::MEM_SEPT_ADD), 3);
    assert_eq!(world.calls(Leaf::MEM_PAGE_AUG), 2);
    world.end();
}

pub(crate) fn c04_a_busy_table_is_linked_by_whoever_comes_next(mode: Mode) {
    let world = World::new(mode);
    world.rig.port.inject(Rule::busy(Leaf::MEM_SEPT_ADD, 1));
    world.rig.port.inject(Rule {
        skip: 1,
        ..Rule::busy(Leaf::MEM_PAGE_AUG, 1)
    });
    let other = world.spawn(|vm| fault(vm, 1, private(2)).unwrap());
    assert_eq!(fault(&world.vm, 0, private(1)).unwrap(), RetPf::Fixed);
    assert_eq!(other.join().unwrap(), RetPf::Fixed);
    assert_eq!(world.calls(Leaf::MEM_SEPT_ADD), 3);
    assert_eq!(world.calls(Leaf::MEM_PAGE_AUG), 2);
    world.end();
}

pub(crate) fn c08_a_conversion_beside_the_frame_only_delays_the_fault(mode: Mode) {
    let world = World::new(mode).mapped(2..3);
    let other = world.spawn(|vm| convert(vm, 2..4, 0));
    assert_eq!(fault(&world.vm, 0, private(1)), Ok(RetPf::Fixed));
    other.join().unwrap();
    assert_eq!(world.vm.info().pages_4k, 1);
    world.end();
}

pub(crate) fn c11_no_leaf_stays_on_a_page_that_a_hole_freed(mode: Mode) {
    let world = World::new(mode);
    let other = world.spawn(|vm| {
        vm.punch_hole(0, 0, SLOT << 12)
            .map(|(_, freed)| freed)
            .unwrap()
    });
    assert_eq!(fault(&world.vm, 0, private(1)), Ok(RetPf::Fixed));
    other.join().unwrap();
    let mapped = world.vm.info().pages_4k;
    let (_, freed) = world.vm.punch_hole(0, 0, SLOT << 12).unwrap();
    assert_eq!(freed, mapped, "a page is there exactly when it is mapped");
    world.end();
}

pub(crate) fn c18_two_conversions_take_each_page_once(mode: Mode) {
    let world = World::new(mode).mapped(0..6);
    let other = world.spawn(|vm| convert(vm, 2..6, 0));
    convert(&world.vm, 0..4, 0);
    other.join().unwrap();
    for leaf in [
        Leaf::MEM_RANGE_BLOCK,
        Leaf::MEM_PAGE_REMOVE,
        Leaf::PHYMEM_PAGE_WBINVD,
    ] {
        assert_eq!(world.calls(leaf), 6, "{leaf}");
    }
    assert_eq!(world.vm.info().pages_4k, 0);
    world.end();
}
