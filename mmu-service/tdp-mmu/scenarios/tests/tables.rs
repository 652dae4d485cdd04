//! Every row and every race does what it says, in both propagation modes.

use std::collections::BTreeSet;

use tdp_mmu_scenarios::{Mode, RACES, list, run};

fn check(group: &str) {
    let mut failed = Vec::new();
    let members: Vec<_> = list()
        .into_iter()
        .filter(|one| one.group == group)
        .collect();
    assert!(!members.is_empty(), "{group} is empty");
    for scenario in members {
        for mode in [Mode::Kernel, Mode::Batched] {
            if let Some(why) = run(&scenario.id, mode).unwrap().failure {
                let (id, title) = (&scenario.id, &scenario.title);
                failed.push(format!("{id} ({mode:?}) {title}\n    {why}"));
            }
        }
    }
    assert!(
        failed.is_empty(),
        "{} failed\n{}",
        failed.len(),
        failed.join("\n")
    );
}

#[test]
fn roots_are_loaded_put_and_replaced_as_listed() {
    check("roots");
}

#[test]
fn shared_faults_do_what_is_listed() {
    check("shared");
}

#[test]
fn private_faults_make_the_listed_calls() {
    check("private");
}

#[test]
fn zaps_and_conversions_make_the_listed_calls() {
    check("zaps");
}

#[test]
fn building_a_td_makes_the_listed_calls() {
    check("ioctls");
}

#[test]
fn the_end_of_a_vm_makes_the_listed_calls() {
    check("teardown");
}

#[test]
fn races_of_the_past_end_well_with_the_policy_of_today() {
    check(RACES);
}

#[test]
fn two_sides_at_once_end_as_listed() {
    check("concurrency");
}

#[test]
fn a_guest_converts_as_listed() {
    check("map-gpa");
}

#[test]
fn transitions_that_must_not_be_are_noticed() {
    check("forbidden");
}

#[test]
fn every_group_is_played_above() {
    let played = [
        "roots",
        "shared",
        "private",
        "zaps",
        "concurrency",
        "ioctls",
        "map-gpa",
        "teardown",
        "forbidden",
        RACES,
    ];
    let groups: BTreeSet<&str> = list().iter().map(|scenario| scenario.group).collect();
    assert_eq!(groups, BTreeSet::from(played));
}
