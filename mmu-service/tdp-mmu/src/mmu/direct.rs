//! Building on the direct root.
//!
//! Source: `kvm_tdp_mmu_map()`, `tdp_mmu_map_handle_target_level()`, `tdp_mmu_link_sp()`,
//! tdp_mmu.c; `kvm_mmu_hugepage_adjust()`, `disallowed_hugepage_adjust()`, mmu.c. A mirror root
//! is never touched. Pages of a huge mapping are naturally aligned, so the page of a leaf follows
//! from the page of the faulting frame at whatever level the walk ends.

use tdx_defs::{Gfn, Level, Pfn};

use super::Mmu;
use super::arena::TableId;
use super::iter::Step;
use super::spte::{self, Access, DirectTraits, LeafTraits};
use crate::bugs::Check;
use crate::sync::atomic::Ordering;
use crate::trace::Event;

/// KVM_PFN_NOSLOT, as tracepoints show it.
const PFN_NOSLOT: u64 = 1 << 63;

/// What a fault wants behind its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The page of the faulting frame.
    Page { pfn: Pfn, map_writable: bool },
    /// No slot: an entry that remembers it.
    Mmio { spte: u64 },
}

/// A fault on the direct root, resolved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirectFault {
    pub(crate) gfn: Gfn,
    pub(crate) access: Access,
    pub(crate) prefetch: bool,
    /// Largest level that slot and host allow; the NX mitigation may demand a lower one.
    pub(crate) req_level: Level,
    pub(crate) target: Target,
    pub(crate) traits: DirectTraits,
}

/// What an install came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installed {
    Fixed,
    Spurious,
    Retry,
    NoMemory,
    /// A write that somebody tracks.
    WriteProtected,
    /// An MMIO entry is there now.
    Mmio,
}

/// How a fault on the direct root ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) installed: Installed,
    pub(crate) level: Level,
    /// The entry that was made for it, if one was.
    pub(crate) spte: Option<u64>,
    /// The range of the leaf must be flushed.
    pub(crate) flush: bool,
}

impl Mapped {
    fn nothing(installed: Installed, level: Level) -> Self {
        Self {
            installed,
            level,
            spte: None,
            flush: false,
        }
    }
}

impl DirectFault {
    /// huge_page_disallowed: the guest executes, and huge pages must not be executable.
    fn huge_disallowed(&self) -> bool {
        self.access.exec && self.traits.nx_huge_pages
    }

    fn goal(&self) -> Level {
        match self.target {
            Target::Page { .. } if !self.huge_disallowed() => self.req_level,
            _ => Level::L4K,
        }
    }

    /// The entry to install at `level`.
    fn spte(&self, level: Level) -> u64 {
        match self.target {
            Target::Mmio { spte } => spte,
            Target::Page { pfn, map_writable } => {
                let traits = LeafTraits {
                    map_writable,
                    prefetch: self.prefetch,
                };
                spte::leaf(level, pfn.align_down(level.pages()), traits, self.traits)
            }
        }
    }
}

impl Mmu {
    /// kvm_tdp_mmu_map on a direct root. The caller holds mmu_lock.
    pub(crate) fn map_direct(&self, root: TableId, fault: &DirectFault) -> Mapped {
        let mut goal = fault.goal();
        self.tracer.emit(|| Event::SpteRequested {
            gfn: fault.gfn,
            pfn: match fault.target {
                Target::Page { pfn, .. } => pfn.get(),
                Target::Mmio { .. } => PFN_NOSLOT,
            },
            level: goal,
        });
        self.check_mappable(root);
        if !self.walkable(fault.gfn) {
            return Mapped::nothing(Installed::Retry, goal);
        }
        let root_bits = self.root_bits(root);
        let mut table = root;
        let mut level = self.arena.level(root);
        loop {
            let slot = self.slot(table, level, fault.gfn, root_bits);
            let step = Step {
                slot,
                level,
                spte: self.read(slot),
            };
            if fault.traits.nx_huge_pages {
                goal = self.lower_goal(&step, goal);
            }
            if step.spte == spte::FROZEN {
                return Mapped::nothing(Installed::Retry, level);
            }
            if level == goal {
                return self.install(&step, fault, goal);
            }
            let linked = if spte::is_table(step.spte, level) {
                TableId::linked_by(step.spte)
            } else {
                match self.build_below(&step, fault) {
                    Ok(linked) => Some(linked),
                    Err(installed) => return Mapped::nothing(installed, level),
                }
            };
            match linked.zip(level.child()) {
                Some((linked, child)) => (level, table) = (child, linked),
                None => {
                    self.check_stopped(fault.gfn, level, goal);
                    return Mapped::nothing(Installed::Retry, level);
                }
            }
        }
    }

    /// A walk that gives up has not reached its goal: there it would have installed (B18).
    fn check_stopped(&self, gfn: Gfn, level: Level, goal: Level) {
        if level == goal {
            self.bugs.warn(Check::B18, || {
                format!("the walk to {gfn} stopped at its goal, level {goal}")
            });
        }
    }

    /// disallowed_hugepage_adjust: a table that stands for a huge page the mitigation took apart
    /// stays, and the walk goes one level further down.
    fn lower_goal(&self, step: &Step, goal: Level) -> Level {
        let kept = step.level == goal
            && spte::is_table(step.spte, step.level)
            && TableId::linked_by(step.spte).is_some_and(|table| {
                let header = self.arena.header(table);
                header.nx_disallowed.load(Ordering::Acquire)
            });
        match goal.child() {
            Some(child) if kept => child,
            _ => goal,
        }
    }

