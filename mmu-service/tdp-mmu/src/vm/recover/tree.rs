//! The mirror, read back from the private tree, table by table from the root.

use std::collections::VecDeque;

use tdx_defs::{CompletionStatus, Gfn, Level, PageType, Pfn, PublicState, SeptView};

use super::settle::Misplaced;
use super::{Recovered, Recovery};
use crate::bugs::Check;
use crate::error::VmError;
use crate::mmu::arena::{ENTRIES, Slot, TableId};
use crate::mmu::role::RootKind;
use crate::mmu::spte::{self, LeafTraits};
use crate::sync::thread;
use crate::tdx::calls;
use crate::tdx::lifecycle::out_of_memory;
use crate::tdx::remove::Leaving;
use crate::tdx::seam::{InFlight, Seam};
use crate::vm::Vm;

/// Tables whose answers are under way.
const AHEAD: usize = 4;

/// A part of a table that is being read: entries from `first` on.
struct Asked {
    table: TableId,
    level: Level,
    base: Gfn,
    first: usize,
    entries: usize,
    flight: InFlight,
}

/// What was read.
#[derive(Default)]
pub(super) struct Tree {
    /// Tables below the root.
    pub(super) tables: Vec<TableId>,
    pub(super) misplaced: Misplaced,
    /// Something that KVM never builds.
    pub(super) odd: Option<String>,
}

impl Recovery {
    /// Makes the mirror of a TD and settles what does not belong there.
    pub(super) fn rebuild(
        &self,
        seam: &mut Seam<'_>,
        vm: &Vm,
        recovered: &mut Recovered,
    ) -> Result<(), VmError> {
        let root = vm.mmu.alloc_root(RootKind::Mirror);
        let root = root.ok_or_else(|| out_of_memory(&vm.host))?;
        let mut reading = Reading {
            vm,
            seam,
            tree: Tree::default(),
            leaves: 0,
            tries: 0,
        };
        let read = reading.read(root);
        let Reading { tree, leaves, .. } = reading;
        // The reference of the TDP MMU itself stays.
        vm.mmu.put_root(root);
        read?;
        recovered.tables = tree.tables.len() as u64;
        recovered.leaves = leaves;
        let table_pages: Vec<Pfn> = self.pages.of(PageType::EPT, vm.td.tdr()).collect();
        // Model: which of the TD's table pages stands for which table is not known and does not
        // matter. Tables go only with the VM, and then all of them in any order.
        for (&table, &page) in tree.tables.iter().zip(&table_pages) {
            vm.mmu.arena.header(table).set_external(Some(page));
        }
        let (tables, pages) = (tree.tables.len(), table_pages.len());
        let odd = tree.odd.clone().or_else(|| {
            let differs = tables != pages;
            differs.then(|| format!("{tables} private tables lie in {pages} known pages"))
        });
        if let Some(odd) = odd {
            vm.mmu.bugs.kill(Check::Unsettled, || odd);
        }
        self.settle(seam, vm, root, tree.misplaced, recovered)
    }
}

/// The reading of one private tree.
struct Reading<'r, 's> {
    vm: &'r Vm,
    seam: &'r mut Seam<'s>,
    tree: Tree,
    leaves: u64,
    /// Answers that said busy.
    tries: u32,
}

impl Reading<'_, '_> {
    fn read(&mut self, root: TableId) -> Result<(), VmError> {
        let root_level = self.vm.mmu.arena.level(root);
        let mut todo = VecDeque::from([(root, root_level, Gfn::new(0))]);
        let mut flights: VecDeque<Asked> = VecDeque::new();
        loop {
            while flights.len() <= AHEAD
                && let Some(next) = todo.pop_front()
            {
                let asked = self.ask(next, 0);
                flights.push_back(asked);
            }
            let Some(asked) = flights.pop_front() else {
                return Ok(());
            };
            let Asked {
                table,
                level,
                base,
                first,
                entries,
                flight,
            } = asked;
            let results = self.seam.wait(flight)?;
            let mut answered = 0;
            for (result, index) in results.iter().zip(first..) {
                if result.status().is_busy() && self.tries < super::BUSY_TRIES {
                    self.tries += 1;
                    thread::yield_now();
                    break;
                }
                answered += 1;
                let view = SeptView::from_regs(result.rcx, result.rdx)
                    .filter(|_| result.rax == CompletionStatus::SUCCESS.0);
                let gfn = base.offset(index as u64 * level.pages());
                match view {
                    Some(view) => {
                        let linked = self.take(Slot { table, index }, level, gfn, &view)?;
                        todo.extend(linked);
                    }
                    None => self.odd(|| {
                        format!(
                            "the private entry of {gfn} at level {level} cannot be read: {}",
                            result.status()
                        )
                    }),
                }
            }
            // An error ends a message: the rest of it is asked again.
            if answered < entries {
                let rest = self.ask((table, level, base), first + answered);
                flights.push_front(rest);
            }
        }
    }

