//! Compares the state of a module with the recorded state at the end of a sequence.

use std::collections::BTreeMap;

use serde_json::Value;
use tdx_defs::{Hpa, PageType};
use tdx_module::{Lifecycle, Module, PageSize};

use super::{number, page_size};

/// The first difference, if there is one.
pub(crate) fn compare(module: &Module, expected: &Value) -> Result<(), String> {
    compare_tds(module, expected)?;
    compare_sept(module, expected)?;
    compare_pamt(module, expected)
}

fn differ<T: PartialEq + std::fmt::Debug>(what: &str, got: &T, expected: &T) -> Result<(), String> {
    if got == expected {
        Ok(())
    } else {
        Err(format!("{what}: {got:?}, recorded {expected:?}"))
    }
}

/// A recording describes the TDs of its set-up; others show in the PAMT alone.
fn compare_tds(module: &Module, expected: &Value) -> Result<(), String> {
    let tds = module.inspect_tds();
    let recorded = expected["tds"].as_array().unwrap();
    let mut mrtds = Vec::new();
    for record in recorded {
        let tdr = Hpa::new(number(&record["tdr"]));
        let Some(td) = tds.iter().find(|td| td.tdr == tdr) else {
            return Err(format!("TD {tdr} is missing"));
        };
        let mrtd = td
            .mrtd
            .map(|mrtd| mrtd.iter().map(|b| format!("{b:02x}")).collect::<String>());
        mrtds.extend(mrtd.clone());
        for (field, value) in record.as_object().unwrap() {
            let what = format!("{field} of TD {tdr}");
            match field.as_str() {
                "tdr" => {}
                "lifecycle_state" => differ(&what, &td.lifecycle.name(), &text(value))?,
                "hkid" => differ(&what, &td.hkid.into(), &number(value))?,
                "num_tdcx" => differ(&what, &td.num_tdcx.into(), &number(value))?,
                "child_count" => differ(&what, &td.children, &number(value))?,
                "op_state" => differ(&what, &td.op_state.name(), &text(value))?,
                "td_epoch" => differ(&what, &td.td_epoch, &number(value))?,
                "epoch_refcount" => {
                    let counts: Vec<_> = value.as_array().unwrap().iter().map(number).collect();
                    differ(&what, &td.epoch_refcount.map(u64::from).to_vec(), &counts)?;
                }
                "num_vcpus" => differ(&what, &td.num_vcpus.into(), &number(value))?,
                "num_assoc_vcpus" => differ(&what, &td.num_assoc_vcpus.into(), &number(value))?,
                "mrtd" => differ(
                    &what,
                    &mrtd.clone().unwrap_or_default(),
                    &text(value).into(),
                )?,
                other => return Err(format!("unknown TD field {other}")),
            }
        }
    }
    match expected["mrtd"].as_str() {
        Some(mrtd) if !mrtds.is_empty() && !mrtds.iter().any(|known| known == mrtd) => {
            Err(format!("no TD has MRTD {mrtd}"))
        }
        _ => Ok(()),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// One line of a table as text, so that a difference can be read.
type Lines = BTreeMap<(u64, u64, u64), String>;

fn compare_lines(what: &str, mut got: Lines, expected: Lines) -> Result<(), String> {
    for (key, line) in expected {
        match got.remove(&key) {
            Some(same) if same == line => {}
            other => return Err(format!("{what} {other:?}, recorded {line}")),
        }
    }
    match got.pop_first() {
        Some((_, line)) => Err(format!("{what} {line} is not recorded")),
        None => Ok(()),
    }
}

fn compare_sept(module: &Module, expected: &Value) -> Result<(), String> {
    let mut recorded = Lines::new();
    for record in expected["sept"].as_array().unwrap() {
        let field = |name: &str| number(&record[name]);
        let (tdr, level) = (field("tdr"), field("level"));
        let span = 4096u64 << (9 * level);
        for repeat in 0..field("count").max(1) {
            let step = repeat * span;
            let (gpa, rcx) = (field("gpa") + step, field("raw_rcx") + step);
            let (page, state) = (field("hpa") + step, text(&record["state"]));
            let rdx = field("raw_rdx");
            let line = format!("{gpa:#x}@{level} {state} {page:#x} {rcx:#x} {rdx:#x}");
            recorded.insert((tdr, level, gpa), line);
        }
    }
    let mut got = Lines::new();
    let usable = module.inspect_tds();
    for td in usable
        .iter()
        .filter(|td| td.lifecycle == Lifecycle::KeysConfigured)
    {
        for entry in module.inspect_sept(td.tdr) {
            let (gpa, level, page) = (entry.gpa.get(), entry.level, entry.page.get());
            let (state, rcx, rdx) = (entry.state.name(), entry.rcx, entry.rdx);
            let line = format!("{gpa:#x}@{level} {state} {page:#x} {rcx:#x} {rdx:#x}");
            got.insert((td.tdr.get(), level.into(), gpa), line);
        }
    }
    compare_lines("Secure EPT entry", got, recorded)
}

fn compare_pamt(module: &Module, expected: &Value) -> Result<(), String> {
    let line = |hpa: u64, kind: &str, owner: u64, size: PageSize, bepoch: Option<u64>| {
        (
            (hpa, size.number(), 0),
            format!("{hpa:#x} {kind} of {owner:#x} size {size:?} BEPOCH {bepoch:?}"),
        )
    };
    let mut recorded = Lines::new();
    for record in expected["pamt"].as_array().unwrap() {
        let size = page_size(text(&record["size"]));
        for repeat in 0..number(&record["count"]).max(1) {
            let hpa = number(&record["hpa"]) + repeat * size.bytes();
            let owner = number(&record["owner"]);
            let bepoch = (!record["bepoch"].is_null()).then(|| number(&record["bepoch"]));
            let (key, text) = line(hpa, text(&record["type"]), owner, size, bepoch);
            recorded.insert(key, text);
        }
    }
    let mut got = Lines::new();
    module.inspect_pamt(|page| {
        let kind = page.page_type.to_string();
        let has_epoch = [PageType::REG, PageType::EPT].contains(&page.page_type);
        let bepoch = has_epoch.then_some(page.bepoch);
        let kind = kind.trim_start_matches("PT_");
        let (key, text) = line(page.hpa.get(), kind, page.owner.get(), page.size, bepoch);
        got.insert(key, text);
    });
    compare_lines("page", got, recorded)
}
