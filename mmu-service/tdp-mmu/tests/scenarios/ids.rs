//! Every scenario has a place: a row of a table, a test inside the crate, or a reason.

use std::collections::BTreeSet;

use crate::TABLES;
use crate::rows;

/// The scenarios that this crate answers for.
const REQUIRED: [(&str, std::ops::RangeInclusive<u32>); 8] = [
    ("R", 1..=15),
    ("D", 1..=18),
    ("P", 1..=23),
    ("Z", 1..=28),
    ("C", 1..=25),
    ("I", 1..=21),
    ("T", 1..=8),
    ("X", 1..=10),
];

/// Sources whose tests carry an id in their name, as in `fn x01_…`.
const INSIDE: [&str; 6] = [
    include_str!("../../src/mmu/change/tests.rs"),
    include_str!("../../src/mmu/roots/tests.rs"),
    include_str!("../../src/vm/tests.rs"),
    include_str!("../../interleavings/tests/interleavings.rs"),
    include_str!("../../interleavings/tests/direct.rs"),
    include_str!("../../../tests/services/refusals.rs"),
];

/// What cannot happen here, and why.
const LEFT_OUT: [(&str, &[&str]); 3] = [
    (
        "no guest code runs, so nobody enters or holds a lock",
        &["C12", "C13", "C14"],
    ),
    (
        "the same protocol as a scenario that is there (C01, C06, C11)",
        &["C03", "C05", "C09", "C10", "C20", "C21"],
    ),
    (
        "the lock that serialises them is held from start to end",
        &["C18", "C19", "C24", "C25"],
    ),
];

#[test]
fn every_scenario_has_its_place_and_only_one() {
    let required: BTreeSet<String> = REQUIRED
        .into_iter()
        .flat_map(|(letter, numbers)| numbers.map(move |n| format!("{letter}{n:02}")))
        .collect();
    let mut places: Vec<String> = TABLES
        .into_iter()
        .flat_map(|(_, text)| rows::parse(text))
        .map(|row| row.id)
        .collect();
    places.extend(
        LEFT_OUT
            .iter()
            .flat_map(|(_, ids)| ids.iter().map(|id| (*id).to_owned())),
    );
    for id in &required {
        let name = format!("fn {}_", id.to_lowercase());
        if INSIDE.iter().any(|source| source.contains(&name)) {
            places.push(id.clone());
        }
    }
    let distinct: BTreeSet<String> = places.iter().cloned().collect();
    assert_eq!(distinct.len(), places.len(), "an id has two places");
    // Rows of our own: recorded behaviour, the dirty log, other roots.
    let own = |id: &&String| ["N", "L"].iter().any(|own| id.starts_with(own)) || *id == "R16";
    let missing: Vec<_> = required.difference(&distinct).collect();
    let unknown: Vec<_> = distinct
        .difference(&required)
        .filter(|id| !own(id))
        .collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "missing {missing:?}, unknown {unknown:?}"
    );
}
