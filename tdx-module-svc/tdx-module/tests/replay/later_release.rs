//! What a sequence that was recorded from release 1.5.05 looks like on release 1.5.34.
//!
//! Present entries show bit 10 as well. The answer of a scenario's own call, where it differs, comes
//! from the table of scenarios.

use serde_json::{Map, Value};

use super::number;

/// Public states of present entries: MAPPED and NL_MAPPED.
const PRESENT: [u64; 2] = [4, 0x84];
const USER_EXECUTE: u64 = 1 << 10;

/// Translates a sequence. `row` is the scenario's line: status and state change as the table of
/// scenarios has them, if they differ from the recording.
pub(crate) fn translate(sequence: &Value, row: Option<(&str, &str)>) -> Value {
    let mut sequence = sequence.clone();
    let own = number(&sequence["scenario_step"]);
    let steps = sequence["steps"].as_array_mut().unwrap();
    for (at, step) in (0..).zip(steps) {
        let Some(out) = step["out"].as_object_mut() else {
            continue;
        };
        show_user_execute(out, "rcx", "rdx");
        if let Some((status, change)) = row.filter(|_| at == own) {
            let status = status.split(' ').next().unwrap();
            out.insert("rax".to_owned(), status.into());
            for (name, register) in [("RCX=", "rcx"), ("RDX=", "rdx")] {
                if let Some((_, value)) = change.split_once(name) {
                    let value = value.split([' ', ';']).next().unwrap();
                    out.insert(register.to_owned(), value.into());
                }
            }
        }
    }
    for entry in sequence["final"]["sept"].as_array_mut().unwrap() {
        show_user_execute(entry.as_object_mut().unwrap(), "raw_rcx", "raw_rdx");
    }
    sequence
}

/// Adds the bit to a present entry that the two registers describe.
fn show_user_execute(registers: &mut Map<String, Value>, rcx: &str, rdx: &str) {
    let (Some(entry), Some(state)) = (registers.get(rcx), registers.get(rdx)) else {
        return;
    };
    let (entry, state) = (number(entry), number(state));
    if entry & 0b111 == 0b111 && PRESENT.contains(&(state >> 8 & 0xFF)) {
        let entry = format!("{:#x}", entry | USER_EXECUTE);
        registers.insert(rcx.to_owned(), entry.into());
    }
}
