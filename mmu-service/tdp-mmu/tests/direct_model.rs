//! The direct root against a model that is a map from frames to leaves: random faults, dirty
//! logs, aging, notifier unmaps and fast zaps. After every step the trees, the page counters and
//! the dirty log are what the model says, and nothing is frozen.
#![cfg(not(feature = "shuttle"))]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use common::state::{self, check_invariants};
use common::{Rig, USER_BASE};
use proptest::prelude::*;
use tdp_mmu::{Fault, HostPageSize, Mode, RetPf, SlotSpec, Vm, VmConfig, VmKind};
use tdx_defs::Gpaw;

const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
/// Exit qualification: the entry was readable.
const PRESENT: u64 = 1 << 3;
/// Frames of a leaf of 2 MiB.
const HUGE: u64 = 0x200;

/// A slot of small pages, and one of two huge ones.
const SLOTS: [(u64, u64); 2] = [(0x8_1000, 0x40), (0x8_2000, 2 * HUGE)];

fn spec(slot: usize, log_dirty: bool) -> SlotSpec {
    let (first, pages) = SLOTS[slot];
    SlotSpec {
        log_dirty,
        host_page_size: match slot {
            0 => HostPageSize::Size4K,
            _ => HostPageSize::Size2M,
        },
        ..common::user_slot(u32::try_from(slot).unwrap() + 1, first, pages)
    }
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Access { slot: usize, page: u64, write: bool },
    Log { slot: usize, on: bool },
    ReadLog { slot: usize },
    Unmap { slot: usize, page: u64, pages: u64 },
    Age { slot: usize, page: u64, pages: u64 },
    ZapFast,
}

