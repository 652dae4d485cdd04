//! Random work of many threads at once: vCPUs that fault, prefault and run their guests, one host
//! thread that converts and punches holes, one that keeps dirty logs, takes user memory back, ages
//! it and zaps whole roots, and a module that is busy now and then.
//!
//! Whenever all of them have stopped, mirror, private tree and PAMT agree, nothing is FROZEN,
//! every mapping has the kind that its frame has, and no guest has seen a stale translation. At
//! the end everything comes back.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;

use common::guest::Guest;
use common::port::Rule;
use common::state::{self, check_invariants};
use common::{Rig, USER_BASE, gmem_slot, private, shared, user_slot};
use proptest::prelude::*;
use tdp_mmu::{GuestOp, Mode, RetPf, RunExit, RunRequest, SlotSpec, Vm, VmConfig, VmError, errno};
use tdx_defs::{Gpa, Leaf, TdAttributes, TdxLevel};
use tdx_module::Violations;

const VCPUS: u32 = 3;
/// Frames of the slot with guest_memfd: two leaf tables.
const PAGES: u64 = 0x400;
/// The slot without: its first frame, and how many.
const USER_FIRST: u64 = 0x8_0000;
const USER_PAGES: u64 = 0x40;

/// What a vCPU does.
#[derive(Debug, Clone)]
enum VcpuOp {
    /// Faults on private (or shared) frames.
    Faults(Vec<(u64, bool)>),
    Prefault(u64, u64),
    /// Guest code: accepts and touches frames.
    Guest(Vec<(u64, bool)>),
    Reload,
}

/// What the host does.
#[derive(Debug, Clone)]
enum HostOp {
    Convert(u64, u64, bool),
    Punch(u64, u64),
    ZapRange(u64, u64),
}

/// What the host's memory management does.
#[derive(Debug, Clone)]
enum MemoryOp {
    Log(bool),
    GetLog,
    FastZap,
    Unmap(u64, u64),
    Age,
    Audit,
}

/// Work that goes on at the same time.
#[derive(Debug, Clone)]
struct Round {
    vcpus: Vec<Vec<VcpuOp>>,
    host: Vec<HostOp>,
    memory: Vec<MemoryOp>,
    /// The call that is busy: which, how often, and how many pass first.
    busy: Option<(Leaf, u32, u32)>,
}

impl Round {
    fn runs_guests(&self) -> bool {
        let mut ops = self.vcpus.iter().flatten();
        ops.any(|op| matches!(op, VcpuOp::Guest(_)))
    }
}

fn frame() -> impl Strategy<Value = u64> {
    // Few frames, so that the threads meet.
    prop_oneof![3 => 0u64..12, 1 => 0x1FA..0x206u64, 1 => 0..PAGES]
}

fn frames() -> impl Strategy<Value = Vec<(u64, bool)>> {
    prop::collection::vec((frame(), any::<bool>()), 1..16)
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 1u64..12, 1 => 1u64..600]
}

fn vcpu_op() -> impl Strategy<Value = VcpuOp> {
    prop_oneof![
        4 => frames().prop_map(VcpuOp::Faults),
        1 => (frame(), length()).prop_map(|(first, pages)| VcpuOp::Prefault(first, pages)),
        3 => frames().prop_map(VcpuOp::Guest),
        1 => Just(VcpuOp::Reload),
    ]
}

fn host_op() -> impl Strategy<Value = HostOp> {
    prop_oneof![
        4 => (frame(), length(), any::<bool>())
            .prop_map(|(first, pages, to)| HostOp::Convert(first, pages, to)),
        2 => (frame(), length()).prop_map(|(first, pages)| HostOp::Punch(first, pages)),
        1 => (frame(), length()).prop_map(|(first, pages)| HostOp::ZapRange(first, pages)),
    ]
}

fn memory_op() -> impl Strategy<Value = MemoryOp> {
    prop_oneof![
        2 => any::<bool>().prop_map(MemoryOp::Log),
        2 => Just(MemoryOp::GetLog),
        1 => Just(MemoryOp::FastZap),
        2 => (0..USER_PAGES, 1..USER_PAGES).prop_map(|(first, pages)| MemoryOp::Unmap(first, pages)),
        1 => Just(MemoryOp::Age),
        1 => Just(MemoryOp::Audit),
    ]
}

fn busy() -> impl Strategy<Value = Option<(Leaf, u32, u32)>> {
    let building = prop_oneof![Just(Leaf::MEM_SEPT_ADD), Just(Leaf::MEM_PAGE_AUG)];
    let removing = prop_oneof![
        Just(Leaf::MEM_RANGE_BLOCK),
        Just(Leaf::MEM_TRACK),
        Just(Leaf::MEM_PAGE_REMOVE)
    ];
    prop_oneof![
        1 => Just(None),
        2 => (building, 1u32..4, 0u32..8).prop_map(Some),
        // Busy twice would end the VM.
        2 => (removing, Just(1u32), 0u32..8).prop_map(Some),
    ]
}

