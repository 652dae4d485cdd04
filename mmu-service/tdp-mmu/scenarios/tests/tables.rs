//! Every row of the tables and every race does what it says, in both propagation modes.

use tdp_mmu::Mode;
use tdp_mmu_scenarios::{RACES, list, run};

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
fn ids_are_names_of_one_scenario_each() {
    let mut ids: Vec<String> = list().into_iter().map(|scenario| scenario.id).collect();
    let all = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), all);
    assert!(run("P99", Mode::Kernel).is_none());
}
