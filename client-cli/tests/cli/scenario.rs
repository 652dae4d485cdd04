//! `mmuctl scenario`: what can be run, and what comes of it.

use serde_json::json;

use crate::common::run;

#[test]
fn the_list_has_rows_and_races_with_title_and_group() {
    let ran = run(["--output", "json", "scenario", "list"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let list = ran.json()["scenarios"].as_array().unwrap().clone();
    assert!(list.len() > 155, "{}", list.len());
    for (id, group) in [
        ("P01", "private"),
        ("C13", "concurrency"),
        ("M03", "map-gpa"),
        ("X01", "forbidden"),
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
    assert_eq!(ran.json()["scenarios"], expected);
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
fn every_id_of_the_list_runs_in_both_modes() {
    let ran = run(["--output", "json", "scenario", "list"]);
    let list = ran.json()["scenarios"].as_array().unwrap().clone();
    let ids: Vec<String> = list
        .iter()
        .map(|scenario| scenario["id"].as_str().unwrap().to_owned())
        .collect();
    for mode in ["kernel", "batched"] {
        let options = ["--output", "json", "scenario", "run", "--mode", mode];
        let args = options.into_iter().chain(ids.iter().map(String::as_str));
        let ran = run(args);
        assert_eq!(ran.code, Some(0), "{mode}: {ran:?}");
        let report = ran.json();
        let scenarios = report["scenarios"].as_array().unwrap();
        assert_eq!(scenarios.len(), ids.len());
        for (scenario, id) in scenarios.iter().zip(&ids) {
            assert_eq!(
                (&scenario["id"], &scenario["result"]),
                (&id.as_str().into(), &"passed".into()),
                "{mode}: {scenario}"
            );
        }
    }
}

#[test]
fn two_sides_show_the_calls_of_both() {
    let ran = run(["--output", "json", "scenario", "run", "C06", "C07", "X10"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let removal = ["BLK", "TRK", "RMV", "WBP"];
    let both = [&["SA3", "SA2", "SA1", "AUG"][..], &removal].concat();
    let scenarios = &ran.json()["scenarios"];
    assert_eq!(scenarios[0]["calls"], json!(both));
    assert_eq!(scenarios[1]["calls"], json!(removal));
    assert_eq!(scenarios[2]["calls"], json!([]));
}

#[test]
fn an_unknown_name_runs_nothing() {
    let ran = run(["scenario", "run", "P01", "P99"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{ran:?}");
    assert!(ran.stderr.contains("P99"), "{}", ran.stderr);
}
