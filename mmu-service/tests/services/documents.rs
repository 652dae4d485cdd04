//! docs/configuration.md has every setting: of mmu-service, and of the compose files.

use std::collections::BTreeSet;
use std::path::Path;

use clap::CommandFactory as _;

const DOCUMENT: &str = include_str!("../../../docs/configuration.md");

/// The part of the document below a heading of the second level.
fn section(title: &str) -> &'static str {
    let (_, rest) = DOCUMENT
        .split_once(&format!("\n## {title}\n"))
        .unwrap_or_else(|| panic!("no section {title}"));
    rest.split("\n## ").next().unwrap()
}

#[test]
fn every_flag_and_variable_of_the_service_is_documented() {
    let rows = section("mmu-service");
    let command = mmu_service::Config::command();
    for argument in command.get_arguments() {
        let Some(flag) = argument.get_long() else {
            continue;
        };
        if argument.is_hide_set() || ["help", "version"].contains(&flag) {
            continue;
        }
        let flags = |line: &&str| {
            let cell = line.split('|').nth(1).unwrap_or_default();
            cell.contains(&format!("`--{flag} ")) || cell.contains(&format!("`--{flag}`"))
        };
        let row = rows.lines().find(flags);
        let row = row.unwrap_or_else(|| panic!("--{flag} is not documented"));
        if let Some(variable) = argument.get_env() {
            let variable = format!("`{}`", variable.to_str().unwrap());
            assert!(row.contains(&variable), "--{flag}: {variable} in {row}");
        }
    }
}

/// Names behind `${` in a text.
fn variables(text: &str) -> BTreeSet<String> {
    text.split("${")
        .skip(1)
        .map(|rest| {
            rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                .next()
                .unwrap()
                .to_owned()
        })
        .filter(|name| name != "VARIABLE")
        .collect()
}

#[test]
fn every_variable_of_the_compose_files_is_documented_and_none_else() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let mut used = BTreeSet::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yml") {
            used.append(&mut variables(&std::fs::read_to_string(path).unwrap()));
        }
    }
    let documented: BTreeSet<String> = section("The compose files")
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|row| row.split('`').next())
        .map(str::to_owned)
        .collect();
    assert!(used.contains("MMU_PORT"), "{used:?}");
    assert_eq!(used, documented);
}