    fn ask(&mut self, (table, level, base): (TableId, Level, Gfn), first: usize) -> Asked {
        let limit = self.vm.mmu.layout.gfn_limit();
        let tdr = self.vm.td.tdr();
        let frames = (first..ENTRIES).map(|index| base.offset(index as u64 * level.pages()));
        let reads: Vec<_> = frames
            .take_while(|gfn| gfn.get() < limit)
            .map(|gfn| calls::mem_sept_rd(tdr, gfn, level).into_seamcall())
            .collect();
        Asked {
            table,
            level,
            base,
            first,
            entries: reads.len(),
            flight: self.seam.submit(None, reads),
        }
    }

    /// One entry. Answers the table that it links.
    fn take(
        &mut self,
        slot: Slot,
        level: Level,
        gfn: Gfn,
        view: &SeptView,
    ) -> Result<Option<(TableId, Level, Gfn)>, VmError> {
        let (state, child) = (view.at.state, level.child());
        match (state, child, view.page) {
            (PublicState::FREE, ..) => {}
            (PublicState::NL_MAPPED, Some(child), _) => {
                let mmu = &self.vm.mmu;
                let role = mmu.arena.header(slot.table).role().child();
                let table = mmu.arena.alloc(role, gfn, None);
                let table = table.ok_or_else(|| out_of_memory(&self.vm.host))?;
                mmu.store(slot, spte::nonleaf(table.hpa()));
                self.tree.tables.push(table);
                return Ok(Some((table, child, gfn)));
            }
            (_, None, Some(pfn)) if state.is_leaf() => {
                self.take_leaf(slot, Leaving { gfn, pfn }, state)
            }
            _ => self.odd(|| {
                format!(
                    "the private entry of {gfn} at level {level} is {}, which KVM does not make",
                    state.name().unwrap_or("of no known state")
                )
            }),
        }
        Ok(None)
    }

    /// A page that the TD has: the guest's by right, or not.
    fn take_leaf(&mut self, at: Slot, leaf: Leaving, state: PublicState) {
        let is_blocked = [PublicState::BLOCKED, PublicState::PENDING_BLOCKED].contains(&state);
        let slot = self.vm.slots.find(leaf.gfn);
        let file = slot
            .as_ref()
            .and_then(|slot| slot.gmem.as_ref().zip(Some(slot)));
        let Some((file, slot)) =
            file.filter(|(file, slot)| file.adopt(slot.offset(leaf.gfn), leaf.pfn))
        else {
            self.tree.misplaced.strangers.push((leaf, is_blocked));
            return;
        };
        let _ = file;
        if !slot.is_private(leaf.gfn) {
            self.tree.misplaced.shared.push((leaf, is_blocked));
        } else if is_blocked {
            self.tree.misplaced.blocked.push((leaf, state));
        } else {
            publish(self.vm, at, leaf, state);
            self.leaves += 1;
        }
    }

    fn odd(&mut self, why: impl FnOnce() -> String) {
        if self.tree.odd.is_none() {
            self.tree.odd = Some(why());
        }
    }
}

/// The mirror leaf of a private page. The guest has used it if it has accepted it.
pub(super) fn publish(vm: &Vm, at: Slot, leaf: Leaving, state: PublicState) {
    let traits = LeafTraits {
        map_writable: true,
        prefetch: matches!(state, PublicState::PENDING | PublicState::PENDING_BLOCKED),
    };
    vm.mmu.store(at, spte::leaf_4k(leaf.pfn, traits));
    vm.mmu.account_pages(Level::L4K, 1);
}
