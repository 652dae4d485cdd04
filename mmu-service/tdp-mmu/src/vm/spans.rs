//! Spans of a fault that somebody watches: where its walk ended, and what it held.
//!
//! Only single faults have them. A span costs more than the walk it tells of, so batches and
//! ranges are told by their counts.

use tdx_defs::Gfn;
use tracing::{field, info_span};

use crate::mmu::Mmu;
use crate::mmu::arena::TableId;
use crate::mmu::mirror::{Begin, Depth};
use crate::mmu::spte;

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
