//! Taking mappings and tables away.
//!
//! Source: `tdp_mmu_zap_leafs()`, `__tdp_mmu_zap_root()`, `handle_removed_pt()`,
//! `remove_external_spte()`, arch/x86/kvm/mmu/tdp_mmu.c.
//!
//! What the module must do for it is collected in order, children before parents, and carried
//! out by the TDX layer before the write side of mmu_lock is let go. The kernel calls its hooks
//! on the spot; under the write side nobody can tell the difference.

use std::ops::{ControlFlow, Range};

use tdx_defs::{Gfn, Level, Pfn};

use super::Mmu;
use super::arena::{ENTRIES, Slot, TableId};
use super::change::LockMode;
use super::iter::{Step, Visit};
use super::lock::{ReadGuard, WriteGuard};
use super::spte;
use crate::bugs::Check;
use crate::sync::atomic::Ordering;
use crate::sync::thread;
use crate::trace::{Event, PageText};

/// A change of the private tree, named after the hook of `kvm_x86_ops`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExternalOp {
    /// link_external_spt.
    LinkSpt {
        gfn: Gfn,
        level: Level,
        external: Option<Pfn>,
    },
    /// set_external_spte.
    SetSpte { gfn: Gfn, level: Level, spte: u64 },
    /// remove_external_spte.
    RemoveSpte { gfn: Gfn, level: Level, spte: u64 },
    /// free_external_spt.
    FreeSpt {
        gfn: Gfn,
        level: Level,
        external: Option<Pfn>,
    },
}

/// What a leaf zap did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Zapped {
    pub(crate) leaves: u64,
    /// Where to go on, when the limit was reached.
    pub(crate) next: Option<u64>,
}

/// A leaf zap under way.
struct LeafZap<'z> {
    mmu: &'z Mmu,
    held: &'z WriteGuard<'z>,
    limit: u64,
    is_mirror: bool,
    ops: &'z mut Vec<ExternalOp>,
    zapped: Zapped,
}

