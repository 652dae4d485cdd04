//! Random operations on a VM over the real module core, in both propagation modes, held against a
//! model that fits on a screen.
//!
//! After every step the mirror tree, the private tree and the PAMT agree (audit), the counters
//! are the leaves, and the model says the same. At the end both modes have the same trees, and
//! the destroyed VM gives everything back.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;

use common::port::{Effect, Rule};
use common::state::{self, Trees, check_invariants};
use common::{Rig, gmem_slot, private, shared, user_slot};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use tdp_mmu::{Fault, Mode, RetPf, SlotSpec, Vm, VmError, errno};
use tdx_defs::{CompletionStatus, Gpaw, Leaf};

/// Two slots with guest_memfd, the second across a 1 GiB boundary, and one without.
fn slots() -> [SlotSpec; 3] {
    [
        gmem_slot(0, 0, 0x600),
        gmem_slot(1, 0x3_FF80, 0x100),
        user_slot(2, 0x8_0000, 0x40),
    ]
}

/// What is mapped, what is private, which slots are there.
#[derive(Debug, Clone, Default)]
struct Model {
    private: BTreeSet<u64>,
    mirror: BTreeSet<u64>,
    direct: BTreeSet<u64>,
    /// Shared leaves without write access, as far as they are in `direct`.
    protected: BTreeSet<u64>,
    slots: BTreeSet<u32>,
}

/// One operation. Places are numbers that `Model::range` turns into frames of a slot.
#[derive(Debug, Clone)]
enum Op {
    Faults(Vec<(Place, bool)>),
    Prefault(Place, u16),
    Convert(Place, u16, bool),
    Punch(Place, u16),
    UnmapHva(Place, u16),
    ToggleSlot(u32),
    ZapAllFast,
    WriteProtect,
    Reload,
    /// Busy or lost answers for the next operation.
    Spoil(Spoil, u8),
}

#[derive(Debug, Clone, Copy)]
enum Spoil {
    Busy(Leaf),
    LoseAnswer(Leaf),
    LoseCall(Leaf),
    BusyRead,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    slot: u32,
    page: u16,
}

fn place() -> impl Strategy<Value = Place> {
    // Few distinct pages, so that operations meet.
    let page = prop_oneof![3 => 0u16..24, 1 => 500u16..530, 1 => any::<u16>()];
    (
        prop_oneof![4 => Just(0u32), 2 => Just(1), 1 => Just(2)],
        page,
    )
        .prop_map(|(slot, page)| Place { slot, page })
}

fn pages() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 1u16..16, 1 => 1u16..700]
}

fn spoil() -> impl Strategy<Value = Spoil> {
    let built = prop_oneof![Just(Leaf::MEM_SEPT_ADD), Just(Leaf::MEM_PAGE_AUG)];
    let removed = prop_oneof![
        Just(Leaf::MEM_RANGE_BLOCK),
        Just(Leaf::MEM_TRACK),
        Just(Leaf::MEM_PAGE_REMOVE)
    ];
    prop_oneof![
        4 => built.clone().prop_map(Spoil::Busy),
        3 => removed.prop_map(Spoil::Busy),
        2 => built.clone().prop_map(Spoil::LoseAnswer),
        1 => built.prop_map(Spoil::LoseCall),
        1 => Just(Spoil::BusyRead),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => prop::collection::vec((place(), any::<bool>()), 1..12).prop_map(Op::Faults),
        2 => (place(), pages()).prop_map(|(at, n)| Op::Prefault(at, n)),
        6 => (place(), pages(), any::<bool>()).prop_map(|(at, n, to)| Op::Convert(at, n, to)),
        2 => (place(), pages()).prop_map(|(at, n)| Op::Punch(at, n)),
        2 => (place(), pages()).prop_map(|(at, n)| Op::UnmapHva(at, n)),
        1 => (0u32..3).prop_map(Op::ToggleSlot),
        1 => Just(Op::ZapAllFast),
        1 => Just(Op::WriteProtect),
        1 => Just(Op::Reload),
        4 => (spoil(), 0u8..6).prop_map(|(spoil, skip)| Op::Spoil(spoil, skip)),
    ]
}

impl Model {
    fn new() -> Self {
        let private = slots()
            .iter()
            .filter(|slot| slot.guest_memfd)
            .flat_map(gfns)
            .collect();
        Self {
            private,
            slots: BTreeSet::from([0, 1, 2]),
            ..Self::default()
        }
    }

    fn slot_of(&self, gfn: u64) -> Option<SlotSpec> {
        let live = |slot: &SlotSpec| self.slots.contains(&slot.slot_id);
        slots()
            .into_iter()
            .filter(live)
            .find(|slot| gfns(slot).contains(&gfn))
    }