fn op() -> impl Strategy<Value = Op> {
    let slot = 0..SLOTS.len();
    // Few pages, so that operations meet.
    let page = prop_oneof![0u64..6, 0x1FEu64..0x206];
    let pages = prop_oneof![1u64..4, Just(HUGE), Just(2 * HUGE)];
    prop_oneof![
        8 => (slot.clone(), page.clone(), any::<bool>())
            .prop_map(|(slot, page, write)| Op::Access { slot, page, write }),
        2 => (slot.clone(), any::<bool>()).prop_map(|(slot, on)| Op::Log { slot, on }),
        2 => slot.clone().prop_map(|slot| Op::ReadLog { slot }),
        2 => (slot.clone(), page.clone(), pages.clone())
            .prop_map(|(slot, page, pages)| Op::Unmap { slot, page, pages }),
        1 => (slot, page, pages).prop_map(|(slot, page, pages)| Op::Age { slot, page, pages }),
        1 => Just(Op::ZapFast),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leaf {
    pages: u64,
    writable: bool,
    accessed: bool,
}

/// What should be there.
#[derive(Default)]
struct Model {
    eager: bool,
    leaves: BTreeMap<u64, Leaf>,
    logs: [Option<BTreeSet<u64>>; 2],
}

impl Model {
    fn at(&self, gfn: u64) -> Option<(u64, Leaf)> {
        let (&first, &leaf) = self.leaves.range(..=gfn).next_back()?;
        (gfn < first + leaf.pages).then_some((first, leaf))
    }

    fn overlapping(&self, range: &Range<u64>) -> Vec<u64> {
        let touching = self.leaves.iter().filter_map(|(&first, leaf)| {
            let touches = first < range.end && first + leaf.pages > range.start;
            touches.then_some(first)
        });
        touching.collect()
    }

    fn split(&mut self, first: u64) {
        if let Some(leaf) = self.leaves.remove(&first) {
            let small = Leaf { pages: 1, ..leaf };
            self.leaves
                .extend((first..first + leaf.pages).map(|gfn| (gfn, small)));
        }
    }

    /// Whether the tables allow the access, which marks the leaf.
    fn access(&mut self, gfn: u64, write: bool) -> bool {
        let Some((first, leaf)) = self.at(gfn).filter(|(_, leaf)| !write || leaf.writable) else {
            return false;
        };
        let accessed = true;
        self.leaves.insert(first, Leaf { accessed, ..leaf });
        true
    }

    /// What a fault does that the tables do not allow.
    fn fault(&mut self, slot: usize, gfn: u64) {
        let logged = self.logs[slot].is_some();
        if let Some((first, leaf)) = self.at(gfn) {
            let split = logged && leaf.pages > 1;
            if split {
                self.split(first);
            }
            let first = if logged { gfn } else { first };
            let leaf = self.leaves.get_mut(&first).unwrap();
            leaf.writable = true;
            // A split makes a new leaf for the access, the fast path only gives W back.
            leaf.accessed |= split;
        } else {
            let pages = if slot == 1 && !logged { HUGE } else { 1 };
            let first = gfn - gfn % pages;
            for small in self.overlapping(&(first..first + pages)) {
                self.leaves.remove(&small);
            }
            let leaf = Leaf {
                pages,
                writable: true,
                accessed: true,
            };
            self.leaves.insert(first, leaf);
        }
        if let Some(log) = &mut self.logs[slot] {
            log.insert(gfn);
        }
    }

    fn begin_log(&mut self, slot: usize) {
        let (first, pages) = SLOTS[slot];
        for leaf in self.overlapping(&(first..first + pages)) {
            if self.eager && self.leaves[&leaf].pages > 1 {
                self.split(leaf);
            }
        }
        for leaf in self.overlapping(&(first..first + pages)) {
            self.leaves.get_mut(&leaf).unwrap().writable = false;
        }
        self.logs[slot] = Some(BTreeSet::new());
    }

    fn end_log(&mut self, slot: usize) {
        self.logs[slot] = None;
        let (first, pages) = SLOTS[slot];
        if slot == 0 {
            return;
        }
        for first in (0..pages / HUGE).map(|at| first + at * HUGE) {
            let small = self.overlapping(&(first..first + HUGE));
            // The first leaf decides how the huge one is.
            let Some(leaf) = small.first().map(|gfn| self.leaves[gfn]) else {
                continue;
            };
            self.leaves.retain(|gfn, _| !small.contains(gfn));
            self.leaves.insert(
                first,
                Leaf {
                    pages: HUGE,
                    ..leaf
                },
            );
        }
    }
}

struct World {
    rig: Rig,
    vm: Vm,
    model: Model,
}

impl World {
    fn new(kind: VmKind, eager: bool) -> Self {
        let rig = Rig::new();
        let config = VmConfig {
            kind,
            eager_page_split: eager,
            mode: Mode::Batched,
            gpaw: Gpaw::W48,
            ..VmConfig::default()
        };
        let vm = match kind {
            VmKind::Td => rig.empty_with(config),
            VmKind::Ordinary => rig.ordinary(config),
        };
        for slot in 0..SLOTS.len() {
            vm.set_user_memory_region(spec(slot, false)).unwrap();
        }
        let model = Model {
            eager,
            ..Model::default()
        };
        Self { rig, vm, model }
    }

    fn range(slot: usize, page: u64, pages: u64) -> Range<u64> {
        let (first, all) = SLOTS[slot];
        first + page..first + (page + pages).min(all)
    }

    fn hva(gfns: &Range<u64>) -> (u64, u64) {
        (USER_BASE + (gfns.start << 12), USER_BASE + (gfns.end << 12))
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Access { slot, page, .. }
            | Op::Unmap { slot, page, .. }
            | Op::Age { slot, page, .. }
                if page >= SLOTS[slot].1 => {}
            Op::Access { slot, page, write } => {
                let gfn = SLOTS[slot].0 + page;
                let gpa = common::shared(&self.vm, gfn).gpa;
                let allowed = self.model.access(gfn, write);
                assert_eq!(self.vm.access(gpa, write).unwrap(), allowed, "{op:?}");
                if allowed {
                    return;
                }
                let present = self.model.at(gfn).is_some();
                let access = if write { 2 } else { 1 };
                let fault = Fault {
                    qualification: access | if present { PRESENT } else { 0 },
                    ..common::shared(&self.vm, gfn)
                };
                let report = self.vm.handle_fault(0, fault).unwrap();
                self.model.fault(slot, gfn);
                assert_eq!(report.ret_pf, RetPf::Fixed, "{op:?}");
            }
            Op::Log { slot, on } => {
                self.vm.set_user_memory_region(spec(slot, on)).unwrap();
                match (on, self.model.logs[slot].is_some()) {
                    (true, false) => self.model.begin_log(slot),
                    (false, true) => self.model.end_log(slot),
                    _ => {}
                }
            }
            Op::ReadLog { slot } => self.read_log(slot),
            Op::Unmap { slot, page, pages } => {
                let gfns = Self::range(slot, page, pages);
                let (start, end) = Self::hva(&gfns);
                let counts = self.vm.unmap_hva(start, end).unwrap();
                let gone = self.model.overlapping(&gfns);
                assert_eq!(counts.flushes, u64::from(!gone.is_empty()), "{op:?}");
                self.model.leaves.retain(|gfn, _| !gone.contains(gfn));
            }
            Op::Age { slot, page, pages } => {
                let gfns = Self::range(slot, page, pages);
                let (start, end) = Self::hva(&gfns);
                let mut young = false;
                for gfn in self.model.overlapping(&gfns) {
                    let leaf = self.model.leaves.get_mut(&gfn).unwrap();
                    young |= std::mem::take(&mut leaf.accessed);
                }
                assert_eq!(self.vm.age_hva(start, end).unwrap(), young, "{op:?}");
            }
            Op::ZapFast => {
                self.vm.zap_all_fast().unwrap();
                self.model.leaves.clear();
            }
        }
    }

    fn read_log(&mut self, slot: usize) {
        let read = self.vm.get_dirty_log(u32::try_from(slot).unwrap() + 1);
        let Some(log) = &mut self.model.logs[slot] else {
            assert!(read.is_err());
            return;
        };
        let (words, _) = read.unwrap();
        let pages = (0..).zip(&words).flat_map(|(at, word)| {
            (0u64..64)
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| at * 64 + bit)
        });
        let found: BTreeSet<u64> = pages.map(|page| SLOTS[slot].0 + page).collect();
        assert_eq!(found, *log);
        for gfn in std::mem::take(log) {
            if let Some(leaf) = self
                .model
                .leaves
                .get_mut(&gfn)
                .filter(|leaf| leaf.pages == 1)
            {
                leaf.writable = false;
            }
        }
    }

    fn check(&self) {
        // While no root is loaded the tree is nobody's.
        let trees = state::trees(&self.vm);
        let found: BTreeMap<u64, Leaf> = trees
            .direct
            .iter()
            .map(|(&gfn, spte)| {
                let leaf = Leaf {
                    pages: if spte & LARGE == 0 { 1 } else { HUGE },
                    writable: spte & WRITE != 0,
                    accessed: spte & ACCESSED != 0,
                };
                (gfn, leaf)
            })
            .collect();
        let differ = |(gfn, leaf): &(&u64, &Leaf)| self.model.leaves.get(gfn) != Some(leaf);
        let first = found.iter().find(differ);
        assert_eq!(
            first,
            None,
            "{:x?}",
            first.map(|(gfn, _)| self.model.at(*gfn))
        );
        assert_eq!(found.len(), self.model.leaves.len(), "leaves are missing");
        check_invariants(&self.vm, &self.rig);
        assert_eq!(self.vm.bugs().reports(), []);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_direct_root_is_a_map_from_frames_to_leaves(
        ops in prop::collection::vec(op(), 1..40),
        eager in any::<bool>(),
        is_td in any::<bool>(),
    ) {
        let kind = if is_td { VmKind::Td } else { VmKind::Ordinary };
        let mut world = World::new(kind, eager);
        for op in ops {
            world.apply(op);
            world.check();
        }
        state::destroy(&world.vm, &world.rig);
    }
}
