//! Runs one recorded sequence on a fresh module.

mod guest;
pub(crate) mod later_release;
mod state;

use serde_json::Value;
use tdx_defs::{Gpa, Hpa, Leaf, Repeat, Seamcall, SeamcallResult, TdxLevel};
use tdx_module::hooks::{KeyProgramResult, LockObject};
use tdx_module::{LockMode, LpId, Module, PageSize, PlatformConfig};

/// The number behind a hex string or a JSON number.
pub(crate) fn number(value: &Value) -> u64 {
    match value.as_str() {
        Some(hex) => u64::from_str_radix(hex.trim_start_matches("0x"), 16).unwrap(),
        None => value.as_u64().unwrap_or(0),
    }
}

fn number32(value: &Value) -> u32 {
    number(value).try_into().unwrap()
}

/// Runs a sequence on the release that it was recorded from; answers the first difference.
pub(crate) fn replay(sequence: &Value) -> Result<(), String> {
    replay_on(sequence, PlatformConfig::conformance())
}

/// Runs a sequence on a platform; answers the first difference.
pub(crate) fn replay_on(sequence: &Value, platform: PlatformConfig) -> Result<(), String> {
    let steps = sequence["steps"].as_array().unwrap();
    let module = Module::new(platform).unwrap();
    for (at, step) in steps.iter().enumerate() {
        if let Err(why) = run_step(&module, step) {
            let name = [&step["leaf"], &step["guest"], &step["hook"]];
            let name = name.into_iter().find_map(Value::as_str).unwrap_or_default();
            return Err(format!("step {at} {name}: {why}"));
        }
    }
    state::compare(&module, &sequence["final"]).map_err(|why| format!("final state: {why}"))
}

fn run_step(module: &Module, step: &Value) -> Result<(), String> {
    if let Some(hook) = step["hook"].as_str() {
        return run_hook(module, hook, &step["in"]);
    }
    if let Some(event) = step["guest"].as_str() {
        return guest::run(module, event, step);
    }
    if step["leaf_number"] == 0 {
        return guest::enter(module, &call_of(module, step), step);
    }
    run_call(module, step)
}

fn run_call(module: &Module, step: &Value) -> Result<(), String> {
    let call = call_of(module, step);
    let lp = LpId(number32(&step["lp"]));
    let result = module.seamcall(lp, &call);
    let rax = number(&step["out"]["rax"]);
    let completed = if rax == 0 {
        call.count()
    } else {
        result.completed
    };
    compare_registers(step, &result)?;
    if result.completed != completed {
        return Err(format!(
            "{} of {completed} calls of the run succeeded",
            result.completed
        ));
    }
    Ok(())
}

fn compare_registers(step: &Value, result: &SeamcallResult) -> Result<(), String> {
    let meaningless = |register: &str| {
        let list = step["not_meaningful"].as_array();
        list.is_some_and(|list| list.iter().any(|name| name == register))
    };
    for (register, expected) in step["out"].as_object().unwrap() {
        let got = match register.as_str() {
            "rax" => result.rax,
            "rcx" => result.rcx,
            "rdx" => result.rdx,
            "r8" => result.r8,
            "r9" => result.r9,
            "r10" => result.r10,
            "r11" => result.r11,
            other => return Err(format!("unknown output {other}")),
        };
        let expected = number(expected);
        if got != expected && !meaningless(register) {
            let status = result.status();
            return Err(format!(
                "{register} is {got:#x}, recorded {expected:#x} ({status})"
            ));
        }
    }
    Ok(())
}

