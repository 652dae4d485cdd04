//! Building on the mirror root: begin, and settle with the module's answer.
//!
//! Source: `kvm_tdp_mmu_map()`, `tdp_mmu_link_sp()`, `__tdp_mmu_set_spte_atomic()`,
//! arch/x86/kvm/mmu/tdp_mmu.c.
//!
//! [`Mmu::begin`] walks to a frame and holds the *highest* missing entry of the path at FROZEN.
//! Tables below it are built where nobody can reach them, so one frozen entry guards the whole
//! chain. The result is a value, a [`Unit`], that names what the module must do;
//! [`Unit::settle`] publishes exactly the prefix that the module confirmed and restores the rest.
//! With [`Depth::One`] a unit is what one turn of the kernel's loop does: one table or one leaf.
//!
//! Invariants
//! - M1  While a unit lives, its top entry (or, without a chain, each of its leaf entries) is
//!   FROZEN, and nobody else writes it.
//! - M2  After `settle` no entry of the unit is FROZEN, tables that were not confirmed are free,
//!   and so are the pages behind them.
//! - M3  A unit that was never sent restores its entries when dropped.

use tdx_defs::{Gfn, Level, Pfn};

use super::Mmu;
use super::arena::{ENTRIES, Slot, TableId};
use super::iter::Step;
use super::removal::ExternalOp;
use super::spte;
use crate::bugs::Check;
use crate::trace::Event;

/// How far one unit reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// One entry, as the kernel does it.
    One,
    /// Every missing table of the path, and leaves of one leaf table.
    Chain,
}

/// What begin found.
pub(crate) enum Begin<'m> {
    /// A leaf is there.
    Mapped { spte: u64 },
    /// An entry of the path is frozen: somebody's change is in flight.
    Frozen,
    /// Somebody else was faster.
    Lost,
    /// No table or no page for the module was left.
    NoMemory,
    /// Entries are held; the module is next.
    Held(Unit<'m>),
}

/// A table that was built and waits for TDH.MEM.SEPT.ADD.
#[derive(Debug, Clone, Copy)]
struct Link {
    table: TableId,
    external: Pfn,
    gfn: Gfn,
    /// Level of the entry that will point to it.
    level: Level,
}

/// A leaf that waits for its call.
#[derive(Debug, Clone, Copy)]
struct Leaf {
    gfn: Gfn,
    spte: u64,
}

/// Entries held at FROZEN, and what the module must confirm.
#[must_use = "settle it with the module's answer"]
pub(crate) struct Unit<'m> {
    mmu: &'m Mmu,
    /// The frozen entry above the chain; none when the leaf table is linked already.
    top: Option<Slot>,
    chain: Vec<Link>,
    leaf_table: Option<TableId>,
    /// First frame that the leaf table covers, or would.
    base: Gfn,
    leaves: Vec<Leaf>,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Held,
    Sent,
    Settled,
}

