//! Two threads on the direct root of an ordinary VM: bodies that hold under every schedule.

use std::sync::Arc;

use tdp_mmu::{Fault, HostPageSize, RetPf, SlotSpec, Vm, VmConfig};

use super::state::{self, check_invariants};
use super::{Rig, USER_BASE, user_slot};
#[cfg(feature = "shuttle")]
use shuttle::thread;
#[cfg(not(feature = "shuttle"))]
use std::thread;

/// Exit qualifications.
pub(crate) const WRITE: u64 = 2;
pub(crate) const PRESENT_WRITE: u64 = 2 | 1 << 3;
pub(crate) const FETCH: u64 = 4;

/// An ordinary VM with two vCPUs and one slot of 2 MiB, which the host maps with one page.
pub(crate) struct World {
    rig: Rig,
    pub(crate) vm: Arc<Vm>,
}

pub(crate) fn slot(log_dirty: bool) -> SlotSpec {
    SlotSpec {
        log_dirty,
        host_page_size: HostPageSize::Size2M,
        ..user_slot(0, 0, 0x200)
    }
}

impl World {
    pub(crate) fn new(config: VmConfig) -> Self {
        let rig = Rig::new();
        let vm = rig.ordinary(config);
        vm.add_vcpu().unwrap();
        vm.set_user_memory_region(slot(false)).unwrap();
        Self {
            rig,
            vm: Arc::new(vm),
        }
    }

    pub(crate) fn logging(self, on: bool) -> Self {
        self.vm.set_user_memory_region(slot(on)).unwrap();
        self
    }

    pub(crate) fn mapped(self, gfn: u64) -> Self {
        assert_eq!(fault(&self.vm, 0, gfn, WRITE), RetPf::Fixed);
        self
    }

    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Vm) -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let vm = Arc::clone(&self.vm);
        thread::spawn(move || act(&vm))
    }

    pub(crate) fn pages(&self) -> (u64, u64) {
        let info = self.vm.info();
        (info.pages_4k, info.pages_2m)
    }

    /// Whether the frame is mapped, and writable.
    pub(crate) fn leaf(&self, gfn: u64) -> Option<bool> {
        let walk = self.vm.walk(gfn << 12, false).unwrap();
        let last = walk.entries.last().filter(|_| walk.mapped)?;
        Some(last.spte & 2 != 0)
    }

    pub(crate) fn end(self) {
        assert!(!self.vm.bugs().is_dead(), "{:?}", self.vm.bugs().reports());
        assert_eq!(self.vm.bugs().reports(), []);
        check_invariants(&self.vm, &self.rig);
        state::destroy(&self.vm, &self.rig);
    }
}

/// A vCPU that faults until it gets an answer other than RETRY.
pub(crate) fn fault(vm: &Vm, vcpu: u32, gfn: u64, qualification: u64) -> RetPf {
    let fault = Fault {
        gpa: gfn << 12,
        qualification,
        ..Fault::default()
    };
    loop {
        match vm.handle_fault(vcpu, fault).unwrap().ret_pf {
            RetPf::Retry => thread::yield_now(),
            answer => return answer,
        }
    }
}

pub(crate) fn unmap(vm: &Vm) {
    vm.unmap_hva(USER_BASE, USER_BASE + (1 << 21)).unwrap();
}

pub(crate) fn is_dirty(words: &[u64], gfn: usize) -> bool {
    words[gfn / 64] >> (gfn % 64) & 1 != 0
}

pub(crate) fn c15_the_fast_path_and_a_zap_do_not_lose_each_other() {
    let world = World::new(VmConfig::default()).mapped(5).logging(true);
    let other = world.spawn(unmap);
    let answer = fault(&world.vm, 0, 5, PRESENT_WRITE);
    other.join().unwrap();
    assert!(
        matches!(answer, RetPf::Fixed | RetPf::Spurious),
        "{answer:?}"
    );
    // What the fault put back in is logged.
    let (dirty, _) = world.vm.get_dirty_log(0).unwrap();
    assert!(is_dirty(&dirty, 5));
    world.end();
}

pub(crate) fn c16_two_vcpus_split_a_huge_leaf_once() {
    let lazy = VmConfig {
        eager_page_split: false,
        ..VmConfig::default()
    };
    let world = World::new(lazy).mapped(5).logging(true);
    assert_eq!(world.pages(), (0, 1));
    let other = world.spawn(|vm| fault(vm, 1, 6, PRESENT_WRITE));
    assert_eq!(fault(&world.vm, 0, 5, PRESENT_WRITE), RetPf::Fixed);
    assert_eq!(other.join().unwrap(), RetPf::Fixed);
    assert_eq!(world.pages(), (512, 0));
    let writable: Vec<_> = [4, 5, 6, 7].map(|gfn| world.leaf(gfn)).to_vec();
    assert_eq!(writable, [Some(false), Some(true), Some(true), Some(false)]);
    world.end();
}

pub(crate) fn c17_a_fault_in_a_table_that_becomes_a_leaf_loses_nothing() {
    let world = World::new(VmConfig::default()).logging(true).mapped(5);
    let other = world.spawn(|vm| {
        vm.set_user_memory_region(slot(false)).unwrap();
    });
    let answer = fault(&world.vm, 0, 7, WRITE);
    other.join().unwrap();
    assert!(
        matches!(answer, RetPf::Fixed | RetPf::Spurious),
        "{answer:?}"
    );
    // Frame 5 made the leaf, so frame 7 is in it, or in a table that came after.
    assert!(world.leaf(7).is_some() && world.leaf(5).is_some());
    world.end();
}
