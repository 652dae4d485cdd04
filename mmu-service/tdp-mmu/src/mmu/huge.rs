//! Huge leaves become tables, and tables become huge leaves. Direct roots only.
//!
//! Source: tdp_mmu.c, `tdp_mmu_split_huge_page()`, `tdp_mmu_split_huge_pages_root()`,
//! `recover_huge_pages_range()`, `tdp_mmu_make_huge_spte()`.

use std::ops::{ControlFlow, Range};

use tdx_defs::{Gfn, Level};

use super::Mmu;
use super::arena::{ENTRIES, Slot, TableId};
use super::change::Lost;
use super::iter::{Step, Visit};
use super::lock::{ReadGuard, WriteGuard};
use super::spte;
use crate::error::errno;
use crate::sync::atomic::Ordering;
use crate::trace::Event;

/// Largest leaf that KVM makes (KVM_MAX_HUGEPAGE_LEVEL).
pub(crate) const MAX_LEAF_LEVEL: Level = Level::L1G;

/// No table was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoTable;

impl Mmu {
    /// tdp_mmu_split_huge_page: fills `table`, which nobody can reach, and links it in place of
    /// the leaf. Under the read side somebody else may be faster.
    pub(crate) fn split_huge(&self, step: &Step, base: Gfn, table: TableId) -> Result<(), Lost> {
        let linked = self
            .fill_from(step, table)
            .and_then(|()| self.set_direct_atomic(step, base, spte::nonleaf(table.hpa())));
        self.split_done(step, base, linked.is_ok());
        linked
    }

    /// The children print no event.
    fn fill_from(&self, step: &Step, table: TableId) -> Result<(), Lost> {
        let level = step.level.child().ok_or(Lost)?;
        for (index, entry) in (0u64..).zip(self.arena.entries(table)) {
            entry.store(spte::small(step.spte, level, index), Ordering::Relaxed);
        }
        Ok(())
    }

    fn split_done(&self, step: &Step, base: Gfn, done: bool) {
        if done && let Some(level) = step.level.child() {
            self.account_pages(level, ENTRIES as i64);
        }
        self.tracer.emit(|| Event::SplitHugePage {
            gfn: base,
            spte: step.spte,
            level: step.level,
            errno: if done { 0 } else { -errno::EBUSY },
        });
    }

    /// tdp_mmu_split_huge_pages_root under the read side: leaves above `target` in `range`.
    pub(crate) fn split_range_shared<'a>(
        &'a self,
        held: ReadGuard<'a>,
        root: TableId,
        range: Range<u64>,
        target: Level,
    ) -> (ReadGuard<'a>, Result<(), NoTable>) {
        let Some(min_level) = target.parent() else {
            return (held, Ok(()));
        };
        let mut outcome = Ok(());
        let held = self.visit_shared(held, root, range, min_level, &mut |at| {
            if outcome.is_ok() {
                outcome =
                    self.split_visited(&at, |step, base, table| self.split_huge(step, base, table));
            }
        });
        (held, outcome)
    }

    /// The same under the write side.
    pub(crate) fn split_range(
        &self,
        held: &WriteGuard<'_>,
        root: TableId,
        range: Range<u64>,
        target: Level,
    ) -> Result<(), NoTable> {
        let Some(min_level) = target.parent() else {
            return Ok(());
        };
        let mut outcome = Ok(());
        self.visit(root, range, min_level, &mut |at| {
            outcome = self.split_visited(&at, |step, base, table| {
                self.fill_from(step, table)?;
                let new = spte::nonleaf(table.hpa());
                self.set_spte(held, step, base, new, &mut Vec::new());
                self.split_done(step, base, true);
                Ok(())
            });
            match outcome {
                Ok(()) => ControlFlow::Continue(()),
                Err(NoTable) => ControlFlow::Break(()),
            }
        });
        outcome
    }

    /// Splits a visited entry, for as long as a huge leaf is there.
    fn split_visited(
        &self,
        at: &Visit,
        split: impl Fn(&Step, Gfn, TableId) -> Result<(), Lost>,
    ) -> Result<(), NoTable> {
        loop {
            let step = Step {
                slot: at.slot,
                level: at.level,
                spte: self.read(at.slot),
            };
            if !spte::is_leaf(step.spte, step.level) {
                return Ok(());
            }
            let Some(table) = self.child_table(&step, at.gfn) else {
                self.tracer.emit(|| Event::SplitHugePage {
                    gfn: at.gfn,
                    spte: step.spte,
                    level: step.level,
                    errno: -errno::ENOMEM,
                });
                return Err(NoTable);
            };
            if split(&step, at.gfn, table).is_ok() {
                return Ok(());
            }
            self.arena.free(table);
        }
    }

    /// recover_huge_pages_range: every table of `range` that `max_level` allows to be one leaf
    /// becomes one. The answer says whether any did, so that the caller flushes.
    pub(crate) fn recover_range<'a>(
        &'a self,
        held: ReadGuard<'a>,
        root: TableId,
        range: Range<u64>,
        nx_huge_pages: bool,
        max_level: &dyn Fn(Gfn) -> Level,
    ) -> (ReadGuard<'a>, bool) {
        let mut flush = false;
        let held = self.visit_shared(held, root, range.clone(), Level::L2M, &mut |at| {
            let candidate = at.level <= MAX_LEAF_LEVEL
                && range.contains(&at.gfn.get())
                && max_level(at.gfn) >= at.level;
            if !candidate {
                return;
            }
            flush |= self.change_until_done(&at, at.gfn, |spte| {
                if !spte::is_table(spte, at.level) {
                    return None;
                }
                let small = self.first_leaf(TableId::linked_by(spte)?)?;
                Some(spte::huge(small, at.level, nx_huge_pages))
            });
        });
        (held, flush)
    }

    /// The first leaf below a table.
    fn first_leaf(&self, table: TableId) -> Option<u64> {
        let level = self.arena.level(table);
        (0..ENTRIES).find_map(|index| {
            let spte = self.read(Slot { table, index });
            if spte::is_leaf(spte, level) {
                Some(spte)
            } else if spte::is_table(spte, level) {
                self.first_leaf(TableId::linked_by(spte)?)
            } else {
                None
            }
        })
    }

    /// kvm_tdp_mmu_zap_possible_nx_huge_page: the parent of a table lets it go, under the read
    /// side. Whether it did, so that the caller flushes.
    pub(crate) fn zap_table_shared(&self, table: TableId) -> bool {
        let header = self.arena.header(table);
        let (gfn, Some(slot)) = (header.gfn(), header.parent()) else {
            return false;
        };
        let Some(level) = header.role().level().parent() else {
            return false;
        };
        let spte = self.read(slot);
        // Somebody else may have taken it away.
        if !spte::is_table(spte, level) || TableId::linked_by(spte) != Some(table) {
            return false;
        }
        let step = Step { slot, level, spte };
        self.set_direct_atomic(&step, gfn, spte::NP).is_ok()
    }
}
