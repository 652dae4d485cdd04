//! A vCPU that runs while the host takes a page away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tdp_mmu::{
    Entry, GuestOp, GuestPort, GuestStep, Mode, RunExit, RunReport, RunRequest, SeamError, Vm,
};
use tdx_defs::{Gpa, Gpaw, Leaf, Seamcall, TdxLevel};
use tdx_module::LockMode;
use tdx_module::hooks::LockObject;

use super::{REMOVAL, all_done, calls, convert, end, let_others_run, two_vcpus};
use crate::common::gate::Gate;
use crate::common::guest::Guest;
use crate::common::port::{Hook, Rule, When};
use crate::common::{self, Rig, witness};

/// A guest whose first operation stops in the middle of a TDCALL.
pub(super) struct Stopped<'a> {
    guest: Guest,
    in_call: &'a dyn Fn(),
    has_stopped: bool,
}

impl<'a> Stopped<'a> {
    pub(super) fn new(rig: &Rig, in_call: &'a dyn Fn()) -> Self {
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

pub(super) fn accept(gfn: u64) -> GuestOp {
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

pub(super) fn run(vm: &Vm, port: &mut dyn GuestPort, ops: Vec<GuestOp>) -> RunReport {
    vm.run_vcpu(0, port, &RunRequest { ops, answer: 0 })
        .unwrap()
}

pub(crate) fn c13_a_guest_call_that_holds_the_tree_is_interrupted_for_a_zap() {
    for mode in witness::modes() {
        let (rig, vm) = two_vcpus(mode);
        common::map_private(&vm, 1..2);
        rig.forget_calls();
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

/// A vCPU whose roots are loaded goes in while another thread holds mmu_lock for a removal, and
/// only the retry of a refused call keeps it out.
pub(crate) fn c12_no_vcpu_enters_between_a_refused_call_and_its_retry() {
    for mode in witness::modes() {
        let (rig, vm) = two_vcpus(mode);
        common::map_private(&vm, 1..2);
        rig.forget_calls();
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

/// A guest whose host does nothing about its fault meets the defence at the seventh time; the exit
/// that the module makes up for it is handled like the guest's own.
pub(crate) fn c27_an_exit_of_the_zero_step_defence_is_a_fault_like_any_other() {
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
    rig.forget_calls();
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
