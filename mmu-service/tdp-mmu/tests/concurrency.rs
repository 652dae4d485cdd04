//! Two sides at once, one of them held in the middle of a call: what the other one may do
//! meanwhile, and the calls that both make, in order. Ids are those of the scenario tables.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use common::gate::Gate;
use common::guest::Guest;
use common::port::{Call, Hook, Rule, When};
use common::state::{self, check_invariants};
use common::{Rig, private};
use tdp_mmu::{
    Entry, GuestOp, GuestPort, GuestStep, InitRegion, Measure, Mode, RetPf, RunExit, RunReport,
    RunRequest, SeamError, Vm, VmError, errno,
};
use tdx_defs::{Gpa, Gpaw, Leaf, Seamcall, TdxLevel};
use tdx_module::hooks::LockObject;
use tdx_module::{LockMode, Violations};

const MODES: [Mode; 2] = [Mode::Kernel, Mode::Batched];

/// TDH.MEM.SEPT.ADD of the lowest table for frame 0.
const LOWEST_TABLE: u64 = 1;

/// Leaf, and whether the module did it.
fn calls(rig: &Rig) -> Vec<(Leaf, bool)> {
    let made = rig.port.take_calls();
    made.iter()
        .map(|Call { leaf, status, .. }| (*leaf, status.is_success()))
        .collect()
}

fn all_done(leaves: &[Leaf]) -> Vec<(Leaf, bool)> {
    leaves.iter().map(|&leaf| (leaf, true)).collect()
}

const PATH: [Leaf; 4] = [
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_PAGE_AUG,
];
const REMOVAL: [Leaf; 4] = [
    Leaf::MEM_RANGE_BLOCK,
    Leaf::MEM_TRACK,
    Leaf::MEM_PAGE_REMOVE,
    Leaf::PHYMEM_PAGE_WBINVD,
];

/// Lets threads that could go on do so; those that wait for the caller stay where they are.
fn let_others_run() {
    for _ in 0..2000 {
        thread::yield_now();
    }
}

/// E4 with a second vCPU, nothing recorded yet.
fn two_vcpus(mode: Mode) -> (Rig, Vm) {
    let rig = Rig::new();
    let vm = rig.pre(mode, Gpaw::W48);
    vm.add_vcpu().unwrap();
    for vcpu in 0..2 {
        vm.load_mmu(vcpu).unwrap();
    }
    vm.finalize().unwrap();
    rig.port.take_calls();
    (rig, vm)
}

fn ret_pf(vm: &Vm, vcpu: u32, gfn: u64) -> Result<RetPf, VmError> {
    vm.handle_fault(vcpu, private(gfn))
        .map(|report| report.ret_pf)
}

fn convert(vm: &Vm, gfn: u64, attributes: u64) -> Result<(), VmError> {
    vm.set_memory_attributes(gfn << 12, 0x1000, attributes)
        .map(drop)
}

fn end(vm: &Vm, rig: &Rig) {
    assert_eq!(vm.bugs().reports(), []);
    assert_eq!(rig.module.violations(), Violations::default());
    check_invariants(vm, rig);
    state::destroy(vm, rig);
}

