//! `mmuctl chaos` with fixed seeds, and `mmuctl inject`.

use serde_json::Value;

use crate::common::{Services, run};

/// Seeds that are played, from 1.
const SEEDS: u64 = 5;

/// Plays a seed; everything must be as it has to be.
fn play(seed: u64, operations: u64) -> Value {
    let seed_text = seed.to_string();
    let operations = operations.to_string();
    let ran = run([
        "--output",
        "json",
        "chaos",
        "run",
        "--seed",
        &seed_text,
        "--operations",
        &operations,
    ]);
    assert_eq!(ran.code, Some(0), "seed {seed}: {ran:?}");
    let json = ran.json();
    assert_eq!(json["seed"], seed);
    for nothing in ["leaked_pages", "hung", "vms_bugged"] {
        assert_eq!(json[nothing], 0, "seed {seed} {nothing}: {json}");
    }
    assert_eq!(json["audit"]["mismatches"], 0, "seed {seed}: {json}");
    json
}

#[test]
fn fixed_seeds_end_with_nothing_lost_and_nothing_wrong() {
    let (mut kills, mut cuts, mut entries) = (0, 0, 0);
    // Ten rounds each: two strikes in every phase. Some two minutes together.
    for seed in 1..=SEEDS {
        let json = play(seed, 240);
        let count = |key: &str| json[key].as_u64().unwrap();
        assert!(count("operations") >= 240, "{json}");
        assert_eq!(count("kills"), count("recoveries"), "{json}");
        let struck = count("kills") + count("cuts") + count("missed");
        assert_eq!(struck, 10, "one strike a round: {json}");
        assert!(count("faults_injected") >= count("kills"), "{json}");
        kills += count("kills");
        cuts += count("cuts");
        entries += json["audit"]["entries"].as_u64().unwrap();
    }
    assert!(kills >= 5 && cuts >= 2, "{kills} kills, {cuts} cuts");
    assert!(entries > 10_000, "{entries} entries compared");
}

#[test]
fn chaos_does_not_touch_services_of_others() {
    let ran = run(["--mmu", "unix:///nobody", "chaos", "run", "--seed", "1"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("leave the URLs out"), "{ran:?}");
}

#[test]
fn rules_are_set_listed_met_and_cleared() {
    let services = Services::start_with_module(&[], &["--fault-injection"]);
    let set = services.ok("inject set --leaf phymem_page_rdmd --nth 2 --cut");
    let id = set["rule_id"].as_u64().unwrap();
    services.ok("seamcall phymem_page_rdmd rcx=0x100000000");
    let cut = services.run("seamcall phymem_page_rdmd rcx=0x100000000");
    assert_eq!(cut.code, Some(1), "{cut:?}");
    assert!(cut.stderr.contains("INJECTED_FAULT"), "{cut:?}");
    services.ok("seamcall phymem_page_rdmd rcx=0x100000000");
    let list = services.ok("inject list");
    let rule = &list["rules"][0];
    assert_eq!((&rule["matched"], &rule["fired"]), (&3.into(), &1.into()));
    assert_eq!(rule["leaf"], "TDH.PHYMEM.PAGE.RDMD");
    assert_eq!(list["totals"]["cuts"], 1);
    assert_eq!(services.ok(&format!("inject clear {id}"))["cleared"], 1);

    let never = services.run("inject set --leaf mem_track --status TDX_TD_FATAL --nth 1");
    assert_eq!(never.code, Some(1), "{never:?}");
    assert!(never.stderr.contains("TD_EPOCH"), "{never:?}");
    let both = services.run("inject set --nth 1 --cut --lose-reply");
    assert_eq!(both.code, Some(2), "{both:?}");
}

#[test]
fn a_module_without_fault_injection_has_no_rules() {
    let services = Services::start();
    let refused = services.run("inject list");
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("UNIMPLEMENTED"), "{refused:?}");
}
