//! Schedules of two threads on one VM, explored by shuttle: faults, conversions, holes, the end.
//!
//! Locks, atomics and condition variables of the core are shuttle's in this package, and the
//! port switches threads around every SEAMCALL. Three things are not instrumented, which is sound
//! because none of them blocks: arc-swap snapshots, crossbeam-epoch pins and `OnceLock`s whose
//! initialisers do nothing but allocate. The module core runs each call in one piece.
//!
//! Ids are those of the scenario tables (see scenarios/).
//!
//! | pair | tests here | in direct.rs |
//! |---|---|---|
//! | fault, fault | c01, c02, c04, vcpus that empty the table cache | c16 |
//! | fault, zap | c06, c07, c08 | c15, aging against a fast zap |
//! | fault, convert | c06, c07, c08, there and back, a batch without a slot | |
//! | fault, hole | c11 | |
//! | convert, convert | c18 | |
//! | zap, free | a fault during the end of the VM | a zap and a fast zap, c17, NX recovery |
//! | split, fault | | c16, an eager split |
//! | load, unload of roots | two vCPUs, a fast zap and faulting vCPUs | two vCPUs, a fast zap and a load |
//! | entry, zap | a vCPU that runs and a refused removal | |

extern crate tdp_mmu_interleavings as tdp_mmu;

#[path = "../../tests/common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use common::gmem_slot;
use common::guest::Guest;
use common::pairs::{self, SLOT, World, convert, fault, private_fault_exit};
use common::port::{Hook, Rule, When};
use common::state;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::thread;
use tdp_mmu::{
    Entry, Fault, GuestOp, GuestPort, GuestStep, Mode, RetPf, RunExit, RunRequest, SeamError,
    VmError, errno,
};
use tdx_defs::{Leaf, Seamcall};
use tdx_module::Violations;

/// Schedules of each test: random ones, and some that preempt rarely but at the worst moment.
const RANDOM: usize = 160;
const PCT: usize = 80;
const DEPTH: usize = 3;

fn explore(scenario: impl Fn(Mode) + Send + Sync + 'static) {
    explore_some(RANDOM, PCT, scenario);
}

/// For scenarios whose one thread has much to do before the other one begins.
fn explore_some(random: usize, pct: usize, scenario: impl Fn(Mode) + Send + Sync + 'static) {
    let scenario = Arc::new(scenario);
    for mode in [Mode::Kernel, Mode::Batched] {
        run(RandomScheduler::new(random), mode, Arc::clone(&scenario));
        run(PctScheduler::new(DEPTH, pct), mode, Arc::clone(&scenario));
    }
}

fn run(
    scheduler: impl Scheduler + 'static,
    mode: Mode,
    scenario: Arc<impl Fn(Mode) + Send + Sync + 'static>,
) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    shuttle::Runner::new(scheduler, config).run(move || scenario(mode));
}

#[test]
fn c01_two_vcpus_on_one_frame_map_it_once() {
    explore(pairs::c01_two_vcpus_on_one_frame_map_it_once);
}

#[test]
fn c02_two_vcpus_on_two_frames_of_one_table_link_it_once() {
    explore(pairs::c02_two_vcpus_on_two_frames_of_one_table_link_it_once);
}

#[test]
fn c04_a_busy_table_is_linked_by_whoever_comes_next() {
    explore(pairs::c04_a_busy_table_is_linked_by_whoever_comes_next);
}

/// One vCPU faults while its frame is made shared: how often the fault came first, and second.
fn fault_against_conversion() -> (usize, usize) {
    static ONCE: OnceLock<(usize, usize)> = OnceLock::new();
    *ONCE.get_or_init(explore_fault_against_conversion)
}

fn explore_fault_against_conversion() -> (usize, usize) {
    let seen = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let counts = Arc::clone(&seen);
    explore(move |mode| {
        let world = World::new(mode);
        let other = world.spawn(|vm| convert(vm, 1..2, 0));
        let answer = fault(&world.vm, 0, common::private(1));
        other.join().unwrap();
        let (aug, removed) = (
            world.calls(Leaf::MEM_PAGE_AUG),
            world.calls(Leaf::MEM_PAGE_REMOVE),
        );
        if answer == Ok(RetPf::Fixed) {
            seen[0].fetch_add(1, Ordering::SeqCst);
            assert_eq!((aug, removed), (1, 1), "mapped, then taken away");
        } else {
            seen[1].fetch_add(1, Ordering::SeqCst);
            assert!(private_fault_exit(&answer, 1), "{answer:?}");
            assert_eq!(aug, removed);
        }
        assert!(private_fault_exit(
            &fault(&world.vm, 0, common::private(1)),
            1
        ));
        assert_eq!(world.vm.info().pages_4k, 0);
        world.end();
    });
    (
        counts[0].load(Ordering::SeqCst),
        counts[1].load(Ordering::SeqCst),
    )
}

