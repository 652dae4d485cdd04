//! Replays call sequences that were recorded from Intel's module code (tests/data) and compares
//! every output register that they list, and the state at the end.
//!
//! Nothing is skipped. The numbers are asserted, so that no sequence vanishes unnoticed.

mod replay;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};

use replay::later_release::translate;
use replay::{replay, replay_on};
use serde_json::Value;
use tdx_module::{PlatformConfig, Release};

fn sequences(reader: impl Read) -> Vec<Value> {
    let lines = BufReader::new(reader).lines().map(|line| line.unwrap());
    lines
        .map(|line| serde_json::from_str(&line).unwrap())
        .collect()
}

/// Replays sequences; answers how many passed.
fn check(name: &str, sequences: &[Value]) -> usize {
    let mut failures = Vec::new();
    for sequence in sequences {
        if let Err(why) = replay(sequence) {
            failures.push(format!("{}: {why}", sequence["id"]));
        }
    }
    let shown = failures.len().min(20);
    assert!(
        failures.is_empty(),
        "{name}: {} failed\n{}",
        failures.len(),
        failures[..shown].join("\n")
    );
    sequences.len()
}

#[test]
fn directed_sequences_answer_as_recorded() {
    let recorded = sequences(include_bytes!("data/directed.jsonl").as_slice());
    assert_eq!(recorded.len(), 80);
    assert_eq!(check("directed", &recorded), 80);
}

#[test]
fn random_sequences_answer_as_recorded() {
    let file = include_bytes!("data/random.jsonl.zst").as_slice();
    let decoder = ruzstd::decoding::StreamingDecoder::new(file).unwrap();
    let recorded = sequences(decoder);
    assert_eq!(recorded.len(), 500);
    assert_eq!(check("random", &recorded), 500);
}

/// The lines of the table of scenarios: id, expected status, expected state change, and whether
/// they differ from the recording.
fn scenarios() -> Vec<(&'static str, [String; 2], bool)> {
    let table = include_str!("data/scenarios.csv");
    let rows = table.lines().skip(1).map(|line| {
        let cells = cells(line);
        let differs = cells[5] == "differs by release";
        let id = line.split(',').next().unwrap();
        (id, [cells[3].clone(), cells[4].clone()], differs)
    });
    rows.collect()
}

/// The cells of a line of comma-separated values, where some are quoted.
fn cells(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(String::new()),
            other => cells.last_mut().unwrap().push(other),
        }
    }
    cells
}

#[test]
fn every_scenario_answers_as_its_release_does() {
    let recorded = sequences(include_bytes!("data/scenarios.jsonl").as_slice());
    let by_id: BTreeMap<_, _> = recorded
        .iter()
        .map(|sequence| (sequence["id"].as_str().unwrap(), sequence))
        .collect();
    let later = PlatformConfig {
        release: Release::R1_5_34,
        ..PlatformConfig::conformance()
    };
    let mut without_recording = Vec::new();
    let (mut passed, mut differing) = (0, 0);
    for (id, [status, change], differs) in scenarios() {
        let Some(sequence) = by_id.get(id) else {
            without_recording.push(id);
            continue;
        };
        replay(sequence).unwrap_or_else(|why| panic!("{id}: {why}"));
        let row = differs.then_some((status.as_str(), change.as_str()));
        let translated = translate(sequence, row);
        replay_on(&translated, later.clone()).unwrap_or_else(|why| panic!("{id} later: {why}"));
        if differs {
            replay_on(sequence, later.clone()).expect_err(id);
            differing += 1;
        }
        passed += 1;
    }
    // No sequence of calls reaches their precondition: tests/scenarios.rs has them.
    assert_eq!(without_recording, ["SA-21", "TD-23"]);
    assert_eq!((passed, differing), (208, 21));
}
