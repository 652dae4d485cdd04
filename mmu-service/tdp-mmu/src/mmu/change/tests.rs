//! Transitions that must not be: what each check says, and what is left behind.
#![cfg_attr(
    not(test),
    allow(
        dead_code,
        unused_imports,
        reason = "only the rows of the tables are scenarios"
    )
)]

use super::*;
use crate::mmu::direct::{DirectFault, Installed, Target};
use crate::mmu::mirror::{Begin, Depth};
use crate::mmu::role::{Role, RootKind};
use crate::mmu::spte::{Access, DirectTraits, LARGE, LeafTraits};
use tdx_defs::{GpaLayout, Gpaw};

const GFN: Gfn = Gfn::new(1);

fn leaf(page: u64) -> u64 {
    spte::leaf_4k(
        Pfn::new(page),
        LeafTraits {
            map_writable: true,
            prefetch: false,
        },
    )
}

/// A tree of one kind with a leaf at frame 1, and the way to it.
fn mapped(kind: RootKind) -> (Mmu, TableId, Step) {
    let mmu = Mmu::new(GpaLayout::new(Gpaw::W48));
    mmu.top_up_external(|| Some(Pfn::new(0x100)));
    let root = mmu.alloc_root(kind).unwrap();
    match kind {
        RootKind::Mirror => {
            let Begin::Held(unit) = mmu.begin(root, GFN, leaf(7), Depth::Chain) else {
                panic!("nothing was held");
            };
            assert_eq!(unit.settle(3, 1), 1);
        }
        RootKind::Direct => {
            let fault = DirectFault {
                gfn: GFN,
                access: Access {
                    write: true,
                    exec: false,
                },
                prefetch: false,
                req_level: Level::L4K,
                target: Target::Page {
                    pfn: Pfn::new(7),
                    map_writable: true,
                },
                traits: DirectTraits {
                    ignore_pat: false,
                    nx_huge_pages: false,
                    write_tracked: false,
                },
            };
            let installed = mmu.map_direct(root, &fault).installed;
            assert_eq!(installed, Installed::Fixed);
        }
    }
    let step = mmu.last(root, GFN).unwrap();
    (mmu, root, step)
}

fn checks(mmu: &Mmu) -> Vec<Check> {
    mmu.bugs
        .reports()
        .into_iter()
        .map(|(check, _)| check)
        .collect()
}

#[cfg_attr(test, test)]
pub(crate) fn x01_an_atomic_change_of_a_present_mirror_leaf_bugs_and_goes_on() {
    let (mmu, _, step) = mapped(RootKind::Mirror);
    let read_only = leaf(7) & !spte::WRITE;
    assert_eq!(
        mmu.freeze(&step, GFN, read_only),
        Ok(()),
        "the kernel goes on"
    );
    assert_eq!(mmu.read(step.slot), spte::FROZEN);
    let op = mmu.external_op(GFN, step.level, read_only);
    assert_eq!(
        op,
        ExternalOp::SetSpte {
            gfn: GFN,
            level: step.level,
            spte: read_only
        }
    );
    assert_eq!(checks(&mmu), [Check::B8]);
    assert!(mmu.bugs.is_bugged());
}

#[cfg_attr(test, test)]
pub(crate) fn x02_an_atomic_zap_of_a_mirror_leaf_is_refused() {
    let (mmu, _, step) = mapped(RootKind::Mirror);
    assert_eq!(mmu.freeze(&step, GFN, spte::NP), Err(Lost));
    assert_eq!(mmu.read(step.slot), leaf(7), "unchanged");
    assert_eq!(checks(&mmu), [Check::B7]);
}

#[cfg_attr(test, test)]
pub(crate) fn x05_an_atomic_zap_of_a_mirror_table_is_refused() {
    let (mmu, root, _) = mapped(RootKind::Mirror);
    let table = mmu.path(root, GFN)[2];
    assert!(spte::is_table(table.spte, table.level));
    assert_eq!(mmu.freeze(&table, Gfn::new(0), spte::NP), Err(Lost));
    assert_eq!(mmu.read(table.slot), table.spte);
    assert_eq!(checks(&mmu), [Check::B7]);
}

#[cfg_attr(test, test)]
pub(crate) fn x06_a_leaf_that_changes_its_page_stops_a_host() {
    let (mmu, _, step) = mapped(RootKind::Direct);
    assert_eq!(mmu.set_direct_atomic(&step, GFN, leaf(8)), Ok(()));
    assert_eq!(checks(&mmu), [Check::B20]);
    assert!(mmu.bugs.is_bugged());
}

#[cfg_attr(test, test)]
pub(crate) fn x07_a_table_of_another_level_or_frame_is_warned_about() {
    let (mmu, _, _) = mapped(RootKind::Mirror);
    let role = Role::root(Level::L512G, RootKind::Mirror).child();
    let table = mmu
        .arena
        .alloc(role, Gfn::new(0), Some(Pfn::new(9)))
        .unwrap();
    let new = spte::nonleaf(table.hpa());
    // Entries of level 3 belong below an entry of level 4, for frame 0.
    for (gfn, level, warned) in [
        (0, Level::L512G, false),
        (0, Level::L1G, true),
        (0x200, Level::L512G, true),
    ] {
        let before = checks(&mmu).len();
        let op = mmu.external_op(Gfn::new(gfn), level, new);
        assert!(
            matches!(
                op,
                ExternalOp::LinkSpt {
                    external: Some(_),
                    ..
                }
            ),
            "SEPT.ADD all the same"
        );
        let after = checks(&mmu);
        assert_eq!(
            after.len() - before,
            usize::from(warned),
            "gfn {gfn:#x} level {level}"
        );
        assert!(after.iter().all(|check| *check == Check::B10));
    }
    assert!(!mmu.bugs.is_bugged(), "WARN, not BUG");
}

