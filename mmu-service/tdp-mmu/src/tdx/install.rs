//! Handing tables and pages to the module.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_sept_link_private_spt()`,
//! `tdx_sept_set_private_spte()`, `tdx_mem_page_aug()`, `tdx_mem_page_add()`.
//!
//! Units become one message: SEPT.ADD for each missing table, then AUG (or, before finalisation,
//! ADD and its sixteen MR.EXTENDs) for the leaves. The answer settles each unit to exactly the
//! prefix that was confirmed. Busy means that the fault starts over; any other error bugs the VM;
//! an unknown outcome is read back with TDH.MEM.SEPT.RD and never guessed.

use bytes::Bytes;
use tdx_defs::{
    CompletionStatus, Gfn, Level, PAGE_SIZE, Pfn, PublicState, Repeat, SeamcallResult, SeptView,
};

use super::calls::{self, EXTEND_CHUNK, EXTENDS_A_PAGE, Step};
use super::remove::Hooks;
use super::seam::{InFlight, Seam, join};
use crate::bugs::Check;
use crate::mmu::mirror::Unit;
use crate::mmu::removal::ExternalOp;
use crate::mmu::spte;
use crate::seam::{Chain, MAX_CALLS, SeamError};
use crate::sync::thread;
use crate::vm::Mode;
use tdx_defs::Seamcall;

/// Contents of the initial image.
pub(crate) struct Source {
    /// Host page that the contents are read from (R9).
    pub(crate) page: Pfn,
    /// First frame of `data`.
    pub(crate) first: Gfn,
    /// Contents; short of a page means zeroes.
    pub(crate) data: Bytes,
    /// Whether to extend MRTD behind each page.
    pub(crate) measure: bool,
}

impl Source {
    fn page_of(&self, gfn: Gfn) -> Bytes {
        let size = self.data.len() as u64;
        let offset = (gfn.get() - self.first.get())
            .saturating_mul(PAGE_SIZE)
            .min(size);
        let end = offset.saturating_add(PAGE_SIZE).min(size);
        // Both are at most the length of the data.
        let at = |offset: u64| usize::try_from(offset).unwrap_or(self.data.len());
        self.data.slice(at(offset)..at(end))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Link,
    Leaf,
    Extend,
}

/// What a call of the message stands for.
#[derive(Debug, Clone, Copy)]
struct Tag {
    unit: usize,
    kind: Kind,
}

/// Units on their way.
pub(crate) struct Sent<'m> {
    units: Vec<Unit<'m>>,
    tags: Vec<Tag>,
    runs: Vec<u32>,
    /// None when the first hook refused already.
    flight: Option<InFlight>,
    measured: bool,
}

/// What became of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Confirmed {
    pub(crate) links: usize,
    pub(crate) leaves: usize,
}

/// What became of a message.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// One for each unit, in order.
    pub(crate) units: Vec<Confirmed>,
    /// The call that did not succeed.
    pub(crate) failed: Option<(tdx_defs::Leaf, SeamcallResult)>,
    /// Whether every table and every leaf was confirmed.
    pub(crate) complete: bool,
}

/// A hook answered −EIO without a call.
struct RefusedByHook;