impl Mmu {
    /// Walks to `gfn` and holds what is missing. `leaf` is the SPTE to install.
    pub(crate) fn begin(&self, root: TableId, gfn: Gfn, leaf: u64, depth: Depth) -> Begin<'_> {
        self.check_mappable(root);
        if !self.walkable(gfn) {
            return Begin::Lost;
        }
        let mut table = root;
        let mut level = self.arena.level(root);
        loop {
            let slot = self.slot(table, level, gfn, 0);
            let step = Step {
                slot,
                level,
                spte: self.read(slot),
            };
            if step.spte == spte::FROZEN {
                return Begin::Frozen;
            }
            let Some(child) = level.child() else {
                return self.begin_leaf(&step, gfn, leaf);
            };
            if spte::is_leaf(step.spte, level) {
                self.bugs
                    .bug(Check::B16, || format!("huge mirror leaf above {gfn}"));
                return Begin::Lost;
            }
            if !spte::is_present(step.spte) {
                return self.begin_chain(&step, gfn, leaf, depth);
            }
            match TableId::linked_by(step.spte) {
                Some(linked) => (level, table) = (child, linked),
                None => return Begin::Lost,
            }
        }
    }

    /// The tracepoint kvm_mmu_spte_requested of a private frame.
    pub(crate) fn trace_private_request(&self, gfn: Gfn, page: Pfn) {
        self.tracer.emit(|| Event::SpteRequested {
            gfn,
            pfn: page.get(),
            level: Level::L4K,
        });
    }

    fn begin_leaf(&self, step: &Step, gfn: Gfn, leaf: u64) -> Begin<'_> {
        if spte::is_present(step.spte) {
            return Begin::Mapped { spte: step.spte };
        }
        if self.freeze(step, gfn, leaf).is_err() {
            return Begin::Lost;
        }
        Begin::Held(Unit {
            mmu: self,
            top: None,
            chain: Vec::new(),
            leaf_table: Some(step.slot.table),
            base: gfn.align_down(ENTRIES as u64),
            leaves: vec![Leaf { gfn, spte: leaf }],
            phase: Phase::Held,
        })
    }

    fn begin_chain(&self, step: &Step, gfn: Gfn, leaf: u64, depth: Depth) -> Begin<'_> {
        let Some(chain) = self.build_chain(step, gfn, depth) else {
            return Begin::NoMemory;
        };
        let first = spte::nonleaf(chain[0].table.hpa());
        if self.freeze(step, chain[0].gfn, first).is_err() {
            self.trace_get_page(chain[0].table);
            self.free_links(&chain);
            return Begin::Lost;
        }
        let last = chain[chain.len() - 1];
        let complete = last.level == Level::L2M && depth == Depth::Chain;
        let mut unit = Unit {
            mmu: self,
            top: Some(step.slot),
            chain,
            leaf_table: complete.then_some(last.table),
            base: gfn.align_down(ENTRIES as u64),
            leaves: Vec::new(),
            phase: Phase::Held,
        };
        if complete {
            let _ = unit.extend(gfn, leaf);
        }
        Begin::Held(unit)
    }

    /// Builds the missing tables from the entry of `step` down; at least one.
    fn build_chain(&self, step: &Step, gfn: Gfn, depth: Depth) -> Option<Vec<Link>> {
        let mut chain: Vec<Link> = Vec::with_capacity(4);
        let mut role = self.arena.header(step.slot.table).role();
        let mut level = step.level;
        loop {
            role = role.child();
            let base = gfn.align_down(level.pages());
            let link = self.take_external().and_then(|external| {
                match self.arena.alloc(role, base, Some(external)) {
                    Some(table) => Some(Link {
                        table,
                        external,
                        gfn: base,
                        level,
                    }),
                    None => {
                        self.give_external(external);
                        None
                    }
                }
            });
            let Some(link) = link else {
                self.free_links(&chain);
                return None;
            };
            if let Some(parent) = chain.last() {
                let slot = self.slot(parent.table, level, gfn, 0);
                self.store(slot, spte::nonleaf(link.table.hpa()));
            }
            chain.push(link);
            match level.child() {
                Some(child) if child > Level::L4K && depth == Depth::Chain => level = child,
                _ => return Some(chain),
            }
        }
    }

    fn free_links(&self, links: &[Link]) {
        for link in links {
            self.arena.free(link.table);
            self.give_external(link.external);
        }
    }
}

/// What became of an attempt to add a leaf to a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extended {
    Added,
    Mapped {
        spte: u64,
    },
    Frozen,
    /// The frame is in another leaf table.
    Outside,
}