    /// What a fault has to answer; maps the frame.
    fn fault(&mut self, gfn: u64, is_private: bool, write: bool) -> Result<RetPf, i32> {
        let slot = self.slot_of(gfn);
        if self.private.contains(&gfn) != is_private {
            return Err(errno::EFAULT);
        }
        let mapped = match (is_private, slot) {
            (true, Some(slot)) if slot.guest_memfd => self.mirror.insert(gfn),
            (true, _) => return Err(errno::EFAULT),
            (false, Some(_)) if self.direct.insert(gfn) => {
                self.protected.remove(&gfn);
                true
            }
            (false, Some(_)) => write && self.protected.remove(&gfn),
            (false, None) => return Ok(RetPf::Emulate),
        };
        Ok(if mapped {
            RetPf::Fixed
        } else {
            RetPf::Spurious
        })
    }

    /// How many pages of the range a prefault does, and with what error it stops.
    fn prefault(&mut self, range: Range<u64>) -> (u64, Option<i32>) {
        let first = range.start;
        for gfn in range.clone() {
            let error = match self.fault(gfn, self.private.contains(&gfn), false) {
                Ok(RetPf::Emulate) => errno::ENOENT,
                Ok(_) => continue,
                Err(errno) => errno,
            };
            return (gfn - first, Some(error));
        }
        (range.end - first, None)
    }

    fn convert(&mut self, range: Range<u64>, to_private: bool) {
        for gfn in range {
            if to_private {
                self.direct.remove(&gfn);
                self.private.insert(gfn);
            } else {
                self.mirror.remove(&gfn);
                self.private.remove(&gfn);
            }
        }
    }

    fn agrees_with(&self, trees: &Trees) {
        let mirror: BTreeSet<u64> = trees.mirror.keys().copied().collect();
        let direct: BTreeSet<u64> = trees.direct.keys().copied().collect();
        assert_eq!(mirror, self.mirror, "private leaves");
        assert_eq!(direct, self.direct, "shared leaves");
    }
}

fn gfns(slot: &SlotSpec) -> Range<u64> {
    slot.gpa >> 12..(slot.gpa + slot.size) >> 12
}

impl Place {
    fn slot(self) -> SlotSpec {
        slots()[self.slot as usize]
    }

    fn gfn(self) -> u64 {
        let gfns = gfns(&self.slot());
        gfns.start + u64::from(self.page) % (gfns.end - gfns.start)
    }

    /// Frames from here on, inside the slot.
    fn range(self, pages: u16) -> Range<u64> {
        let start = self.gfn();
        start..(start + u64::from(pages)).min(gfns(&self.slot()).end)
    }
}

/// One VM with its model.
struct Pair {
    rig: Rig,
    vm: Vm,
    model: Model,
}

impl Pair {
    fn new(mode: Mode) -> Self {
        let rig = Rig::new();
        rig.port.record(false);
        let vm = rig.create(mode, Gpaw::W48).unwrap();
        for _ in 0..2 {
            vm.add_vcpu().unwrap();
        }
        for slot in slots() {
            vm.set_user_memory_region(slot).unwrap();
            if slot.guest_memfd {
                vm.set_memory_attributes(slot.gpa, slot.size, 8).unwrap();
            }
        }
        vm.finalize().unwrap();
        Self {
            rig,
            vm,
            model: Model::new(),
        }
    }

    fn step(&mut self, op: &Op) {
        let spoils = matches!(op, Op::Spoil(..));
        match op {
            Op::Faults(faults) => self.faults(faults),
            Op::Prefault(at, pages) => self.prefault(at.range(*pages)),
            Op::Convert(at, pages, to) => {
                let range = at.range(*pages);
                let (gpa, size) = (range.start << 12, (range.end - range.start) << 12);
                let attributes = if *to { 8 } else { 0 };
                self.vm
                    .set_memory_attributes(gpa, size, attributes)
                    .unwrap();
                self.model.convert(range, *to);
            }
            Op::Punch(at, pages) => self.punch(*at, *pages),
            Op::UnmapHva(at, pages) => {
                let range = at.range(*pages);
                let base = common::USER_BASE;
                let hva = base + (range.start << 12)..base + (range.end << 12);
                self.vm.unmap_hva(hva.start, hva.end).unwrap();
                if self.model.slots.contains(&at.slot) {
                    self.model.direct.retain(|gfn| !range.contains(gfn));
                }
            }
            Op::ToggleSlot(slot) => self.toggle(*slot),
            Op::ZapAllFast => {
                self.vm.zap_all_fast().unwrap();
                self.model.direct.clear();
            }
            Op::WriteProtect => {
                let there = self.model.slots.contains(&2);
                assert_eq!(self.vm.write_protect_slot(2).is_ok(), there);
                if there {
                    let inside = self.model.direct.range(gfns(&slots()[2]));
                    self.model.protected.extend(inside.copied());
                }
            }
            Op::Reload => {
                self.vm.unload_mmu(0).unwrap();
                self.vm.load_mmu(0).unwrap();
            }
            Op::Spoil(spoil, skip) => self.spoil(*spoil, (*skip).into()),
        }
        if !spoils {
            self.rig.port.clear_rules();
            self.model.agrees_with(&state::trees(&self.vm));
            check_invariants(&self.vm, &self.rig);
            assert!(!self.vm.bugs().is_dead(), "{:?}", self.vm.bugs().reports());
        }
    }

