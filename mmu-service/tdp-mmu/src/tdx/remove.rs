//! Taking private pages and tables away from the module.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_sept_remove_private_spte()`, `tdx_track()`,
//! `tdh_do_no_vcpus()`, `tdx_sept_free_private_spt()`.
//!
//! A leaf goes by BLOCK, TRACK, KICK, REMOVE and cache write-back. Mode `kernel` does that page
//! by page. Mode `batched` blocks a chunk, tracks once, kicks once, then removes: legal because
//! one TRACK and one round of exits serve every block made before them.
//!
//! | failing call | effect |
//! |---|---|
//! | BLOCK, busy twice or other error | VM bugged, the page stays mapped in the private tree |
//! | TRACK | VM bugged, goes on |
//! | REMOVE | VM bugged, the page stays blocked |
//! | cache write-back | VM bugged |
//!
//! A call whose answer was lost is looked up and, if need be, made again ([`lost`](super::lost)).

use std::collections::BTreeSet;
use std::ops::Range;

use tdx_defs::{CompletionStatus, Gfn, Leaf, Level, PageType, Pfn, SeamcallResult};

use super::calls::{self, Step};
use super::lost::{LOST_TRIES, Trace, page_type};
use super::seam::{Seam, Verdict, runs_of};
use super::td::Td;
use crate::bugs::{Bugs, Check};
use crate::counts::Counts;
use crate::mmu::removal::ExternalOp;
use crate::mmu::spte;
use crate::seam::SeamError;
use crate::vm::Mode;

/// A private leaf that goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leaving {
    pub(crate) gfn: Gfn,
    pub(crate) pfn: Pfn,
}

/// Everything the hooks need of a TD.
pub(crate) struct Hooks<'a> {
    pub(crate) td: &'a Td,
    pub(crate) bugs: &'a Bugs,
    pub(crate) hkid_shift: u32,
}

/// Which pages the module did not let go.
#[derive(Debug, Default)]
pub(crate) struct Removed {
    pub(crate) kept: Vec<Leaving>,
    /// Table pages that came back.
    pub(crate) tables: Vec<Pfn>,
    /// Table pages that did not.
    pub(crate) leaked_tables: u64,
}