#[test]
fn c03_nobody_builds_below_an_entry_whose_table_is_on_its_way() {
    for mode in MODES {
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
#[test]
fn a_conversion_waits_for_the_call_of_a_fault() {
    for mode in MODES {
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

/// A guest whose first operation stops in the middle of a TDCALL.
struct Stopped<'a> {
    guest: Guest,
    in_call: &'a dyn Fn(),
    has_stopped: bool,
}

impl<'a> Stopped<'a> {
    fn new(rig: &Rig, in_call: &'a dyn Fn()) -> Self {
        Self {
            guest: Guest::new(&rig.module),
            in_call,
            has_stopped: false,
        }
    }
}

impl GuestPort for Stopped<'_> {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        self.guest.enter(lp, call)
    }

    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError> {
        if !std::mem::replace(&mut self.has_stopped, true) {
            (self.in_call)();
        }
        self.guest.play(ops)
    }

    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError> {
        self.guest.read_shared(hpa, len)
    }

    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError> {
        self.guest.write_shared(hpa, data)
    }
}

fn accept(gfn: u64) -> GuestOp {
    GuestOp::Accept {
        gpa: Gpa::new(gfn << 12),
        level: TdxLevel::new(0).unwrap(),
    }
}

fn read(gfn: u64) -> GuestOp {
    GuestOp::Read {
        gpa: Gpa::new(gfn << 12),
        len: 8,
    }
}

fn run(vm: &Vm, port: &mut dyn GuestPort, ops: Vec<GuestOp>) -> RunReport {
    vm.run_vcpu(0, port, &RunRequest { ops, answer: 0 })
        .unwrap()
}

#[test]
fn c13_a_guest_call_that_holds_the_tree_is_interrupted_for_a_zap() {
    for mode in MODES {
        let (rig, vm) = two_vcpus(mode);
        common::map_private(&vm, 1..2);
        rig.port.take_calls();
        let before = vm.stats().counts.kicks;
        let tree = LockObject::SeptTree { tdr: vm.info().tdr };
        let holds = Gate::default();
        let (refused, is_refused) = std::sync::mpsc::channel();
        let hook = Hook::at(Leaf::MEM_RANGE_BLOCK, When::Answered, move || {
            let _ = refused.send(());
        });
        rig.port.hook(hook);
        let in_call = || {
            assert!(rig.module.hold_lock_as_guest(tree, LockMode::Shared));
            holds.open();
            // The host kicks because of this, and the interrupt ends the guest's call.
            is_refused.recv().unwrap();
            assert!(rig.module.release_lock(tree, LockMode::Shared));
        };
        thread::scope(|scope| {
            let (module, vm) = (&rig, &vm);
            let conversion = scope.spawn(|| {
                holds.wait_until_open();
                convert(vm, 1, 0)
            });
            let mut port = Stopped::new(module, &in_call);
            let report = run(vm, &mut port, vec![GuestOp::Interrupt; 8]);
            assert_eq!(report.exit, RunExit::Done, "{mode:?}");
            conversion.join().unwrap().unwrap();
        });
        let mut expected = all_done(&REMOVAL);
        expected.insert(0, (Leaf::MEM_RANGE_BLOCK, false));
        assert_eq!(calls(&rig), expected, "{mode:?}");
        assert_eq!(vm.stats().counts.kicks - before, 2);
        end(&vm, &rig);
    }
}

/// vCPU 0 has faulted at one place so often that its next entry checks the place under the lock of
/// the tree. While that entry is in there, SEPT.ADD and AUG of vCPU 1 are busy.
#[test]
fn c14_a_fault_beside_the_zero_step_defence_is_busy_and_retried_in_the_host() {
    const BUSY: u32 = 3;
    for mode in MODES {
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

/// A guest whose host does nothing about its fault meets the defence at the seventh time; the exit
/// that the module makes up for it is handled like the guest's own.
#[test]
fn an_exit_of_the_zero_step_defence_is_a_fault_like_any_other() {
    let rig = Rig::new();
    let vm = rig.empty(Mode::Kernel, Gpaw::W48);
    let mut port = Unblocking::new(&rig, vm.info().tdr.get());
    run(&vm, &mut port, vec![accept(7)]);
    // Somebody blocks the page behind the back of the VM.
    port.host_call(Leaf::MEM_RANGE_BLOCK, 0x7000);
    let track = Seamcall {
        rcx: port.tdr,
        ..Seamcall::new(Leaf::MEM_TRACK)
    };
    assert!(rig.module.seamcall(LP, &track).status().is_success());
    let enter = Seamcall {
        rcx: port.tdvpr,
        ..Seamcall::new(Leaf::VP_ENTER)
    };
    let touch = tdx_module::GuestOp::Read {
        gpa: Gpa::new(0x7000),
        len: 8,
    };
    for _ in 0..7 {
        let entry = rig.module.enter_vcpu(LP, &enter);
        assert!(matches!(entry, tdx_module::Entry::Entered { .. }));
        let step = rig.module.guest(LP, &touch);
        assert!(matches!(step, tdx_module::GuestStep::Exited(_)));
    }
    rig.port.take_calls();
    port.unblock_at = Some(2);
    let report = run(&vm, &mut port, vec![read(7)]);
    assert_eq!(report.exit, RunExit::Done, "{report:?}");
    assert_eq!(report.counts.pf_spurious, 1);
    assert_eq!(report.counts.seamcalls.get(Leaf::VP_ENTER), 2);
    assert_eq!(report.entries, 1, "the other one was the defence's");
    assert_eq!(calls(&rig), []);
    end(&vm, &rig);
}

const LP: tdx_module::LpId = tdx_module::LpId(0);

/// Unblocks a page before one of the entries.
struct Unblocking<'a> {
    guest: Guest,
    rig: &'a Rig,
    tdr: u64,
    tdvpr: u64,
    /// At which entry from here.
    unblock_at: Option<u32>,
}

impl<'a> Unblocking<'a> {
    fn new(rig: &'a Rig, tdr: u64) -> Self {
        Self {
            guest: Guest::new(&rig.module),
            rig,
            tdr,
            tdvpr: 0,
            unblock_at: None,
        }
    }

    fn host_call(&self, leaf: Leaf, gpa: u64) {
        let call = Seamcall {
            rcx: gpa,
            rdx: self.tdr,
            ..Seamcall::new(leaf)
        };
        let result = self.rig.module.seamcall(LP, &call);
        assert!(result.status().is_success(), "{leaf}: {result:x?}");
    }
}

impl GuestPort for Unblocking<'_> {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        self.tdvpr = call.rcx;
        self.unblock_at = self.unblock_at.map(|left| left - 1);
        if self.unblock_at == Some(0) {
            self.host_call(Leaf::MEM_RANGE_UNBLOCK, 0x7000);
            self.unblock_at = None;
        }
        self.guest.enter(lp, call)
    }

    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError> {
        self.guest.play(ops)
    }

    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError> {
        self.guest.read_shared(hpa, len)
    }

    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError> {
        self.guest.write_shared(hpa, data)
    }
}