    fn faults(&mut self, faults: &[(Place, bool)]) {
        let made: Vec<Fault> = faults
            .iter()
            .map(|&(at, is_private)| match is_private {
                true => private(at.gfn()),
                false => shared(&self.vm, at.gfn()),
            })
            .collect();
        let expected: Vec<Result<RetPf, i32>> = faults
            .iter()
            .map(|&(at, is_private)| self.model.fault(at.gfn(), is_private, true))
            .collect();
        if let [fault] = made[..] {
            let result = self.vm.handle_fault(1, fault).map(|report| report.ret_pf);
            assert_eq!(result.map_err(|error| error.errno()), expected[0]);
            return;
        }
        let report = self.vm.handle_faults(0, &made).unwrap();
        let count = |ret_pf| expected.iter().filter(|&&r| r == Ok(ret_pf)).count();
        assert_eq!(report.fixed as usize, count(RetPf::Fixed));
        assert_eq!(report.spurious as usize, count(RetPf::Spurious));
        let others = report.others.into_iter().map(|other| {
            (
                other.index as usize,
                other.result.map_err(|error: VmError| error.errno()),
            )
        });
        let others: std::collections::BTreeMap<_, _> = others.collect();
        let is_other = |r: &Result<RetPf, i32>| !matches!(r, Ok(RetPf::Fixed | RetPf::Spurious));
        let expected = expected
            .into_iter()
            .enumerate()
            .filter(|(_, r)| is_other(r))
            .collect();
        assert_eq!(others, expected);
    }

    fn prefault(&mut self, range: Range<u64>) {
        let mut done = 0;
        let (gpa, size) = (range.start << 12, (range.end - range.start) << 12);
        let result = self
            .vm
            .pre_fault_memory(0, gpa, size, &mut |bytes| done = bytes >> 12);
        let (pages, error) = self.model.prefault(range);
        assert_eq!(done, pages, "pages done");
        let errno = result.err().map(|error| error.errno());
        assert_eq!(
            errno,
            error.filter(|_| pages == 0),
            "only a prefault of nothing fails"
        );
    }

    fn punch(&mut self, at: Place, pages: u16) {
        let range = at.range(pages);
        let offset = (range.start << 12) - at.slot().gpa;
        let result = self
            .vm
            .punch_hole(at.slot, offset, (range.end - range.start) << 12);
        let valid = at.slot().guest_memfd && self.model.slots.contains(&at.slot);
        assert_eq!(result.is_ok(), valid);
        if valid {
            self.model.mirror.retain(|gfn| !range.contains(gfn));
        }
    }

    fn toggle(&mut self, slot_id: u32) {
        let spec = slots()[slot_id as usize];
        if self.model.slots.remove(&slot_id) {
            self.vm
                .set_user_memory_region(SlotSpec { size: 0, ..spec })
                .unwrap();
            self.model.mirror.retain(|gfn| !gfns(&spec).contains(gfn));
            self.model.direct.retain(|gfn| !gfns(&spec).contains(gfn));
        } else {
            self.vm.set_user_memory_region(spec).unwrap();
            self.model.slots.insert(slot_id);
        }
    }

    fn spoil(&self, spoil: Spoil, skip: u32) {
        let busy = Effect::Answer(CompletionStatus::OPERAND_BUSY);
        // A removal that is busy twice ends the VM: no two rules may meet.
        self.rig.port.clear_rules();
        let (leaf, effect, times) = match spoil {
            Spoil::Busy(leaf) => (leaf, busy, 1),
            Spoil::LoseAnswer(leaf) => (leaf, Effect::LoseAnswer, 1),
            Spoil::LoseCall(leaf) => (leaf, Effect::LoseCall, 1),
            Spoil::BusyRead => (Leaf::MEM_SEPT_RD, busy, 3),
        };
        self.rig.port.inject(Rule {
            skip,
            times,
            ..Rule::next(leaf, effect)
        });
    }

    /// What both modes must have in common.
    fn shape(&self) -> (Vec<u64>, Vec<u64>, state::PrivateTree) {
        let trees = state::trees(&self.vm);
        (
            trees.mirror.into_keys().collect(),
            trees.direct.into_keys().collect(),
            state::private_tree(&self.vm, &self.rig.module),
        )
    }
}

fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct("tests/lockstep.proptest-regressions");
    ProptestConfig {
        failure_persistence: Some(Box::new(file)),
        ..ProptestConfig::with_cases(256)
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn both_modes_stay_in_step_with_module_and_model(
        ops in prop::collection::vec(op(), 1..24),
    ) {
        let shapes = [Mode::Kernel, Mode::Batched].map(|mode| {
            let mut pair = Pair::new(mode);
            ops.iter().for_each(|op| pair.step(op));
            pair.rig.port.clear_rules();
            let shape = pair.shape();
            state::destroy(&pair.vm, &pair.rig);
            shape
        });
        prop_assert_eq!(&shapes[0], &shapes[1], "kernel and batched");
    }
}
