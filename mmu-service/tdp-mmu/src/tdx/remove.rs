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

use tdx_defs::{CompletionStatus, Gfn, Leaf, Level, PageType, Pfn, SeamcallResult};

use super::calls::{self, Step};
use super::lost::{LOST_TRIES, Trace, page_type};
use super::seam::{Seam, Verdict};
use super::td::Td;
use crate::bugs::{Bugs, Check};
use crate::counts::Counts;
use crate::mmu::removal::ExternalOp;
use crate::mmu::spte;
use crate::seam::SeamError;

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
        self.each(seam, leaves, &mut kept, (true, Trace::Blocked), &|leaf| {
            calls::mem_range_block(tdr, leaf.gfn, Level::L4K)
        })?;
        if kept.len() == leaves.len() {
            removed.kept.extend_from_slice(leaves);
            return Ok(());
        }
        self.track(seam, leaves[0])?;
        self.remove_blocked(seam, leaves, kept, removed)
    }

    /// tdx_track, for `first` and whatever else was blocked before.
    pub(crate) fn track(&self, seam: &mut Seam<'_>, first: Leaving) -> Result<(), SeamError> {
        if !self.td.is_runnable() {
            return Ok(());
        }
        let tdr = self.td.tdr();
        let mut lost = 0;
        loop {
            let mut ignored = BTreeSet::new();
            let tracked = self.each_once(seam, &[first], &[0], &mut ignored, true, &|_| {
                calls::mem_track(tdr)
            });
            self.kick(&mut seam.counts);
            match tracked {
                // Once more does no harm, now that every vCPU has been outside.
                Err(SeamError::Unknown { .. }) if lost < LOST_TRIES => lost += 1,
                outcome => return outcome,
            }
        }
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
        self.each(seam, leaves, &mut kept, (true, Trace::Removed), &|leaf| {
            calls::mem_page_remove(tdr, leaf.gfn, Level::L4K)
        })?;
        let hkid = self.td.hkid().unwrap_or(0);
        let mut unwritten = kept.clone();
        self.each(
            seam,
            leaves,
            &mut unwritten,
            (false, Trace::None),
            &|leaf| calls::phymem_page_wbinvd(leaf.pfn, hkid, self.hkid_shift),
        )?;
        removed.kept.extend(kept.into_iter().map(|at| leaves[at]));
        Ok(())
    }

    /// Makes one call for each leaf that is not in `out`; those that fail for good join it. Where
    /// an answer is lost, `trace` tells for which leaves the call is still to be made.
    pub(crate) fn each(
        &self,
        seam: &mut Seam<'_>,
        leaves: &[Leaving],
        out: &mut BTreeSet<usize>,
        (retried, trace): (bool, Trace),
        call: &dyn Fn(&Leaving) -> Step,
    ) -> Result<(), SeamError> {
        let mut on: Vec<usize> = (0..leaves.len()).filter(|at| !out.contains(at)).collect();
        let mut lost = 0;
        loop {
            match self.each_once(seam, leaves, &on, out, retried, call) {
                Err(SeamError::Unknown { .. }) if lost < LOST_TRIES => lost += 1,
                outcome => return outcome,
            }
            let mut left = Vec::new();
            for at in on {
                if !out.contains(&at) && !self.was_made(seam, &leaves[at], trace)? {
                    left.push(at);
                }
            }
            on = left;
        }
    }

    fn each_once(
        &self,
        seam: &mut Seam<'_>,
        leaves: &[Leaving],
        on: &[usize],
        out: &mut BTreeSet<usize>,
        retried: bool,
        call: &dyn Fn(&Leaving) -> Step,
    ) -> Result<(), SeamError> {
        let steps: Vec<Step> = on.iter().map(|&at| call(&leaves[at])).collect();
        let mut retrying = None;
        let mut held = false;
        let outcome = seam.script(&steps, &mut |counts, at, result| {
            // tdh_do_no_vcpus: once more, with every vCPU kept outside.
            if retried && result.status().is_busy() && retrying != Some(at) {
                retrying = Some(at);
                if !std::mem::replace(&mut held, true) {
                    self.td.modes.hold();
                }
                self.kick(counts);
                return Verdict::Again;
            }
            self.failed(steps[at].leaf, leaves[on[at]].gfn, result);
            out.insert(on[at]);
            Verdict::Next
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
