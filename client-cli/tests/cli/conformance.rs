//! `mmuctl conformance`: recordings of Intel's module against ours, over gRPC.

use std::path::{Path, PathBuf};

use crate::common::{finish, mmuctl, run};

/// The recordings lie beside the module core, whose own tests replay them in process.
fn recording(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tdx-module-svc/tdx-module/tests/data")
        .join(name)
}

#[test]
fn every_recorded_sequence_is_answered_over_the_wire_as_recorded() {
    let files = ["directed.jsonl", "scenarios.jsonl", "random.jsonl.zst"].map(recording);
    let ran = finish(
        mmuctl()
            .args(["--local", "--output", "json", "conformance"])
            .args(files),
    );
    let report = ran.json();
    assert_eq!(ran.code, Some(0), "{report}");
    assert_eq!(
        (&report["sequences"], &report["passed"]),
        (&788.into(), &788.into())
    );
    assert_eq!(report["failed"], 0);
    assert!(report["steps"].as_u64().unwrap() > 10_000, "{report}");
}

#[test]
fn a_difference_is_named_by_step_and_register() {
    let text = std::fs::read_to_string(recording("directed.jsonl")).unwrap();
    let first = text.lines().next().unwrap();
    let spoiled = first.replacen(r#""rax":"0x0""#, r#""rax":"0x7""#, 1);
    assert_ne!(first, spoiled);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("spoiled.jsonl");
    std::fs::write(&file, format!("{spoiled}\n\n{first}\n")).unwrap();
    let ran = finish(
        mmuctl()
            .args(["--output", "json", "conformance"])
            .arg(&file),
    );
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let report = ran.json();
    assert_eq!(
        (&report["passed"], &report["failed"]),
        (&1.into(), &1.into())
    );
    let difference = &report["first_failures"][0];
    assert_eq!(
        (
            &difference["field"],
            &difference["expected"],
            &difference["got"]
        ),
        (&"rax".into(), &"0x7".into(), &"0x0".into())
    );
    assert!(ran.stderr.contains("1 of 2 sequences"), "{ran:?}");
}

#[test]
fn what_is_no_recording_is_refused_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("broken.jsonl");
    std::fs::write(&file, "\n{\"id\":1}\n").unwrap();
    let ran = finish(mmuctl().arg("conformance").arg(&file));
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("line 2"), "{ran:?}");
    let ran = run(["conformance"]);
    assert_eq!(ran.code, Some(2));
}
