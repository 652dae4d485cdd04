//! The tables of this crate against the published ones, row by row, so that neither drifts.

use std::collections::BTreeMap;

use tdx_defs::{CompletionStatus, OperandId, Recoverability};

/// Fields of the lines behind the header. No field of these files is quoted.
fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().skip(1).map(|line| line.split(',').collect())
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn every_status_code_has_its_name_class_and_recoverability() {
    let published = rows(include_str!("data/status-codes.csv"));
    let mut names = BTreeMap::new();
    for row in published {
        let [name, code, class, recoverable] = row[..] else {
            panic!("{row:?}");
        };
        let status = CompletionStatus(hex(code));
        assert_eq!(status.name().as_deref(), Some(name), "{code}");
        let class_name = status.class().name().unwrap();
        assert_eq!(
            format!("0x{:02X} {class_name}", status.class().0),
            class,
            "{name}"
        );
        let wanted = match recoverable {
            "not_error" => Recoverability::NotError,
            "yes" => Recoverability::Yes,
            "no" => Recoverability::No,
            "fatal" => Recoverability::Fatal,
            other => panic!("{name}: {other}"),
        };
        assert_eq!(status.recoverability(), wanted, "{name}");
        names.insert(status.0, name);
    }
    let known: BTreeMap<u64, &str> = CompletionStatus::known()
        .map(|(status, name)| (status.0, name))
        .collect();
    assert_eq!(known, names);
}

#[test]
fn every_operand_id_has_its_name() {
    let published: Vec<(u64, &str)> = rows(include_str!("data/operand-ids.csv"))
        .map(|row| {
            assert_eq!(row[1].parse::<u64>().unwrap(), hex(row[2]));
            (hex(row[2]), row[0])
        })
        .collect();
    let known = OperandId::NAMED.iter();
    let known: Vec<(u64, &str)> = known.map(|&(id, name)| (id.0.into(), name)).collect();
    assert_eq!(known, published);
}
