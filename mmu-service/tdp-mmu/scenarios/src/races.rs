//! Races that KVM had, or avoids: what its policy of today does, and what the other one does or
//! would do.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_handle_ept_violation()` (local retry), `tdh_do_no_vcpus()`,
//! `tdx_mem_page_add()`; arch/x86/kvm/mmu/mmu.c, `kvm_mmu_faultin_pfn()` (slots on their way out).

use std::sync::Arc;
use std::thread;

use tdp_mmu::{
    Entry, GuestOp, GuestPort, GuestStep, Mode, RunExit, RunRequest, SeamError, SlotSpec, Vm, errno,
};
use tdx_defs::{Gpa, Gpaw, Leaf, Seamcall, TdxLevel};
use tdx_module::hooks::LockObject;
use tdx_module::{LockMode, LpId};

use super::Policy;
use crate::common::calls;
use crate::common::guest::Guest;
use crate::common::port::{Hook, Rule, When};
use crate::common::state::{self, check_invariants};
use crate::common::{self, Rig};

/// A race by name.
pub(crate) struct Race {
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    /// Both policies, the fixed one first. Panics when one does not do what it says.
    pub(crate) run: fn(Mode) -> Vec<Policy>,
}

pub(crate) const ALL: [Race; 4] = [
    Race {
        id: "prefault-slot-delete",
        title: "a prefault meets a slot that is being deleted",
        run: prefault_slot_delete,
    },
    Race {
        id: "zero-step",
        title: "AUG is busy while a vCPU faults at one place again and again",
        run: zero_step,
    },
    Race {
        id: "busy-zap",
        title: "a guest call holds the tree while its host removes a page",
        run: busy_zap,
    },
    Race {
        id: "premapped-zap",
        title: "a page of the initial image is removed before the TD is finalised",
        run: premapped_zap,
    },
];

const LP: LpId = LpId(0);

fn made(rig: &Rig) -> Vec<String> {
    let platform = rig.host.platform();
    let (global, shift) = (platform.global_hkid.into(), platform.hkid_shift());
    let calls = rig.port.take_calls();
    calls
        .iter()
        .map(|call| calls::short(call, global, shift))
        .collect()
}

fn policy(name: &'static str, outcome: &str, calls: Vec<String>) -> Policy {
    Policy {
        name,
        outcome: outcome.into(),
        calls,
    }
}

fn expect(calls: &[String], text: &str) {
    assert_eq!(calls::fold(calls), calls::fold(&calls::expand(text)));
}

fn end(vm: &Vm, rig: &Rig) {
    assert_eq!(vm.bugs().reports(), []);
    check_invariants(vm, rig);
    state::destroy(vm, rig);
}

/// The deletion is held in the middle of its removals; the prefault must not wait for it, because
/// in the kernel the deletion waits for the prefault to let go of the slots.
fn prefault_slot_delete(mode: Mode) -> Vec<Policy> {
    const TRIES: usize = 100;
    let rig = Rig::new();
    let vm = rig.empty(mode, Gpaw::W48);
    common::map_private(&vm, 1..2);
    rig.port.take_calls();
    let prefault = || {
        let result = vm.pre_fault_memory(0, 0x2000, 0x1000, &mut |_| {});
        result.unwrap_err().errno()
    };
    let gate = rig.port.gate(Leaf::MEM_RANGE_BLOCK, None, When::Before);
    thread::scope(|scope| {
        let deletion = scope.spawn(|| vm.set_user_memory_region(SlotSpec::default()));
        gate.wait_for_arrival();
        assert_eq!(prefault(), errno::EAGAIN, "at once");
        // As a loop inside the call would find it.
        let looped = (0..TRIES).filter(|_| prefault() == errno::EAGAIN).count();
        assert_eq!(looped, TRIES, "it never comes to an end");
        assert!(!deletion.is_finished());
        gate.open();
        deletion.join().unwrap().unwrap();
    });
    assert_eq!(prefault(), errno::EFAULT, "no slot any more");
    let calls = made(&rig);
    expect(&calls, "BLK TRK RMV WBP");
    end(&vm, &rig);
    let unfixed = format!(
        "retries inside the call: {TRIES} tries map nothing while the deletion is held, and in the kernel it is the caller that holds it"
    );
    vec![
        policy(
            "fixed",
            "EAGAIN at once, the deletion ends, the next prefault finds no slot",
            calls,
        ),
        policy("unfixed", &unfixed, Vec::new()),
    ]
}