#[cfg_attr(test, test)]
pub(crate) fn x08_a_mirror_table_without_a_page_bugs_the_vm() {
    let (mmu, _, _) = mapped(RootKind::Mirror);
    let role = Role::root(Level::L512G, RootKind::Mirror).child();
    let table = mmu.arena.alloc(role, Gfn::new(0), None).unwrap();
    let op = mmu.external_op(Gfn::new(0), Level::L512G, spte::nonleaf(table.hpa()));
    assert!(
        matches!(op, ExternalOp::LinkSpt { external: None, .. }),
        "{op:?}"
    );
    assert_eq!(checks(&mmu), [Check::B9]);
    assert!(mmu.bugs.is_bugged());
}

#[cfg_attr(test, test)]
pub(crate) fn x09_a_huge_mirror_leaf_is_never_split() {
    let (mmu, root, _) = mapped(RootKind::Mirror);
    let above = mmu.path(root, Gfn::new(0x200))[2];
    mmu.store(above.slot, leaf(0x200) | LARGE);
    let begin = mmu.begin(root, Gfn::new(0x200), leaf(0x200), Depth::Chain);
    assert!(matches!(begin, Begin::Lost));
    assert_eq!(checks(&mmu), [Check::B16]);
}

#[cfg_attr(test, test)]
pub(crate) fn x10_nothing_to_nothing_is_warned_about() {
    let (mmu, _, step) = mapped(RootKind::Direct);
    let mmio = spte::mmio(0x1000, 0, true);
    for (old, new, warned) in [
        (spte::NP, spte::NP | 1 << 60, true),
        (spte::NP, mmio, false),
        (mmio, spte::NP, false),
        (spte::NP, spte::FROZEN, false),
    ] {
        let before = checks(&mmu).len();
        let mut ops = Vec::new();
        mmu.handle_changed(
            GFN,
            step.level,
            (old, new),
            LockMode::Exclusive,
            false,
            &mut ops,
        );
        assert_eq!(
            checks(&mmu).len() - before,
            usize::from(warned),
            "{old:#x} to {new:#x}"
        );
    }
    assert_eq!(checks(&mmu), [Check::B21]);
    assert!(!mmu.bugs.is_bugged());
}

#[cfg_attr(test, test)]
pub(crate) fn d17_a_walk_above_the_shared_bit_visits_nothing() {
    let (mmu, root, _) = mapped(RootKind::Direct);
    let above = Gfn::new(1 << 35);
    assert!(mmu.path(root, above).is_empty() && mmu.last(root, above).is_none());
    assert_eq!(checks(&mmu), [Check::B22, Check::B22]);
    assert!(!mmu.bugs.is_bugged());
}

#[test]
fn frozen_entries_are_not_changed_by_others() {
    let (mmu, _, step) = mapped(RootKind::Mirror);
    let frozen = Step {
        spte: spte::FROZEN,
        ..step
    };
    assert_eq!(mmu.freeze(&frozen, GFN, leaf(7)), Err(Lost));
    mmu.set_spte(&mmu.lock.write(), &frozen, GFN, spte::NP, &mut Vec::new());
    assert_eq!(checks(&mmu), [Check::B6, Check::B12]);
}

#[test]
fn a_mirror_table_removed_under_the_read_side_is_a_bug() {
    let (mmu, root, _) = mapped(RootKind::Mirror);
    let table = mmu.path(root, GFN)[2];
    let linked = TableId::linked_by(table.spte).unwrap();
    let mut ops = Vec::new();
    mmu.remove_table(linked, LockMode::Shared, true, &mut ops);
    assert!(checks(&mmu).contains(&Check::B13));
    assert!(matches!(
        ops[..],
        [ExternalOp::RemoveSpte { .. }, ExternalOp::FreeSpt { .. }]
    ));
}

#[test]
fn b25_an_entry_that_could_raise_ve_by_mistake_is_warned_about() {
    let (mmu, _, step) = mapped(RootKind::Direct);
    let mmio = |is_td| spte::mmio(0x1000, 0, is_td);
    for (case, new, warned) in [
        ("leaf", leaf(7), false),
        ("nothing", spte::NP, false),
        ("FROZEN", spte::FROZEN, false),
        ("MMIO of a TD", mmio(true), false),
        ("MMIO of an ordinary VM", mmio(false), false),
        ("leaf without bit 63", leaf(7) & !spte::SUPPRESS_VE, true),
    ] {
        let before = checks(&mmu).len();
        mmu.store(step.slot, new);
        let after = checks(&mmu);
        assert_eq!(after.len() - before, usize::from(warned), "{case}");
        assert!(after.iter().all(|check| *check == Check::B25));
    }
    assert!(!mmu.bugs.is_bugged());
}
