//! Every scenario has a place: a row of a table, or a test that carries its id.

use std::collections::BTreeSet;

use tdp_mmu_scenarios::{RACES, list};

/// The scenarios that this crate answers for: 155.
const REQUIRED: [(&str, std::ops::RangeInclusive<u32>); 9] = [
    ("R", 1..=15),
    ("D", 1..=18),
    ("P", 1..=23),
    ("Z", 1..=28),
    ("C", 1..=25),
    ("I", 1..=21),
    ("M", 1..=7),
    ("T", 1..=8),
    ("X", 1..=10),
];

/// Sources whose tests carry an id in their name, as in `fn x01_…`.
const INSIDE: [&str; 9] = [
    include_str!("../../src/mmu/change/tests.rs"),
    include_str!("../../src/mmu/mirror/tests.rs"),
    include_str!("../../src/mmu/roots/tests.rs"),
    include_str!("../../src/vm/map_gpa.rs"),
    include_str!("../../src/vm/tests.rs"),
    include_str!("../../tests/concurrency.rs"),
    include_str!("../../interleavings/tests/interleavings.rs"),
    include_str!("../../interleavings/tests/direct.rs"),
    include_str!("../../../tests/services/refusals/states.rs"),
];

#[test]
fn every_scenario_has_its_place_and_only_one() {
    let required: BTreeSet<String> = REQUIRED
        .into_iter()
        .flat_map(|(letter, numbers)| numbers.map(move |n| format!("{letter}{n:02}")))
        .collect();
    assert_eq!(required.len(), 155);
    let mut places: Vec<String> = list()
        .into_iter()
        .filter(|scenario| scenario.group != RACES)
        .map(|scenario| scenario.id)
        .collect();
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
