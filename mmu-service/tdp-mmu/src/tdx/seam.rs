//! Carrying SEAMCALLs: one by one or in runs, counted, with the retries that every wrapper has.
//!
//! Source: arch/x86/include/asm/tdx.h, `sc_retry()` (entropy). In propagation mode `kernel` each
//! call is a message of its own; in mode `batched` neighbours travel as runs, many a message.

use std::ops::Range;

use tdx_defs::{CompletionStatus, Leaf, Repeat, Seamcall, SeamcallResult};

use super::calls::Step;
use crate::counts::Counts;
use crate::seam::{Batch, Chain, MAX_CALLS, MAX_REPEAT, SeamError, SeamPort, Ticket, Via};
use crate::vm::Mode;

/// RDRAND_RETRY_LOOPS: tries of a call that found no entropy.
const ENTROPY_TRIES: u32 = 10;
/// Most calls that one operation keeps for its report.
const MAX_TRACE: usize = 4096;

/// What to do about a step that did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Make the call once more.
    Again,
    /// Go on with the next step.
    Next,
    /// Leave out everything behind it.
    Stop,
}

/// The way to the module for the length of one operation.
pub(crate) struct Seam<'a> {
    port: &'a dyn SeamPort,
    pub(crate) mode: Mode,
    lp: u32,
    pub(crate) counts: Counts,
    /// Calls as they were made, when somebody wants to see them.
    trace: Option<Vec<(Leaf, CompletionStatus)>>,
}

/// A message under way, with what is needed to count its answer.
pub(crate) struct InFlight {
    ticket: Ticket,
    runs: Vec<(Leaf, u32)>,
}

impl<'a> Seam<'a> {
    pub(crate) fn new(port: &'a dyn SeamPort, mode: Mode, lp: u32) -> Self {
        Self {
            port,
            mode,
            lp,
            counts: Counts::default(),
            trace: None,
        }
    }

    /// Keeps the calls for a report.
    pub(crate) fn traced(self) -> Self {
        Self {
            trace: Some(Vec::new()),
            ..self
        }
    }

    /// Whether somebody watches this operation.
    pub(crate) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    pub(crate) fn take_trace(&mut self) -> Vec<(Leaf, CompletionStatus)> {
        self.trace.take().unwrap_or_default()
    }

    /// Number of a new chain of messages, where there are such.
    pub(crate) fn chain(&self) -> Option<u64> {
        match self.mode {
            Mode::Kernel => None,
            Mode::Batched => self.port.chain(),
        }
    }

    /// Sends a message.
    pub(crate) fn submit(&mut self, lp: Option<u32>, calls: Vec<Seamcall>) -> InFlight {
        self.submit_link(lp, None, calls)
    }

    /// Sends a message that may be a link of a chain.
    pub(crate) fn submit_link(
        &mut self,
        lp: Option<u32>,
        chain: Option<Chain>,
        calls: Vec<Seamcall>,
    ) -> InFlight {
        let runs = calls.iter().map(|call| (call.leaf, call.count())).collect();
        let via = match self.mode {
            Mode::Kernel => Via::Rpc,
            Mode::Batched => Via::Stream,
        };
        self.counts.rpcs += 1;
        let lp = lp.unwrap_or(self.lp);
        let ticket = self.port.submit(Batch {
            lp,
            via,
            stop_on_error: true,
            chain,
            calls,
        });
        InFlight { ticket, runs }
    }

    /// Waits for a message's answer and counts what ran.
    pub(crate) fn wait(&mut self, sent: InFlight) -> Result<Vec<SeamcallResult>, SeamError> {
        let results = sent.ticket.wait()?;
        for (&(leaf, runs), result) in sent.runs.iter().zip(&results) {
            let failed = u32::from(result.completed < runs);
            self.counts
                .seamcalls
                .add(leaf, u64::from(result.completed.min(runs) + failed));
            if let Some(trace) = &mut self.trace {
                let room = MAX_TRACE.saturating_sub(trace.len());
                let good = (leaf, CompletionStatus::SUCCESS);
                trace.extend(std::iter::repeat_n(
                    good,
                    (result.completed as usize).min(room),
                ));
                if failed != 0 && trace.len() < MAX_TRACE {
                    trace.push((leaf, result.status()));
                }
            }
        }
        Ok(results)
    }

    /// One call, repeated while the module finds no entropy.
    pub(crate) fn call(&mut self, step: &Step) -> Result<SeamcallResult, SeamError> {
        let mut tries = 0;
        loop {
            let sent = self.submit(step.lp, vec![step.clone().into_seamcall()]);
            let results = self.wait(sent)?;
            let result = results.first().copied().ok_or_else(|| SeamError::Unknown {
                reason: format!("no result for {}", step.leaf),
            })?;
            tries += 1;
            let no_entropy = result.rax == CompletionStatus::RND_NO_ENTROPY.0;
            if !no_entropy || tries == ENTROPY_TRIES {
                return Ok(result);
            }
        }
    }

