//! vCPUs that run: guest operations, exits as KVM handles them, and removals under a running guest.

mod common;

use common::guest::Guest;
use common::state::check_invariants;
use common::{Rig, shared_bit};
use tdp_mmu::{
    Entry, GuestOp, GuestPort, GuestStep, Mode, Resumed, RunExit, RunReport, RunRequest, SeamError,
    Vm, VmConfig, VmError, errno,
};
use tdx_defs::{Gpa, Gpaw, Gpr, Gprs, GuestLeaf, Leaf, Seamcall, TdAttributes, TdxLevel};
use tdx_module::Violations;

const MODES: [Mode; 2] = [Mode::Kernel, Mode::Batched];
const VE: u8 = 20;

fn level(level: u8) -> TdxLevel {
    TdxLevel::new(level).unwrap()
}

fn accept(gpa: u64) -> GuestOp {
    let gpa = Gpa::new(gpa);
    GuestOp::Accept {
        gpa,
        level: level(0),
    }
}

fn write(gpa: u64, data: &[u8]) -> GuestOp {
    GuestOp::Write {
        gpa: Gpa::new(gpa),
        data: data.to_vec(),
    }
}

fn read(gpa: u64, len: usize) -> GuestOp {
    let gpa = Gpa::new(gpa);
    GuestOp::Read { gpa, len }
}

fn vmcall(r11: u64, r12: u64, r13: u64) -> GuestOp {
    let regs = Gprs::default()
        .with(Gpr::Rcx, 0xFC00)
        .with(Gpr::R11, r11)
        .with(Gpr::R12, r12)
        .with(Gpr::R13, r13);
    GuestOp::Tdcall {
        leaf: GuestLeaf::VP_VMCALL.0,
        version: 0,
        regs,
    }
}

fn go(vm: &Vm, guest: &mut dyn GuestPort, ops: Vec<GuestOp>) -> RunReport {
    let request = RunRequest { ops, answer: 0 };
    vm.run_vcpu(0, guest, &request).unwrap()
}

fn resumed(step: &GuestStep) -> &Resumed {
    match step {
        GuestStep::Resumed(resumed) => resumed,
        other => panic!("{other:?}"),
    }
}

fn statuses(report: &RunReport) -> Vec<u64> {
    report
        .done
        .iter()
        .map(|step| resumed(step).regs.map_or(0, |regs| regs[Gpr::Rax]))
        .collect()
}

#[test]
fn a_guest_accepts_writes_and_reads_private_memory() {
    for mode in MODES {
        let rig = Rig::new();
        let vm = rig.empty(mode, Gpaw::W48);
        let mut guest = Guest::new(&rig.module);
        let ops = vec![accept(0x5000), write(0x5008, &[1, 2, 3]), read(0x5006, 6)];
        let report = go(&vm, &mut guest, ops);
        assert_eq!(report.exit, RunExit::Done, "{mode:?}");
        assert_eq!(resumed(&report.done[2]).data, [0, 0, 1, 2, 3, 0]);
        // The first touch exits: the page is not there yet.
        assert_eq!(report.counts.seamcalls.get(Leaf::MEM_PAGE_AUG), 1);
        assert_eq!(report.entries, 2);
        assert_eq!(rig.module.violations(), Violations::default());
        check_invariants(&vm, &rig);
        common::state::destroy(&vm, &rig);
    }
}

#[test]
fn shared_memory_is_walked_in_the_direct_root_and_holds_what_was_written() {
    let rig = Rig::new();
    let vm = rig.empty(Mode::Batched, Gpaw::W52);
    vm.set_memory_attributes(0x8000, 0x1000, 0).unwrap();
    let mut guest = Guest::new(&rig.module);
    let alias = 0x8000 | shared_bit(&vm);
    let report = go(
        &vm,
        &mut guest,
        vec![write(alias + 4, &[9; 4]), read(alias, 8)],
    );
    assert_eq!(report.exit, RunExit::Done);
    assert_eq!(resumed(&report.done[1]).data, [0, 0, 0, 0, 9, 9, 9, 9]);
    assert_eq!(report.entries, 0, "the guest need not be entered for it");
    assert_eq!(report.counts.pf_fixed, 1);
    check_invariants(&vm, &rig);
}