impl LeafZap<'_> {
    /// Whether the walk ends in front of `gfn`.
    fn must_stop(&mut self, gfn: Gfn) -> ControlFlow<()> {
        let yields = !self.is_mirror && self.zapped.leaves != 0 && self.held.is_contended();
        if self.zapped.leaves == self.limit || yields {
            self.zapped.next = Some(gfn.get());
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    fn leaf(&mut self, step: &Step, gfn: Gfn) -> ControlFlow<()> {
        self.must_stop(gfn)?;
        self.mmu.set_spte(self.held, step, gfn, spte::NP, self.ops);
        self.zapped.leaves += 1;
        ControlFlow::Continue(())
    }

    /// The leaves of a table of 4 KiB entries, which stays in hand from entry to entry.
    fn table(
        &mut self,
        table: TableId,
        base: Gfn,
        range: &Range<u64>,
        root_bits: u64,
    ) -> ControlFlow<()> {
        let mmu = self.mmu;
        let plain = self.is_mirror && !mmu.tracer.is_on();
        let entries = mmu.arena.entries(table);
        let frames = base.get().max(range.start)..(base.get() + ENTRIES as u64).min(range.end);
        let before = self.zapped.leaves;
        let walked = frames.map(Gfn::new).try_for_each(|gfn| {
            let slot = mmu.slot(table, Level::L4K, gfn, root_bits);
            let spte = entries[slot.index].load(Ordering::Acquire);
            if !spte::is_leaf(spte, Level::L4K) {
                return ControlFlow::Continue(());
            }
            let level = Level::L4K;
            if !plain {
                return self.leaf(&Step { slot, level, spte }, gfn);
            }
            self.must_stop(gfn)?;
            // What tdp_mmu_set_spte does of a leaf that goes: under the write side nobody else
            // writes to a mirror table, and the pages are counted for all of them at once.
            entries[slot.index].store(spte::NP, Ordering::Release);
            self.ops.push(ExternalOp::RemoveSpte { gfn, level, spte });
            self.zapped.leaves += 1;
            ControlFlow::Continue(())
        });
        if plain {
            let gone = self.zapped.leaves - before;
            mmu.account_pages(Level::L4K, -gone.cast_signed());
        }
        walked
    }
}

impl Mmu {
    /// tdp_mmu_zap_leafs: every leaf that overlaps `range` goes to NP, at most `limit` of them. On a
    /// direct root, where nothing has to follow, the walk also stops as soon as a fault waits.
    pub(crate) fn zap_leafs(
        &self,
        held: &WriteGuard<'_>,
        root: TableId,
        range: Range<u64>,
        limit: u64,
        ops: &mut Vec<ExternalOp>,
    ) -> Zapped {
        let mut zap = LeafZap {
            mmu: self,
            held,
            limit,
            is_mirror: self.arena.header(root).role().is_mirror(),
            ops,
            zapped: Zapped::default(),
        };
        let root_bits = self.root_bits(root);
        self.visit(root, range.clone(), Level::L2M, &mut |at| {
            if spte::is_leaf(at.spte, at.level) {
                let step = Step {
                    slot: at.slot,
                    level: at.level,
                    spte: at.spte,
                };
                return zap.leaf(&step, at.gfn);
            }
            let is_last = at.level == Level::L2M && spte::is_table(at.spte, at.level);
            match TableId::linked_by(at.spte).filter(|_| is_last) {
                Some(table) => zap.table(table, at.gfn, &range, root_bits),
                None => ControlFlow::Continue(()),
            }
        });
        zap.zapped
    }

    /// The page text of tracepoints.
    pub(crate) fn page_text(&self, table: TableId) -> PageText {
        let header = self.arena.header(table);
        PageText {
            gfn: header.gfn(),
            role: header.role().word(),
            root_count: header.root_count.load(Ordering::Relaxed),
        }
    }

    /// __tdp_mmu_zap_root under the write side: leaves first, then tables from the lowest level
    /// up, so that the tables given back always are empty.
    pub(crate) fn zap_root(&self, held: &WriteGuard<'_>, root: TableId, ops: &mut Vec<ExternalOp>) {
        let root_level = self.arena.level(root);
        for level in [Level::L4K, Level::L2M, Level::L1G, root_level] {
            self.zap_level(held, root, level, ops);
        }
    }

    fn zap_level(
        &self,
        held: &WriteGuard<'_>,
        root: TableId,
        level: Level,
        ops: &mut Vec<ExternalOp>,
    ) {
        let root_bits = self.root_bits(root);
        let mut zap = |at: Visit| {
            if at.level <= level && spte::is_present(at.spte) {
                let step = Step {
                    slot: at.slot,
                    level: at.level,
                    spte: at.spte,
                };
                // The walk over a whole root reports frames with the SHARED bit.
                let gfn = Gfn::new(at.gfn.get() | root_bits);
                self.set_spte(held, &step, gfn, spte::NP, ops);
            }
            ControlFlow::Continue(())
        };
        self.visit(root, 0..self.layout.gfn_limit(), level, &mut zap);
    }

    /// __tdp_mmu_zap_root under the read side, for a direct root that was invalidated: nobody
    /// builds in it, but leaves still lose bits to whoever ages them.
    pub(crate) fn zap_root_shared<'a>(
        &'a self,
        mut held: ReadGuard<'a>,
        root: TableId,
    ) -> ReadGuard<'a> {
        self.check_scheduled(root);
        let root_bits = self.root_bits(root);
        let whole = 0..self.layout.gfn_limit();
        for level in [Level::L4K, Level::L2M, Level::L1G, self.arena.level(root)] {
            held = self.visit_shared(held, root, whole.clone(), level, &mut |at| {
                if at.level <= level {
                    let gfn = Gfn::new(at.gfn.get() | root_bits);
                    self.change_until_done(&at, gfn, |spte| {
                        spte::is_present(spte).then_some(spte::NP)
                    });
                }
            });
        }
        held
    }

    /// Changes an entry of a direct root under the read side until it is changed or `new` finds
    /// nothing to change. Whether it was.
    pub(crate) fn change_until_done(
        &self,
        at: &Visit,
        gfn: Gfn,
        new: impl Fn(u64) -> Option<u64>,
    ) -> bool {
        let mut spte = at.spte;
        loop {
            if spte == spte::FROZEN {
                return false;
            }
            let Some(new) = new(spte) else { return false };
            let step = Step {
                slot: at.slot,
                level: at.level,
                spte,
            };
            if self.set_direct_atomic(&step, gfn, new).is_ok() {
                return true;
            }
            spte = self.read(at.slot);
        }
    }

    /// handle_removed_pt: empties a table that is not linked any more and gives it back.
    pub(crate) fn remove_table(
        &self,
        table: TableId,
        mode: LockMode,
        is_mirror: bool,
        ops: &mut Vec<ExternalOp>,
    ) {
        let (level, base, external) = {
            let header = self.arena.header(table);
            (header.role().level(), header.gfn(), header.external())
        };
        self.tracer.emit(|| Event::PrepareZapPage {
            page: self.page_text(table),
        });
        self.untrack_nx(table);
        for index in 0..ENTRIES {
            let slot = Slot { table, index };
            let gfn = base.offset(index as u64 * level.pages());
            let Some(old) = self.freeze_removed(slot, mode) else {
                continue;
            };
            self.handle_changed(gfn, level, (old, spte::FROZEN), mode, is_mirror, ops);
            if is_mirror {
                if mode == LockMode::Shared {
                    self.bugs.bug(Check::B13, || {
                        format!("mirror table of {base} removed under the read side")
                    });
                }
                if spte::is_leaf(old, level) {
                    ops.push(ExternalOp::RemoveSpte {
                        gfn,
                        level,
                        spte: old,
                    });
                }
            }
        }
        if is_mirror {
            ops.push(ExternalOp::FreeSpt {
                gfn: base,
                level,
                external,
            });
        }
        self.arena.free_deferred(table);
    }

    /// Puts FROZEN into an entry of a removed table; the value that was there, if it matters.
    fn freeze_removed(&self, slot: Slot, mode: LockMode) -> Option<u64> {
        let entry = self.arena.entry(slot);
        match mode {
            LockMode::Exclusive => {
                let present = spte::is_present(entry.load(Ordering::Acquire));
                present.then(|| entry.swap(spte::FROZEN, Ordering::AcqRel))
            }
            LockMode::Shared => loop {
                // Another thread is in the middle of a change of this entry: it ends by itself.
                let old = entry.swap(spte::FROZEN, Ordering::AcqRel);
                if old != spte::FROZEN {
                    return Some(old);
                }
                thread::yield_now();
            },
        }
    }
}