    /// Makes the calls of `steps` in order. `judge` decides about each that does not succeed; it
    /// must bound its own retries.
    pub(crate) fn script(
        &mut self,
        steps: &[Step],
        judge: &mut dyn FnMut(&mut Counts, usize, &SeamcallResult) -> Verdict,
    ) -> Result<(), SeamError> {
        let runs = runs_of(steps.len(), |first, at| {
            let (first, second) = (&steps[first], &steps[first + 1]);
            let (before, step) = (&steps[at - 1], &steps[at]);
            alike(first, step) && strides(first, second) == strides(before, step)
        });
        self.script_of(runs, &|at| steps[at].clone(), judge)
    }

    /// The same for calls that `step` makes by their number, in runs as [`runs_of`] finds them.
    pub(crate) fn script_of(
        &mut self,
        mut pending: Vec<Range<usize>>,
        step: &dyn Fn(usize) -> Step,
        judge: &mut dyn FnMut(&mut Counts, usize, &SeamcallResult) -> Verdict,
    ) -> Result<(), SeamError> {
        let mut no_entropy = 0;
        while !pending.is_empty() {
            let (lp, calls, taken) = self.pack(step, &pending);
            let sent = self.submit(lp, calls);
            let results = self.wait(sent)?;
            if results.is_empty() {
                return Err(SeamError::Unknown {
                    reason: "no result for a batch".into(),
                });
            }
            let mut left = Vec::new();
            let mut results = results.iter();
            let mut behind = pending.into_iter();
            let mut now = behind.next();
            for range in taken {
                // What the message took is in front of what is pending, in the same order.
                now = match now.take() {
                    Some(run) if range.end < run.end => Some(range.end..run.end),
                    _ => behind.next(),
                };
                let Some(result) = results.next() else {
                    left.push(range);
                    continue;
                };
                let good = range.start + (result.completed as usize).min(range.len());
                if good == range.end {
                    continue;
                }
                let again = if result.rax == CompletionStatus::RND_NO_ENTROPY.0
                    && no_entropy + 1 < ENTROPY_TRIES
                {
                    no_entropy += 1;
                    true
                } else {
                    match judge(&mut self.counts, good, result) {
                        Verdict::Again => true,
                        Verdict::Next => false,
                        Verdict::Stop => return Ok(()),
                    }
                };
                let from = good + usize::from(!again);
                if from < range.end {
                    left.push(from..range.end);
                }
            }
            left.extend(now);
            left.extend(behind);
            pending = left;
        }
        Ok(())
    }

    /// The next message: logical processor, calls, and which steps each call stands for.
    fn pack(
        &self,
        step: &dyn Fn(usize) -> Step,
        pending: &[Range<usize>],
    ) -> (Option<u32>, Vec<Seamcall>, Vec<Range<usize>>) {
        let lp = step(pending[0].start).lp;
        let mut calls: Vec<Seamcall> = Vec::new();
        let mut taken: Vec<Range<usize>> = Vec::new();
        for run in pending {
            let mut at = run.start;
            while at < run.end {
                let first = step(at);
                let full =
                    calls.len() == MAX_CALLS || (self.mode == Mode::Kernel && !calls.is_empty());
                if first.lp != lp || full {
                    return (lp, calls, taken);
                }
                let count = match self.mode {
                    Mode::Kernel => 1,
                    Mode::Batched => (run.end - at).min(MAX_REPEAT as usize),
                };
                let repeat = (count > 1).then(|| repeat(&first, &step(at + 1), count));
                calls.push(Seamcall {
                    repeat,
                    ..first.into_seamcall()
                });
                taken.push(at..at + count);
                at += count;
            }
        }
        (lp, calls, taken)
    }
}

/// The longest runs among `count` steps, from the front: `goes_on(first, at)` says whether step `at`
/// follows the one before it as the second step of the run follows its `first`.
pub(crate) fn runs_of(count: usize, goes_on: impl Fn(usize, usize) -> bool) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut first = 0;
    for at in 1..=count {
        if at == count || !goes_on(first, at) {
            runs.push(first..at);
            first = at;
        }
    }
    runs
}

/// Whether two steps may be calls of one run.
fn alike(one: &Step, other: &Step) -> bool {
    let no_data = one.data.is_none() && other.data.is_none();
    no_data
        && one.leaf == other.leaf
        && one.version == other.version
        && one.rdx == other.rdx
        && one.lp == other.lp
}

/// Registers of one step less those of the other: what a run adds after each call.
fn strides(from: &Step, to: &Step) -> [i64; 3] {
    let stride = |from: u64, to: u64| to.wrapping_sub(from).cast_signed();
    [
        stride(from.rcx, to.rcx),
        stride(from.r8, to.r8),
        stride(from.r9, to.r9),
    ]
}