impl Hooks<'_> {
    /// Sends units as one message.
    pub(crate) fn send<'m>(
        &self,
        seam: &mut Seam<'_>,
        units: Vec<Unit<'m>>,
        source: Option<&Source>,
    ) -> Sent<'m> {
        self.send_link(seam, None, units, source)
    }

    /// The same as a link of a chain of messages.
    pub(crate) fn send_link<'m>(
        &self,
        seam: &mut Seam<'_>,
        chain: Option<Chain>,
        mut units: Vec<Unit<'m>>,
        source: Option<&Source>,
    ) -> Sent<'m> {
        let mut calls: Vec<Seamcall> = Vec::new();
        let mut tags: Vec<Tag> = Vec::new();
        // A hook that refuses leaves the rest unasked; the answer then confirms no more than was.
        let _ = units
            .iter()
            .enumerate()
            .flat_map(|(at, unit)| unit.ops().map(move |op| (at, op)))
            .try_for_each(|(at, op)| {
                self.add_calls(seam.mode, at, op, source, &mut calls, &mut tags)
            });
        units.iter_mut().for_each(Unit::sent);
        debug_assert!(
            calls.len() <= MAX_CALLS,
            "{} calls in one message",
            calls.len()
        );
        let runs = calls.iter().map(Seamcall::count).collect();
        let measured = source.is_some_and(|source| source.measure);
        let flight = (!calls.is_empty()).then(|| seam.submit_link(None, chain, calls));
        Sent {
            units,
            tags,
            runs,
            flight,
            measured,
        }
    }

    /// Whether the hooks would call the module for all of `ops`.
    #[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
    pub(crate) fn would_call(&self, seam: &mut Seam<'_>, ops: &[ExternalOp]) -> bool {
        let (mut calls, mut tags) = (Vec::new(), Vec::new());
        ops.iter().all(|&op| {
            self.add_calls(seam.mode, 0, op, None, &mut calls, &mut tags)
                .is_ok()
        })
    }

    fn add_calls(
        &self,
        mode: Mode,
        unit: usize,
        op: ExternalOp,
        source: Option<&Source>,
        calls: &mut Vec<Seamcall>,
        tags: &mut Vec<Tag>,
    ) -> Result<(), RefusedByHook> {
        let (step, kind) = match op {
            ExternalOp::LinkSpt {
                gfn,
                level,
                external,
            } => {
                // Model: the kernel calls on without a page; B9 has bugged the VM already.
                let table = external.ok_or(RefusedByHook)?;
                (
                    calls::mem_sept_add(self.td.tdr(), gfn, level, table),
                    Kind::Link,
                )
            }
            ExternalOp::SetSpte { gfn, level, spte } => {
                (self.leaf_step(gfn, level, spte, source)?, Kind::Leaf)
            }
            ExternalOp::RemoveSpte { .. } | ExternalOp::FreeSpt { .. } => return Ok(()),
        };
        let tag = Tag { unit, kind };
        let joins = mode == Mode::Batched
            && kind == Kind::Leaf
            && tags
                .last()
                .is_some_and(|last| last.unit == unit && last.kind == kind);
        if joins && calls.last_mut().is_some_and(|run| join(run, &step)) {
            return Ok(());
        }
        let gpa = step.rcx;
        calls.push(step.into_seamcall());
        tags.push(tag);
        if kind == Kind::Leaf && mode == Mode::Batched && source.is_some_and(|s| s.measure) {
            let extends = Repeat {
                count: EXTENDS_A_PAGE,
                rcx_stride: EXTEND_CHUNK.cast_signed(),
                ..Repeat::default()
            };
            calls.push(
                calls::mr_extend(self.td.tdr(), gpa)
                    .into_seamcall()
                    .repeated(extends),
            );
            tags.push(Tag {
                unit,
                kind: Kind::Extend,
            });
        }
        Ok(())
    }

    /// set_external_spte: AUG on a runnable TD, ADD before.
    fn leaf_step(
        &self,
        gfn: Gfn,
        level: Level,
        spte: u64,
        source: Option<&Source>,
    ) -> Result<Step, RefusedByHook> {
        if level != Level::L4K {
            self.bugs.bug(Check::B27, || {
                format!("private leaf of {gfn} at level {level}")
            });
            return Err(RefusedByHook);
        }
        if !spte::is_private_leaf(spte) {
            self.bugs.warn(Check::B28, || {
                format!("private leaf of {gfn} is not present or not RWX: {spte:#x}")
            });
        }
        let page = spte::pfn(spte);
        if self.td.is_runnable() {
            return Ok(calls::mem_page_aug(self.td.tdr(), gfn, page));
        }
        let Some(source) = source else {
            self.bugs
                .bug(Check::B29, || format!("no source page for {gfn}"));
            return Err(RefusedByHook);
        };
        let data = source.page_of(gfn);
        Ok(calls::mem_page_add(
            self.td.tdr(),
            gfn,
            page,
            source.page,
            data,
        ))
    }

    /// Waits for the module's answer and settles every unit.
    pub(crate) fn settle(&self, seam: &mut Seam<'_>, sent: Sent<'_>) -> Result<Settled, SeamError> {
        let Sent {
            units,
            tags,
            runs,
            flight,
            measured,
        } = sent;
        let mut settled = Settled {
            complete: true,
            ..Settled::default()
        };
        let confirmed = match flight.map_or(Ok(Vec::new()), |flight| seam.wait(flight)) {
            Ok(results) => {
                let (confirmed, failed) = tally(units.len(), &tags, &runs, &results);
                settled.failed = failed.map(|(call, result)| {
                    let leaf = leaf_of(tags[call].kind, self.td.is_runnable());
                    if !result.status().is_busy() {
                        self.bugs.bug(Check::Seamcall, || {
                            format!("SEAMCALL {leaf} failed: {} {result:x?}", result.status())
                        });
                    }
                    (leaf, result)
                });
                confirmed
            }
            Err(error @ SeamError::Unknown { .. }) => {
                if measured {
                    self.bugs.kill(Check::Unsettled, || {
                        format!("the measurement is unknown: {error}")
                    });
                }
                units
                    .iter()
                    .map(|unit| self.read_back(seam, unit))
                    .collect::<Result<_, _>>()?
            }
            Err(error) => {
                if matches!(error, SeamError::Restarted { .. }) {
                    self.bugs.kill(Check::Unsettled, || error.to_string());
                }
                for unit in units {
                    unit.settle(0, 0);
                }
                return Err(error);
            }
        };
        let _span = (seam.is_traced() && crate::vm::spans::watched()).then(|| {
            let leaves: usize = confirmed.iter().map(|unit| unit.leaves).sum();
            let tables: usize = confirmed.iter().map(|unit| unit.links).sum();
            tracing::info_span!("settle", kvm.tables = tables, kvm.leaves = leaves).entered()
        });
        for (unit, confirmed) in units.into_iter().zip(confirmed) {
            let wanted = (unit.links(), unit.leaves());
            settled.complete &= wanted == (confirmed.links, confirmed.leaves);
            let leaves = unit.settle(confirmed.links, confirmed.leaves);
            settled.units.push(Confirmed {
                leaves,
                ..confirmed
            });
        }
        Ok(settled)
    }

    /// Asks the module how far a unit got. Nobody else can have changed its entries: they are
    /// frozen here.
    fn read_back(&self, seam: &mut Seam<'_>, unit: &Unit<'_>) -> Result<Confirmed, SeamError> {
        let mut confirmed = Confirmed::default();
        for op in unit.ops() {
            let (gfn, level, page) = match op {
                ExternalOp::LinkSpt { gfn, level, .. } => (gfn, level, None),
                ExternalOp::SetSpte { gfn, level, spte } => (gfn, level, Some(spte::pfn(spte))),
                ExternalOp::RemoveSpte { .. } | ExternalOp::FreeSpt { .. } => continue,
            };
            let result = self.read_entry(seam, gfn, level)?;
            let view = SeptView::from_regs(result.rcx, result.rdx)
                .filter(|_| result.status().is_success());
            let there = match (page, view) {
                (None, Some(view)) => view.at.state == PublicState::NL_MAPPED,
                (Some(page), Some(view)) => view.page == Some(page),
                (_, None) => false,
            };
            match (there, page) {
                (false, _) => break,
                (true, None) => confirmed.links += 1,
                (true, Some(_)) => confirmed.leaves += 1,
            }
        }
        Ok(confirmed)
    }
}

