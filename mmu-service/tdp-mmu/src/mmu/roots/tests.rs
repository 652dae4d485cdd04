//! Which roots an operation visits, and how long a root lives.
#![cfg_attr(
    not(test),
    allow(
        dead_code,
        unused_imports,
        reason = "only the rows of the tables are scenarios"
    )
)]

use super::*;
use tdx_defs::{GpaLayout, Gpaw};

fn mmu() -> Mmu {
    Mmu::new(GpaLayout::new(Gpaw::W48))
}

/// A mirror root, a valid direct root and an invalid one that is being zapped.
fn during_a_fast_zap() -> (Mmu, [TableId; 3]) {
    let mmu = mmu();
    let mirror = mmu.alloc_root(RootKind::Mirror).unwrap();
    let invalid = mmu.alloc_root(RootKind::Direct).unwrap();
    assert_eq!(mmu.invalidate_roots(RootTypes::DIRECT), [invalid]);
    let direct = mmu.alloc_root(RootKind::Direct).unwrap();
    assert_ne!(direct, invalid, "an invalid root is not taken again");
    (mmu, [mirror, direct, invalid])
}

#[cfg_attr(test, test)]
pub(crate) fn r09_valid_types_skip_a_root_that_is_being_zapped() {
    let (mmu, [mirror, direct, _]) = during_a_fast_zap();
    assert_eq!(mmu.roots(RootTypes::DIRECT), [direct]);
    assert_eq!(mmu.roots(RootTypes::MIRROR), [mirror]);
    assert_eq!(
        mmu.roots(RootTypes::VALID),
        [direct, mirror],
        "newest first"
    );
}

#[cfg_attr(test, test)]
pub(crate) fn r10_types_with_invalid_visit_it_too() {
    let (mmu, [mirror, direct, invalid]) = during_a_fast_zap();
    assert_eq!(
        mmu.roots(RootTypes::DIRECT.with(RootTypes::INVALID)),
        [direct, invalid]
    );
    assert_eq!(mmu.roots(RootTypes::ALL), [direct, invalid, mirror]);
}

#[cfg_attr(test, test)]
pub(crate) fn r11_invalid_alone_names_no_kind_of_root() {
    let (mmu, _) = during_a_fast_zap();
    assert_eq!(mmu.roots(RootTypes::INVALID), []);
    assert!(
        mmu.bugs
            .reports()
            .iter()
            .all(|(check, _)| *check == Check::B2)
    );
    assert!(!mmu.bugs.reports().is_empty() && !mmu.bugs.is_bugged());
}

#[cfg_attr(test, test)]
pub(crate) fn r12_filters_choose_root_types() {
    let mmu = mmu();
    for (filter, types) in [
        (Filter::SHARED, RootTypes::DIRECT),
        (Filter::PRIVATE, RootTypes::MIRROR),
        (Filter::BOTH, RootTypes::VALID),
        (Filter(0), RootTypes::NONE),
    ] {
        assert_eq!(mmu.filter_to_root_types(filter), types, "{filter:?}");
    }
    let reports = mmu.bugs.reports();
    assert!(
        matches!(reports[..], [(Check::B3, _)]),
        "only the empty filter warns: {reports:?}"
    );
    assert!(!mmu.bugs.is_bugged());
}

#[cfg_attr(test, test)]
pub(crate) fn r13_the_last_reference_of_a_valid_root_is_a_bug() {
    let mmu = mmu();
    let root = mmu.alloc_root(RootKind::Mirror).unwrap();
    assert_eq!(
        mmu.alloc_root(RootKind::Mirror),
        Some(root),
        "shared by role word"
    );
    assert_eq!(mmu.arena.header(root).root_count.load(Ordering::SeqCst), 3);
    mmu.put_root(root);
    mmu.put_root(root);
    assert!(!mmu.bugs.is_bugged());
    mmu.put_root(root);
    assert!(matches!(mmu.bugs.reports()[..], [(Check::B1, _)]) && mmu.bugs.is_bugged());
    assert_eq!(mmu.listed_roots(), [root], "and it stays");
}

#[test]
fn an_invalid_root_goes_with_its_last_user() {
    let (mmu, [mirror, direct, invalid]) = during_a_fast_zap();
    mmu.put_root(invalid);
    assert_eq!(mmu.listed_roots(), [direct, invalid, mirror]);
    mmu.put_root(invalid);
    assert_eq!(mmu.listed_roots(), [direct, mirror]);
    assert!(!mmu.bugs.is_bugged());
}

fn checks(mmu: &Mmu) -> Vec<Check> {
    let reports = mmu.bugs.reports();
    reports.into_iter().map(|(check, _)| check).collect()
}

#[test]
fn b4_invalid_roots_are_not_invalidated_again() {
    let (mmu, [_, direct, invalid]) = during_a_fast_zap();
    let types = RootTypes::DIRECT.with(RootTypes::INVALID);
    assert_eq!(mmu.invalidate_roots(types), [direct], "not {invalid:?}");
    assert_eq!(checks(&mmu), [Check::B4]);
    assert!(!mmu.bugs.is_bugged());
}

#[test]
fn b5_a_valid_root_is_not_zapped_for_good() {
    let (mmu, [_, direct, invalid]) = during_a_fast_zap();
    drop(mmu.zap_root_shared(mmu.lock.read(0), invalid));
    assert_eq!(checks(&mmu), []);
    drop(mmu.zap_root_shared(mmu.lock.read(0), direct));
    assert_eq!(checks(&mmu), [Check::B5]);
    assert!(mmu.bugs.is_bugged());
}

#[test]
fn b23_invalid_roots_are_not_aged() {
    let (mmu, [_, direct, _]) = during_a_fast_zap();
    assert_eq!(mmu.roots_to_age(RootTypes::DIRECT), [direct]);
    assert_eq!(checks(&mmu), []);
    mmu.roots_to_age(RootTypes::ALL);
    assert_eq!(checks(&mmu), [Check::B23]);
    assert!(!mmu.bugs.is_bugged());
}
