//! Schedules of two threads on the direct root, explored by shuttle: the fast path, splits,
//! recovery, the dirty log, the fast zap. What is said in interleavings.rs holds here, too.

extern crate tdp_mmu_interleavings as tdp_mmu;

#[path = "../../tests/common/mod.rs"]
mod common;

use std::sync::Arc;

use common::state::{self, check_invariants};
use common::{Rig, USER_BASE};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::thread;
use tdp_mmu::{Fault, HostPageSize, RetPf, SlotSpec, Vm, VmConfig};

/// Schedules of each test: random ones, and some that preempt rarely but at the worst moment.
const RANDOM: usize = 60;
const PCT: usize = 60;
const DEPTH: usize = 3;
/// Exit qualifications.
const WRITE: u64 = 2;
const PRESENT_WRITE: u64 = 2 | 1 << 3;
const FETCH: u64 = 4;

fn explore(scenario: impl Fn() + Send + Sync + 'static) {
    let scenario = Arc::new(scenario);
    run(RandomScheduler::new(RANDOM), Arc::clone(&scenario));
    run(PctScheduler::new(DEPTH, PCT), scenario);
}

fn run(scheduler: impl Scheduler + 'static, scenario: Arc<impl Fn() + Send + Sync + 'static>) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    shuttle::Runner::new(scheduler, config).run(move || scenario());
}

/// An ordinary VM with two vCPUs and one slot of 2 MiB, which the host maps with one page.
struct World {
    rig: Rig,
    vm: Arc<Vm>,
}

fn slot(log_dirty: bool) -> SlotSpec {
    SlotSpec {
        log_dirty,
        host_page_size: HostPageSize::Size2M,
        ..common::user_slot(0, 0, 0x200)
    }
}

impl World {
    fn new(config: VmConfig) -> Self {
        let rig = Rig::new();
        let vm = rig.ordinary(config);
        vm.add_vcpu().unwrap();
        vm.set_user_memory_region(slot(false)).unwrap();
        Self {
            rig,
            vm: Arc::new(vm),
        }
    }

    fn logging(self, on: bool) -> Self {
        self.vm.set_user_memory_region(slot(on)).unwrap();
        self
    }

    fn mapped(self, gfn: u64) -> Self {
        assert_eq!(fault(&self.vm, 0, gfn, WRITE), RetPf::Fixed);
        self
    }

    fn spawn<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Vm) -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let vm = Arc::clone(&self.vm);
        thread::spawn(move || act(&vm))
    }

    fn pages(&self) -> (u64, u64) {
        let info = self.vm.info();
        (info.pages_4k, info.pages_2m)
    }

    /// Whether the frame is mapped, and writable.
    fn leaf(&self, gfn: u64) -> Option<bool> {
        let walk = self.vm.walk(gfn << 12, false).unwrap();
        let last = walk.entries.last().filter(|_| walk.mapped)?;
        Some(last.spte & 2 != 0)
    }

    fn end(self) {
        assert!(!self.vm.bugs().is_dead(), "{:?}", self.vm.bugs().reports());
        assert_eq!(self.vm.bugs().reports(), []);
        check_invariants(&self.vm, &self.rig);
        state::destroy(&self.vm, &self.rig);
    }
}

