//! Spans of a fault that somebody watches: where its walk ended, and what it held.
//!
//! Only single faults have them. A span costs more than the walk it tells of, so batches and
//! ranges are told by their counts. Nor has a single fault any without a span around it: whether it
//! is traced was decided there. A pass that has to be made again is an event of that span.

use tdx_defs::{CompletionStatus, Gfn, Leaf};
use tracing::{Span, field, info, info_span};

use crate::mmu::Mmu;
use crate::mmu::arena::TableId;
use crate::mmu::mirror::{Begin, Depth};
use crate::mmu::spte;

/// Whether the operation runs inside a span.
pub(crate) fn watched() -> bool {
    !Span::current().is_none()
}

/// Tells that the fault at `gfn` is handled once more, and the answer of the module that made it so.
pub(super) fn retry(gfn: Gfn, tries: u32, busy: Option<(Leaf, CompletionStatus)>) {
    if !watched() {
        return;
    }
    match busy {
        Some((leaf, status)) => info!(
            target: "kvm",
            {
                kvm.gfn = %gfn,
                kvm.retry.count = tries,
                tdx.seamcall.leaf = %leaf,
                tdx.status = %format_args!("{:#018x}", status.0),
                tdx.operand_id = status.named_operand().map(field::display),
            },
            "busy"
        ),
        None => info!(target: "kvm", { kvm.gfn = %gfn, kvm.retry.count = tries }, "retry"),
    }
}

/// [`Mmu::begin`] inside spans: `walk` says how far the mirror goes, `begin` what is missing.
pub(super) fn begin(mmu: &Mmu, root: TableId, gfn: Gfn, leaf: u64, depth: Depth) -> Begin<'_> {
    let walk =
        info_span!("walk", kvm.gfn = %gfn, kvm.level = field::Empty, kvm.spte = field::Empty);
    walk.in_scope(|| {
        if let Some(step) = mmu.last(root, gfn) {
            walk.record("kvm.level", step.level.get());
            walk.record(
                "kvm.spte",
                field::display(spte::kind(step.spte, step.level)),
            );
        }
    });
    let begin =
        info_span!("begin", kvm.gfn = %gfn, kvm.tables = field::Empty, kvm.leaves = field::Empty);
    begin.in_scope(|| {
        let begun = mmu.begin(root, gfn, leaf, depth);
        if let Begin::Held(unit) = &begun {
            begin.record("kvm.tables", unit.links());
            begin.record("kvm.leaves", unit.leaves());
        }
        begun
    })
}
