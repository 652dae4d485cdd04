//! Spans of a batch: `seamcall batch`, and below it one for each leaf.
//!
//! Only a batch whose sender has a sampled span is traced: without one this file costs a look at
//! an empty string. A batch of many calls is bulk work: it has one span, with counts.
//! Target of the spans: off in the log by default, `RUST_LOG=seamcall=info` shows them.

use tdx_defs::{Leaf, PAGE_SHIFT, Seamcall, SeamcallResult};
use tracing::{Span, field};

use crate::batch::Batch;

/// Calls of a batch that has a span for each of them. What one fault or the removal of one page needs
/// is less; spans for every table of a range would cost more than its pages.
const MAX_LEAF_SPANS: usize = 12;
/// GPA bits of a Secure EPT operand.
const GPA_MASK: u64 = ((1 << 52) - 1) & !((1 << PAGE_SHIFT) - 1);
/// Level bits of a Secure EPT operand.
const LEVEL_MASK: u64 = 7;

/// Opens the spans of one batch.
#[derive(Debug)]
pub(crate) struct Tracer {
    batch: Span,
    /// Each call has a span.
    leaves: bool,
    ran: u64,
    failed: u64,
}

impl Tracer {
    /// The span of `batch`, if its sender is traced.
    pub(crate) fn open(batch: &Batch) -> Self {
        if !telemetry::is_sampled(&batch.traceparent) {
            return Self {
                batch: Span::none(),
                leaves: false,
                ran: 0,
                failed: 0,
            };
        }
        let session = batch.ticket.as_ref().map(|ticket| ticket.session.as_str());
        // A root of its own until the next line: the caller's span came in the message.
        let span = tracing::info_span!(
            target: "seamcall",
            parent: None,
            "seamcall batch",
            otel.kind = "server",
            tdx.lp = batch.lp.0,
            tdx.session = session,
            tdx.sequence = batch.sequence,
            tdx.calls = batch.calls.len(),
            tdx.runs = batch.runs,
            tdx.calls.ran = field::Empty,
            tdx.calls.failed = field::Empty,
        );
        telemetry::set_remote_parent(&span, &batch.traceparent);
        Self {
            leaves: !span.is_disabled() && batch.calls.len() <= MAX_LEAF_SPANS,
            batch: span,
            ran: 0,
            failed: 0,
        }
    }

    /// Whether no leaf gets a span.
    pub(crate) fn is_off(&self) -> bool {
        !self.leaves
    }

    /// Counts calls that ran without this.
    pub(crate) fn ran(&mut self, results: &[SeamcallResult]) {
        if !self.batch.is_none() {
            results.iter().for_each(|result| self.count(result));
        }
    }

    fn count(&mut self, result: &SeamcallResult) {
        self.ran += 1;
        self.failed += u64::from(result.status().is_error());
    }

    /// Runs one call, in a span unless it is one of many.
    pub(crate) fn leaf(
        &mut self,
        call: &Seamcall,
        run: impl FnOnce() -> SeamcallResult,
    ) -> SeamcallResult {
        let result = if self.leaves {
            self.in_span(call, run)
        } else {
            run()
        };
        self.count(&result);
        result
    }

    fn in_span(&self, call: &Seamcall, run: impl FnOnce() -> SeamcallResult) -> SeamcallResult {
        let span = self.leaf_span(call);
        let result = span.in_scope(run);
        span.record(
            "tdx.status",
            field::display(format_args!("{:#018x}", result.rax)),
        );
        if let Some(operand) = result.status().named_operand() {
            span.record("tdx.operand_id", field::display(operand));
        }
        if call.repeat.is_some() {
            span.record("tdx.completed", result.completed);
        }
        result
    }

    fn leaf_span(&self, call: &Seamcall) -> Span {
        let (gfn, level) = sept_operand(call);
        let gfn = gfn.map(|gfn| format!("{gfn:#x}"));
        tracing::info_span!(
            target: "seamcall",
            parent: &self.batch,
            "leaf",
            otel.name = %call.leaf,
            tdx.seamcall.leaf = %call.leaf,
            tdx.sept.level = level,
            kvm.gfn = gfn,
            tdx.repeat.count = call.repeat.map(|repeat| repeat.count),
            tdx.status = field::Empty,
            tdx.operand_id = field::Empty,
            tdx.completed = field::Empty,
        )
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if !self.batch.is_none() {
            self.batch.record("tdx.calls.ran", self.ran);
            self.batch.record("tdx.calls.failed", self.failed);
        }
    }
}

/// Frame number and level in RCX, for the leaves that take them there.
fn sept_operand(call: &Seamcall) -> (Option<u64>, Option<u64>) {
    let gfn = (call.rcx & GPA_MASK) >> PAGE_SHIFT;
    match call.leaf {
        Leaf::MEM_PAGE_ADD
        | Leaf::MEM_PAGE_AUG
        | Leaf::MEM_PAGE_DEMOTE
        | Leaf::MEM_PAGE_PROMOTE
        | Leaf::MEM_PAGE_RELOCATE
        | Leaf::MEM_PAGE_REMOVE
        | Leaf::MEM_RANGE_BLOCK
        | Leaf::MEM_RANGE_UNBLOCK
        | Leaf::MEM_SEPT_ADD
        | Leaf::MEM_SEPT_RD
        | Leaf::MEM_SEPT_REMOVE => (Some(gfn), Some(call.rcx & LEVEL_MASK)),
        Leaf::MR_EXTEND | Leaf::MEM_RD | Leaf::MEM_WR => (Some(gfn), None),
        _ => (None, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operand_of_a_secure_ept_leaf_is_split() {
        for (leaf, rcx, expected) in [
            (Leaf::MEM_PAGE_AUG, 0x8000_1000, (Some(0x80001), Some(0))),
            (Leaf::MEM_SEPT_ADD, 0x4000_0003, (Some(0x40000), Some(3))),
            (Leaf::MR_EXTEND, 0x8000_1100, (Some(0x80001), None)),
            (Leaf::MEM_TRACK, 0x4000_0000, (None, None)),
        ] {
            assert_eq!(
                sept_operand(&Seamcall::new(leaf).rcx(rcx)),
                expected,
                "{leaf}"
            );
        }
    }
}
