//! JSON conventions: addresses and registers are strings `"0x.."`, counts are numbers.

use serde_json::{Map, Value};

/// An address or a register: JSON numbers lose bits above 53.
pub fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// Adds members to an object.
pub fn merge(object: &mut Value, members: Map<String, Value>) {
    if let Value::Object(object) = object {
        object.extend(members);
    }
}
