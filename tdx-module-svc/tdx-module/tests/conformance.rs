//! Replays call sequences that were recorded from Intel's module code (tests/data) and compares
//! every output register that they list, and the state at the end.
//!
//! Nothing is skipped. The numbers are asserted, so that no sequence vanishes unnoticed.

mod replay;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};

use replay::replay;
use serde_json::Value;

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

#[test]
fn every_scenario_answers_as_recorded() {
    let recorded = sequences(include_bytes!("data/scenarios.jsonl").as_slice());
    let by_id: BTreeMap<_, _> = recorded
        .iter()
        .map(|sequence| (sequence["id"].as_str().unwrap(), sequence))
        .collect();
    let mut without_recording = Vec::new();
    let mut selected = Vec::new();
    for line in include_str!("data/scenarios.csv").lines().skip(1) {
        let id = line.split(',').next().unwrap();
        match by_id.get(id) {
            Some(sequence) => selected.push((*sequence).clone()),
            None => without_recording.push(id),
        }
    }
    // Their precondition cannot be reached by any sequence of calls.
    assert_eq!(without_recording, ["SA-21", "TD-23"]);
    assert_eq!(selected.len(), 208);
    assert_eq!(check("scenarios", &selected), 208);
}
