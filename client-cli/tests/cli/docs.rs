//! What docs/security.md and docs/reliability.md name as proof is there.

use std::fs;
use std::path::{Path, PathBuf};

const SECURITY: &str = include_str!("../../../docs/security.md");
const RELIABILITY: &str = include_str!("../../../docs/reliability.md");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust source of the project.
fn sources(folder: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            sources(&path, into);
        } else if name.ends_with(".rs") {
            into.push(fs::read_to_string(&path).unwrap());
        }
    }
}

/// Whether a source has a test of that name: a function right behind a `#[test]` of some kind.
fn has_test(source: &str, name: &str) -> bool {
    let function = format!("fn {name}(");
    source.match_indices(&function).any(|(at, _)| {
        let line = source[..at].rfind('\n').unwrap_or(0);
        let before = source[..line].lines().rev().map(str::trim);
        before
            .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
            .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
    })
}

/// What stands between backquotes, code blocks left out.
fn quoted(document: &str) -> Vec<&str> {
    let text = document.split("```").step_by(2);
    text.flat_map(|text| text.split('`').skip(1).step_by(2))
        .collect()
}

fn is_test_name(word: &str) -> bool {
    let is_identifier = word
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    // Metrics, reasons and keys of answers have fewer words.
    is_identifier && word.matches('_').count() >= 3
}

fn is_path(word: &str) -> bool {
    let (first, rest) = word.split_once('/').unwrap_or_default();
    let known = [
        "client-cli",
        "deploy",
        "docs",
        "fuzz",
        "mmu-service",
        "proto",
        "tdx-module-svc",
    ];
    known.contains(&first) && !rest.contains(' ')
}

#[test]
fn every_test_and_file_that_is_named_is_there() {
    let mut all = Vec::new();
    sources(&root(), &mut all);
    for (document, text, least) in [
        ("docs/security.md", SECURITY, 40),
        ("docs/reliability.md", RELIABILITY, 8),
    ] {
        let mut named = 0;
        for word in quoted(text) {
            if is_test_name(word) && !word.starts_with("mmu_") && !word.starts_with("tdx_module_") {
                let there = all.iter().any(|source| has_test(source, word));
                assert!(there, "{document}: no test {word}");
                named += 1;
            } else if is_path(word) {
                assert!(root().join(word).exists(), "{document}: no file {word}");
                named += 1;
            }
        }
        assert!(named >= least, "{document} names {named} tests and files");
    }
}

/// Each row of the table of threats names what shows its answer.
#[test]
fn every_threat_has_a_test() {
    let (_, table) = SECURITY.split_once("## Threats and answers").unwrap();
    let rows: Vec<&str> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| threat"))
        .collect();
    assert!(rows.len() > 20);
    for row in rows {
        let cells: Vec<&str> = row.split(" | ").collect();
        let shown = cells[2].trim_end_matches(" |");
        let names = quoted(shown);
        let known = names.iter().any(|word| is_test_name(word) || is_path(word));
        assert!(known || shown.starts_with("the same"), "{row}");
    }
}
