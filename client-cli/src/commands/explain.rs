//! What a completion status says, for `seamcall` and `explain`.

use serde_json::{Map, Value, json};
use tdx_defs::{CompletionStatus, Details, Leaf, Recoverability};

use crate::args::ExplainArgs;
use crate::output::{Answer, hex, merge, pairs};

/// `mmuctl explain`: needs no service.
pub(crate) fn run(args: &ExplainArgs) -> Answer {
    let status = args.status.0;
    let mut json = json!({
        "rax": hex(status.0),
        "status": symbol(status),
        "leaf": args.leaf.map(|leaf| leaf.to_string()),
    });
    merge(&mut json, members(status, args.leaf));
    let mut lines = vec![("status", status.to_string())];
    lines.extend(rows(status, args.leaf));
    Answer::new(json, pairs(lines))
}

/// The name of a status, or its number when it has none.
pub(super) fn symbol(status: CompletionStatus) -> String {
    status.name().unwrap_or_else(|| hex(status.0))
}

/// Members for `--output json`, beside `rax` and `status`.
pub(super) fn members(status: CompletionStatus, leaf: Option<Leaf>) -> Map<String, Value> {
    let class = status.class();
    let operand = status.named_operand();
    let reaction = status.host_reaction(leaf);
    let members = json!({
        "class": class.name(),
        "class_id": class.0,
        "details": status.details(),
        "details_are": details(status),
        "operand": operand.and_then(|operand| operand.name()),
        "operand_id": operand.map(|operand| operand.0),
        "recoverable": recoverable(status.recoverability()),
        "error": status.is_error(),
        "non_recoverable": status.is_non_recoverable(),
        "fatal": status.is_fatal(),
        "host_recoverability_hint": status.has_host_recoverability_hint(),
        "host_reaction": reaction.word(),
        "host_reaction_text": reaction.describe(),
    });
    match members {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

/// The same as rows of a table.
pub(super) fn rows(
    status: CompletionStatus,
    leaf: Option<Leaf>,
) -> impl Iterator<Item = (&'static str, String)> {
    let class = status.class();
    let name = class.name().unwrap_or("no class of the ABI");
    let mut bits: Vec<&str> = [
        (status.is_error(), "ERROR"),
        (status.is_non_recoverable(), "NON_RECOVERABLE"),
        (status.is_fatal(), "FATAL"),
        (
            status.has_host_recoverability_hint(),
            "HOST_RECOVERABILITY_HINT",
        ),
        (status.reserved() != 0, "reserved bits 59:48"),
    ]
    .into_iter()
    .filter_map(|(is_set, name)| is_set.then_some(name))
    .collect();
    if bits.is_empty() {
        bits.push("none");
    }
    [
        ("class", format!("{name} (0x{:02x})", class.0)),
        ("details", details(status)),
        ("bits", bits.join(", ")),
        (
            "recoverable",
            match status.recoverability() {
                Recoverability::NotError => "it is not an error",
                Recoverability::Yes => "yes, a repeat can succeed",
                Recoverability::No => "no, a repeat in the same state cannot succeed",
                Recoverability::Fatal => "no, and the TD is or becomes unusable",
            }
            .to_owned(),
        ),
        ("a host", status.host_reaction(leaf).describe().to_owned()),
    ]
    .into_iter()
}

fn recoverable(recoverability: Recoverability) -> &'static str {
    match recoverability {
        Recoverability::NotError => "not_error",
        Recoverability::Yes => "yes",
        Recoverability::No => "no",
        Recoverability::Fatal => "fatal",
    }
}

fn details(status: CompletionStatus) -> String {
    match status.details_kind() {
        Details::None => "none".to_owned(),
        Details::Operand(operand) if operand.name().is_none() => {
            format!("operand {:#x}, which has no name", operand.0)
        }
        Details::Operand(operand) => format!("operand {operand} ({:#x})", operand.0),
        Details::ExitReason(0) => "none, or exit reason 0 of TDH.VP.ENTER".to_owned(),
        Details::ExitReason(reason) => format!("exit reason {reason} of TDH.VP.ENTER"),
        Details::OpState(state) => format!("OP_STATE {state}"),
        Details::Level(level) => format!("TDX level {level}"),
        Details::ApicId(id) => format!("x2APIC id {id:#x}"),
        Details::Msr(number) => format!("MSR {number:#x}"),
        Details::Index(index) => format!("index {index}"),
        Details::VmAndLevel { vm, level } => format!("L2 VM {vm}, TDX level {level}"),
        Details::Other(details) => format!("{details:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use tdx_defs::OperandId;

    use super::*;

    #[test]
    fn a_busy_status_names_operand_class_and_what_a_host_does() {
        let status = CompletionStatus::OPERAND_BUSY.with(OperandId::SEPT_TREE);
        let members = members(status, Some(Leaf::MEM_RANGE_BLOCK));
        for (key, want) in [
            ("class", json!("busy or entropy")),
            ("class_id", json!(2)),
            ("operand", json!("SEPT_TREE")),
            ("operand_id", json!(146)),
            ("recoverable", json!("yes")),
            ("error", json!(true)),
            ("non_recoverable", json!(false)),
            ("fatal", json!(false)),
            ("host_recoverability_hint", json!(false)),
            ("host_reaction", json!("kick-and-retry")),
        ] {
            assert_eq!(members[key], want, "{key}");
        }
        let rows: Vec<_> = rows(status, None).collect();
        assert_eq!(rows[0].1, "busy or entropy (0x02)");
        assert_eq!(rows[1].1, "operand SEPT_TREE (0x92)");
        assert_eq!(rows[2].1, "ERROR");
    }

    #[test]
    fn a_number_without_a_name_is_explained_by_its_bits() {
        let status = CompletionStatus(0xF001_FF00_0000_0005);
        let members = members(status, None);
        assert_eq!(members["class"], Value::Null);
        assert_eq!(members["class_id"], 0xFF);
        assert_eq!(members["operand"], Value::Null);
        assert_eq!(members["recoverable"], "fatal");
        assert_eq!(members["host_reaction"], "tear-down");
        let bits = rows(status, None).nth(2).unwrap().1;
        assert_eq!(
            bits,
            "ERROR, NON_RECOVERABLE, FATAL, HOST_RECOVERABILITY_HINT, reserved bits 59:48"
        );
    }

    #[test]
    fn every_known_status_has_a_full_explanation() {
        for (status, name) in CompletionStatus::known() {
            let members = members(status, None);
            assert!(members["class"].is_string(), "{name}");
            assert_eq!(symbol(status), name);
            assert!(
                rows(status, None).all(|(_, text)| !text.is_empty()),
                "{name}"
            );
        }
    }
}