fn round() -> impl Strategy<Value = Round> {
    let vcpu = prop::collection::vec(vcpu_op(), 1..8);
    (
        prop::collection::vec(vcpu, VCPUS as usize),
        prop::collection::vec(host_op(), 1..12),
        prop::collection::vec(memory_op(), 1..12),
        busy(),
    )
        .prop_map(|(vcpus, host, memory, busy)| Round {
            vcpus,
            host,
            memory,
            busy,
        })
}

/// Frames from `first` on, inside the slot.
fn range(first: u64, pages: u64) -> Range<u64> {
    first..(first + pages).min(PAGES)
}

fn bytes(range: &Range<u64>) -> (u64, u64) {
    (range.start << 12, (range.end - range.start) << 12)
}

struct World {
    rig: Rig,
    vm: Vm,
    /// Frames that are private: one thread converts, so this is exact.
    private: BTreeSet<u64>,
}

impl World {
    fn new(mode: Mode) -> Self {
        let rig = Rig::new();
        rig.port.record(false);
        let config = VmConfig {
            mode,
            // A guest that touches a page before it accepts it gets #VE.
            attributes: TdAttributes::empty(),
            ..VmConfig::default()
        };
        let port = std::sync::Arc::clone(&rig.port);
        let (vm, _) = Vm::create(std::sync::Arc::clone(&rig.host), port, config).unwrap();
        for _ in 0..VCPUS {
            vm.add_vcpu().unwrap();
        }
        vm.set_user_memory_region(gmem_slot(0, 0, PAGES)).unwrap();
        vm.set_user_memory_region(user_slot(1, USER_FIRST, USER_PAGES))
            .unwrap();
        vm.set_memory_attributes(0, PAGES << 12, 8).unwrap();
        vm.finalize().unwrap();
        Self {
            rig,
            vm,
            private: (0..PAGES).collect(),
        }
    }

    fn round(&mut self, round: &Round) {
        if let Some((leaf, times, skip)) = round.busy {
            // A guest that holds the tree makes a removal busy once already.
            let removes = !matches!(leaf, Leaf::MEM_SEPT_ADD | Leaf::MEM_PAGE_AUG);
            if !(removes && round.runs_guests()) {
                let rule = Rule::busy(leaf, times);
                self.rig.port.inject(Rule { skip, ..rule });
            }
        }
        let (vm, rig) = (&self.vm, &self.rig);
        std::thread::scope(|scope| {
            for (vcpu, ops) in (0..).zip(&round.vcpus) {
                scope.spawn(move || {
                    let mut guest = Guest::new(&rig.module);
                    ops.iter().for_each(|op| run_vcpu(vm, vcpu, &mut guest, op));
                });
            }
            scope.spawn(|| round.memory.iter().for_each(|op| run_memory(vm, op)));
            for op in &round.host {
                run_host(vm, op);
                if let HostOp::Convert(first, pages, to_private) = *op {
                    for gfn in range(first, pages) {
                        match to_private {
                            true => self.private.insert(gfn),
                            false => self.private.remove(&gfn),
                        };
                    }
                }
            }
        });
        self.rig.port.clear_rules();
        self.check();
    }

    /// What holds while nobody works.
    fn check(&self) {
        assert_eq!(self.vm.bugs().reports(), []);
        assert_eq!(self.rig.module.violations(), Violations::default());
        let trees = state::trees(&self.vm);
        let kept = trees.mirror.keys().find(|gfn| !self.private.contains(gfn));
        assert_eq!(kept, None, "private mapping of a shared frame");
        let kept = trees.direct.keys().find(|gfn| self.private.contains(gfn));
        assert_eq!(kept, None, "shared mapping of a private frame");
        check_invariants(&self.vm, &self.rig);
    }
}

/// An answer that the frame may have changed its kind, or its slot its shape, meanwhile.
fn is_expected(result: &Result<RetPf, VmError>) -> bool {
    match result {
        Ok(ret_pf) => matches!(
            ret_pf,
            RetPf::Fixed | RetPf::Spurious | RetPf::Retry | RetPf::Emulate
        ),
        Err(error) => error.memory_fault().is_some(),
    }
}