/// Builds the call. Memory that the leaf's operand names travels with the call, other memory is
/// written before.
fn call_of(module: &Module, step: &Value) -> Seamcall {
    let input = |register: &str| number(&step["in"][register]);
    let stride = |register: &str| number(&step["stride"][register]).cast_signed();
    let mut call = Seamcall {
        leaf: Leaf(number(&step["leaf_number"]).try_into().unwrap()),
        version: number(&step["version"]).try_into().unwrap(),
        rcx: input("rcx"),
        rdx: input("rdx"),
        r8: input("r8"),
        r9: input("r9"),
        r10: input("r10"),
        r11: input("r11"),
        ..Seamcall::default()
    };
    for write in step["data"].as_array().into_iter().flatten() {
        let hpa = number(&write["hpa"]);
        let operand = match call.leaf {
            Leaf::MNG_INIT => Some(call.rdx),
            Leaf::MEM_PAGE_ADD => Some(call.r9),
            _ => None,
        };
        let bytes = bytes_of(write);
        if operand == Some(hpa) {
            call.data = bytes.into();
        } else {
            module.write_host_memory(Hpa::new(hpa), &bytes);
        }
    }
    if !step["repeat"].is_null() {
        call.repeat = Some(Repeat {
            count: number32(&step["repeat"]),
            rcx_stride: stride("rcx"),
            r8_stride: stride("r8"),
            r9_stride: stride("r9"),
        });
    }
    call
}

fn bytes_of(write: &Value) -> Vec<u8> {
    let length = usize::try_from(number(&write["length"])).unwrap();
    let mut bytes = Vec::new();
    if let Some(hex) = write["bytes"].as_str() {
        let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        bytes.extend((0..hex.len()).step_by(2).map(digits));
    } else if !write["pattern_seed"].is_null() {
        let mut word = number(&write["pattern_seed"]);
        while bytes.len() < length {
            bytes.extend(word.to_le_bytes());
            word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
        }
    }
    bytes.resize(length, 0);
    bytes
}

fn run_hook(module: &Module, hook: &str, input: &Value) -> Result<(), String> {
    let flag = |name: &str| input[name].as_bool().unwrap();
    match hook {
        "ENTROPY" => module.set_entropy(flag("available")),
        "TSC_ADJUST" => module.set_tsc_adjust(number(&input["value"])),
        "HOST_INTERRUPT_PENDING" => {
            module.set_interrupt_pending(flag("pending"), number32(&input["after_checks"]));
        }
        "KEY_PROGRAM_RESULT" => module.set_key_program_result(match input["result"].as_str() {
            Some("DEVICE_BUSY") => KeyProgramResult::DeviceBusy,
            Some("ENTROPY_ERROR") => KeyProgramResult::EntropyError,
            _ => KeyProgramResult::Ok,
        }),
        "HOLD_LOCK" | "RELEASE_LOCK" => return run_lock_hook(module, hook, input),
        other => return Err(format!("unknown hook {other}")),
    }
    Ok(())
}

fn run_lock_hook(module: &Module, hook: &str, input: &Value) -> Result<(), String> {
    let tdr = Hpa::new(number(&input["tdr"]));
    let mode = input["mode"].as_str().unwrap();
    let object = match input["object"].as_str().unwrap() {
        "PAMT" => LockObject::Pamt {
            hpa: Hpa::new(number(&input["hpa"])),
            size: page_size(input["size"].as_str().unwrap()),
        },
        "SEPT_TREE" => LockObject::SeptTree { tdr },
        "OP_STATE" => LockObject::OpState { tdr },
        "TD_EPOCH" => LockObject::TdEpoch { tdr },
        "KOT" => LockObject::Kot,
        "SEPT_ENTRY" => LockObject::SeptEntry {
            tdr,
            gpa: Gpa::new(number(&input["gpa"])),
            level: TdxLevel::new(number(&input["level"]).try_into().unwrap()).unwrap(),
        },
        other => return Err(format!("unknown lock {other}")),
    };
    let shared = if mode == "shared" {
        LockMode::Shared
    } else {
        LockMode::Exclusive
    };
    let done = match (hook, mode) {
        ("HOLD_LOCK", "guest") => module.hold_lock_as_guest(object, shared),
        ("HOLD_LOCK", _) => module.hold_lock(object, shared),
        _ => module.release_lock(object, shared),
    };
    if done {
        Ok(())
    } else {
        Err(format!("{hook} of {object:?} is impossible"))
    }
}

/// The size that a recording names.
pub(crate) fn page_size(name: &str) -> PageSize {
    match name {
        "4K" => PageSize::Small,
        "2M" => PageSize::Large,
        "1G" => PageSize::Giant,
        other => panic!("unknown page size {other}"),
    }
}