fn one_page(gfn: u64, measure: Measure) -> InitRegion<'static> {
    InitRegion {
        gpa: gfn << 12,
        size: 0x1000,
        data: &[7; 64],
        measure,
    }
}

#[test]
fn c19_what_concerns_the_whole_td_waits_for_a_vcpu_that_runs() {
    for mode in MODES {
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
#[test]
fn building_waits_for_a_vcpu_that_loads_its_roots() {
    for mode in MODES {
        let rig = Rig::new();
        let vm = rig.pre(mode, Gpaw::W48);
        vm.add_vcpu().unwrap();
        vm.load_mmu(1).unwrap();
        rig.port.take_calls();
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

#[test]
fn c24_a_hole_waits_for_a_vcpu_that_is_initialised() {
    for mode in MODES {
        let rig = Rig::new();
        let vm = rig.pre(mode, Gpaw::W48);
        common::map_private(&vm, 1..2);
        rig.port.take_calls();
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

#[test]
fn c25_a_hole_waits_for_the_population_of_its_page() {
    for mode in MODES {
        let rig = Rig::new();
        let vm = rig.pre(mode, Gpaw::W48);
        vm.load_mmu(0).unwrap();
        rig.port.take_calls();
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

/// A vCPU whose roots are loaded goes in while another thread holds mmu_lock for a removal, and
/// only the retry of a refused call keeps it out.
#[test]
fn c12_no_vcpu_enters_between_a_refused_call_and_its_retry() {
    for mode in MODES {
        let (rig, vm) = two_vcpus(mode);
        common::map_private(&vm, 1..2);
        rig.port.take_calls();
        rig.port.inject(Rule::busy(Leaf::MEM_RANGE_BLOCK, 1));
        let gate = Arc::new(Gate::default());
        let retry = Arc::clone(&gate);
        let hook = Hook::at(Leaf::MEM_RANGE_BLOCK, When::Before, move || retry.pass());
        rig.port.hook(hook.skip(1));
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let conversion = scope.spawn(|| convert(&vm, 1, 0));
            gate.wait_for_arrival();
            let running = scope.spawn(|| {
                let mut port = Watched {
                    guest: Guest::new(&rig.module),
                    may_enter: &is_over,
                };
                run(&vm, &mut port, vec![GuestOp::Interrupt])
            });
            let_others_run();
            assert!(!running.is_finished(), "{mode:?}: it waits");
            is_over.store(true, Ordering::SeqCst);
            gate.open();
            assert_eq!(running.join().unwrap().exit, RunExit::Done);
            conversion.join().unwrap().unwrap();
        });
        let mut expected = all_done(&REMOVAL);
        expected.insert(0, (Leaf::MEM_RANGE_BLOCK, false));
        assert_eq!(calls(&rig), expected, "{mode:?}");
        end(&vm, &rig);
    }
}

/// A way in that must not be used before it is allowed.
struct Watched<'a> {
    guest: Guest,
    may_enter: &'a AtomicBool,
}

impl GuestPort for Watched<'_> {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        assert!(self.may_enter.load(Ordering::SeqCst), "TDH.VP.ENTER");
        self.guest.enter(lp, call)
    }

    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError> {
        self.guest.play(ops)
    }

    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError> {
        self.guest.read_shared(hpa, len)
    }

    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError> {
        self.guest.write_shared(hpa, data)
    }
}
