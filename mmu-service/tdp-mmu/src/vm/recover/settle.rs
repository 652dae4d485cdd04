//! Leaves of the private tree that are not as KVM would have them.

use std::collections::{BTreeMap, BTreeSet};

use tdx_defs::{Level, Pfn, PublicState};

use super::tree::publish;
use super::{Recovered, Recovery, note_or_warn};
use crate::bugs::Check;
use crate::error::VmError;
use crate::host::BLOCK_PAGES;
use crate::ledger::Note;
use crate::mmu::arena::TableId;
use crate::tdx::calls;
use crate::tdx::remove::{Leaving, Removed};
use crate::tdx::seam::{Seam, Verdict};
use crate::vm::Vm;

/// Leaves that need settling, with whether they are blocked already.
#[derive(Default)]
pub(super) struct Misplaced {
    /// Blocked, in private frames of a slot: a removal that did not come to its end.
    pub(super) blocked: Vec<(Leaving, PublicState)>,
    /// In shared frames of a slot.
    pub(super) shared: Vec<(Leaving, bool)>,
    /// Where no guest_memfd is, or not with this page.
    pub(super) strangers: Vec<(Leaving, bool)>,
}

impl Recovery {
    /// Gives blocked pages back to the guest, and takes those away that it must not have.
    pub(super) fn settle(
        &self,
        seam: &mut Seam<'_>,
        vm: &Vm,
        root: TableId,
        misplaced: Misplaced,
        recovered: &mut Recovered,
    ) -> Result<(), VmError> {
        let Misplaced {
            blocked,
            shared,
            strangers,
        } = misplaced;
        let blocks = self.claim(strangers.iter().map(|(leaf, _)| leaf.pfn));
        if vm.mmu.bugs.is_dead() {
            // Without its slots nobody can tell what belongs where: all stays as it is.
            return Ok(());
        }
        let mut going: Vec<(Leaving, bool)> = shared;
        going.extend(&strangers);
        let hooks = vm.hooks();
        let (ready, open): (Vec<_>, Vec<_>) = going.into_iter().partition(|(_, blocked)| *blocked);
        let open: Vec<Leaving> = open.into_iter().map(|(leaf, _)| leaf).collect();
        let mut stuck = BTreeSet::new();
        hooks.block(seam, &open, &mut stuck)?;
        let first = (blocked.iter().map(|(leaf, _)| *leaf))
            .chain(ready.iter().map(|(leaf, _)| *leaf))
            .chain(open.iter().copied())
            .next();
        let Some(first) = first else { return Ok(()) };
        hooks.track(seam, first)?;
        let lost = self.unblock(seam, vm, root, &blocked)?;
        recovered.unblocked = (blocked.len() - lost.len()) as u64;
        recovered.leaves += recovered.unblocked;
        let count = open.len();
        let mut leaving = open;
        leaving.extend(ready.into_iter().map(|(leaf, _)| leaf));
        leaving.extend(lost);
        debug_assert!(stuck.iter().all(|&at| at < count));
        let mut removed = Removed::default();
        hooks.remove_blocked(seam, &leaving, stuck, &mut removed)?;
        recovered.removed = (leaving.len() - removed.kept.len()) as u64;
        let kept: BTreeSet<Pfn> = removed.kept.iter().map(|leaf| leaf.pfn).collect();
        for leaf in &removed.kept {
            note_or_warn(vm, Note::Kept(leaf.pfn));
            vm.leak(leaf.gfn);
        }
        for block in blocks {
            if kept
                .range(block..block.offset(BLOCK_PAGES))
                .next()
                .is_none()
            {
                vm.host.memory.free_block(block);
            }
        }
        Ok(())
    }

    /// Takes the blocks of pages that no file has, so that they are not handed out meanwhile.
    fn claim(&self, pages: impl Iterator<Item = Pfn>) -> Vec<Pfn> {
        let mut blocks = BTreeMap::new();
        for page in pages {
            let block = page.align_down(BLOCK_PAGES);
            blocks
                .entry(block)
                .or_insert_with(|| self.host.memory.reserve(block));
        }
        let ours = blocks.into_iter().filter(|(_, reserved)| *reserved);
        ours.map(|(block, _)| block).collect()
    }

    /// TDH.MEM.RANGE.UNBLOCK. Model: KVM never makes this call; a process that comes after another
    /// is the one that cannot know how the removal was to go on. Answers those that stay blocked.
    fn unblock(
        &self,
        seam: &mut Seam<'_>,
        vm: &Vm,
        root: TableId,
        blocked: &[(Leaving, PublicState)],
    ) -> Result<Vec<Leaving>, VmError> {
        let steps: Vec<_> = blocked
            .iter()
            .map(|(leaf, _)| calls::mem_range_unblock(vm.td.tdr(), leaf.gfn, Level::L4K))
            .collect();
        let mut lost = BTreeSet::new();
        let mut busy = 0;
        seam.script(&steps, &mut |_, at, result| {
            if result.status().is_busy() && busy < super::BUSY_TRIES {
                busy += 1;
                return Verdict::Again;
            }
            lost.insert(at);
            Verdict::Next
        })?;
        let mut leaving = Vec::new();
        for (at, &(leaf, state)) in blocked.iter().enumerate() {
            if lost.contains(&at) {
                leaving.push(leaf);
                continue;
            }
            match vm.mmu.last(root, leaf.gfn) {
                Some(step) if step.level == Level::L4K => publish(vm, step.slot, leaf, state),
                _ => vm.mmu.bugs.kill(Check::Unsettled, || {
                    format!("no mirror table covers {}", leaf.gfn)
                }),
            }
        }
        Ok(leaving)
    }
}