#[test]
fn c06_a_fault_ahead_of_a_conversion_is_mapped_and_taken_away() {
    assert_ne!(fault_against_conversion().0, 0);
}

#[test]
fn c07_a_fault_behind_a_conversion_leaves_with_a_memory_fault() {
    assert_ne!(fault_against_conversion().1, 0);
}

#[test]
fn c08_a_conversion_beside_the_frame_only_delays_the_fault() {
    explore(pairs::c08_a_conversion_beside_the_frame_only_delays_the_fault);
}

#[test]
fn c11_no_leaf_stays_on_a_page_that_a_hole_freed() {
    explore(pairs::c11_no_leaf_stays_on_a_page_that_a_hole_freed);
}

#[test]
fn a_fault_during_the_end_of_the_vm_is_mapped_before_it_or_refused() {
    explore(|mode| {
        let world = World::new(mode).mapped(3..4);
        let other = world.spawn(|vm| vm.destroy().unwrap().1);
        let answer = fault(&world.vm, 0, common::private(1));
        assert_eq!(other.join().unwrap(), 0, "leaked pages");
        let dead = answer
            .as_ref()
            .is_err_and(|error| error.errno() == errno::EIO);
        assert!(answer == Ok(RetPf::Fixed) || dead, "{answer:?}");
        state::assert_nothing_left(&world.rig);
        assert!(
            !world.vm.bugs().is_bugged(),
            "{:?}",
            world.vm.bugs().reports()
        );
    });
}

#[test]
fn c18_two_conversions_take_each_page_once() {
    explore(pairs::c18_two_conversions_take_each_page_once);
}

#[test]
fn there_and_back_ends_with_one_kind_of_mapping() {
    explore(|mode| {
        let world = World::new(mode).mapped(1..2);
        let other = world.spawn(|vm| {
            convert(vm, 1..2, 0);
            convert(vm, 1..2, 8);
        });
        let shared = common::shared(&world.vm, 1);
        let answers = [
            fault(&world.vm, 0, common::private(1)),
            fault(&world.vm, 0, shared),
        ];
        other.join().unwrap();
        for answer in answers {
            assert!(
                matches!(answer, Ok(_) | Err(VmError::MemoryFault { .. })),
                "{answer:?}"
            );
        }
        let trees = state::trees(&world.vm);
        assert!(trees.direct.is_empty(), "the frame is private");
        world.end();
    });
}

#[test]
fn a_batch_that_touches_memory_without_a_slot_does_not_stall_a_conversion() {
    explore(|mode| {
        let world = World::new(mode).mapped(2..3);
        let other = world.spawn(|vm| convert(vm, 2..3, 0));
        let faults = [
            common::private(1),
            common::shared(&world.vm, 0x9_0000),
            common::private(0x9_0000),
            common::private(3),
        ];
        let report = world.vm.handle_faults(0, &faults).unwrap();
        other.join().unwrap();
        assert_eq!((report.fixed, report.others_count), (2, 2), "{report:?}");
        world.end();
    });
}

#[test]
fn a_fast_zap_gives_faulting_vcpus_a_new_root() {
    explore(|mode| {
        let world = World::new(mode).mapped(2..3);
        convert(&world.vm, 1..2, 0);
        let other = world.spawn(|vm| vm.zap_all_fast().unwrap());
        let shared = common::shared(&world.vm, 1);
        assert_eq!(fault(&world.vm, 0, shared), Ok(RetPf::Fixed));
        assert_eq!(fault(&world.vm, 1, common::private(2)), Ok(RetPf::Spurious));
        other.join().unwrap();
        world.end();
    });
}

