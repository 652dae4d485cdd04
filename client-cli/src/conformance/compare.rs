//! Outputs and the state at the end, against the recording.

use std::collections::BTreeMap;

use mirror_proto::module::get_state_response::Item;
use mirror_proto::module::guest_result::Result as Outcome;
use mirror_proto::module::{GuestResult, PageState, SeamcallResult, SeptState, TdState};
use serde_json::Value;
use tdx_defs::{Gpr, Gprs, PAGE_SIZE};

use super::sequence::{End, Number, PageLine, SeptLine, Step};
use crate::output::hex;

/// What differs: a register or a part of the state, as recorded and as answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mismatch {
    pub(super) field: String,
    pub(super) expected: String,
    pub(super) got: String,
}

impl Mismatch {
    pub(super) fn new(
        field: impl Into<String>,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self {
            field: field.into(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

type Compared = Result<(), Mismatch>;

fn same<T: PartialEq + ToString>(field: &str, expected: T, got: T) -> Compared {
    if expected == got {
        Ok(())
    } else {
        Err(Mismatch::new(field, expected, got))
    }
}

fn recorded_number(field: &str, value: &Value) -> Result<u64, Mismatch> {
    Number::try_from(value.clone())
        .map(|number| number.0)
        .map_err(|_| Mismatch::new(field, value, "not a number"))
}

/// The registers that a step lists, against those that came back.
fn registers(step: &Step, read: impl Fn(&str) -> Option<u64>) -> Compared {
    for (register, value) in &step.out {
        if step.not_meaningful.contains(register) {
            continue;
        }
        let expected = recorded_number(register, value)?;
        let Some(got) = read(register) else {
            return Err(Mismatch::new(register, hex(expected), "no such register"));
        };
        if got != expected {
            return Err(Mismatch::new(register, hex(expected), hex(got)));
        }
    }
    Ok(())
}

/// A host call, or an entry that was refused.
pub(super) fn host_call(step: &Step, result: &SeamcallResult) -> Compared {
    registers(step, |register| match register {
        "rax" => Some(result.rax),
        "rcx" => Some(result.rcx),
        "rdx" => Some(result.rdx),
        "r8" => Some(result.r8),
        "r9" => Some(result.r9),
        "r10" => Some(result.r10),
        "r11" => Some(result.r11),
        _ => None,
    })?;
    let succeeds = step
        .out
        .get("rax")
        .map(|rax| recorded_number("rax", rax))
        .transpose()?
        == Some(0);
    match step.repeat {
        Some(Number(count)) if succeeds => same("completed", count, result.completed.into()),
        _ => Ok(()),
    }
}

/// Whether the recording says that the vCPU was entered.
pub(super) fn is_entered(step: &Step) -> bool {
    step.out.get("entered") == Some(&Value::Bool(true))
}

/// A guest event.
pub(super) fn guest_event(step: &Step, result: &GuestResult) -> Compared {
    let (kind, regs, injected) = match &result.result {
        Some(Outcome::Resumed(resumed)) => ("resumed", resumed.regs, resumed.injected_vector),
        Some(Outcome::TdExit(exit)) => ("td_exit", exit.regs, None),
        Some(Outcome::Violated(violation)) => {
            return Err(Mismatch::new("violation", "none", &violation.message));
        }
        None => return Err(Mismatch::new("result", "one", "none")),
    };
    for flag in ["resumed", "td_exit"] {
        if step.out.get(flag) == Some(&Value::Bool(true)) {
            same("result", flag, kind)?;
        }
    }
    let vector = |vector: Option<u64>| vector.map_or("none".to_owned(), |v| v.to_string());
    let recorded = step.out.get("injected_vector").and_then(Value::as_u64);
    same(
        "injected_vector",
        vector(recorded),
        vector(injected.map(Into::into)),
    )?;
    let regs = regs.map(Gprs::from);
    let listed = Step {
        out: step
            .out
            .iter()
            .filter(|(name, _)| !["resumed", "td_exit", "injected_vector"].contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        ..step.clone()
    };
    registers(&listed, |name| {
        let register = Gpr::ALL
            .into_iter()
            .find(|register| register.name() == name)?;
        regs.map(|regs| regs[register])
    })
}

/// The whole state of a module.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) tds: Vec<TdState>,
    sept: Lines,
    pamt: Lines,
}

/// One line for each entry or page, as text, so that a difference can be read.
type Lines = BTreeMap<(u64, u64, u64), String>;

impl State {
    /// Takes one more item in.
    pub(super) fn add(&mut self, item: Item) {
        match item {
            Item::Td(td) => self.tds.push(td),
            Item::Sept(run) => add_sept(&mut self.sept, &run),
            Item::Page(run) => add_page(&mut self.pamt, &run),
        }
    }

    /// Against the recording.
    pub(super) fn compare(self, end: &End) -> Compared {
        compare_tds(&self.tds, end)?;
        let mut sept = Lines::new();
        end.sept
            .iter()
            .for_each(|line| add_sept(&mut sept, &line.to_state()));
        compare_lines("sept", sept, self.sept)?;
        let mut pamt = Lines::new();
        for line in &end.pamt {
            add_page(&mut pamt, &line.to_state()?);
        }
        compare_lines("pamt", pamt, self.pamt)
    }
}

fn add_sept(lines: &mut Lines, run: &SeptState) {
    for at in 0..run.count.max(1) {
        let step = at * (PAGE_SIZE << (9 * run.level));
        let (gpa, page, rcx) = (run.gpa + step, run.hpa + step, run.rcx + step);
        let line = format!(
            "TD {:#x}: {gpa:#x} level {} {} page {page:#x} rcx {rcx:#x} rdx {:#x}",
            run.tdr, run.level, run.state, run.rdx
        );
        lines.insert((run.tdr, run.level.into(), gpa), line);
    }
}

fn add_page(lines: &mut Lines, run: &PageState) {
    for at in 0..run.count.max(1) {
        let hpa = run.hpa + at * (PAGE_SIZE << (9 * run.size));
        let kind = run.r#type.trim_start_matches("PT_");
        let epoch = run
            .bepoch
            .map_or(String::new(), |epoch| format!(" BEPOCH {epoch:#x}"));
        let line = format!(
            "{hpa:#x} {kind} of {:#x} size {}{epoch}",
            run.owner, run.size
        );
        lines.insert((hpa, run.size.into(), 0), line);
    }
}

fn compare_lines(what: &str, expected: Lines, mut got: Lines) -> Compared {
    for (key, line) in expected {
        match got.remove(&key) {
            Some(found) if found == line => {}
            found => {
                let found = found.unwrap_or_else(|| "nothing there".to_owned());
                return Err(Mismatch::new(what, line, found));
            }
        }
    }
    match got.pop_first() {
        Some((_, line)) => Err(Mismatch::new(what, "nothing there", line)),
        None => Ok(()),
    }
}

impl SeptLine {
    fn to_state(&self) -> SeptState {
        SeptState {
            tdr: self.tdr.0,
            gpa: self.gpa.0,
            level: self.level,
            state: self.state.clone(),
            hpa: self.hpa.0,
            rcx: self.raw_rcx.0,
            rdx: self.raw_rdx.0,
            count: self.count.map_or(1, |count| count.0),
        }
    }
}

impl PageLine {
    fn to_state(&self) -> Result<PageState, Mismatch> {
        let size = match self.size.as_str() {
            "4K" => 0,
            "2M" => 1,
            "1G" => 2,
            other => return Err(Mismatch::new("pamt", other, "not a page size")),
        };
        Ok(PageState {
            hpa: self.hpa.0,
            r#type: self.kind.clone(),
            owner: self.owner.0,
            size,
            bepoch: self.bepoch.map(|epoch| epoch.0),
            count: self.count.map_or(1, |count| count.0),
        })
    }
}

/// A recording describes the TDs of its set-up; others show in the PAMT alone.
fn compare_tds(tds: &[TdState], end: &End) -> Compared {
    let mut mrtds = Vec::new();
    for record in &end.tds {
        let tdr = record
            .get("tdr")
            .map(|tdr| recorded_number("tdr", tdr))
            .transpose()?
            .unwrap_or_default();
        let Some(td) = tds.iter().find(|td| td.tdr == tdr) else {
            return Err(Mismatch::new("tds", hex(tdr), "no such TD"));
        };
        let mrtd: String = td.mrtd.iter().map(|byte| format!("{byte:02x}")).collect();
        for (field, value) in record {
            td_field(td, &mrtd, tdr, field, value)?;
        }
        mrtds.push(mrtd);
    }
    match &end.mrtd {
        Some(recorded)
            if mrtds.iter().any(|mrtd| !mrtd.is_empty()) && !mrtds.contains(recorded) =>
        {
            Err(Mismatch::new("mrtd", recorded, mrtds.join(" ")))
        }
        _ => Ok(()),
    }
}

fn td_field(td: &TdState, mrtd: &str, tdr: u64, field: &str, value: &Value) -> Compared {
    let what = format!("{field} of TD {tdr:#x}");
    let number = |got: u64| {
        let expected = recorded_number(&what, value)?;
        same(&what, expected, got)
    };
    let text = |got: &str| same(&what, value.as_str().unwrap_or_default(), got);
    match field {
        "tdr" => Ok(()),
        "lifecycle_state" => text(&td.lifecycle_state),
        "hkid" => number(td.hkid.into()),
        "num_tdcx" => number(td.num_tdcx.into()),
        "child_count" => number(td.child_count),
        "op_state" => text(&td.op_state),
        "td_epoch" => number(td.td_epoch),
        "num_vcpus" => number(td.num_vcpus.into()),
        "num_assoc_vcpus" => number(td.num_assoc_vcpus.into()),
        "mrtd" => text(mrtd),
        "epoch_refcount" => {
            let got = [td.epoch_refcount_even, td.epoch_refcount_odd];
            let recorded = value.as_array().map(Vec::as_slice).unwrap_or_default();
            let recorded = recorded
                .iter()
                .map(|count| recorded_number(&what, count))
                .collect::<Result<Vec<_>, _>>()?;
            let got = got.map(u64::from).to_vec();
            same(&what, format!("{recorded:?}"), format!("{got:?}"))
        }
        _ => Err(Mismatch::new(what, value, "not known")),
    }
}