    /// Makes the table below an entry that has none: new, or out of a huge leaf.
    fn build_below(&self, step: &Step, fault: &DirectFault) -> Result<TableId, Installed> {
        let base = fault.gfn.align_down(step.level.pages());
        let table = self.child_table(step, base).ok_or(Installed::NoMemory)?;
        let disallowed = fault.huge_disallowed();
        let header = self.arena.header(table);
        header.nx_disallowed.store(disallowed, Ordering::Release);
        let linked = if spte::is_present(step.spte) {
            self.split_huge(step, base, table)
        } else {
            self.set_direct_atomic(step, base, spte::nonleaf(table.hpa()))
        };
        if linked.is_err() {
            self.arena.free(table);
            return Err(Installed::Retry);
        }
        if disallowed && fault.req_level >= step.level {
            self.track_nx(table);
        }
        Ok(table)
    }

    /// tdp_mmu_alloc_sp and tdp_mmu_init_child_sp: an empty table for the entry.
    pub(crate) fn child_table(&self, step: &Step, base: Gfn) -> Option<TableId> {
        let role = self.arena.header(step.slot.table).role().child();
        let table = self.arena.alloc(role, base, None)?;
        self.arena.header(table).set_parent(step.slot);
        self.trace_get_page(table);
        Some(table)
    }

    /// tdp_mmu_map_handle_target_level.
    fn install(&self, step: &Step, fault: &DirectFault, goal: Level) -> Mapped {
        let (old, level) = (step.spte, step.level);
        let page_level = self.arena.level(step.slot.table);
        if page_level != goal {
            self.bugs.warn(Check::B19, || {
                format!("leaf of level {goal} for a table of level {page_level}")
            });
            return Mapped::nothing(Installed::Retry, level);
        }
        let base = fault.gfn.align_down(level.pages());
        let answered = fault.prefetch || fault.access.allowed_by(old);
        if spte::is_leaf(old, level) && answered {
            return Mapped::nothing(Installed::Spurious, level);
        }
        let new = fault.spte(level);
        let mut mapped = Mapped {
            installed: Installed::Fixed,
            level,
            spte: Some(new),
            flush: false,
        };
        if old == new {
            mapped.installed = Installed::Spurious;
        } else if self.set_direct_atomic(step, base, new).is_err() {
            return Mapped::nothing(Installed::Retry, level);
        } else if spte::is_present(old) {
            mapped.flush = spte::is_table(old, level) || spte::needs_flush(old, new);
        }
        if fault.traits.write_tracked && fault.access.write {
            mapped.installed = Installed::WriteProtected;
        }
        let sptep = step.slot.hpa();
        if spte::is_mmio(new) {
            mapped.installed = Installed::Mmio;
            self.tracer.emit(|| Event::MarkMmioSpte {
                sptep,
                gfn: base,
                access: new & 7,
                generation: spte::mmio_generation(new),
            });
        } else {
            self.tracer.emit(|| Event::SetSpte {
                gfn: base,
                spte: new,
                level,
                sptep,
            });
        }
        mapped
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::mmu::role::RootKind;
    use crate::mmu::roots::RootTypes;
    use tdx_defs::{GpaLayout, Gpaw};

    const FAULT: DirectFault = DirectFault {
        gfn: Gfn::new(5),
        access: Access {
            write: true,
            exec: false,
        },
        prefetch: false,
        req_level: Level::L4K,
        target: Target::Page {
            pfn: Pfn::new(7),
            map_writable: true,
        },
        traits: DirectTraits {
            ignore_pat: false,
            nx_huge_pages: false,
            write_tracked: false,
        },
    };

    fn mmu() -> (Mmu, TableId) {
        let mmu = Mmu::new(GpaLayout::new(Gpaw::W48));
        let root = mmu.alloc_root(RootKind::Direct).unwrap();
        (mmu, root)
    }

    fn checks(mmu: &Mmu) -> Vec<Check> {
        let reports = mmu.bugs.reports();
        reports.into_iter().map(|(check, _)| check).collect()
    }

    #[test]
    fn b17_a_fault_on_an_invalid_root_is_warned_about() {
        let (mmu, root) = mmu();
        mmu.invalidate_roots(RootTypes::DIRECT);
        let mapped = mmu.map_direct(root, &FAULT);
        assert_eq!(mapped.installed, Installed::Fixed, "the walk goes on");
        assert_eq!(checks(&mmu), [Check::B17]);
        assert!(!mmu.bugs.is_bugged());
    }

    #[test]
    fn b18_only_a_walk_that_stopped_at_its_goal_is_warned_about() {
        let (mmu, _) = mmu();
        mmu.check_stopped(FAULT.gfn, Level::L2M, Level::L4K);
        assert_eq!(checks(&mmu), []);
        mmu.check_stopped(FAULT.gfn, Level::L4K, Level::L4K);
        assert_eq!(checks(&mmu), [Check::B18]);
    }

    #[test]
    fn b19_a_leaf_goes_into_a_table_of_its_own_level() {
        let (mmu, root) = mmu();
        mmu.map_direct(root, &FAULT);
        let above = mmu.path(root, FAULT.gfn)[2];
        let mapped = mmu.install(&above, &FAULT, Level::L4K);
        assert_eq!(mapped.installed, Installed::Retry);
        assert_eq!(mmu.read(above.slot), above.spte, "unchanged");
        assert_eq!(checks(&mmu), [Check::B19]);
        let last = mmu.last(root, FAULT.gfn).unwrap();
        let mapped = mmu.install(&last, &FAULT, Level::L4K);
        assert_eq!(mapped.installed, Installed::Spurious);
        assert_eq!(checks(&mmu), [Check::B19], "no further one");
    }
}
