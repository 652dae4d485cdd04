//! Walking a tree: to one frame, or over a range.
//!
//! Source: arch/x86/kvm/mmu/tdp_iter.c. On a direct root the SHARED bit is ORed into the index
//! only: SPTEs of shared frames sit in the upper half of the root, yet the walk reports frames
//! without the bit.
//!
//! Walks read entries with Acquire: what a link leads to was written before the link.

use std::ops::{ControlFlow, Range};

use tdx_defs::{Gfn, Level};

use super::Mmu;
use super::arena::{ENTRIES, Slot, TableId};
use super::lock::ReadGuard;
use super::role::RootKind;
use super::spte;
use crate::bugs::Check;
use crate::sync::atomic::Ordering;

/// One entry on a path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) slot: Slot,
    pub(crate) level: Level,
    pub(crate) spte: u64,
}

/// Entries of a range walk: frame without SHARED bit, place, value.
pub(crate) struct Visit {
    pub(crate) gfn: Gfn,
    pub(crate) slot: Slot,
    pub(crate) level: Level,
    pub(crate) spte: u64,
}

impl Mmu {
    /// gfn_direct_bits for a direct root, nothing for a mirror root (`kvm_gfn_root_bits`).
    pub(crate) fn root_bits(&self, root: TableId) -> u64 {
        match self.arena.header(root).role().kind() {
            RootKind::Direct => self.layout.direct_bits(),
            RootKind::Mirror => 0,
        }
    }

    /// The slot of `gfn` in a table of `level`.
    pub(crate) fn slot(&self, table: TableId, level: Level, gfn: Gfn, root_bits: u64) -> Slot {
        let shift = 9 * (u32::from(level.get()) - 1);
        // Nine bits fit any integer.
        let index = (gfn.get() | root_bits) >> shift & (ENTRIES as u64 - 1);
        Slot {
            table,
            index: usize::try_from(index).unwrap_or(0),
        }
    }

    pub(crate) fn read(&self, slot: Slot) -> u64 {
        self.arena.entry(slot).load(Ordering::Acquire)
    }

    /// Whether a walk for `gfn` may start (B22).
    pub(crate) fn walkable(&self, gfn: Gfn) -> bool {
        let inside = gfn.get() < self.layout.gfn_limit();
        if !inside {
            self.bugs
                .warn(Check::B22, || format!("walk of {gfn} above the SHARED bit"));
        }
        inside
    }

    /// The entries on the path to `gfn`, from the root down to the first that links no table.
    pub(crate) fn path(&self, root: TableId, gfn: Gfn) -> Vec<Step> {
        let mut steps = Vec::with_capacity(5);
        if !self.walkable(gfn) {
            return steps;
        }
        let root_bits = self.root_bits(root);
        let mut table = root;
        let mut level = self.arena.level(root);
        loop {
            let slot = self.slot(table, level, gfn, root_bits);
            let spte = self.read(slot);
            steps.push(Step { slot, level, spte });
            let next = spte::is_table(spte, level)
                .then(|| level.child().zip(TableId::linked_by(spte)))
                .flatten();
            match next {
                Some((child, linked)) => (level, table) = (child, linked),
                None => return steps,
            }
        }
    }

    /// The last entry on the path to `gfn`: a leaf, a hole or a frozen entry.
    pub(crate) fn last(&self, root: TableId, gfn: Gfn) -> Option<Step> {
        if !self.walkable(gfn) {
            return None;
        }
        let root_bits = self.root_bits(root);
        let mut table = root;
        let mut level = self.arena.level(root);
        loop {
            let slot = self.slot(table, level, gfn, root_bits);
            let spte = self.read(slot);
            let next = spte::is_table(spte, level)
                .then(|| level.child().zip(TableId::linked_by(spte)))
                .flatten();
            match next {
                Some((child, linked)) => (level, table) = (child, linked),
                None => return Some(Step { slot, level, spte }),
            }
        }
    }

    /// Visits the entries of `[start, end)` whose level is at least `min_level`, parents before
    /// children, in ascending order, until `visit` breaks.
    pub(crate) fn visit(
        &self,
        root: TableId,
        range: Range<u64>,
        min_level: Level,
        visit: &mut dyn FnMut(Visit) -> ControlFlow<()>,
    ) {
        let level = self.arena.level(root);
        let root_bits = self.root_bits(root);
        let range = range.start..range.end.min(self.layout.gfn_limit());
        let _ = self.visit_table((root, level, 0), root_bits, &range, min_level, visit);
    }

    /// The same under the read side of mmu_lock, which is let go for a writer that waits, as
    /// `tdp_mmu_iter_cond_resched()` does: never before the walk has moved on.
    pub(crate) fn visit_shared<'a>(
        &'a self,
        mut held: ReadGuard<'a>,
        root: TableId,
        range: Range<u64>,
        min_level: Level,
        visit: &mut dyn FnMut(Visit),
    ) -> ReadGuard<'a> {
        let mut start = range.start;
        loop {
            let mut next = None;
            self.visit(root, start..range.end, min_level, &mut |at| {
                if at.gfn.get() > start && self.lock.is_wanted() {
                    next = Some(at.gfn.get());
                    return ControlFlow::Break(());
                }
                visit(at);
                ControlFlow::Continue(())
            });
            let Some(next) = next else { return held };
            start = next;
            drop(held);
            held = self.lock.read(0);
        }
    }

    fn visit_table(
        &self,
        (table, level, base): (TableId, Level, u64),
        root_bits: u64,
        range: &Range<u64>,
        min_level: Level,
        visit: &mut dyn FnMut(Visit) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let pages = level.pages();
        let first = range.start.saturating_sub(base) / pages;
        let end = range
            .end
            .saturating_sub(base)
            .div_ceil(pages)
            .min(ENTRIES as u64);
        for at in first..end {
            let gfn = Gfn::new(base + at * pages);
            let slot = self.slot(table, level, gfn, root_bits);
            let spte = self.read(slot);
            visit(Visit {
                gfn,
                slot,
                level,
                spte,
            })?;
            // Read again: the visit may have removed the table.
            let spte = self.read(slot);
            if level <= min_level || !spte::is_table(spte, level) {
                continue;
            }
            if let Some((child, linked)) = level.child().zip(TableId::linked_by(spte)) {
                self.visit_table(
                    (linked, child, gfn.get()),
                    root_bits,
                    range,
                    min_level,
                    visit,
                )?;
            }
        }
        ControlFlow::Continue(())
    }
}