impl Hooks<'_> {
    /// Carries out `ops` in order.
    pub(crate) fn apply(
        &self,
        seam: &mut Seam<'_>,
        ops: &[ExternalOp],
    ) -> Result<Removed, SeamError> {
        let mut removed = Removed::default();
        let mut leaves: Vec<Leaving> = Vec::new();
        let mut tables: Vec<Pfn> = Vec::new();
        for op in ops {
            match *op {
                ExternalOp::RemoveSpte { gfn, level, spte } => {
                    self.free_tables(seam, &std::mem::take(&mut tables), &mut removed)?;
                    if let Some(leaf) = self.removable(gfn, level, spte) {
                        leaves.push(leaf);
                    }
                }
                ExternalOp::FreeSpt { external, .. } => {
                    self.remove_leaves(seam, &std::mem::take(&mut leaves), &mut removed)?;
                    tables.extend(external);
                }
                // Installs go through `install`: they end with the module's answer.
                ExternalOp::LinkSpt { .. } | ExternalOp::SetSpte { .. } => {}
            }
        }
        self.remove_leaves(seam, &leaves, &mut removed)?;
        self.free_tables(seam, &tables, &mut removed)?;
        Ok(removed)
    }

    /// B30.
    fn removable(&self, gfn: Gfn, level: Level, old: u64) -> Option<Leaving> {
        if self.td.hkid().is_none() || level != Level::L4K {
            self.bugs.bug(Check::B30, || {
                format!(
                    "removal of {gfn} at level {level} with key id {:?}",
                    self.td.hkid()
                )
            });
            return None;
        }
        Some(Leaving {
            gfn,
            pfn: spte::pfn(old),
        })
    }

    /// remove_external_spte, for one leaf or a chunk of them.
    fn remove_leaves(
        &self,
        seam: &mut Seam<'_>,
        leaves: &[Leaving],
        removed: &mut Removed,
    ) -> Result<(), SeamError> {
        if leaves.is_empty() {
            return Ok(());
        }
        let tdr = self.td.tdr();
        let mut kept = BTreeSet::new();
        let track = leaves.len();
        // An error ends a message, so in one message TRACK comes only when the blocks are through.
        let together = self.td.is_runnable() && seam.mode == Mode::Batched;
        let mut blocks = runs(leaves);
        if together {
            blocks.push(track..track + 1);
        }
        let how = (true, Trace::Blocked);
        self.each(
            seam,
            leaves,
            &blocks,
            &mut kept,
            how,
            &|at| match leaves.get(at) {
                Some(leaf) => calls::mem_range_block(tdr, leaf.gfn, Level::L4K),
                None => calls::mem_track(tdr),
            },
        )?;
        kept.remove(&track);
        if kept.len() == leaves.len() {
            removed.kept.extend_from_slice(leaves);
            return Ok(());
        }
        if together {
            self.kick(&mut seam.counts);
        } else {
            self.track(seam, leaves[0])?;
        }
        self.remove_blocked(seam, leaves, kept, removed)
    }

    /// TDH.MEM.RANGE.BLOCK of leaves; those that stay as they are join `kept`.
    pub(crate) fn block(
        &self,
        seam: &mut Seam<'_>,
        leaves: &[Leaving],
        kept: &mut BTreeSet<usize>,
    ) -> Result<(), SeamError> {
        let tdr = self.td.tdr();
        let how = (true, Trace::Blocked);
        self.each(seam, leaves, &runs(leaves), kept, how, &|at| {
            calls::mem_range_block(tdr, leaves[at].gfn, Level::L4K)
        })
    }

    /// tdx_track, for `first` and whatever else was blocked before.
    pub(crate) fn track(&self, seam: &mut Seam<'_>, first: Leaving) -> Result<(), SeamError> {
        if !self.td.is_runnable() {
            return Ok(());
        }
        let tdr = self.td.tdr();
        let mut ignored = BTreeSet::new();
        let track = std::slice::from_ref(&(1..2));
        let how = (true, Trace::None);
        self.each(seam, &[first], track, &mut ignored, how, &|_| {
            calls::mem_track(tdr)
        })?;
        self.kick(&mut seam.counts);
        Ok(())
    }

    /// REMOVE and cache write-back of blocked leaves; those in `kept` are left out.
    pub(crate) fn remove_blocked(
        &self,
        seam: &mut Seam<'_>,
        leaves: &[Leaving],
        mut kept: BTreeSet<usize>,
        removed: &mut Removed,
    ) -> Result<(), SeamError> {
        let tdr = self.td.tdr();
        let runs = runs(leaves);
        let how = (true, Trace::Removed);
        self.each(seam, leaves, &runs, &mut kept, how, &|at| {
            calls::mem_page_remove(tdr, leaves[at].gfn, Level::L4K)
        })?;
        let hkid = self.td.hkid().unwrap_or(0);
        let mut unwritten = kept.clone();
        let how = (false, Trace::None);
        self.each(seam, leaves, &runs, &mut unwritten, how, &|at| {
            calls::phymem_page_wbinvd(leaves[at].pfn, hkid, self.hkid_shift)
        })?;
        removed.kept.extend(kept.into_iter().map(|at| leaves[at]));
        Ok(())
    }

    /// Makes the calls of `runs` but those in `out`, which those that fail for good join; ends when
    /// they all have. The calls are numbered as the leaves, frames and pages of a run are equally
    /// far apart, and a call beyond the leaves is TDH.MEM.TRACK. Where an answer is lost, `trace`
    /// tells for which leaves the call is still to be made.
    fn each(
        &self,
        seam: &mut Seam<'_>,
        leaves: &[Leaving],
        runs: &[Range<usize>],
        out: &mut BTreeSet<usize>,
        (retried, trace): (bool, Trace),
        call: &dyn Fn(usize) -> Step,
    ) -> Result<(), SeamError> {
        let mut pending = without(runs, out);
        let mut lost = 0;
        loop {
            match self.each_once(seam, leaves, pending.clone(), out, retried, call) {
                Err(SeamError::Unknown { .. }) if lost < LOST_TRIES => lost += 1,
                outcome => return outcome,
            }
            let mut left = Vec::new();
            for at in without(&pending, out).into_iter().flatten() {
                let made = match leaves.get(at) {
                    Some(leaf) => self.was_made(seam, leaf, trace)?,
                    // Once more does no harm, when every vCPU has been outside.
                    None => {
                        self.kick(&mut seam.counts);
                        false
                    }
                };
                if !made {
                    left.push(at..at + 1);
                }
            }
            pending = left;
        }
    }

    fn each_once(
        &self,
        seam: &mut Seam<'_>,
        leaves: &[Leaving],
        pending: Vec<Range<usize>>,
        out: &mut BTreeSet<usize>,
        retried: bool,
        call: &dyn Fn(usize) -> Step,
    ) -> Result<(), SeamError> {
        let mut retrying = None;
        let mut held = false;
        let outcome = seam.script_of(pending, call, &mut |counts, at, result| {
            // tdh_do_no_vcpus: once more, with every vCPU kept outside.
            if retried && result.status().is_busy() && retrying != Some(at) {
                retrying = Some(at);
                if !std::mem::replace(&mut held, true) {
                    self.td.modes.hold();
                }
                self.kick(counts);
                return Verdict::Again;
            }
            let leaf = leaves.get(at).unwrap_or(&leaves[0]);
            self.failed(call(at).leaf, leaf.gfn, result);
            out.insert(at);
            match out.len() < leaves.len() {
                true => Verdict::Next,
                false => Verdict::Stop,
            }
        });
        if held {
            self.td.modes.release();
        }
        outcome
    }

    /// KVM_REQ_OUTSIDE_GUEST_MODE to every vCPU.
    fn kick(&self, counts: &mut Counts) {
        counts.kicks += 1;
        self.td.modes.kick();
    }

    fn failed(&self, leaf: Leaf, gfn: Gfn, result: &SeamcallResult) {
        self.bugs.bug(Check::Seamcall, || {
            format!(
                "SEAMCALL {leaf} failed at {gfn}: {} entry {:#x} level_state {:#x}",
                result.status(),
                result.rcx,
                result.rdx
            )
        });
    }

    /// free_external_spt: TDH.PHYMEM.PAGE.RECLAIM of each table page.
    fn free_tables(
        &self,
        seam: &mut Seam<'_>,
        tables: &[Pfn],
        removed: &mut Removed,
    ) -> Result<(), SeamError> {
        if tables.is_empty() {
            return Ok(());
        }
        if self.td.hkid().is_some() {
            self.bugs.bug(Check::B31, || {
                "private table freed while a key id is assigned".into()
            });
            self.bugs
                .warn(Check::B14, || format!("{} tables leaked", tables.len()));
            removed.leaked_tables += tables.len() as u64;
            return Ok(());
        }
        let leaked = reclaim(seam, tables)?;
        if !leaked.is_empty() {
            self.bugs
                .warn(Check::B14, || format!("{} tables leaked", leaked.len()));
        }
        removed.leaked_tables += leaked.len() as u64;
        removed
            .tables
            .extend(tables.iter().filter(|page| !leaked.contains(page)));
        Ok(())
    }
}

