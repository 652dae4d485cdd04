//! Plays the guest: entries, TDCALLs and EPT violations of a recorded sequence.

use serde_json::Value;
use tdx_defs::{Gpa, Gpr, Gprs, GuestLeaf, Seamcall};
use tdx_module::{Entry, GuestOp, GuestStep, LpId, Module};

use super::{compare_registers, number, number32};

/// Enters a vCPU.
pub(super) fn enter(module: &Module, call: &Seamcall, step: &Value) -> Result<(), String> {
    let lp = LpId(number32(&step["lp"]));
    match (
        module.enter_vcpu(lp, call),
        step["out"]["entered"].as_bool(),
    ) {
        (Entry::Entered { .. }, Some(true)) => Ok(()),
        (Entry::Entered { .. }, _) => Err("entered, recorded as refused".to_owned()),
        (Entry::Refused(result), Some(true)) => Err(format!("refused: {}", result.status())),
        (Entry::Refused(result), _) => compare_registers(step, &result),
    }
}

/// One event of the guest.
pub(super) fn run(module: &Module, event: &str, step: &Value) -> Result<(), String> {
    let input = &step["in"];
    let op = match (event, GuestLeaf::by_name(event)) {
        ("EPT_VIOLATION", _) => GuestOp::EptViolation {
            gpa: Gpa::new(number(&input["gpa"])),
            qualification: number(&input["qualification"]),
            same_rip: input["same_rip"].as_bool().unwrap_or(false),
        },
        (_, Some(leaf)) => GuestOp::tdcall(leaf, registers(input)),
        (other, None) => return Err(format!("unknown guest event {other}")),
    };
    let lp = LpId(number32(&step["lp"]));
    compare(&module.guest(lp, &op), &step["out"])
}

fn registers(input: &Value) -> Gprs {
    let mut registers = Gprs::default();
    for register in Gpr::ALL {
        registers[register] = number(&input[register.name()]);
    }
    registers
}

fn compare(got: &GuestStep, recorded: &Value) -> Result<(), String> {
    let (flag, registers, injected) = match got {
        GuestStep::Resumed(resumed) => ("resumed", resumed.regs, resumed.injected),
        GuestStep::Exited(exit) => ("td_exit", Some(exit.regs), None),
        other => return Err(format!("{other:?}")),
    };
    for (field, value) in recorded.as_object().unwrap() {
        let same = match field.as_str() {
            "resumed" | "td_exit" => field == flag,
            "injected_vector" => injected.map(|vector| u64::from(vector.0)) == value.as_u64(),
            name => {
                let register = Gpr::ALL
                    .into_iter()
                    .find(|register| register.name() == name);
                let register = register.ok_or_else(|| format!("unknown output {name}"))?;
                registers.is_some_and(|registers| registers[register] == number(value))
            }
        };
        if !same {
            return Err(format!("{got:?}, recorded {recorded}"));
        }
    }
    let expected = recorded["injected_vector"].as_u64();
    match injected {
        Some(vector) if expected.is_none() => Err(format!("vector {} was injected", vector.0)),
        _ => Ok(()),
    }
}