/// Tries of a look at an entry that another call holds.
const READ_TRIES: u32 = 1000;

impl Hooks<'_> {
    /// TDH.MEM.SEPT.RD, until it is an answer: busy says nothing about the entry.
    pub(super) fn read_entry(
        &self,
        seam: &mut Seam<'_>,
        gfn: Gfn,
        level: Level,
    ) -> Result<SeamcallResult, SeamError> {
        let read = calls::mem_sept_rd(self.td.tdr(), gfn, level);
        for _ in 0..READ_TRIES {
            let result = seam.call(&read)?;
            let status = result.status();
            if status.is_success() || status.is(CompletionStatus::EPT_WALK_FAILED) {
                return Ok(result);
            }
            if !status.is_busy() {
                let reason = format!("{} of {gfn} answers {status}", read.leaf);
                return Err(SeamError::Unknown { reason });
            }
            thread::yield_now();
        }
        Err(SeamError::Unknown {
            reason: format!("{} of {gfn} stays busy", read.leaf),
        })
    }
}

fn leaf_of(kind: Kind, runnable: bool) -> tdx_defs::Leaf {
    use tdx_defs::Leaf;
    match kind {
        Kind::Link => Leaf::MEM_SEPT_ADD,
        Kind::Leaf if runnable => Leaf::MEM_PAGE_AUG,
        Kind::Leaf => Leaf::MEM_PAGE_ADD,
        Kind::Extend => Leaf::MR_EXTEND,
    }
}

/// How far each unit got, and which call did not succeed.
fn tally(
    units: usize,
    tags: &[Tag],
    runs: &[u32],
    results: &[SeamcallResult],
) -> (Vec<Confirmed>, Option<(usize, SeamcallResult)>) {
    let mut confirmed = vec![Confirmed::default(); units];
    for (call, ((tag, &runs), result)) in tags.iter().zip(runs).zip(results).enumerate() {
        let good = result.completed.min(runs) as usize;
        match tag.kind {
            Kind::Link => confirmed[tag.unit].links += good,
            Kind::Leaf => confirmed[tag.unit].leaves += good,
            Kind::Extend => {}
        }
        if good < runs as usize {
            return (confirmed, Some((call, *result)));
        }
    }
    (confirmed, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_that_succeeded_is_confirmed() {
        let tag = |unit, kind| Tag { unit, kind };
        let tags = [tag(0, Kind::Link), tag(0, Kind::Leaf), tag(1, Kind::Leaf)];
        let runs = [1, 4, 4];
        let result = |completed| SeamcallResult {
            completed,
            ..SeamcallResult::default()
        };
        for (case, results, expected, failed) in [
            ("all", vec![1, 4, 4], [(1, 4), (0, 4)], None),
            ("link refused", vec![0], [(0, 0), (0, 0)], Some(0)),
            (
                "in the middle of a run",
                vec![1, 2],
                [(1, 2), (0, 0)],
                Some(1),
            ),
            (
                "in the second unit",
                vec![1, 4, 3],
                [(1, 4), (0, 3)],
                Some(2),
            ),
        ] {
            let results: Vec<_> = results.into_iter().map(result).collect();
            let (confirmed, failure) = tally(2, &tags, &runs, &results);
            let got: Vec<_> = confirmed.iter().map(|c| (c.links, c.leaves)).collect();
            assert_eq!(got, expected, "{case}");
            assert_eq!(failure.map(|(call, _)| call), failed, "{case}");
        }
    }
}
