use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("mmuctl").chain(line.split_whitespace()))
}

#[test]
fn the_definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_is_known_by_its_name() {
    for line in [
        "demo",
        "vm create",
        "vm create --gpaw 52 --mode kernel --max-vcpus 2 --attributes 0x10000000 --label x",
        "vm list",
        "vm show 1",
        "vm show --vm 1",
        "vm destroy 1",
        "vm finalize 1",
        "vm init-region --vm 1 --gpa 0 --size 4K --measure",
        "vcpu add --vm 1",
        "slot set --vm 1 --slot 0 --gpa 0 --size 1G",
        "slot set --vm 1 --slot 0 --gpa 0 --size 1G --guest-memfd=false --read-only",
        "slot set --vm 1 --guest-memfd --slot 0 --gpa 0 --size 1G",
        "slot delete --vm 1 --slot 0",
        "fault --vm 1 --gpa 0x1000",
        "fault --vm 1 --gpa 0x1000 --vcpu 1 --write --exec",
        "prefault --vm 1 --gpa 0 --size 2M",
        "convert --vm 1 --gpa 0 --size 2M --to shared",
        "punch-hole --vm 1 --slot 0 --offset 0 --size 2M",
        "punch-hole --vm 1 --gpa 0 --size 2M",
        "replay - --private none --mode kernel --order per-vcpu --hva-base 7f0000000000 --strict",
        "replay x.trace --gpaw 52 --private 0-1000,2000-3000",
        "walk --vm 1 --gpa 0",
        "tree --vm 1 --root mirror --min-level 2",
        "audit --vm 1",
        "stats",
        "scenario list",
        "scenario run P01 zero-step --mode batched",
        "stats --vm 1",
        "seamcall TDH.MEM.SEPT.RD rcx=0x1 rdx=0x2 --lp 1 --repeat 3 --stride rcx=-4K",
        "completions bash",
        "man",
        "--local --output json --timeout 5 vm list",
        "vm list --local --output json --timeout 500ms",
        "vm list --mmu unix:///run/mmu.sock --module http://localhost:1",
    ] {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn wrong_lines_are_usage_errors_that_name_the_argument() {
    for (line, want) in [
        ("", "Usage"),
        ("nonsense", "nonsense"),
        ("vm show", "ID"),
        ("vm show x", "not a number"),
        ("fault --vm 1", "--gpa"),
        ("fault --vm 1 --gpa 0x1g", "not a number"),
        ("convert --vm 1 --gpa 0 --size 2M --to sideways", "sideways"),
        ("punch-hole --vm 1 --size 2M", "--offset"),
        ("replay", "FILE"),
        ("replay x --private 1000", "START-END"),
        ("replay x --order sideways", "sideways"),
        ("seamcall NOPE", "neither a TDH leaf name"),
        ("seamcall 6 rax=1", "none of rcx"),
        ("seamcall 6 --stride rcx=4K", "--repeat"),
        ("vcpu add --vm 1 --count 0", "0"),
        ("tree --vm 1 --min-level 6", "6"),
        ("vm list --timeout 0", "outside the limits"),
        (
            "vm list --mmu localhost:1",
            "none of unix:///path, http://host:port and https://host:port",
        ),
        ("vm list --mmu https://h", "https://host:port"),
        ("vm list --output yaml", "yaml"),
    ] {
        let error = parse(line).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
        assert!(error.to_string().contains(want), "{line}: {error}");
    }
}

#[test]
fn the_flags_of_all_commands_are_documented_with_their_variables() {
    let document = include_str!("../../../docs/configuration.md");
    let (_, rest) = document.split_once("\n## mmuctl\n").unwrap();
    let rows = rest.split("\n## ").next().unwrap();
    let command = Cli::command();
    let flags = command.get_arguments().filter(|flag| !flag.is_hide_set());
    for flag in flags {
        let Some(name) = flag.get_long() else {
            continue;
        };
        if ["help", "version"].contains(&name) {
            continue;
        }
        let row = rows.lines().find(|row| {
            let cell = row.split('|').nth(1).unwrap_or_default();
            cell.contains(&format!("`--{name} ")) || cell.contains(&format!("`--{name}`"))
        });
        let row = row.unwrap_or_else(|| panic!("--{name} is not documented"));
        if let Some(variable) = flag.get_env() {
            let variable = variable.to_str().unwrap();
            assert!(row.contains(&format!("`{variable}`")), "--{name}: {row}");
        }
    }
}