#[test]
fn memory_without_a_slot_raises_ve_when_it_is_touched_again() {
    let rig = Rig::new();
    let vm = rig.empty(Mode::Batched, Gpaw::W48);
    let mut guest = Guest::new(&rig.module);
    let report = go(
        &vm,
        &mut guest,
        vec![read(0x9000_0000 | shared_bit(&vm), 4)],
    );
    assert_eq!(report.exit, RunExit::Done);
    assert_eq!(resumed(&report.done[0]).injected, Some(VE));
    assert_eq!(report.counts.pf_mmio_spte_created, 1);
    let mmio = Gprs::default()
        .with(Gpr::Rcx, 0xFC00)
        .with(Gpr::R11, 48)
        .with(Gpr::R12, 4)
        .with(Gpr::R14, 0x9000_0000 | shared_bit(&vm));
    let ask = GuestOp::Tdcall {
        leaf: 0,
        version: 0,
        regs: mmio,
    };
    let report = go(&vm, &mut guest, vec![ask]);
    let exit = RunExit::Mmio {
        gpa: 0x9000_0000,
        len: 4,
        write: None,
    };
    assert_eq!((report.exit, report.done.len()), (exit, 0));
    let request = RunRequest {
        ops: vec![],
        answer: 0xABCD,
    };
    let report = vm.run_vcpu(0, &mut guest, &request).unwrap();
    let regs = resumed(&report.done[0]).regs.unwrap();
    assert_eq!((regs[Gpr::R10], regs[Gpr::R11]), (0, 0xABCD));
}

#[test]
fn a_shared_access_to_private_memory_leaves_with_the_exit_record() {
    let rig = Rig::new();
    let vm = rig.empty(Mode::Batched, Gpaw::W48);
    let mut guest = Guest::new(&rig.module);
    let alias = 0x3000 | shared_bit(&vm);
    let report = go(&vm, &mut guest, vec![accept(0x5000), write(alias, &[1])]);
    let RunExit::Failed(error) = &report.exit else {
        panic!("{report:?}");
    };
    let record = error.memory_fault().unwrap();
    assert_eq!(
        (error.errno(), record.gpa, record.flags),
        (errno::EFAULT, 0x3000, 0)
    );
    assert_eq!(report.done.len(), 1, "what came before is done");
}

#[test]
fn p15_a_page_that_is_not_accepted_ends_the_vm_only_when_ve_is_disabled() {
    for disabled in [true, false] {
        let rig = Rig::new();
        let attributes = if disabled {
            TdAttributes::SEPT_VE_DISABLE
        } else {
            TdAttributes::empty()
        };
        let vm = rig.empty_with(VmConfig {
            attributes,
            ..VmConfig::default()
        });
        let mut guest = Guest::new(&rig.module);
        let report = go(&vm, &mut guest, vec![read(0x1000, 8)]);
        if disabled {
            assert_eq!(vm.info().state, "dead");
            assert!(matches!(&report.exit, RunExit::Failed(error) if error.errno() == errno::EIO));
        } else {
            assert_eq!(report.exit, RunExit::Done);
            assert_eq!(resumed(&report.done[0]).injected, Some(VE));
        }
    }
}

#[test]
fn map_gpa_leaves_in_chunks_and_user_space_converts() {
    for mode in MODES {
        let rig = Rig::new();
        let vm = rig.empty(mode, Gpaw::W48);
        let mut guest = Guest::new(&rig.module);
        go(
            &vm,
            &mut guest,
            vec![accept(0x20_0000), write(0x20_0000, &[7])],
        );
        let (gpa, size) = (0x20_0000 | shared_bit(&vm), 0x50_0000);
        let mut report = go(&vm, &mut guest, vec![vmcall(0x1_0001, gpa, size)]);
        let mut chunks = Vec::new();
        while let RunExit::MapGpa {
            gpa,
            pages,
            private,
        } = report.exit
        {
            chunks.push((gpa, pages, private));
            vm.set_memory_attributes(gpa, pages << 12, if private { 8 } else { 0 })
                .unwrap();
            report = go(&vm, &mut guest, vec![]);
        }
        let expected = [
            (0x20_0000, 512, false),
            (0x40_0000, 512, false),
            (0x60_0000, 256, false),
        ];
        assert_eq!(
            (chunks.as_slice(), report.exit),
            (&expected[..], RunExit::Done)
        );
        let regs = resumed(&report.done[0]).regs.unwrap();
        assert_eq!((regs[Gpr::Rax], regs[Gpr::R10]), (0, 0));
        // The old contents are gone with the page.
        let report = go(&vm, &mut guest, vec![read(gpa, 1)]);
        assert_eq!(resumed(&report.done[0]).data, [0]);
        check_invariants(&vm, &rig);
    }
}

#[test]
fn hlt_and_unknown_calls_are_answered() {
    let rig = Rig::new();
    let vm = rig.empty(Mode::Batched, Gpaw::W48);
    let mut guest = Guest::new(&rig.module);
    let report = go(&vm, &mut guest, vec![vmcall(12, 0, 0)]);
    assert_eq!(report.exit, RunExit::Hlt);
    let report = go(&vm, &mut guest, vec![vmcall(0x77, 0, 0)]);
    assert_eq!(report.exit, RunExit::Done);
    let r10: Vec<u64> = report
        .done
        .iter()
        .map(|step| resumed(step).regs.unwrap()[Gpr::R10])
        .collect();
    assert_eq!(
        r10,
        [0, 0x8000_0000_0000_0003],
        "of HLT, then of the unknown one"
    );
    vm.set_exit_hypercall(false).unwrap();
    let report = go(&vm, &mut guest, vec![vmcall(0x1_0001, 0x1000, 0x1000)]);
    let regs = resumed(&report.done[0]).regs.unwrap();
    assert_eq!(
        (regs[Gpr::R10], regs[Gpr::R11]),
        (0x8000_0000_0000_0003, 0x1000)
    );
}