/// A vCPU that faults until it gets an answer other than RETRY.
fn fault(vm: &Vm, vcpu: u32, gfn: u64, qualification: u64) -> RetPf {
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

fn unmap(vm: &Vm) {
    vm.unmap_hva(USER_BASE, USER_BASE + (1 << 21)).unwrap();
}

fn is_dirty(words: &[u64], gfn: usize) -> bool {
    words[gfn / 64] >> (gfn % 64) & 1 != 0
}

#[test]
fn c15_the_fast_path_and_a_zap_do_not_lose_each_other() {
    explore(|| {
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
    });
}

#[test]
fn c16_two_vcpus_split_a_huge_leaf_once() {
    explore(|| {
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
    });
}

#[test]
fn c17_a_fault_in_a_table_that_becomes_a_leaf_loses_nothing() {
    explore(|| {
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
    });
}

#[test]
fn an_eager_split_and_a_fault_agree_on_the_table() {
    explore(|| {
        let world = World::new(VmConfig::default()).mapped(5);
        let other = world.spawn(|vm| {
            vm.set_user_memory_region(slot(true)).unwrap();
        });
        let answer = fault(&world.vm, 0, 6, PRESENT_WRITE);
        other.join().unwrap();
        assert!(
            matches!(answer, RetPf::Fixed | RetPf::Spurious),
            "{answer:?}"
        );
        assert_eq!(world.pages(), (512, 0));
        // A leaf that is writable behind the log's back would lose writes.
        let (dirty, _) = world.vm.get_dirty_log(0).unwrap();
        assert!(answer != RetPf::Fixed || world.leaf(6) == Some(false));
        assert!(is_dirty(&dirty, 6) || world.leaf(6) == Some(false));
        world.end();
    });
}

#[test]
fn a_write_is_in_the_log_before_or_after_it_is_read() {
    explore(|| {
        let world = World::new(VmConfig::default()).mapped(5).logging(true);
        let other = world.spawn(|vm| vm.get_dirty_log(0).unwrap().0);
        assert_eq!(fault(&world.vm, 0, 5, PRESENT_WRITE), RetPf::Fixed);
        let first = other.join().unwrap();
        let writable = world.leaf(5) == Some(true);
        let (second, _) = world.vm.get_dirty_log(0).unwrap();
        assert!(is_dirty(&first, 5) || is_dirty(&second, 5));
        assert!(!writable || is_dirty(&second, 5), "it can be written again");
        world.end();
    });
}

#[test]
fn aging_never_touches_what_is_being_removed() {
    explore(|| {
        let world = World::new(VmConfig::default()).logging(true).mapped(5);
        let other = world.spawn(|vm| {
            vm.zap_all_fast().unwrap();
        });
        let end = USER_BASE + (1 << 21);
        world.vm.age_hva(USER_BASE, end).unwrap();
        other.join().unwrap();
        assert_eq!(world.pages(), (0, 0));
        world.end();
    });
}

#[test]
fn a_fast_zap_and_a_load_leave_one_valid_root() {
    explore(|| {
        let world = World::new(VmConfig::default()).mapped(5);
        let other = world.spawn(|vm| vm.zap_all_fast().unwrap());
        world.vm.load_mmu(1).unwrap();
        let answer = fault(&world.vm, 1, 5, WRITE);
        other.join().unwrap();
        assert!(
            matches!(answer, RetPf::Fixed | RetPf::Spurious),
            "{answer:?}"
        );
        let expected = match world.leaf(5) {
            Some(_) => RetPf::Spurious,
            None => RetPf::Fixed,
        };
        assert_eq!(fault(&world.vm, 0, 5, WRITE), expected);
        let valid = world
            .vm
            .roots()
            .iter()
            .filter(|root| root.role & 0x800 == 0)
            .count();
        assert_eq!(valid, 1);
        world.end();
    });
}

#[test]
fn a_zap_and_a_fast_zap_free_each_table_once() {
    explore(|| {
        let world = World::new(VmConfig::default()).logging(true).mapped(5);
        let other = world.spawn(|vm| vm.zap_all_fast().unwrap());
        unmap(&world.vm);
        other.join().unwrap();
        assert_eq!(world.pages(), (0, 0));
        assert_eq!(fault(&world.vm, 1, 5, WRITE), RetPf::Fixed);
        world.end();
    });
}

#[test]
fn two_vcpus_load_and_put_their_roots_at_once() {
    explore(|| {
        let world = World::new(VmConfig::default()).mapped(5);
        let other = world.spawn(|vm| {
            vm.load_mmu(1).unwrap();
            vm.unload_mmu(1).unwrap();
            vm.load_mmu(1).unwrap();
        });
        world.vm.unload_mmu(0).unwrap();
        world.vm.load_mmu(0).unwrap();
        other.join().unwrap();
        let roots = world.vm.roots();
        assert_eq!(roots.len(), 1, "one root for both");
        assert_eq!(roots[0].count, 3);
        assert_eq!(fault(&world.vm, 1, 5, WRITE), RetPf::Spurious);
        world.end();
    });
}

#[test]
fn nx_recovery_and_a_fetch_agree_on_the_table() {
    explore(|| {
        let nx = VmConfig {
            nx_huge_pages: true,
            ..VmConfig::default()
        };
        let world = World::new(nx).mapped(5);
        assert_eq!(fault(&world.vm, 0, 5, FETCH), RetPf::Spurious);
        let other = world.spawn(|vm| vm.recover_nx_huge_pages(8).unwrap().0);
        let answer = fault(&world.vm, 0, 6, FETCH);
        other.join().unwrap();
        assert!(
            matches!(answer, RetPf::Fixed | RetPf::Spurious),
            "{answer:?}"
        );
        let splits = world.vm.stats().nx_lpage_splits;
        assert!(splits <= 1, "{splits}");
        world.end();
    });
}