#[test]
fn two_vcpus_of_a_td_load_and_put_their_roots_at_once() {
    explore(|mode| {
        let world = World::new(mode).mapped(1..2);
        let other = world.spawn(|vm| {
            vm.unload_mmu(1).unwrap();
            vm.load_mmu(1).unwrap();
        });
        world.vm.unload_mmu(0).unwrap();
        world.vm.load_mmu(0).unwrap();
        other.join().unwrap();
        // The mirror root is not put by an unload, and not taken twice.
        let roots = world.vm.roots();
        let roots: Vec<_> = roots.iter().map(|root| (root.role, root.count)).collect();
        assert_eq!(roots, [(0x3784, 3), (0x8_3784, 3)]);
        assert_eq!(fault(&world.vm, 1, common::private(1)), Ok(RetPf::Spurious));
        world.end();
    });
}

#[test]
fn vcpus_that_empty_the_table_cache_together_find_more() {
    explore_some(RANDOM / 4, PCT / 4, |mode| {
        let world = World::new(mode);
        let (near, far, farther) = (0x1_0000, 1 << 27, 2 << 27);
        for (slot, first, pages) in [(2, near, 33 << 9), (3, far, SLOT), (4, farther, SLOT)] {
            world
                .vm
                .set_user_memory_region(gmem_slot(slot, first, pages))
                .unwrap();
            convert(&world.vm, first..first + pages, 8);
        }
        // 3 + 32 of the 40 tables of the cache: it is not filled up again, and two new paths of
        // three tables do not both find what they need.
        let faults: Vec<Fault> = (0..33).map(|n| common::private(near + (n << 9))).collect();
        assert_eq!(world.vm.handle_faults(0, &faults).unwrap().fixed, 33);
        let other = world.spawn(move |vm| fault(vm, 1, common::private(far)));
        assert_eq!(
            fault(&world.vm, 0, common::private(farther)),
            Ok(RetPf::Fixed)
        );
        assert_eq!(other.join().unwrap(), Ok(RetPf::Fixed));
        assert_eq!(world.calls(Leaf::MEM_SEPT_ADD), 41);
        world.end();
    });
}

/// The way of a vCPU into the module, for a test that wants to know whether it is inside.
struct Watched {
    guest: Guest,
    is_inside: Arc<AtomicBool>,
    is_closed: Arc<AtomicBool>,
}

impl GuestPort for Watched {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        assert!(!self.is_closed.load(Ordering::SeqCst), "TDH.VP.ENTER");
        self.is_inside.store(true, Ordering::SeqCst);
        thread::yield_now();
        self.guest.enter(lp, call)
    }

    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError> {
        thread::yield_now();
        let steps = self.guest.play(ops)?;
        if matches!(steps.last(), Some(GuestStep::Exited(_))) {
            self.is_inside.store(false, Ordering::SeqCst);
        }
        Ok(steps)
    }

    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError> {
        self.guest.read_shared(hpa, len)
    }

    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError> {
        self.guest.write_shared(hpa, data)
    }
}

#[test]
fn no_vcpu_is_inside_while_a_refused_removal_is_made_again() {
    explore(|mode| {
        let world = World::new(mode).mapped(1..2);
        let (is_inside, is_closed) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let port = &world.rig.port;
        port.inject(Rule::busy(Leaf::MEM_RANGE_BLOCK, 1));
        let (inside, closed) = (Arc::clone(&is_inside), Arc::clone(&is_closed));
        let second = Hook::at(Leaf::MEM_RANGE_BLOCK, When::Before, move || {
            assert!(!inside.load(Ordering::SeqCst), "it was not kicked out");
            closed.store(true, Ordering::SeqCst);
            thread::yield_now();
        });
        port.hook(second.skip(1));
        let closed = Arc::clone(&is_closed);
        let answered = Hook::at(Leaf::MEM_RANGE_BLOCK, When::Answered, move || {
            thread::yield_now();
            closed.store(false, Ordering::SeqCst);
        });
        port.hook(answered.skip(1));
        let module = Arc::clone(&world.rig.module);
        let running = world.spawn(move |vm| {
            let mut port = Watched {
                guest: Guest::new(&module),
                is_inside,
                is_closed,
            };
            let request = RunRequest {
                ops: vec![GuestOp::Interrupt; 3],
                answer: 0,
            };
            vm.run_vcpu(0, &mut port, &request).unwrap()
        });
        convert(&world.vm, 1..2, 0);
        let report = running.join().unwrap();
        assert_eq!((report.exit, report.done.len()), (RunExit::Done, 3));
        assert_eq!(world.calls(Leaf::MEM_PAGE_REMOVE), 1);
        assert_eq!(world.rig.module.violations(), Violations::default());
        world.end();
    });
}
