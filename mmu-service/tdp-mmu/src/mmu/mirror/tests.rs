//! Units: what is visible at which moment, and what each prefix of an answer leaves.
#![cfg_attr(
    not(test),
    allow(
        dead_code,
        unused_imports,
        reason = "only the rows of the tables are scenarios"
    )
)]

use super::*;
use crate::mmu::role::RootKind;
use crate::mmu::spte::LeafTraits;
use tdx_defs::{GpaLayout, Gpaw};

fn leaf(page: u64) -> u64 {
    spte::leaf_4k(
        Pfn::new(page),
        LeafTraits {
            map_writable: true,
            prefetch: false,
        },
    )
}

fn mmu() -> (Mmu, TableId) {
    let mmu = Mmu::new(GpaLayout::new(Gpaw::W48));
    let mut next = 0x100;
    mmu.top_up_external(|| {
        next += 1;
        Some(Pfn::new(next))
    });
    let root = mmu.alloc_root(RootKind::Mirror).unwrap();
    (mmu, root)
}

fn held(begin: Begin<'_>) -> Unit<'_> {
    match begin {
        Begin::Held(unit) => unit,
        _ => panic!("nothing was held"),
    }
}

#[test]
fn one_frozen_entry_guards_the_whole_chain() {
    let (mmu, root) = mmu();
    let unit = held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::Chain));
    assert_eq!((unit.links(), unit.leaves()), (3, 1));
    let path = mmu.path(root, Gfn::new(1));
    assert_eq!(
        path.len(),
        1,
        "nothing below the frozen entry can be reached"
    );
    assert_eq!(path[0].spte, spte::FROZEN);
    assert!(matches!(
        mmu.begin(root, Gfn::new(2), leaf(8), Depth::Chain),
        Begin::Frozen
    ));
    assert_eq!(unit.settle(3, 1), 1);
    assert_eq!(mmu.last(root, Gfn::new(1)).unwrap().spte, leaf(7));
    assert_eq!(mmu.pages(), [1, 0, 0]);
}

#[test]
fn every_prefix_of_an_answer_leaves_what_the_kernel_would() {
    for (links, leaves, path, mapped) in [
        (0, 0, 1, false),
        (1, 0, 2, false),
        (2, 0, 3, false),
        (3, 0, 4, false),
        (3, 1, 4, true),
    ] {
        let (mmu, root) = mmu();
        let before = mmu.drain_external();
        before.iter().for_each(|&page| mmu.give_external(page));
        let unit = held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::Chain));
        let _ = unit.settle(links, leaves);
        let steps = mmu.path(root, Gfn::new(1));
        assert_eq!(steps.len(), path, "{links} links");
        let last = steps.last().unwrap();
        assert_eq!(spte::is_present(last.spte), mapped, "{links} links");
        assert_ne!(last.spte, spte::FROZEN, "{links} links");
        assert_eq!(
            mmu.drain_external().len(),
            before.len() - links,
            "pages of lost tables return"
        );
        assert_eq!(mmu.pages(), [u64::from(mapped), 0, 0]);
        assert!(!mmu.bugs.is_bugged());
    }
}

#[test]
fn a_unit_that_was_never_sent_restores_its_entries() {
    let (mmu, root) = mmu();
    drop(held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::Chain)));
    assert_eq!(mmu.path(root, Gfn::new(1))[0].spte, spte::NP);
    let _ = held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::Chain)).settle(3, 1);
    drop(held(mmu.begin(root, Gfn::new(2), leaf(8), Depth::Chain)));
    assert_eq!(mmu.last(root, Gfn::new(2)).unwrap().spte, spte::NP);
    assert!(!mmu.bugs.is_bugged());
}

#[test]
fn a_unit_lost_after_it_was_sent_bugs_the_vm_and_keeps_the_entry() {
    let (mmu, root) = mmu();
    let mut unit = held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::Chain));
    unit.sent();
    drop(unit);
    assert!(mmu.bugs.is_bugged());
    assert_eq!(mmu.path(root, Gfn::new(1))[0].spte, spte::FROZEN);
}

#[test]
fn leaves_of_one_table_share_a_unit() {
    let (mmu, root) = mmu();
    let mut unit = held(mmu.begin(root, Gfn::new(0), leaf(0x200), Depth::Chain));
    for gfn in 1..512 {
        assert_eq!(
            unit.extend(Gfn::new(gfn), leaf(0x200 + gfn)),
            Extended::Added
        );
    }
    assert_eq!(
        unit.extend(Gfn::new(5), leaf(0x205)),
        Extended::Outside,
        "the table is full"
    );
    assert_eq!(unit.settle(3, 300), 300);
    for (gfn, mapped) in [(0, true), (299, true), (300, false), (511, false)] {
        let found = mmu.last(root, Gfn::new(gfn)).unwrap().spte;
        assert_eq!(spte::is_present(found), mapped, "gfn {gfn}");
    }
    let mut unit = held(mmu.begin(root, Gfn::new(300), leaf(0x32C), Depth::Chain));
    assert_eq!(unit.links(), 0);
    assert_eq!(
        unit.extend(Gfn::new(299), leaf(1)),
        Extended::Mapped {
            spte: leaf(0x200 + 299)
        }
    );
    assert_eq!(unit.extend(Gfn::new(300), leaf(0x32C)), Extended::Frozen);
    assert_eq!(unit.extend(Gfn::new(512), leaf(2)), Extended::Outside);
    assert_eq!(unit.settle(0, 1), 1);
    assert_eq!(mmu.pages(), [301, 0, 0]);
}

#[test]
fn one_step_at_a_time_holds_one_entry() {
    let (mmu, root) = mmu();
    for links in [1, 1, 1] {
        let unit = held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::One));
        assert_eq!((unit.links(), unit.leaves()), (links, 0));
        let _ = unit.settle(1, 0);
    }
    let unit = held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::One));
    assert_eq!((unit.links(), unit.leaves()), (0, 1));
    let _ = unit.settle(0, 1);
    assert!(matches!(
        mmu.begin(root, Gfn::new(1), leaf(7), Depth::One),
        Begin::Mapped { .. }
    ));
}

#[cfg_attr(test, test)]
pub(crate) fn c05_whoever_loses_an_entry_gives_its_table_back_and_calls_nobody() {
    let (mmu, root) = mmu();
    let spare = |mmu: &Mmu| {
        let pages = mmu.drain_external();
        pages.iter().for_each(|&page| mmu.give_external(page));
        pages.len()
    };
    let stale = mmu.path(root, Gfn::new(2))[0];
    assert_eq!(stale.spte, spte::NP, "read before the other one");
    let first = held(mmu.begin(root, Gfn::new(1), leaf(7), Depth::One));
    let (tables, pages) = (mmu.arena.bytes(), spare(&mmu));
    let second = mmu.begin_chain(&stale, Gfn::new(2), leaf(8), Depth::One);
    assert!(matches!(second, Begin::Lost));
    assert_eq!(mmu.read(stale.slot), spte::FROZEN, "still the first one's");
    assert_eq!((mmu.arena.bytes(), spare(&mmu)), (tables, pages));
    let _ = first.settle(1, 0);
    let again = held(mmu.begin(root, Gfn::new(2), leaf(8), Depth::One));
    assert_eq!(again.links(), 1, "one level further down");
    drop(again);
    assert_eq!(mmu.bugs.reports(), []);
}
