//! docs/checks.md against the code.
#![cfg(not(feature = "shuttle"))]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tdp_mmu::Check;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Cells of the rows of a table, as far as they start with `first`.
fn rows(document: &str, first: impl Fn(&str) -> bool) -> Vec<Vec<&str>> {
    document
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|line| line.split(" | ").map(str::trim).collect::<Vec<_>>())
        .filter(|row| row.first().is_some_and(|cell| first(cell)))
        .collect()
}

fn is_number(cell: &str) -> bool {
    cell.strip_prefix('B')
        .is_some_and(|number| number.parse::<u32>().is_ok())
}

/// What stands between backquotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

fn sources(folder: PathBuf, into: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(path, into);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            into.push_str(&read(&path));
        }
    }
}

#[test]
fn every_check_has_a_row_and_every_row_is_in_the_code() {
    let document = read(&here().join("../../docs/checks.md"));
    let numbered = rows(&document, is_number);
    let numbers: Vec<String> = numbered.iter().map(|row| row[0].to_owned()).collect();
    let expected: Vec<String> = (1..=35).map(|number| format!("B{number}")).collect();
    assert_eq!(numbers, expected);

    let mut listed: BTreeSet<String> = numbered
        .iter()
        .filter(|row| !row[4].starts_with("by construction"))
        .map(|row| row[0].to_owned())
        .collect();
    let others = rows(&document, |cell| {
        quoted(cell).len() == 1 && cell.starts_with('`') && cell.ends_with('`')
    });
    listed.extend(others.iter().map(|row| quoted(row[0])[0].to_owned()));
    let known: BTreeSet<String> = Check::ALL
        .iter()
        .map(|check| format!("{check:?}"))
        .collect();
    assert_eq!(listed, known);
}

#[test]
fn functions_and_tests_of_the_rows_are_there() {
    let document = read(&here().join("../../docs/checks.md"));
    let mut tests = String::new();
    sources(here().join("src"), &mut tests);
    sources(here().join("tests"), &mut tests);
    let shared = read(&here().join("scenarios/tables/shared.txt"));
    for row in rows(&document, is_number) {
        let names = quoted(row[4]);
        let (file, functions) = names.split_first().expect("a file");
        let source = read(&here().join(file));
        let by_construction = row[4].starts_with("by construction");
        let functions = if by_construction {
            &functions[..1]
        } else {
            functions
        };
        for function in functions {
            assert!(
                source.contains(&format!("fn {function}")),
                "{}: {file} has no {function}",
                row[0]
            );
        }
        let mentions = source.contains(&format!("Check::{}", row[0]));
        assert_ne!(mentions, by_construction, "{}: {file}", row[0]);
        match (by_construction, quoted(row[5]).as_slice()) {
            (true, []) => {}
            (false, [test]) => assert!(
                tests.contains(&format!("fn {test}()")),
                "{}: no test {test}",
                row[0]
            ),
            (false, []) => {
                let id = row[5].strip_prefix("row ").expect("a row of the tables");
                let id = &id[..3];
                assert!(shared.contains(&format!("== {id} ")), "{}: {id}", row[0]);
                assert!(shared.contains(&format!("checks {}", row[0])));
            }
            (_, other) => panic!("{}: {other:?}", row[0]),
        }
    }
}
