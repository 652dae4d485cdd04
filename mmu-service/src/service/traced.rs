//! Which faults have spans, and what the spans say.
//!
//! A fault is traced from its start when its caller asks (a sampled `traceparent`, or `explain`) or
//! when the gate lets it through. Any other is measured, and told of afterwards when it was slow,
//! failed, or met a busy module.

use tdp_mmu::{FaultReport, FaultsReport, RetPf, RunExit, RunReport};
use telemetry::late::{Account, Untraced};
use telemetry::propagate::code_name;
use telemetry::{Gate, KeyValue};
use tonic::{Code, Status};
use tracing::Span;

use crate::convert::{ret_pf_name, root_name};

/// Links of a message of faults.
pub(super) const MAX_LINKS: usize = 128;

/// Writes what came of a fault into its span.
pub(super) fn record_fault(span: &Span, report: &FaultReport) {
    if span.is_none() {
        return;
    }
    span.record("kvm.mmu.root", root_name(report.root));
    span.record("kvm.pf.outcome", ret_pf_name(report.ret_pf));
    span.record("kvm.pf.taken", report.counts.pf_taken);
    span.record("tdx.messages", report.counts.rpcs);
    if let Some(level) = report.level {
        span.record("kvm.level", level.get());
    }
}

/// Writes the counts of a message of faults into its span.
pub(super) fn record_faults(span: &Span, report: &FaultsReport) {
    if span.is_none() {
        return;
    }
    span.record("kvm.pf.fixed", report.fixed);
    span.record("kvm.pf.spurious", report.spurious);
    span.record("kvm.pf.others", report.others_count);
    span.record("kvm.pf.taken", report.counts.pf_taken);
    span.record("tdx.messages", report.counts.rpcs);
    span.record("tdx.calls", report.counts.seamcalls.total());
}

/// Links the span of a message to those that wait for its faults.
pub(super) fn link_faults(span: &Span, links: &[String]) {
    if !span.is_none() {
        links
            .iter()
            .filter(|link| telemetry::is_sampled(link))
            .for_each(|link| telemetry::add_link(span, link));
    }
}

/// Tells of a fault that was not traced, if it is worth it.
pub(super) fn tell_fault(
    untraced: Untraced,
    gate: &Gate,
    outcome: &Result<FaultReport, Status>,
    mut attributes: Vec<KeyValue>,
) {
    let slow = untraced.is_slow(gate);
    let (reason, events, error) = match outcome {
        Err(status) => (reason_of(status), Vec::new(), Some(status)),
        Ok(report) => {
            let busy = report.ret_pf == RetPf::Retry
                || report.seamcalls.iter().any(|(_, status)| status.is_busy());
            if !(busy || slow) {
                return;
            }
            attributes.extend([
                KeyValue::new("kvm.mmu.root", root_name(report.root)),
                KeyValue::new("kvm.pf.outcome", ret_pf_name(report.ret_pf)),
                KeyValue::new("kvm.pf.taken", number(report.counts.pf_taken)),
                KeyValue::new("tdx.messages", number(report.counts.rpcs)),
            ]);
            let calls = report.seamcalls.iter().map(|(leaf, status)| {
                let mut call = vec![
                    KeyValue::new("tdx.seamcall.leaf", leaf.to_string()),
                    KeyValue::new("tdx.status", format!("{:#018x}", status.0)),
                ];
                if let Some(operand) = status.named_operand() {
                    call.push(KeyValue::new("tdx.operand_id", operand.to_string()));
                }
                ("seamcall", call)
            });
            (if busy { "busy" } else { "slow" }, calls.collect(), None)
        }
    };
    tell(untraced, reason, attributes, events, error);
}

/// The same for a message of faults.
pub(super) fn tell_faults(
    untraced: Untraced,
    gate: &Gate,
    outcome: &Result<FaultsReport, Status>,
    mut attributes: Vec<KeyValue>,
) {
    let slow = untraced.is_slow(gate);
    let (reason, events, error) = match outcome {
        Err(status) => (reason_of(status), Vec::new(), Some(status)),
        Ok(report) => {
            let failed = report.others.iter().any(|one| one.result.is_err());
            let busy = report
                .others
                .iter()
                .any(|one| matches!(one.result, Ok(RetPf::Retry)));
            let reason = match (failed, busy, slow) {
                (true, _, _) => "failed",
                (_, true, _) => "busy",
                (_, _, true) => "slow",
                _ => return,
            };
            attributes.extend([
                KeyValue::new("kvm.pf.fixed", i64::from(report.fixed)),
                KeyValue::new("kvm.pf.spurious", i64::from(report.spurious)),
                KeyValue::new("kvm.pf.others", i64::from(report.others_count)),
                KeyValue::new("tdx.messages", number(report.counts.rpcs)),
                KeyValue::new("tdx.calls", number(report.counts.seamcalls.total())),
            ]);
            let others = report.others.iter().map(|one| {
                let outcome = match &one.result {
                    Ok(ret_pf) => KeyValue::new("kvm.pf.outcome", ret_pf_name(*ret_pf)),
                    Err(error) => KeyValue::new("error.message", error.to_string()),
                };
                let place = KeyValue::new("kvm.fault.index", i64::from(one.index));
                ("fault", vec![place, outcome])
            });
            (reason, others.collect(), None)
        }
    };
    tell(untraced, reason, attributes, events, error);
}

/// The same for a run of a vCPU.
pub(super) fn tell_run(
    untraced: Untraced,
    gate: &Gate,
    outcome: &Result<RunReport, Status>,
    mut attributes: Vec<KeyValue>,
) {
    let slow = untraced.is_slow(gate);
    let (reason, error) = match outcome {
        Err(status) => (reason_of(status), Some(status)),
        Ok(report) => {
            if let RunExit::Failed(error) = &report.exit {
                attributes.push(KeyValue::new("error.message", error.to_string()));
            } else if !slow {
                return;
            }
            attributes.push(KeyValue::new("kvm.entries", number(report.entries)));
            attributes.push(KeyValue::new("tdx.messages", number(report.counts.rpcs)));
            let failed = matches!(report.exit, RunExit::Failed(_));
            (if failed { "failed" } else { "slow" }, None)
        }
    };
    tell(untraced, reason, attributes, Vec::new(), error);
}

/// A budget spent on a busy module is no failure of the fault.
fn reason_of(status: &Status) -> &'static str {
    match status.code() {
        Code::Aborted => "busy",
        _ => "failed",
    }
}

fn tell(
    untraced: Untraced,
    reason: &'static str,
    mut attributes: Vec<KeyValue>,
    events: Vec<(&'static str, Vec<KeyValue>)>,
    error: Option<&Status>,
) {
    if let Some(status) = error {
        attributes.push(KeyValue::new("error.type", code_name(status.code())));
    }
    untraced.tell(Account {
        reason,
        attributes,
        events,
        error: error.map(|status| status.message().to_owned()),
    });
}

fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