#[test]
fn an_event_ends_the_run() {
    let rig = Rig::new();
    let vm = rig.empty(Mode::Batched, Gpaw::W48);
    let mut guest = Guest::new(&rig.module);
    vm.queue_event(0).unwrap();
    let report = go(&vm, &mut guest, vec![accept(0x1000)]);
    assert_eq!((report.exit, report.done.len()), (RunExit::Interrupted, 0));
    let report = go(&vm, &mut guest, vec![accept(0x1000)]);
    assert_eq!(statuses(&report), [0]);
}

#[test]
fn what_cannot_be_run_is_refused() {
    let rig = Rig::new();
    let vm = rig.empty(Mode::Batched, Gpaw::W48);
    let mut guest = Guest::new(&rig.module);
    for (case, ops) in [
        ("nothing read", vec![read(0x1000, 0)]),
        ("two pages", vec![write(0x1FFF, &[0; 2])]),
        ("too many", vec![accept(0); 4097]),
    ] {
        let request = RunRequest { ops, answer: 0 };
        let error = vm.run_vcpu(0, &mut guest, &request).unwrap_err();
        assert_eq!(
            (error.errno(), error.field()),
            (errno::EINVAL, Some("ops")),
            "{case}"
        );
    }
    let error = vm
        .run_vcpu(5, &mut guest, &RunRequest::default())
        .unwrap_err();
    assert_eq!(error.errno(), errno::ENOENT);
    let pre = Rig::new();
    let vm = pre.pre(Mode::Batched, Gpaw::W48);
    let error = vm
        .run_vcpu(0, &mut guest, &RunRequest::default())
        .unwrap_err();
    assert_eq!(error.errno(), errno::EINVAL, "I18: not finalised");
}

/// A guest that keeps touching a page while its host takes the page away, gives it back, and takes
/// it again: every kick really gets it out, so no translation is ever stale.
#[test]
fn removals_under_a_running_guest_leave_no_stale_translation() {
    for mode in MODES {
        let rig = Rig::new();
        let vm = rig.empty(mode, Gpaw::W48);
        std::thread::scope(|scope| {
            let running = scope.spawn(|| {
                let mut guest = Guest::new(&rig.module);
                for _ in 0..300 {
                    let mut ops = vec![accept(0x5000)];
                    ops.extend((0..40).map(|_| read(0x5000, 8)));
                    let report = go(&vm, &mut guest, ops);
                    // Between accept and read the page may be gone again; then the guest meets a
                    // page that is pending, or that is shared now.
                    match report.exit {
                        RunExit::Done | RunExit::Interrupted => {}
                        RunExit::Failed(error) if error.memory_fault().is_some() => {}
                        RunExit::Failed(VmError::Dead { reason })
                            if reason.starts_with("PendingAccess: ") =>
                        {
                            return;
                        }
                        other => panic!("{other:?}"),
                    }
                    if vm.bugs().is_dead() {
                        return;
                    }
                }
            });
            let mut rounds = 0;
            while !running.is_finished() && rounds < 200 {
                vm.set_memory_attributes(0x5000, 0x1000, 0)
                    .unwrap_or_default();
                if vm.set_memory_attributes(0x5000, 0x1000, 8).is_err() {
                    break;
                }
                rounds += 1;
            }
        });
        assert_eq!(rig.module.violations(), Violations::default(), "{mode:?}");
        assert!(!vm.bugs().is_bugged(), "{:?}", vm.bugs().reports());
    }
}

/// A guest that the host makes the direct root obsolete under, whenever it is inside.
struct ZappedUnder<'a> {
    guest: Guest,
    vm: &'a Vm,
}

impl GuestPort for ZappedUnder<'_> {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        self.guest.enter(lp, call)
    }

    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError> {
        let steps = self.guest.play(ops);
        self.vm.zap_all_fast().unwrap();
        steps
    }

    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError> {
        self.guest.read_shared(hpa, len)
    }

    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError> {
        self.guest.write_shared(hpa, data)
    }
}

/// TDH.VP.WR is busy while the vCPU is inside.
#[test]
fn a_vcpu_leaves_before_it_loads_a_new_root() {
    for mode in MODES {
        let rig = Rig::new();
        let vm = rig.empty(mode, Gpaw::W48);
        vm.set_memory_attributes(0x9000, 0x1000, 0).unwrap();
        let shared = read(shared_bit(&vm) | 0x9000, 1);
        let mut guest = ZappedUnder {
            guest: Guest::new(&rig.module),
            vm: &vm,
        };
        let ops = vec![accept(0x5000), shared.clone(), accept(0x6000), shared];
        let report = go(&vm, &mut guest, ops);
        assert_eq!((report.exit, report.done.len()), (RunExit::Done, 4));
        assert_eq!(vm.bugs().reports(), []);
    }
}