fn run_vcpu(vm: &Vm, vcpu: u32, guest: &mut Guest, op: &VcpuOp) {
    match op {
        VcpuOp::Faults(frames) => {
            let faults: Vec<_> = frames
                .iter()
                .map(|&(gfn, is_private)| match (is_private, gfn % 2) {
                    (true, _) => private(gfn),
                    (false, 0) => shared(vm, gfn),
                    (false, _) => shared(vm, USER_FIRST + gfn % USER_PAGES),
                })
                .collect();
            let report = vm.handle_faults(vcpu, &faults).unwrap();
            for other in report.others {
                assert!(is_expected(&other.result), "{other:?}");
            }
        }
        VcpuOp::Prefault(first, pages) => {
            let (gpa, size) = bytes(&range(*first, *pages));
            let result = vm.pre_fault_memory(vcpu, gpa, size, &mut |_| {});
            // The first page: a fast zap took the root away, or it changed its kind.
            let found = result.err().map(|error| error.errno());
            let expected = [None, Some(errno::EAGAIN), Some(errno::EFAULT)];
            assert!(expected.contains(&found), "{found:?}");
        }
        VcpuOp::Guest(frames) => {
            let ops = frames
                .iter()
                .flat_map(|&(gfn, is_private)| guest_ops(vm, gfn, is_private))
                .collect();
            let request = RunRequest { ops, answer: 0 };
            let report = vm.run_vcpu(vcpu, guest, &request).unwrap();
            match &report.exit {
                RunExit::Done | RunExit::Interrupted => {}
                RunExit::Failed(error) if error.memory_fault().is_some() => {}
                other => panic!("{other:?}"),
            }
        }
        VcpuOp::Reload => {
            vm.unload_mmu(vcpu).unwrap();
            vm.load_mmu(vcpu).unwrap();
        }
    }
}

fn guest_ops(vm: &Vm, gfn: u64, is_private: bool) -> Vec<GuestOp> {
    let gpa = Gpa::new(gfn << 12);
    if is_private {
        let level = TdxLevel::new(0).unwrap();
        let data = gfn.to_le_bytes().to_vec();
        return vec![
            // Without accepting: a translation that should be gone would serve it.
            GuestOp::Read { gpa, len: 8 },
            GuestOp::Accept { gpa, level },
            GuestOp::Write { gpa, data },
            GuestOp::Read { gpa, len: 8 },
        ];
    }
    let alias = |gfn| Gpa::new(shared(vm, gfn).gpa);
    vec![
        GuestOp::Write {
            gpa: alias(USER_FIRST + gfn % USER_PAGES),
            data: vec![1; 8],
        },
        GuestOp::Read {
            gpa: alias(gfn),
            len: 8,
        },
    ]
}

fn run_host(vm: &Vm, op: &HostOp) {
    match *op {
        HostOp::Convert(first, pages, to_private) => {
            let (gpa, size) = bytes(&range(first, pages));
            let attributes = if to_private { 8 } else { 0 };
            vm.set_memory_attributes(gpa, size, attributes).unwrap();
        }
        HostOp::Punch(first, pages) => {
            let (offset, size) = bytes(&range(first, pages));
            vm.punch_hole(0, offset, size).unwrap();
        }
        HostOp::ZapRange(first, pages) => {
            let (gpa, size) = bytes(&range(first, pages));
            vm.zap_gfn_range(gpa, size).unwrap();
        }
    }
}

fn run_memory(vm: &Vm, op: &MemoryOp) {
    let hva = |first: u64| USER_BASE + ((USER_FIRST + first) << 12);
    match *op {
        MemoryOp::Log(log_dirty) => {
            let slot = user_slot(1, USER_FIRST, USER_PAGES);
            vm.set_user_memory_region(SlotSpec { log_dirty, ..slot })
                .unwrap();
        }
        MemoryOp::GetLog => match vm.get_dirty_log(1) {
            Ok((words, _)) => assert_eq!(words.len() as u64, USER_PAGES / 64),
            Err(error) => assert_eq!(error.errno(), errno::ENOENT, "no log"),
        },
        MemoryOp::FastZap => vm.zap_all_fast().unwrap(),
        MemoryOp::Unmap(first, pages) => {
            let end = (first + pages).min(USER_PAGES);
            vm.unmap_hva(hva(first), hva(end)).unwrap();
        }
        MemoryOp::Age => {
            vm.age_hva(hva(0), hva(USER_PAGES)).unwrap();
        }
        MemoryOp::Audit => {
            let report = vm.audit(&mut |_, _| {}).unwrap();
            assert_eq!(report.mismatches, 0, "{:#?}", report.first_mismatches);
        }
    }
}

proptest! {
    // Threads never do the same twice, so a smaller case of a failure means nothing.
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 0,
        failure_persistence: None,
        ..ProptestConfig::with_cases(100)
    })]

    #[test]
    fn whatever_goes_on_at_once_the_trees_agree_when_it_is_quiet(
        rounds in prop::collection::vec(round(), 1..6),
    ) {
        for mode in [Mode::Kernel, Mode::Batched] {
            let mut world = World::new(mode);
            rounds.iter().for_each(|round| world.round(round));
            state::destroy(&world.vm, &world.rig);
        }
    }
}