/// The leaves as runs whose frames and pages are equally far apart.
fn runs(leaves: &[Leaving]) -> Vec<Range<usize>> {
    let stride = |from: &Leaving, to: &Leaving| {
        let gfns = to.gfn.get().wrapping_sub(from.gfn.get());
        (gfns, to.pfn.get().wrapping_sub(from.pfn.get()))
    };
    runs_of(leaves.len(), |first, at| {
        stride(&leaves[first], &leaves[first + 1]) == stride(&leaves[at - 1], &leaves[at])
    })
}

/// `runs` without the members of `out`.
fn without(runs: &[Range<usize>], out: &BTreeSet<usize>) -> Vec<Range<usize>> {
    let mut rest = Vec::with_capacity(runs.len());
    for run in runs {
        let mut from = run.start;
        for &at in out.range(run.clone()) {
            if from < at {
                rest.push(from..at);
            }
            from = at + 1;
        }
        if from < run.end {
            rest.push(from..run.end);
        }
    }
    rest
}

/// TDH.PHYMEM.PAGE.RECLAIM of each page, in order; the pages that did not come back.
pub(crate) fn reclaim(seam: &mut Seam<'_>, pages: &[Pfn]) -> Result<BTreeSet<Pfn>, SeamError> {
    let mut leaked = BTreeSet::new();
    let mut left = pages.to_vec();
    let mut lost = 0;
    loop {
        match reclaim_once(seam, &left, &mut leaked) {
            Err(SeamError::Unknown { .. }) if lost < LOST_TRIES => lost += 1,
            outcome => return outcome.map(|()| leaked),
        }
        // A page that came back is nobody's.
        let mut still = Vec::new();
        for page in left {
            if !leaked.contains(&page) && page_type(seam, page)? != PageType::NDA {
                still.push(page);
            }
        }
        left = still;
    }
}

fn reclaim_once(
    seam: &mut Seam<'_>,
    pages: &[Pfn],
    leaked: &mut BTreeSet<Pfn>,
) -> Result<(), SeamError> {
    let steps: Vec<Step> = pages
        .iter()
        .map(|&page| calls::phymem_page_reclaim(page))
        .collect();
    let mut retrying = None;
    seam.script(&steps, &mut |_, at, result| {
        // Model: the kernel gives the page up at once. Another operation of this host may hold the
        // owner for a moment, and once more is enough.
        if result.status().is(CompletionStatus::OPERAND_BUSY) && retrying != Some(at) {
            retrying = Some(at);
            return Verdict::Again;
        }
        leaked.insert(pages[at]);
        Verdict::Next
    })
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn runs_lose_exactly_what_is_out() {
        for (out, rest) in [
            (vec![], vec![0..4, 4..5, 5..9]),
            (vec![0, 4, 8], vec![1..4, 5..8]),
            (vec![1, 2], vec![0..1, 3..4, 4..5, 5..9]),
            ((0..9).collect(), vec![]),
        ] {
            let set = out.iter().copied().collect();
            assert_eq!(without(&[0..4, 4..5, 5..9], &set), rest, "{out:?}");
        }
    }
}