impl Unit<'_> {
    /// First frame of the leaf table.
    pub(crate) fn gfn(&self) -> Gfn {
        self.base
    }

    /// Whether the leaf table covers a frame.
    pub(crate) fn covers(&self, gfn: Gfn) -> bool {
        gfn.align_down(ENTRIES as u64) == self.base
    }

    /// Adds a leaf of the same leaf table.
    pub(crate) fn extend(&mut self, gfn: Gfn, leaf: u64) -> Extended {
        let Some(table) = self.leaf_table else {
            return Extended::Outside;
        };
        if !self.covers(gfn) || self.leaves.len() == ENTRIES {
            return Extended::Outside;
        }
        let slot = self.mmu.slot(table, Level::L4K, gfn, 0);
        let found = self.mmu.read(slot);
        if self.chain.is_empty() {
            let step = Step {
                slot,
                level: Level::L4K,
                spte: found,
            };
            if found == spte::FROZEN {
                return Extended::Frozen;
            }
            if spte::is_present(found) {
                return Extended::Mapped { spte: found };
            }
            if self.mmu.freeze(&step, gfn, leaf).is_err() {
                return Extended::Frozen;
            }
        } else if found != spte::NP {
            // Nobody but this unit can reach the table: the frame is in it already.
            return Extended::Frozen;
        } else {
            self.mmu.store(slot, leaf);
        }
        self.leaves.push(Leaf { gfn, spte: leaf });
        Extended::Added
    }

    /// How many tables the module must link.
    pub(crate) fn links(&self) -> usize {
        self.chain.len()
    }

    /// How many leaves it must set.
    pub(crate) fn leaves(&self) -> usize {
        self.leaves.len()
    }

    /// What the module must do, in order.
    pub(crate) fn ops(&self) -> impl Iterator<Item = ExternalOp> + '_ {
        let links = self.chain.iter().map(|link| {
            self.mmu
                .external_op(link.gfn, link.level, spte::nonleaf(link.table.hpa()))
        });
        let leaves = self.leaves.iter().map(|leaf| ExternalOp::SetSpte {
            gfn: leaf.gfn,
            level: Level::L4K,
            spte: leaf.spte,
        });
        links.chain(leaves)
    }

    /// From here on only the module's answer may decide: the calls are on their way.
    pub(crate) fn sent(&mut self) {
        self.phase = Phase::Sent;
    }

    /// Publishes the first `links` tables and, when all are, the first `leaves` leaves. Restores
    /// the rest. Returns how many leaves were published.
    pub(crate) fn settle(mut self, links: usize, leaves: usize) -> usize {
        self.settle_in_place(links, leaves)
    }

    fn settle_in_place(&mut self, links: usize, leaves: usize) -> usize {
        self.phase = Phase::Settled;
        let mmu = self.mmu;
        let links = links.min(self.chain.len());
        let leaves = if links == self.chain.len() {
            leaves.min(self.leaves.len())
        } else {
            0
        };
        // Leaves of a private leaf table hold their value already, the others are FROZEN.
        let confirmed = if self.chain.is_empty() { leaves } else { 0 };
        let table_survives = links == self.chain.len();
        for (at, leaf) in self.leaves.iter().enumerate() {
            let Some(table) = self.leaf_table.filter(|_| table_survives) else {
                break;
            };
            let slot = mmu.slot(table, Level::L4K, leaf.gfn, 0);
            if at < confirmed {
                mmu.store(slot, leaf.spte);
            } else if at >= leaves {
                mmu.store(slot, spte::NP);
            }
        }
        self.settle_chain(links);
        // What handle_changed_spte does of a leaf where there was nothing, for all at once.
        if leaves > 0 {
            mmu.account_pages(Level::L4K, i64::try_from(leaves).unwrap_or(i64::MAX));
        }
        if mmu.tracer.is_on() {
            self.trace_leaves(leaves);
        }
        leaves
    }

    fn trace_leaves(&self, leaves: usize) {
        let Some(table) = self.leaf_table else { return };
        let mmu = self.mmu;
        for leaf in &self.leaves[..leaves] {
            mmu.tracer.emit(|| Event::SpteChanged {
                gfn: leaf.gfn,
                level: Level::L4K,
                old_spte: spte::NP,
                new_spte: leaf.spte,
            });
            mmu.tracer.emit(|| Event::SetSpte {
                gfn: leaf.gfn,
                spte: leaf.spte,
                level: Level::L4K,
                sptep: mmu.slot(table, Level::L4K, leaf.gfn, 0).hpa(),
            });
        }
    }

    /// The kernel makes a table, links it, makes the next: also one whose link then fails.
    fn trace_links(&self, links: usize) {
        for (at, link) in self.chain.iter().enumerate().take(links + 1) {
            self.mmu.trace_get_page(link.table);
            if at < links {
                self.mmu.tracer.emit(|| Event::SpteChanged {
                    gfn: link.gfn,
                    level: link.level,
                    old_spte: spte::NP,
                    new_spte: spte::nonleaf(link.table.hpa()),
                });
            }
        }
    }

    /// Publishes the first `links` tables of the chain and frees the others.
    fn settle_chain(&mut self, links: usize) {
        let Some(top) = self.top else { return };
        let mmu = self.mmu;
        if links > 0 && links < self.chain.len() {
            let (parent, lost) = (self.chain[links - 1], self.chain[links]);
            mmu.store(mmu.slot(parent.table, lost.level, lost.gfn, 0), spte::NP);
        }
        if mmu.tracer.is_on() {
            self.trace_links(links);
        }
        let value = if links > 0 {
            spte::nonleaf(self.chain[0].table.hpa())
        } else {
            spte::NP
        };
        mmu.free_links(&self.chain[links..]);
        mmu.store(top, value);
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        match self.phase {
            Phase::Held => {
                self.settle_in_place(0, 0);
            }
            Phase::Sent => self.mmu.bugs.bug(Check::Unsettled, || {
                "a change on its way to the module was dropped before it was settled".into()
            }),
            Phase::Settled => {}
        }
    }
}

#[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
pub(crate) mod tests;
