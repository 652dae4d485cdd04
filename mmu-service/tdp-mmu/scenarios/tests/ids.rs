//! Every scenario of the reference can be run by name, under one name.

use std::collections::BTreeSet;

use tdp_mmu_scenarios::{Mode, RACES, list, run};

/// The scenarios that this package answers for: 155.
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
/// Rows of our own beside recorded behaviour (N) and the dirty log (L): another root, what waits
/// for a vCPU that loads its roots, the exit that the zero-step defence makes up.
const OWN: [&str; 3] = ["R16", "C26", "C27"];

#[test]
fn every_scenario_is_in_the_list_and_only_once() {
    let required: BTreeSet<String> = REQUIRED
        .into_iter()
        .flat_map(|(letter, numbers)| numbers.map(move |n| format!("{letter}{n:02}")))
        .collect();
    assert_eq!(required.len(), 155);
    let listed: Vec<_> = list();
    let rows = listed.iter().filter(|scenario| scenario.group != RACES);
    let own = |id: &str| id.starts_with(['N', 'L']) || OWN.contains(&id);
    let found: BTreeSet<String> = rows
        .map(|scenario| scenario.id.clone())
        .filter(|id| !own(id))
        .collect();
    assert_eq!(found, required);
    let distinct: BTreeSet<&String> = listed.iter().map(|scenario| &scenario.id).collect();
    assert_eq!(distinct.len(), listed.len(), "an id has two places");
}

#[test]
fn an_unknown_name_is_none() {
    assert!(run("P99", Mode::Kernel).is_none());
    assert!(run("c01", Mode::Kernel).is_none());
}