fn repeat(first: &Step, second: &Step, count: usize) -> Repeat {
    let [rcx_stride, r8_stride, r9_stride] = strides(first, second);
    Repeat {
        // At most MAX_REPEAT.
        count: u32::try_from(count).unwrap_or(MAX_REPEAT),
        rcx_stride,
        r8_stride,
        r9_stride,
    }
}

/// Makes `step` the next call of `run`, if the registers go on as a run's do.
pub(crate) fn join(run: &mut Seamcall, step: &Step) -> bool {
    let same = run.leaf == step.leaf
        && run.version == step.version
        && run.rdx == step.rdx
        && run.data.is_empty()
        && step.data.is_none();
    if !same || run.count() >= MAX_REPEAT {
        return false;
    }
    let stride = |first: u64, now: u64| now.wrapping_sub(first).cast_signed();
    let Some(repeat) = &mut run.repeat else {
        // Any two calls make a run.
        run.repeat = Some(Repeat {
            count: 2,
            rcx_stride: stride(run.rcx, step.rcx),
            r8_stride: stride(run.r8, step.r8),
            r9_stride: stride(run.r9, step.r9),
        });
        return true;
    };
    let count = i64::from(repeat.count);
    let follows = |first: u64, stride: i64, now: u64| {
        first.wrapping_add_signed(stride.wrapping_mul(count)) == now
    };
    let joins = follows(run.rcx, repeat.rcx_stride, step.rcx)
        && follows(run.r8, repeat.r8_stride, step.r8)
        && follows(run.r9, repeat.r9_stride, step.r9);
    repeat.count += u32::from(joins);
    joins
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::super::calls;
    use super::*;
    use crate::sync::{Mutex, lock};
    use tdx_defs::{Gfn, Pfn};

    /// A module that answers busy to the calls whose RCX it is told, once each.
    struct Busy(Mutex<Vec<u64>>, Mutex<Vec<Batch>>);

    impl SeamPort for Busy {
        fn submit(&self, batch: Batch) -> Ticket {
            lock(&self.1).push(batch.clone());
            let mut results = Vec::new();
            for mut call in batch.calls {
                let mut result = SeamcallResult::default();
                for _ in 0..call.count() {
                    let mut busy = lock(&self.0);
                    if let Some(at) = busy.iter().position(|&rcx| rcx == call.rcx) {
                        busy.remove(at);
                        result.rax = CompletionStatus::OPERAND_BUSY.0;
                        break;
                    }
                    result.completed += 1;
                    call.step();
                }
                results.push(result);
                if result.rax >> 63 != 0 {
                    break;
                }
            }
            Ticket::ready(Ok(results))
        }
    }

    fn blocks(count: u64) -> Vec<Step> {
        let tdr = Pfn::new(0x1000);
        (0..count)
            .map(|gfn| calls::mem_range_block(tdr, Gfn::new(gfn), tdx_defs::Level::L4K))
            .chain([calls::mem_track(tdr)])
            .collect()
    }

    #[test]
    fn runs_join_in_batched_mode_and_not_in_kernel_mode() {
        for (mode, messages) in [(Mode::Batched, 1), (Mode::Kernel, 11)] {
            let port = Busy(Mutex::default(), Mutex::default());
            let mut seam = Seam::new(&port, mode, 0);
            seam.script(&blocks(10), &mut |_, _, _| panic!("nothing fails"))
                .unwrap();
            assert_eq!(seam.counts.rpcs, messages, "{mode:?}");
            assert_eq!(seam.counts.seamcalls.get(Leaf::MEM_RANGE_BLOCK), 10);
            assert_eq!(seam.counts.seamcalls.get(Leaf::MEM_TRACK), 1);
        }
    }

    #[test]
    fn a_step_that_fails_is_judged_and_the_rest_goes_on() {
        for mode in [Mode::Batched, Mode::Kernel] {
            for (verdict, blocked, calls) in [
                (Verdict::Again, 10, 12),
                (Verdict::Next, 9, 11),
                (Verdict::Stop, 4, 5),
            ] {
                let port = Busy(Mutex::new(vec![0x4000]), Mutex::default());
                let mut seam = Seam::new(&port, mode, 0);
                let mut judged = Vec::new();
                seam.script(&blocks(10), &mut |_, step, result| {
                    assert!(result.status().is_busy());
                    judged.push(step);
                    verdict
                })
                .unwrap();
                assert_eq!(judged, [4], "{mode:?} {verdict:?}");
                assert_eq!(seam.counts.seamcalls.total(), calls, "{mode:?} {verdict:?}");
                let good: u64 = seam.counts.seamcalls.get(Leaf::MEM_RANGE_BLOCK) - 1;
                assert_eq!(good, blocked, "{mode:?} {verdict:?}");
            }
        }
    }
}
