//! `mmuctl scenario`: what can be run, and what comes of it.

use serde_json::json;

use crate::common::run;

#[test]
fn the_list_has_rows_and_races_with_title_and_group() {
    let ran = run(["--output", "json", "scenario", "list"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let list = ran.json()["scenarios"].as_array().unwrap().clone();
    assert!(list.len() > 100, "{}", list.len());
    for (id, group) in [
        ("P01", "private"),
        ("Z10", "zaps"),
        ("T01", "teardown"),
        ("prefault-slot-delete", "races"),
        ("zero-step", "races"),
        ("busy-zap", "races"),
        ("premapped-zap", "races"),
    ] {
        let found = list.iter().find(|scenario| scenario["id"] == id);
        let scenario = found.unwrap_or_else(|| panic!("{id}"));
        assert_eq!(scenario["group"], group, "{id}");
        assert!(!scenario["title"].as_str().unwrap().is_empty(), "{id}");
    }
}

#[test]
fn a_row_shows_its_calls_in_the_mode_that_is_asked_for() {
    let ran = run(["--output", "json", "scenario", "run", "P01", "Z11"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let expected = json!([
        { "id": "P01", "result": "passed", "calls": ["SA3", "SA2", "SA1", "AUG"] },
        {
            "id": "Z11",
            "result": "passed",
            "calls": ["BLK", "TRK(busy)", "TRK", "RMV", "WBP"],
        },
    ]);
    let report = ran.json();
    assert_eq!(report["scenarios"], expected);
    // The first one's members are those of the object.
    for key in ["id", "result", "calls"] {
        assert_eq!(report[key], expected[0][key], "{key}");
    }
    for (mode, tracks) in [("kernel", 512), ("batched", 1)] {
        let ran = run(["--output", "json", "scenario", "run", "Z02", "--mode", mode]);
        let report = ran.json();
        let calls = report["scenarios"][0]["calls"].as_array().unwrap().clone();
        let found = calls.iter().filter(|call| **call == "TRK").count();
        assert_eq!((found, &report["mode"]), (tracks, &mode.into()), "{mode}");
    }
}

#[test]
fn a_race_shows_both_policies() {
    let ran = run(["--output", "json", "scenario", "run", "busy-zap"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let race = ran.json()["scenarios"][0].clone();
    let fixed = json!(["BLK(busy)", "BLK", "TRK", "RMV", "WBP"]);
    assert_eq!(
        (&race["result"], &race["calls"]),
        (&"passed".into(), &fixed)
    );
    assert_eq!(race["policies"][0]["name"], "fixed");
    assert_eq!(race["policies"][1]["name"], "unfixed");
    assert_eq!(race["policies"][1]["calls"], json!(["BLK(busy)"]));
    let ran = run(["scenario", "run", "zero-step"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("VEN(ept-violation)"), "{}", ran.stdout);
}

#[test]
fn an_unknown_name_runs_nothing() {
    let ran = run(["scenario", "run", "P01", "P99"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{ran:?}");
    assert!(ran.stderr.contains("P99"), "{}", ran.stderr);
}