/// Notes with what a vCPU is entered.
struct Recorder {
    guest: Guest,
    tdvpr: u64,
}

impl GuestPort for Recorder {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        self.tdvpr = call.rcx;
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

fn zero_step(mode: Mode) -> Vec<Policy> {
    const BUSY: u32 = 8;
    let rig = Rig::new();
    let vm = rig.empty(mode, Gpaw::W48);
    common::map_private(&vm, 1..2);
    rig.port.take_calls();
    rig.port.inject(Rule::busy(Leaf::MEM_PAGE_AUG, BUSY));
    let mut port = Recorder {
        guest: Guest::new(&rig.module),
        tdvpr: 0,
    };
    let level = TdxLevel::new(0).expect("the level of 4 KiB");
    let gpa = Gpa::new(0x2000);
    let request = RunRequest {
        ops: vec![GuestOp::Accept { gpa, level }],
        answer: 0,
    };
    let report = vm.run_vcpu(0, &mut port, &request).unwrap();
    assert_eq!((report.exit, report.entries), (RunExit::Done, 2));
    let fixed = made(&rig);
    expect(&fixed, "AUG(busy)*8 AUG");

    // Entered again each time that AUG was busy.
    let enter = Seamcall {
        rcx: port.tdvpr,
        ..Seamcall::new(Leaf::VP_ENTER)
    };
    let touch = tdx_module::GuestOp::Read {
        gpa: Gpa::new(0x3000),
        len: 8,
    };
    let mut unfixed = Vec::new();
    let refused = loop {
        match rig.module.enter_vcpu(LP, &enter) {
            tdx_module::Entry::Entered { .. } => unfixed.push("VEN".to_owned()),
            tdx_module::Entry::Refused(result) => break result,
        }
        unfixed.push("AUG(busy)".into());
        let step = rig.module.guest(LP, &touch);
        assert!(matches!(step, tdx_module::GuestStep::Exited(_)), "{step:?}");
        assert!(unfixed.len() < 100, "the defence never comes");
    };
    assert_eq!(unfixed.len(), 14, "seven entries");
    assert_eq!(refused.rax, 48, "an EPT violation that the module makes up");
    unfixed.push("VEN(ept-violation)".into());
    // What other vCPUs meet while such an entry looks at its suspects.
    let tree = LockObject::SeptTree { tdr: vm.info().tdr };
    assert!(rig.module.hold_lock(tree, LockMode::Exclusive));
    let module = Arc::clone(&rig.module);
    let release = move || assert!(module.release_lock(tree, LockMode::Exclusive));
    rig.port
        .hook(Hook::at(Leaf::MEM_PAGE_AUG, When::Answered, release));
    vm.handle_fault(0, common::private(4)).unwrap();
    let beside = made(&rig);
    expect(&beside, "AUG(busy) AUG");
    unfixed.extend(beside);
    end(&vm, &rig);
    vec![
        policy(
            "fixed",
            "the fault is retried in the host: two entries, however often AUG is busy",
            fixed,
        ),
        policy(
            "unfixed",
            "each retry enters the guest: the eighth entry is refused, and such entries hold the tree, so that AUG of other vCPUs is busy",
            unfixed,
        ),
    ]
}

fn busy_zap(mode: Mode) -> Vec<Policy> {
    let rig = Rig::new();
    let vm = rig.empty(mode, Gpaw::W48);
    common::map_private(&vm, 1..3);
    rig.port.take_calls();
    let tree = LockObject::SeptTree { tdr: vm.info().tdr };
    let hold = || assert!(rig.module.hold_lock_as_guest(tree, LockMode::Shared));
    // One try: what it is answered while a guest call holds the tree.
    hold();
    let block = Seamcall {
        rcx: 0x2000,
        rdx: vm.info().tdr.get(),
        ..Seamcall::new(Leaf::MEM_RANGE_BLOCK)
    };
    let refused = rig.module.seamcall(LP, &block).status();
    assert!(refused.is_busy(), "{refused}");
    assert!(rig.module.release_lock(tree, LockMode::Shared));

    // A host attempt that succeeds lets guests in again.
    common::map_private(&vm, 3..4);
    rig.port.take_calls();
    hold();
    let module = Arc::clone(&rig.module);
    // The kick ends the guest's call.
    let release = move || assert!(module.release_lock(tree, LockMode::Shared));
    rig.port
        .hook(Hook::at(Leaf::MEM_RANGE_BLOCK, When::Answered, release));
    let counts = vm.set_memory_attributes(0x1000, 0x1000, 0).unwrap();
    assert_eq!(counts.kicks, 2);
    let fixed = made(&rig);
    expect(&fixed, "BLK(busy) BLK TRK RMV WBP");
    end(&vm, &rig);
    vec![
        policy(
            "fixed",
            "every vCPU is kicked and kept outside, and the call is made once more",
            fixed,
        ),
        policy(
            "unfixed",
            "one try: busy, KVM_BUG_ON, and the page stays mapped in the private tree",
            vec!["BLK(busy)".into()],
        ),
    ]
}

fn premapped_zap(mode: Mode) -> Vec<Policy> {
    let rig = Rig::new();
    let vm = rig.pre(mode, Gpaw::W48);
    vm.load_mmu(0).unwrap();
    rig.port.take_calls();
    common::map_private(&vm, 1..3);
    assert_eq!(vm.info().pages_4k, 2);
    vm.set_memory_attributes(0x1000, 0x1000, 0).unwrap();
    vm.finalize().unwrap();
    let fixed: Vec<String> = made(&rig)
        .into_iter()
        .filter(|call| call != "MRD")
        .collect();
    expect(&fixed, "SA3 SA2 SA1 ADD*2 BLK RMV WBP FIN");
    end(&vm, &rig);
    let unfixed = premapped_and_not_added(mode);
    vec![
        policy(
            "fixed",
            "the leaf hook makes TDH.MEM.PAGE.ADD itself, so a mapped page is an added page, and nothing has to be counted",
            fixed,
        ),
        policy("unfixed", &unfixed, vec!["BLK(err)".into()]),
    ]
}

/// A host that maps first, counts (`nr_premapped`), and adds later: what a removal in between
/// comes to. The model's host has no such count; its calls are made here.
fn premapped_and_not_added(mode: Mode) -> String {
    let rig = Rig::new();
    let vm = rig.pre(mode, Gpaw::W48);
    vm.load_mmu(0).unwrap();
    // The tables are there, and frame 1 is mapped as far as the host goes.
    common::map_private(&vm, 2..3);
    let block = Seamcall {
        rcx: 0x1000,
        rdx: vm.info().tdr.get(),
        ..Seamcall::new(Leaf::MEM_RANGE_BLOCK)
    };
    let refused = rig.module.seamcall(LP, &block).status();
    assert!(refused.is_error() && !refused.is_busy(), "{refused}");
    end(&vm, &rig);
    format!(
        "mapping only counts (nr_premapped) and TDH.MEM.PAGE.ADD comes later; a removal in between is answered {refused}, which has to be let pass and to drop the count, or finalisation fails with EINVAL for ever"
    )
}
