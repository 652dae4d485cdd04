//! Schedules of two threads on the direct root, explored by shuttle: the fast path, splits,
//! recovery, the dirty log, the fast zap. What is said in interleavings.rs holds here, too.

extern crate tdp_mmu_interleavings as tdp_mmu;

#[path = "../../tests/common/mod.rs"]
mod common;

use std::sync::Arc;

use common::USER_BASE;
use common::direct_pairs::{
    self as pairs, FETCH, PRESENT_WRITE, WRITE, World, fault, is_dirty, slot, unmap,
};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use tdp_mmu::{RetPf, VmConfig};

/// Schedules of each test: random ones, and some that preempt rarely but at the worst moment.
const RANDOM: usize = 60;
const PCT: usize = 60;
const DEPTH: usize = 3;

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

#[test]
fn c15_the_fast_path_and_a_zap_do_not_lose_each_other() {
    explore(pairs::c15_the_fast_path_and_a_zap_do_not_lose_each_other);
}

#[test]
fn c16_two_vcpus_split_a_huge_leaf_once() {
    explore(pairs::c16_two_vcpus_split_a_huge_leaf_once);
}

#[test]
fn c17_a_fault_in_a_table_that_becomes_a_leaf_loses_nothing() {
    explore(pairs::c17_a_fault_in_a_table_that_becomes_a_leaf_loses_nothing);
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
