//! Recordings of a real KVM against the model, over both services.

use std::io::Write as _;

use serde_json::{Value, json};

use crate::common::{Run, data, finish, mmuctl, run};

fn compare(files: &[&str]) -> Run {
    let paths: Vec<_> = files.iter().map(|file| data(file)).collect();
    finish(
        mmuctl()
            .arg("compare")
            .args(paths)
            .args(["--output", "json"]),
    )
}

/// A recording from standard input.
pub(crate) fn compare_text(text: &str) -> Run {
    let mut command = mmuctl();
    command
        .args(["compare", "-", "--output", "json"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) fn counts(report: &Value) -> [u64; 5] {
    ["steps", "same", "reordered", "different", "skipped"].map(|key| report[key].as_u64().unwrap())
}

fn recorded(file: &str) -> String {
    std::fs::read_to_string(data(file)).unwrap()
}

#[test]
fn every_step_of_every_recording_is_the_same() {
    for (file, steps) in [
        ("sample.trace", 33),
        ("notifier4k.trace", 26),
        ("memslots_noquirk.trace", 26),
        ("prefault.trace", 31),
    ] {
        let run = compare(&[file]);
        let report = run.json();
        assert_eq!(counts(&report), [steps, steps, 0, 0, 0], "{file}: {report}");
        assert_eq!(run.code, Some(0), "{file}: {}", run.stderr);
        assert_eq!(report["first_differences"], json!([]), "{file}");
    }
    let all = compare(&["sample.trace", "prefault.trace"]);
    assert_eq!(counts(&all.json()), [64, 64, 0, 0, 0]);
}

/// Every kind of change to a recording is found, and nothing else.
#[test]
fn a_recording_that_says_something_else_is_different() {
    let text = recorded("sample.trace");
    for (case, from, to, step, what) in [
        (
            "a leaf without write access",
            "gfn 2 level 1 old_spte 8000000000000000 new_spte 147663e67",
            "gfn 2 level 1 old_spte 8000000000000000 new_spte 147663e65",
            4,
            "event 11",
        ),
        (
            "a statistic",
            "STEP 7 STAT pages_4k=5",
            "STEP 7 STAT pages_4k=6",
            7,
            "pages_4k",
        ),
        (
            "an errno",
            "STEP 3 END rc=0 errno=0",
            "STEP 3 END rc=-1 errno=22",
            3,
            "errno",
        ),
        (
            "a dirty page",
            "count=3 pages=0,1,30",
            "count=3 pages=0,1,31",
            0,
            "dirty page",
        ),
    ] {
        assert_eq!(text.matches(from).count(), 1, "{case}");
        let run = compare_text(&text.replace(from, to));
        assert_eq!(run.code, Some(1), "{case}: {}", run.stderr);
        let report = run.json();
        let first = &report["first_differences"][0];
        assert_eq!(first["what"], what, "{case}: {report}");
        if step != 0 {
            assert_eq!(first["step"], step, "{case}: {report}");
        }
    }
    // Two events that changed places.
    let lines: Vec<&str> = text.lines().collect();
    let at = lines
        .iter()
        .position(|line| line.contains("kvm_mmu_set_spte: gfn 2 "))
        .unwrap();
    let mut swapped = lines.clone();
    swapped.swap(at, at - 1);
    let report = compare_text(&swapped.join("\n")).json();
    assert_eq!(counts(&report), [33, 32, 1, 0, 0], "{report}");
}

#[test]
fn what_is_not_known_is_skipped_with_a_reason() {
    let text = "STEP 1 BEGIN ACCESS vcpu=0\nSTEP 2 BEGIN CREATE_VM vcpus=1\nSTEP 3 BEGIN TELEPORT x=1\n\
        STEP 3 END rc=0 errno=0\nSTEP 4 BEGIN SET_USER_MEMORY_REGION slot=0 gpa=zz\nSTEP 5 BEGIN MADVISE \
        SOMEHOW hva=0x1000 len=0x1000\nSTEP 6 BEGIN\nSTEP 7 BEGIN ENABLE_CAP cap=1\nSTEP 8 BEGIN ACCESS\n\
        kvm_mmu_set_spte: gfn what\nSTEP 9 BEGIN WAIT\nCPU:1 [LOST 3 EVENTS]\nSTEP 10 BEGIN ACCESS\n\
        kvm_unmap_hva_range: mmu notifier unmap range: 0x1 -- 0x2\nSTEP 11 BEGIN \
        SET_USER_MEMORY_REGION slot=0 gpa=0x0 size=0x1000 hva=0x1000 flags=0x8\n";
    let run = compare_text(text);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report = run.json();
    assert_eq!(counts(&report), [11, 1, 0, 0, 10], "{report}");
    let reasons: Vec<&str> = report["first_skipped"]
        .as_array()
        .unwrap()
        .iter()
        .map(|skipped| skipped["reason"].as_str().unwrap())
        .collect();
    for (reason, says) in reasons.iter().zip([
        "no VM",
        "TELEPORT",
        "\"zz\" is no number",
        "SOMEHOW",
        "is no step",
        "capability 1",
        "kvm_mmu_set_spte",
        "lost 3 events",
        "refused: errno 22",
        "flags 0x8",
    ]) {
        assert!(reason.contains(says), "{reason}: {says}");
    }
}

#[test]
fn a_file_that_is_no_recording_is_refused() {
    for text in ["", "hello\n", "\0\0\0\n", "STEP\nSTEP 1\nSTEP 1 END\n"] {
        let run = compare_text(text);
        assert_eq!((run.code, &*run.stdout), (Some(1), ""), "{text:?}");
        assert!(
            run.stderr.contains("not a marked recording"),
            "{}",
            run.stderr
        );
    }
    let missing = run(["compare", "/nowhere/at.all"]);
    assert_eq!(missing.code, Some(1));
    assert!(
        missing.stderr.contains("/nowhere/at.all"),
        "{}",
        missing.stderr
    );
}
